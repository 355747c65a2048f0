"""Long recordings with exact truth: labelled clips planted into real backgrounds, as a plan that renders any window."""

from __future__ import annotations

import bisect
import csv
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..atomic import atomic_path
from ..errors import UserError
from .backgrounds import Background
from .clips import Clip
from .faults import AudioError
from .skipping import BadFiles
from .sounds import TRIM_DB, Planted, SoundBank

# Mean square below which a background counts as silent: an event there is as loud as over this.
SILENCE = 1e-8
PEAK = 0.99
_SPEEDS, _EQUALIZER_POINTS = 9, 6
_MEASURED = 50  # clips of a label whose mean length is taken
_WRITTEN = 10  # seconds that are written at a time


class Piece(NamedTuple):
    """A stretch of background. start, stop: frames of the recording. source: number of the background. offset: its
    frame at `start`. gain: factor."""

    start: int
    stop: int
    source: int
    offset: int
    gain: float


class Event(NamedTuple):
    """A planted clip. start, stop: frames of the recording. planted: the clip. gain: factor. snr_db: its energy over
    that of the background within its span."""

    start: int
    stop: int
    label: str
    planted: Planted
    gain: float
    snr_db: float


class Composition:
    """A planned recording; nothing of it is in memory.

    frames: its length. pieces, events: in order of their start. gain: of the whole, so that no sample is beyond full
    scale. fade: frames by which neighbouring pieces overlap, with equal power.
    """

    def __init__(
        self,
        name: str,
        frames: int,
        pieces: Sequence[Piece],
        events: Sequence[Event],
        gain: float,
        fade: int,
        backgrounds: Sequence[Background],
        bank: SoundBank,
    ) -> None:
        self.name, self.frames, self.gain = name, frames, gain
        self.pieces, self.events = list(pieces), list(events)
        self.backgrounds, self.bank = backgrounds, bank
        angle = (np.arange(fade) + 0.5) * (np.pi / 2 / fade)
        self._rise, self._fall = np.sin(angle).astype(np.float32), np.cos(angle).astype(np.float32)
        self._starts = [piece.start for piece in self.pieces]
        # an event may be covered by one that starts later, so that only the longest says how far to look back
        self._event_starts = [event.start for event in self.events]
        self._longest = max((event.stop - event.start for event in self.events), default=0)

    @property
    def sample_rate(self) -> int:
        return self.bank.sample_rate

    @property
    def seconds(self) -> float:
        return self.frames / self.sample_rate

    def samples(self, start: int = 0, stop: int | None = None) -> np.ndarray:
        """float32 frames start .. stop: those of the whole, to the last bit. Raises UserError outside 0 .. frames."""
        stop = self.frames if stop is None else stop
        if not 0 <= start < stop <= self.frames:
            raise UserError(f"{self.name}: frames {start} to {stop} are not within its {self.frames}")
        found = self.background(start, stop)
        first = bisect.bisect_left(self._event_starts, start - self._longest)
        for event in self.events[first : bisect.bisect_left(self._event_starts, stop)]:
            begin, end = max(start, event.start), min(stop, event.stop)
            if begin < end:
                sound = event.planted.sound(self.bank)[begin - event.start : end - event.start]
                found[begin - start : end - start] += np.float32(event.gain) * sound
        found *= np.float32(self.gain)
        return found

    def background(self, start: int, stop: int) -> np.ndarray:
        """The background alone, before the gain of the whole."""
        found = np.zeros(stop - start, np.float32)
        number = max(bisect.bisect_right(self._starts, start) - 2, 0)
        for piece in self.pieces[number:]:
            if piece.start >= stop:
                break
            begin, end = max(start, piece.start), min(stop, piece.stop)
            if begin >= end:
                continue
            place = piece.offset - piece.start
            part = self.backgrounds[piece.source].read(place + begin, place + end)
            part *= np.float32(piece.gain)
            if piece.start > 0:
                _fade(part, self._rise, piece.start - begin)
            _fade(part, self._fall, piece.stop - len(self._fall) - begin)
            found[begin - start : end - start] += part
        return found

    def truth(self) -> list[tuple[float, float, str]]:
        """start and end in seconds, and label, of each event."""
        return [(event.start / self.sample_rate, event.stop / self.sample_rate, event.label) for event in self.events]

    def write(self, path: str | Path, table: str | Path | None = None) -> Path:
        """Write a WAV or FLAC file of 16 bits, a few seconds at a time, and a CSV table path, start, end, label, which
        `table_clips` reads; returns the table. table: where, None: beside the file, named as it is."""
        import soundfile

        path = Path(path)
        kind = path.suffix.lower().lstrip(".")
        if kind not in ("wav", "flac"):
            raise UserError(f"cannot write a recording to {path}: give the name of a .wav or .flac file")
        table = path.with_suffix(".csv") if table is None else Path(table)
        step = _WRITTEN * self.sample_rate
        with (
            atomic_path(path) as temporary,
            soundfile.SoundFile(temporary, "w", self.sample_rate, 1, subtype="PCM_16", format=kind.upper()) as file,
        ):
            for start in range(0, self.frames, step):
                file.write(self.samples(start, min(start + step, self.frames)))
        name = path.name if table.parent.resolve() == path.parent.resolve() else str(path.resolve())
        with atomic_path(table) as temporary, open(temporary, "w", encoding="utf-8", newline="") as out:
            writer = csv.writer(out, lineterminator="\n")
            writer.writerow(("path", "start", "end", "label"))
            # repr: what is read again is the frame it was
            writer.writerows((name, repr(start), repr(end), label) for start, end, label in self.truth())
        return table


def _fade(part: np.ndarray, table: np.ndarray, at: int) -> None:
    """Multiply by the table, whose first value belongs to the place `at` of the part, where they meet."""
    begin, end = max(at, 0), min(at + len(table), len(part))
    if begin < end:
        part[begin:end] *= table[begin - at : end - at]


class Composer:
    """Plans recordings: clips planted at random places of backgrounds that follow each other.

    clips, backgrounds: of one split; a bad clip is counted in `bad`, without which it is an error. snr_db: a number, or
    two between which it is drawn for each event, in dB: the energy of the event over that of the background alone
    within its span (a background there below -80 dB of full scale counts as -80). events_per_minute: their number is
    Poisson. min_gap: seconds between two. overlap: events may overlap, those of one label do not. level_db: two numbers
    between which the level of each piece of background is drawn, dB of full scale as its recording's root mean square.
    piece_seconds: least and most of a piece. crossfade: seconds.
    speed: two numbers between which the speed of each event is drawn, one of nine in equal ratios; other voices.
    equalizer_db: gains at six frequencies are drawn up to so many dB from 0, see `equalize`; other microphones.
    Raises UserError for values outside these, no clips or backgrounds, and one shorter than two crossfades.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        backgrounds: Sequence[Background],
        *,
        sample_rate: int,
        snr_db: float | Sequence[float] = (0.0, 20.0),
        events_per_minute: float = 12.0,
        min_gap: float = 0.2,
        overlap: bool = False,
        level_db: Sequence[float] = (-42.0, -30.0),
        piece_seconds: Sequence[float] = (5.0, 20.0),
        crossfade: float = 0.5,
        trim_db: float = TRIM_DB,
        speed: float | Sequence[float] = 1.0,
        equalizer_db: float = 0.0,
        bad: BadFiles | None = None,
    ) -> None:
        self.snr_db = _range("snr_db", snr_db)
        self.level_db, self.piece_seconds = _range("level_db", level_db), _range("piece_seconds", piece_seconds)
        slow, fast = _range("speed", speed)
        if not slow > 0:
            raise UserError(f"speed={speed!r} must be above 0; 1 is the clip's own")
        self.speeds = [slow] if slow == fast else np.geomspace(slow, fast, _SPEEDS).tolist()
        for name, value, least in (
            ("events_per_minute", events_per_minute, 0.0),
            ("min_gap", min_gap, 0.0),
            ("crossfade", crossfade, 1 / sample_rate),
            ("equalizer_db", equalizer_db, 0.0),
        ):
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value < math.inf:
                raise UserError(f"{name}={value!r} must be a number of at least {least:g}")
        if not clips:
            raise UserError("there are no clips to plant")
        if not backgrounds:
            raise UserError("there are no backgrounds to plant clips into")
        self.fade = max(1, round(crossfade * sample_rate))
        for background in backgrounds:
            if len(background) < 2 * self.fade or background.sample_rate != sample_rate:
                raise UserError(
                    f"{background} must be at {sample_rate} Hz and have at least two crossfades, {2 * self.fade} frames"
                )
        self.bank = SoundBank(clips, sample_rate, trim_db=trim_db)
        self.backgrounds, self.bad, self.sample_rate = list(backgrounds), bad, sample_rate
        self.rate, self.min_gap, self.overlap = float(events_per_minute), round(min_gap * sample_rate), overlap
        self.equalizer_db = float(equalizer_db)
        self._by_label: dict[str, list[int]] = {}
        for number, clip in enumerate(clips):
            self._by_label.setdefault(clip.label, []).append(number)
        self.labels = sorted(self._by_label)

    def plan(self, seconds: float, seed: Sequence[int], *, name: str = "", snr_db: float | None = None) -> Composition:
        """A recording of so many seconds; the same for the same seed. snr_db: of all events in place of the range, with
        the same events at the same places.

        Raises UserError where the clips do not fit.
        """
        frames = round(seconds * self.sample_rate) if math.isfinite(seconds) else 0
        if frames < 1:
            raise UserError(f"seconds={seconds!r} must be at least one sample of {self.sample_rate} Hz")
        snr = self.snr_db if snr_db is None else _range("snr_db", snr_db)
        rng = np.random.default_rng([*seed])
        pieces = self._pieces(frames, rng)
        chosen = self._choose(rng.poisson(self.rate * seconds / 60), frames, rng)
        placed = self._scatter(chosen, frames, rng) if self.overlap else self._line_up(chosen, frames, rng)
        bare = Composition(name, frames, pieces, (), 1.0, self.fade, self.backgrounds, self.bank)
        events, peak = [], self._highest(pieces)
        for (start, planted), part in zip(placed, rng.random(len(placed)), strict=True):
            wanted = snr[0] + (snr[1] - snr[0]) * float(part)
            sound = planted.sound(self.bank)
            behind = bare.background(start, start + len(sound))
            energy = max(_energy(behind), SILENCE * len(sound))
            gain = float(np.float32(math.sqrt(energy / _energy(sound) * 10 ** (wanted / 10))))
            peak = max(peak, float(np.abs(behind).max()) + gain * float(np.abs(sound).max()))
            label = self.bank.clips[planted.clip].label
            events.append(Event(start, start + len(sound), label, planted, gain, wanted))
        if self.overlap:  # several may sound at once: what each adds is bounded by the sum
            peak = self._highest(pieces) + _stacked(events, self.bank)
        gain = float(np.float32(min(1.0, PEAK / peak))) if peak > 0 else 1.0
        return Composition(name, frames, pieces, events, gain, self.fade, self.backgrounds, self.bank)

    def active_share(self) -> dict[str, float]:
        """The share of the time in which each label is to be expected: events per second times the mean length of its
        clips, every label as often as the others. Reads up to 50 clips of each."""
        each = self.rate / 60 / len(self.labels)
        shares = {}
        for label, numbers in self._by_label.items():
            some = numbers[:: -(-len(numbers) // _MEASURED)]
            lengths = [len(sound) for number in some if (sound := self._sound(number)) is not None]
            shares[label] = each * sum(lengths) / max(len(lengths), 1) / self.sample_rate
        return shares

    # the plan ---------------------------------------------------------------------------------------------------------

    def _pieces(self, frames: int, rng: np.random.Generator) -> list[Piece]:
        """Backgrounds that follow each other over the whole recording, each fading into the next."""
        pieces: list[Piece] = []
        start = 0
        while not pieces or pieces[-1].stop - self.fade < frames:
            source = int(rng.integers(len(self.backgrounds)))
            background = self.backgrounds[source]
            low, high = (round(value * self.sample_rate) for value in self.piece_seconds)
            length = min(max(int(rng.integers(low, high + 1)), 2 * self.fade), len(background))
            offset = int(rng.integers(len(background) - length + 1))
            level = rng.uniform(*self.level_db)
            power, _ = background.statistics
            gain = float(np.float32(10 ** (level / 20) / math.sqrt(power))) if power > 0 else 1.0
            pieces.append(Piece(start, start + length, source, offset, gain))
            start += length - self.fade
        return pieces

    def _highest(self, pieces: Sequence[Piece]) -> float:
        """A bound of the background's peak: where two fade into each other it is at most the root of 2 higher."""
        return math.sqrt(2) * max(piece.gain * self.backgrounds[piece.source].statistics[1] for piece in pieces)

    def _sound(self, number: int, speed: float = 1.0) -> np.ndarray | None:
        try:
            return self.bank.get(number, speed)
        except AudioError as error:
            if self.bad is None:
                raise
            self.bad.skip(self.bank.clips[number].name, error)
            return None

    def _choose(self, count: int, frames: int, rng: np.random.Generator) -> list[Planted]:
        """Clips to plant: a label, each as likely, then one of its clips."""
        chosen: list[Planted] = []
        for _ in range(count):
            numbers = self._by_label[self.labels[int(rng.integers(len(self.labels)))]]
            number = numbers[int(rng.integers(len(numbers)))]
            speed = self.speeds[int(rng.integers(len(self.speeds)))]
            sound = self._sound(number, speed)
            if sound is None:
                continue
            if len(sound) > frames:
                clip = self.bank.clips[number]
                raise UserError(
                    f"{clip.where or clip.name} has {len(sound) / self.sample_rate:g} seconds of sound, more than the "
                    f"recording of {frames / self.sample_rate:g}"
                )
            chosen.append(Planted(number, speed, self._gains(rng)))
        return chosen

    def _gains(self, rng: np.random.Generator) -> tuple[float, ...]:
        if not self.equalizer_db:
            return ()
        return tuple(rng.uniform(-self.equalizer_db, self.equalizer_db, _EQUALIZER_POINTS).tolist())

    def _line_up(self, chosen: Sequence[Planted], frames: int, rng: np.random.Generator) -> list[tuple[int, Planted]]:
        """Places one after the other, uniform among all with the gaps between them; what does not fit is left out."""
        lengths = [len(self.bank.get(*planted[:2])) for planted in chosen]
        needed = np.cumsum([length + self.min_gap for length in lengths]) - self.min_gap
        fits = int(np.searchsorted(needed, frames, side="right"))
        if fits < len(chosen) and self.rate / 60 * (np.mean(lengths) + self.min_gap) > self.sample_rate:
            raise UserError(
                f"events_per_minute={self.rate:g} of {np.mean(lengths) / self.sample_rate:.2g} seconds with "
                f"min_gap={self.min_gap / self.sample_rate:g} do not fit one after the other; fewer, or overlap=true"
            )
        if not fits:
            return []
        free = np.sort(rng.integers(0, frames - int(needed[fits - 1]) + 1, fits))
        before = np.concatenate(([0], np.cumsum([length + self.min_gap for length in lengths[: fits - 1]]))).astype(int)
        return [(int(a + b), planted) for a, b, planted in zip(free, before, chosen, strict=False)]

    def _scatter(self, chosen: Sequence[Planted], frames: int, rng: np.random.Generator) -> list[tuple[int, Planted]]:
        """Places that may overlap, but for clips of one label; one that finds no place in 100 tries is left out."""
        taken: dict[str, list[tuple[int, int]]] = {}
        placed = []
        for planted in chosen:
            own, length = taken.setdefault(self.bank.clips[planted.clip].label, []), len(self.bank.get(*planted[:2]))
            for start in rng.integers(0, frames - length + 1, 100).tolist():
                stop = start + length
                if all(stop + self.min_gap <= a or b + self.min_gap <= start for a, b in own):
                    own.append((start, stop))
                    placed.append((start, planted))
                    break
        return sorted(placed)


def compose_recording(
    path: str | Path,
    clips: Sequence[Clip],
    backgrounds: Sequence[Background],
    *,
    minutes: float,
    sample_rate: int,
    seed: int = 0,
    table: str | Path | None = None,
    **options: float | bool | Sequence[float],
) -> Composition:
    """Write a recording of `minutes` to `path` (WAV or FLAC) and its truth beside it, see `Composition.write`.

    options: of `Composer`. Returns the plan, whose `events` are the truth to the sample.
    """
    compose: Callable[..., Composer] = Composer
    composer = compose(clips, backgrounds, sample_rate=sample_rate, **options)
    composition = composer.plan(60 * minutes, [seed], name=str(path))
    composition.write(path, table)
    return composition


def _range(name: str, value: object) -> tuple[float, float]:
    """Two finite numbers in order; one number is both."""
    given = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else [value, value]
    numbers = [x for x in given if isinstance(x, (int, float)) and not isinstance(x, bool) and math.isfinite(x)]
    if len(given) != 2 or len(numbers) != 2 or numbers[0] > numbers[1]:
        raise UserError(f"{name}={value!r} must be a number, or two in order")
    return float(numbers[0]), float(numbers[1])


def _energy(samples: np.ndarray) -> float:
    wide = samples.astype(np.float64)
    return float(wide @ wide)


def _stacked(events: Sequence[Event], bank: SoundBank) -> float:
    """The most that the peaks of events which sound at once add up to."""
    peaks = [event.gain * float(np.abs(event.planted.sound(bank)).max()) for event in events]
    changes = [(event.start, peak) for event, peak in zip(events, peaks, strict=True)]
    changes += [(event.stop, -peak) for event, peak in zip(events, peaks, strict=True)]
    total = highest = 0.0
    for _, change in sorted(changes):
        total += change
        highest = max(highest, total)
    return highest
