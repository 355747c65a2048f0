"""Long recordings as backgrounds: cut in time into parts for train, val and test, read in blocks of fixed places."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np

from ..errors import UserError, nearest
from .clips import SPLITS
from .reader import AudioReader
from .sources import audio_files

BLOCK = 1 << 15  # frames
_KEPT = 1024  # blocks in memory, 128 MiB: of all backgrounds together
# Seconds between two parts of a file that belong to neither: a resampler's filter reads over the border.
GUARD = 0.25


class _Blocks:
    """The blocks that were read last, of any file."""

    def __init__(self) -> None:
        self._kept: OrderedDict[tuple[object, ...], np.ndarray] = OrderedDict()

    def get(self, reader: AudioReader, version: tuple[int, int], number: int) -> np.ndarray:
        key = (reader.name, reader.rate, version, number)
        if key in self._kept:
            self._kept.move_to_end(key)
            return self._kept[key]
        first = number * BLOCK
        block = reader.read(first, min(first + BLOCK, reader.frames), unit="frames")
        self._kept[key] = block
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        return block


_blocks = _Blocks()


class Background:
    """Frames `start` to `stop` of a recording, at `sample_rate`, that are read where they are needed.

    What is read does not depend on where a read begins, to the last bit: files are decoded and resampled in blocks of
    fixed places. Raises AudioError where the file is unusable.
    """

    def __init__(self, path: str | Path, sample_rate: int, start: int = 0, stop: int | None = None) -> None:
        self._reader = AudioReader(path, sample_rate=sample_rate)
        self.start, self.stop = start, self._reader.frames if stop is None else stop
        self._reader.close()
        found = Path(path).expanduser().stat()
        self._version = (found.st_size, found.st_mtime_ns)  # a file that is written anew is another

    @property
    def name(self) -> str:
        return self._reader.name

    @property
    def sample_rate(self) -> int:
        return self._reader.rate

    def __len__(self) -> int:
        return self.stop - self.start

    def read(self, first: int, last: int) -> np.ndarray:
        """Samples first .. last of the part, float32."""
        found, place, end = np.empty(last - first, np.float32), self.start + first, self.start + last
        filled = 0
        while place < end:
            number, within = divmod(place, BLOCK)
            piece = _blocks.get(self._reader, self._version, number)[within : within + end - place]
            found[filled : filled + len(piece)] = piece
            filled, place = filled + len(piece), place + len(piece)
        return found

    @cached_property
    def statistics(self) -> tuple[float, float]:
        """Mean square and peak of the part."""
        energy, peak = 0.0, 0.0
        for first in range(0, len(self), BLOCK):
            block = self.read(first, min(first + BLOCK, len(self))).astype(np.float64)
            energy, peak = energy + float(block @ block), max(peak, float(np.abs(block).max()))
        return energy / len(self), peak

    def close(self) -> None:
        self._reader.close()

    def __repr__(self) -> str:
        return f"Background({self.name!r}, frames {self.start} to {self.stop} at {self.sample_rate} Hz)"


def cut_backgrounds(
    path: str | Path, sample_rate: int, parts: Sequence[float] = (0.7, 0.15, 0.15), *, least: float = 1.0
) -> dict[str, list[Background]]:
    """Each recording of a folder, or one file, cut in time: its beginning is for train, then val, its end for test.

    parts: of train, val and test. Between two parts `GUARD` seconds are left out. least: seconds; a shorter part of a
    recording is left out. Raises UserError for a missing folder and where a split that is asked for has no background.
    """
    if len(parts) != 3 or min(parts) < 0 or not sum(parts) > 0 or not all(map(math.isfinite, parts)):
        raise UserError(f"background parts={list(parts)} must be three parts: train, val, test")
    root = Path(path).expanduser()
    if not root.exists():
        siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(f"no such folder of backgrounds: {root}.{nearest(root.name, siblings)}")
    files = audio_files(root) if root.is_dir() else [root]
    if not files:
        raise UserError(f"{root} has no audio file; long recordings are expected, as backgrounds")
    edges = np.concatenate(([0.0], np.cumsum(parts))) / sum(parts)
    found: dict[str, list[Background]] = {split: [] for split in SPLITS}
    for file in files:
        whole = Background(file, sample_rate)
        length, guard = len(whole), round(GUARD * sample_rate)
        for split, low, high in zip(SPLITS, edges[:-1], edges[1:], strict=True):
            start = round(low * length) + (guard if low > 0 else 0)
            stop = round(high * length)
            if high > low and stop - start >= least * sample_rate:
                found[split].append(Background(file, sample_rate, start, stop))
    for split, part in zip(SPLITS, parts, strict=True):
        if part > 0 and not found[split]:
            raise UserError(
                f"{root}: no recording is long enough for {split}, which needs {least:g} seconds of a part of "
                f"{part:g}; give longer ones"
            )
    return found
