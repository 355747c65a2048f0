"""Hugging Face datasets that are here: saved, as files, streamed, by several processes; nothing is downloaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.text import corpus as corpora
from seqzoo.pipelines.text.corpus import Corpus, load_corpus
from seqzoo.pipelines.text.data import TextData
from seqzoo.pipelines.text.tokenizer import ByteTokenizer

datasets = pytest.importorskip("datasets", reason="datasets (seqzoo[text]) is not installed")
BYTES = ByteTokenizer()
TEXTS = [f"document {i} " * (i % 5) for i in range(40)]  # every fifth is empty


@pytest.fixture(autouse=True)
def no_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "converted")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def write(folder: Path, shards: int, kind: str = "parquet") -> Path:
    """TEXTS in order as `shards` files."""
    folder.mkdir(exist_ok=True)
    for i, part in enumerate(np.array_split(np.array(TEXTS, dtype=object), shards)):
        if kind == "parquet":
            datasets.Dataset.from_dict({"text": part.tolist()}).to_parquet(str(folder / f"train-{i}.parquet"))
        else:
            (folder / f"train-{i}.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in part))
    return folder


def contents(found: Corpus) -> dict[str, bytes]:
    return {
        name.rpartition("#")[2]: bytes(found.tokens[found.bounds[i] + 1 : found.bounds[i + 1] - 1])
        for i, name in enumerate(found.names)
    }


WANTED = {str(i): t.encode() for i, t in enumerate(TEXTS) if t}


@pytest.mark.parametrize("kind", ["parquet", "json"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_folder_of_files(tmp_path: Path, kind: str, streaming: bool) -> None:
    folder = write(tmp_path / "data", 2, kind)
    found = load_corpus(f"hf:{folder}", BYTES, streaming=streaming, cache_dir=tmp_path)
    assert contents(found) == WANTED and set(found.split.tolist()) == {0, 1, 2}
    first = load_corpus(f"hf:{folder}", BYTES, streaming=streaming, limit=7, cache_dir=tmp_path)
    assert contents(first) == {str(i): TEXTS[i].encode() for i in range(7) if TEXTS[i]}


def test_single_files_and_patterns(tmp_path: Path) -> None:
    """Parquet is a table whether or not hf: stands before it: its bytes are no text."""
    folder = write(tmp_path / "data", 2)
    for path in (f"hf:{folder}/*.parquet", f"{folder}/*.parquet"):
        assert contents(load_corpus(path, BYTES, streaming=True, cache_dir=tmp_path)) == WANTED
    half = load_corpus(str(folder / "train-1.parquet"), BYTES, streaming=True, cache_dir=tmp_path)
    assert list(contents(half).values()) == list(WANTED.values())[16:]
    with pytest.raises(UserError, match=r"ends in none of \.parquet"):
        (folder / "table.sqlite").write_bytes(b"x")
        load_corpus(f"hf:{folder}/table.sqlite", BYTES, cache_dir=tmp_path)


@pytest.mark.parametrize("shards", [2, 3])
def test_shards_are_read_side_by_side_to_the_same_corpus(
    tmp_path: Path, shards: int, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = write(tmp_path / "data", shards)
    alone = load_corpus(f"hf:{folder}", BYTES, streaming=True, cache_dir=tmp_path / "a")
    assert capsys.readouterr().out == ""
    together = load_corpus(f"hf:{folder}", BYTES, streaming=True, workers=3, cache_dir=tmp_path / "b")
    said = capsys.readouterr().out
    assert ("has 2 shard(s), so 2 of the 3 processes (data.num_workers) read it" in said) == (shards == 2)
    for name in ("tokens", "bounds", "sizes", "split"):
        assert np.array_equal(getattr(alone, name), getattr(together, name)), name
    assert list(alone.names) == list(together.names)
    assert not list((tmp_path / "b").rglob("shard*"))


def test_too_few_shards_are_said_and_read_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = load_corpus(f"hf:{write(tmp_path / 'data', 1)}", BYTES, streaming=True, workers=4, cache_dir=tmp_path)
    assert contents(found) == WANTED
    assert "has 1 shard(s), so one process reads it; more and smaller files would let all" in capsys.readouterr().out


def test_a_failing_shard_is_named(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", 2, "json")
    (folder / "train-1.jsonl").write_text('{"text": "fine"}\n{"text": broken\n')
    for workers in (0, 2):
        with pytest.raises(UserError, match=r"data\.path=hf:.*cannot read on after \d+ records"):
            load_corpus(f"hf:{folder}", BYTES, streaming=True, workers=workers, cache_dir=tmp_path)
    (folder / "train-1.jsonl").write_text('{"text": null}\n')
    with pytest.raises(UserError, match="the field 'text' holds a NoneType"):
        load_corpus(f"hf:{folder}", BYTES, streaming=True, workers=2, cache_dir=tmp_path)
    assert not list(tmp_path.rglob("tokens.bin"))


def test_a_rewritten_file_is_noticed(tmp_path: Path) -> None:
    folder = write(tmp_path / "data", 1, "json")
    load_corpus(f"hf:{folder}", BYTES, streaming=True, cache_dir=tmp_path)
    (folder / "train-0.jsonl").write_text('{"text": "other"}\n{"text": "words"}\n')
    found = load_corpus(f"hf:{folder}", BYTES, streaming=True, cache_dir=tmp_path)
    assert list(contents(found).values()) == [b"other", b"words"]


def test_names_and_paths_that_lead_nowhere(tmp_path: Path) -> None:
    write(tmp_path / "data", 1)
    for name, message in (
        (f"{tmp_path}/dat", "no such file or folder.*data"),
        (f"{tmp_path}/*.json", "no file matches this pattern"),
        ("nobody/nothing", "cannot be opened"),
    ):
        with pytest.raises(UserError, match=message):
            load_corpus(f"hf:{name}", BYTES, streaming=True, cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"cannot be opened.*train"):
        load_corpus(f"hf:{tmp_path}/data", BYTES, hf_split="valid", streaming=True, cache_dir=tmp_path)


def test_a_name_is_read_once_wherever_one_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The state of the working folder, which every run changes, is not the dataset's."""
    opened: list[str] = []

    def load(name: str, **_: Any) -> Any:
        opened.append(name)
        return datasets.Dataset.from_dict({"text": TEXTS})

    monkeypatch.setattr(datasets, "load_dataset", load)
    for place in ("one", "two"):
        (tmp_path / place).mkdir()
        monkeypatch.chdir(tmp_path / place)
        (tmp_path / place / "runs").mkdir()
        assert contents(load_corpus("hf:owner/name", BYTES, cache_dir=tmp_path / "cache")) == WANTED
    assert opened == ["owner/name"]


def test_training_goes_on_where_it_was_in_a_streamed_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write(tmp_path / "data", 2)

    def loader() -> Any:
        options: dict[str, Any] = {"seq_len": 16, "batch_size": 3, "cache_dir": tmp_path}
        return TextData(f"hf:{folder}", streaming=True, **options).train_dataloader()

    first = loader()
    whole = [batch["tokens"] for batch in first]
    batches = iter(first := loader())
    for _ in range(4):
        next(batches)
    state = first.state_dict()
    again = loader()
    monkeypatch.setattr(corpora, "write_corpus", lambda *_: pytest.fail("the corpus was read again"))
    again.load_state_dict(state)
    rest = [batch["tokens"] for batch in again]
    assert len(rest) == len(whole) - 4 > 3 and all(map(torch.equal, rest, whole[4:]))
