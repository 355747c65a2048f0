"""Training and test rows of a corpus as arithmetic on its bounds: nothing is stored but where pieces begin.

Three ways to read documents, all exact: every prediction of every document comes once.
    PackedRows    pieces of up to L tokens, each from nothing; short ones share a row
    SlidingRows   windows of L tokens that overlap; only the last `stride` of each are asked
    CarriedRows   B documents side by side, L tokens at a time, for models that carry a state
"""

from __future__ import annotations

import heapq
from array import array
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .corpus import Corpus

IGNORED = -100  # a target that is not asked, as torch's cross entropy has it


def _gather(tokens: np.ndarray, first: np.ndarray, length: int) -> np.ndarray:
    """tokens[i : i + length] for i of `first`, int64 (B, length)."""
    return tokens[first[:, None] + np.arange(length)].astype(np.int64)


class PackedRows(Dataset[dict[str, Tensor]]):
    """Rows of up to seq_len tokens; pieces of documents that are shorter share a row with others.

    `dataset[indices]` is a batch. Where every row is one piece of seq_len tokens: tokens and targets, int64
    (B, seq_len), start (B,), the position of its first token in its document, and first (B,), that in the corpus. Else
    the pieces one after another, tokens and targets (1, T), with cu_seqlens, int32 (N + 1,), start and first (N,):
    nothing is padded. seed: decides which short pieces share a row. fill: cut a piece that does not fit what is left of
    a row, so that every row but the last is full; without it, and with seq_len as long as a document, a document is
    always whole.
    """

    def __init__(
        self, corpus: Corpus, documents: np.ndarray, seq_len: int, *, seed: int = 0, fill: bool = False
    ) -> None:
        self.corpus, self.seq_len = corpus, seq_len
        self._begins, sizes = corpus.bounds[documents], _predictions(corpus, documents)
        # Full pieces are arithmetic; of the short ones at the documents' ends, place and length are kept.
        self._full = np.cumsum(sizes // seq_len)
        self._number = int(self._full[-1]) if len(documents) else 0
        owner = np.flatnonzero(sizes % seq_len).astype(np.int32 if len(sizes) < 1 << 31 else np.int64)
        np.random.default_rng([seed, 1]).shuffle(owner)
        start, self.length = sizes[owner] // seq_len * seq_len, (sizes[owner] % seq_len).astype(np.int32)
        if fill:
            # Full rows all have one shape: batches of ever new lengths fill the caches of compiled products.
            owner, start = self._cut(owner, start)
        else:
            self._bounds = _next_fit(self.length, seq_len)
        self.start, self._owner = start, owner

    def _cut(self, owner: np.ndarray, start: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Cut the short pieces, one after another, where a row is full: whose they are, and where they start."""
        seq_len, ends = self.seq_len, np.cumsum(self.length, dtype=np.int64)
        total = int(ends[-1]) if len(ends) else 0
        cuts = np.unique(np.concatenate([[0], ends, np.arange(0, total, seq_len)]))
        begins = cuts[:-1]
        piece = np.searchsorted(ends, begins, side="right")
        offset = begins - (ends[piece] - self.length[piece])
        self.length = np.diff(cuts).astype(np.int32)
        self._bounds = np.append(np.searchsorted(begins, np.arange(0, total, seq_len)), len(begins))
        return owner[piece], start[piece] + offset

    @property
    def whole(self) -> int:
        """Rows that are one piece of seq_len tokens: the first ones."""
        return self._number

    def __len__(self) -> int:
        return self._number + len(self._bounds) - 1

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        rows = np.atleast_1d(np.asarray(indices))
        full = rows < self._number
        if full.all():
            first, start = self._whole(rows)
            both = torch.from_numpy(_gather(self.corpus.tokens, first, self.seq_len + 1))
            return {
                "tokens": both[:, :-1],
                "targets": both[:, 1:],
                "start": torch.from_numpy(start),
                "first": torch.from_numpy(first),
            }
        shared = rows - self._number
        pieces = [np.arange(self._bounds[r], self._bounds[r + 1]) if r >= 0 else [-1] for r in shared.tolist()]
        place = np.concatenate(pieces).astype(np.int64)
        start, lengths = self.start[place], self.length[place].astype(np.int64)
        first = self._begins[self._owner[place]] + start
        first[place < 0], start[place < 0] = self._whole(rows[full])
        lengths[place < 0] = self.seq_len
        if (lengths == self.seq_len).all():
            both = torch.from_numpy(_gather(self.corpus.tokens, first, self.seq_len + 1))
            return {
                "tokens": both[:, :-1],
                "targets": both[:, 1:],
                "start": torch.from_numpy(start),
                "first": torch.from_numpy(first),
            }
        bounds = np.concatenate([[0], np.cumsum(lengths)])
        source = np.repeat(first - bounds[:-1], lengths) + np.arange(bounds[-1])
        tokens, targets = (torch.from_numpy(self.corpus.tokens[p].astype(np.int64))[None] for p in (source, source + 1))
        cu_seqlens = torch.from_numpy(bounds.astype(np.int32))
        return {
            "tokens": tokens,
            "targets": targets,
            "cu_seqlens": cu_seqlens,
            "start": torch.from_numpy(start),
            "first": torch.from_numpy(first),
        }

    def _whole(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First token of full pieces, in the corpus and in their documents."""
        owner = np.searchsorted(self._full, rows, side="right")
        before = np.where(owner > 0, self._full[owner - 1], 0)
        start = (rows - before) * self.seq_len
        return self._begins[owner] + start, start


def _predictions(corpus: Corpus, documents: np.ndarray) -> np.ndarray:
    return corpus.bounds[documents + 1] - corpus.bounds[documents] - 1


def _next_fit(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """Bounds of rows of whole pieces: a row is closed by the first piece that no longer fits."""
    ends, room = array("q"), 0
    for place, size in enumerate(lengths):
        if size > room:
            ends.append(place)
            room = seq_len
        room -= size
    ends.append(len(lengths))
    return np.frombuffer(ends, dtype=np.int64)


class SlidingRows(Dataset[dict[str, Tensor]]):
    """Windows of seq_len tokens, `stride` apart: every prediction but the first ones has seq_len - stride tokens of
    context at least. Batches as those of `PackedRows`, padded: targets IGNORED, mask bool (B, seq_len)."""

    def __init__(self, corpus: Corpus, documents: np.ndarray, seq_len: int, stride: int) -> None:
        if not 1 <= stride <= seq_len:
            raise ValueError(f"stride={stride} must be between 1 and seq_len={seq_len}")
        self.corpus, self.seq_len, self.stride = corpus, seq_len, stride
        self._begins, self._sizes = corpus.bounds[documents], _predictions(corpus, documents)
        self._ends = np.cumsum(1 + np.maximum(0, -(-(self._sizes - seq_len) // stride)))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        rows = np.atleast_1d(np.asarray(indices))
        owner = np.searchsorted(self._ends, rows, side="right")
        step = rows - np.where(owner > 0, self._ends[owner - 1], 0)
        sizes = self._sizes[owner]
        # The last window ends with its document and asks what the one before has not.
        start = np.minimum(step * self.stride, np.maximum(sizes - self.seq_len, 0))
        asked_before = np.where(step == 0, 0, np.minimum((step - 1) * self.stride + self.seq_len, sizes))
        length = np.minimum(sizes, self.seq_len)
        first = self._begins[owner] + start
        return _padded(self.corpus, first, length, int(length.max()), start, asked_before - start)


class CarriedRows(Dataset[dict[str, Tensor]]):
    """Step t of `rows` rows that each read their documents in order, seq_len tokens at a time.

    `dataset[t]` has tokens, targets (B, seq_len) and start (B,) as `SlidingRows`; fresh, bool (B,): a document begins
    here, so the row's state must be that before the first token. A window never crosses the end of a document. Steps
    must be read in order. shuffle: the order of documents, by seed.
    """

    def __init__(
        self, corpus: Corpus, documents: np.ndarray, seq_len: int, rows: int, *, shuffle: bool = False, seed: int = 0
    ) -> None:
        self.corpus, self.seq_len = corpus, seq_len
        self.rows = rows = min(rows, len(documents))
        sizes = _predictions(corpus, documents)
        count = -(-sizes // seq_len)
        order = np.arange(len(documents))
        if shuffle:
            np.random.default_rng([seed, 2]).shuffle(order)
        else:
            order = np.argsort(-count, kind="stable")  # the longest first: rows end together
        # Each document goes to the row that has least to read.
        heap = [(0, r) for r in range(rows)]
        given: list[list[int]] = [[] for _ in range(rows)]
        for number in order.tolist():
            steps, row = heapq.heappop(heap)
            given[row].append(number)
            heapq.heappush(heap, (steps + int(count[number]), row))
        self._documents = [np.array(g, dtype=np.int64) for g in given]
        self._ends = [np.cumsum(count[g]) for g in self._documents]
        self._begins, self._sizes = corpus.bounds[documents], sizes

    def __len__(self) -> int:
        return max((int(e[-1]) for e in self._ends if len(e)), default=0)

    def __getitem__(self, index: Sequence[int] | np.ndarray | int) -> dict[str, Tensor]:
        step = int(np.asarray(index).reshape(-1)[0])
        if not 0 <= step < len(self):
            raise IndexError(f"step {step} of {len(self)}")
        first, length, start = (np.zeros(self.rows, dtype=np.int64) for _ in range(3))
        for row, (documents, ends) in enumerate(zip(self._documents, self._ends, strict=True)):
            place = int(np.searchsorted(ends, step, side="right"))
            if place == len(ends):
                continue  # this row has read everything: all padding
            window = step - (int(ends[place - 1]) if place else 0)
            number = documents[place]
            start[row] = window * self.seq_len
            first[row] = self._begins[number] + start[row]
            length[row] = min(self._sizes[number] - start[row], self.seq_len)
        batch = _padded(self.corpus, first, length, self.seq_len, start, np.zeros_like(start))
        return {**batch, "fresh": batch["start"] == 0}


def _padded(
    corpus: Corpus, first: np.ndarray, length: np.ndarray, width: int, start: np.ndarray, skip: np.ndarray
) -> dict[str, Tensor]:
    """Windows of different lengths in rows of `width`; the first `skip` predictions of each are not asked. Without a
    mask where every row is full."""
    place = np.arange(width)
    real = place < length[:, None]
    source = np.where(real, first[:, None] + place, 0)
    tokens = np.where(real, corpus.tokens[source], 0).astype(np.int64)
    asked = real & (place >= skip[:, None])
    targets = np.where(asked, corpus.tokens[np.where(asked, source + 1, 0)].astype(np.int64), IGNORED)
    batch = {"tokens": tokens, "targets": targets, "start": start} | ({} if real.all() else {"mask": real})
    return {name: torch.from_numpy(array) for name, array in batch.items()}
