"""A corpus longer than memory: what reading, tokenising and packing hold does not grow with the bytes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest

from seqzoo.pipelines.text import corpus as corpora
from seqzoo.pipelines.text.corpus import load_corpus
from seqzoo.pipelines.text.data import TextData
from seqzoo.pipelines.text.tokenizer import ByteTokenizer

MB = 1 << 20
LINES = b"".join(b"line %07d of a text\n" % i for i in range(5000))


def write(path: Path, size: int, kind: str) -> Path:
    """About `size` bytes: one document without lines or with, 32 of them that a separator cuts, or JSON lines."""
    number = size // len(LINES)
    with path.open("wb") as file:
        for i in range(number):
            if kind == "jsonl":
                file.write(json.dumps({"text": LINES.decode(), "id": i}).encode() + b"\n")
                continue
            file.write(LINES.replace(b"\n", b" ") if kind == "one" else LINES)
            if kind == "many" and i % (number // 32) == 0:
                file.write(b"\n\n")
    return path


def peak(path: Path, folder: Path, kind: str) -> float:
    """Most megabytes held while the corpus is read and batches of every kind are taken from it."""
    tracemalloc.start()
    try:
        cut = "\\n\\n" if kind == "many" else None
        data = TextData(path, document_separator=cut, seq_len=256, batch_size=8, cache_dir=folder)
        data.setup("fit")
        data.protocols = ("rows", "sliding")
        for loader in (data.train_dataloader(), data.val_dataloader(), *data.test_dataloader()):
            for _, batch in zip(range(300), loader, strict=False):
                assert batch["tokens"].numel() > 0
        return tracemalloc.get_traced_memory()[1] / MB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("kind", ["one", "lines", "many", "jsonl"])
def test_memory_does_not_grow_with_the_corpus(tmp_path: Path, kind: str) -> None:
    found = [peak(write(tmp_path / f"{n}.{kind}", n * MB, kind), tmp_path, kind) for n in (8, 8, 40)]
    assert found[2] - found[1] < 1.5, found  # 4 bytes for a row's place in the shuffle


@pytest.mark.parametrize("piece", [1 << 20, 4])
def test_excerpts_are_bounded_and_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, piece: int) -> None:
    """The first bytes of the documents, or the last, without reading the others."""
    for i in range(5):
        (tmp_path / f"{i}.txt").write_bytes(bytes([65 + i]) * 10 + b"12345")
    monkeypatch.setattr(corpora, "_PIECE", piece)
    found = load_corpus(str(tmp_path), ByteTokenizer(), split_ratio=(1, 0, 0), cache_dir=tmp_path / "cache")
    whole = b"".join(bytes([65 + i]) * 10 + b"12345" for i in range(5))
    for most in (1, 15, 22, 99):
        assert found.excerpt("train", ByteTokenizer(), most) == whole[:most]
        assert found.excerpt("train", ByteTokenizer(), most, last=True) == whole[-most:]
    assert found.excerpt("test", ByteTokenizer(), 9) == b""


def test_baselines_of_parts_say_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from seqzoo.pipelines.text import data as module

    (tmp_path / "a.txt").write_bytes(b"".join(b"line %d\n" % i for i in range(900)))
    options = {"split_ratio": (0.5, 0.1, 0.4)}
    whole = TextData(tmp_path / "a.txt", cache_dir=tmp_path / "whole", **options).compressors()
    monkeypatch.setattr(module, "TEST_MOST", 1000)
    monkeypatch.setattr(module, "TRAIN_MOST", 2000)
    part = TextData(tmp_path / "a.txt", cache_dir=tmp_path / "part", **options).compressors()
    assert list(whole) == ["chance", "byte frequencies", "zlib-9", "LZMA", "LZMA primed with the training text"]
    assert list(part)[2] == "zlib-9, first 1000 bytes"
    assert list(part)[4] == "LZMA primed with the last 2000 bytes of the training text, first 1000 bytes"


GIANT = """
import os, resource, sys
import torch
from seqzoo.pipelines.text.data import TextData
def used():
    return {line.split(":")[0]: int(line.split()[1]) << 10 for line in open("/proc/self/status") if "VmData" in line}
def batches(path):
    data = TextData(path, seq_len=512, batch_size=16, cache_dir=sys.argv[3])
    data.setup("fit")
    for loader in (data.train_dataloader(), data.val_dataloader()):
        for step, batch in zip(range(300), loader):
            last = batch
    return len(data.corpus.tokens), last["tokens"].unique().tolist()
batches(sys.argv[2])  # what is imported and compiled on the way
limit = used()["VmData"] + (128 << 20)
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    bytearray(200 << 20)
    sys.exit("the limit is not kept")
except MemoryError:
    pass
print(*batches(sys.argv[1]))
"""


@pytest.mark.slow
def test_a_document_longer_than_memory(tmp_path: Path) -> None:
    """Two gigabytes of one document in a process that may take 128 MB more than an empty run."""
    with (tmp_path / "giant.txt").open("wb") as file:
        file.truncate(2 << 30)  # a file of holes: all NUL
    (tmp_path / "small.txt").write_bytes(LINES)
    words = [sys.executable, "-c", GIANT, *(str(tmp_path / n) for n in ("giant.txt", "small.txt", "cache"))]
    environment = {**os.environ, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split() == [str((2 << 30) + 6), "[0]"]


def test_a_character_is_not_cut_by_the_parts_of_a_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without lines to cut at, parts end between characters: a tokenizer of text reads each part alone."""
    from seqzoo.pipelines.text import writing
    from seqzoo.pipelines.text.sources import whole

    text = "aé€😀".encode() * 40
    for piece in range(4, 24):
        monkeypatch.setattr(writing, "_PIECE", piece)
        found = list(writing.parts(whole("t", text)))
        assert b"".join(found) == text and max(map(len, found)) <= piece
        for part in found:
            part.decode()  # raises where a character is cut
    monkeypatch.setattr(writing, "_PIECE", 16)
    binary = bytes(range(128, 192)) * 8  # only continuation bytes: no character at all
    found = list(writing.parts(whole("b", binary)))
    assert b"".join(found) == binary and max(map(len, found)) <= 16
