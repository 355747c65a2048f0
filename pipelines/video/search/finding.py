"""When a video shows what a query names: vectors of frames, scores, chosen frames, spans."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ...errors import UserError, check_whole, nearest
from ..samplers import Sampler, create_sampler
from ..scoring.encoding import FrameVectors
from ..scoring.scorer import FrameScorer, check_queries
from ..spans import Span, score_spans
from ..time_search import Trace

# How scores become spans: see `score_levels`, and `score_spans` for the last two.
SPANS: dict[str, float | None] = {
    "high": 0.5,
    "low": 0.3,
    "floor": None,
    "contrast": 0.0,
    "threshold": None,
    "max_gap": 1.0,
    "min_seconds": 0.0,
}


class Found(NamedTuple):
    """Of one query. scores: float64 (N,), NaN of frames that were not looked at for it. chosen: int64 (n,), places in
    the video's `times`, rising. spans: the best first. trace: of time_search."""

    query: str
    scores: np.ndarray
    chosen: np.ndarray
    spans: list[Span]
    trace: Trace | None


class Search(NamedTuple):
    """times: float64 (N,), of the frames that could be looked at; indices: int64 (N,), their numbers in the video.
    found: of each query. scored: frames whose vectors were used; encoded: those of them that were read and encoded now,
    the others being known from before. fps: of `times`. seconds: of the video."""

    times: np.ndarray
    indices: np.ndarray
    found: list[Found]
    scored: int
    encoded: int
    fps: float
    seconds: float


def find(
    reader: Any,
    scorer: FrameScorer,
    queries: str | Sequence[str],
    *,
    sampler: str | Sampler = "tass",
    budget: int = 16,
    fps: float = 2.0,
    max_frames: int | None = None,
    spans: Mapping[str, float | None] | None = None,
    batch_size: int = 32,
    cache: Any = None,
    progress: bool | str = True,
    seed: int = 0,
) -> Search:
    """Look for each query in a video.

    reader: a `VideoReader` or `VirtualVideo`, opened with size=scorer.size. sampler: a name or what `create_sampler`
    gives; with time_search only the frames that it asks for are read and encoded, with any other all that are shown at
    0, 1/fps, ... seconds. budget: frames that it chooses for each query. spans: keys of SPANS; threshold is a score
    instead of a part of the way from the median to the highest, a floor of null the scorer's own. max_frames,
    batch_size, cache, progress: of `FrameVectors`. Raises UserError for an empty query or a wrong option, VideoError
    for a damaged video.
    """
    queries = check_queries(queries)
    check_whole("budget", budget, 1)
    options = check_spans(spans)
    options["floor"] = getattr(scorer, "floor", None) if options["floor"] is None else options["floor"]
    choose = create_sampler(sampler) if isinstance(sampler, str) else sampler
    asks = is_lazy(sampler)
    wanted = np.stack([scorer.encode_query(query) for query in queries])
    vectors = FrameVectors(
        reader, scorer, fps=fps, batch_size=batch_size, max_frames=max_frames, cache=cache, progress=progress
    )
    times, number = vectors.times, len(vectors.times)
    features = None if asks else vectors.at(np.arange(number))
    used = np.zeros(number, dtype=bool)
    found = []
    for query, vector in zip(queries, wanted, strict=True):
        looked = _Looked(vectors, vector)
        if features is None:
            sample = choose(times, looked, None, budget, seed=seed)
            looked(sample.indices)  # what fills up the budget has a score too
        else:
            sample = choose(times, looked(np.arange(number)), features, budget, seed=seed)
        used |= np.isfinite(looked.scores)
        own = decode_spans(times, looked.scores, float(reader.duration), options)
        found.append(Found(query, looked.scores, sample.indices, own, sample.trace))
    vectors.keep()
    return Search(times, vectors.indices, found, int(used.sum()), vectors.encoded, vectors.fps, float(reader.duration))


def decode_spans(
    times: np.ndarray, scores: np.ndarray, seconds: float, options: Mapping[str, float | None]
) -> list[Span]:
    """The spans of the scores that are there (NaN: not looked at), the best first. options: all of SPANS."""
    there = np.isfinite(scores)
    found = score_spans(times[there], scores[there], start=0.0, end=seconds, **options)  # type: ignore[arg-type]
    return sorted(found, key=lambda span: (-span.score, span.start))


def check_spans(options: Mapping[str, Any] | None) -> dict[str, float | None]:
    """All keys of SPANS. Raises UserError for an unknown one and for what is no number."""
    for key, value in (options or {}).items():
        if key not in SPANS:
            raise UserError(f"unknown option of spans {key!r}.{nearest(key, SPANS)}")
        if value is None and key in ("threshold", "floor"):
            continue
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not np.isfinite(value):
            raise UserError(f"spans.{key}={value!r} must be a number")
        if key in ("max_gap", "min_seconds", "contrast") and value < 0:
            raise UserError(f"spans.{key}={value!r} must be at least 0")
    chosen = {**SPANS, **(options or {})}
    high, low = chosen["high"], chosen["low"]
    if high is None or low is None or not 0 <= low <= high <= 1:
        raise UserError(f"spans.low={low!r} and spans.high={high!r} must be in order, from 0 to 1")
    return chosen


def is_lazy(sampler: Any) -> bool:
    """Whether a sampler asks for the scores of few frames."""
    from ..samplers import SAMPLERS

    return sampler == "time_search" or getattr(sampler, "func", sampler) is SAMPLERS["time_search"]


class _Looked:
    """The scores of a query, computed and remembered when asked for."""

    def __init__(self, vectors: FrameVectors, query: np.ndarray) -> None:
        self.vectors, self.query = vectors, query.astype(np.float64)
        self.scores = np.full(len(vectors.times), np.nan)

    def __call__(self, places: np.ndarray) -> np.ndarray:
        self.scores[places] = self.vectors.at(places) @ self.query
        return self.scores[places]
