"""A corpus as one memory-mapped row of tokens, cut into documents, which are split into train, val and test.

A document of n tokens stands there as [separator, t_1 .. t_n, separator]: n + 1 predictions, n + 1 inputs.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..cache import cached_folder
from ..errors import UserError
from .sources import Document, dataset_documents, read_documents, source_files
from .tokenizer import Tokenizer

SPLITS = ("train", "val", "test")
_PIECE = 1 << 24  # tokens of a document that are encoded at a time


@dataclass(frozen=True)
class Corpus:
    """tokens: memory-mapped (T,). bounds: int64 (N + 1,), documents with both their separators. sizes: int64 (N,),
    their bytes. names: of the documents. split: uint8 (N,), index into SPLITS."""

    tokens: np.ndarray
    bounds: np.ndarray
    sizes: np.ndarray
    names: list[str]
    split: np.ndarray

    def documents(self, stage: str) -> np.ndarray:
        """Numbers of the documents of "train", "val" or "test", in order of the corpus."""
        return np.flatnonzero(self.split == SPLITS.index(stage))

    def content(self, stage: str, tokenizer: Tokenizer) -> Iterator[bytes]:
        """The documents of a stage as they were."""
        for number in self.documents(stage):
            begin, end = int(self.bounds[number]) + 1, int(self.bounds[number + 1]) - 1
            yield tokenizer.decode(self.tokens[begin:end].tolist())


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
    cache_dir: str | Path | None = None,
) -> Corpus:
    """Read, tokenise and split documents; the second time from the cache, which is keyed by the files' states.

    path: as `source_files` takes it, or "hf:" and the name or folder of a dataset. separator: cuts text files into
    documents. split_ratio: parts of train, val and test by `assign`. Raises UserError for an empty corpus and for
    whatever the sources raise.
    """
    text = str(path)
    options: dict[str, Any] = {
        "tokenizer": tokenizer.key,
        "field": field,
        "separator": separator,
        "split_ratio": list(split_ratio),
        "limit": limit,
        "format": 1,
    }
    if text.startswith("hf:"):
        name = text.removeprefix("hf:")
        options |= {"dataset": name, "split": hf_split}
        local = Path(name).expanduser()
        anchor = local if local.exists() else Path.cwd()
        documents = dataset_documents(name, split=hf_split, field=field, streaming=streaming, limit=limit)
    else:
        files = source_files(text)
        anchor = files[0] if len(files) == 1 else _common_folder(files)
        root = anchor.parent if anchor.is_file() else anchor
        states = [(str(f), (s := f.stat()).st_size, s.st_mtime_ns) for f in files]
        options["files"] = hashlib.sha256(json.dumps(states).encode()).hexdigest()
        cut = None if separator is None else _escaped(separator)
        documents = read_documents(files, root, field=field, separator=cut)

    def build(folder: Path) -> None:
        _write(folder, documents, tokenizer, list(split_ratio), text)

    folder = cached_folder(anchor, options, cache_dir, build, kind="corpora")
    meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
    return Corpus(
        np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r"),
        np.load(folder / "bounds.npy"),
        np.load(folder / "sizes.npy"),
        (folder / "names.txt").read_text(encoding="utf-8").split("\n"),
        np.load(folder / "split.npy"),
    )


def _escaped(separator: str) -> bytes:
    r"""\n and \t may be typed as such."""
    return separator.encode().replace(b"\\n", b"\n").replace(b"\\t", b"\t")


def _common_folder(files: Sequence[Path]) -> Path:
    first = files[0].resolve().parent
    while not all(f.resolve().is_relative_to(first) for f in files):
        first = first.parent
    return first


def _write(folder: Path, documents: Iterator[Document], tokenizer: Tokenizer, ratio: list[float], path: str) -> None:
    dtype = np.dtype(
        np.uint8 if tokenizer.vocab_size <= 256 else np.uint16 if tokenizer.vocab_size <= 1 << 16 else "<u4"
    )
    edge = np.array([tokenizer.separator], dtype=dtype)
    bounds, sizes, names = [0], [], []
    documents, split = _enough(documents, ratio)
    with (folder / "tokens.bin").open("wb") as file:
        for document in documents:
            number = 2
            edge.tofile(file)
            for part in _parts(document):
                tokens = tokenizer.encode(part).astype(dtype)
                tokens.tofile(file)
                number += len(tokens)
            edge.tofile(file)
            bounds.append(bounds[-1] + number)
            sizes.append(document.size)
            names.append(document.name.replace("\n", " "))
    if not names:
        raise UserError(f"data.path={path} holds no text: every document is empty")
    np.save(folder / "bounds.npy", np.array(bounds, dtype=np.int64))
    np.save(folder / "sizes.npy", np.array(sizes, dtype=np.int64))
    np.save(folder / "split.npy", assign(names, sizes, ratio) if split is None else split)
    (folder / "names.txt").write_text("\n".join(names), encoding="utf-8")
    (folder / "meta.json").write_text(json.dumps({"dtype": dtype.str, "path": path}), encoding="utf-8")


def _enough(documents: Iterator[Document], ratio: list[float]) -> tuple[Iterator[Document], np.ndarray | None]:
    """The documents, or, where there is one for several parts, its parts in order and their split: the first 90 % of a
    single file train, as is usual."""
    wanted = [i for i, part in enumerate(ratio) if part > 0]
    first = list(itertools.islice(documents, 2))
    if len(first) != 1 or len(wanted) == 1:
        return itertools.chain(first, documents), None
    name, content, begin, end = first[0]
    parts, total, done = [], sum(ratio), 0.0
    for i in wanted:
        done += ratio[i]
        stop = end if i == wanted[-1] else _line_end(content, begin, first[0].begin + int(first[0].size * done / total))
        parts.append(Document(f"{name}[{SPLITS[i]}]", content, begin, stop))
        begin = stop
    if not all(part.size for part in parts):
        return iter(first), None  # too little to be cut
    return iter(parts), np.array(wanted, dtype=np.uint8)


def _line_end(content: Any, begin: int, near: int) -> int:
    """After the last line that ends before `near`; `near` itself where no line does."""
    line = content.rfind(b"\n", begin, near)
    return line + 1 if line > begin else max(near, begin)


def _parts(document: Document) -> Iterator[bytes]:
    """A document too long to be tokenised at once is cut after a line."""
    _, content, begin, last = document
    while begin < last:
        end = min(begin + _PIECE, last)
        if end < last:
            end = _line_end(content, begin, end)
        yield content[begin:end]
        begin = end


def assign(names: Sequence[str], sizes: Sequence[int], ratio: Sequence[float]) -> np.ndarray:
    """Index into SPLITS of each document, uint8 (N,): in the order of a hash of their names, train, val and test get
    documents until their parts of the bytes are reached; each part that is wanted gets at least one.

    A function of names and sizes alone, so that a corpus splits in the same way everywhere.
    """
    order = sorted(range(len(names)), key=lambda i: hashlib.sha256(names[i].encode()).digest())
    total, split = sum(sizes), np.zeros(len(names), dtype=np.uint8)
    # From the back, so that a small test part is not what is left over.
    for part in (2, 1):
        wanted, taken = ratio[part] / sum(ratio) * total, 0
        keep = 1 if ratio[0] > 0 else 0
        while order and len(order) > keep and (taken + sizes[order[-1]] / 2 < wanted or (taken == 0 and wanted > 0)):
            number = order.pop()
            split[number], taken = part, taken + sizes[number]
    return split
