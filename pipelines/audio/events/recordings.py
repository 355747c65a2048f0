"""Recordings with true spans: read where they are needed, whole ones to evaluate and windows of them to train."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..clips import Clip, at_row
from ..composer import Composer, Composition
from ..faults import AudioError
from ..reader import AudioReader, Stored
from ..skipping import BadFiles

# Seconds of a composed window that are cut off at either end, so that events are cut as those of a recording are.
MARGIN = 1.0
# Windows of a user's recordings that are looked for around an event; the others are anywhere.
NEAR_EVENTS = 0.5
_TRIES = 100

Truth = list[tuple[float, float, int]]


class EventRecording:
    """A recording that is read as it is needed. truth: start and end in seconds and class of its events. condition:
    what tables keep apart, such as "20 dB"."""

    name: str
    frames: int
    sample_rate: int
    truth: Truth
    condition: str

    def samples(self, start: int, stop: int) -> np.ndarray:
        """Frames start .. stop, float32."""
        raise NotImplementedError

    @property
    def seconds(self) -> float:
        return self.frames / self.sample_rate


class ComposedRecording(EventRecording):
    """A `Composition` with classes for its labels, their places in `labels`."""

    def __init__(self, composition: Composition, labels: Sequence[str], condition: str = "") -> None:
        self.composition, self.condition = composition, condition
        self.name, self.frames, self.sample_rate = composition.name, composition.frames, composition.sample_rate
        self.truth = [(start, end, labels.index(label)) for start, end, label in composition.truth()]

    def samples(self, start: int, stop: int) -> np.ndarray:
        return self.composition.samples(start, stop)


class FileRecording(EventRecording):
    """An audio file; raises AudioError when it is opened and is unusable."""

    def __init__(
        self, path: Path | Stored, sample_rate: int, spans: Sequence[Clip] = (), labels: Sequence[str] = ()
    ) -> None:
        self._reader = AudioReader(path, sample_rate=sample_rate)
        self.path, self.condition, self.where = path, "", next((span.where for span in spans), "")
        self.name, self.sample_rate = self._reader.name, sample_rate
        try:
            self.frames = self._reader.frames
        except AudioError as error:
            raise at_row(error, spans[0]) if spans else error from None
        self._reader.close()
        self.truth = sorted(
            (span.start, self.seconds if span.end is None else span.end, labels.index(span.label)) for span in spans
        )

    def samples(self, start: int, stop: int) -> np.ndarray:
        try:
            return self._reader.read(start, stop, unit="frames")
        finally:
            self._reader.close()


class RecordingSet(Dataset[Any]):
    """Recordings one by one, for evaluation: {"recording": an `EventRecording`}, whose samples nobody has read yet."""

    def __init__(self, recordings: Sequence[EventRecording]) -> None:
        self.recordings = list(recordings)

    def __len__(self) -> int:
        return len(self.recordings)

    def __getitem__(self, index: np.ndarray) -> dict[str, EventRecording]:
        return {"recording": self.recordings[int(index[0])]}


class ComposedWindows(Dataset[Any]):
    """Window number n is a short recording of its own, from (seed, n): indexed by an array of numbers, a batch."""

    def __init__(self, composer: Composer, labels: Sequence[str], *, seconds: float, seed: int) -> None:
        self.composer, self.labels, self.seconds, self.seed = composer, list(labels), seconds, seed

    def __getitem__(self, index: np.ndarray) -> dict[str, Tensor]:
        rate = self.composer.sample_rate
        margin, length = round(MARGIN * rate), round(self.seconds * rate)
        windows = []
        for number in index.tolist():
            composition = self.composer.plan((length + 2 * margin) / rate, [self.seed, number], name=f"window {number}")
            recording = ComposedRecording(composition, self.labels)
            windows.append(_window(recording, margin, length, number))
        return collate(windows, length, rate)


class FileWindows(Dataset[Any]):
    """Windows of recordings, half of them around an event, from (seed, n): indexed by an array of numbers, a batch.

    A recording as likely as it is long. bad: where files that cannot be read are counted, another one is taken then.
    """

    def __init__(
        self, recordings: Sequence[FileRecording], *, seconds: float, seed: int, bad: BadFiles | None = None
    ) -> None:
        self.recordings, self.seconds, self.seed, self.bad = list(recordings), seconds, seed, bad
        self._ends = np.cumsum([recording.seconds for recording in self.recordings]).tolist()
        self._events = [(row, event) for row, found in enumerate(self.recordings) for event in found.truth]

    def __getitem__(self, index: np.ndarray) -> dict[str, Tensor]:
        rate = self.recordings[0].sample_rate
        length = round(self.seconds * rate)
        return collate([self._draw(number, length) for number in index.tolist()], length, rate)

    def _draw(self, number: int, length: int) -> _Window:
        rng = np.random.default_rng([self.seed, number])
        for _ in range(_TRIES):
            row, start = self._place(rng, length)
            recording = self.recordings[row]
            try:
                return _window(recording, start, min(length, recording.frames - start), row)
            except AudioError as error:
                if self.bad is None:
                    raise
                self.bad.skip(recording.name, error)
        raise AudioError(f"{_TRIES} windows in a row cannot be read, the last one of {recording.name}")

    def _place(self, rng: np.random.Generator, length: int) -> tuple[int, int]:
        near, where = rng.random(2)
        if self._events and near < NEAR_EVENTS:
            row, (begin, end, _) = self._events[int(rng.integers(len(self._events)))]
            rate = self.recordings[row].sample_rate
            low, high = round(begin * rate) - length, round(end * rate)
            start = low + int(where * (high - low))
        else:
            row = min(bisect.bisect_right(self._ends, rng.random() * self._ends[-1]), len(self._ends) - 1)
            start = int(where * max(self.recordings[row].frames - length + 1, 1))
        return row, min(max(start, 0), max(self.recordings[row].frames - length, 0))


class _Window:
    """samples (n,). truth: relative to its start. recording: number. start: seconds."""

    def __init__(self, samples: np.ndarray, truth: Truth, recording: int, start: float) -> None:
        self.samples, self.truth, self.recording, self.start = samples, truth, recording, start


def _window(recording: EventRecording, start: int, length: int, number: int) -> _Window:
    begin, seconds = start / recording.sample_rate, length / recording.sample_rate
    inside = [
        (max(a - begin, 0.0), min(b - begin, seconds), label)
        for a, b, label in recording.truth
        if a < begin + seconds and b > begin
    ]
    return _Window(recording.samples(start, start + length), inside, number, begin)


def collate(windows: Sequence[_Window], length: int, sample_rate: int) -> dict[str, Tensor]:
    """samples: float32 (B, T), 0 behind the end. lengths: int64 (B,). spans: float64 (B, N, 2), seconds from the start
    of the window. classes: int64 (B, N), -1 for none. recording: int64 (B,). start: float64 (B,), seconds."""
    samples = np.zeros((len(windows), length), dtype=np.float32)
    most = max(len(window.truth) for window in windows)
    spans = np.zeros((len(windows), most, 2))
    classes = np.full((len(windows), most), -1, dtype=np.int64)
    for row, window in enumerate(windows):
        samples[row, : len(window.samples)] = window.samples
        for place, (begin, end, label) in enumerate(window.truth):
            spans[row, place], classes[row, place] = (begin, end), label
    return {
        "samples": torch.from_numpy(samples),
        "lengths": torch.tensor([len(window.samples) for window in windows]),
        "spans": torch.from_numpy(spans),
        "classes": torch.from_numpy(classes),
        "recording": torch.tensor([window.recording for window in windows]),
        "start": torch.tensor([window.start for window in windows], dtype=torch.float64),
    }
