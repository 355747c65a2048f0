"""Videos that cannot be used, counted by cause, and clips whose files can be opened."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .. import skipping
from .clips import ROUNDING, VideoClip, at_row
from .faults import CAUSES, VideoError
from .reader import open_video


class BadFiles(skipping.BadFiles):
    """Counts videos that were skipped: see the base class."""

    def __init__(self, names: Iterable[str], *, most: float = skipping.MOST_BAD) -> None:
        super().__init__(names, CAUSES, files="videos", most=most)


def checked_clips(
    clips: Sequence[VideoClip], bad: BadFiles | None = None, *, backend: str = "auto", tolerance: float = ROUNDING
) -> list[VideoClip]:
    """The clips whose files can be opened and have their spans, each with an end: that of the file where a clip has
    none or where a table rounds it up.

    Each file is opened once. bad: what cannot be opened is left out and counted; None: it is an error. tolerance:
    seconds by which a span may end after its file.
    Raises VideoError, naming the row, for a span that ends after its file.
    """
    found: dict[str, float | VideoError] = {}
    kept = []
    for clip in clips:
        if clip.name not in found:
            found[clip.name] = _duration(clip, backend)
        duration = found[clip.name]
        if isinstance(duration, VideoError):
            if bad is None:
                raise at_row(duration, clip)
            bad.skip(clip.name, at_row(duration, clip))
            continue
        end = duration if clip.end is None else clip.end
        if end > duration + tolerance or clip.start >= duration:
            message = (
                f"the span from {clip.start:g} to {end:g} seconds ends after {clip.name}, which has {duration:.6g} "
                "seconds"
            )
            raise at_row(VideoError(message, "span"), clip)
        kept.append(clip._replace(end=min(end, duration)))
    return kept


def _duration(clip: VideoClip, backend: str) -> float | VideoError:
    try:
        with open_video(clip.path, backend=backend) as reader:
            return float(reader.duration)
    except VideoError as error:
        return error
