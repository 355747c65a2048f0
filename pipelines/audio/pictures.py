"""Pictures of recordings: a timeline of true and found events."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..pictures import MODEL, TRUTH, can_draw, new_figure

# Recordings are broken into rows of so many seconds, at most so many rows.
ROW_SECONDS, MOST_ROWS = 60.0, 10
_HEIGHT = 0.36  # of a bar, a label being 1 high


def plot_timeline(
    truth: Sequence[tuple[float, float, int]] | None,
    found: Sequence[tuple[float, float, int]],
    labels: Sequence[str],
    path: str | Path,
    *,
    seconds: float,
    title: str = "",
    row_seconds: float = ROW_SECONDS,
) -> Path | None:
    """Draw when each label sounds, the truth in black over what was found in blue; in rows of `row_seconds`.

    truth, found: start and end in seconds and number of the label; truth None where it is not known. A recording longer
    than MOST_ROWS rows is drawn up to there, and the title says so. Returns None without matplotlib.
    """
    if not can_draw("the timeline"):
        return None
    rows = min(max(1, -int(-seconds // row_seconds)), MOST_ROWS)
    wide = min(row_seconds, seconds)
    with new_figure(path) as figure:
        figure.set_size_inches(11, 0.7 + rows * max(0.9, 0.14 * len(labels) + 0.3))
        axes = figure.subplots(rows, 1, squeeze=False)[:, 0]
        for row, axis in enumerate(axes):
            begin = row * wide
            draw_spans(axis, truth, found, begin, begin + wide)
            axis.set_yticks(range(len(labels)), labels, fontsize=6)
            axis.set_xlim(begin, begin + wide)
            axis.set_ylim(len(labels) - 0.4, -0.6)
        axes[-1].set_xlabel("seconds")
        if seconds > rows * wide + 1e-6:
            title += f" (the first {rows * wide:g} of {seconds:g} seconds)"
        axes[0].set_title(title)
        handles, names = axes[0].get_legend_handles_labels()
        if names:
            figure.legend(handles, names, loc="outside upper right", ncols=2)
    return Path(path)


def draw_spans(
    axis: Any,
    truth: Sequence[tuple[float, float, int]] | None,
    found: Sequence[tuple[float, float, int]],
    begin: float,
    end: float,
) -> None:
    """Bars of the spans that overlap begin .. end: each label a line, the truth in its upper half."""
    sides = ((truth, "truth", TRUTH, -_HEIGHT), (found, "found", MODEL, 0.02))
    for spans, name, colour, shift in sides:
        if spans is None:
            continue
        here = [span for span in spans if span[0] < end and span[1] > begin]
        axis.barh(
            [label + shift + _HEIGHT / 2 for _, _, label in here],
            [stop - start for start, stop, _ in here],
            left=[start for start, _, _ in here],
            height=_HEIGHT,
            color=colour,
            linewidth=0,
            label=name,
        )
