"""The vectors of the frames of a video, looked at so many times a second: all of them, or those that are asked for."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ...errors import UserError, check_whole
from .bar import frame_bar
from .scorer import FrameScorer


class FrameFeatures(NamedTuple):
    """times: float64 (N,), seconds at which the frames are shown, rising. indices: int64 (N,), their numbers in the
    video. features: float32 (N, D), of length 1. encoded: frames that were read and encoded for it, 0 from a cache.
    fps: frames looked at a second, less than asked for where a video has too many."""

    times: np.ndarray
    indices: np.ndarray
    features: np.ndarray
    encoded: int
    fps: float


class FrameVectors:
    """The vectors of the frames shown at 0, 1/fps, 2/fps, ... seconds, each frame once; computed when asked for.

    reader: a `VideoReader` or `VirtualVideo`, best with frames in the scorer's size; any other is scaled. max_frames:
    of a video with more the fps are lowered, None: no bound. cache: a `FeatureCache`; its keys are the pictures (equal
    `identities` are one, read and encoded once), the size in which they are read and the scorer. progress: a bar, or
    one of pipelines/progress.py's kinds. times, indices, fps: as in `FrameFeatures`. encoded: frames so far.
    """

    def __init__(
        self,
        reader: Any,
        scorer: FrameScorer,
        *,
        fps: float = 2.0,
        batch_size: int = 32,
        max_frames: int | None = None,
        cache: Any = None,
        progress: bool | str = True,
    ) -> None:
        check_whole("batch_size", batch_size, 1)
        self.reader, self.scorer, self.cache, self.progress = reader, scorer, cache, progress
        self.batch_size, self.encoded, self._kept = batch_size, 0, 0
        self.indices, self.fps = frames_to_look_at(reader, fps, max_frames)
        self.times = np.asarray(reader.times)[self.indices]
        places: dict[Any, int] = {}
        identities = reader.identities(self.indices)
        self._rows = np.array([places.setdefault(identity, len(places)) for identity in identities], dtype=np.int64)
        self._first = np.empty(len(places), dtype=np.int64)  # of each picture the frame that shows it first
        self._first[self._rows[::-1]] = self.indices[::-1]
        self._vectors = np.zeros((len(places), scorer.dim), dtype=np.float32)
        self._known = np.zeros(len(places), dtype=bool)
        if cache is not None:
            self._key = _key(reader, scorer, list(places))
            self._fetch()

    @property
    def known(self) -> np.ndarray:
        """bool (N,): the frames whose vectors are there."""
        return self._known[self._rows]

    def at(self, places: np.ndarray) -> np.ndarray:
        """float32 (n, D) of the frames at these places of `times`. While a batch is encoded the next one is read."""
        rows = self._rows[np.asarray(places, dtype=np.int64)]
        missing = np.unique(rows[~self._known[rows]])
        if len(missing):
            label = f"frames of {Path(str(getattr(self.reader, 'name', 'video'))).name}"
            # a search looks many times, at few frames: a single batch has no bar
            shown = self.progress if len(missing) > self.batch_size else False
            with frame_bar(label, len(missing), self.batch_size, shown) as through:
                for batch, frames in self._batches(missing):
                    self._vectors[batch] = self.scorer.encode_frames(frames)
                    self._known[batch] = True
                    self.encoded += len(batch)
                    through(len(batch))
        return self._vectors[rows]

    def keep(self) -> None:
        """Put what is new into the cache."""
        if self.cache is None or not self.encoded > self._kept:
            return
        self._kept = self.encoded
        if self._known.all():
            self.cache.put(f"all {self._key}", self._vectors)
        else:
            numbers = np.flatnonzero(self._known).astype(np.int32)
            self.cache.put(f"some {self._key}", np.column_stack([numbers.view(np.float32), self._vectors[numbers]]))

    def _fetch(self) -> None:
        found = self.cache.get(f"all {self._key}")
        if found is not None and found.shape == self._vectors.shape:
            self._vectors, self._known = np.array(found, dtype=np.float32), np.ones_like(self._known)
            return
        found = self.cache.get(f"some {self._key}")
        if found is not None and found.ndim == 2 and found.shape[1] == self._vectors.shape[1] + 1:
            numbers = np.ascontiguousarray(found[:, 0]).view(np.int32)
            self._vectors[numbers], self._known[numbers] = found[:, 1:], True

    def _batches(self, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Pictures in the order of the video, in batches; a thread reads one batch ahead."""
        order = rows[np.argsort(self._first[rows], kind="stable")]
        parts = [order[begin : begin + self.batch_size] for begin in range(0, len(order), self.batch_size)]
        with ThreadPoolExecutor(1) as thread:
            ahead: Future[np.ndarray] = thread.submit(self.reader.read, self._first[parts[0]])
            for number, part in enumerate(parts):
                frames = ahead.result()
                if number + 1 < len(parts):
                    ahead = thread.submit(self.reader.read, self._first[parts[number + 1]])
                yield part, frames


def encode_video(
    reader: Any,
    scorer: FrameScorer,
    *,
    fps: float = 2.0,
    batch_size: int = 32,
    max_frames: int | None = None,
    cache: Any = None,
    progress: bool | str = True,
) -> FrameFeatures:
    """The vectors of all frames that are looked at, in constant memory but for the vectors; from the cache where they
    are there, so that a second query decodes nothing. Arguments: of `FrameVectors`. Raises what the reader raises."""
    vectors = FrameVectors(
        reader, scorer, fps=fps, batch_size=batch_size, max_frames=max_frames, cache=cache, progress=progress
    )
    features = vectors.at(np.arange(len(vectors.times)))
    vectors.keep()
    return FrameFeatures(vectors.times, vectors.indices, features, vectors.encoded, vectors.fps)


def frames_to_look_at(reader: Any, fps: float, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """The frames that are shown at 0, 1/fps, ... seconds, int64, each once; and the fps, lowered to have max_frames."""
    if isinstance(fps, bool) or not isinstance(fps, (int, float)) or not 0 < fps < np.inf:
        raise UserError(f"fps={fps!r} must be a number above 0: frames to look at, a second")
    seconds = float(reader.duration)
    if max_frames is not None:
        check_whole("max_frames", max_frames, 1)
        if min(seconds * fps, len(reader)) > max_frames:
            fps = max_frames / seconds
    number = max(1, int(np.ceil(seconds * fps - 1e-9)))
    if max_frames is None and number > 4 * len(reader):  # as good as every frame
        return np.arange(len(reader), dtype=np.int64), float(fps)
    return np.unique(np.asarray(reader.index_at(np.arange(number) / fps), dtype=np.int64)), float(fps)


def _key(reader: Any, scorer: FrameScorer, identities: list[Any]) -> str:
    """What vectors depend on: the pictures, the size and the way in which they are read, and the scorer."""
    text = json.dumps([[list(identity) for identity in identities], list(reader.size), scorer.key])
    way = getattr(reader, "asked_backend", "")
    return f"{hashlib.sha256(text.encode('utf-8', 'surrogateescape')).hexdigest()} {way}"
