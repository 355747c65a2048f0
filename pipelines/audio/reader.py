"""Audio files of any length: opened when first asked, resampled as they stream, read at any place."""

from __future__ import annotations

import importlib
import io
import math
import mmap
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import numpy as np

from ..errors import UserError, check_whole, nearest, one_line
from ..failures.workers import reading
from .faults import LEAST_RATE, MOST_RATE, READ, AudioError, check_head, check_log, missing_error, rate_error
from .mp3 import mp3_length

if TYPE_CHECKING:
    import soundfile

_CHUNK = 1 << 16  # frames that are decoded at a time
# Frames of the lower rate before a place, from which the resampler starts: its filter is shorter, so that what comes
# out at the place is what it would be from the start of the file.
_LEAD = 1024
# libsndfile 1.2 seeks to a wrong place now and then in these: they are decoded from their start, at 1,500 times real
# time or faster.
_NO_SEEK = ("MP3", "OGG")


class Stored(Protocol):
    """Audio that is not a file of its own: a cell of a dataset. name: for messages."""

    @property
    def name(self) -> str: ...
    def content(self) -> bytes: ...


class AudioInfo(NamedTuple):
    """The file itself. rate: Hz. frames, channels: counts. duration: seconds. format: such as "WAV PCM_16"."""

    rate: int
    frames: int
    channels: int
    duration: float
    format: str


class AudioReader:
    """Samples of a WAV, FLAC, OGG, MP3 or AIFF file as float32, full scale from -1 to 1.

    path: a file, or a `Stored`. sample_rate: Hz of what is read, None: the file's own (soxr, high quality).
    channels: "mono" is the mean of all, with samples (T,); "all" and a number, which the file must have then, give
    samples (channels, T).

    The file is opened at the first use, in each process anew, and a copy that is sent to a worker is closed. `blocks`
    and `read` give the same samples, at another rate to 1e-5 of full scale, whatever their sizes and places: blocks
    come bit by bit from one run of the resampler, a read starts another one up to a second before its place. Of OGG and
    MP3 a read decodes all that is before it.
    Raises AudioError, naming file and cause, when a file turns out to be unusable, UserError for a wrong argument.
    """

    def __init__(self, path: str | Path | Stored, *, sample_rate: int | None = None, channels: str | int = "mono"):
        if sample_rate is not None:
            check_whole("sample_rate", sample_rate, LEAST_RATE)
            if sample_rate > MOST_RATE:
                raise UserError(f"sample_rate={sample_rate} must be at most {MOST_RATE} Hz")
        if isinstance(channels, str):
            if channels not in ("mono", "all"):
                raise UserError(f"channels={channels!r} is not a choice.{nearest(channels, ('mono', 'all'))}")
        else:
            check_whole("channels", channels, 1)
        self.path = Path(path).expanduser() if isinstance(path, (str, Path)) else path
        self.sample_rate, self.channels = sample_rate, channels
        self._info: AudioInfo | None = None
        self._file: soundfile.SoundFile | None = None
        self._process, self._at = 0, 0  # that opened the file; the frame where it stands

    @property
    def name(self) -> str:
        return str(self.path) if isinstance(self.path, Path) else self.path.name

    @property
    def info(self) -> AudioInfo:
        """The file as it is, whatever is read from it."""
        if self._info is None:
            self._opened()
        return cast(AudioInfo, self._info)

    @property
    def rate(self) -> int:
        """Hz of the samples that are read."""
        return self.sample_rate or self.info.rate

    @property
    def frames(self) -> int:
        """Samples of a channel in the whole file, at `rate`: its length in frames times the ratio, rounded."""
        source = self.info.rate
        return (2 * self.info.frames * self.rate + source) // (2 * source)

    def read(self, start: float = 0, stop: float | None = None, *, unit: str = "seconds") -> np.ndarray:
        """The samples of a span, (T,) or (channels, T). unit: "seconds", or "frames" of `rate`. stop: None for the end.

        Raises AudioError for a span that is not inside the file.
        """
        first, last = self._span(start, stop, unit)
        pieces = self._pieces(first, last)
        shape = (last - first, 1 if self.channels == "mono" else self.info.channels)
        samples, filled = np.empty(shape, np.float32), 0
        for piece in pieces:
            samples[filled : filled + len(piece)] = piece
            filled += len(piece)
        if filled < last - first:
            raise AudioError(f"{self.name}: {filled:,} samples of {last - first:,} came out of the resampler")
        return self._laid_out(samples)

    def blocks(
        self, seconds: float = 10.0, start: float = 0, stop: float | None = None, *, unit: str = "seconds"
    ) -> Iterator[np.ndarray]:
        """A span in blocks of `seconds`, the last one shorter; one block at a time is in memory.

        start, stop, unit: as of `read`.
        """
        size = round(seconds * self.rate) if math.isfinite(seconds) else 0
        if size < 1:
            raise UserError(f"seconds={seconds!r} must be at least one sample of {self.rate} Hz")
        first, last = self._span(start, stop, unit)
        return self._blocks(size, first, last)

    def close(self) -> None:
        """Close the file; it is opened again when it is asked next."""
        if self._file is not None and self._process == os.getpid():
            self._file.close()
        self._file = None

    def __enter__(self) -> AudioReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def __repr__(self) -> str:
        return f"AudioReader({self.name!r}, sample_rate={self.sample_rate}, channels={self.channels!r})"

    # spans and blocks -------------------------------------------------------------------------------------------------

    def _span(self, start: float, stop: float | None, unit: str) -> tuple[int, int]:
        if unit not in ("seconds", "frames"):
            raise UserError(f"unit={unit!r} is not a choice.{nearest(unit, ('seconds', 'frames'))}")
        given = [value for value in (start, stop) if value is not None]
        if not all(math.isfinite(value) for value in given):
            raise AudioError(f"{self.name}: the span from {start} to {stop} {unit} is not a span", "span")
        scale = self.rate if unit == "seconds" else 1
        first = round(start * scale)
        last = self.frames if stop is None else round(stop * scale)
        if not 0 <= first < last <= self.frames:
            length = f"{self.frames / self.rate:.6g} seconds" if unit == "seconds" else f"{self.frames} frames"
            why = "ends beyond" if first < last and first >= 0 else "is not within"
            upto = "the end" if stop is None else f"{stop:g}"
            raise AudioError(f"{self.name}: the span from {start:g} to {upto} {why} its {length}", "span")
        return first, last

    def _blocks(self, size: int, first: int, last: int) -> Iterator[np.ndarray]:
        reading(self.name)
        block, filled, left = None, 0, last - first
        for piece in self._pieces(first, last):
            while len(piece):
                if block is None:
                    block = np.empty((min(size, left), piece.shape[1]), np.float32)
                    left -= len(block)
                part = piece[: len(block) - filled]
                block[filled : filled + len(part)] = part
                filled, piece = filled + len(part), piece[len(part) :]
                if filled == len(block):
                    yield self._laid_out(block)
                    block, filled = None, 0
        if block is not None or left:
            raise AudioError(f"{self.name}: fewer samples than {last - first:,} came out of the resampler")

    def _laid_out(self, samples: np.ndarray) -> np.ndarray:
        return samples[:, 0] if self.channels == "mono" else np.ascontiguousarray(samples.T)

    def _pieces(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Frames first to last at `rate`, (n, channels), in pieces of any size."""
        source, target = self.info.rate, self.rate
        if source == target:
            yield from self._decoded(first, last)
            return
        soxr = _package("soxr")
        # Both rates have a frame at the start of each period, so that a start there keeps the phase.
        common = math.gcd(source, target)
        period, made = source // common, target // common
        lead = _LEAD * max(source, target) // target
        number = max(0, (first * source) // target - lead) // period
        at, skip = number * period, first - number * made
        left, resampler = last - first, None
        for piece in self._decoded(at, self.info.frames):
            at += len(piece)
            if resampler is None:
                resampler = soxr.ResampleStream(source, target, piece.shape[1], dtype="float32", quality="HQ")
            out = resampler.resample_chunk(np.ascontiguousarray(piece), last=at == self.info.frames)
            out = out.reshape(-1, piece.shape[1])
            dropped = min(skip, len(out))
            out, skip = out[dropped : dropped + left], skip - dropped
            left -= len(out)
            if len(out):
                yield out
            if not left:
                return

    # decoding ---------------------------------------------------------------------------------------------------------

    def _decoded(self, first: int, last: int) -> Iterator[np.ndarray]:
        """Frames first to last of the file, (n, channels) as asked for, in chunks."""
        while first < last:
            data = self._decode(first, min(_CHUNK, last - first))
            first += len(data)
            if self.channels == "mono" and data.shape[1] > 1:
                data = data.mean(axis=1, keepdims=True, dtype=np.float32)
            yield data

    def _decode(self, first: int, count: int) -> np.ndarray:
        """Frames of the file as they are, checked."""
        file, info = self._opened(), self.info
        if self._at != first:
            self._go(first)
            file = self._opened()
        data = self._advance(file, count)
        finite = np.isfinite(data)
        if not finite.all():
            place = np.argwhere(~finite)[0]
            what = "NaN" if np.isnan(data[tuple(place)]) else "infinity"
            raise AudioError(
                f"{self.name} holds {what}, first at {(first + int(place[0])) / info.rate:.6g} seconds", "not finite"
            )
        return data

    def _go(self, first: int) -> None:
        file, info = self._opened(), self.info
        if not info.format.startswith(_NO_SEEK):
            file.seek(first)
            self._at = first
            return
        if self._at > first:
            self.close()
            file = self._opened()
        while self._at < first:
            self._advance(file, min(_CHUNK, first - self._at))

    def _advance(self, file: soundfile.SoundFile, count: int) -> np.ndarray:
        import soundfile

        info, at = self.info, self._at
        try:
            data = file.read(count, dtype="float32", always_2d=True)
        except soundfile.SoundFileError:  # its text is empty for a FLAC file that ends too early
            self.close()
            raise AudioError(
                f"{self.name} is cut off or damaged: it cannot be decoded after {at / info.rate:.6g} of "
                f"{info.duration:.6g} seconds",
                "cut off",
            ) from None
        self._at = at + len(data)
        if len(data) < count:
            raise AudioError(
                f"{self.name} is cut off: its header says {info.duration:.6g} seconds, its samples end after "
                f"{self._at / info.rate:.6g}",
                "cut off",
            )
        return data

    def _opened(self) -> soundfile.SoundFile:
        # After a fork the handle would share its place with the parent's.
        if self._file is None or self._process != os.getpid():
            file = self._open()
            try:
                self._info = self._checked(file)
            except AudioError:
                file.close()
                raise
            self._file, self._process, self._at = file, os.getpid(), 0
        return self._file

    def _open(self) -> soundfile.SoundFile:
        soundfile = _package("soundfile")
        source: str | io.BytesIO
        try:
            if isinstance(self.path, Path):
                if not self.path.is_file():
                    raise missing_error(self.path)
                with self.path.open("rb") as file:
                    check_head(file, self.name)
                source = str(self.path)
            else:
                source = io.BytesIO(self.path.content())
                check_head(source, self.name)
                source.seek(0)
            return soundfile.SoundFile(source)
        except OSError as error:
            raise AudioError(f"cannot read {self.name}: {error.strerror or error}") from None
        except (soundfile.SoundFileError, TypeError) as error:  # a .raw file: no header, so soundfile asks for a rate
            why = getattr(error, "error_string", "") or "no header that says what it is"
            raise AudioError(
                f"{self.name} is not audio that can be read ({one_line(why).rstrip('.')}); {READ}",
                "not audio",
            ) from None

    def _checked(self, file: soundfile.SoundFile) -> AudioInfo:
        rate, frames, channels = file.samplerate, file.frames, file.channels
        if not LEAST_RATE <= rate <= MOST_RATE:
            raise rate_error(self.name, rate)
        if file.format in ("AIFF", "AU", "W64"):
            check_log(file.extra_info, self.name)
        if file.format == "MP3":
            frames = self._mp3_frames(frames, rate)
        if frames < 1:
            raise AudioError(f"{self.name} is empty: a header and no samples; copy or record it again", "empty")
        if isinstance(self.channels, int) and channels != self.channels:
            raise AudioError(
                f"{self.name} has {channels} channel(s), channels={self.channels} asked for; 'mono' mixes them, 'all' "
                "takes as many as there are",
                "channels",
            )
        return AudioInfo(rate, frames, channels, frames / rate, f"{file.format} {file.subtype}")

    def _mp3_frames(self, frames: int, rate: int) -> int:
        """The frames of an MP3 file: as its header says, or else as many as there are."""
        if isinstance(self.path, Path):
            with self.path.open("rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
                length = mp3_length(data)
        else:
            length = mp3_length(self.path.content())
        if length is None:
            return frames
        if frames < length.samples - 2 * length.per_frame:
            raise AudioError(
                f"{self.name} is an MP3 file of variable bit rate without its length in the header: of "
                f"{length.samples / rate:.6g} seconds {frames / rate:.6g} would be read; `ffmpeg -i FILE FILE.flac` "
                "converts it",
                "unreadable",
            )
        return min(frames, length.samples)


def _package(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        raise UserError(f"reading audio needs the package {name}: pip install 'seqzoo[audio]'") from None
