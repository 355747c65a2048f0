"""Forecasts as a readable table: unique_id, ds, the target and its intervals, in original units."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..atomic import atomic_path
from ..errors import UserError
from .metrics import INTERVALS, interval_levels

if TYPE_CHECKING:
    import pandas as pd

FORMATS = (".csv", ".csv.gz", ".parquet")


def interval_columns(targets: Sequence[str], percent: int) -> list[tuple[str, str]]:
    """Names of the lower and upper bound by target: lo-80, hi-80 with one target, else <target>-lo-80."""
    if len(targets) == 1:
        return [(f"lo-{percent}", f"hi-{percent}")]
    return [(f"{target}-lo-{percent}", f"{target}-hi-{percent}") for target in targets]


def forecast_frame(
    unique_ids: Sequence[str],
    future_times: np.ndarray,
    point: np.ndarray,
    targets: Sequence[str],
    quantiles: Mapping[float, np.ndarray] | None = None,
) -> pd.DataFrame:
    """A row for each series and step ahead, series by series in the order given.

    unique_ids: N names. future_times: (N, H), datetime64 or int64 nanoseconds. point: (N, H, C) in original
    units. quantiles: level -> (N, H, C); the bounds of the 80 % interval are levels 0.1 and 0.9, of the 90 %
    one 0.05 and 0.95. Columns: unique_id, ds, <target>, lo-80, hi-80, lo-90, hi-90; with several targets each
    is followed by its own <target>-lo-80 and so on. An interval whose levels are missing has no columns.
    """
    import pandas as pd

    point = np.asarray(point)
    times = np.asarray(future_times)
    if point.ndim != 3 or point.shape[0] != len(unique_ids) or point.shape[2] != len(targets):
        raise ValueError(f"point has shape {point.shape}, expected ({len(unique_ids)}, H, {len(targets)})")
    if times.shape != point.shape[:2]:
        raise ValueError(f"future_times has shape {times.shape}, expected {point.shape[:2]}")
    number, steps = times.shape
    bounds = _bounds(quantiles or {}, point.shape)

    columns: dict[str, np.ndarray] = {
        "unique_id": np.repeat(np.asarray(unique_ids, dtype=object), steps),
        "ds": times.reshape(number * steps).astype("datetime64[ns]"),
    }
    for c, target in enumerate(targets):
        added = {target: point[:, :, c].reshape(-1)}
        for percent, (lower, upper) in bounds.items():
            low, high = interval_columns(targets, percent)[c]
            added[low], added[high] = lower[:, :, c].reshape(-1), upper[:, :, c].reshape(-1)
        clash = sorted(set(added) & set(columns))
        if clash:
            raise UserError(
                f"target {target!r} would write the column {clash[0]!r} a second time; rename it in the data "
                "(unique_id, ds and names like lo-80 are taken)"
            )
        columns.update(added)
    return pd.DataFrame(columns)


def _bounds(quantiles: Mapping[float, np.ndarray], shape: tuple[int, ...]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """percent -> (lower, upper) for the intervals whose levels are there."""
    for level, values in quantiles.items():
        if np.shape(values) != shape:
            raise ValueError(
                f"the quantile {level} has shape {np.shape(values)}, expected {shape} as the point forecast"
            )
    found = {}
    for percent in INTERVALS:
        pair = [[v for known, v in quantiles.items() if abs(known - q) < 1e-9] for q in interval_levels(percent)]
        if pair[0] and pair[1]:
            found[percent] = (np.asarray(pair[0][0]), np.asarray(pair[1][0]))
    return found


def check_output_path(path: str | Path) -> Path:
    """The path, or UserError before any work is done if `write_frame` could not write there."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"cannot write forecasts to {path}: it is a folder; give a file name in it")
    if not path.name.lower().endswith(FORMATS):
        raise UserError(f"cannot write forecasts to {path}: the name must end in {', '.join(FORMATS)}")
    return path


def write_frame(frame: pd.DataFrame, path: str | Path) -> Path:
    """Write a table as CSV (.csv, .csv.gz) or Parquet (.parquet) by the name of the file, all or nothing."""
    path = check_output_path(path)
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".parquet":
            frame.to_parquet(temporary, index=False)
        else:
            frame.to_csv(temporary, index=False, compression="gzip" if path.suffix.lower() == ".gz" else None)
    return path
