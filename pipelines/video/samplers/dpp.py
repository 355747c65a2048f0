"""Frames that are relevant and unlike each other: the greedy maximum of a determinantal point process."""

from __future__ import annotations

import numpy as np

from .inputs import Sample, Values, check_inputs, check_number, need_features, need_scores, sample
from .uniform import uniform_indices

EPS = 1e-10
_TIE = 1e-12  # gains that differ by rounding alone are equal


def greedy_map(relevance: np.ndarray, features: np.ndarray, budget: int, *, eps: float = EPS) -> np.ndarray:
    """int64 (n,): frames as they are accepted, each that which makes det(L_Y) largest, L = diag(r) S diag(r).

    Chen, Zhang and Zhou 2018, arXiv:1709.05135, algorithm 1: with the Cholesky factor c of L_Y the gain of i is d_i^2 =
    L_ii - |c_i|^2, and accepting j appends e_i = (L_ji - c_j . c_i) / d_j to every c_i. relevance: float64 (N,), r.
    features: float64 (N, D) of length 1, S = F F^T, of which only rows are built: O(n N (n + D)). Stops before `budget`
    where the largest gain is at most `eps` of the first: what is left lies in the span of what is accepted, or has no
    relevance. Of equal gains the earlier frame.
    """
    number = len(relevance)
    gains = relevance**2 * np.einsum("nd,nd->n", features, features)
    factor = np.zeros((min(budget, number), number))
    order: list[int] = []
    least = eps * gains.max()
    while len(order) < len(factor):
        most = gains.max()
        if not most > least:
            break
        best = int(np.argmax(gains >= (1 - _TIE) * most))
        step = len(order)
        row = relevance[best] * relevance * (features @ features[best])
        factor[step] = (row - factor[:step, best] @ factor[:step]) / np.sqrt(gains[best])
        gains -= factor[step] ** 2
        order.append(best)
        gains[order] = -np.inf
    return np.array(order, dtype=np.int64)


def relevance_of(scores: np.ndarray, *, theta: float | None = None, floor: float = 0.0) -> np.ndarray:
    """float64 (N,): the scores from `floor` for the lowest to 1 for the highest; 1 where all are equal.

    theta: r <- exp(alpha r), alpha = theta / (2 (1 - theta)), weighs relevance against diversity.
    """
    low, high = scores.min(), scores.max()
    if high > low:
        relevance = floor + (1 - floor) * (scores - low) / (high - low)
    else:
        relevance = np.ones(len(scores))
    return relevance if theta is None else np.exp(theta / (2 * (1 - theta)) * relevance)


def sample_dpp(
    times: np.ndarray,
    scores: Values,
    features: Values,
    budget: int,
    *,
    seed: int = 0,
    theta: float | None = None,
    floor: float = 0.0,
    eps: float = EPS,
) -> Sample:
    """Greedy MAP of a determinantal point process, as TimeSearch-R (arXiv:2511.05489) chooses frames, see `greedy_map`
    and `relevance_of`; in float64.

    times: seconds (N,). scores: (N,) or a function of indices, asked for all; None, for an empty query: uniform
    sampling. features: (N, D), brought to length 1 here. No more frames than the budget: all of them. theta: in [0, 1),
    None: off. floor: relevance of the least relevant frame, in [0, 1); 0 is the published one, under which it is never
    chosen. Fewer frames than the budget are returned where the others are repeats of them or have no relevance. Raises
    UserError without features and for options out of range.
    """
    times, budget = check_inputs(times, budget)
    if theta is not None and theta != 0:
        theta = check_number("theta", theta, above=0.0, below=1.0)
    if floor != 0:
        floor = check_number("floor", floor, above=0.0, below=1.0)
    eps = check_number("eps", eps, above=0.0, below=1.0)
    number = len(times)
    if budget >= number or scores is None:
        return sample(uniform_indices(number, budget), 0)
    known = need_scores(scores, number, "dpp")
    vectors = need_features(features, number, "dpp")
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    vectors = np.divide(vectors, lengths, out=np.zeros_like(vectors), where=lengths > 0)
    relevance = relevance_of(known.all(), theta=theta, floor=floor)
    return sample(greedy_map(relevance, vectors, budget, eps=eps), known.asked)
