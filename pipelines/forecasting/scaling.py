"""Standardisation with statistics of the training rows, kept as plain lists so that a checkpoint can carry
them.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np
import torch

from ..errors import UserError
from .frequency import CHUNK
from .readers import near
from .tables import SeriesTable

logger = logging.getLogger("seqzoo")
SCOPES = ("series", "global")
ArrayT = TypeVar("ArrayT", np.ndarray, torch.Tensor)


@dataclass(frozen=True)
class StandardScaler:
    """z = (x - mean) / std per column, population standard deviation (ddof 0), missing values left out.

    scope: "series" (statistics per series and column) or "global" (per column over all series). columns:
    names, in the order of `SeriesTable.column_names`. mean, std: float64 (G, C) with G = number of series, or
    1 when global. A column without spread has std 1. static_mean, static_std: float64 (S,), over series.
    """

    scope: str
    columns: tuple[str, ...]
    unique_ids: tuple[str, ...]
    mean: np.ndarray
    std: np.ndarray
    static_mean: np.ndarray
    static_std: np.ndarray

    @classmethod
    def fit(cls, table: SeriesTable, ranges: np.ndarray, scope: str = "series") -> StandardScaler:
        """Statistics of the rows [begin, end) of each series; `ranges` int64 (N, 2), rows within the series.

        A series (or a column of one) without a value there gets the statistics over all series. Raises
        UserError for an unknown scope and for a target without any value in the ranges.
        """
        if scope not in SCOPES:
            raise UserError(f"data.scope={scope!r} is unknown.{near(scope, SCOPES)}")
        count, total = _sums(table, ranges, None)
        mean_all = _divide(total.sum(axis=0), count.sum(axis=0))
        for name, value in zip(table.targets, mean_all, strict=False):
            if np.isnan(value):
                raise UserError(f"the target {name!r} of {table.source} has no value in the training rows")
        mean_all = np.nan_to_num(mean_all)
        mean = _divide(total, count) if scope == "series" else mean_all[None]
        mean = np.where(np.isnan(mean), mean_all, mean)
        _, squares_all = _sums(table, ranges, np.broadcast_to(mean_all, (table.num_series, len(mean_all))))
        std_all = np.sqrt(_divide(squares_all.sum(axis=0), count.sum(axis=0)))
        std = std_all[None]
        if scope == "series":
            _, squares = _sums(table, ranges, mean)
            std = np.where(count > 0, np.sqrt(_divide(squares, count)), std_all)
        static_mean, static_std = _static_statistics(table.static)
        ids = tuple(table.unique_ids) if scope == "series" else ()
        return cls(scope, table.column_names, ids, mean, _positive(std, mean), static_mean, static_std)

    def for_table(self, table: SeriesTable) -> StandardScaler:
        """The scaler with its series in the order of another table.

        One series fits any one series. A series that was not in training gets the statistics of its own
        history.
        """
        if self.columns != table.column_names:
            raise ValueError(f"the scaler has the columns {self.columns}, the table {table.column_names}")
        single = len(self.unique_ids) == 1 and table.num_series == 1
        if self.scope == "global" or single or self.unique_ids == tuple(table.unique_ids):
            return replace(self, unique_ids=tuple(table.unique_ids) if self.scope == "series" else ())
        known = {name: row for row, name in enumerate(self.unique_ids)}
        rows = np.array([known.get(name, -1) for name in table.unique_ids])
        mean, std = self.mean[rows], self.std[rows]
        new = np.flatnonzero(rows < 0)
        if len(new):
            names = ", ".join(repr(table.unique_ids[i]) for i in new[:3])
            logger.warning("%d series not seen in training are scaled by their own history: %s", len(new), names)
            ranges = np.stack([np.zeros_like(table.history), table.history], axis=1)
            ranges[rows >= 0] = 0
            own = StandardScaler.fit(table, ranges, "series")
            mean[new], std[new] = own.mean[new], own.std[new]
        return replace(self, unique_ids=tuple(table.unique_ids), mean=mean, std=std)

    def statistics(self, series: np.ndarray, columns: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
        """Mean and std of some columns for each window's series (B,): two arrays (B, C) float64."""
        rows = np.asarray(series) if self.scope == "series" else np.zeros(len(series), dtype=np.int64)
        index = [self.columns.index(name) for name in columns]
        return self.mean[rows][:, index], self.std[rows][:, index]

    def transform(self, x: ArrayT, series: Any, columns: tuple[str, ...] | None = None) -> ArrayT:
        """x (B, L, C) of the series (B,) to the scaled space; `columns` default to all. Arrays or tensors."""
        mean, std = self._like(x, series, columns)
        return (x - mean) / std

    def inverse(self, x: ArrayT, series: Any, columns: tuple[str, ...] | None = None) -> ArrayT:
        """x (B, L, C) or (B, L, C, P) from the scaled space to original units. Arrays or tensors."""
        mean, std = self._like(x, series, columns)
        return x * std + mean

    def transform_static(self, static: np.ndarray) -> np.ndarray:
        """Static covariates (N, S), missing -> 0, as float32."""
        return np.nan_to_num((static - self.static_mean) / self.static_std).astype(np.float32)

    def to_dict(self) -> dict[str, Any]:
        """Plain lists, floats and strings."""
        return {
            "scope": self.scope,
            "columns": list(self.columns),
            "unique_ids": list(self.unique_ids),
            **{name: getattr(self, name).tolist() for name in ("mean", "std", "static_mean", "static_std")},
        }

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> StandardScaler:
        """The inverse of `to_dict`."""
        width = len(state["columns"])
        return cls(
            scope=state["scope"],
            columns=tuple(state["columns"]),
            unique_ids=tuple(state["unique_ids"]),
            mean=np.array(state["mean"], dtype=np.float64).reshape(-1, width),
            std=np.array(state["std"], dtype=np.float64).reshape(-1, width),
            static_mean=np.array(state["static_mean"], dtype=np.float64),
            static_std=np.array(state["static_std"], dtype=np.float64),
        )

    def _like(self, x: ArrayT, series: Any, columns: tuple[str, ...] | None) -> tuple[ArrayT, ArrayT]:
        """Mean and std shaped to broadcast with x, on its device and of its dtype."""
        rows = series.cpu().numpy() if isinstance(series, torch.Tensor) else np.asarray(series)
        mean, std = self.statistics(rows, columns or self.columns)
        shape = (mean.shape[0], 1, mean.shape[1], *[1] * (x.ndim - 3))
        if isinstance(x, torch.Tensor):
            return torch.as_tensor(mean.reshape(shape)).to(x), torch.as_tensor(std.reshape(shape)).to(x)
        return mean.reshape(shape).astype(x.dtype), std.reshape(shape).astype(x.dtype)


def _sums(table: SeriesTable, ranges: np.ndarray, mean: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """Number of present values and their sum, or their squared distance from `mean` (N, C): two (N, C)
    float64.
    """
    count = np.zeros((table.num_series, len(table.column_names)))
    total = np.zeros_like(count)
    for series, (begin, end) in enumerate(ranges + table.offsets[:-1, None]):
        for first in range(begin, end, CHUNK // 32):
            block = table.values[first : min(first + CHUNK // 32, end)].astype(np.float64)
            if mean is not None:
                block = np.square(block - mean[series])
            missing = np.isnan(block)
            count[series] += len(block) - missing.sum(axis=0)
            total[series] += np.where(missing, 0.0, block).sum(axis=0)
    return count, total


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    """total / count, NaN where there is nothing."""
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)


def _positive(std: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """std with 1 for a column without spread (of constants that float32 cannot sum exactly, too), and where 1 / std is
    infinite in float32."""
    least = np.maximum(1e-10 * np.abs(mean), np.finfo(np.float32).tiny)
    return np.where(np.nan_to_num(std) > least, std, 1.0)


def _static_statistics(static: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values = static.astype(np.float64)
    count = (~np.isnan(values)).sum(axis=0)
    mean = np.nan_to_num(_divide(np.nansum(values, axis=0), count))
    std = np.sqrt(_divide(np.nansum(np.square(values - mean), axis=0), count))
    return mean, _positive(std, mean)
