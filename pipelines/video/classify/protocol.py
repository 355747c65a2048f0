"""Which frames of a clip are looked at, and splits for sets so small that a clip has to be cut in pieces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...errors import UserError
from ..clips import VideoClip


class Sampling(NamedTuple):
    """num_frames: of every clip. fps: in place of it so many a second, at most max_frames."""

    num_frames: int | None = 32
    fps: float | None = None
    max_frames: int = 256

    def times(self, start: float, end: float, random: np.random.Generator | None = None) -> np.ndarray:
        """Seconds at which a clip is looked at, float64, rising: the middles of equal parts of start .. end, with
        random anywhere in each of them."""
        number = self.num_frames
        if number is None:
            number = min(max(round((end - start) * float(self.fps or 1.0)), 1), self.max_frames)
        place = np.full(number, 0.5) if random is None else random.random(number)
        return start + (np.arange(number) + place) * ((end - start) / number)


def leave_out(
    clips: Sequence[VideoClip], *, parts: int, held_out: int, fold: int = 0, gap: float = 0.0
) -> list[VideoClip]:
    """Leave-k-out in time: each clip cut in `parts` equal pieces of which `held_out` are for test, one is for val.

    For sets with a single clip of each label, where no whole clip can be held out. Fold f tests the pieces f, f + parts
    / held_out, f + 2 parts / held_out, ...; the one behind f is for val. The folds 0 .. parts / held_out - 1 test every
    piece once. gap: seconds cut off pieces of val and test at both ends, so that neighbouring frames, nearly the same,
    are not on both sides. What is measured is whether a piece of a known recording is recognised, by whatever is seen
    in it; it says nothing of new recordings. Clips need an end.
    Raises UserError for numbers that do not go together, and for a clip whose pieces are not longer than the gaps.
    """
    if held_out < 1 or parts % held_out or parts // held_out < 3:
        raise UserError(
            f"data.leave_out={held_out} of data.leave_parts={parts} pieces: parts must be three or more times as many, "
            f"and a multiple; the nearest is {max(3, parts // max(held_out, 1)) * max(held_out, 1)}"
        )
    step = parts // held_out
    if not 0 <= fold < step:
        raise UserError(f"data.fold={fold} must be from 0 to {step - 1}: {parts} pieces, {held_out} held out at a time")
    found = []
    for clip in clips:
        if clip.end is None:
            raise UserError(f"{clip.where or clip.name} has no end; a clip that is cut in time needs one")
        length = (clip.end - clip.start) / parts
        if not 2 * gap < length:
            raise UserError(
                f"{clip.where or clip.name}: {parts} pieces of {clip.end - clip.start:.3g} seconds are not longer than "
                f"two gaps of data.gap={gap:g} seconds"
            )
        for piece in range(parts):
            split = "test" if piece % step == fold else "val" if piece == (fold + 1) % parts else "train"
            cut = 0.0 if split == "train" else gap
            start = clip.start + piece * length
            found.append(clip._replace(start=start + cut, end=start + length - cut, split=split))
    return found
