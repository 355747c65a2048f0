"""Which rows of each series are for training, validation, test and prediction.

Ranges are int64 (N, 2), rows [begin, end) within each series. A range holds whole windows: its first seq_len
rows are context only, so validation and test ranges begin seq_len rows before their block.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from .calendar import same_frequency
from .readers import near
from .tables import SeriesTable

logger = logging.getLogger("seqzoo")
PROTOCOLS = ("ratio", "ett_hour", "ett_minute")
SHORT_SERIES = ("error", "skip")
_ETT_STEPS = {"ett_hour": ("h", 1), "ett_minute": ("15min", 4)}
_MONTH = 30 * 24  # hours of the months in which the ETT protocol counts


def split_ranges(
    table: SeriesTable,
    *,
    seq_len: int,
    pred_len: int,
    protocol: str = "ratio",
    ratio: Sequence[float] = (0.7, 0.1, 0.2),
    short_series: str = "error",
) -> dict[str, np.ndarray]:
    """Ranges by stage: {"train", "val", "test"} -> int64 (N, 2).

    "ratio": of n rows of history, the first int(n * train) are for training, the last int(n * test) for test,
    those between for validation. "ett_hour" and "ett_minute": 12/4/4 months of 30 days from the start of the
    file (Informer, arXiv:2012.07436), steps of an hour and of 15 minutes; later rows are unused. A series too
    short for a stage is an error, or with short_series="skip" left out of that stage. Raises UserError.
    """
    if protocol not in PROTOCOLS:
        raise UserError(f"data.split={protocol!r} is unknown.{near(protocol, PROTOCOLS)}")
    if short_series not in SHORT_SERIES:
        raise UserError(f"data.short_series={short_series!r} is unknown.{near(short_series, SHORT_SERIES)}")
    if protocol == "ratio":
        shares = _check_ratio(ratio)
        sizes = np.array([ratio_sizes(int(n), shares) for n in table.history]).reshape(-1, 3)
    else:
        shares = (0.6, 0.2, 0.2)
        sizes = np.tile(_ett_sizes(table, protocol), (table.num_series, 1))
    ends = np.cumsum(sizes, axis=1)
    begins = np.stack([np.zeros_like(ends[:, 0]), ends[:, 0] - seq_len, ends[:, 1] - seq_len], axis=1).clip(0)
    ranges = {stage: np.stack([begins[:, i], ends[:, i]], axis=1) for i, stage in enumerate(("train", "val", "test"))}
    for share, (stage, rows) in zip(shares, ranges.items(), strict=True):
        if share == 0:
            rows[:] = 0
            continue
        short = rows[:, 1] - rows[:, 0] < seq_len + pred_len
        if not short.any():
            continue
        if short_series == "error":
            _refuse(table, int(short.argmax()), stage, seq_len, pred_len, shares if protocol == "ratio" else None)
        rows[short] = 0
        if short.all():
            raise UserError(f"all {len(short)} series of {table.source} are too short for the {stage} part")
        logger.warning("%d of %d series are too short for the %s part: left out", short.sum(), len(short), stage)
    return ranges


def predict_ranges(table: SeriesTable, *, seq_len: int, short_series: str = "error") -> np.ndarray:
    """The last seq_len rows of each history, int64 (N, 2). Raises UserError for a shorter history."""
    short = table.history < seq_len
    if short.any():
        first = int(short.argmax())
        if short_series == "error" or short.all():
            raise UserError(
                f"{_series(table, first)} of {table.source} has {table.history[first]} rows of history, a "
                "forecast needs "
                f"{seq_len} (data.seq_len); give it more history"
                + ("" if short.all() else " or set data.short_series=skip")
            )
        logger.warning("%d of %d series have fewer than %d rows: no forecast", short.sum(), len(short), seq_len)
    return np.where(short[:, None], 0, np.stack([table.history - seq_len, table.history], axis=1))


def ratio_sizes(rows: int, ratio: Sequence[float]) -> tuple[int, int, int]:
    """Rows of the three parts as Informer's data loader cuts them; a share of 0 gets none."""
    train, test = int(rows * ratio[0]), int(rows * ratio[2])
    if ratio[1] == 0:
        # Without validation the rounding belongs to the last part that there is.
        return (rows - test, 0, test) if ratio[2] == 0 else (train, 0, rows - train)
    return train, rows - train - test, test


def _check_ratio(ratio: Sequence[float]) -> tuple[float, float, float]:
    try:
        shares = tuple(float(share) for share in ratio)
    except (TypeError, ValueError):
        shares = ()
    if len(shares) != 3 or shares[0] <= 0 or min(shares) < 0 or not math.isclose(sum(shares), 1, abs_tol=1e-6):
        raise UserError(
            f"data.split_ratio={list(ratio)} must be three shares (train, val, test) that sum to 1, train "
            "above 0; for "
            "example [0.7,0.1,0.2]"
        )
    return shares[0], shares[1], shares[2]


def _ett_sizes(table: SeriesTable, protocol: str) -> np.ndarray:
    step, per_hour = _ETT_STEPS[protocol]
    if not same_frequency(table.freq, step):
        raise UserError(
            f"data.split={protocol} is for steps of {step}; {table.source} has {table.freq}; use split=ratio"
        )
    sizes = np.array([12, 4, 4]) * _MONTH * per_hour
    short = int(table.history.argmin())
    if table.history[short] < sizes.sum():
        raise UserError(
            f"data.split={protocol} needs {sizes.sum()} rows, {_series(table, short)} of {table.source} has "
            f"{table.history[short]}; use split=ratio"
        )
    return sizes


def _refuse(
    table: SeriesTable, series: int, stage: str, seq_len: int, pred_len: int, ratio: tuple[float, ...] | None
) -> None:
    rows = int(table.history[series])
    need = f"seq_len {seq_len} + pred_len {pred_len}"
    if ratio is not None:
        enough = rows
        while not _fits(enough, seq_len, pred_len, ratio):
            enough += 1
        need = f"{enough} rows with {need} and split_ratio {list(ratio)}"
    others = "" if table.num_series == 1 else ", or leave such series out with data.short_series=skip"
    raise UserError(
        f"{_series(table, series)} of {table.source} has {rows} rows, too few for the {stage} part: it "
        f"needs {need}; "
        f"shorten data.seq_len or data.pred_len{others}"
    )


def _fits(rows: int, seq_len: int, pred_len: int, ratio: Sequence[float]) -> bool:
    train, val, test = ratio_sizes(rows, ratio)
    return train >= seq_len + pred_len and (ratio[1] == 0 or val >= pred_len) and (ratio[2] == 0 or test >= pred_len)


def _series(table: SeriesTable, index: int) -> str:
    return "the series" if table.id_column is None else f"series {table.unique_ids[index]!r}"
