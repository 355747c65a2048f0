"""Vectors of the frames of composed videos: each frame of a source is encoded once, whatever is composed of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..composer import Composer
from ..scoring.encoding import FrameVectors
from ..scoring.scorer import FrameScorer
from ..virtual import Segment, VirtualVideo

# So many frames a second that each frame of a file is one of those that are looked at.
_ALL = 1e5


class FeatureBank:
    """The vectors of frames of files, float32, by file and whether they are flipped.

    scorer: makes them. cache: a `FeatureCache` in which those of a file are kept together, None: none. Workers of a
    loader that are started after `fill` encode nothing.
    """

    def __init__(
        self, scorer: FrameScorer, *, cache: Any = None, batch_size: int = 32, progress: bool | str = True
    ) -> None:
        self.scorer, self.cache, self.batch_size, self.progress = scorer, cache, batch_size, progress
        self._vectors: dict[tuple[str, bool], FrameVectors] = {}

    def fill(self, composer: Composer) -> None:
        """Encode every frame that videos of a composer may show, and keep what is new in the cache."""
        wanted: dict[str, tuple[Any, list[np.ndarray]]] = {}
        for segment in composer.segments():
            _, frames = wanted.setdefault(str(segment.reader.path), (segment.reader, []))
            frames.append(np.arange(segment.first, segment.first + segment.frames))
        for reader, frames in wanted.values():
            for flip in (False, True) if composer.flip else (False,):
                self._of(reader, flip).at(np.concatenate(frames))
        for vectors in self._vectors.values():
            vectors.keep()

    def at(self, video: VirtualVideo, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """float32 (n, D) of frames of a video."""
        places = video.places(indices)
        found = np.empty((len(places), self.scorer.dim), np.float32)
        rows: dict[tuple[int, bool], list[int]] = {}
        for row, (number, _) in enumerate(places):
            segment = video.segments[number]
            rows.setdefault((id(segment.reader), segment.flip), []).append(row)
        for (_, flip), own in rows.items():
            reader = video.segments[places[own[0]][0]].reader
            found[own] = self._of(reader, flip).at(np.array([places[row][1] for row in own]))
        return found

    def _of(self, reader: Any, flip: bool) -> FrameVectors:
        key = (str(reader.path), flip)
        if key not in self._vectors:
            source = VirtualVideo([Segment(reader, 0, len(reader), True)], name=reader.name) if flip else reader
            self._vectors[key] = FrameVectors(
                source,
                self.scorer,
                fps=_ALL,
                batch_size=self.batch_size,
                cache=self.cache,
                progress=self.progress,
            )
        return self._vectors[key]
