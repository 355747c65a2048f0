"""What the picture of a recording shows, gathered while it is heard: its spectrogram and scores in so many columns."""

from __future__ import annotations

import numpy as np
import torch

from ...blocks.layers.spectrogram import LogMel
from .streaming import Source

COLUMNS = 1500
_BANDS = 64
_LEAST_BANDS = 8


class Overview:
    """A `Source` that hands the samples of another one on and keeps mean energies and largest scores by column.

    num_labels: of the scores. step: seconds from token to token. columns: at most; a column is not shorter than 20 ms.
    """

    def __init__(self, source: Source, num_labels: int, *, step: float, columns: int = COLUMNS) -> None:
        self._source, self._step = source, step
        self.name, self.frames, self.sample_rate = source.name, source.frames, source.sample_rate
        self.seconds = self.frames / self.sample_rate
        self.columns = max(min(columns, int(self.seconds / 0.02)), 1)
        self._mel = _bands(self.sample_rate)
        self._state = self._mel.init_state(1)
        self._energy = np.zeros((self.columns, self._mel.dim))
        self._number = np.zeros(self.columns)
        self._at, self._frame = 0, 0
        self.scores = np.zeros((self.columns, num_labels), dtype=np.float32)

    def samples(self, start: int, stop: int) -> np.ndarray:
        found = self._source.samples(start, stop)
        if stop > self._at:
            self._see(found[max(self._at - start, 0) :])
            self._at = stop
        return found

    def scored(self, first: int, probabilities: np.ndarray) -> None:
        """Take the scores (L, C) of the tokens from number `first` on."""
        centres = (first + np.arange(len(probabilities)) + 0.5) * self._step
        np.maximum.at(self.scores, self._column(centres), probabilities.astype(np.float32))

    @property
    def spectrogram(self) -> np.ndarray:
        """dB (bands, columns), NaN where nothing was heard."""
        with np.errstate(invalid="ignore", divide="ignore"):
            mean = self._energy / self._number[:, None]
        return 10 * np.log10(np.maximum(mean, 1e-10)).T

    @torch.inference_mode()
    def _see(self, samples: np.ndarray) -> None:
        out = self._mel(torch.from_numpy(np.ascontiguousarray(samples)).unsqueeze(0), state=self._state)
        self._state = out.state
        energy = out.features[0].double().numpy()
        centres = self._mel.times(len(energy), start=self._frame).numpy()
        self._frame += len(energy)
        place = self._column(centres)
        np.add.at(self._energy, place, energy)
        np.add.at(self._number, place, 1)

    def _column(self, seconds: np.ndarray) -> np.ndarray:
        return np.minimum((seconds / self.seconds * self.columns).astype(np.int64), self.columns - 1)


def _bands(sample_rate: int) -> LogMel:
    """Energies of mel bands in frames of 20 ms, of as many bands as the rate allows."""
    hop = max(sample_rate // 50, 1)
    number = _BANDS
    while True:
        try:
            return LogMel(sample_rate, num_mels=number, win_length=2 * hop, hop_length=hop, compression="none")
        except ValueError:
            if number <= _LEAST_BANDS:
                raise
            number //= 2
