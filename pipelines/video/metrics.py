"""How well events in a video were found: spans against spans, frames against spans, times against times."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..spans import Spans, span_iou

RECALLS = (0.3, 0.5, 0.7)
PRECISION = 0.5
TOLERANCE = 5.0  # seconds


class TemporalScores(NamedTuple):
    """precision, recall, f1; from_found, from_true: mean seconds from a found time to the nearest true one and back."""

    precision: float
    recall: float
    f1: float
    from_found: float
    from_true: float


def answer_span(times: Sequence[float], duration: float) -> tuple[float, float]:
    """The span that an answer with these times means: the first two, clamped to the video and in order; fewer than two
    mean the whole video (LITA, arXiv:2403.19046, its evaluation of reasoning temporal localization)."""
    if len(times) < 2:
        return 0.0, float(duration)
    first, second = (min(max(float(time), 0.0), float(duration)) for time in times[:2])
    return min(first, second), max(first, second)


def grounding_scores(
    truths: Sequence[Spans], founds: Sequence[Spans], *, videos: Sequence[Hashable] | None = None
) -> dict[str, float]:
    """miou, recall_at_0.3, _0.5, _0.7 and precision_at_0.5 of queries, each with its true and its found spans.

    miou: mean of the IoU of the unions of both. recall_at_x: of true spans, the share that a found one covers with an
    IoU of at least x; precision_at_x: of found spans, the share that a true one does. With one true and one found span
    a query both are LITA's P@x (arXiv:2403.19046), which is also R1@x of temporal grounding. videos: of each query;
    scores are then means over videos of the means over their queries, as LITA's, else over queries. A query without a
    true span counts 1 where nothing was found, else 0, in miou and precision, and not in recall; one where nothing was
    found counts 0. NaN where there is nothing to count. Raises UserError for lists of different lengths.
    """
    if len(truths) != len(founds) or (videos is not None and len(videos) != len(truths)):
        raise UserError(f"{len(truths)} queries have {len(founds)} answers and {len(videos or truths)} videos")
    rows: dict[str, list[float]] = {"miou": [], f"precision_at_{PRECISION}": []}
    rows.update({f"recall_at_{least}": [] for least in RECALLS})
    for truth, found in zip(truths, founds, strict=True):
        each = np.array([[span_iou([a], [b]) for b in found] for a in truth]).reshape(len(truth), len(found))
        if len(truth):
            rows["miou"].append(span_iou(truth, found))
            best = each.max(axis=1, initial=0.0)
            for least in RECALLS:
                rows[f"recall_at_{least}"].append(float((best >= least).mean()))
        else:
            rows["miou"].append(float(not found))
            for least in RECALLS:
                rows[f"recall_at_{least}"].append(math.nan)
        right = (each.max(axis=0, initial=0.0) >= PRECISION).mean() if len(found) else not len(truth)
        rows[f"precision_at_{PRECISION}"].append(float(right))
    return {name: _mean(values, videos) for name, values in rows.items()}


def events_found(times: np.ndarray | Sequence[float], events: Spans) -> np.ndarray:
    """bool (E,): which events (start, end) have a frame in them: of the times (n,) one with start <= t < end."""
    times = np.asarray(times, dtype=np.float64)
    return np.array([bool(((times >= start) & (times < end)).any()) for start, end in events], dtype=bool)


def event_recall(times: np.ndarray | Sequence[float], events: Spans) -> float:
    """The share of the events in which one of the chosen frames lies; NaN without events."""
    return float(events_found(times, events).mean()) if len(events) else math.nan


def temporal_scores(
    found: np.ndarray | Sequence[float], truth: np.ndarray | Sequence[float], *, tolerance: float = TOLERANCE
) -> TemporalScores:
    """Key frames against the true ones, as TimeSearch-R (arXiv:2511.05489) has it.

    precision: the share of found times with a true one within `tolerance` seconds; recall: of true times with a found
    one; f1 their harmonic mean. Seconds, in any order. Nothing found, or nothing true: 0, distances NaN (the paper's
    evaluation leaves such videos out); neither: all NaN.
    """
    found, truth = np.asarray(found, dtype=np.float64), np.asarray(truth, dtype=np.float64)
    if not len(found) or not len(truth):
        value = 0.0 if len(found) or len(truth) else math.nan
        return TemporalScores(value, value, value, math.nan, math.nan)
    to_true, to_found = nearest_seconds(found, truth), nearest_seconds(truth, found)
    precision, recall = float((to_true <= tolerance).mean()), float((to_found <= tolerance).mean())
    f1 = 2 * precision * recall / (precision + recall) if precision + recall else 0.0
    return TemporalScores(precision, recall, f1, float(to_true.mean()), float(to_found.mean()))


def nearest_seconds(times: np.ndarray, others: np.ndarray) -> np.ndarray:
    """float64 (n,): the distance of each time to the nearest of the others, (m,), m > 0, in any order."""
    others = np.sort(others)
    right = np.clip(np.searchsorted(others, times), 0, len(others) - 1)
    return np.minimum(np.abs(times - others[right]), np.abs(times - others[np.maximum(right - 1, 0)]))


def _mean(values: Sequence[float], videos: Sequence[Hashable] | None) -> float:
    """The mean of what is not NaN, over videos of those over their queries."""
    groups: dict[Hashable, list[float]] = {}
    for number, value in enumerate(values):
        if not math.isnan(value):
            groups.setdefault(number if videos is None else videos[number], []).append(value)
    return float(np.mean([np.mean(group) for group in groups.values()])) if groups else math.nan
