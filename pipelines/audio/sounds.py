"""Clips as they are planted into recordings: without the quiet at their ends, at another speed, kept in memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from .clips import Clip, read_clip
from .faults import AudioError

TRIM_DB = 30.0
TRIM_FRAME = 0.01  # seconds
EDGE = 0.005  # seconds over which a clip comes in and goes out, so that its edges do not click
_LOWEST_HZ = 100.0  # of an equalizer
_KEPT_EQUALIZED = 64
_KEPT = 1 << 25  # samples in memory, 128 MiB


def trim_silence(samples: np.ndarray, rate: int, *, down_db: float = TRIM_DB) -> np.ndarray:
    """A clip (T,) without the quiet at its ends: from the first to the last frame of 10 ms whose mean square is at most
    `down_db` below that of the loudest frame. The rest of a last frame counts as one; silence alone stays as it is."""
    size = max(1, round(TRIM_FRAME * rate))
    starts = np.arange(0, len(samples), size)
    square = samples.astype(np.float64) ** 2
    level = np.add.reduceat(square, starts) / np.diff(np.append(starts, len(samples)))
    loud = np.flatnonzero(level >= level.max() * 10 ** (-down_db / 10))
    return samples[loud[0] * size : (loud[-1] + 1) * size] if level.max() > 0 else samples


def at_speed(samples: np.ndarray, speed: float) -> np.ndarray:
    """A clip (T,) played at another speed, round(T / speed) samples: 2 is twice as fast and an octave higher."""
    if speed == 1:
        return samples
    import soxr

    return np.asarray(soxr.resample(samples, speed, 1.0, quality="HQ"), np.float32)


def equalize(samples: np.ndarray, rate: int, gains_db: Sequence[float]) -> np.ndarray:
    """A clip (T,) as through another microphone: gains in dB at frequencies from 100 Hz to half the rate in equal
    ratios, straight lines between over the logarithm of the frequency; without a shift of phase.

    After FilterAugment (arXiv:2110.03282), of clips and not of spectrograms.
    """
    size = 1 << (len(samples) + 255).bit_length()  # what the filter carries over the end comes in nowhere
    gain = np.interp(*_places(size, rate, len(gains_db)), gains_db)
    spectrum = np.fft.rfft(samples, size) * 10 ** (gain / 20)
    return np.fft.irfft(spectrum, size)[: len(samples)].astype(np.float32)


@lru_cache(maxsize=64)
def _places(size: int, rate: int, number: int) -> tuple[np.ndarray, np.ndarray]:
    """Logarithms of the frequencies of a spectrum, and of those where gains are given."""
    frequency = np.fft.rfftfreq(size, 1 / rate)
    return np.log(np.maximum(frequency, 1.0)), np.log(np.geomspace(_LOWEST_HZ, rate / 2, number))


def soft_edges(samples: np.ndarray, rate: int) -> np.ndarray:
    """A copy of a clip that comes in and goes out over 5 ms."""
    edge = min(round(EDGE * rate), len(samples) // 2)
    ramp = (np.arange(edge, dtype=np.float32) + 1) / (edge + 1)
    found = samples.copy()
    found[:edge] *= ramp
    found[len(found) - edge :] *= ramp[::-1]
    return found


class SoundBank:
    """The clips as they are planted: one channel at `sample_rate`, at another speed where asked for (pitch and length
    change together), trimmed by `trim_silence`, 5 ms of fade at the ends.

    The ones used last are kept in memory. `get` raises AudioError for a bad file.
    """

    def __init__(self, clips: Sequence[Clip], sample_rate: int, *, trim_db: float = TRIM_DB) -> None:
        self.clips, self.sample_rate, self.trim_db = list(clips), sample_rate, trim_db
        self._kept: OrderedDict[tuple[int, float], np.ndarray] = OrderedDict()
        self._size = 0
        self.equalized: OrderedDict[Planted, np.ndarray] = OrderedDict()

    def __len__(self) -> int:
        return len(self.clips)

    def get(self, number: int, speed: float = 1.0) -> np.ndarray:
        """float32 (T,), not to be changed."""
        key = (number, speed)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        clip = self.clips[number]
        sound = at_speed(read_clip(clip, sample_rate=self.sample_rate), speed)
        sound = trim_silence(sound, self.sample_rate, down_db=self.trim_db)
        if not np.any(sound):
            raise AudioError(f"{clip.where or clip.name} is silent: nothing of it can be planted", "empty")
        sound = soft_edges(sound, self.sample_rate)
        self._kept[key] = sound
        self._size += len(sound)
        while self._size > _KEPT and len(self._kept) > 1:
            self._size -= len(self._kept.popitem(last=False)[1])
        return sound


class Planted(NamedTuple):
    """clip: its number. speed: at which it is played. gains_db: of its `equalize`, () for none."""

    clip: int
    speed: float
    gains_db: tuple[float, ...] = ()

    def sound(self, bank: SoundBank) -> np.ndarray:
        """float32 (T,)."""
        sound = bank.get(self.clip, self.speed)
        if not self.gains_db:
            return sound
        # what is planned is rendered next
        if self not in bank.equalized:
            bank.equalized[self] = soft_edges(equalize(sound, bank.sample_rate, self.gains_db), bank.sample_rate)
            if len(bank.equalized) > _KEPT_EQUALIZED:
                bank.equalized.popitem(last=False)
        return bank.equalized[self]
