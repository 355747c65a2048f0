"""A labelled set of token sequences as plain arrays, and the folder where a task's splits are kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ...atomic import atomic_write_text
from ...cache import cache_root, cached_folder
from ...errors import UserError

SPLITS = ("train", "val", "test")
_FORMAT = 1


@dataclass(frozen=True, eq=False)
class Split:
    """N sequences, or N pairs of them, with their labels.

    tokens: uint8 (N, L), or (N, 2, L) for pairs; 0 from the end of a sequence on. lengths: int32 (N,) or (N, 2).
    labels: int64 (N,), 0 .. num_classes - 1. Whether 0 is a token too is the task's; lengths decide what is padding.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    labels: np.ndarray
    num_classes: int
    vocab_size: int

    def __post_init__(self) -> None:
        if self.tokens.shape[:-1] != self.lengths.shape or self.lengths.shape[:1] != self.labels.shape:
            raise ValueError(
                f"tokens {self.tokens.shape}, lengths {self.lengths.shape} and labels {self.labels.shape} do not belong"
                " together"
            )

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def counts(self) -> np.ndarray:
        """int64 (num_classes,): how many examples have each label."""
        return np.bincount(self.labels, minlength=self.num_classes)

    @property
    def majority(self) -> float:
        """Share of the most frequent label: the accuracy of always giving that one."""
        return float(self.counts.max() / len(self)) if len(self) else float("nan")

    def __getitem__(self, rows: slice | np.ndarray) -> Split:
        """The examples of a slice or of an array of row numbers."""
        return Split(self.tokens[rows], self.lengths[rows], self.labels[rows], self.num_classes, self.vocab_size)


def pad(rows: Sequence[bytes | np.ndarray], length: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """uint8 (N, L) with zeros behind each row, and int32 (N,) lengths; rows are cut at `length`, if there is one."""
    cut = max((len(row) for row in rows), default=0) if length is None else length
    tokens = np.zeros((len(rows), cut), dtype=np.uint8)
    lengths = np.zeros(len(rows), dtype=np.int32)
    for number, row in enumerate(rows):
        values = np.frombuffer(row, dtype=np.uint8) if isinstance(row, bytes) else row
        lengths[number] = min(len(values), cut)
        tokens[number, : lengths[number]] = values[:cut]
    return tokens, lengths


def cached_splits(
    source: Path | str, options: dict[str, Any], cache_dir: str | Path | None, make: Callable[[], dict[str, Split]]
) -> dict[str, Split]:
    """What `make` gives, memory-mapped from the cache folder; made only where it does not stand there yet.

    `source` is the file or folder that the splits were made from, or the name of a generator: the cache is keyed by the
    file's state and `options` (plain values), for a generator with its version.
    """
    if isinstance(source, str):
        # An upgrade of the package must not cost hours of generation: the key is a file that stays, not the module.
        name, source = source, cache_root(cache_dir) / "generated" / source
        if not source.is_file():
            atomic_write_text(source, f"splits that were generated for {name}\n")
    folder = cached_folder(
        source, {**options, "format": _FORMAT}, cache_dir, lambda empty: save_splits(make(), empty), kind="lra"
    )
    return load_splits(folder)


def save_splits(splits: dict[str, Split], folder: Path) -> None:
    """Write the splits as .npy files and one splits.json; a split that is the same object as another only by name."""
    saved: dict[int, str] = {}
    for name, split in splits.items():
        if id(split) not in saved:
            saved[id(split)] = name
            for field in ("tokens", "lengths", "labels"):
                np.save(folder / f"{name}.{field}.npy", getattr(split, field), allow_pickle=False)
    record = {
        name: {"files": saved[id(split)], "num_classes": split.num_classes, "vocab_size": split.vocab_size}
        for name, split in splits.items()
    }
    (folder / "splits.json").write_text(json.dumps(record), encoding="utf-8")


def load_splits(folder: Path) -> dict[str, Split]:
    """Read what `save_splits` wrote; tokens stay on the disk (memory-mapped), lengths and labels are read."""
    record = json.loads((folder / "splits.json").read_text(encoding="utf-8"))
    return {
        name: Split(
            tokens=np.load(folder / f"{entry['files']}.tokens.npy", mmap_mode="r", allow_pickle=False),
            lengths=np.load(folder / f"{entry['files']}.lengths.npy", allow_pickle=False),
            labels=np.load(folder / f"{entry['files']}.labels.npy", allow_pickle=False),
            num_classes=entry["num_classes"],
            vocab_size=entry["vocab_size"],
        )
        for name, entry in record.items()
    }


def cut(split: Split, *, train: int, val: int, test: int) -> dict[str, Split]:
    """The first `test` examples, the next `val` and the next `train`: a larger training set changes no other."""
    return {
        "train": split[test + val : test + val + train],
        "val": split[test : test + val],
        "test": split[:test],
    }


def check_sizes(**sizes: int) -> None:
    """Raise UserError unless every size is a whole number of at least 1."""
    for name, value in sizes.items():
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise UserError(f"{name}={value!r} must be a whole number of at least 1")
