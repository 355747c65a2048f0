"""A corpus as one memory-mapped row of tokens, cut into documents, which are split into train, val and test.

A document of n tokens stands there as [separator, t_1 .. t_n, separator]: n + 1 predictions, n + 1 inputs.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np

from ..cache import cache_root, cached_folder
from ..hub_datasets import is_table, local_data
from .hub import dataset_documents, dataset_shards
from .sources import read_documents, source_files
from .tokenizer import Tokenizer
from .writing import SPLITS, assign, write_corpus, write_shards

__all__ = ["SPLITS", "Corpus", "assign", "load_corpus"]
_PIECE = 1 << 20  # tokens that are decoded at a time


class Names(Sequence[str]):
    """The names of a corpus's documents, read from their file when one is asked for: most runs ask for none."""

    def __init__(self, file: Path, number: int) -> None:
        self._file, self._number = file, number
        self._names: list[str] | None = None

    def __len__(self) -> int:
        return self._number

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[str]: ...
    def __getitem__(self, index: int | slice) -> str | Sequence[str]:
        if self._names is None:
            self._names = self._file.read_bytes().decode("utf-8", "surrogateescape").split("\n")
        return self._names[index]


@dataclass(frozen=True)
class Corpus:
    """tokens: memory-mapped (T,). bounds: int64 (N + 1,), documents with both their separators. sizes: int64 (N,),
    their bytes. names: of the documents. split: uint8 (N,), index into SPLITS."""

    tokens: np.ndarray
    bounds: np.ndarray
    sizes: np.ndarray
    names: Sequence[str]
    split: np.ndarray

    def documents(self, stage: str) -> np.ndarray:
        """Numbers of the documents of "train", "val" or "test", in order of the corpus."""
        return np.flatnonzero(self.split == SPLITS.index(stage))

    def content(self, stage: str, tokenizer: Tokenizer) -> Iterator[bytes]:
        """The documents of a stage as they were, each in memory as a whole."""
        for number in self.documents(stage):
            begin, end = int(self.bounds[number]) + 1, int(self.bounds[number + 1]) - 1
            yield tokenizer.decode(self.tokens[begin:end])

    def excerpt(self, stage: str, tokenizer: Tokenizer, most: int, *, last: bool = False) -> bytes:
        """The documents of a stage joined, of more than `most` bytes the first ones, or the last."""
        found, held = [], 0
        documents = self.documents(stage)
        for number in documents[::-1] if last else documents:
            begin, end = int(self.bounds[number]) + 1, int(self.bounds[number + 1]) - 1
            while begin < end and held < most:
                piece = slice(max(begin, end - _PIECE), end) if last else slice(begin, min(begin + _PIECE, end))
                found.append(tokenizer.decode(self.tokens[piece]))
                held += len(found[-1])
                begin, end = (begin, piece.start) if last else (piece.stop, end)
            if held >= most:
                break
        text = b"".join(reversed(found) if last else found)
        return text[max(len(text) - most, 0) :] if last else text[:most]


def load_corpus(
    path: str,
    tokenizer: Tokenizer,
    *,
    field: str = "text",
    separator: str | None = None,
    split_ratio: Sequence[float] = (0.9, 0.05, 0.05),
    hf_split: str = "train",
    streaming: bool = False,
    limit: int | None = None,
    workers: int = 0,
    cache_dir: str | Path | None = None,
) -> Corpus:
    """Read, tokenise and split documents; the second time from the cache, which is keyed by the files' states.

    path: as `source_files` takes it, or "hf:" and the name, folder or files of a dataset (tables need no "hf:").
    separator: cuts text files into documents. split_ratio: parts of train, val and test by `assign`. workers: processes
    that read the shards of a streamed dataset, where there is no limit; the corpus is the same for any number. Raises
    UserError for an empty corpus and for whatever the sources raise.
    """
    text = f"hf:{path}" if is_table(str(path)) else str(path)
    ratio = list(split_ratio)
    options: dict[str, Any] = {
        "tokenizer": tokenizer.key,
        "field": field,
        "separator": separator,
        "split_ratio": ratio,
        "limit": limit,
        "format": 3,
    }
    if text.startswith("hf:"):
        name = text.removeprefix("hf:")
        local = local_data(name)
        options |= {"dataset": name, "split": hf_split, "files": None if local is None else _states(local.files)}
        anchor = _name_file(cache_dir) if local is None else local.anchor
        chosen: dict[str, Any] = {"split": hf_split, "field": field, "streaming": streaming}

        def build(folder: Path) -> None:
            shards = dataset_shards(name, workers=workers, **chosen) if workers > 1 and limit is None else []
            if not shards or not write_shards(folder, shards, tokenizer, ratio, text, workers=workers):
                write_corpus(folder, dataset_documents(name, limit=limit, **chosen), tokenizer, ratio, text)
    else:
        files = source_files(text)
        anchor = files[0] if len(files) == 1 else _common_folder(files)
        root = anchor.parent if anchor.is_file() else anchor
        options["files"] = _states(files)
        cut = None if separator is None else _escaped(separator)

        def build(folder: Path) -> None:
            write_corpus(folder, read_documents(files, root, field=field, separator=cut), tokenizer, ratio, text)

    folder = cached_folder(anchor, options, cache_dir, build, kind="corpora")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    sizes = np.load(folder / "sizes.npy", mmap_mode="r")
    return Corpus(
        np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r"),
        np.load(folder / "bounds.npy", mmap_mode="r"),
        sizes,
        Names(folder / "names.txt", len(sizes)),
        np.load(folder / "split.npy", mmap_mode="r"),
    )


def _states(files: Sequence[Path]) -> str:
    states = [(str(f), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
    return hashlib.sha256(json.dumps(states).encode()).hexdigest()


def _name_file(cache_dir: str | Path | None) -> Path:
    """What stands in the cache's key for the files of a dataset that is not here: a file that never changes, so that
    such a corpus is read once."""
    file = cache_root(cache_dir) / "datasets-by-name"
    file.touch(exist_ok=True)
    os.utime(file, (0, 0))
    return file


def _escaped(separator: str) -> bytes:
    r"""\n and \t may be typed as such."""
    return separator.encode("utf-8", "surrogateescape").replace(b"\\n", b"\n").replace(b"\\t", b"\t")


def _common_folder(files: Sequence[Path]) -> Path:
    first = files[0].resolve().parent
    while not all(f.resolve().is_relative_to(first) for f in files):
        first = first.parent
    return first
