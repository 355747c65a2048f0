"""Videos with queries and their true spans: whole ones to evaluate, windows of them to train."""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ...spans import Spans, union
from ..clips import VideoClip, at_row
from ..composer import Composer
from ..faults import VideoError
from ..reader import open_video
from ..scoring.encoding import encode_video, frames_to_look_at
from ..scoring.scorer import FrameScorer
from ..skipping import BadFiles
from ..virtual import VirtualVideo
from .features import FeatureBank

_TRIES = 100
_KEPT = 256  # videos whose vectors are in memory


class Seen(NamedTuple):
    """What is seen of a video. times: float64 (N,) seconds, rising. features: float32 (N, D)."""

    times: np.ndarray
    features: np.ndarray


class GroundingVideo:
    """name, duration in seconds, and queries: texts with the spans in which each is seen, disjoint and in order."""

    name: str
    duration: float
    queries: list[tuple[str, list[tuple[float, float]]]]

    def seen(self) -> Seen:
        raise NotImplementedError


class ComposedVideo(GroundingVideo):
    """A `VirtualVideo`, looked at `fps` times a second; its queries are the labels of its events."""

    def __init__(self, video: VirtualVideo, bank: FeatureBank, *, fps: float) -> None:
        self.video, self.bank, self.fps = video, bank, fps
        self.name, self.duration = video.name, video.duration
        labels = sorted({event.label for event in video.events})
        self.queries = [
            (label, union([(e.start, e.end) for e in video.events if e.label == label])) for label in labels
        ]

    def seen(self) -> Seen:
        indices, _ = frames_to_look_at(self.video, self.fps)
        return Seen(self.video.times[indices], self.bank.at(self.video, indices))


class FileVideo(GroundingVideo):
    """A video file with the spans of a table; equal texts are one query. Its vectors are made when they are asked for
    and kept in `store`."""

    def __init__(self, clips: Sequence[VideoClip], duration: float, store: FileStore) -> None:
        self.path, self.name, self.duration, self.store = clips[0].path, clips[0].name, duration, store
        self.where, by_text = clips[0], dict[str, list[tuple[float, float]]]()
        for clip in clips:
            by_text.setdefault(clip.label, []).append((clip.start, duration if clip.end is None else clip.end))
        self.queries = [(text, union(spans)) for text, spans in by_text.items()]

    def seen(self) -> Seen:
        try:
            return self.store.get(self.path)
        except VideoError as error:
            raise at_row(error, self.where) from None


class FileStore:
    """The vectors of files, the ones used last in memory, all in the cache of the disk."""

    def __init__(self, scorer: FrameScorer, *, fps: float, backend: str = "auto", cache: Any = None) -> None:
        self.scorer, self.fps, self.backend, self.cache = scorer, fps, backend, cache
        self._kept: OrderedDict[Path, Seen] = OrderedDict()

    def get(self, path: Path) -> Seen:
        if path in self._kept:
            self._kept.move_to_end(path)
            return self._kept[path]
        with open_video(path, backend=self.backend, size=self.scorer.size) as reader:
            found = encode_video(reader, self.scorer, fps=self.fps, cache=self.cache, progress=False)
        self._kept[path] = Seen(found.times, found.features)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return self._kept[path]


class VideoSet(Dataset[Any]):
    """Videos one by one, for evaluation: {"video": a `GroundingVideo`}, of which nobody has seen anything yet."""

    def __init__(self, videos: Sequence[GroundingVideo]) -> None:
        self.videos = list(videos)

    def __len__(self) -> int:
        return len(self.videos)

    def __getitem__(self, index: np.ndarray) -> dict[str, GroundingVideo]:
        return {"video": self.videos[int(index[0])]}


# windows --------------------------------------------------------------------------------------------------------------


class Window(NamedTuple):
    """times: (N,), from the start of the window. spans: of the query, cut to the window."""

    times: np.ndarray
    features: np.ndarray
    query: str
    spans: list[tuple[float, float]]


class ComposedWindows(Dataset[Any]):
    """Window number n is a short video of its own, from (seed, n): indexed by an array of numbers, a batch.

    queries: the vectors of the labels. negatives: the share of windows in which the query, another label, is not seen.
    """

    def __init__(
        self,
        composer: Composer,
        bank: FeatureBank,
        queries: dict[str, np.ndarray],
        *,
        seconds: float,
        fps: float,
        negatives: float,
        seed: int,
    ) -> None:
        self.composer, self.bank, self.queries = composer, bank, queries
        self.seconds, self.fps, self.negatives, self.seed = seconds, fps, negatives, seed

    def __getitem__(self, index: np.ndarray) -> dict[str, Tensor]:
        return collate([self._draw(number) for number in index.tolist()], self.queries)

    def _draw(self, number: int) -> Window:
        rng = np.random.default_rng([self.seed, number, 1])
        labels, name = self.composer.labels, f"window {number}"
        absent = labels[int(rng.integers(len(labels)))]
        if rng.random() >= self.negatives:
            video = self.composer.plan(self.seconds, [self.seed, number], name=name)
            if video.events:
                composed = ComposedVideo(video, self.bank, fps=self.fps)
                text, spans = composed.queries[int(rng.integers(len(composed.queries)))]
                return Window(*composed.seen(), text, spans)
        video = self.composer.plan(self.seconds, [self.seed, number], without=[absent], name=name)
        return Window(*ComposedVideo(video, self.bank, fps=self.fps).seen(), absent, [])


class FileWindows(Dataset[Any]):
    """Windows of videos, each around or beside a span of a query, from (seed, n): indexed by an array of numbers.

    A query is as likely as any other. negatives: the share of windows that are anywhere in the video instead. bad:
    where files that cannot be read are counted, another one is taken then.
    """

    def __init__(
        self,
        videos: Sequence[GroundingVideo],
        queries: dict[str, np.ndarray],
        *,
        seconds: float,
        negatives: float,
        seed: int,
        bad: BadFiles | None = None,
    ) -> None:
        self.videos, self.queries, self.bad = list(videos), queries, bad
        self.seconds, self.negatives, self.seed = seconds, negatives, seed
        self._ends = np.cumsum([len(video.queries) for video in self.videos]).tolist()

    def __getitem__(self, index: np.ndarray) -> dict[str, Tensor]:
        return collate([self._draw(number) for number in index.tolist()], self.queries)

    def _draw(self, number: int) -> Window:
        rng = np.random.default_rng([self.seed, number])
        for _ in range(_TRIES):
            query = int(rng.integers(self._ends[-1]))
            row = bisect.bisect_right(self._ends, query)
            video = self.videos[row]
            text, spans = video.queries[query - self._ends[row] + len(video.queries)]
            try:
                return self._window(video, text, spans, rng)
            except VideoError as error:
                if self.bad is None:
                    raise
                self.bad.skip(video.name, error)
        raise VideoError(f"{_TRIES} videos in a row cannot be read, the last one is {video.name}")

    def _window(self, video: GroundingVideo, text: str, spans: Spans, rng: np.random.Generator) -> Window:
        seen, room = video.seen(), max(video.duration - self.seconds, 0.0)
        near, where, which = rng.random(3)
        begin = where * room
        if near >= self.negatives:
            start, end = spans[int(which * len(spans))]
            low, high = start - self.seconds, end
            begin = min(max(low + where * (high - low), 0.0), room)
        inside = (seen.times >= begin) & (seen.times < begin + self.seconds)
        if not inside.any():
            inside[min(int(np.searchsorted(seen.times, begin)), len(inside) - 1)] = True
        cut = [
            (max(start - begin, 0.0), min(end - begin, self.seconds))
            for start, end in spans
            if start < begin + self.seconds and end > begin
        ]
        return Window(seen.times[inside] - begin, seen.features[inside], text, cut)


def collate(windows: Sequence[Window], queries: dict[str, np.ndarray]) -> dict[str, Tensor]:
    """features: float32 (B, T, D), 0 behind the end. mask: bool (B, T), True = real. times: float64 (B, T), seconds
    from the start of the window. query: float32 (B, Q). inside: float32 (B, T), 1 where a frame is in a span. edges:
    float32 (B, T, 2), the share of the spans whose first and whose last frame it is."""
    most = max(len(window.times) for window in windows)
    size = (len(windows), most)
    features = np.zeros((*size, windows[0].features.shape[1]), np.float32)
    mask, times = np.zeros(size, bool), np.zeros(size)
    inside, edges = np.zeros(size, np.float32), np.zeros((*size, 2), np.float32)
    for row, window in enumerate(windows):
        number = len(window.times)
        features[row, :number], mask[row, :number], times[row, :number] = window.features, True, window.times
        for start, end in window.spans:
            first, stop = np.searchsorted(window.times, (start, end))
            if first < stop:
                inside[row, first:stop] = 1
                edges[row, first, 0] += 1
                edges[row, stop - 1, 1] += 1
    edges /= np.maximum(edges.sum(1, keepdims=True), 1)
    return {
        "features": torch.from_numpy(features),
        "mask": torch.from_numpy(mask),
        "times": torch.from_numpy(times),
        "query": torch.from_numpy(np.stack([queries[window.query] for window in windows])),
        "inside": torch.from_numpy(inside),
        "edges": torch.from_numpy(edges),
    }
