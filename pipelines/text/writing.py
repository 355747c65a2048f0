"""Documents into the files of a corpus, one after another or by shards; memory grows with their number alone."""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from array import array
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from .hub import Shard
from .sources import Document, name_bytes, printable
from .tokenizer import Tokenizer

SPLITS = ("train", "val", "test")
_PIECE = 1 << 20  # bytes of a document that are encoded at a time


class _Writer:
    """tokens.bin and names.txt of a folder as documents come; 24 bytes of memory for each."""

    def __init__(self, folder: Path, tokenizer: Tokenizer) -> None:
        folder.mkdir(exist_ok=True)
        self.tokenizer = tokenizer
        wide = tokenizer.vocab_size
        self.dtype = np.dtype(np.uint8 if wide <= 256 else np.uint16 if wide <= 1 << 16 else "<u4")
        self.edge = np.array([tokenizer.separator], dtype=self.dtype).tobytes()
        self.lengths, self.sizes, self.digests = array("q"), array("q"), array("Q")
        self.tokens, self.names = (folder / "tokens.bin").open("wb"), (folder / "names.txt").open("wb")

    def add(self, document: Document) -> None:
        self.tokens.write(self.edge)
        number = 2
        for part in parts(document):
            tokens = self.tokenizer.encode(part).astype(self.dtype, copy=False)
            self.tokens.write(tokens.tobytes())
            number += len(tokens)
        self.tokens.write(self.edge)
        self.note(document.name, number, document.size)

    def note(self, name: str, length: int, size: int) -> None:
        """A document whose tokens are written."""
        written = name_bytes(name).replace(b"\n", b" ")
        self.names.write(b"\n" + written if self.sizes else written)
        self.lengths.append(length)
        self.sizes.append(size)
        self.digests.append(_digest(written))

    def close(self) -> None:
        self.tokens.close()
        self.names.close()


def write_corpus(
    folder: Path, documents: Iterator[Document], tokenizer: Tokenizer, ratio: list[float], path: str
) -> None:
    """Fill `folder`. A single document is cut in parts that are split in order. path: for messages.

    Raises UserError when there is no text.
    """
    documents, split = _enough(documents, ratio)
    writer = _Writer(folder, tokenizer)
    before = getattr(tokenizer, "replaced", 0)
    for document in documents:
        writer.add(document)
    lost = getattr(tokenizer, "replaced", 0) - before
    if lost:
        print(
            f"data.path={printable(path)}: {lost:,} places are not UTF-8 and are U+FFFD to this tokenizer; "
            "data.tokenizer=bytes keeps them",
            flush=True,
        )
    _finish(folder, writer, ratio, path, split)


def write_shards(
    folder: Path, shards: Sequence[Shard], tokenizer: Tokenizer, ratio: list[float], path: str, *, workers: int
) -> bool:
    """Fill `folder` as `write_corpus` does, from shards that `workers` processes read; False, with nothing written,
    where there are too few documents for that."""
    places = [folder / f"shard{i}" for i in range(len(shards))]
    with ProcessPoolExecutor(min(workers, len(shards))) as pool:
        found = list(pool.map(_write_shard, places, shards, itertools.repeat(tokenizer)))
    enough = sum(len(numbers) for numbers, *_ in found) > 1
    if enough:
        writer = _Writer(folder, tokenizer)
        records = 0
        for place, shard, (numbers, lengths, sizes, seen) in zip(places, shards, found, strict=True):
            with (place / "tokens.bin").open("rb") as tokens:
                shutil.copyfileobj(tokens, writer.tokens, 1 << 20)
            for number, length, size in zip(numbers, lengths, sizes, strict=True):
                writer.note(f"{shard.name}#{records + number}", length, size)
            records += seen
            shutil.rmtree(place)
        _finish(folder, writer, ratio, path, None)
    else:
        for place in places:
            shutil.rmtree(place)
    return enough


def _write_shard(folder: Path, shard: Shard, tokenizer: Tokenizer) -> tuple[array[int], array[int], array[int], int]:
    """In a process of its own: the tokens of a shard; numbers, lengths and bytes of its documents, and its records."""
    writer, numbers, seen = _Writer(folder, tokenizer), array("q"), 0
    for seen, document in shard.documents():
        if document is not None:
            writer.add(document)
            numbers.append(seen - 1)
    writer.close()
    return numbers, writer.lengths, writer.sizes, seen


def _finish(folder: Path, writer: _Writer, ratio: list[float], path: str, split: np.ndarray | None) -> None:
    writer.close()
    if not writer.sizes:
        raise UserError(f"data.path={printable(path)} holds no text: every document is empty")
    sizes = np.frombuffer(writer.sizes, dtype=np.int64)
    bounds = np.zeros(len(sizes) + 1, dtype=np.int64)
    np.cumsum(np.frombuffer(writer.lengths, dtype=np.int64), out=bounds[1:])
    np.save(folder / "bounds.npy", bounds)
    np.save(folder / "sizes.npy", sizes)
    if split is None:
        split = _assign(np.frombuffer(writer.digests, dtype=np.uint64), sizes, ratio)
    np.save(folder / "split.npy", split)
    (folder / "meta.json").write_text(json.dumps({"dtype": writer.dtype.str, "path": path}), encoding="utf-8")


def _enough(documents: Iterator[Document], ratio: list[float]) -> tuple[Iterator[Document], np.ndarray | None]:
    """The documents, or, where there is one for several parts, its parts in order and their split: the first 90 % of a
    single file train, as is usual."""
    wanted = [i for i, part in enumerate(ratio) if part > 0]
    first = list(itertools.islice(documents, 2))
    if len(first) != 1 or len(wanted) == 1:
        return itertools.chain(first, documents), None
    name, content, begin, end = first[0]
    cut, total, done = [], sum(ratio), 0.0
    for i in wanted:
        done += ratio[i]
        near = first[0].begin + int(first[0].size * done / total)
        stop = end if i == wanted[-1] else _place_to_cut(content, begin, near)
        cut.append(Document(f"{name}[{SPLITS[i]}]", content, begin, stop))
        begin = stop
    if not all(part.size for part in cut):
        return iter(first), None  # too little to be cut
    return iter(cut), np.array(wanted, dtype=np.uint8)


def parts(document: Document) -> Iterator[bytes]:
    """A document a megabyte at a time, cut after a line where there is one: it may be longer than memory."""
    _, content, begin, last = document
    while begin < last:
        end = min(begin + _PIECE, last)
        if end < last:
            end = _place_to_cut(content, begin, end)
        yield content[begin:end]
        begin = end


def _place_to_cut(content: Any, begin: int, near: int) -> int:
    """After the last line that ends before `near`, if one does within a megabyte; else before the character there."""
    line = content.rfind(b"\n", max(begin, near - _PIECE), near)
    if line > begin:
        return line + 1
    for place in range(near, max(begin, near - 3) - 1, -1):
        if content[place] & 0xC0 != 0x80:  # not inside a character of UTF-8
            return place
    return near


def assign(names: Sequence[str], sizes: Sequence[int], ratio: Sequence[float]) -> np.ndarray:
    """Index into SPLITS of each document, uint8 (N,): in the order of a hash of their names, train, val and test get
    documents until their parts of the bytes are reached; each part that is wanted gets at least one, train first and
    test last where there are fewer documents than parts.

    A function of names and sizes alone, so that a corpus splits in the same way everywhere.
    """
    return _assign(np.array([_digest(name_bytes(n)) for n in names], dtype=np.uint64), np.asarray(sizes), ratio)


def _digest(name: bytes) -> int:
    return int.from_bytes(hashlib.sha256(name).digest()[:8], "big")


def _assign(digests: np.ndarray, sizes: np.ndarray, ratio: Sequence[float]) -> np.ndarray:
    order, left = np.argsort(digests, kind="stable"), len(digests)
    total, split = int(sizes.sum()), np.zeros(len(digests), dtype=np.uint8)
    # From the back, so that a small test part is not what is left over.
    for part in (2, 1):
        wanted, taken = ratio[part] / sum(ratio) * total, 0
        keep = sum(share > 0 for share in ratio[:part])  # one for each part that is still to come
        while left > keep and (taken + sizes[number := order[left - 1]] / 2 < wanted or (taken == 0 and wanted > 0)):
            left -= 1
            split[number], taken = part, taken + int(sizes[number])
    return split
