"""The frames with the highest scores."""

from __future__ import annotations

import numpy as np

from .inputs import Sample, Values, check_inputs, need_scores, sample


def by_score(scores: np.ndarray) -> np.ndarray:
    """int64 (N,): the frames from the highest score down, equal ones in their order."""
    return np.argsort(-scores, kind="stable")


def sample_top_k(times: np.ndarray, scores: Values, features: Values, budget: int, *, seed: int = 0) -> Sample:
    """The `budget` frames with the highest scores, of equal ones the earlier; wherever they are.

    times: seconds (N,). scores: (N,) or a function of indices, which is asked for all. Features are not looked at.
    Raises UserError without scores.
    """
    times, budget = check_inputs(times, budget)
    known = need_scores(scores, len(times), "top_k")
    return sample(by_score(known.all())[:budget], known.asked)
