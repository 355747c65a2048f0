"""What a model of moments must beat: the whole video, a span anywhere, and the scorer's own cosine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..spans import score_spans
from .scores import GroundingSums
from .videos import GroundingVideo

Queries = Mapping[str, np.ndarray]
# Of the scorer's cosine: which part of the way from the median to the highest starts a span, which one keeps it going.
LEVELS = tuple((high, low) for high in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8) for low in (0.2, 0.4, 0.6) if low <= high)


def cosine_levels(videos: Sequence[GroundingVideo], queries: Queries, max_gap: float) -> tuple[float, float]:
    """The levels with which the raw cosine has the best mIoU over the queries of videos (validation)."""
    best = []
    for high, low in LEVELS:
        sums = GroundingSums()
        for video in videos:
            _update(sums, video, queries, high, low, max_gap)
        best.append((float(np.nan_to_num(sums.compute()["miou"])), high, low))
    return max(best)[1:]


def baselines(
    videos: Sequence[GroundingVideo],
    queries: Queries,
    *,
    event_seconds: float,
    levels: tuple[float, float],
    max_gap: float,
) -> dict[str, dict[str, Any]]:
    """Scores of the whole video, of one span of event_seconds anywhere (seeded), and of the cosine between frames and
    query, thresholded with `levels` (`score_spans`)."""
    whole, chance, cosine = GroundingSums(), GroundingSums(), GroundingSums()
    for number, video in enumerate(videos):
        times = video.seen().times
        rng = np.random.default_rng([0, number])
        for _, truth in video.queries:
            whole.update(truth, [(0.0, video.duration)], times)
            length = min(event_seconds, video.duration)
            start = float(rng.uniform(0, video.duration - length))
            chance.update(truth, [(start, start + length)], times)
        _update(cosine, video, queries, *levels, max_gap)
    named = {"cosine of the scorer": cosine, "whole video": whole, "a span anywhere": chance}
    return {name: sums.compute() for name, sums in named.items()}


def _update(
    sums: GroundingSums,
    video: GroundingVideo,
    queries: Queries,
    high: float,
    low: float,
    max_gap: float,
) -> None:
    seen = video.seen()
    for text, truth in video.queries:
        scores = seen.features @ queries[text]
        spans = score_spans(
            seen.times, scores, high=high, low=low, contrast=0.0, max_gap=max_gap, start=0.0, end=video.duration
        )
        sums.update(truth, [(span.start, span.end) for span in spans], seen.times)
