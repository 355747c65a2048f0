"""Rolling-origin backtest: forecasts from many cut-offs of each series in one batched pass, no refit."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..atomic import atomic_path
from .metrics import INTERVALS, interval_levels
from .predict import check_output_path

if TYPE_CHECKING:
    import pandas as pd

# (batch) -> point (B, H, C) and quantiles level -> (B, H, C) (None for a point model), in original units
PredictBatch = Callable[[dict[str, Any]], tuple[Any, Mapping[float, Any] | None]]


def rolling_origins(
    length: int, seq_len: int, pred_len: int, step: int = 1, num_windows: int | None = None
) -> np.ndarray:
    """The cut-offs of a series of `length` rows: int64 rows of the first step to forecast, ascending.

    The last window ends with the series; the others lie `step` rows before each other, as many as have
    seq_len rows of past, at most `num_windows` (the latest). Empty for a series shorter than seq_len +
    pred_len.
    """
    for name, value in (("seq_len", seq_len), ("pred_len", pred_len), ("step", step)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if num_windows is not None and num_windows < 1:
        raise ValueError(f"num_windows={num_windows} must be at least 1, or None for all")
    possible = max(0, (length - pred_len - seq_len) // step + 1) if length >= seq_len + pred_len else 0
    number = possible if num_windows is None else min(possible, num_windows)
    return length - pred_len - step * np.arange(number - 1, -1, -1, dtype=np.int64)


def backtest_ranges(
    lengths: Sequence[int], seq_len: int, pred_len: int, step: int = 1, num_windows: int | None = None
) -> np.ndarray:
    """Row ranges int64 (N, 2) of each series in which a WindowDataset of stride `step` has those windows.

    start == stop for a series too short for one window.
    """
    ranges = np.zeros((len(lengths), 2), dtype=np.int64)
    for i, length in enumerate(lengths):
        origins = rolling_origins(int(length), seq_len, pred_len, step, num_windows)
        if len(origins):
            ranges[i] = origins[0] - seq_len, length
    return ranges


def backtest_frames(
    predict_batch: PredictBatch,
    dataset: Any,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 256,
    progress: Callable[[int, int, float], None] | None = None,
) -> Iterator[pd.DataFrame]:
    """One tidy frame a batch, so that memory holds one batch however many cut-offs there are.

    predict_batch: see `PredictBatch`. dataset: a WindowDataset, with `table` and `__getitems__`. indices:
    which of its windows, None for all. progress: called with (windows done, windows in all, seconds left)
    after each batch. Columns: unique_id, cutoff (the last known time), ds, step (1 ... H), target, y (NaN
    where unknown), forecast, and lo-80, hi-80, lo-90, hi-90 as far as the levels are there.
    """
    import torch

    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} must be at least 1")
    total = len(dataset) if indices is None else len(indices)
    began = time.perf_counter()
    for start in range(0, total, batch_size):
        chosen = range(start, min(start + batch_size, total))
        batch = dataset.__getitems__([int(i if indices is None else indices[i]) for i in chosen])
        with torch.no_grad():
            point, quantiles = predict_batch(batch)
        yield _tidy(dataset.table, batch, _array(point), {q: _array(v) for q, v in (quantiles or {}).items()})
        if progress is not None:
            done = chosen[-1] + 1
            progress(done, total, (time.perf_counter() - began) / done * (total - done))


def backtest(
    predict_batch: PredictBatch,
    dataset: Any,
    *,
    indices: Sequence[int] | None = None,
    batch_size: int = 256,
    progress: Callable[[int, int, float], None] | None = None,
) -> pd.DataFrame:
    """All frames of `backtest_frames` in one; `write_frames` takes those that memory should not hold."""
    import pandas as pd

    frames = list(backtest_frames(predict_batch, dataset, indices=indices, batch_size=batch_size, progress=progress))
    if not frames:
        raise ValueError("the dataset has no window to forecast: every series is shorter than seq_len + pred_len")
    return pd.concat(frames, ignore_index=True)


def _array(value: Any) -> np.ndarray:
    return value.detach().cpu().numpy() if hasattr(value, "detach") else np.asarray(value)


def _tidy(table: Any, batch: Mapping[str, Any], point: np.ndarray, quantiles: dict[float, np.ndarray]) -> pd.DataFrame:
    import pandas as pd

    series, origin = _array(batch["series"]), _array(batch["origin"])
    number, steps, width = point.shape
    if width != len(table.targets):
        raise ValueError(f"the forecast has {width} channels, the table {len(table.targets)} targets")
    first = table.offsets[series] + origin  # row of the table
    rows = first[:, None] + np.arange(steps)
    count = width * steps

    def spread(per_step: np.ndarray) -> np.ndarray:
        """(B, H) -> one value for each row of the frame: window, then target, then step."""
        return np.repeat(per_step[:, None], width, axis=1).reshape(-1)

    def flat(values: np.ndarray) -> np.ndarray:
        return values.transpose(0, 2, 1).reshape(-1)

    known = np.stack([np.asarray(table.columns[target])[rows] for target in table.targets], axis=-1)
    targets = np.tile(np.repeat(np.arange(width), steps), number)
    columns: dict[str, Any] = {
        # codes, not strings: a name repeated for every step would be most of the memory
        "unique_id": pd.Categorical.from_codes(np.repeat(series, count), categories=list(table.unique_ids)),
        "cutoff": np.repeat(np.asarray(table.times[first - 1]), count).astype("datetime64[ns]"),
        "ds": spread(np.asarray(table.times[rows])).astype("datetime64[ns]"),
        "step": np.tile(np.arange(1, steps + 1, dtype=np.int32), number * width),
        "target": pd.Categorical.from_codes(targets, categories=list(table.targets)),
        "y": flat(known),
        "forecast": flat(point),
    }
    for percent in INTERVALS:
        for side, level in zip(("lo", "hi"), interval_levels(percent), strict=True):
            for known_level, values in quantiles.items():
                if abs(known_level - level) < 1e-9:
                    columns[f"{side}-{percent}"] = flat(values)
    return pd.DataFrame(columns)


def write_frames(frames: Iterable[pd.DataFrame], path: str | Path) -> int:
    """Write frames one after another to a CSV or Parquet file, all or nothing; returns the number of rows."""
    path = check_output_path(path)
    rows = 0
    with atomic_path(path) as temporary:
        if path.suffix.lower() == ".parquet":
            import pyarrow as pa
            import pyarrow.parquet as pq

            writer = None
            try:
                for frame in frames:
                    block = pa.Table.from_pandas(frame, preserve_index=False)
                    writer = writer or pq.ParquetWriter(temporary, block.schema)
                    writer.write_table(block)
                    rows += len(frame)
            finally:
                if writer is not None:
                    writer.close()
        else:
            compression = "gzip" if path.suffix.lower() == ".gz" else None
            for frame in frames:
                # pandas would choose a format for each frame, dates alone where all its times are midnight
                whole = all((frame[c].dt.microsecond == 0).all() for c in ("cutoff", "ds"))
                form = "%Y-%m-%d %H:%M:%S" if whole else "%Y-%m-%d %H:%M:%S.%f"
                options = {
                    "header": rows == 0,
                    "index": False,
                    "compression": compression,
                    "date_format": form,
                }
                frame.to_csv(temporary, mode="a", **options)
                rows += len(frame)
    return rows


def backtest_summary(frame: pd.DataFrame, by: str | Sequence[str] = ("target",)) -> pd.DataFrame:
    """Errors of a backtest by any of unique_id, cutoff, step and target; () gives one row.

    Columns: the groups, windows, count (known targets), mae, rmse, smape (0 to 2), bias (mean forecast - y)
    and coverage-80/90 where there are intervals.
    """
    import pandas as pd

    by = [by] if isinstance(by, str) else list(by)
    wrong = [column for column in by if column not in ("unique_id", "cutoff", "step", "target")]
    if wrong:
        raise ValueError(f"cannot summarise by {wrong[0]!r}; choose from unique_id, cutoff, step, target")
    seen = frame[frame["y"].notna()]
    y, forecast = seen["y"].astype("float64"), seen["forecast"].astype("float64")
    error = forecast - y
    size = y.abs() + forecast.abs()
    parts = {"count": 1.0, "mae": error.abs(), "rmse": error**2, "bias": error}
    parts["smape"] = (2 * error.abs() / size).where(size > 0, 0.0)
    for percent in INTERVALS:
        if f"lo-{percent}" in seen:
            inside = (y >= seen[f"lo-{percent}"]) & (y <= seen[f"hi-{percent}"])
            parts[f"coverage-{percent}"] = inside.astype("float64")
    table = pd.DataFrame(parts, index=seen.index)
    keys = [seen[column] for column in by] or [pd.Series(0, index=seen.index, name="all")]
    grouped = table.groupby(keys, observed=True, sort=True)
    means = grouped.mean()
    means["count"] = grouped.size()
    means["rmse"] = means["rmse"] ** 0.5
    # a window is a series and a cut-off, however many targets and steps of it are known
    windows = seen[["unique_id", "cutoff"]].groupby(keys, observed=True, sort=True)
    means.insert(0, "windows", windows.apply(lambda group: len(group.drop_duplicates())))
    return means.reset_index(drop=not by)
