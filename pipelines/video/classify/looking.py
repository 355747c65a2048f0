"""What a model is shown of clips: pictures that are read when they are asked for, or vectors of a frozen encoder."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from ..clips import VideoClip, at_row
from ..faults import VideoError
from ..reader import VideoReader, open_video
from ..scoring.encoding import FrameVectors
from ..scoring.image_encoder import ImageEncoder
from ..skipping import BadFiles
from ..virtual import Segment, VirtualVideo

_OPEN = 16  # videos that a process keeps open
# Decoded a little larger than they are shown, so that training can cut out different parts.
_ROOM = 8 / 7


class Looked(NamedTuple):
    """frames: (T, ...), pictures uint8 (T, H, W, 3) or vectors float32 (T, D) or (T, h, w, D). times: float64 (T,),
    seconds from the start of the clip."""

    frames: np.ndarray
    times: np.ndarray


class Looking(Protocol):
    """What shows clips."""

    def look(self, clip: VideoClip, times: np.ndarray, random: np.random.Generator | None) -> Looked:
        """The frames of a clip that are shown at these seconds of its file; random: light augmentation."""
        ...


class Pictures:
    """Frames of size x size pixels, the middle of the picture; in training a random part of it, and as often as not
    the other way round. backend: of `open_video`. crop, flip: what training changes."""

    def __init__(self, size: int, *, crop: bool = True, flip: bool = True, backend: str = "auto") -> None:
        self.size, self.crop, self.flip, self.backend = size, crop, flip, backend
        self._room = round(size * _ROOM)
        self._open: OrderedDict[Path, VideoReader] = OrderedDict()

    def look(self, clip: VideoClip, times: np.ndarray, random: np.random.Generator | None) -> Looked:
        reader = self._reader(clip)
        try:
            found = reader.read_at(times)
        except VideoError as error:
            raise at_row(error, clip) from None
        free = self._room - self.size
        top, left = (free // 2, free // 2)
        if random is not None and self.crop:
            top, left = random.integers(0, free + 1, size=2)
        frames = found.frames[:, top : top + self.size, left : left + self.size]
        if random is not None and self.flip and random.random() < 0.5:
            frames = frames[:, :, ::-1]
        return Looked(np.ascontiguousarray(frames), times - clip.start)

    def _reader(self, clip: VideoClip) -> VideoReader:
        if clip.path not in self._open:
            try:
                self._open[clip.path] = open_video(clip.path, backend=self.backend, size=(self._room, self._room))
            except VideoError as error:
                raise at_row(error, clip) from None
            if len(self._open) > _OPEN:
                self._open.popitem(last=False)[1].close()
        self._open.move_to_end(clip.path)
        return self._open[clip.path]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": OrderedDict()}  # a worker opens its own


class Vectors:
    """What a frozen encoder makes of frames, each encoded once and kept in the cache.

    encoder: see `load_image_encoder`. rate: frames looked at in a second; a time means the frame of these that is shown
    then. flip: training sees half of the clips the other way round. cache: a `FeatureCache`, None: none.
    """

    def __init__(
        self, encoder: ImageEncoder, *, rate: float, flip: bool = False, backend: str = "auto", cache: Any = None
    ) -> None:
        self.scorer, self.rate, self.flip, self.backend, self.cache = _Scorer(encoder), rate, flip, backend, cache
        self._files: dict[tuple[Path, bool], FrameVectors] = {}

    @property
    def dim(self) -> int:
        return self.scorer.encoder.dim

    @property
    def key(self) -> str:
        return self.scorer.key

    def fill(self, clips: Sequence[VideoClip], *, training: bool, bad: BadFiles | None = None) -> list[VideoClip]:
        """Encode all frames that the clips may show, file by file, so that workers decode nothing. bad: where files
        that cannot be read are counted and their clips left out; None: it is an error. Returns the clips that are
        left."""
        kept, by_file = [], dict[Path, list[VideoClip]]()
        for clip in clips:
            by_file.setdefault(clip.path, []).append(clip)
        for path, own in by_file.items():
            try:
                for flip in (False, True) if training and self.flip else (False,):
                    vectors = self._of(path, flip)
                    vectors.at(np.unique(np.concatenate([np.arange(*self._span(vectors, clip)) for clip in own])))
                    vectors.keep()
                kept += own
            except VideoError as error:
                if bad is None:
                    raise at_row(error, own[0]) from None
                bad.skip(str(path), at_row(error, own[0]))
        order = {id(clip): place for place, clip in enumerate(clips)}
        return sorted(kept, key=lambda clip: order[id(clip)])

    def look(self, clip: VideoClip, times: np.ndarray, random: np.random.Generator | None) -> Looked:
        flip = random is not None and self.flip and bool(random.random() < 0.5)
        vectors = self._of(clip.path, flip)
        first, stop = self._span(vectors, clip)
        rows = np.searchsorted(vectors.times, times + 1e-9, side="right") - 1
        found = vectors.at(np.clip(rows, first, stop - 1))
        return Looked(found.reshape(len(found), *self.scorer.shape), times - clip.start)

    def _span(self, vectors: FrameVectors, clip: VideoClip) -> tuple[int, int]:
        """Of the frames that are looked at, those that are shown within a clip: first and stop, at least one."""
        end = np.inf if clip.end is None else clip.end
        first = int(np.searchsorted(vectors.times, clip.start + 1e-9, side="right")) - 1
        # the frame that is on when the clip starts counts where no other starts within it
        inside = int(np.searchsorted(vectors.times, clip.start - 1e-9))
        stop = int(np.searchsorted(vectors.times, end - 1e-9))
        if inside < stop:
            return inside, stop
        return max(first, 0), max(first, 0) + 1

    def _of(self, path: Path, flip: bool) -> FrameVectors:
        if (path, flip) not in self._files:
            reader: Any = open_video(path, backend=self.backend, size=self.scorer.size)
            source = VirtualVideo([Segment(reader, 0, len(reader), True)], name=reader.name) if flip else reader
            self._files[path, flip] = FrameVectors(source, self.scorer, fps=self.rate, cache=self.cache)
        return self._files[path, flip]


class _Scorer:
    """An image encoder as what makes vectors of frames: one vector each, a grid in a row."""

    def __init__(self, encoder: ImageEncoder) -> None:
        self.encoder, self.key, self.size = encoder, encoder.key, encoder.size
        self.shape = (encoder.dim,) if encoder.grid is None else (*encoder.grid, encoder.dim)
        self.dim = int(np.prod(self.shape))

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        found = self.encoder(torch.from_numpy(np.ascontiguousarray(frames)))
        return found.float().cpu().numpy().reshape(len(frames), self.dim)

    def encode_query(self, query: str | Path) -> np.ndarray:
        raise NotImplementedError("an image encoder has no queries")
