"""What a sampler is given, checked; scores that are computed when they are asked for, and counted."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ...errors import UserError
from ..time_search import Trace

Values = np.ndarray | Callable[[np.ndarray], np.ndarray] | None


class Sample(NamedTuple):
    """The frames that were chosen.

    indices: int64 (n,), sorted, so that `times[indices]` are their times. order: the same frames as they were accepted.
    scored: of how many frames the score was asked, which is what a search costs. trace: of `time_search`, what it
    looked at; None for the others.
    """

    indices: np.ndarray
    order: np.ndarray
    scored: int
    trace: Trace | None = None


class Scores:
    """The scores of `number` frames, from an array (N,) or from a function of indices that is asked only once for each.

    Raises UserError for another number of scores and for ones that are not finite.
    """

    def __init__(self, values: np.ndarray | Callable[[np.ndarray], np.ndarray], number: int) -> None:
        if callable(values):
            self._compute = values
        else:
            self._compute = _checked(values, number, "scores").__getitem__
        self._known = np.full(number, np.nan)
        self._asked = np.zeros(number, dtype=bool)

    @property
    def asked(self) -> int:
        """Of how many frames the score was asked."""
        return int(self._asked.sum())

    def at(self, indices: np.ndarray) -> np.ndarray:
        """float64 (n,): the scores of frames."""
        indices = np.asarray(indices, dtype=np.int64)
        new = np.unique(indices[~self._asked[indices]])
        if len(new):
            self._known[new] = _checked(self._compute(new), len(new), "scores")
            self._asked[new] = True
        return self._known[indices]

    def known(self, indices: np.ndarray) -> np.ndarray:
        """float64 (n,): the scores of frames that were asked for, NaN of the others."""
        return self._known[indices]

    def all(self) -> np.ndarray:
        """float64 (N,): the scores of all frames."""
        return self.at(np.arange(len(self._known)))


def check_inputs(times: np.ndarray, budget: int) -> tuple[np.ndarray, int]:
    """The times as float64 (N,) and the budget as an int.

    Raises UserError for no frames, times that are not finite or that go back, and a budget below 1.
    """
    times = np.asarray(times, dtype=np.float64)
    if times.ndim != 1 or not len(times):
        raise UserError(f"times have the shape {times.shape}; the times of at least one frame, (N,), are expected")
    if not np.isfinite(times).all() or (np.diff(times) < 0).any():
        raise UserError("times must be finite and in order, in seconds")
    try:
        number = operator.index(budget)
    except TypeError:
        number = 0
    if number < 1 or isinstance(budget, bool):
        raise UserError(f"budget={budget!r} must be a whole number of frames, at least 1")
    return times, number


def need_scores(values: Values, number: int, name: str) -> Scores:
    """The scores, for the sampler of that name, which cannot do without."""
    if values is None:
        raise UserError(f"the sampler {name!r} needs scores, so something to look for; 'uniform' needs none")
    return Scores(values, number)


def need_features(values: Values, number: int, name: str) -> np.ndarray:
    """The features as float64 (N, D), for the sampler of that name, which cannot do without."""
    if values is None:
        raise UserError(f"the sampler {name!r} needs the features of the frames, (N, D)")
    found = np.asarray(values(np.arange(number)) if callable(values) else values, dtype=np.float64)
    if found.ndim != 2 or len(found) != number:
        raise UserError(f"features have the shape {found.shape}; ({number}, D) is expected, as many as times")
    if not np.isfinite(found).all():
        raise UserError("features are not finite")
    return found


def check_number(name: str, value: object, *, above: float, below: float = np.inf) -> float:
    """The value as a float. Raises UserError unless it is a number above one and below another."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not above < value < below:
        limits = f"above {above:g}" + (f" and below {below:g}" if np.isfinite(below) else "")
        raise UserError(f"{name}={value!r} must be a number {limits}")
    return float(value)


def sample(order: np.ndarray, scored: int, trace: Trace | None = None) -> Sample:
    """The frames in their order of acceptance as a `Sample`."""
    order = np.asarray(order, dtype=np.int64)
    return Sample(np.sort(order), order, scored, trace)


def _checked(values: np.ndarray, number: int, what: str) -> np.ndarray:
    found = np.asarray(values, dtype=np.float64)
    if found.shape != (number,):
        raise UserError(f"{what} have the shape {found.shape}; ({number},) is expected, one for each frame")
    if not np.isfinite(found).all():
        raise UserError(f"{what} are not finite: {found[~np.isfinite(found)][0]}")
    return found
