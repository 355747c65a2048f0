"""Files that cannot be used: left out of training, counted by cause, and the end of the run when they are many."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from .clips import ROUNDING, Clip, at_row, read_clip
from .faults import CAUSES, AudioError
from .reader import AudioInfo, AudioReader, Stored

MOST_BAD = 0.05


class BadFiles:
    """Counts the files that were skipped, each once, over epochs and the workers of a loader.

    names: of all files. most: the part of them that may be bad. Copies in workers count into the same memory.
    """

    def __init__(self, names: Iterable[str], *, most: float = MOST_BAD) -> None:
        self._places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        self.most = most
        # 0 or 1 + the place of its cause: a write of the same value by two workers needs no lock
        self._found = torch.zeros(len(self._places), dtype=torch.uint8).share_memory_()

    def skip(self, name: str, error: AudioError) -> None:
        """Count a file, with a line on stderr the first time. Raises UserError when too many are bad."""
        place = self._places[name]
        if not self._found[place]:
            cause = error.cause if error.cause in CAUSES else "unreadable"
            self._found[place] = 1 + CAUSES.index(cause)
            print(f"skipped: {error}", file=sys.stderr, flush=True)
        self.check()

    @property
    def causes(self) -> dict[str, int]:
        """Skipped files by cause."""
        counts = Counter(self._found.tolist())
        return {cause: counts[number] for number, cause in enumerate(CAUSES, 1) if counts[number]}

    def report(self) -> str:
        """A line for the results; empty where nothing was skipped."""
        causes = self.causes
        if not causes:
            return ""
        several = ", ".join(f"{number:,} {cause}" for cause, number in causes.items())
        return f"{sum(causes.values()):,} of {len(self._places):,} audio files were skipped: {several}"

    def check(self) -> None:
        """Raise UserError when more files are bad than may be."""
        bad = int(self._found.count_nonzero())
        if bad > self.most * len(self._places):
            names = list(self._places)
            first = names[int(self._found.nonzero()[0])]
            raise UserError(f"{self.report()}, more than {self.most:.0%}; the first is {first}")


def read_or_skip(
    clip: Clip, bad: BadFiles, *, sample_rate: int | None = None, channels: str | int = "mono"
) -> np.ndarray | None:
    """The samples of a clip, or None, counted, where its file is bad: in training; an evaluation leaves nothing out."""
    try:
        return read_clip(clip, sample_rate=sample_rate, channels=channels)
    except AudioError as error:
        bad.skip(clip.name, error)
        return None


def checked_clips(clips: Sequence[Clip], bad: BadFiles | None = None, *, channels: str | int = "mono") -> list[Clip]:
    """The clips whose files can be opened and have their spans; an end that a table rounds up becomes the file's.

    Each file is opened once and its header is read, its samples are not. bad: what cannot be opened is left out and
    counted; None: it is an error. Raises AudioError, naming the row, for a span that ends after its file.
    """
    found: dict[str, AudioInfo | AudioError] = {}
    kept = []
    for clip in clips:
        if clip.name not in found:
            found[clip.name] = _header(clip.path, channels)
        info = found[clip.name]
        if isinstance(info, AudioError):
            if bad is None:
                raise at_row(info, clip)
            bad.skip(clip.name, at_row(info, clip))
            continue
        end = info.duration if clip.end is None else clip.end
        if end > info.duration + max(ROUNDING, 1 / info.rate) or clip.start >= info.duration:
            raise at_row(
                AudioError(
                    f"the span from {clip.start:g} to {end:g} seconds ends after {clip.name}, which has "
                    f"{info.duration:.6g} seconds",
                    "span",
                ),
                clip,
            )
        kept.append(clip if clip.end is None else clip._replace(end=min(end, info.duration)))
    return kept


def _header(path: Path | Stored, channels: str | int) -> AudioInfo | AudioError:
    try:
        with AudioReader(path, channels=channels) as reader:
            return reader.info
    except AudioError as error:
        return error
