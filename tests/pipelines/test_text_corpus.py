"""Documents in, tokens out: nothing lost, nothing split that should not be, and clear words for what cannot be read."""

from __future__ import annotations

import json
import lzma
from pathlib import Path

import numpy as np
import pytest

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.text import corpus as corpora
from seqzoo.pipelines.text import writing
from seqzoo.pipelines.text.compressors import baselines, lzma_primed, order_zero
from seqzoo.pipelines.text.corpus import SPLITS, Corpus, assign, load_corpus
from seqzoo.pipelines.text.sources import source_files, standard_library
from seqzoo.pipelines.text.tokenizer import SPECIAL, ByteTokenizer, create_tokenizer, train_bpe

BYTES = ByteTokenizer()


def contents(found: Corpus) -> dict[str, bytes]:
    return {
        found.names[i]: bytes(found.tokens[found.bounds[i] + 1 : found.bounds[i + 1] - 1])
        for i in range(len(found.names))
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "texts"
    (root / "deep" / "er").mkdir(parents=True)
    (root / "a.txt").write_bytes(b"first\nfile\n")
    (root / "deep" / "b.md").write_bytes(b"\xff\xfe not UTF-8 \x80")
    (root / "deep" / "er" / "c.py").write_bytes(b"x = 1\r\n")
    (root / "empty.txt").write_bytes(b"")
    (root / "picture.png").write_bytes(b"\x89PNG")
    (root / "d.jsonl").write_text('{"text": "line one", "id": 1}\n\n{"text": ""}\n{"text": "z\u00e9"}\n')
    return root


def test_every_byte_of_every_document_is_there(folder: Path, tmp_path: Path) -> None:
    found = load_corpus(str(folder), BYTES, cache_dir=tmp_path)
    assert contents(found) == {
        "a.txt": b"first\nfile\n",
        "d.jsonl#1": b"line one",
        "d.jsonl#4": "zé".encode(),
        "deep/b.md": b"\xff\xfe not UTF-8 \x80",
        "deep/er/c.py": b"x = 1\r\n",
    }
    ends = np.concatenate([found.bounds[:-1], found.bounds[1:] - 1])
    assert (found.tokens[ends] == BYTES.separator).all() and found.bounds[-1] == len(found.tokens)
    assert found.sizes.tolist() == [len(c) for c in contents(found).values()]
    stages = [dict(zip(found.documents(s), found.content(s, BYTES), strict=True)) for s in SPLITS]
    assert sorted(i for s in stages for i in s) == list(range(5))
    assert all(content == list(contents(found).values())[i] for s in stages for i, content in s.items())


def test_patterns_and_single_files(folder: Path, tmp_path: Path) -> None:
    assert [p.name for p in source_files(f"{folder}/**/*.py")] == ["c.py"]
    assert source_files(str(folder / "picture.png")) == [folder / "picture.png"]
    found = load_corpus(str(folder / "a.txt"), BYTES, separator="\\n", cache_dir=tmp_path)
    assert contents(found) == {"a.txt#0": b"first", "a.txt#1": b"file"}


def test_a_single_document_is_cut_in_order_after_lines(tmp_path: Path) -> None:
    text = b"".join(b"line %d\n" % i for i in range(1000))
    (tmp_path / "one.txt").write_bytes(text)
    found = load_corpus(str(tmp_path / "one.txt"), BYTES, split_ratio=(0.9, 0.05, 0.05), cache_dir=tmp_path)
    assert list(found.names) == ["one.txt[train]", "one.txt[val]", "one.txt[test]"] and found.split.tolist() == [
        0,
        1,
        2,
    ]
    parts = list(contents(found).values())
    assert b"".join(parts) == text and all(p.endswith(b"\n") for p in parts)
    assert np.abs(found.sizes / len(text) - [0.9, 0.05, 0.05]).max() < 0.002
    whole = load_corpus(str(tmp_path / "one.txt"), BYTES, split_ratio=(1, 0, 0), cache_dir=tmp_path)
    assert list(whole.names) == ["one.txt"]
    (tmp_path / "byte.txt").write_bytes(b"x")
    assert load_corpus(str(tmp_path / "byte.txt"), BYTES, cache_dir=tmp_path).names[0] == "byte.txt"  # nothing to cut


def test_splits_are_by_document_and_depend_on_names_alone() -> None:
    names, sizes = [f"doc{i}" for i in range(400)], [100 + i for i in range(400)]
    split = assign(names, sizes, (0.8, 0.1, 0.1))
    shares = [sum(s for s, p in zip(sizes, split, strict=True) if p == part) / sum(sizes) for part in range(3)]
    assert np.abs(np.array(shares) - [0.8, 0.1, 0.1]).max() < 0.01
    order = np.random.default_rng(0).permutation(400)
    again = assign([names[i] for i in order], [sizes[i] for i in order], (0.8, 0.1, 0.1))
    assert (again == split[order]).all()
    assert sorted(assign(["a", "b", "c"], [9, 9, 9], (0.98, 0.01, 0.01)).tolist()) == [0, 1, 2]


def test_the_cache_notices_a_changed_file(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_corpus(str(folder), BYTES, cache_dir=tmp_path)
    monkeypatch.setattr(corpora, "write_corpus", lambda *_: pytest.fail("the cache was not used"))
    load_corpus(str(folder), BYTES, cache_dir=tmp_path)
    monkeypatch.undo()
    (folder / "a.txt").write_bytes(b"other")
    assert contents(load_corpus(str(folder), BYTES, cache_dir=tmp_path))["a.txt"] == b"other"


def test_long_documents_are_tokenised_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = b"abc\n" * 50 + b"x" * 70
    (tmp_path / "long.txt").write_bytes(text)
    monkeypatch.setattr(writing, "_PIECE", 37)
    seen: list[int] = []

    class Counting(ByteTokenizer):
        key = "counting"

        def encode(self, content: bytes) -> np.ndarray:
            seen.append(len(content))
            return super().encode(content)

    found = load_corpus(str(tmp_path / "long.txt"), Counting(), split_ratio=(1, 0, 0), cache_dir=tmp_path)
    assert contents(found)["long.txt"] == text and max(seen) <= 37


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"}\n{broken', "line 2 is not JSON"),
        ('["a"]', "line 1 holds a list"),
        ('{"txet": "a"}', r"no field 'text'.*txet"),
        ('{"text": 3}', "holds a int, expected text"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: str, message: str) -> None:
    (tmp_path / "bad.jsonl").write_text(line)
    with pytest.raises(UserError, match=message):
        load_corpus(str(tmp_path / "bad.jsonl"), BYTES, cache_dir=tmp_path)
    assert not list((tmp_path / "corpora").rglob("tokens.bin"))  # nothing half-written is taken for whole


def test_missing_and_empty_sources(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file.*a\.txt"):
        load_corpus(str(folder / "a.tx"), BYTES, cache_dir=tmp_path)
    with pytest.raises(UserError, match="stdlib"):
        load_corpus("stdlb", BYTES, cache_dir=tmp_path)
    with pytest.raises(UserError, match="matches this pattern"):
        load_corpus(f"{folder}/*.log", BYTES, cache_dir=tmp_path)
    with pytest.raises(UserError, match="every document is empty"):
        load_corpus(str(folder / "empty.txt"), BYTES, cache_dir=tmp_path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="give a pattern"):
        load_corpus(str(tmp_path / "none"), BYTES, cache_dir=tmp_path)


def test_the_standard_library_is_there_without_tests() -> None:
    files = standard_library()
    assert len(files) > 300 and not any("test" in p.parts or "site-packages" in p.parts for p in files)
    assert not any("sysconfigdata" in p.name for p in files)  # another on every machine


def test_datasets_on_disk(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets (seqzoo[text]) is not installed")
    rows = {"body": ["one", "two", "three"]}
    datasets.Dataset.from_dict(rows).save_to_disk(str(tmp_path / "flat"))
    found = load_corpus(f"hf:{tmp_path / 'flat'}", BYTES, field="body", limit=2, cache_dir=tmp_path)
    assert sorted(contents(found).values()) == [b"one", b"two"]
    datasets.DatasetDict({"valid": datasets.Dataset.from_dict(rows)}).save_to_disk(str(tmp_path / "split"))
    found = load_corpus(f"hf:{tmp_path / 'split'}", BYTES, field="body", hf_split="valid", cache_dir=tmp_path)
    assert len(found.names) == 3
    with pytest.raises(UserError, match=r"no split 'train'.*valid"):
        load_corpus(f"hf:{tmp_path / 'split'}", BYTES, field="body", cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"no field 'text'.*body"):
        load_corpus(f"hf:{tmp_path / 'flat'}", BYTES, cache_dir=tmp_path)


def test_bpe_files(tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers (seqzoo[text]) is not installed")
    texts = [b"the cat sat on the mat. " * 20, "the caf\u00e9 is on the hill\n".encode() * 20]
    made = train_bpe(texts, tmp_path / "bpe.json", vocab_size=300)
    assert made.vocab_size <= 300 and made.separator == 0
    again = create_tokenizer(tmp_path / "bpe.json")
    ids = again.encode(texts[1])
    assert again.key == made.key and len(ids) < len(texts[1]) / 2 and again.decode(ids.tolist()) == texts[1]
    assert again.decode(again.encode(b"\xff").tolist()) == "\ufffd".encode()
    (tmp_path / "a.txt").write_bytes(texts[0])
    found = load_corpus(str(tmp_path / "a.txt"), again, split_ratio=(1, 0, 0), cache_dir=tmp_path)
    assert found.tokens.dtype == np.uint16 and next(found.content("train", again)) == texts[0]
    for content, message in ((b"{}", "not a tokenizers JSON file"), (None, "no such file")):
        path = tmp_path / "other.json"
        if content is not None:
            path.write_bytes(content)
        else:
            path.unlink()
        with pytest.raises(UserError, match=message):
            create_tokenizer(path)
    plain = json.loads((tmp_path / "bpe.json").read_text())
    plain["added_tokens"] = []
    del plain["model"]["vocab"][SPECIAL]
    (tmp_path / "no_end.json").write_text(json.dumps(plain))
    with pytest.raises(UserError, match="has none of the tokens"):
        create_tokenizer(tmp_path / "no_end.json")
    with pytest.raises(UserError, match="at least 257"):
        train_bpe(texts, tmp_path / "small.json", vocab_size=256)


def test_compressors_by_hand() -> None:
    train, test = bytes(range(256)) * 8, bytes(range(256)) * 4
    found = baselines(test, train, test_size=len(test), train_size=len(train))
    assert found["chance"] == 8.0 and found["byte frequencies"] == pytest.approx(8.0)
    assert found["LZMA primed with the training text"] < 0.5 < found["LZMA"] < 3 < 8
    # one is added to the count of each of the 256 bytes
    expected = -(3 * np.log2(3001 / 4256) + np.log2(1001 / 4256)) / 4
    assert order_zero(b"aaab", b"aaab" * 1000) == pytest.approx(expected)
    words = np.random.default_rng(0).integers(0, 256, 5000, dtype=np.uint8).tobytes()
    assert lzma_primed(words, words) < 0.2 and 8 * len(lzma.compress(words)) / len(words) > 8


def test_the_tokenizer_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers (seqzoo[text]) is not installed")
    from seqzoo.pipelines.cli import main

    output = tmp_path / "made.json"
    assert main(["tokenizer", f"path={folder}", f"output={output}", "vocab_size=260"]) == 0
    size = sum(len(c) for c in contents(load_corpus(str(folder), BYTES, cache_dir=tmp_path)).values())
    assert f"{create_tokenizer(output).vocab_size} tokens from {size} bytes" in capsys.readouterr().out
    for words, message in (
        (["path=x"], "needs output=..."),
        (["path=x", "out=y"], "Did you mean output"),
        ([f"path={folder}", f"output={output}", "vocab_size=many"], "must be a whole number"),
        ([f"path={folder}x", f"output={output}"], "no such file"),
    ):
        assert main(["tokenizer", *words]) == 2
        assert message.lower() in capsys.readouterr().err.lower()
