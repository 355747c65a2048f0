"""What a test or a forecast leaves behind: rows of scores, a frame, pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from .calendar import future_times
from .data import ForecastData
from .metrics import INTERVALS, find_level, interval_levels
from .module import ForecastModule
from .predict import forecast_frame
from .scores import seasonal_scale

_OVERALL = ("mse", "mae", "rmse", "wql", "crps", "coverage-80", "coverage-90")
_SHOWN_STEPS = 12


def season_scales(data: ForecastData, season: int) -> torch.Tensor:
    """MASE's denominators from the train part, (N, C), original units; NaN for a series without one."""
    table, rows = data.table, data.ranges["train"]
    scales = np.full((table.num_series, len(table.targets)), np.nan)
    for i, (begin, end) in enumerate(rows + table.offsets[:-1, None]):
        for c, target in enumerate(table.targets):
            scales[i, c] = seasonal_scale(table.columns[target][begin:end], season)
    return torch.from_numpy(scales)


def score_rows(results: dict[str, Any], by: str | None = None) -> list[dict[str, Any]]:
    """Rows for tables from {method: {"scaled": ..., "original": ...}}.

    by None: a row per method, scores over everything (scaled units; MASE has none). "channel": a row per channel, MAE
    of every method in original units. "horizon": a row per step ahead, MAE of every method in scaled units.
    """
    if by is None:
        rows = []
        for method, units in results.items():
            scaled, original = units["scaled"]["overall"], units["original"]["overall"]
            row = {"method": method, **{k: scaled[k] for k in _OVERALL if k in scaled}}
            for key in ("mase", "smape"):
                if key in original:
                    row[key] = original[key]
            rows.append(row)
        return rows
    unit, label = ("original", "channel") if by == "channel" else ("scaled", "step")
    first = next(iter(results.values()))[unit]
    names = first["channels"] if by == "channel" else list(range(1, len(first["horizon"]["mae"]) + 1))
    return [
        {label: name, **{method: units[unit][by]["mae"][i] for method, units in results.items()}}
        for i, name in enumerate(names)
    ]


def shown_steps(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """At most a dozen rows of a table by steps ahead, evenly spread, with the first and the last."""
    if len(rows) <= _SHOWN_STEPS:
        return rows
    picks = np.unique(np.linspace(0, len(rows) - 1, _SHOWN_STEPS).round().astype(int))
    return [rows[i] for i in picks]


def forecast_batch(
    module: ForecastModule, batch: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, dict[float, torch.Tensor]]:
    """Point (B, H, C) and quantiles {level: (B, H, C)} in original units."""
    device = module.device
    point, quantiles = module.forecast({k: v.to(device) for k, v in batch.items()})
    series = batch["series"]
    levels = (
        {}
        if quantiles is None
        else {q: module.to_original(quantiles[..., i], series) for i, q in enumerate(module.levels)}
    )
    return module.to_original(point, series), levels


def _intervals(levels: dict[float, np.ndarray]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    known = list(levels)
    found = {}
    for percent in INTERVALS:
        low, high = (find_level(known, q) for q in interval_levels(percent))
        if low is not None and high is not None:
            found[percent] = (levels[known[low]], levels[known[high]])
    return found


def forecast_all(module: ForecastModule, data: ForecastData) -> tuple[pd.DataFrame, dict[str, Any]]:
    """The forecast after the end of every series as a frame, and the arguments of a picture of the first series."""
    dataset = data.dataset("predict")
    points, parts, series, origins = [], [], [], []
    example: dict[str, Any] = {}
    for batch in data.predict_dataloader():
        point, levels = forecast_batch(module, batch)
        points.append(point.numpy())
        parts.append({q: v.numpy() for q, v in levels.items()})
        series.append(batch["series"].numpy())
        origins.append(batch["origin"].numpy())
        if not example:
            example = _example(module, data, dataset, batch, point, levels)
    rows, origin = np.concatenate(series), np.concatenate(origins)
    last = dataset.origin_times(rows, origin)
    times = np.stack([future_times(int(t), data.table.freq, module.schema["pred_len"]) for t in last])
    quantiles = {q: np.concatenate([p[q] for p in parts]) for q in parts[0]}
    ids = [data.table.unique_ids[i] for i in rows]
    return forecast_frame(ids, times, np.concatenate(points), data.table.targets, quantiles), example


def _example(
    module: ForecastModule,
    data: ForecastData,
    dataset: Any,
    batch: dict[str, torch.Tensor],
    point: torch.Tensor,
    levels: dict[float, torch.Tensor],
    row: int = 0,
) -> dict[str, Any]:
    """Arguments of `plot_forecasts` for one window of a batch."""
    table, targets = data.table, list(data.table.targets)
    series, origin = int(batch["series"][row]), int(batch["origin"][row])
    first, steps = int(table.offsets[series]) + origin, module.schema["pred_len"]
    past = slice(first - module.schema["seq_len"], first)
    history = np.stack([np.asarray(table.columns[t][past]) for t in targets], axis=-1)
    truth = None
    if "future_target" in batch:
        truth = np.stack([np.asarray(table.columns[t][first : first + steps]) for t in targets], axis=-1)
    last = int(table.times[first - 1])
    one = {q: v[row].numpy() for q, v in levels.items()}
    return {
        "history": history,
        "truth": truth,
        "forecasts": point[row].numpy(),
        "intervals": _intervals(one),
        "channels": [table.unique_ids[series]] if data.any_series else targets,
        "history_times": np.asarray(table.times[past]).astype("datetime64[ns]"),
        "future_times": future_times(last, table.freq, steps).astype("datetime64[ns]"),
    }


@torch.no_grad()
def draw(module: ForecastModule, data: ForecastData, results: dict[str, Any], run_dir: Path) -> None:
    """forecast.png (a window from the middle of the test part) and horizon.png."""
    from ..pictures import plot_error_by_horizon, plot_forecasts

    dataset = data.dataset("test")
    batch = dataset.__getitems__([len(dataset) // 2])
    point, levels = forecast_batch(module, batch)
    name, model = Path(str(data.path)).stem, module.hparams["model"]["name"]
    plot_forecasts(
        **_example(module, data, dataset, batch, point, levels),
        path=run_dir / "forecast.png",
        title=f"{model} on {name}: one window of the test part",
    )
    table = {method: units["scaled"]["horizon"]["mae"] for method, units in results.items()}
    plot_error_by_horizon(table, run_dir / "horizon.png", model=model, title=f"{model} on {name}")
