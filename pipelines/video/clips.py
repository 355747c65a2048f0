"""Labelled spans of videos, and cuts of them in time that share no frame."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..labelled_clips import ROUNDING, SPLITS, assign_splits, check_overlaps, shared_between
from .faults import VideoError

__all__ = [
    "ROUNDING",
    "SPLITS",
    "VideoClip",
    "assign_splits",
    "at_row",
    "check_overlaps",
    "cut_clips",
    "shared_between",
]


class VideoClip(NamedTuple):
    """A span of a file with what is seen in it.

    start, end: seconds, end None for the end of the file. label: in words, "a taxi cab". group: what splits keep
    together, None where nothing is known. split: "train", "val", "test" or "". where: the row that it comes from, for
    messages. shows: labels of what else is seen in it: a `Composer` plants none of them beside it.
    """

    path: Path
    start: float
    end: float | None
    label: str
    group: str | None = None
    split: str = ""
    where: str = ""
    shows: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return str(self.path)


def at_row(error: VideoError, clip: VideoClip) -> VideoError:
    """The error with the row of the clip before it."""
    return VideoError(f"{clip.where}: {error}", error.cause) if clip.where else error


def cut_clips(
    clips: Sequence[VideoClip], parts: Sequence[float] = (0.7, 0.15, 0.15), *, gap: float = 0.0
) -> list[VideoClip]:
    """Each clip cut in time: its first part is for train, the next for val, the last for test; no frame is in two.

    parts: their shares, which add up to 1; 0 for none. gap: seconds left out between two parts, as neighbouring frames
    are nearly the same. Clips need an end; one shorter than its gaps is train alone.
    Raises UserError for other parts and for a clip without an end.
    """
    if len(parts) != 3 or min(parts) < 0 or abs(sum(parts) - 1) > 1e-6:
        raise UserError(f"parts={list(parts)} must be three shares of train, val and test that add up to 1")
    if not 0 <= gap < math.inf:
        raise UserError(f"gap={gap!r} must be at least 0, in seconds")
    stages = [(split, part) for split, part in zip(SPLITS, parts, strict=True) if part > 0]
    found = []
    for clip in clips:
        if clip.end is None:
            raise UserError(f"{clip.where or clip.name} has no end; a clip that is cut in time needs one")
        length = clip.end - clip.start - gap * (len(stages) - 1)
        if length <= 0:
            found.append(clip._replace(split="train"))
            continue
        start = clip.start
        for number, (split, part) in enumerate(stages):
            last = number == len(stages) - 1
            end = clip.end if last else start + part * length
            found.append(clip._replace(start=start, end=end, split=split))
            start = end + gap
    return found
