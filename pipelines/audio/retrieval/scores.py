"""Scores of a search: recall among the first k, ranks, and what a guess would reach. Equal scores count as they should.

A search ranks M items for each of N queries, of which some are right answers. Where scores are equal their order is
open, so every score is its mean over all orders: a model that gives everything the same score reaches chance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ...errors import UserError, check_whole


class Places(NamedTuple):
    """Of the best right answer to each query, int64 (N,). above: items with a higher score. equal: items with its
    score, itself included. right: right answers among those."""

    above: np.ndarray
    equal: np.ndarray
    right: np.ndarray


def places(scores: np.ndarray, right: np.ndarray) -> Places:
    """scores: floating (N, M). right: bool (N, M). Raises ValueError for other shapes, scores that are not finite and a
    query without a right answer."""
    if scores.shape != right.shape or scores.ndim != 2 or right.dtype != bool:
        raise ValueError(f"scores {scores.shape} and right {right.dtype} {right.shape} must be (N, M), right bool")
    if not np.isfinite(scores).all():
        raise ValueError("scores are not finite")
    if not right.any(1).all():
        raise ValueError(f"query {int(right.any(1).argmin())} has no right answer")
    best = np.where(right, scores, -np.inf).max(1, keepdims=True)
    equal = scores == best
    return Places((scores > best).sum(1), equal.sum(1), (equal & right).sum(1))


def recall_at(found: Places, k: int) -> float:
    """The share of queries with a right answer among the first k, mean over the orders of equal scores.

    Of e equal items with r right ones, q = k - above places are left: 1 - C(e - r, q) / C(e, q).
    """
    hits = 0.0
    for above, equal, right in zip(*(part.tolist() for part in found), strict=True):
        left = min(max(k - above, 0), equal)
        hits += 1 - math.comb(equal - right, left) / math.comb(equal, left)
    return hits / len(found.above)


def ranks(found: Places) -> np.ndarray:
    """The rank of the first right answer of each query, from 1, mean over the orders of equal scores: float64 (N,).

    Of r right among e equal items the first stands at (e + 1) / (r + 1).
    """
    return found.above + (found.equal + 1) / (found.right + 1)


def retrieval_scores(scores: np.ndarray, right: np.ndarray, at: Sequence[int]) -> dict[str, Any]:
    """recall@k for each k in `at`, median_rank, mean_rank. Raises ValueError as `places` and for a k above M."""
    for k in at:
        if k > scores.shape[1]:
            raise ValueError(f"k={k} is above the {scores.shape[1]} items that are searched")
    found = places(scores, right)
    rank = ranks(found)
    values = {f"recall@{k}": recall_at(found, k) for k in at}
    return {**values, "median_rank": float(np.median(rank)), "mean_rank": float(rank.mean())}


def chance(right: np.ndarray, at: Sequence[int]) -> dict[str, Any]:
    """What a guess reaches: the scores of a model for which everything is equal; recall@k is k / M for one right
    answer."""
    return retrieval_scores(np.zeros(right.shape), right, at)


def check_recall_at(at: Any, sizes: dict[str, int]) -> tuple[int, ...]:
    """The values of `task.recall_at`. sizes: recordings of each set that is searched. Raises UserError for what is no
    list of whole numbers from 1, and for a k above the recordings of a set."""
    if not isinstance(at, (list, tuple)) or not at:
        raise UserError(f"task.recall_at={at!r} must be a list of whole numbers, such as [1, 5, 10]")
    for k in at:
        check_whole("task.recall_at", k, 1)
        for name, size in sizes.items():
            if k > size:
                raise UserError(
                    f"task.recall_at has {k}, but {name} has {size} recordings; take at most {size}, or give more"
                )
    return tuple(at)
