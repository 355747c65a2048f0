"""Labelled documents of any length as one flat array, and their batches."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .lra.split import Split

_STEP = 32  # widths of batches are multiples of it: fewer shapes, fewer compiled products


@dataclass(frozen=True, eq=False)
class LabelledSet:
    """N documents, or N pairs of them.

    flat: tokens of all, one after another (memory-mapped, unsigned). begin, length: int64 (N, T) with T = 1, or 2 for
    pairs. labels: int64 (N,), -1 where there is none. names: of the documents; None numbers them.
    """

    flat: np.ndarray
    begin: np.ndarray
    length: np.ndarray
    labels: np.ndarray
    names: list[str] | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def towers(self) -> int:
        return self.begin.shape[1]

    def counts(self, num_classes: int) -> np.ndarray:
        """int64 (num_classes,): how many documents have each label."""
        return np.bincount(self.labels[self.labels >= 0], minlength=num_classes)

    def select(self, rows: np.ndarray) -> LabelledSet:
        """The documents of those numbers."""
        names = None if self.names is None else [self.names[row] for row in rows]
        return replace(self, begin=self.begin[rows], length=self.length[rows], labels=self.labels[rows], names=names)

    def cut(self, max_len: int | None) -> tuple[LabelledSet, int, int]:
        """At most `max_len` tokens of each document, how many were longer, and how many tokens that left out."""
        if max_len is None:
            return self, 0, 0
        longer = self.length > max_len
        shorter = replace(self, length=np.minimum(self.length, max_len))
        return shorter, int(longer.sum()), int((self.length - shorter.length).sum())

    def name(self, row: int) -> str:
        return str(row) if self.names is None else self.names[row]


def from_split(split: Split) -> LabelledSet:
    """A task of Long Range Arena, whose documents are the rows of one array; nothing is copied."""
    width = split.tokens.shape[-1]
    lengths = split.lengths.reshape(len(split), -1).astype(np.int64)
    begin = np.arange(lengths.size, dtype=np.int64).reshape(lengths.shape) * width
    return LabelledSet(split.tokens.reshape(-1), begin, lengths, split.labels)


class DocumentBatches(Dataset[Any]):
    """Indexed by an array of numbers: a batch of documents, padded on the right to the longest.

    tokens: int64 (B, L), or (B, 2, L) for pairs, 0 behind the end; mask: bool of that shape, left out where no document
    is padded; labels: int64 (B,); document: int64 (B,), their numbers in the set. by_length: number i is the i-th
    shortest document, for evaluation, where the order is free.
    """

    def __init__(self, documents: LabelledSet, *, by_length: bool = False) -> None:
        self.documents = documents
        self.order = np.argsort(documents.length.max(1), kind="stable") if by_length else None

    def __len__(self) -> int:
        return len(self.documents)

    def __getitem__(self, index: np.ndarray) -> dict[str, Tensor]:
        rows = np.asarray(index) if self.order is None else self.order[index]
        lengths, begins = self.documents.length[rows], self.documents.begin[rows]
        longest = int(lengths.max(initial=1))
        # where all are equally long (pictures) nothing is padded
        width = longest if (lengths == longest).all() else -(-longest // _STEP) * _STEP
        tokens = np.zeros((*lengths.shape, width), dtype=np.int64)
        for place in np.ndindex(lengths.shape):
            begin, length = int(begins[place]), int(lengths[place])
            tokens[place][:length] = self.documents.flat[begin : begin + length]
        if self.documents.towers == 1:
            tokens, lengths = tokens[:, 0], lengths[:, 0]
        batch = {
            "tokens": torch.from_numpy(tokens),
            "labels": torch.from_numpy(self.documents.labels[rows]),
            "document": torch.from_numpy(rows.astype(np.int64)),
        }
        if (lengths < width).any():
            batch["mask"] = torch.arange(width) < torch.from_numpy(lengths).unsqueeze(-1)
        return batch
