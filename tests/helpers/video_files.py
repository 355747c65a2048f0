"""Small videos whose frames say which they are, and the bytes of MP4 files changed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.video.reader import open_video

BITS = 10  # of a frame's number, each a block of pixels


def picture(number: int, size: tuple[int, int] = (64, 120)) -> np.ndarray:
    """uint8 (H, W, 3): the number in bright blocks across the upper half, two colours in the lower."""
    frame = np.full((*size, 3), 30, np.uint8)
    high, wide = size[0] // 8, size[1] // (BITS + 2)
    for bit in range(BITS):
        if number >> bit & 1:
            frame[high : 4 * high, wide * (bit + 1) : wide * (bit + 2)] = 220
    frame[5 * high :, : size[1] // 2] = (200, 40, 40)
    frame[5 * high :, size[1] // 2 :] = (40, 60, 190)
    return frame


def number_in(frame: np.ndarray) -> int:
    """The number in a frame, of any size that keeps the blocks apart."""
    height, width = frame.shape[:2]
    columns = [int(width * (bit + 1.5) / (BITS + 2)) for bit in range(BITS)]
    return sum((int(frame[height * 5 // 16, column, 1]) > 125) << bit for bit, column in enumerate(columns))


def numbers_in(frames: np.ndarray) -> list[int]:
    return [number_in(frame) for frame in frames]


def write_video(
    path: Path,
    frames: int | Sequence[np.ndarray] = 40,
    *,
    codec: str = "libx264",
    pixels: str = "yuv420p",
    size: tuple[int, int] = (64, 120),
    rate: int = 25,
    key_every: int = 12,
    between: int = 2,
    pts: Sequence[int] | None = None,
    options: dict[str, str] | None = None,
    container: dict[str, str] | None = None,
    color: dict[str, Any] | None = None,
) -> Path:
    """frames: pictures, or how many numbered ones. between: B-frames. pts: of each, in units of 1 / rate seconds.
    color: attributes of the encoder, which are those of the frames too."""
    import av

    pictures = [picture(k, size) for k in range(frames)] if isinstance(frames, int) else frames
    with av.open(str(path), "w", options=container or {}) as file:
        stream: Any = file.add_stream(codec, rate=rate, options=options or {})
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        stream.codec_context.gop_size = key_every
        stream.codec_context.max_b_frames = between
        for name, value in (color or {}).items():
            setattr(stream.codec_context, name, value)
        for number, pixel in enumerate(pictures):
            # to YUV by the matrix and range that the file states
            made = av.VideoFrame.from_ndarray(pixel, format="rgb24")
            space = {"dst_colorspace": "ITU709"} if (color or {}).get("colorspace") == 1 else {}
            frame = av.video.reformatter.VideoReformatter().reformat(
                made, format=pixels, dst_color_range=(color or {}).get("color_range"), **space
            )
            frame.pts = number if pts is None else int(pts[number])
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return path


def write_sound(path: Path, seconds: float = 1.0) -> Path:
    """An audio file without video."""
    import av

    with av.open(str(path), "w") as file:
        stream: Any = file.add_stream("aac", rate=16000)
        for begin in range(0, int(seconds * 16000), 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
            frame.sample_rate, frame.pts = 16000, begin
            for packet in stream.encode(frame):
                file.mux(packet)
        for packet in stream.encode():
            file.mux(packet)
    return path


def turn(path: Path, clockwise: int) -> Path:
    """Write the matrix that turns an MP4 file's video into its track header (ISO/IEC 14496-12, 8.3.2)."""
    cosine, sine = {0: (1, 0), 90: (0, 1), 180: (-1, 0), 270: (0, -1)}[clockwise]
    matrix = [cosine, sine, 0, -sine, cosine, 0, 0, 0]
    data = bytearray(path.read_bytes())
    place = data.index(b"tkhd") + 44
    content = b"".join((value * 65536).to_bytes(4, "big", signed=True) for value in matrix)
    data[place : place + len(content)] = content
    path.write_bytes(data)
    return path


def trim_by_edit_list(path: Path, units: int) -> Path:
    """Let the edit list of an MP4 file begin so many units of its track's time later."""
    data = bytearray(path.read_bytes())
    place = data.index(b"elst")
    assert data[place + 4] == 0 and int.from_bytes(data[place + 8 : place + 12], "big") == 1
    begin = int.from_bytes(data[place + 16 : place + 20], "big") + units
    data[place + 16 : place + 20] = begin.to_bytes(4, "big")
    path.write_bytes(data)
    return path


def send_numbers(reader: Any, pipe: Any) -> None:
    """What a process that was started anew finds in a reader that it was sent."""
    pipe.send((reader.backend, numbers_in(reader.read([4, 1]))))


_works: dict[str, str] = {}  # backends, and why they do not work


def works(backend: str, folder: Path) -> bool:
    """Whether the backend is installed and finds FFmpeg: known by decoding."""
    if backend not in _works:
        try:
            open_video(write_video(folder / "probe.mp4", 2), backend=backend).read([1])
            _works[backend] = ""
        except UserError as error:
            _works[backend] = str(error)
    return not _works[backend]


def needs(backend: str, folder: Path) -> None:
    """Skip where the backend does not work."""
    if not works(backend, folder):
        pytest.skip(_works[backend])


def child_of(reader: Any) -> int:
    return reader._decoder._child._process.pid
