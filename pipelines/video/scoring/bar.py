"""Progress over the frames of a video: a bar on a terminal, lines in a log, as in training."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ...progress import KINDS, PlainProgress, Rate, RichProgress


class _Live(RichProgress):
    def _values(self) -> str:
        return ""


class _Lines(PlainProgress):
    def _values(self) -> str:
        return ""


@contextmanager
def frame_bar(label: str, frames: int, batch_size: int, kind: bool | str = True) -> Iterator[Callable[[int], None]]:
    """Give a function to call with the number of frames that are through; kind: of pipelines/progress.py, True: "auto",
    False: "none"."""
    chosen = {True: "auto", False: "none"}.get(kind, kind) if isinstance(kind, bool) else kind
    if chosen not in KINDS:
        raise ValueError(f"progress={kind!r} is unknown; choose from {', '.join(KINDS)}")
    if chosen == "none":
        yield lambda number: None
        return
    live = chosen == "rich" or (chosen == "auto" and sys.stdout.isatty())
    bar = _Live() if live else _Lines()
    rate = Rate(unit="frames")
    rate.reset()
    bar._rates.append((rate, time.monotonic()))
    batches, done = -(-frames // batch_size), 0
    bar.begin(label, batches)

    def through(number: int) -> None:
        nonlocal done
        done += 1
        rate.add(number)
        bar.advance(done, batches)

    try:
        yield through
    finally:
        bar.finish()
