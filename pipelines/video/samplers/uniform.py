"""Frames that no score chooses: evenly over the video, or so many a second."""

from __future__ import annotations

import numpy as np

from .inputs import Sample, Values, check_inputs, check_number, sample


def uniform_indices(number: int, budget: int) -> np.ndarray:
    """int64 (n,), n = min(budget, N): the middles of n equal parts of N frames, floor((2 i + 1) N / 2 n)."""
    budget = min(budget, number)
    return (2 * np.arange(budget, dtype=np.int64) + 1) * number // (2 * budget)


def sample_uniform(
    times: np.ndarray, scores: Values, features: Values, budget: int, *, seed: int = 0, jitter: bool = False
) -> Sample:
    """The frame in the middle of each of `budget` equal parts of the frames (Temporal Segment Networks,
    arXiv:1608.00859, section 3.1); with jitter one drawn in each part.

    times: seconds (N,). Scores and features are not looked at, and may be None. The parts are equal in frames, so in
    time where the frames are evenly spaced; `fps` goes by times. Raises UserError for no frames or no budget.
    """
    times, budget = check_inputs(times, budget)
    number, budget = len(times), min(budget, len(times))
    if not jitter:
        return sample(uniform_indices(number, budget), 0)
    edges = np.arange(budget + 1, dtype=np.int64) * number // budget
    return sample(np.random.default_rng(seed).integers(edges[:-1], edges[1:]), 0)


def sample_fps(
    times: np.ndarray, scores: Values, features: Values, budget: int, *, seed: int = 0, fps: float = 1.0
) -> Sample:
    """The frame that is shown at each multiple of 1/fps seconds after the first; where these are more than the budget,
    the middles of `budget` equal parts of them.

    times: seconds (N,), of which no frame is taken twice. Scores and features are not looked at. Raises UserError for
    fps that is not above 0, no frames or no budget.
    """
    times, budget = check_inputs(times, budget)
    fps = check_number("fps", fps, above=0.0)
    # the first multiple at or after each frame; where it comes before the next frame, this one is shown at it
    first = np.ceil((times - times[0]) * fps - 1e-9)
    last = first[-1] <= np.floor((times[-1] - times[0]) * fps + 1e-9)
    found = np.flatnonzero(np.append(first[:-1] < first[1:], last))
    return sample(found[uniform_indices(len(found), budget)], 0)
