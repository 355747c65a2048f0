"""Long videos with exact truth: labelled spans planted into other footage, as a plan that gives any frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..errors import UserError, nearest
from .clips import ROUNDING, VideoClip, at_row
from .faults import VideoError
from .reader import VideoReader, open_video
from .skipping import BadFiles
from .virtual import Event, Segment, VirtualVideo, edges_of

__all__ = ["Composer", "Event", "Segment", "VirtualVideo", "compose_video"]

# Frames may be this much late in seconds and still be those of a time: containers round.
_HAIR = 1e-6


class _Source(NamedTuple):
    """Frames first .. stop - 1 of a clip's file. edges: the times of all frames of the file and its end."""

    reader: VideoReader
    edges: np.ndarray
    first: int
    stop: int


class Composer:
    """Plans videos: events planted at random places of footage in which they are not seen.

    events: clips to plant. footage: clips of what is seen between them, in pieces of piece_seconds (from .. to); it may
    be the same clips, as none is used beside an event of its label or of one that it `shows`. size: (H, W) of the
    frames. events_per_video: their number, or two between which it is drawn; events_per_minute: instead of it, Poisson
    then. event_seconds: from .. to, None: each event is its whole clip; a clip that is longer is cut at a random place,
    one that is shorter is repeated. min_gap: seconds between two events, and before the first; up to a frame less where
    the time is just enough. flip: half of the segments have left and right exchanged. speed: a number, or two between
    which that of each segment is drawn.
    backend: see `open_video`. bad: what cannot be opened is left out and counted; None: it is an error.
    Raises UserError for values outside these and for no clips; VideoError for a span that is not in its file.
    """

    def __init__(
        self,
        events: Sequence[VideoClip],
        footage: Sequence[VideoClip],
        *,
        size: tuple[int, int] = (224, 224),
        events_per_video: int | Sequence[int] = (1, 3),
        events_per_minute: float | None = None,
        event_seconds: float | Sequence[float] | None = None,
        piece_seconds: float | Sequence[float] = (3.0, 12.0),
        min_gap: float = 5.0,
        flip: bool = False,
        speed: float | Sequence[float] = 1.0,
        backend: str = "auto",
        bad: BadFiles | None = None,
    ) -> None:
        self.number = _whole_range("events_per_video", events_per_video)
        self.rate = None if events_per_minute is None else _range("events_per_minute", events_per_minute)[0]
        self.event_seconds = None if event_seconds is None else _range("event_seconds", event_seconds, above=True)
        self.piece_seconds = _range("piece_seconds", piece_seconds, above=True)
        self.speed, self.flip = _range("speed", speed, above=True), flip
        self.min_gap = _range("min_gap", min_gap)[0]
        self.size, self.backend, self.bad = size, backend, bad
        self._readers: dict[str, tuple[VideoReader, np.ndarray]] = {}
        self.events, self._events = self._usable(events)
        self.footage, self._footage = self._usable(footage)
        for what, clips in (("to plant", self.events), ("to plant them into", self.footage)):
            if not clips:
                raise UserError(f"there are no clips {what}")
        self.labels = sorted({clip.label for clip in self.events})

    def plan(
        self,
        seconds: float,
        seed: int | Sequence[int] = 0,
        *,
        labels: Sequence[str] | None = None,
        without: Sequence[str] = (),
        number: int | None = None,
        name: str = "composed video",
    ) -> VirtualVideo:
        """A video of so many seconds (to a frame); the same for the same seed.

        labels: of the events, each as likely, None: all. without: labels that are not seen anywhere in it. number: of
        events, None: as the composer draws it, none where `without` leaves no label. Raises UserError for a label that
        no event has and where the events do not fit into the time.
        """
        if not 0 < seconds < math.inf:
            raise UserError(f"seconds={seconds!r} must be above 0")
        for label in labels or ():
            if label not in self.labels:
                raise UserError(f"no event has the label {label!r}.{nearest(label, self.labels)}")
        rng = np.random.default_rng(seed)
        asked = bool(labels) or number is not None
        if number is None and self.rate is not None:
            number = int(rng.poisson(self.rate * seconds / 60))
        elif number is None:
            number = int(rng.integers(self.number[0], self.number[1] + 1))
        wanted = [label for label in labels or self.labels if label not in without]
        if not (wanted or asked):  # of one label alone, videos without it show no event
            number = 0
        chosen = self._choose(number, wanted, set(without), rng)
        planted = [self._segments(self._events[clip], self.event_seconds, rng) for clip in chosen]
        lengths = [sum(map(self._seconds, own)) for own in planted]
        free = seconds - sum(lengths) - len(planted) * self.min_gap
        if free < 0:
            raise UserError(
                f"{len(planted)} events of {sum(lengths):.4g} seconds with min_gap={self.min_gap:g} before each do not "
                f"fit into {seconds:g} seconds; fewer or shorter ones, or a longer video"
            )
        pool = self._pool({self.events[clip].label for clip in chosen} | set(without))
        segments: list[Segment] = []
        found, now, planned = [], 0.0, 0.0
        places = np.sort(rng.uniform(0, free, len(planted)))
        for clip, own, length, place in zip(chosen, planted, lengths, places, strict=True):
            planned += self.min_gap
            # footage ends with a whole frame, so that an event may begin a little later than planned, but for the last
            # time at which what is to come still fits
            begin = max(place + planned, min(now + self.min_gap, free + planned))
            now = self._fill(segments, now, begin, pool, rng)
            found.append((len(segments), len(segments) + len(own), self.events[clip].label))
            segments += own
            now, planned = now + length, planned + length
        self._fill(segments, now, seconds, pool, rng)
        return VirtualVideo(segments, found, name=name)

    def segments(self) -> list[Segment]:
        """All that videos may show: of each clip its frames."""
        sources = (*self._events, *self._footage)
        return [Segment(source.reader, source.first, source.stop - source.first) for source in sources]

    def close(self) -> None:
        for reader, _ in self._readers.values():
            reader.close()

    # the plan ---------------------------------------------------------------------------------------------------------

    def _usable(self, clips: Sequence[VideoClip]) -> tuple[list[VideoClip], list[_Source]]:
        kept, sources = [], []
        for clip in clips:
            try:
                source = self._source(clip)
            except VideoError as error:
                if self.bad is None:
                    raise at_row(error, clip) from None
                self.bad.skip(clip.name, at_row(error, clip))
                continue
            kept.append(clip)
            sources.append(source)
        return kept, sources

    def _source(self, clip: VideoClip) -> _Source:
        if clip.name not in self._readers:
            reader = open_video(clip.path, size=self.size, backend=self.backend)
            self._readers[clip.name] = (reader, edges_of(reader))
        reader, edges = self._readers[clip.name]
        end = edges[-1] if clip.end is None else clip.end
        if clip.start >= edges[-1] or end > edges[-1] + ROUNDING:
            raise VideoError(
                f"the span from {clip.start:g} to {end:g} seconds ends after {clip.name}, which has {edges[-1]:.6g} "
                "seconds",
                "span",
            )
        first, stop = np.searchsorted(edges[:-1], (clip.start - ROUNDING, end - ROUNDING))
        return _Source(reader, edges, min(int(first), len(edges) - 2), max(int(stop), int(first) + 1))

    def _choose(self, number: int, labels: Sequence[str], without: set[str], rng: np.random.Generator) -> list[int]:
        """Numbers of clips: a label, each as likely, then one of its clips; none shows what another is of, nor what is
        to be absent."""
        chosen: list[int] = []
        for _ in range(number):
            taken = {self.events[clip].label for clip in chosen} | without
            shown = {label for clip in chosen for label in self.events[clip].shows}
            fitting: dict[str, list[int]] = {}
            for clip, event in enumerate(self.events):
                if event.label in labels and event.label not in shown and not taken & set(event.shows):
                    fitting.setdefault(event.label, []).append(clip)
            if not fitting:
                raise UserError(f"no event fits beside {', '.join(sorted(taken))}: each shows one of them or is shown")
            names = sorted(fitting)
            own = fitting[names[int(rng.integers(len(names)))]]
            chosen.append(own[int(rng.integers(len(own)))])
        return chosen

    def _pool(self, labels: set[str]) -> list[list[_Source]]:
        """Footage that shows none of the labels, by its own label."""
        found: dict[str, list[_Source]] = {}
        for clip, source in zip(self.footage, self._footage, strict=True):
            if not labels & {clip.label, *clip.shows}:
                found.setdefault(clip.label, []).append(source)
        if not found:
            raise UserError(f"there is no footage without {', '.join(sorted(labels))}")
        return [found[label] for label in sorted(found)]

    def _fill(
        self, segments: list[Segment], now: float, until: float, pool: list[list[_Source]], rng: np.random.Generator
    ) -> float:
        """Append footage until at least a time, less than a frame more; returns when it ends."""
        while until - now > _HAIR:
            own = pool[int(rng.integers(len(pool)))]
            for segment in self._segments(own[int(rng.integers(len(own)))], self.piece_seconds, rng):
                length = self._seconds(segment)
                if now + length >= until - _HAIR:
                    edges = self._readers[segment.reader.name][1]
                    last = edges[segment.first] + (until - now - _HAIR) * segment.speed
                    frames = max(int(np.searchsorted(edges, last)) - segment.first, 1)
                    segments.append(segment._replace(frames=min(frames, segment.frames)))
                    return now + self._seconds(segments[-1])
                segments.append(segment)
                now += length
        return now

    def _segments(
        self, source: _Source, seconds: tuple[float, float] | None, rng: np.random.Generator
    ) -> list[Segment]:
        """A clip as long as drawn: cut at a random place, or repeated."""
        reader, edges, first, stop = source
        speed = float(rng.uniform(*self.speed))
        flip = self.flip and bool(rng.random() < 0.5)
        if seconds is None:
            return [Segment(reader, first, stop - first, flip, speed)]
        wanted, whole = float(rng.uniform(*seconds)) * speed, float(edges[stop] - edges[first])
        found = []
        while wanted >= whole - _HAIR:
            found.append(Segment(reader, first, stop - first, flip, speed))
            wanted -= whole
        if wanted > _HAIR:
            if not found:
                first += (
                    int(np.searchsorted(edges[first:stop], edges[first] + rng.uniform(0, whole - wanted), "right")) - 1
                )
            last = int(np.searchsorted(edges, edges[first] + wanted - _HAIR))
            found.append(Segment(reader, first, max(min(last, stop) - first, 1), flip, speed))
        return found

    def _seconds(self, segment: Segment) -> float:
        edges = self._readers[segment.reader.name][1]
        return float(edges[segment.first + segment.frames] - edges[segment.first]) / segment.speed


def compose_video(
    events: Sequence[VideoClip],
    footage: Sequence[VideoClip],
    seconds: float,
    seed: int | Sequence[int] = 0,
    *,
    labels: Sequence[str] | None = None,
    number: int | None = None,
    **options: Any,
) -> VirtualVideo:
    """One video: `Composer(events, footage, **options).plan(seconds, seed, labels=labels, number=number)`."""
    return Composer(events, footage, **options).plan(seconds, seed, labels=labels, number=number)


def _range(name: str, value: float | Sequence[float], *, above: bool = False) -> tuple[float, float]:
    """A number, or two, as two; at least 0, with `above` above it."""
    pair = (value, value) if isinstance(value, (int, float)) else tuple(value)
    if (
        len(pair) != 2
        or isinstance(value, bool)
        or not all(isinstance(x, (int, float)) for x in pair)
        or not 0 <= pair[0] <= pair[1] < math.inf
        or (above and not pair[0] > 0)
    ):
        least = "above 0" if above else "of at least 0"
        raise UserError(f"{name}={value!r} must be a number {least}, or two such, from and to")
    return float(pair[0]), float(pair[1])


def _whole_range(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    low, high = _range(name, value)
    if low != int(low) or high != int(high):
        raise UserError(f"{name}={value!r} must be a whole number, or two such, from and to")
    return int(low), int(high)
