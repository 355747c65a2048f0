"""Long Range Arena's two tasks on documents, byte by byte, from a folder of the user's (arXiv:2011.04006, 2.2 and 2.3).

Text: is a film review positive? IMDb as its archive unpacks, 25,000 for training and 25,000 for the test. Retrieval:
does one paper cite the other? Pairs from the ACL Anthology Network as the release's tab-separated files have them.
Tokens are bytes; 0, which no text has, is padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError, nearest
from .bits import bits, stream
from .split import Split, cached_splits, pad

# bytes of a review: what the release's configuration reads, and what its paper and all later work do
PROTOCOLS = {"release": 1000, "4k": 4096}
TEXT_ADVICE = "unpack aclImdb_v1.tar.gz from https://ai.stanford.edu/~amaas/data/sentiment/ there"
RETRIEVAL_LENGTH = 4000  # bytes of each document of a pair
RETRIEVAL_ADVICE = (
    "unpack lra_release.gz of https://github.com/google-research/long-range-arena there, or use citation_splits"
)
RETRIEVAL_FILES = {"train": "train", "val": "eval", "test": "test"}  # new_aan_pairs.eval.tsv is for validation
CLASSES = ("neg", "pos")
_COLUMNS = 5  # label, number of the first paper and of the second, their texts


def text_splits(
    folder: str | Path,
    *,
    protocol: str = "4k",
    val: int | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> dict[str, Split]:
    """The reviews in `folder`/{train,test}/{neg,pos}/*.txt, cut at 1,000 bytes (protocol "release") or 4,096 ("4k").

    The release validates on the test reviews, and so does later work: with `val` None "val" is "test" again. `val=n`
    holds n of the training reviews out instead, which is the cleaner experiment and not the published one. Raises
    UserError where the folder is not laid out so.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"no protocol {protocol!r} of the Text task;{nearest(protocol, PROTOCOLS)}")
    root = Path(folder).expanduser()
    root = root / "aclImdb" if (root / "aclImdb").is_dir() else root
    files = {part: {name: _reviews(root, part, name) for name in CLASSES} for part in ("train", "test")}
    number = sum(map(len, files["train"].values()))
    if val is not None and not 1 <= val < number:
        raise UserError(f"val={val} must be 1 to {number - 1}, of the {number} reviews for training, or null")

    def make() -> dict[str, Split]:
        train, test = (_read_reviews(files[part], PROTOCOLS[protocol], seed, part) for part in ("train", "test"))
        if val is None:
            return {"train": train, "val": test, "test": test}
        return {"train": train[val:], "val": train[:val], "test": test}

    listed = [file for names in files.values() for paths in names.values() for file in paths]
    options = {"task": "text", "protocol": protocol, "val": val, "seed": seed, "files": _state(listed)}
    return cached_splits(root, options, cache_dir, make)


def retrieval_splits(folder: str | Path, *, cache_dir: str | Path | None = None) -> dict[str, Split]:
    """The pairs in the one *.train.tsv, *.eval.tsv and *.test.tsv of `folder`: label, two numbers, two texts.

    tokens uint8 (N, 2, 4000). Raises UserError, with the line, for a row that is something else.
    """
    root = Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f"no folder {root} with pairs of documents; {RETRIEVAL_ADVICE}")
    root = next((inner for inner in (root, root / "tsv_data") if any(inner.glob("*.train.tsv"))), root)
    files: dict[str, Path] = {}
    for name, ending in RETRIEVAL_FILES.items():
        found = sorted(root.glob(f"*.{ending}.tsv"))
        if len(found) != 1:
            what = ", ".join(file.name for file in found) or "no such file"
            raise UserError(f"{root} must have one *.{ending}.tsv, but has {what}; {RETRIEVAL_ADVICE}")
        files[name] = found[0]

    def make() -> dict[str, Split]:
        return {name: read_pairs(file) for name, file in files.items()}

    return cached_splits(root, {"task": "retrieval", "files": _state(list(files.values()))}, cache_dir, make)


def read_pairs(file: Path, length: int = RETRIEVAL_LENGTH) -> Split:
    """The pairs of one file of the release, each document cut at `length` bytes. Raises UserError with the line."""
    # Twice through the file: its texts are far longer than what is kept of them.
    count = sum(1 for _ in _pairs(file))
    if not count:
        raise UserError(f"{file} has no pairs")
    tokens = np.zeros((count, 2, length), dtype=np.uint8)
    lengths = np.zeros((count, 2), dtype=np.int32)
    labels = np.zeros(count, dtype=np.int64)
    for row, (label, *texts) in enumerate(_pairs(file)):
        tokens[row], lengths[row] = pad(texts, length)
        labels[row] = label
    return Split(tokens, lengths, labels, num_classes=2, vocab_size=256)


def _pairs(file: Path) -> Iterator[tuple[int, bytes, bytes]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            fields = line.rstrip(b"\r\n").split(b"\t")
            if len(fields) != _COLUMNS:
                raise UserError(f"{file}:{number}: {len(fields)} columns, not label, two numbers and two texts")
            try:
                label = float(fields[0])
            except ValueError:
                label = -1.0
            if label not in (0.0, 1.0):
                raise UserError(f"{file}:{number}: the label is {fields[0][:20]!r}, not 0 or 1")
            if not fields[3] or not fields[4]:
                raise UserError(f"{file}:{number}: text {1 if not fields[3] else 2} is empty")
            yield int(label), fields[3], fields[4]


def _reviews(root: Path, part: str, name: str) -> list[Path]:
    folder = root / part / name
    if not folder.is_dir():
        raise UserError(f"no folder {folder} with reviews (train and test, each with neg and pos); {TEXT_ADVICE}")
    files = sorted(folder.glob("*.txt"))
    if not files:
        raise UserError(f"no *.txt in {folder}; {TEXT_ADVICE}")
    return files


def _read_reviews(files: dict[str, list[Path]], length: int, seed: int, part: str) -> Split:
    """The reviews of all classes, shuffled, so that every beginning of the split has both."""
    paths = [(file, label) for label, name in enumerate(CLASSES) for file in files[name]]
    order = np.argsort(bits(stream(seed, f"text {part}"), np.arange(len(paths))), kind="stable")
    rows = []
    for number in order.tolist():
        with paths[number][0].open("rb") as file:
            rows.append(file.read(length))
        if not rows[-1]:
            raise UserError(f"{paths[number][0]} is empty")
    tokens, lengths = pad(rows, length)
    labels = np.array([label for _, label in paths], dtype=np.int64)[order]
    return Split(tokens, lengths, labels, num_classes=len(CLASSES), vocab_size=256)


def _state(files: list[Path]) -> list[Any]:
    """What changes when one of the files does."""
    stats = [file.stat() for file in files]
    return [[str(file), stat.st_size, stat.st_mtime_ns] for file, stat in zip(files, stats, strict=True)]
