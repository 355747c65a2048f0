"""From scores at times to spans: of a whole video by thresholds, of the few frames that were chosen by one rule."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..spans import union


class Span(NamedTuple):
    """start, end: seconds. score: the mean of the frames that made it."""

    start: float
    end: float
    score: float


class Levels(NamedTuple):
    """Of scores: a span has one of at least `high` and goes on while they are at least `low`."""

    high: float
    low: float


def frame_cells(
    times: np.ndarray, *, start: float | None = None, end: float | None = None, reach: float = math.inf
) -> np.ndarray:
    """float64 (N, 2): what each frame stands for, from half-way to the one before it to half-way to the next, at most
    `reach` seconds to each side.

    times: (N,), rising. start, end: of the video; None: the first time, and as far behind the last as it is behind the
    one before.
    """
    times = np.asarray(times, dtype=np.float64)
    if times.ndim != 1 or not np.isfinite(times).all() or (np.diff(times) < 0).any():
        raise UserError("times must be finite and in order, in seconds")
    if not len(times):
        return np.empty((0, 2))
    middles = (times[1:] + times[:-1]) / 2
    before = times[0] if start is None else min(start, times[0])
    after = (2 * times[-1] - middles[-1] if len(times) > 1 else times[-1]) if end is None else max(end, times[-1])
    left = np.maximum(np.concatenate(([before], middles)), times - reach)
    right = np.minimum(np.concatenate((middles, [after])), times + reach)
    return np.stack((left, right), axis=1)


def score_levels(
    scores: np.ndarray,
    *,
    high: float = 0.5,
    low: float = 0.3,
    contrast: float = 2.0,
    floor: float | None = None,
    threshold: float | None = None,
) -> Levels:
    """The levels at the parts `high` and `low` of the way from a base to the highest of the scores (N,).

    The base is the median, what most frames have that show something else. contrast: nothing is found (the levels are
    infinite) where the highest is not so many robust standard deviations, 1.4826 times the median distance from the
    median, above it. floor: the least score of what fits a query at all, None: unknown; nothing is found below it, and
    where more than half of the frames are above the level that starts from it, what is looked for is seen most of the
    time, and it is the base. threshold: a score instead of `high`. Raises UserError unless 0 <= low <= high <= 1.
    """
    if not 0 <= low <= high <= 1:
        raise UserError(f"low={low!r} and high={high!r} must be in order, from 0 to 1")
    if not len(scores):
        return Levels(math.inf, math.inf)
    middle, top = float(np.median(scores)), float(np.max(scores))
    if threshold is not None:
        return Levels(threshold, min(threshold, middle + (threshold - middle) * low / high if high else threshold))
    spread = 1.4826 * float(np.median(np.abs(scores - middle)))
    least = -math.inf if floor is None else floor
    if top < least or (top <= middle and floor is None) or top - middle < contrast * spread:
        return Levels(math.inf, math.inf)
    base = least if floor is not None and middle >= floor + high * (top - floor) else middle
    return Levels(max(base + high * (top - base), least), base + low * (top - base))


def score_spans(
    times: np.ndarray,
    scores: np.ndarray,
    *,
    levels: Levels | None = None,
    max_gap: float = 1.0,
    min_seconds: float = 0.0,
    start: float | None = None,
    end: float | None = None,
    **options: float | None,
) -> list[Span]:
    """The spans in which scores stand out, by start.

    1. A run of frames whose scores are at least levels.low, with one of at least levels.high, is a span, from the start
    of the first one's cell to the end of the last one's (`frame_cells`). 2. Spans whose gap is at most max_gap seconds
    become one; a run without a high frame is a part of the gap. 3. What is shorter than min_seconds is dropped.
    times, scores: (N,). levels: None: `score_levels` of these scores with `options`. start, end: of the video.
    Raises UserError for scores that are not as many as times or not finite.
    """
    scores = np.asarray(scores, dtype=np.float64)
    cells = frame_cells(times, start=start, end=end)
    if scores.shape != (len(cells),) or not np.isfinite(scores).all():
        raise UserError(f"scores must be finite, one for each of the {len(cells)} times")
    levels = score_levels(scores, **options) if levels is None else levels  # type: ignore[arg-type]
    if levels.low > levels.high:
        raise UserError(f"levels.low={levels.low!r} must not be above levels.high={levels.high!r}")
    edges = np.flatnonzero(np.diff(np.concatenate(([0], (scores >= levels.low).astype(np.int8), [0]))))
    runs: list[list[int]] = []
    for first, stop in edges.reshape(-1, 2).tolist():
        if scores[first:stop].max() < levels.high:
            continue
        # a hair, so that a gap of just so many seconds is closed
        if runs and cells[first, 0] - cells[runs[-1][1] - 1, 1] <= max_gap + 1e-9:
            runs[-1][1] = stop
        else:
            runs.append([first, stop])
    found = [
        Span(float(cells[first, 0]), float(cells[stop - 1, 1]), float(scores[first:stop].mean()))
        for first, stop in runs
    ]
    return [span for span in found if span.end - span.start >= min_seconds - 1e-9]


def chosen_spans(
    times: np.ndarray,
    scores: np.ndarray,
    *,
    floor: float = 0.0,
    share: float = 0.75,
    reach: float = 1.0,
    start: float | None = None,
    end: float | None = None,
) -> list[Span]:
    """What a few chosen frames say about where it is: the same rule whoever chose them, and nothing but them.

    A frame is in a span where its score is at least floor + share * (best - floor), best the highest of the chosen
    ones. It stands for its cell among the chosen frames, at most `reach` seconds to each side; cells that touch are one
    span. floor: the score of what has nothing to do with the query, about 0 for cosines of sentence vectors.
    times, scores: (n,) of the chosen frames, by time. Empty where none is above the floor.
    """
    scores = np.asarray(scores, dtype=np.float64)
    cells = frame_cells(times, start=start, end=end, reach=reach)
    if scores.shape != (len(cells),) or not np.isfinite(scores).all():
        raise UserError(f"scores must be finite, one for each of the {len(cells)} times")
    best = scores.max(initial=-math.inf)
    if best <= floor:
        return []
    inside = scores >= floor + share * (best - floor)
    found = []
    for first, last in union([(float(a), float(b)) for a, b in cells[inside]]):
        own = inside & (cells[:, 0] >= first) & (cells[:, 1] <= last)
        found.append(Span(first, last, float(scores[own].mean())))
    return found
