"""Pictures of recordings: true and found events in time, and what was found in a spectrogram."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..pictures import MODEL, OTHERS, TRUTH, can_draw, new_figure
from .overview import Overview

# Recordings are broken into rows of so many seconds, at most so many rows.
ROW_SECONDS, MOST_ROWS, MOST_LABELS = 60.0, 10, 30
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
    than MOST_ROWS rows is drawn up to there, and of more than MOST_LABELS labels those that sound most often; the title
    says so. Returns None without matplotlib.
    """
    if not can_draw("the timeline"):
        return None
    if len(labels) > MOST_LABELS:
        counts = Counter(label for _, _, label in [*(truth or ()), *found])
        chosen = sorted(label for label, _ in counts.most_common(MOST_LABELS))
        place = {label: number for number, label in enumerate(chosen)}
        title += f" ({len(chosen)} of {len(labels):,} labels)"
        labels = [labels[label] for label in chosen]
        found = [(start, end, place[label]) for start, end, label in found if label in place]
        truth = None if truth is None else [(a, b, place[label]) for a, b, label in truth if label in place]
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


def plot_recording(
    overview: Overview,
    found: Sequence[tuple[float, float, int, float]],
    labels: Sequence[str],
    path: str | Path,
    *,
    title: str = "",
) -> Path | None:
    """Draw a recording of any length on one axis of time: its spectrogram with the found spans, the spans of each
    label, and the largest score of each label in every column.

    found: start and end in seconds, number of the label, score. Returns None without matplotlib.
    """
    if not can_draw("the recording"):
        return None
    scale, unit = (60.0, "minutes") if overview.seconds > 300 else (1.0, "seconds")
    end = overview.seconds / scale
    lines = max(len(labels), 1)
    heights = [2.2, 0.35 + 0.16 * lines, 0.35 + 0.16 * lines]
    with new_figure(path) as figure:
        figure.set_size_inches(11, 1.2 + sum(heights))
        top, middle, bottom = figure.subplots(3, 1, sharex=True, height_ratios=heights)
        levels = overview.spectrogram
        low, high = np.nanpercentile(levels, [5, 99.5]) if np.isfinite(levels).any() else (-100.0, 0.0)
        top.imshow(
            levels,
            origin="lower",
            aspect="auto",
            cmap="magma",
            vmin=low,
            vmax=max(high, low + 1),
            extent=(0, end, 0, levels.shape[0]),
        )
        top.grid(False)
        top.set_ylabel("mel band")
        written = -end
        for start, stop, label, _ in sorted(found):
            top.axvspan(start / scale, stop / scale, ymin=0.93, color=OTHERS[label % len(OTHERS)], linewidth=0)
            centre = (start + stop) / 2 / scale
            if centre - written > end / 60:  # names that would cover each other are below
                style = {"color": "white", "fontsize": 7, "ha": "center", "va": "top"}
                top.text(centre, 0.9 * levels.shape[0], labels[label][:10], **style)
                written = centre
        thin = end / 1500  # narrower would not be seen
        for label in range(len(labels)):
            own = [(start / scale, max((stop - start) / scale, thin)) for start, stop, k, _ in found if k == label]
            middle.broken_barh(own, (label - 0.4, 0.8), color=OTHERS[label % len(OTHERS)], linewidth=0)
        middle.set_ylabel("found")
        image = bottom.imshow(
            overview.scores.T,
            aspect="auto",
            cmap="Blues",
            vmin=0,
            vmax=1,
            interpolation="nearest",
            extent=(0, end, len(labels) - 0.5, -0.5),
        )
        bottom.grid(False)
        bottom.set_ylabel("score")
        figure.colorbar(image, ax=[top, middle, bottom], label="probability", shrink=0.5, pad=0.01)
        for axis in (middle, bottom):
            axis.set_yticks(range(len(labels)), [name[:18] for name in labels], fontsize=6)
            axis.set_ylim(len(labels) - 0.5, -0.5)
        bottom.set_xlim(0, end)
        bottom.set_xlabel(unit)
        figure.suptitle(title, x=0.01, ha="left", fontsize=10)
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
