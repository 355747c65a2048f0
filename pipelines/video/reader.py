"""Video files of any length: opened when first asked, scaled while they are decoded, read at any frames or times."""

from __future__ import annotations

import contextlib
import hashlib
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
from numpy.typing import ArrayLike

from ..errors import UserError, check_whole, nearest, one_line
from ..failures.workers import reading
from .backends import BACKENDS, Decoder, open_decoder, open_table
from .faults import VideoError, check_file, missing_error, say_once
from .frame_table import FrameTable
from .open_readers import remember, use
from .timeouts import Watched

T = TypeVar("T")

_MOST_PIXELS = 16384  # of a side
_SAMPLE = 1 << 16  # bytes of a file's start, middle and end, by which its content is known


class VideoInfo(NamedTuple):
    """The file itself. frames: those that can be decoded. duration: seconds. fps: mean. height, width: of a frame as it
    is shown, after rotation, in stored pixels: a pixel that is not square is not made so. rotation: degrees clockwise
    by which stored frames are turned, which the frames that are read have behind them. codec: its name in FFmpeg."""

    frames: int
    duration: float
    fps: float
    height: int
    width: int
    rotation: int
    codec: str


class Frames(NamedTuple):
    """times: float64 (n,) seconds, at which each frame is shown. indices: int64 (n,). frames: uint8 (n, H, W, 3)."""

    times: np.ndarray
    indices: np.ndarray
    frames: np.ndarray


def open_video(
    path: str | Path,
    *,
    backend: str = "auto",
    size: tuple[int, int] | None = None,
    short_side: int | None = None,
    timeout: float = 60.0,
) -> VideoReader:
    """A reader of the file.

    backend: "decord", "av" or "torchcodec", or "auto": the first of these that decodes the file; says so when it is
    not the first. size: (height, width) of the frames it gives, whatever their shape in the file. short_side: pixels
    of the shorter side, the aspect of the stored pixels is kept. timeout: seconds without progress after which a
    decoder is given up.
    Nothing is decoded yet. Raises VideoError for a path that is no file, UserError for a wrong argument.
    """
    return VideoReader(path, backend=backend, size=size, short_side=short_side, timeout=timeout)


class VideoReader:
    """Frames of a video file as uint8 RGB (n, H, W, 3), numbered and timed the same by every backend.

    Which frames there are, and when, is read from the packets of the file with PyAV at the first use: frames are in
    the order in which they are shown, their times from the container (variable rate, edit lists), from 0 at the first
    that can be decoded. A frame in the middle that cannot be decoded is the one before it, said once.

    The file is opened in each process anew; a copy that is sent to a worker is closed and holds path and settings.
    Colours: by the matrix and range that the file states, else BT.601 and limited range. Scaling is bilinear, with a
    kernel as wide as the reduction. Decoding uses as many threads as torch (`torch.set_num_threads`).
    Raises VideoError, naming file and cause, when the file turns out to be unusable, UserError for a wrong argument.
    """

    _table: FrameTable | None
    _times: np.ndarray | None
    _decoder: Decoder | None
    _tried: dict[str, Exception]  # backends that failed, and why
    _watch: Watched

    def __init__(
        self,
        path: str | Path,
        *,
        backend: str = "auto",
        size: tuple[int, int] | None = None,
        short_side: int | None = None,
        timeout: float = 60.0,
    ) -> None:
        if backend != "auto" and backend not in BACKENDS:
            raise UserError(f"backend={backend!r} is not a choice.{nearest(backend, ('auto', *BACKENDS))}")
        if size is not None and short_side is not None:
            raise UserError("size and short_side are two ways to say one thing: give one of them")
        if size is not None:
            if not isinstance(size, (tuple, list)) or len(size) != 2:
                raise UserError(f"size={size!r} must be (height, width)")
            for name, side in zip(("height", "width"), size, strict=True):
                _check_side(f"the {name} of size", side)
        if short_side is not None:
            _check_side("short_side", short_side)
        if not timeout > 0:
            raise UserError(f"timeout={timeout!r} must be more than 0 seconds")
        self.path = Path(path).expanduser()
        if not self.path.is_file():
            raise missing_error(self.path)
        self.asked_backend = backend
        self.asked_size = None if size is None else (int(size[0]), int(size[1]))
        self.short_side, self.timeout = short_side, float(timeout)
        self._key: str | None = None
        self._forget()
        remember(self)

    # what it is -------------------------------------------------------------------------------------------------------

    @property
    def name(self) -> str:
        return str(self.path)

    @property
    def backend(self) -> str:
        """The decoder that reads the file: with "auto", the one that was found to."""
        if self._decoder is None:
            self._run(self._open_decoder)
        return self._backend

    @property
    def info(self) -> VideoInfo:
        """The file as it is, whatever is read from it."""
        table = self._opened_table()
        height, width = table.shown
        number, duration = len(table.pts), self.duration
        return VideoInfo(number, duration, number / duration, height, width, table.rotation, table.codec)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the frames it gives."""
        if self.asked_size is not None:
            return self.asked_size
        height, width = self.info[3:5]
        if self.short_side is None:
            return height, width
        ratio = self.short_side / min(height, width)
        return max(1, round(height * ratio)), max(1, round(width * ratio))

    @property
    def times(self) -> np.ndarray:
        """float64 (N,): seconds at which each frame is shown."""
        table = self._opened_table()
        if self._times is None:
            self._times = (table.pts - table.pts[0]) * float(table.base)
            self._times.flags.writeable = False
        return self._times

    @property
    def duration(self) -> float:
        """Seconds: the end of the last frame."""
        table = self._opened_table()
        return max(table.end - int(table.pts[0]), 1) * float(table.base)

    def __len__(self) -> int:
        return len(self._opened_table().pts)

    @property
    def key(self) -> str:
        """Hash of the content: of the file's size and of 64 KiB of its start, middle and end each."""
        if self._key is None:
            digest = hashlib.sha256()
            try:
                with self.path.open("rb") as file:
                    length = file.seek(0, os.SEEK_END)
                    digest.update(length.to_bytes(8, "little"))
                    for place in (0, (length - _SAMPLE) // 2, length - _SAMPLE):
                        file.seek(max(0, place))
                        digest.update(file.read(_SAMPLE))
            except OSError:
                raise missing_error(self.path) from None
            self._key = digest.hexdigest()[:32]
        return self._key

    # reading ----------------------------------------------------------------------------------------------------------

    def read(self, indices: ArrayLike) -> np.ndarray:
        """Frames uint8 (n, H, W, 3) of the numbers, in any order, repeats allowed.

        They are decoded in rising order, forward from the last key frame where that is nearer than the frame before.
        Raises UserError for a number outside 0 to N - 1.
        """
        reading(self.name)
        wanted = self._checked(indices)
        height, width = self.size
        try:
            frames = np.empty((len(wanted), height, width, 3), np.uint8)
        except MemoryError:
            gigabytes = 3 * len(wanted) * height * width / 1e9
            raise UserError(
                f"{self.name}: {len(wanted):,} frames of {height}x{width} are {gigabytes:,.1f} GB: ask for fewer at a "
                "time, or a smaller size"
            ) from None
        if len(wanted):
            use(self)
            numbers, places = np.unique(wanted, return_inverse=True)
            self._run(self._decode_into, frames, numbers, places.reshape(-1))
        return frames

    def index_at(self, times: ArrayLike) -> np.ndarray:
        """int64 (n,): the frame shown at each time, seconds; before the first and after the last: these."""
        wanted = np.asarray(times, np.float64).reshape(-1)
        if np.isnan(wanted).any():
            raise UserError(f"{self.name}: a time that is not a number")
        # what is written as the time of a frame, rounded, is that frame
        found = np.searchsorted(self.times, wanted + 1e-9, side="right") - 1
        return found.clip(0, len(self) - 1).astype(np.int64)

    def read_at(self, times: ArrayLike) -> Frames:
        """The frames shown at the times."""
        indices = self.index_at(times)
        return Frames(self.times[indices], indices, self.read(indices))

    def identities(self, indices: ArrayLike) -> list[tuple[str, int]]:
        """(key, frame) for each number: equal ones are the same picture."""
        return [(self.key, int(number)) for number in self._checked(indices)]

    # opening and closing ----------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close the file; it is opened again when it is asked next."""
        decoder, self._decoder = self._decoder, None
        if decoder is not None:
            with contextlib.suppress(Exception):  # what it read stays right
                self._watch.call(decoder.close)
        if self._watch.hangs:
            self._watch = Watched(self.name, self.timeout)
        self._watch.close()

    def __enter__(self) -> VideoReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        names = ("path", "asked_backend", "asked_size", "short_side", "timeout", "_key")
        return {name: self.__dict__[name] for name in names}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()
        remember(self)

    def __repr__(self) -> str:
        size = self.asked_size if self.short_side is None else f"short_side {self.short_side}"
        return f"VideoReader({self.name!r}, backend={self.asked_backend!r}, size={size})"

    def _forget(self) -> None:
        self._table = self._times = self._decoder = None
        self._backend, self._tried = "", {}
        self._watch = Watched(self.name, self.timeout)

    def leave_to_parent(self) -> object:
        """In a forked process: go on as if closed. What must be kept until the process ends."""
        left = (self._decoder, self._watch)
        self._decoder, self._watch = None, Watched(self.name, self.timeout)
        return left

    @property
    def is_idle(self) -> bool:
        """Whether a decoder is open and does nothing."""
        return self._decoder is not None and not self._watch.busy

    def _run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Call the function in the watched thread; with "auto", again when the decoder that it used hangs."""
        self._threads = _threads()  # of this thread, which need not be those of the watched one
        while True:
            try:
                return self._watch.call(function, *arguments)
            except VideoError as error:
                if not self._watch.hangs:
                    raise
                self._leave_hanging()
                if not self._next_after(error):
                    raise

    def _leave_hanging(self) -> None:
        """Go on with a new thread, without the decoder in the old one."""
        decoder, self._decoder = self._decoder, None
        self._watch = Watched(self.name, self.timeout)
        if (kill := getattr(decoder, "kill", None)) is not None:
            kill()

    def _opened_table(self) -> FrameTable:
        return self._run(self._read_table) if self._table is None else self._table

    def _read_table(self) -> FrameTable:
        if self._table is None:
            check_file(self.path)
            self._table = open_table(self.path, threads=self._threads, beat=self._watch.beat)
        return self._table

    def _open_decoder(self) -> Decoder:
        """The decoder that reads the file, or the next one of "auto" after those that failed."""
        watch, table = self._watch, self._read_table()
        while True:
            self._backend = next((name for name in self._choices() if name not in self._tried), self._choices()[-1])
            try:
                decoder = open_decoder(
                    self._backend,
                    self.path,
                    table,
                    size=self.size,
                    threads=self._threads,
                    beat=self._watch.beat,
                )
            except Exception as error:
                if self._watch is not watch:  # this thread was left behind, the reader is another one's now
                    raise
                if not self._next_after(error):
                    raise self._error(error) from None
                continue
            if self._watch is not watch:
                return decoder
            self._say_backend()
            self._decoder = decoder
            return decoder

    def _decode_into(self, frames: np.ndarray, numbers: np.ndarray, places: np.ndarray) -> None:
        """Fill frames: the picture of numbers[k], which rise, where places is k."""
        order = np.argsort(places, kind="stable")
        bounds = np.searchsorted(places[order], np.arange(len(numbers) + 1))
        done, watch = 0, self._watch
        while done < len(numbers):
            decoder = self._decoder or self._open_decoder()
            try:
                for frame in decoder.frames(numbers[done:].tolist()):
                    frames[order[bounds[done] : bounds[done + 1]]] = frame
                    done += 1
                    watch.beat()
                    if self._watch is not watch:
                        return
            except Exception as error:
                if self._watch is not watch:
                    raise
                self._decoder = None
                with contextlib.suppress(Exception):
                    decoder.close()
                if not self._next_after(error):
                    raise self._error(error) from None

    def _choices(self) -> tuple[str, ...]:
        return BACKENDS if self.asked_backend == "auto" else (self.asked_backend,)

    def _next_after(self, error: Exception) -> bool:
        """Whether there is another decoder to try after the one that failed."""
        if not self._backend:  # it was not a decoder's
            return False
        self._tried.setdefault(self._backend, error)
        return any(name not in self._tried for name in self._choices())

    def _error(self, error: Exception) -> UserError:
        """The error of the only decoder, or those of all."""
        if len(self._tried) > 1:
            all_of_them = "; ".join(f"{name}: {one_line(why)}" for name, why in self._tried.items())
            self._tried = {}
            return VideoError(f"{self.name}: no decoder reads it. {all_of_them}")
        self._tried = {}
        if isinstance(error, UserError):
            return error
        if isinstance(error, MemoryError):
            return VideoError(f"{self.name}: not enough memory to decode it")
        return VideoError(f"{self.name}: {self._backend} cannot decode it: {one_line(error) or type(error).__name__}")

    def _say_backend(self) -> None:
        failed = [one_line(error) for error in self._tried.values() if not isinstance(error, UserError)]
        if failed:
            say_once(self.name, f"read with {self._backend}: {'; '.join(failed)}", kind="backend")

    def _checked(self, indices: ArrayLike) -> np.ndarray:
        wanted = np.asarray(indices)
        if wanted.size == 0:
            return np.empty(0, np.int64)
        if wanted.dtype.kind not in "iu" or wanted.ndim > 1:
            raise UserError(f"{self.name}: frames are asked for by whole numbers, not {wanted.dtype} {wanted.shape}")
        wanted = wanted.reshape(-1).astype(np.int64)
        outside = wanted[(wanted < 0) | (wanted >= len(self))]
        if len(outside):
            raise UserError(f"{self.name} has frames 0 to {len(self) - 1:,}, not {outside[0]}")
        return wanted


def _threads() -> int:
    """As many as torch uses, which need not be there."""
    if (torch := sys.modules.get("torch")) is not None:
        return int(torch.get_num_threads())
    given = os.environ.get("OMP_NUM_THREADS", "")
    return int(given) if given.isdigit() and int(given) else os.cpu_count() or 1


def _check_side(name: str, value: object) -> None:
    check_whole(name, value, 1)
    if isinstance(value, int) and value > _MOST_PIXELS:
        raise UserError(f"{name} is {value:,} pixels, more than {_MOST_PIXELS:,}")
