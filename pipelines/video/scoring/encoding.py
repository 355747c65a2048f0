"""The vectors of the frames of a video: looked at so many times a second, in batches, in constant memory."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np

from ...errors import UserError, check_whole
from .bar import frame_bar
from .scorer import FrameScorer


class FrameFeatures(NamedTuple):
    """times: float64 (N,), seconds at which the frames are shown, rising. indices: int64 (N,), their numbers in the
    video. features: float32 (N, D), of length 1. decoded: frames that were read and encoded for it, 0 from a cache.
    fps: frames looked at a second, less than asked for where a video has too many."""

    times: np.ndarray
    indices: np.ndarray
    features: np.ndarray
    decoded: int
    fps: float


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
    """The vectors of the frames that are shown at 0, 1/fps, 2/fps, ... seconds, each frame once.

    reader: a `VideoReader` or `VirtualVideo` whose frames come in the scorer's size (any other is scaled). max_frames:
    of a video with more the fps are lowered, None: no bound. cache: a `FeatureCache`; under the keys of the file, the
    scorer and the times, so that a second query decodes nothing. progress: a bar, or one of pipelines/progress.py's
    kinds. Equal `identities` are read and encoded once; while one batch is encoded the next is read. Raises what the
    reader raises.
    """
    check_whole("batch_size", batch_size, 1)
    indices, fps = frames_to_look_at(reader, fps, max_frames)
    identities = reader.identities(indices)
    places: dict[Any, int] = {}
    rows = np.array([places.setdefault(identity, len(places)) for identity in identities], dtype=np.int64)
    first = np.full(len(places), -1, dtype=np.int64)
    first[rows[::-1]] = indices[::-1]
    key = _key(reader, scorer, list(places))
    unique = None if cache is None else cache.get(key)
    decoded = 0
    if unique is None or unique.shape != (len(first), scorer.dim):
        unique = np.empty((len(first), scorer.dim), dtype=np.float32)
        with frame_bar(f"frames of {_short_name(reader)}", len(first), batch_size, progress) as bar:
            for begin, frames in _batches(reader, first, batch_size):
                unique[begin : begin + len(frames)] = scorer.encode_frames(frames)
                bar(len(frames))
        decoded = len(first)
        if cache is not None:
            cache.put(key, unique)
    return FrameFeatures(np.asarray(reader.times)[indices], indices, unique[rows], decoded, fps)


def frames_to_look_at(reader: Any, fps: float, max_frames: int | None = None) -> tuple[np.ndarray, float]:
    """The frames that are shown at 0, 1/fps, ... seconds, int64, each once; and the fps, lowered to have max_frames."""
    if not np.isfinite(fps) or fps <= 0:
        raise UserError(f"fps={fps!r} must be greater than 0: frames to look at, a second")
    if max_frames is not None:
        check_whole("max_frames", max_frames, 1)
        if np.ceil(reader.duration * fps) > max_frames:
            fps = max_frames / reader.duration
    number = max(1, int(np.ceil(reader.duration * fps - 1e-9)))
    # more times than frames give the frames themselves
    wanted = np.arange(number) / fps if number < 4 * len(reader) else np.asarray(reader.times)
    return np.unique(np.asarray(reader.index_at(wanted), dtype=np.int64)), float(fps)


def _batches(reader: Any, indices: np.ndarray, batch_size: int) -> Iterator[tuple[int, np.ndarray]]:
    """Frames in the order of the video, in batches; one thread reads ahead by one of them."""
    begins = range(0, len(indices), batch_size)
    with ThreadPoolExecutor(1) as thread:
        ahead = None
        try:
            for begin in begins:
                batch = ahead or thread.submit(reader.read, indices[begin : begin + batch_size])
                following = begin + batch_size
                frames = batch.result()
                ahead = None
                if following < len(indices):
                    ahead = thread.submit(reader.read, indices[following : following + batch_size])
                yield begin, frames
        finally:
            if ahead is not None:
                ahead.cancel()


def _key(reader: Any, scorer: FrameScorer, identities: Sequence[Any]) -> str:
    """What the vectors depend on: the pictures themselves, the size in which they are read, and the scorer."""
    text = json.dumps([list(identity) for identity in identities], default=str)
    frames = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
    backend = getattr(reader, "backend", "")
    return (
        f"frames {frames} {getattr(reader, 'size', None)} {backend} {hashlib.sha256(scorer.key.encode()).hexdigest()}"
    )


def _short_name(reader: Any) -> str:
    return str(getattr(reader, "name", "video")).replace("\\", "/").rsplit("/", 1)[-1]
