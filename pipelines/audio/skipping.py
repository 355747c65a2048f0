"""Files that cannot be used: left out of training, counted by cause, and the end of the run when they are many."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .. import skipping
from .clips import ROUNDING, Clip, at_row, read_clip
from .faults import CAUSES, AudioError
from .reader import AudioInfo, AudioReader, Stored


class BadFiles(skipping.BadFiles):
    """Counts audio files that were skipped: see the base class."""

    def __init__(self, names: Iterable[str], *, most: float = skipping.MOST_BAD) -> None:
        super().__init__(names, CAUSES, files="audio files", most=most)


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
