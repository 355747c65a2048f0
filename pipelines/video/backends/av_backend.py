"""PyAV: it also reads the table of frames that every decoder goes by."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import one_line
from ..faults import VideoError, say_once
from ..frame_table import FrameTable, Packets, turned
from . import package

# Frames that may be decoded and thrown away before a seek, which throws away what the threads work on, is cheaper.
_SKIP = 8


def open_file(
    path: Path, table: FrameTable, *, size: tuple[int, int], threads: int, beat: Callable[[], None]
) -> AvDecoder:
    return AvDecoder(path, table, size=size, threads=threads, beat=beat)


def read_table(path: Path, *, threads: int, beat: Callable[[], None]) -> FrameTable:
    """The frames of a file that can be decoded: its packets, less what at its start and end gives no frame.

    Every packet is read, none is decoded but those to the first frame and those from the last key frame on.
    Raises VideoError, saying what is wrong.
    """
    av: Any = package("av")
    packets = Packets()
    with _opened(av, path) as container:
        stream = _video_stream(av, container, path)
        alone = len(container.streams.video) == 1
        index, base = stream.index, stream.time_base or Fraction(1, 90_000)
        rate = stream.average_rate or stream.guessed_rate or Fraction(25)
        kind = container.format.name.split(",")[0]
        said, codec = stream.frames, stream.codec_context.name
        stated = _stated_seconds(container, stream)
        height, width = stream.codec_context.height, stream.codec_context.width
        for packet in _packets(av, container, stream):
            beat()
            if packet.is_discard or (codec == "vp8" and packet.size and _hidden(packet)):
                said -= 1
            elif packet.size:
                packets.add(packet.pts, packet.dts, packet.duration or 0, packet.is_keyframe)
    if not len(packets):
        cause = "cut off" if said > 0 else "empty"
        raise VideoError(f"{path} has a video stream ({codec}) without a frame in it, {_said(said, stated)}", cause)
    pts, end, keys, counted = packets.order(max(1, round(1 / (rate * base))))
    table = FrameTable(index, pts, end, base, keys, counted, height, width, 0, codec, kind, alone, packets.closed)
    table = _decodable(path, table, threads, beat)
    number, found = len(table.pts), float((table.end - table.pts[0]) * base)
    if number < max(said, len(packets)) or found < 0.95 * stated - 1:
        there = f" of the {len(packets):,} that are there" if number < len(packets) else ""
        say_once(str(path), f"{number:,} frames{there} can be decoded, {found:.6g} seconds; {_said(said, stated)}")
    return table


class AvDecoder:
    """Decodes on from where it stands, or from the last key frame before a frame where that is nearer.

    A frame that cannot be decoded is the one shown before it, which is said once.
    """

    def __init__(
        self, path: Path, table: FrameTable, *, size: tuple[int, int], threads: int, beat: Callable[[], None]
    ) -> None:
        self._av: Any = package("av")
        self._path, self._table, self._threads, self._beat = path, table, threads, beat
        self._height, self._width = turned(size, table.rotation)
        self._turns = -table.rotation // 90 % 4
        self._scaler = self._av.video.reformatter.VideoReformatter()
        self._container: Any = None
        self._before: tuple[int, Any] | None = None  # the last two frames that came out, with their numbers
        self._now: tuple[int, Any] | None = None
        self._open()

    def frames(self, numbers: Sequence[int]) -> Iterator[np.ndarray]:
        for number in numbers:
            yield self._pixels(self._frame(number))

    def close(self) -> None:
        self._before = self._now = None
        self._waiting.clear()
        if self._container is not None:
            self._container.close()
            self._container = None

    # where it stands --------------------------------------------------------------------------------------------------

    def raw(self) -> Iterator[tuple[int, Any]]:
        """The frames from where it stands on, each with its number, -1 for one outside the table."""
        while (found := self._next()) is not None:
            yield found

    def go(self, number: int) -> None:
        """Stand at a key frame at or before a frame."""
        place = self._table.key_before(number)
        for key in (place, place - 1, place - 4):
            if key < 0 or self._table.counted:
                break
            if self._table.key_frames[key] == 0 or not self._seek(key):
                break
            if 0 <= self._from <= number:
                return
        self._open()

    def _open(self) -> None:
        self.close_quietly()
        self._container = _opened(self._av, self._path)
        self._stream = self._container.streams[self._table.stream]
        self._stream.thread_type = "AUTO"
        self._stream.codec_context.thread_count = self._threads
        self._start()
        self._from = 0

    def close_quietly(self) -> None:
        if self._container is not None:
            with contextlib.suppress(self._av.FFmpegError):
                self._container.close()
        self._container = None

    def _start(self) -> None:
        self._packets = _packets(self._av, self._container, self._stream)
        self._waiting: deque[Any] = deque()
        self._before = self._now = None
        self._count, self._ended = 0, False

    def _seek(self, key: int) -> bool:
        """Whether it came to stand at a key frame; _from is the frame from which on what comes out is whole."""
        try:
            self._container.seek(int(self._table.pts[self._table.key_frames[key]]), stream=self._stream, backward=True)
        except self._av.FFmpegError:
            return False
        self._start()
        self._from = -1
        self._decode_packet(until_key=True)
        return self._from >= 0

    def _decode_packet(self, *, until_key: bool = False) -> None:
        """Decode one packet. until_key: the first that is a key frame, which sets _from; those before are left out."""
        while True:
            self._beat()
            packet = next(self._packets, None)
            if packet is None:
                self._ended = True
                return
            if until_key and packet.size:
                if not packet.is_keyframe:
                    continue
                at = packet.dts if packet.pts is None else packet.pts
                found = -1 if at is None else self._table.number_of(at)
                # Another time than without the seek, as in MPEG program streams: the times after it are wrong.
                place = self._table.key_before(found)
                self._from = found if place >= 0 and self._table.key_frames[place] == found else -1
            try:
                self._waiting.extend(self._stream.codec_context.decode(packet if packet.size else None))
            except EOFError:
                self._ended = True
            except self._av.FFmpegError:  # a damaged packet
                pass
            return

    def _next(self) -> tuple[int, Any] | None:
        while True:
            while not self._waiting:
                if self._ended:
                    return None
                self._decode_packet()
            frame = self._waiting.popleft()
            if self._table.counted:
                self._count += 1
                return self._count - 1, frame
            number = -1 if frame.pts is None else self._table.number_of(frame.pts)
            # Before the key frame where it started: pictures that refer to what was not decoded.
            if number < 0 or number >= self._from:
                return number, frame

    def _frame(self, number: int) -> Any:
        if self._before is not None and self._before[0] == number:
            return self._before[1]
        if self._now is None or self._now[0] > number:
            if self._before is None or self._before[0] > number:
                self.go(number)
        elif self._now[0] < number:
            key = self._table.key_before(number)
            if not self._table.counted and key >= 0 and self._table.key_frames[key] > self._now[0] + _SKIP:
                self.go(number)
        self._advance(number)
        place, step = self._table.key_before(number), 1
        # None came out between the key frame and this one: the frame before is from an earlier key frame.
        while (self._now is None or self._now[0] > number) and self._before is None and place > 0:
            place, step = max(0, place - step), 2 * step
            self.go(int(self._table.key_frames[place]))
            self._advance(number)
        if self._now is not None and self._now[0] == number:
            return self._now[1]
        shown = self._now if self._now is not None and self._now[0] < number else self._before or self._now
        if shown is None:
            raise VideoError(f"{self._path}: frame {number} cannot be decoded, nor one near it", "cut off")
        say_once(str(self._path), "frames in it that cannot be decoded are replaced with the one shown before")
        return shown[1]

    def _advance(self, number: int) -> None:
        """Decode until a frame comes out that is not before this one."""
        while self._now is None or self._now[0] < number:
            found = self._next()
            if found is None:
                break
            if found[0] >= 0 and (self._now is None or found[0] > self._now[0]):
                self._before, self._now = self._now, found

    def _pixels(self, frame: Any) -> np.ndarray:
        options: dict[str, str] = {"interpolation": "BILINEAR"}
        try:
            scaled = self._scaler.reformat(frame, self._width, self._height, "rgb24", **options)
        except self._av.FFmpegError:  # a colour space that is none: as where the file states none
            options |= {"src_colorspace": "ITU601", "dst_colorspace": "ITU601"}
            scaled = self._scaler.reformat(frame, self._width, self._height, "rgb24", **options)
        return np.rot90(scaled.to_ndarray(), self._turns)


def _opened(av: Any, path: Path) -> Any:
    try:
        # titles in another encoding than UTF-8; PyAV 19 replaces what it cannot read and has no such option
        options = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
        return av.open(str(path.absolute()), **options)
    except av.FFmpegError as error:
        raise VideoError(f"{path} is not a video that can be read ({_reason(error)})", "not video") from None


def _packets(av: Any, container: Any, stream: Any) -> Iterator[Any]:
    """The packets of a stream, and at last an empty one, which makes a decoder give what it holds.

    A file that is cut off ends there.
    """
    failure = av.FFmpegError  # as the process ends, the module is emptied before this generator is closed
    while True:
        try:
            yield from container.demux(stream)
            return
        except IndexError:  # PyAV knows no stream that comes up later in a file; behind its packet it goes on
            continue
        except failure:
            yield av.Packet()
            return


def _video_stream(av: Any, container: Any, path: Path) -> Any:
    streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]  # covers
    if not streams:
        others = sorted({stream.type for stream in container.streams})
        has = f"only {', '.join(others)}" if others else "no stream at all"
        raise VideoError(f"{path} has no video stream ({has})", "no video")
    best = container.streams.best("video")
    stream = best if best in streams else streams[0]
    if stream.codec_context is None:
        raise VideoError(f"{path}: there is no decoder for its video")
    return stream


def _hidden(packet: Any) -> bool:
    """A VP8 frame that is decoded and never shown: a bit of its header (RFC 6386, section 9.1)."""
    return not bytes(memoryview(packet)[:1])[0] & 0x10


def _decodable(path: Path, table: FrameTable, threads: int, beat: Callable[[], None]) -> FrameTable:
    """The table of what comes out of the decoder, with the rotation that the first frame carries."""
    decoder = AvDecoder(path, table, size=(1, 1), threads=threads, beat=beat)
    try:
        first = next((found for found in decoder.raw() if found[0] >= 0), None)
        if first is None:
            raise VideoError(f"{path}: none of its {len(table.pts):,} frames can be decoded", "cut off")
        begin, frame = first
        rotation = -round(getattr(frame, "rotation", 0) / 90) * 90 % 360
        height, width = frame.height, frame.width
        last = _last_frame(decoder, table, begin)
    finally:
        decoder.close()
    number = len(table.pts)
    kept = (table.key_frames >= begin) & (table.key_frames <= last)
    return table._replace(
        pts=table.pts[begin : last + 1],
        end=table.end if last == number - 1 else int(table.pts[last + 1]),
        key_frames=table.key_frames[kept] - begin,
        height=height,
        width=width,
        rotation=rotation,
    )


def _last_frame(decoder: AvDecoder, table: FrameTable, begin: int) -> int:
    """The last frame that comes out: of the last key frame from which any does, found by halving."""
    if table.counted:
        decoder.go(0)
        return max(number for number, _ in decoder.raw())

    def last_from(key: int) -> int:
        decoder.go(int(table.key_frames[key]))
        return max((number for number, _ in decoder.raw() if number >= table.key_frames[key]), default=-1)

    good, bad = table.key_before(begin), len(table.key_frames)
    if bad and (found := last_from(bad - 1)) >= 0:
        return found
    if good < 0:
        good = 0
    bad -= 1
    while bad - good > 1:
        middle = (good + bad) // 2
        decoder.go(int(table.key_frames[middle]))
        upper = table.key_frames[middle + 1] if middle + 1 < len(table.key_frames) else len(table.pts)
        found = next((n for n, _ in decoder.raw() if n >= table.key_frames[middle]), -1)
        good, bad = (middle, bad) if 0 <= found < upper else (good, middle)
    decoder.go(int(table.key_frames[good]) if len(table.key_frames) else begin)
    return max((number for number, _ in decoder.raw()), default=begin)


def _stated_seconds(container: Any, stream: Any) -> float:
    """The length that the header gives the video; 0: it gives none."""
    if stream.duration is not None:
        return float(stream.duration * (stream.time_base or 0))
    alone = len(container.streams) == 1  # else the file may be as long as its sound
    return (container.duration or 0) / 1e6 if alone else 0.0


def _said(number: int, seconds: float) -> str:
    said = [f"{number:,} frames"] * (number > 0) + [f"{seconds:.6g} seconds"] * (seconds > 0)
    return f"its header says {' and '.join(said)}" if said else "its header says no length"


def _reason(error: Exception) -> str:
    return one_line(getattr(error, "strerror", None) or error).rstrip(".")
