"""Labelled documents: what is read from folders and tables, splits, batches, scores; every wrong file's message."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seqzoo.pipelines.class_scores import ConfusionSums, baselines
from seqzoo.pipelines.documents.data import DocumentData
from seqzoo.pipelines.documents.labelled import load_labelled, load_unlabelled, split_documents
from seqzoo.pipelines.documents.lra.split import Split
from seqzoo.pipelines.documents.sets import DocumentBatches, LabelledSet, from_split
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.loading import BucketSampler
from seqzoo.pipelines.text.tokenizer import ByteTokenizer

NONE: dict[str, str | None] = {"text": None, "file": None, "label": None, "split": None}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "cache"))


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def folder(tmp_path: Path, number: int = 10) -> Path:
    texts = {f"{label}/{i}.txt": f"{label} number {i}" for label in ("ham", "spam") for i in range(number)}
    return write(tmp_path / "mail", texts)


def load(path: Path, **options: Any) -> Any:
    given = {"columns": NONE, "split_ratio": (0.8, 0.1, 0.1), "seed": 0, **options}
    given["columns"] = {**NONE, **given["columns"]}
    return load_labelled(str(path), ByteTokenizer(), **given)


def texts(documents: LabelledSet) -> list[bytes]:
    spans = zip(documents.begin[:, 0], documents.length[:, 0], strict=True)
    return [documents.flat[begin : begin + length].tobytes() for begin, length in spans]


def pairs(found: Any, stage: str) -> set[tuple[bytes, str]]:
    documents = found.sets[stage]
    return set(zip(texts(documents), [found.labels[i] for i in documents.labels], strict=True))


# --- what is read


def test_a_folder_of_folders(tmp_path: Path) -> None:
    root = folder(tmp_path)
    write(root, {"ham/.hidden": "no", "spam/deep/er.bin": b"\xff\x00\xfe", "beside.txt": "not a label"})
    found = load(root)
    everything = set().union(*(pairs(found, stage) for stage in ("train", "val", "test")))
    assert everything == {
        *((f"{label} number {i}".encode(), label) for label in ("ham", "spam") for i in range(10)),
        (b"\xff\x00\xfe", "spam"),
    }
    assert found.labels == ["ham", "spam"]
    assert {name: len(found.sets[name]) for name in found.sets} == {"train": 17, "val": 2, "test": 2}
    numbers = found.sets["train"].names
    assert all((root / name).is_file() for name in numbers)


def test_given_splits(tmp_path: Path) -> None:
    root = write(
        tmp_path / "given",
        {f"train/{label}/{i}.txt": f"{label}{i}" for label in "ab" for i in range(10)}
        | {f"test/{label}/0.txt": f"{label} at last" for label in "ab"},
    )
    found = load(root)
    assert pairs(found, "test") == {(b"a at last", "a"), (b"b at last", "b")}
    assert len(found.sets["val"]) == 2 and len(found.sets["train"]) == 18
    assert "validate" in found.notes[0]
    write(root, {"valid/a/0.txt": "checked"})
    found = load(root)
    assert pairs(found, "val") == {(b"checked", "a")} and len(found.sets["train"]) == 20


@pytest.mark.parametrize("kind", ["csv", "semicolon", "tsv", "jsonl"])
def test_tables(tmp_path: Path, kind: str) -> None:
    rows = [(f'a "long", text\nnumber {i}; end', i % 2, ("train", "dev", "TEST")[i % 3]) for i in range(12)]
    path = tmp_path / f"t.{kind.replace('semicolon', 'csv')}"
    if kind == "jsonl":
        path.write_text("\n".join(json.dumps({"text": t, "stars": s, "part": p}) for t, s, p in rows))
    else:
        mark = {"csv": ",", "semicolon": ";", "tsv": "\t"}[kind]
        quoted = [('"' + t.replace('"', '""') + '"', str(s), p) for t, s, p in rows]
        path.write_text("\n".join(mark.join(row) for row in [("text", "stars", "part"), *quoted]))
    found = load(path, columns={"label": "stars", "split": "part"})
    assert found.labels == ["0", "1"]
    for stage, name in (("train", "train"), ("val", "dev"), ("test", "TEST")):
        assert pairs(found, stage) == {(t.encode(), str(s)) for t, s, p in rows if p == name}


def test_a_table_of_files_follows_them(tmp_path: Path) -> None:
    write(tmp_path, {f"docs/{i}.txt": f"text {i}" for i in range(8)})
    table = tmp_path / "labels.csv"
    table.write_text("file,label\n" + "".join(f"docs/{i}.txt,{'xy'[i % 2]}\n" for i in range(8)))
    first = load(table)
    assert (b"text 3", "y") in set().union(*(pairs(first, stage) for stage in first.sets))
    (tmp_path / "docs" / "3.txt").write_text("changed since")
    second = load(table)
    assert (b"changed since", "y") in set().union(*(pairs(second, stage) for stage in second.sets))


def test_the_second_time_nothing_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = folder(tmp_path)
    first = load(root)
    monkeypatch.setattr("seqzoo.pipelines.documents.labelled.read_part", None)
    second = load(root)
    assert pairs(first, "train") == pairs(second, "train")


def test_labels_that_are_numbers_are_in_their_order(tmp_path: Path) -> None:
    root = write(tmp_path / "n", {f"{label}/{i}": f"{label} {i}" for label in (10, 9, 100) for i in range(3)})
    assert load(root).labels == ["9", "10", "100"]


BAD: dict[str, tuple[dict[str, str | bytes], str, dict[str, str], str]] = {
    "nothing there": ({}, "mial", {}, "no such file or folder: data.path=.*mial. Did you mean mail"),
    "a text file": ({"a.txt": "x"}, "a.txt", {}, "ending in .txt: labelled documents come as a folder"),
    "no labels": ({"f/a.txt": "x"}, "f", {}, "has no sub-folders: each is a label"),
    "a table inside": ({"f/a.csv": "x"}, "f", {}, r"did you mean data.path=.*a.csv\?"),
    "empty label": ({"f/x/a": "1", "f/y/.k": ""}, "f", {}, "the label 'y' has no documents"),
    "empty file": ({"f/x/a": "1", "f/y/b": ""}, "f", {}, "y/b is empty"),
    "train beside labels": ({"f/train/x/a": "1", "f/spam/b": "2"}, "f", {}, "train beside the folder 'spam'"),
    "val twice": ({"f/train/x/a": "1", "f/val/x/a": "2", "f/dev/x/a": "3"}, "f", {}, "has val twice: dev, val"),
    "too few": ({"f/x/a": "1", "f/x/b": "2", "f/y/c": "3"}, "f", {}, "the label 'x' has 2 different document"),
    "copies": ({f"f/{c}/{i}": c for c in "xy" for i in range(9)}, "f", {}, "the label 'x' has 1 different document"),
    "no header": ({"t.csv": ""}, "t.csv", {}, "t.csv is empty"),
    "no rows": ({"t.csv": "text,label\n"}, "t.csv", {}, "has no documents"),
    "no text": ({"t.csv": "body,label\na,b\n"}, "t.csv", {}, "no column 'text' or 'file'.*Known: body, label"),
    "no label": ({"t.csv": "text,lable\na,b\n"}, "t.csv", {}, "no column 'label'.*Did you mean lable"),
    "wrong column": ({"t.csv": "text,label\na,b\n"}, "t.csv", {"text": "txt"}, "'txt' .data.text_column.*mean text"),
    "unlabelled": ({"t.csv": "text,label\na,b\nc,\n"}, "t.csv", {}, "line 3: the column 'label' is empty"),
    "empty text": ({"t.csv": "text,label\na,b\n,c\n"}, "t.csv", {}, "line 3: the column 'text' is empty"),
    "ragged": ({"t.csv": "text,label\na,b\na,b,c\n"}, "t.csv", {}, "line 3: 3 fields, but 2 columns"),
    "quotes": ({"t.csv": 'text,label\n"a"b,c\n'}, "t.csv", {}, "line 2 is not CSV"),
    "a split": ({"t.csv": "text,label,s\na,b,tran\n"}, "t.csv", {"split": "s"}, "line 2: .*'tran'. Did you mean train"),
    "no such file": (
        {"t.csv": "file,label\nd/a.txt,b\n", "d/b.txt": "x"},
        "t.csv",
        {},
        "line 2: no such file .*mean b",
    ),
    "not JSON": ({"t.jsonl": '{"text": "a", "label": 1}\n{"text"\n'}, "t.jsonl", {}, "line 2 is not JSON"),
    "no object": ({"t.jsonl": "[1]\n"}, "t.jsonl", {}, "line 1 holds a list"),
    "null label": ({"t.jsonl": '{"text": "a", "label": null}\n'}, "t.jsonl", {}, "line 1: the column 'label' is empty"),
    "unseen": (
        {"t.csv": "text,label,s\na,b,train\na2,b,train\na3,c,test\na4,b,val\n"},
        "t.csv",
        {"split": "s"},
        "no training document has the label 'c'",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_is_wrong_is_named(case: str, tmp_path: Path) -> None:
    files, path, columns, message = BAD[case]
    write(tmp_path, {"mail/x": "", **files})
    with pytest.raises(UserError, match=message):
        load(tmp_path / path, columns=columns)


def test_one_label_cannot_be_learnt(tmp_path: Path) -> None:
    root = write(tmp_path / "one", {f"only/{i}": str(i) for i in range(5)})
    with pytest.raises(UserError, match="one label only, 'only'"):
        DocumentData(path=root).setup("fit")
    DocumentData(path=root).setup("test")  # a trained model can be tested on them


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"source": "listop"}, "data.source='listop' is not a choice. Did you mean listops"),
        ({"source": "listops", "settings": {"max_lenght": 3}}, "data.settings.max_lenght. Did you mean max_length"),
        ({"settings": {"train": 3}}, "not for data.source=labelled"),
        ({"split_ratio": (0.0, 0.5, 0.5)}, "must be three parts"),
        ({"max_len": 0}, "data.max_len=0 must be a whole number"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        DocumentData(**options)


# --- splits


def test_splits_are_stratified_and_seeded() -> None:
    labels = ["a"] * 100 + ["b"] * 20 + ["c"] * 3
    keys = [f"k{i}" for i in range(len(labels))]
    stage = split_documents(keys, labels, (0.8, 0.1, 0.1), 0)
    counts = {c: [int((stage[np.array(labels) == c] == s).sum()) for s in ("train", "val", "test")] for c in "abc"}
    assert counts == {"a": [80, 10, 10], "b": [16, 2, 2], "c": [1, 1, 1]}
    assert (split_documents(keys, labels, (0.8, 0.1, 0.1), 0) == stage).all()
    assert (split_documents(keys, labels, (0.8, 0.1, 0.1), 1) != stage).any()
    order = np.random.default_rng(0).permutation(len(keys))  # of the files
    again = split_documents([keys[i] for i in order], [labels[i] for i in order], (0.8, 0.1, 0.1), 0)
    assert (again == stage[order]).all()
    assert set(split_documents(keys, labels, (0.9, 0.1, 0.0), 0)) == {"train", "val"}


def test_equal_documents_stay_together() -> None:
    keys = [f"k{i % 30}" for i in range(300)]
    stage = split_documents(keys, ["a"] * 300, (0.6, 0.2, 0.2), 0)
    assert {len({s for k, s in zip(keys, stage, strict=True) if k == key}) for key in set(keys)} == {1}


# --- batches


def make_set(lengths: list[int]) -> LabelledSet:
    ends = np.cumsum([0, *lengths])
    flat = np.arange(1, ends[-1] + 1, dtype=np.uint8)
    return LabelledSet(flat, ends[:-1, None], np.diff(ends)[:, None], np.arange(len(lengths)) % 2)


def test_a_batch_is_padded_behind_the_end() -> None:
    documents = make_set([2, 40, 3])
    batch = DocumentBatches(documents)[np.array([1, 2])]
    assert batch["tokens"].shape == (2, 64) and batch["tokens"].dtype == torch.int64
    assert batch["tokens"][1, :3].tolist() == [43, 44, 45] and batch["tokens"][1, 3:].eq(0).all()
    assert batch["mask"].sum(1).tolist() == [40, 3] and batch["labels"].tolist() == [1, 0]
    assert "mask" not in DocumentBatches(make_set([7, 7]))[np.array([0, 1])]
    cut, longer, lost = documents.cut(3)
    assert (longer, lost) == (1, 37) and texts(cut)[1] == bytes([3, 4, 5])
    order = DocumentBatches(documents, by_length=True)[np.array([0, 1, 2])]["document"]
    assert order.tolist() == [0, 2, 1]


def test_pairs_of_a_task_are_batches_of_two() -> None:
    tokens = np.arange(1, 25, dtype=np.uint8).reshape(2, 2, 6)
    lengths = np.array([[6, 2], [1, 6]], dtype=np.int32)
    documents = from_split(Split(tokens, lengths, np.array([0, 1]), 2, 256))
    batch = DocumentBatches(documents)[np.array([0, 1])]
    assert batch["tokens"].shape == batch["mask"].shape == (2, 2, 32)
    for i, j in np.ndindex(2, 2):
        assert batch["tokens"][i, j][batch["mask"][i, j]].tolist() == tokens[i, j, : lengths[i, j]].tolist()


def test_buckets_take_each_document_once_and_pad_less() -> None:
    lengths = np.random.default_rng(0).integers(1, 1000, size=1003)
    sampler = BucketSampler(lengths, 8, seed=3)
    first = list(sampler)
    assert sorted(np.concatenate(first).tolist()) == list(range(1003))
    assert [len(b) for b in first[:-1]] == [8] * 125 and len(first[-1]) == 3
    spread = np.mean([np.ptp(lengths[b]) for b in first])
    assert spread < 60  # a random batch of eight spreads over 780
    assert np.corrcoef(np.arange(125), [lengths[b].mean() for b in first[:-1]])[0, 1] < 0.3
    again = list(BucketSampler(lengths, 8, seed=3))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    sampler.set_epoch(1)
    assert any((a != b).any() for a, b in zip(first, sampler, strict=True))


def test_limit_takes_of_all_labels(tmp_path: Path) -> None:
    data = DocumentData(path=folder(tmp_path, 40), limit=20)
    data.setup("fit")
    counts = data.sets["train"].counts(2)
    assert counts.sum() == 20 and counts.min() >= 4
    whole = DocumentData(path=folder(tmp_path, 40))
    whole.setup("fit")
    assert set(data.sets["train"].names or ()) < set(whole.sets["train"].names or ())


def test_truncation_is_counted(tmp_path: Path) -> None:
    data = DocumentData(path=folder(tmp_path), max_len=12)
    data.setup("fit")
    train = data.sets["train"]
    assert train.length.max() == 12
    # "ham number 0" has 12 bytes, "spam number 0" 13
    assert data.notes[0].startswith("train: 8 of 16 documents are longer than data.max_len=12 and are cut, 4.0% ")


def test_unlabelled_documents_keep_their_order(tmp_path: Path) -> None:
    root = write(tmp_path / "new", {"b.txt": "second", "a.txt": "first", "sub/c.txt": "third"})
    documents, given = load_unlabelled(str(root), ByteTokenizer(), columns=NONE)
    assert documents.names == ["a.txt", "b.txt", "sub/c.txt"] and given == [None] * 3
    assert texts(documents) == [b"first", b"second", b"third"]
    single, _ = load_unlabelled(str(root / "b.txt"), ByteTokenizer(), columns=NONE)
    assert single.names == ["b.txt"] and texts(single) == [b"second"]
    (tmp_path / "t.csv").write_text("text,label\nx,1\ny,\n")
    documents, given = load_unlabelled(str(tmp_path / "t.csv"), ByteTokenizer(), columns=NONE)
    assert documents.names == ["t.csv:2", "t.csv:3"] and given == ["1", None]


# --- scores


def f1_of(truth: np.ndarray, answers: np.ndarray, label: int) -> float:
    """From precision and recall, as textbooks have it."""
    hits = float(((truth == label) & (answers == label)).sum())
    if not hits:
        return 0.0
    precision, recall = hits / (answers == label).sum(), hits / (truth == label).sum()
    return float(2 * precision * recall / (precision + recall))


def test_scores_against_textbook_formulas() -> None:
    random = np.random.default_rng(0)
    truth, logits = random.integers(0, 4, size=200), random.normal(size=(200, 5)).astype(np.float32)
    sums = ConfusionSums(5)
    for part in (slice(0, 7), slice(7, 150), slice(150, 200)):
        sums.update(torch.from_numpy(logits[part]), torch.from_numpy(truth[part]))
    other = ConfusionSums(5)
    other.flat = sums.flat / 2 + sums.flat / 2
    found = other.compute()
    answers = logits.argmax(1)
    assert found["accuracy"] == (answers == truth).mean() and found["items"] == 200
    assert found["macro_f1"] == pytest.approx(np.mean([f1_of(truth, answers, c) for c in range(5)]), abs=1e-12)
    loss = torch.nn.functional.cross_entropy(torch.from_numpy(logits).double(), torch.from_numpy(truth))
    assert found["loss"] == pytest.approx(float(loss), abs=1e-12)
    assert np.array(found["confusion"]).sum(1).tolist() == np.bincount(truth, minlength=5).tolist()


def test_a_class_that_never_occurs_has_no_part_in_the_mean() -> None:
    sums = ConfusionSums(3)
    sums.update(torch.tensor([[9.0, 0, 0], [9.0, 0, 0]]), torch.tensor([0, 1]))
    assert sums.compute()["macro_f1"] == pytest.approx((2 / 3 + 0) / 2)


def test_baselines_by_hand() -> None:
    rows = baselines(np.array([1, 7, 2]), np.array([5, 3, 2]), ["x", "y", "z"])
    assert rows[0]["method"] == "majority: always 'y'" and rows[0]["accuracy"] == 0.3
    assert rows[0]["macro_f1"] == pytest.approx(2 * 3 / 13 / 3)
    wanted = -(5 * np.log(2 / 13) + 3 * np.log(8 / 13) + 2 * np.log(3 / 13)) / 10
    assert rows[0]["loss"] == pytest.approx(wanted)
    assert rows[1]["accuracy"] == pytest.approx(1 / 3) and rows[1]["loss"] == pytest.approx(np.log(3))
