"""Time search over scores that cost something: a coarse grid, the spans that stand out of it, closer looks there."""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import numpy as np

from ...errors import UserError, check_whole
from ..time_search import Spot, Window, allot, best_evidence, search_time
from .inputs import Sample, Scores, Values, check_inputs, check_number, need_scores, sample
from .uniform import uniform_indices

# A share of the frames that may be scored is at least so many times the budget.
LEAST_SCORED = 4
HALF = 0.5  # of the highest, from which on frames of a closer look are a sub-window
_CALLS = 100_000  # of functions that cost nothing; frames are what is limited


class Contrast(NamedTuple):
    """What scores are measured against. median, spread: of the first look, spread a robust standard deviation."""

    median: float
    spread: float

    def of(self, scores: np.ndarray) -> np.ndarray:
        """float64 (n,): how many spreads the scores are above the median."""
        away = scores - self.median
        if self.spread > 0:
            return away / self.spread
        return np.where(away > 0, np.inf, np.where(away < 0, -np.inf, 0.0))


def contrast_of(scores: np.ndarray) -> Contrast:
    """The median and 1.4826 times the median distance from it; that being 0, the standard deviation."""
    median = float(np.median(scores))
    spread = 1.4826 * float(np.median(np.abs(scores - median)))
    return Contrast(median, spread if spread > 0 else float(scores.std()))


def sample_time_search(
    times: np.ndarray,
    scores: Values,
    features: Values,
    budget: int,
    *,
    seed: int = 0,
    max_scored: int | float = 0.25,
    coarse: float = 0.9,
    frames: int = 32,
    reflect_frames: int = 4,
    spot: float = 2.0,
    sure: float = 3.0,
    tau: float = 0.5,
    tau_stop: float | None = None,
    max_depth: int = 3,
    min_seconds: float | None = None,
    num_windows: int | None = None,
) -> Sample:
    """The search of arXiv:2504.01407 (see `search_time`) with scores in place of a model that watches; ours.

    Of the frames only `max_scored` are scored: give scores as a function of indices, and no other is computed. The
    first look takes the share `coarse` of them, evenly over the video; the contrast z of a score is its distance from
    the median of these in robust standard deviations. Locate: a run of frames with z >= spot is a sub-window, from the
    looked-at frame before it to the one after it, the highest first, as many as can still be looked at; in a closer
    look a run of at least half of its highest z. Reflect: of the frames in a sub-window the highest z, as confidence
    z / (z + sure), so that tau = 0.5 asks for z = sure.
    The budget: the `num_windows` surest spots that do not overlap (None: as many as the budget) get frames in
    proportion to confidence x seconds, one each first; in a spot its highest frame, then the highest of equal parts.
    What is left over, all of it where nothing stands out, covers the video: of equal parts the highest frame that was
    looked at, else the middle one. So min(budget, N) frames are returned always.

    An event that is shorter than the step of the first look may lie between its frames: with N frames the step is
    1 / (coarse * max_scored) of them, 4.4 in the standard setting, so 2.2 s at 2 fps.

    times: seconds (N,). scores: (N,) or a function of indices. Features are not looked at. max_scored: a whole number
    of frames, or a share of them, in (0, 1], which is at least LEAST_SCORED times the budget. frames: of a look after
    the first, more where fewer would leave some unused. min_seconds: of a window, None: two frames. tau, tau_stop
    (None: never stop early), max_depth: see `search_time`. The trace has every look, in indices of frames.
    Raises UserError without scores and for options out of range.
    """
    times, budget = check_inputs(times, budget)
    number = len(times)
    known = need_scores(scores, number, "time_search")
    most = _most(max_scored, number, budget)
    root = min(max(int(check_number("coarse", coarse, above=0.0, below=1.0 + 1e-12) * most), 1), most)
    check_whole("frames", frames, 1)
    if num_windows is not None:
        check_whole("num_windows", num_windows, 1)
    step = float(np.median(np.diff(times))) if number > 1 else 0.0
    step = step if step > 0 else 1.0
    view = _View(
        times, known, most, reflect_frames, check_number("spot", spot, above=0.0), check_number("sure", sure, above=0.0)
    )
    trace = search_time(
        (times[0], times[-1] + step),
        view.locate,
        view.reflect,
        grid=view.grid,
        frames=max(frames, (most - root) // 4),
        root_frames=root,
        reflect_frames=reflect_frames,
        max_calls=_CALLS,
        max_frames=most,
        tau=tau,
        tau_stop=tau_stop,
        max_depth=max_depth,
        min_seconds=2 * step if min_seconds is None else min_seconds,
    )
    windows = best_evidence(trace.evidence, num_windows or budget)
    return sample(view.choose(windows, min(budget, number)), known.asked, trace)


class _View:
    """The frames of a video as `search_time` looks at them: numbers of frames, spans of seconds."""

    def __init__(
        self, times: np.ndarray, scores: Scores, most: int, reflect_frames: int, spot: float, sure: float
    ) -> None:
        self.times, self.scores, self.most, self.reflect_frames = times, scores, most, reflect_frames
        self.spot, self.sure = spot, sure
        self.contrast: Contrast | None = None

    def range(self, window: Window) -> tuple[int, int]:
        """The frames from start to end, this one left out, as first and stop."""
        first, stop = np.searchsorted(self.times, [window.start, window.end])
        return int(first), int(stop)

    def grid(self, window: Window, number: int) -> np.ndarray:
        """Of equal parts of the frames in a window the one that has been scored nearest to the middle, else this."""
        first, stop = self.range(window)
        if stop == first:
            return np.empty(0, dtype=np.int64)
        found = first + uniform_indices(stop - first, number)
        known = first + np.flatnonzero(~np.isnan(self.scores.known(np.arange(first, stop))))
        if not len(known):
            return found
        after = np.minimum(np.searchsorted(known, found), len(known) - 1)
        before, after = known[np.maximum(after - 1, 0)], known[after]
        near = np.where(np.abs(before - found) <= np.abs(after - found), before, after)
        edges = first + np.arange(len(found) + 1, dtype=np.int64) * (stop - first) // len(found)
        return np.where((near >= edges[:-1]) & (near < edges[1:]), near, found)

    def locate(self, window: Window, frames: np.ndarray) -> list[tuple[float, float]]:
        if not len(frames):
            return []
        scores = self.scores.at(frames)
        first_look = self.contrast is None
        contrast = self.contrast = self.contrast or contrast_of(scores)
        high = contrast.of(scores)
        level = self.spot if first_look else max(self.spot, HALF * float(high.max()))
        runs = np.flatnonzero(np.diff(np.concatenate(([0], (high >= level).astype(np.int8), [0]))))
        found = []
        for first, stop in runs.reshape(-1, 2).tolist():
            start = self.times[frames[first - 1]] if first else window.start
            # one frame more, so that the window has the frame after the run's last one, where they are dense
            end = self.times[frames[stop]] if stop < len(frames) else window.end
            found.append((float(high[first:stop].max()), (float(start), float(end))))
        found.sort(key=lambda pair: (-pair[0], pair[1]))
        left = self.most - self.scores.asked
        kept: list[tuple[float, float]] = []
        for _, span in found:
            first, stop = self.range(Window(*span))
            unknown = int(np.isnan(self.scores.known(np.arange(first, stop))).sum())
            left -= min(unknown, max(self.reflect_frames - (stop - first - unknown), 0))
            if kept and left < 0:
                break
            kept.append(span)
        return kept

    def reflect(self, window: Window, frames: np.ndarray) -> float:
        if not len(frames) or self.contrast is None:
            return 0.0
        self.scores.at(frames)
        # what earlier looks saw in the window counts too
        known = self.scores.known(np.arange(*self.range(window)))
        high = float(self.contrast.of(known[~np.isnan(known)]).max())
        return 1.0 if math.isinf(high) and high > 0 else max(high, 0.0) / (max(high, 0.0) + self.sure)

    def choose(self, spots: list[Spot], budget: int) -> np.ndarray:
        """The frames, those of the surest spot first, then what covers the video."""
        ranges = [self.range(spot.window) for spot in spots]
        given = allot(spots, budget, rooms=[stop - first for first, stop in ranges])
        chosen: dict[int, None] = {}
        for place in sorted(range(len(spots)), key=lambda i: (-spots[i].confidence, ranges[i])):
            self._spread(*ranges[place], given[place], chosen)
        while len(chosen) < budget:
            self._spread(0, len(self.times), budget - len(chosen), chosen)
        return np.fromiter(chosen, dtype=np.int64)

    def _spread(self, first: int, stop: int, number: int, chosen: dict[int, None]) -> None:
        """Choose at most `number` frames from first to stop: the highest of all, then those of equal parts."""
        number = min(number, stop - first)
        parts = [first + i * (stop - first) // max(number, 1) for i in range(number + 1)]
        picks = []
        for begin, end in itertools.pairwise(parts):
            frames = np.array([i for i in range(begin, end) if i not in chosen], dtype=np.int64)
            if len(frames):
                value = np.nan_to_num(self.scores.known(frames), nan=-np.inf)
                # of equal ones the nearest to the middle
                best = np.lexsort((np.abs(2 * frames + 1 - begin - end), -value))[0]
                picks.append((-float(value[best]), int(frames[best])))
        chosen.update(dict.fromkeys(frame for _, frame in sorted(picks)))


def _most(max_scored: int | float, number: int, budget: int) -> int:
    """How many frames may be scored."""
    if isinstance(max_scored, int) and not isinstance(max_scored, bool):
        check_whole("max_scored", max_scored, 1)
        return min(max_scored, number)
    if isinstance(max_scored, bool) or not isinstance(max_scored, float) or not 0 < max_scored <= 1:
        raise UserError(f"max_scored={max_scored!r} must be a whole number of frames or a share of them, in (0, 1]")
    return min(max(math.ceil(max_scored * number), LEAST_SCORED * budget), number)
