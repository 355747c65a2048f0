"""TASS: the frames that score above the mean, at first far from each other, then nearer (DATE)."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from ...errors import UserError, nearest
from .inputs import Sample, Values, check_inputs, check_number, need_scores, sample
from .top_k import by_score
from .uniform import uniform_indices

THRESHOLDS = ("mean", "none")


class Selection(NamedTuple):
    """order: int64 (n,), frames as accepted. candidates: int64 (K,), by score. gap: seconds, the D of the last pass; 0
    where only frames of equal times were left, or where no pass was needed."""

    order: np.ndarray
    candidates: np.ndarray
    gap: float


def select_tass(
    times: np.ndarray,
    scores: np.ndarray,
    budget: int,
    *,
    gap: float = 20.0,
    decay: float = 0.5,
    cap: float = 4.0,
    threshold: str = "mean",
) -> Selection:
    """Temporal-aware similarity sampling, arXiv:2509.09263, section 3.3.

    1. Candidates are the K = #{s_i > mean(s)} frames of the highest scores, at most cap * budget, by score.
    2. K <= budget: all of them; nothing is filled up.
    3. Else passes over the candidates by score accept a frame whose time is at least D from all that are accepted, D =
    gap in the first, D <- decay * D after each, until `budget` are accepted.
    So |order| = min(K, budget), and two accepted frames are at least D apart, D of the last pass. Cost
    O(K (budget + passes)). threshold "none": all frames may be candidates. Frames of equal times are as near as can be
    and come last. None of the scores above their mean, as where all are equal: no candidates.
    """
    mean = -np.inf if threshold == "none" else scores.mean()
    # a mean of equal numbers may come out a hair below them
    above = 0 if threshold == "mean" and scores.min() == scores.max() else int((scores > mean).sum())
    candidates = by_score(scores)[: min(above, int(cap * budget))]
    if len(candidates) <= budget:
        return Selection(candidates, candidates, 0.0)
    at = times[candidates]
    steps = np.diff(np.sort(at))
    smallest = steps[steps > 0].min(initial=np.inf)
    away = np.full(len(at), np.inf)  # seconds to the nearest accepted frame
    free = np.ones(len(at), dtype=bool)
    order: list[int] = []
    while True:
        for place in np.flatnonzero(free):
            if away[place] >= gap:
                order.append(int(candidates[place]))
                free[place] = False
                if len(order) == budget:
                    return Selection(np.array(order, dtype=np.int64), candidates, gap)
                np.minimum(away, np.abs(at - at[place]), out=away)
        # below the smallest step only frames of equal times are left, which no D above 0 lets in
        gap = gap * decay if gap > smallest else 0.0


def sample_tass(
    times: np.ndarray,
    scores: Values,
    features: Values,
    budget: int,
    *,
    seed: int = 0,
    gap: float = 20.0,
    decay: float = 0.5,
    cap: float = 4.0,
    threshold: str = "mean",
) -> Sample:
    """TASS (DATE, arXiv:2509.09263), see `select_tass`; uniform sampling where no score is above the mean (ours).

    times: seconds (N,), the paper's frames come at 2 fps. scores: (N,) or a function of indices, asked for all. gap:
    seconds between frames in the first pass. decay: of the gap from pass to pass. cap: candidates are at most so many
    times the budget. threshold: "mean" or "none". Features are not looked at. Indices are sorted and `order` is that of
    acceptance, so that both correspond to times (the release sorts the times alone). Raises UserError without scores
    and for options out of range.
    """
    times, budget = check_inputs(times, budget)
    gap, decay = check_number("gap", gap, above=0.0), check_number("decay", decay, above=0.0, below=1.0)
    if check_number("cap", cap, above=0.0) < 1:
        raise UserError(f"cap={cap!r} must be at least 1: fewer candidates than the budget would never fill it")
    if threshold not in THRESHOLDS:
        raise UserError(f"unknown threshold={threshold!r}.{nearest(str(threshold), THRESHOLDS)}")
    known = need_scores(scores, len(times), "tass")
    found = select_tass(times, known.all(), budget, gap=gap, decay=decay, cap=cap, threshold=threshold)
    order = found.order if len(found.order) else uniform_indices(len(times), budget)
    return sample(order, known.asked)
