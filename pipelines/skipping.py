"""Files that cannot be used: left out of training, counted by cause, and the end of the run when they are many."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from .errors import UserError

MOST_BAD = 0.05


class BadFiles:
    """Counts the files that were skipped, each once, over epochs and the workers of a loader.

    names: of all files. causes: by which they are counted; an error's `cause` that is none of them is the last one.
    files: what they are called, "audio files". most: the part of them that may be bad. Copies in workers count into the
    same memory.
    """

    def __init__(self, names: Iterable[str], causes: Sequence[str], *, files: str, most: float = MOST_BAD) -> None:
        self._places = {name: place for place, name in enumerate(dict.fromkeys(names))}
        self.known, self.files, self.most = tuple(causes), files, most
        # 0 or 1 + the place of its cause: a write of the same value by two workers needs no lock
        self._found = torch.zeros(len(self._places), dtype=torch.uint8).share_memory_()

    def skip(self, name: str, error: Exception) -> None:
        """Count a file, with a line on stderr the first time. Raises UserError when too many are bad."""
        place = self._places[name]
        if not self._found[place]:
            cause = getattr(error, "cause", None)
            self._found[place] = 1 + self.known.index(cause if cause in self.known else self.known[-1])
            print(f"skipped: {error}", file=sys.stderr, flush=True)
        self.check()

    @property
    def causes(self) -> dict[str, int]:
        """Skipped files by cause."""
        counts = Counter(self._found.tolist())
        return {cause: counts[number] for number, cause in enumerate(self.known, 1) if counts[number]}

    def report(self) -> str:
        """A line for the results; empty where nothing was skipped."""
        causes = self.causes
        if not causes:
            return ""
        several = ", ".join(f"{number:,} {cause}" for cause, number in causes.items())
        return f"{sum(causes.values()):,} of {len(self._places):,} {self.files} were skipped: {several}"

    def check(self) -> None:
        """Raise UserError when more files are bad than may be."""
        bad = int(self._found.count_nonzero())
        if bad > self.most * len(self._places):
            names = list(self._places)
            first = names[int(self._found.nonzero()[0])]
            raise UserError(f"{self.report()}, more than {self.most:.0%}; the first is {first}")
