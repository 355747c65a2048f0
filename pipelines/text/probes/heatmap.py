"""Heat maps of probe scores: length against depth, or against tasks or models."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...pictures import can_draw, new_figure

MAX_NUMBERS = 13  # columns up to which the cells carry their numbers


def plot_accuracy_grid(
    rows: Sequence[Mapping[str, Any]],
    path: str | Path,
    *,
    x: str = "length",
    y: str = "depth",
    panel: str | None = "task",
    value: str = "mean",
    label: str = "accuracy",
    unit: str = "bytes",
    title: str = "",
) -> Path | None:
    """A panel for each value of `panel`, `x` to the right, `y` downwards, the score from 0 (light) to 1 (dark blue).

    rows: as `accuracy_grid` gives them; a cell without a row stays hatched. x, y, panel: their keys (panel None: one
    panel); rows whose `y` is None are left out. value: the key of the score, 0 to 1. label: its name. unit: of the
    lengths. Cells carry the score in percent where there is room. Returns the path, None without matplotlib.
    Raises ValueError where no row has a `y`.
    """
    if not can_draw("the probes"):
        return None
    rows = [row for row in rows if row.get(y) is not None]
    if not rows:
        raise ValueError(f"no row has a {y}: there is nothing to draw")
    panels = list(dict.fromkeys(row[panel] if panel else "" for row in rows))
    columns, lines = _ordered(rows, x), _ordered(rows, y)
    across = min(len(panels), 3 if len(columns) <= 8 else 2)
    down = math.ceil(len(panels) / across)
    with new_figure(path) as figure:
        few = len(columns) <= MAX_NUMBERS
        width = across * max(2.6, (0.46 if few else 0.2) * len(columns) + 0.9) + 1.1
        figure.set_size_inches(width, down * max(1.5, (0.27 if few else 0.14) * len(lines) + 0.9) + 0.5)
        axes = figure.subplots(down, across, squeeze=False, sharey=True).ravel()
        for axis in axes[len(panels) :]:
            axis.remove()
        for i, name in enumerate(panels):
            cells = np.full((len(lines), len(columns)), np.nan)
            for row in rows:
                if not panel or row[panel] == name:
                    cells[lines.index(row[y]), columns.index(row[x])] = row[value]
            image = _draw_cells(axes[i], cells)
            axes[i].set_title(str(name), fontweight="bold")
            _label(axes[i].xaxis, _ticks(columns), MAX_NUMBERS, rotation=45 if len(columns) > 6 and few else 0)
            _label(axes[i].yaxis, [f"{100 * v:.0f} %" for v in lines] if y == "depth" else _ticks(lines), 21)
            if i + across >= len(panels):
                axes[i].set_xlabel(f"{x}, {unit}" if x == "length" else x)
            if i % across == 0 and y == "depth":
                axes[i].set_ylabel(y)
        bar = figure.colorbar(image, ax=list(axes[: len(panels)]), fraction=0.2 / width, pad=0.01, ticks=[0, 0.5, 1])
        bar.ax.set_yticklabels(["0", "50", "100"])
        bar.set_label(f"{label}, %")
        bar.outline.set_visible(False)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    return Path(path)


def _draw_cells(axis: Any, cells: np.ndarray) -> Any:
    axis.set_facecolor("#f2f2f2")
    axis.grid(False)
    axis.tick_params(length=0)
    for side in axis.spines.values():
        side.set_visible(False)
    for line, column in zip(*np.nonzero(np.isnan(cells)), strict=True):
        axis.add_patch(_hatched(column, line))
    image = axis.imshow(cells, cmap="Blues", vmin=0, vmax=1, aspect="auto", interpolation="nearest")
    # white lines between the cells, so that equal neighbours are still told apart
    axis.set_xticks(np.arange(cells.shape[1] + 1) - 0.5, minor=True)
    axis.set_yticks(np.arange(cells.shape[0] + 1) - 0.5, minor=True)
    axis.grid(which="minor", color="white", linewidth=1.2)
    axis.tick_params(which="minor", length=0)
    if cells.shape[1] <= MAX_NUMBERS:
        for line, column in zip(*np.nonzero(~np.isnan(cells)), strict=True):
            score = cells[line, column]
            color = "white" if score > 0.55 else "#222222"
            axis.text(column, line, f"{100 * score:.0f}", ha="center", va="center", fontsize=7.5, color=color)
    return image


def _hatched(column: int, line: int) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle((column - 0.5, line - 0.5), 1, 1, fill=False, hatch="////", edgecolor="#cccccc", linewidth=0)


def _ordered(rows: Sequence[Mapping[str, Any]], key: str) -> list[Any]:
    """The values of a key: numbers ascending, names in the order of their first appearance."""
    values = list(dict.fromkeys(row[key] for row in rows))
    return values if any(isinstance(v, str) for v in values) else sorted(values)


def _label(axis: Any, names: Sequence[str], most: int, **how: Any) -> None:
    """A name at every place, or at every second, third ... where there are more than `most`."""
    step = math.ceil(len(names) / most)
    axis.set_ticks(range(0, len(names), step), names[::step], **how)


def _ticks(values: Sequence[Any]) -> list[str]:
    """Lengths as 512, 4k, 1M: of 1024 where all large ones are multiples of it, of 1000 likewise, else in full."""
    if any(isinstance(value, str) for value in values):
        return [str(value) for value in values]
    for kilo in (1024, 1000):
        if all(value < kilo or value % kilo == 0 for value in values):
            return [_short(value, kilo) for value in values]
    return [f"{value:,.10g}" for value in values]


def _short(value: float, kilo: int) -> str:
    for power, suffix in ((2, "M"), (1, "k")):
        if value >= kilo**power and value % kilo**power == 0:
            return f"{value // kilo**power:g}{suffix}"
    return f"{value:g}"
