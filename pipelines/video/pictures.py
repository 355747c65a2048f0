"""Pictures of a search in videos: scores over time with the spans that were found, and sheets of the chosen frames."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..pictures import MODEL, OTHERS, TRUTH, can_draw, new_figure

MOST_PANELS = 8  # queries in a timeline
MOST_PICTURES = 64  # in a sheet
_COLUMNS = 900  # of a timeline; more scores are drawn as their range
_STEPS = (1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14_400, 28_800, 86_400)  # seconds
_CHOSEN, _FOUND, _PALE = OTHERS[0], OTHERS[1], "#bfe3d7"


def plot_search(
    times: np.ndarray,
    scores: np.ndarray,
    queries: Sequence[str],
    spans: Sequence[Sequence[tuple[float, float, float]]],
    chosen: Sequence[np.ndarray],
    path: str | Path,
    *,
    seconds: float,
    truth: Sequence[Sequence[tuple[float, float]]] | None = None,
    title: str = "",
) -> Path | None:
    """Draw the scores of each query over a video of any length, its spans as bands, the chosen frames as points.

    times: (N,) seconds. scores: (Q, N), NaN of frames that were not looked at. spans: of each query start, end and
    score, the best in the darker colour. chosen: of each query places in `times`. truth: of each query the true spans,
    in black. seconds: of the video. Of long videos each column shows the range and the mean of its scores. Of more than
    MOST_PANELS queries the first are drawn, and the title says so. Returns None without matplotlib.
    """
    if not can_draw("the scores"):
        return None
    shown = min(len(queries), MOST_PANELS)
    if shown < len(queries):
        title += f" (the first {shown} of {len(queries)} queries)"
    with new_figure(path) as figure:
        figure.set_size_inches(11, 0.9 + 1.9 * shown)
        axes = figure.subplots(shown, 1, squeeze=False, sharex=True)[:, 0]
        names: dict[str, Any] = {}
        for number, axis in enumerate(axes):
            looked = np.isfinite(scores[number])
            _draw_scores(axis, times[looked], scores[number][looked], seconds)
            _draw_bands(axis, spans[number], seconds)
            if truth is not None:
                for start, end in truth[number]:
                    axis.axvspan(start, end, ymin=0.96, color=TRUTH, linewidth=0, label="truth")
            places = chosen[number]
            style = {"s": 16, "color": _CHOSEN, "edgecolors": "white", "linewidths": 0.5, "zorder": 4}
            axis.scatter(times[places], scores[number][places], label="chosen frame", **style)
            axis.set_title(_wrapped(queries[number], 130), fontweight="bold")
            axis.set_ylabel("score")
            axis.margins(y=0.12)
            names.update({label: handle for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)})
        axes[-1].set_xlim(0, max(seconds, 1e-3))
        step = next((s for s in _STEPS if seconds / s <= 14), _STEPS[-1])
        if seconds < 1:
            axes[-1].set_xlabel("seconds")
        else:
            ticks = np.arange(0, seconds + 1e-9, step)
            axes[-1].set_xticks(ticks, [clock(tick, whole=True) for tick in ticks])
            axes[-1].set_xlabel("hours:minutes:seconds" if seconds >= 3600 else "minutes:seconds")
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=10)
        figure.legend(names.values(), names.keys(), loc="outside lower right", ncols=len(names))
    return Path(path)


def plot_sheet(
    frames: np.ndarray,
    times: np.ndarray,
    scores: np.ndarray,
    path: str | Path,
    *,
    spans: Sequence[tuple[float, float, float]] = (),
    title: str = "",
) -> Path | None:
    """A contact sheet: frames in the order of time with their times and scores.

    frames: uint8 (n, H, W, 3). times, scores: (n,). spans: start, end and score; frames in the best one have a thick
    edge in the darker colour, in any other one a thin one. Of more than MOST_PICTURES frames those with the best scores
    are shown, and the title says so. Returns None without matplotlib.
    """
    if not can_draw("the chosen frames"):
        return None
    order = np.argsort(times, kind="stable")
    if len(order) > MOST_PICTURES:
        best = np.sort(np.argsort(-scores[order], kind="stable")[:MOST_PICTURES])
        title += f" (the {MOST_PICTURES} best of {len(order)} frames)"
        order = order[best]
    first = max(spans, key=lambda span: span[2]) if spans else None
    height, width = frames.shape[1:3]
    columns = _sheet_columns(len(order), width / height)
    rows = math.ceil(len(order) / columns)
    wide = 12 / columns
    with new_figure(path) as figure:
        lines = _wrapped(title, 120)
        figure.set_size_inches(12, rows * (wide * height / width + 0.3) + 0.28 * (1 + lines.count("\n")))
        figure.get_layout_engine().set(w_pad=0.04, h_pad=0.02, wspace=0, hspace=0)
        axes = figure.subplots(rows, columns, squeeze=False).ravel()
        for axis in axes[len(order) :]:
            axis.remove()
        for axis, place in zip(axes, order, strict=False):
            time, score = float(times[place]), float(scores[place])
            axis.imshow(frames[place], interpolation="antialiased")
            axis.grid(False)
            axis.set_xticks([])
            axis.set_yticks([])
            colour, line = _edge(time, spans, first)
            for spine in axis.spines.values():
                spine.set(visible=True, color=colour, linewidth=line)
            weight = "bold" if line > 2 else "normal"
            axis.set_xlabel(f"{clock(time)}   {score:.3f}", fontsize=9, color=colour, fontweight=weight, labelpad=5)
        figure.suptitle(lines, x=0.01, ha="left", fontsize=10)
    return Path(path)


def clock(seconds: float, *, whole: bool = False) -> str:
    """A time as people write it: "3.2 s", "1:03.2", "1:01:03.2"; whole: "0:03", "1:03", "1:01:03"."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    small = f"{rest // 10:02d}" if whole else f"{rest // 10:02d}.{rest % 10}"
    if hours:
        return f"{hours}:{minutes:02d}:{small}"
    return f"{minutes}:{small}" if whole or minutes else f"{small.removeprefix('0')} s"


def _draw_scores(axis: Any, times: np.ndarray, scores: np.ndarray, seconds: float) -> None:
    """A line, or of more scores than there are columns their range and their mean in each."""
    style = {"color": MODEL, "linewidth": 1.2, "zorder": 3, "label": "score"}
    if len(times) <= _COLUMNS:
        marker = "." if len(times) <= 60 else None
        axis.plot(times, scores, marker=marker, markersize=4, **style)
        return
    columns = np.minimum((times * _COLUMNS / max(seconds, 1e-9)).astype(int), _COLUMNS - 1)
    starts = np.flatnonzero(np.diff(columns, prepend=-1))
    centres = (columns[starts] + 0.5) / _COLUMNS * seconds
    counts = np.diff(np.append(starts, len(times)))
    low, high = np.minimum.reduceat(scores, starts), np.maximum.reduceat(scores, starts)
    axis.fill_between(centres, low, high, color="#9ecae6", linewidth=0, zorder=2, label="lowest to highest")
    axis.plot(centres, np.add.reduceat(scores, starts) / counts, **{**style, "linewidth": 0.8})


def _draw_bands(axis: Any, spans: Sequence[tuple[float, float, float]], seconds: float) -> None:
    thin = seconds / 400  # narrower would not be seen
    best = max(spans, key=lambda span: span[2]) if spans else None
    for span in spans:
        start, end = span[0], max(span[1], span[0] + thin)
        first = span is best
        axis.axvspan(
            start,
            end,
            color=_FOUND if first else _PALE,
            alpha=0.45 if first else 0.6,
            linewidth=0,
            zorder=1,
            label="best span" if first else "span",
        )


def _edge(
    time: float, spans: Sequence[tuple[float, float, float]], best: tuple[float, float, float] | None
) -> tuple[str, float]:
    if best is not None and best[0] <= time <= best[1]:
        return "#00664a", 3.0
    if any(start <= time <= end for start, end, _ in spans):
        return _FOUND, 1.5
    return "#777777", 0.5


def _sheet_columns(number: int, aspect: float) -> int:
    """So many that the sheet is at most about 0.7 times as high as wide."""
    return min(math.ceil(math.sqrt(number / (0.7 * aspect))), number, 8)


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width)[:3]) if text else ""
