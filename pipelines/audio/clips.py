"""Labelled spans of recordings, read one by one, and splits that share no file and no speaker."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..labelled_clips import ROUNDING, SPLITS, assign_splits, check_overlaps, shared_between
from .faults import AudioError
from .reader import AudioReader, Stored

__all__ = ["ROUNDING", "SPLITS", "Clip", "assign_splits", "at_row", "check_overlaps", "read_clip", "shared_between"]


class Clip(NamedTuple):
    """path: the file, or a `Stored`. start, end: seconds, end None for the end of the file. group: what splits keep
    together (a speaker), None where nothing is known. split: "train", "val", "test" or "". where: the row that it comes
    from, for messages."""

    path: Path | Stored
    start: float
    end: float | None
    label: str
    group: str | None = None
    split: str = ""
    where: str = ""

    @property
    def name(self) -> str:
        return str(self.path) if isinstance(self.path, Path) else self.path.name


def read_clip(clip: Clip, *, sample_rate: int | None = None, channels: str | int = "mono") -> np.ndarray:
    """The samples of a clip, as `AudioReader.read` gives them; the file is closed again. Raises AudioError naming the
    row."""
    try:
        with AudioReader(clip.path, sample_rate=sample_rate, channels=channels) as reader:
            length = reader.frames / reader.rate
            to_end = clip.end is None or length < clip.end <= length + max(ROUNDING, 1 / reader.rate)
            return reader.read(clip.start, None if to_end else clip.end)
    except AudioError as error:
        raise at_row(error, clip) from None


def at_row(error: AudioError, clip: Clip) -> AudioError:
    """The error with the row of the clip before it."""
    return AudioError(f"{clip.where}: {error}", error.cause) if clip.where else error
