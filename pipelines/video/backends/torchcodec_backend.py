"""torchcodec, whose FFmpeg is that of the system: asked for by name, or where the others fail."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError, one_line
from ..frame_table import FrameTable
from . import package

_CHUNK_FRAMES, _CHUNK_BYTES = 32, 1 << 25


class TorchcodecError(RuntimeError):
    """What torchcodec said, or that it counts frames differently."""


def open_file(
    path: Path, table: FrameTable, *, size: tuple[int, int], threads: int, beat: Callable[[], None]
) -> TorchcodecDecoder:
    return TorchcodecDecoder(path, table, size=size, threads=threads, beat=beat)


class TorchcodecDecoder:
    """Frames as shown: torchcodec rotates by itself, and scales the RGB frame where the others scale YUV."""

    def __init__(
        self, path: Path, table: FrameTable, *, size: tuple[int, int], threads: int, beat: Callable[[], None]
    ) -> None:
        decoders: Any = package("torchcodec.decoders", "torchcodec")
        options: dict[str, Any] = {}
        if size != table.shown:
            transforms: Any = package("torchcodec.transforms", "torchcodec")
            options["transforms"] = [transforms.Resize(size)]
        try:
            self._decoder = decoders.VideoDecoder(
                str(path.absolute()),
                stream_index=table.stream,
                dimension_order="NHWC",
                num_ffmpeg_threads=threads,
                seek_mode="exact",
                **options,
            )
        except (RuntimeError, ValueError, ImportError, OSError) as error:
            raise TorchcodecError(_reason(error)) from None
        if len(self._decoder) != len(table.pts):
            raise TorchcodecError(f"torchcodec counts {len(self._decoder):,} frames, {len(table.pts):,} can be decoded")
        self._size, self._beat = size, beat
        self._seconds = table.seconds - table.seconds[0]
        self._start = float(self._decoder.metadata.begin_stream_seconds)

    def frames(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        step = max(1, min(_CHUNK_FRAMES, _CHUNK_BYTES // (3 * self._size[0] * self._size[1])))
        for begin in range(0, len(numbers), step):
            chunk = list(numbers[begin : begin + step])
            try:
                batch = self._decoder.get_frames_at(chunk)
            except (RuntimeError, ValueError, IndexError) as error:
                raise TorchcodecError(_reason(error)) from None
            self._beat()
            found = batch.pts_seconds.numpy() - self._start
            if np.abs(found - self._seconds[chunk]).max() > 1e-3:
                raise TorchcodecError("torchcodec has other times")
            yield from batch.data.numpy()

    def close(self) -> None:
        del self._decoder


def _reason(error: BaseException) -> str:
    line = one_line(error)
    if "Could not load libtorchcodec" in line:
        raise UserError("torchcodec finds no FFmpeg that it can load, or is of another torch") from None
    return f"torchcodec: {line.rsplit('.cpp:', 1)[-1][:200]}"
