"""A video that is put together from spans of others without encoding anything, read like a file."""

from __future__ import annotations

import csv
import hashlib
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from ..atomic import atomic_path
from ..errors import UserError
from .reader import Frames, VideoInfo, VideoReader

_FLIPPED = "flipped"
_WRITTEN = 32  # frames that are written at a time
_CLOCK = 90_000  # ticks of a second in written files
SUFFIXES = (".mp4", ".mkv", ".mov")


class Segment(NamedTuple):
    """Frames first .. first + frames - 1 of a video. flip: left and right are exchanged. speed: 2 is twice as fast."""

    reader: VideoReader
    first: int
    frames: int
    flip: bool = False
    speed: float = 1.0


class Event(NamedTuple):
    """What is to be found. start, end: seconds, those of its first frame and of the end of its last one. first, stop:
    its frames are first .. stop - 1."""

    start: float
    end: float
    label: str
    first: int
    stop: int


class VirtualVideo:
    """Segments one after the other, with the interface of a `VideoReader`; nothing of them is in memory.

    segments: of readers that give frames of one size. events: (number of the first segment, number behind the last,
    label) of each. Times go on from segment to segment: a frame is shown as long as in its source, divided by the
    speed. identities() are those of the sources, so that what is made of a frame is made once; of a flipped frame they
    say so (a speed changes no picture). Raises UserError for no segments, for frames that a source does not have and
    for sources of different sizes.
    """

    backend = "virtual"

    def __init__(
        self,
        segments: Sequence[Segment],
        events: Sequence[tuple[int, int, str]] = (),
        *,
        name: str = "virtual video",
    ) -> None:
        if not segments:
            raise UserError(f"{name} has no segments")
        self.segments, self.name, self.path = list(segments), name, Path(name)
        edges = {key: edges_of(reader) for key, reader in self._readers().items()}
        size = segments[0].reader.size
        lengths = np.empty(len(segments))
        for number, (reader, first, frames, _, speed) in enumerate(segments):
            own = edges[id(reader)]
            if first < 0 or frames < 1 or first + frames >= len(own):
                raise UserError(
                    f"{name}: frames {first} to {first + frames - 1} are not within the {len(own) - 1} of {reader.name}"
                )
            if not speed > 0:
                raise UserError(f"{name}: speed={speed!r} must be above 0; 1 is that of the source")
            if reader.size != size:
                raise UserError(
                    f"{name}: {reader.name} gives frames of {reader.size}, {segments[0].reader.name} of {size}; open "
                    "all with open_video(..., size=(H, W))"
                )
            lengths[number] = (own[first + frames] - own[first]) / speed
        self.size = size
        # the first frame and the time of each segment, with the end of the whole
        self._starts = np.concatenate(([0], np.cumsum([s.frames for s in segments], dtype=np.int64)))
        self._seconds = np.concatenate(([0.0], np.cumsum(lengths)))
        self.events = sorted(
            Event(
                float(self._seconds[begin]),
                float(self._seconds[stop]),
                label,
                int(self._starts[begin]),
                int(self._starts[stop]),
            )
            for begin, stop, label in events
        )
        self._times: np.ndarray | None = None
        self._key: str | None = None

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def duration(self) -> float:
        return float(self._seconds[-1])

    @property
    def info(self) -> VideoInfo:
        """As of a file: the rate is the mean one."""
        height, width = self.size
        return VideoInfo(len(self), self.duration, len(self) / self.duration, height, width, 0, "virtual")

    @property
    def times(self) -> np.ndarray:
        """float64 (N,), seconds at which each frame is shown."""
        if self._times is None:
            edges = {key: edges_of(reader) for key, reader in self._readers().items()}
            parts = []
            for (reader, first, frames, _, speed), start in zip(self.segments, self._seconds[:-1], strict=True):
                own = edges[id(reader)][first : first + frames]
                parts.append(start + (own - own[0]) / speed)
            self._times = np.concatenate(parts)
        return self._times

    @property
    def key(self) -> str:
        """Of the contents: sources, frames, order, speeds."""
        if self._key is None:
            digest = hashlib.sha256()
            for reader, first, frames, flip, speed in self.segments:
                digest.update(f"{reader.key} {first} {frames} {flip} {speed!r}\n".encode())
            self._key = digest.hexdigest()
        return self._key

    def identities(self, indices: Sequence[int] | np.ndarray) -> list[tuple[str, int]]:
        """Key of the source's content and frame of it; equal ones are the same picture."""
        found = []
        for number, frame in self.places(indices):
            segment = self.segments[number]
            ((key, own),) = segment.reader.identities([frame])
            found.append((f"{key} {_FLIPPED}" if segment.flip else key, own))
        return found

    def read(self, indices: Sequence[int] | np.ndarray) -> np.ndarray:
        """uint8 (n, H, W, 3); any order, repeats allowed; each frame of a source is decoded once."""
        places = self.places(indices)
        found = np.empty((len(places), *self.size, 3), np.uint8)
        rows: dict[int, list[int]] = {}
        for row, (number, _) in enumerate(places):
            rows.setdefault(id(self.segments[number].reader), []).append(row)
        for own in rows.values():
            frames, inverse = np.unique([places[row][1] for row in own], return_inverse=True)
            read = self.segments[places[own[0]][0]].reader.read(frames)
            for row, place in zip(own, inverse, strict=True):
                picture = read[place]
                found[row] = picture[:, ::-1] if self.segments[places[row][0]].flip else picture
        return found

    def index_at(self, times: Sequence[float] | np.ndarray | float) -> np.ndarray:
        """int64 (n,): the frame that is shown at each time, clamped to the video."""
        wanted = np.atleast_1d(np.asarray(times, np.float64))
        found = np.searchsorted(self.times, wanted, side="right") - 1
        return np.clip(found, 0, len(self) - 1).astype(np.int64)

    def read_at(self, times: Sequence[float] | np.ndarray | float) -> Frames:
        """The frames that are shown at some times."""
        indices = self.index_at(times)
        return Frames(self.times[indices], indices, self.read(indices))

    def truth(self) -> list[tuple[float, float, str]]:
        """start and end in seconds, and label, of each event."""
        return [(event.start, event.end, event.label) for event in self.events]

    def close(self) -> None:
        for reader in self._readers().values():
            reader.close()

    def _readers(self) -> dict[int, VideoReader]:
        return {id(segment.reader): segment.reader for segment in self.segments}

    def __enter__(self) -> VirtualVideo:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_times": None}

    def places(self, indices: Sequence[int] | np.ndarray) -> list[tuple[int, int]]:
        """Segment and frame of its source of each frame."""
        wanted = np.atleast_1d(np.asarray(indices))
        if wanted.size and not np.issubdtype(wanted.dtype, np.integer):
            raise UserError(f"{self.name}: frames are whole numbers, not {wanted.dtype}")
        wrong = wanted[(wanted < 0) | (wanted >= len(self))]
        if wrong.size:
            raise UserError(f"{self.name}: frame {wrong[0]} is not within 0 to {len(self) - 1}")
        segments = np.searchsorted(self._starts, wanted, side="right") - 1
        inside = wanted - self._starts[segments]
        return [
            (number, self.segments[number].first + place)
            for number, place in zip(segments.tolist(), inside.tolist(), strict=True)
        ]

    # files ------------------------------------------------------------------------------------------------------------

    def write(
        self,
        path: str | Path,
        table: str | Path | None = None,
        *,
        fps: float | None = None,
        crf: int = 18,
    ) -> Path:
        """Encode the video (H.264), a few frames at a time, and write a CSV table path, start, end, label, which
        `table_clips` reads; returns the table.

        table: where, None: beside the file, named as it is. fps: frames at equal times k / fps, whose events begin and
        end with the first frame that is not before; None: every frame at its own time, to 1/90,000 second. crf: 0
        (without loss) to 51, smaller is better. Raises UserError for another suffix and for fps that is not above 0.
        """
        path = Path(path)
        if path.suffix.lower() not in SUFFIXES:
            raise UserError(f"cannot write a video to {path}: give a name that ends in {', '.join(SUFFIXES)}")
        if fps is not None and not 0 < fps <= 1000:
            raise UserError(f"fps={fps!r} must be above 0 and at most 1000, or null for the frames' own times")
        table = path.with_suffix(".csv") if table is None else Path(table)
        if fps is None:
            indices, ticks = np.arange(len(self)), np.rint(self.times * _CLOCK).astype(np.int64)
            end, spans = round(self.duration * _CLOCK), self.truth()
        else:
            step = Fraction(fps).limit_denominator(1001)
            number = max(1, int(np.ceil(self.duration * float(step) - 1e-6)))
            shown = np.arange(number) / float(step)
            # a hair later, so that a frame of just that time is the one
            indices, ticks = self.index_at(shown + 1e-9), np.rint(shown * _CLOCK).astype(np.int64)
            end = round(number / float(step) * _CLOCK)
            times = np.append(shown, number / float(step))
            spans = [
                (float(times[a]), float(times[b]), event.label)
                for event in self.events
                for a, b in [np.searchsorted(indices, (event.first, event.stop))]
                if a < b
            ]
        with atomic_path(path) as temporary:
            _encode(temporary, path.suffix.lower(), self, indices, np.append(ticks, end), crf)
        name = path.name if table.parent.resolve() == path.parent.resolve() else str(path.resolve())
        with atomic_path(table) as temporary, open(temporary, "w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(("path", "start", "end", "label"))
            writer.writerows((name, repr(start), repr(stop), label) for start, stop, label in spans)
        return table


def edges_of(reader: VideoReader) -> np.ndarray:
    """The times of a video's frames and the end of the last one, (N + 1,)."""
    return np.append(reader.times, reader.duration)


def _encode(path: Path, suffix: str, video: VirtualVideo, indices: np.ndarray, ticks: np.ndarray, crf: int) -> None:
    """Frames `indices`, each shown from its tick to the next, as H.264 without reordering."""
    try:
        import av
    except ImportError:
        raise UserError("writing a video needs the package av: pip install 'seqzoo[video]'") from None

    height, width = video.size
    container_format = {".mp4": "mp4", ".mov": "mov", ".mkv": "matroska"}[suffix]
    options = {"movflags": "faststart"} if suffix != ".mkv" else {}
    with av.open(str(path), "w", format=container_format, options=options) as container:
        codec = "libx264" if "libx264" in av.codecs_available else "mpeg4"
        rate = Fraction(video.info.fps).limit_denominator(1001)
        stream: Any = container.add_stream(codec, rate=rate, options={"crf": str(crf), "preset": "veryfast"})
        stream.width, stream.height = width, height
        # colours at half the size need an even one
        stream.pix_fmt = "yuv444p" if codec == "libx264" and (height % 2 or width % 2) else "yuv420p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, _CLOCK)
        stream.codec_context.max_b_frames = 0
        stream.codec_context.gop_size = 48
        durations = dict(zip(ticks[:-1].tolist(), np.diff(ticks).tolist(), strict=True))
        for number, picture in enumerate(_in_turn(video, indices)):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = int(ticks[number]), Fraction(1, _CLOCK)
            for packet in stream.encode(frame):
                _mux(container, packet, durations)
        for packet in stream.encode():
            _mux(container, packet, durations)


def _mux(container: Any, packet: Any, durations: dict[int, int]) -> None:
    ticks = round(packet.pts * packet.time_base * _CLOCK)
    if ticks in durations:
        packet.duration = round(durations[ticks] / _CLOCK / packet.time_base)
    container.mux(packet)


def _in_turn(video: VirtualVideo, indices: np.ndarray) -> Iterator[np.ndarray]:
    for begin in range(0, len(indices), _WRITTEN):
        yield from video.read(indices[begin : begin + _WRITTEN])
