"""Pictures of a run: forecasts against the truth, error by horizon, loss curves, confusion of labels.

matplotlib is an extra. Without it each function logs how to get it and returns None; the run goes on.
"""

from __future__ import annotations

import contextlib
import csv
import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .atomic import atomic_path

log = logging.getLogger("seqzoo")

# Okabe & Ito's colours, told apart with any colour vision: the model in blue, the truth in near black.
TRUTH, MODEL = "#222222", "#0072B2"
# Opaque, so that the legend shows the very colours of the panels, where the bands lie on each other.
BANDS = {80: "#9ecae6", 90: "#d3e6f3"}
OTHERS = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999")
MARKERS = "osD^vP"

STYLE: dict[Any, Any] = {
    "figure.dpi": 150,
    "savefig.dpi": 150,
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#666666",
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e3e3e3",
    "grid.linewidth": 0.6,
    "xtick.color": "#444444",
    "ytick.color": "#444444",
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "figure.constrained_layout.use": True,
}


@contextlib.contextmanager
def new_figure(path: str | Path) -> Iterator[Any]:
    """Give a matplotlib Figure, saved to `path` (all or nothing) at the end; no window system is touched."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(STYLE):
        figure = Figure()
        FigureCanvasAgg(figure)
        yield figure
        with atomic_path(path) as temporary:
            figure.savefig(temporary, format=Path(path).suffix.lstrip(".") or "png")


def can_draw(what: str) -> bool:
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        log.warning("no picture of %s, since matplotlib is missing: pip install seqzoo[plot]", what)
        return False
    return True


def plot_forecasts(
    history: np.ndarray,
    truth: np.ndarray | None,
    forecasts: np.ndarray,
    path: str | Path,
    *,
    intervals: Mapping[int, tuple[np.ndarray, np.ndarray]] | None = None,
    baselines: Mapping[str, np.ndarray] | None = None,
    channels: Sequence[str] | None = None,
    units: Sequence[str] | None = None,
    history_times: np.ndarray | None = None,
    future_times: np.ndarray | None = None,
    title: str = "",
    max_history: int | None = None,
    max_channels: int = 9,
) -> Path | None:
    """One window: the end of its past, then forecast against truth with intervals, a panel a channel.

    history: (L, C), truth: (H, C) or None, forecasts: (H, C), in original units, NaN where missing.
    intervals: percent
    -> (lower, upper), each (H, C). baselines: name -> (H, C). channels, units: C names. times: datetime64
    (L,), (H,); None counts steps. max_history: how many past steps to draw, None for three times H, so that
    the forecast has a quarter of the width. At most `max_channels` panels are drawn. Returns the path, None
    without matplotlib.
    """
    if not can_draw("the forecasts"):
        return None
    steps, width = forecasts.shape
    shown = min(width, max_channels)
    if history_times is None or future_times is None:
        history_times, future_times = np.arange(-len(history) + 1, 1), np.arange(1, steps + 1)
    past = max_history or 3 * steps
    history, history_times = history[-past:], history_times[-past:]
    names = list(channels) if channels is not None else [f"channel {i}" for i in range(width)]
    rows, columns = _grid(shown)

    with new_figure(path) as figure:
        figure.set_size_inches(4.4 * columns if columns > 1 else 7.5, 2.2 * rows + 0.9)
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
        for panel in axes[shown:]:
            panel.remove()
        handles: dict[str, Any] = {}
        for c, panel in enumerate(axes[:shown]):
            drawn = _draw_window(panel, c, history, truth, forecasts, history_times, future_times, intervals, baselines)
            handles.update(drawn)
            panel.set_title(names[c], fontweight="bold")
            panel.set_ylabel(units[c] if units is not None else "value")
            panel.margins(x=0.01)
            panel.set_axisbelow(True)
            bottom_row = c + columns >= shown
            panel.tick_params(labelbottom=bottom_row)
            _time_axis(panel, history_times, bottom_row)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        figure.align_ylabels(axes[:shown])
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=min(len(handles), 6))
    return Path(path)


def _draw_window(
    panel: Any,
    c: int,
    history: np.ndarray,
    truth: np.ndarray | None,
    forecasts: np.ndarray,
    history_times: np.ndarray,
    future_times: np.ndarray,
    intervals: Mapping[int, tuple[np.ndarray, np.ndarray]] | None,
    baselines: Mapping[str, np.ndarray] | None,
) -> dict[str, Any]:
    handles = {}
    # the widest interval first and palest, so that the narrow one lies on it
    for percent in sorted(intervals or {}, reverse=True):
        lower, upper = (intervals or {})[percent]
        color = BANDS[80 if percent <= 80 else 90]
        band = panel.fill_between(future_times, lower[:, c], upper[:, c], color=color, linewidth=0)
        handles[f"{percent} % interval"] = band
    for i, (name, values) in enumerate((baselines or {}).items()):
        (line,) = panel.plot(future_times, values[:, c], color=OTHERS[i % len(OTHERS)], linestyle="--", linewidth=1.1)
        handles[name] = line
    (line,) = panel.plot(future_times, forecasts[:, c], color=MODEL, linewidth=1.8)
    handles["forecast"] = line
    # the truth last, since where the forecast is good they coincide
    (line,) = panel.plot(history_times, history[:, c], color=TRUTH, linewidth=1.1)
    handles["observed"] = line
    if truth is not None:
        # from the last known point on, so that the line does not break at the cut-off
        times = np.concatenate([history_times[-1:], future_times])
        panel.plot(times, np.concatenate([history[-1:, c], truth[:, c]]), color=TRUTH, linewidth=1.1)
    panel.axvline(history_times[-1], color="#888888", linewidth=0.8, linestyle=":")
    return {name: handles[name] for name in sorted(handles, key=_legend_order)}


def _legend_order(name: str) -> tuple[int, str]:
    return {"observed": (0, ""), "forecast": (1, "")}.get(name, (2 if name.endswith("interval") else 3, name))


def _time_axis(panel: Any, times: np.ndarray, label: bool) -> None:
    if np.issubdtype(np.asarray(times).dtype, np.datetime64):
        import matplotlib.dates as dates

        locator = dates.AutoDateLocator(minticks=3, maxticks=6)
        panel.xaxis.set_major_locator(locator)
        panel.xaxis.set_major_formatter(dates.ConciseDateFormatter(locator))
    elif label:
        panel.set_xlabel("steps from the cut-off")


def _grid(panels: int) -> tuple[int, int]:
    columns = 1 if panels <= 2 else 2 if panels <= 4 else 3
    return math.ceil(panels / columns), columns


def plot_error_by_horizon(
    table: Mapping[str, Sequence[float]],
    path: str | Path,
    *,
    metric: str = "MAE",
    unit: str = "scaled units",
    model: str | None = None,
    step: str = "steps ahead",
    title: str = "",
) -> Path | None:
    """Error at each step ahead, the model against the baselines.

    table: name -> H numbers. model: which of the names is the model, None for the first. Lines are told apart
    by marker as well as by colour, and named in the order in which they end. Returns the path, None without
    matplotlib.
    """
    if not can_draw("the error by horizon"):
        return None
    if not table:
        raise ValueError("table is empty: there is no error to draw")
    model = next(iter(table)) if model is None else model
    with new_figure(path) as figure:
        figure.set_size_inches(7.2, 4.2)
        panel = figure.subplots()
        others = [name for name in table if name != model]
        for i, name in enumerate(others):
            values = table[name]
            panel.plot(
                range(1, len(values) + 1),
                values,
                color=OTHERS[i % len(OTHERS)],
                marker=MARKERS[i % len(MARKERS)],
                markersize=3.5,
                markevery=max(1, len(values) // 12),
                linewidth=1.2,
                label=name,
            )
        values = table[model]
        panel.plot(range(1, len(values) + 1), values, color=MODEL, linewidth=2.4, label=model)
        panel.set_xlabel(step)
        panel.set_ylabel(f"{metric} ({unit})")
        panel.set_ylim(bottom=0)
        panel.margins(x=0.02)
        panel.xaxis.get_major_locator().set_params(integer=True, steps=[1, 2, 3, 4, 6, 10])
        if title:
            panel.set_title(title)
        lines, labels = panel.get_legend_handles_labels()
        # in the order in which the lines end, as the eye meets them
        order = sorted(range(len(labels)), key=lambda i: -_last_finite(table[labels[i]]))
        figure.legend([lines[i] for i in order], [labels[i] for i in order], loc="outside right center")
    return Path(path)


def _last_finite(values: Sequence[float]) -> float:
    finite = [v for v in values if v is not None and math.isfinite(v)]
    return finite[-1] if finite else -math.inf


def read_loss_curves(csv_path: str | Path) -> dict[str, tuple[list[float], list[float]]]:
    """Loss curves from a CSV logger's metrics.csv: name -> (steps, values), for "train" and "val".

    Columns are found by name: those that contain "loss", the per-step training loss where the epoch's is
    absent.
    """
    with open(csv_path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    columns = list(rows[0]) if rows else []
    curves = {}
    for curve in ("train", "val"):
        found = [c for c in columns if "loss" in c and c.replace("/", "_").startswith(curve)]
        # the epoch mean beside the step's values says the same with less noise
        found.sort(key=lambda c: (not c.endswith("_epoch"), c))
        if not found:
            continue
        points = [(float(row["step"]), float(row[found[0]])) for row in rows if row.get(found[0])]
        if points:
            steps, values = zip(*points, strict=True)
            curves[curve] = (list(steps), list(values))
    return curves


def plot_loss_curves(csv_path: str | Path, path: str | Path, *, loss: str = "loss", title: str = "") -> Path | None:
    """Training and validation loss over optimizer steps, from Lightning's CSVLogger, with the best marked."""
    if not can_draw("the loss curves"):
        return None
    curves = read_loss_curves(csv_path)
    if not curves:
        log.warning("no picture of the loss curves: %s holds no train or val loss", csv_path)
        return None
    with new_figure(path) as figure:
        figure.set_size_inches(6.4, 3.6)
        panel = figure.subplots()
        for curve, color, label in (("train", MODEL, "training"), ("val", OTHERS[0], "validation")):
            if curve in curves:
                steps, values = curves[curve]
                marker = "o" if len(steps) <= 30 else None
                panel.plot(steps, values, color=color, label=label, marker=marker, markersize=3.5)
        finite = [(v, s) for s, v in zip(*curves.get("val", ([], [])), strict=True) if math.isfinite(v)]
        if finite:
            best, step = min(finite)
            panel.plot([step], [best], "o", markersize=9, mfc="none", mec=OTHERS[0], label=f"best: {best:.4g}")
        panel.set_xlabel("optimizer steps")
        panel.set_ylabel(loss)
        everything = [v for _, values in curves.values() for v in values if math.isfinite(v)]
        if everything and min(everything) > 0 and max(everything) / min(everything) > 20:
            panel.set_yscale("log")
        if title:
            panel.set_title(title)
        figure.legend(loc="outside right center")
    return Path(path)


def plot_curves(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]],
    path: str | Path,
    *,
    title: str = "",
    xlabel: str = "",
    ylabel: str = "",
    log_x: bool = False,
) -> Path | None:
    """A few named curves in one panel; the first in the model's colour."""
    if not can_draw(title or "the curves"):
        return None
    with new_figure(path) as figure:
        figure.set_size_inches(6.4, 3.6)
        panel = figure.subplots()
        for i, (name, (x, y)) in enumerate(curves.items()):
            color = MODEL if i == 0 else OTHERS[(i - 1) % len(OTHERS)]
            panel.plot(x, y, color=color, label=name, marker=MARKERS[i % len(MARKERS)], markersize=3.5)
        if log_x:
            panel.set_xscale("log", base=2)
        panel.set_xlabel(xlabel)
        panel.set_ylabel(ylabel)
        if title:
            panel.set_title(title)
        if len(curves) > 1:
            figure.legend(loc="outside right center")
    return Path(path)


def plot_confusion(
    counts: np.ndarray,
    labels: Sequence[str],
    path: str | Path,
    *,
    title: str = "",
    max_labels: int = 30,
    items: str = "items",
) -> Path | None:
    """A confusion matrix: of the items with a true label (a row), the share that got each answer (a column).

    counts: whole numbers (C, C); a cell has its share and its count. With more than `max_labels` classes only the most
    frequent ones are drawn. Returns the path, None without matplotlib.
    """
    if not can_draw("the confusion matrix"):
        return None
    kept = np.sort(np.argsort(-counts.sum(1), kind="stable")[:max_labels])
    if len(kept) < len(labels):
        title += f" (the {len(kept)} most frequent of {len(labels)} labels)"
    totals = counts[kept].sum(1, keepdims=True)
    counts, names = counts[np.ix_(kept, kept)], [_short(labels[i]) for i in kept]
    shares = counts / np.maximum(totals, 1)
    size = len(names)
    with new_figure(path) as figure:
        cell = 0.55 if size <= 16 else 0.3
        figure.set_size_inches(3.2 + cell * size, 1.9 + 0.8 * cell * size)
        panel = figure.subplots()
        panel.grid(False)
        image = panel.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        for row, column in np.ndindex(counts.shape):
            if counts[row, column] and size <= 16:
                color = "white" if shares[row, column] > 0.6 else TRUTH
                text = f"{shares[row, column]:.0%}\n{counts[row, column]:,}"
                panel.text(column, row, text, ha="center", va="center", color=color, fontsize=6.5)
        long = max(map(len, names)) > 3
        panel.set_xticks(range(size), names, rotation=45 if long else 0, ha="right" if long else "center")
        panel.set_yticks(range(size), [f"{name} ({int(n):,})" for name, n in zip(names, totals[:, 0], strict=True)])
        panel.set_xlabel("answered")
        panel.set_ylabel(f"true label ({items})")
        figure.colorbar(image, ax=panel, label="share of the true label", shrink=0.8)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=10)
    return Path(path)


def _short(name: str, longest: int = 18) -> str:
    return name if len(name) <= longest else f"{name[: longest - 3]}..."
