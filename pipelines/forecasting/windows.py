"""Windows of a table as arithmetic: (series, first row) from a number, gathered a batch at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from .calendar import Calendar, future_times
from .scaling import StandardScaler
from .tables import SeriesTable


class WindowDataset(Dataset[dict[str, Tensor]]):
    """All windows of `seq_len` past and `pred_len` future rows in some ranges; nothing is stored per window.

    table: the columns. ranges: int64 (N, 2), rows [begin, end) within each series; a window lies inside one
    range. scaler: its order of series must be the table's. stride: rows between the starts of neighbouring
    windows. future: False for prediction, where a range holds the past only and the batch has no
    future_target and future_observed. calendar: False leaves past_time and future_time without features (T = 0), for
    models that do not read them: they are half of the work.

    `dataset.__getitems__(indices)` gives one batch as a dict of tensors: past_target (B, L, C) scaled,
    missing as 0; past_observed (B, L, C) bool; past_time (B, L, T) and future_time (B, H, T) calendar
    features; past_covariates (B, L, P); future_covariates (B, L+H, Q); static_covariates (B, S);
    future_target, future_observed (B, H, C); series (B,) int64; origin (B,) int64, the row within the series
    of the first future step. Use it with `DataLoader(dataset, sampler=WindowSampler(...), batch_size=None,
    collate_fn=identity)` or, with the standard samplers, `DataLoader(dataset, batch_size=...,
    collate_fn=identity)`.
    """

    def __init__(
        self,
        table: SeriesTable,
        *,
        seq_len: int,
        pred_len: int,
        ranges: np.ndarray,
        scaler: StandardScaler,
        stride: int = 1,
        future: bool = True,
        calendar: bool = True,
    ) -> None:
        for name, value in (("seq_len", seq_len), ("pred_len", pred_len), ("stride", stride)):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if ranges.shape != (table.num_series, 2):
            raise ValueError(f"ranges has shape {ranges.shape}, expected {(table.num_series, 2)}")
        if scaler.columns != table.column_names:
            raise ValueError(f"the scaler has the columns {scaler.columns}, the table {table.column_names}")
        self.table, self.scaler = table, scaler
        self.seq_len, self.pred_len, self.stride, self.future = seq_len, pred_len, stride, future
        self.ranges = np.asarray(ranges, dtype=np.int64)
        span = seq_len + (pred_len if future else 0)
        counts = np.maximum((self.ranges[:, 1] - self.ranges[:, 0] - span) // stride + 1, 0)
        self._ends = np.cumsum(counts)
        self._center = torch.from_numpy(scaler.mean.astype(np.float32))
        self._scale = torch.from_numpy((1 / scaler.std).astype(np.float32))
        self._static = scaler.transform_static(table.static)
        self._calendar = self._make_calendar() if calendar else None

    def _make_calendar(self) -> Calendar:
        table = self.table
        if table.time_features is None:  # either is made here once, so that forked loader processes share it
            _ = table.time_codes
        first, last = table.time_span
        return Calendar(table.freq, first, int(future_times(last, table.freq, self.pred_len)[-1]))

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def locate(self, indices: Sequence[int] | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Series and first past row within it of some windows, both int64 (B,). Raises IndexError outside."""
        index = np.asarray(indices, dtype=np.int64).reshape(-1)
        if len(index) and (index.min() < 0 or index.max() >= len(self)):
            raise IndexError(f"window {index.min()}..{index.max()} of {len(self)}")
        series = np.searchsorted(self._ends, index, side="right")
        before = np.where(series > 0, self._ends[series - 1], 0)
        return series, self.ranges[series, 0] + (index - before) * self.stride

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        """A batch: of one window for a number, of several for a list or array of numbers."""
        return self.__getitems__(np.atleast_1d(np.asarray(index)))

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        table, num_targets, seq_len = self.table, len(self.table.targets), self.seq_len
        known = num_targets + len(table.past_covariates)
        series, start = self.locate(indices)
        first = table.offsets[series] + start
        ahead = self.pred_len if self.future or table.future_covariates else 0
        values, observed = self._gather(first, seq_len + ahead, series)
        no_covariates = values.new_zeros(len(first), seq_len + self.pred_len, 0)
        batch = {
            "past_target": values[:, :seq_len, :num_targets],
            "past_observed": observed[:, :seq_len, :num_targets],
            "past_time": self._time_features(first, seq_len),
            "past_covariates": values[:, :seq_len, num_targets:known],
            "future_covariates": values[:, :, known:] if ahead else no_covariates,
            "static_covariates": torch.from_numpy(self._static[series]),
            "series": torch.from_numpy(series),
            "origin": torch.from_numpy(start + seq_len),
        }
        if self.future:
            batch["future_time"] = self._time_features(first + seq_len, self.pred_len)
            batch["future_target"] = values[:, seq_len:, :num_targets]
            batch["future_observed"] = observed[:, seq_len:, :num_targets]
        else:
            batch["future_time"] = self._times_after(series, start + seq_len)
        return batch

    def origin_times(self, series: np.ndarray, origin: np.ndarray) -> np.ndarray:
        """Timestamps of the last past row of some windows, int64 ns (B,)."""
        return np.asarray(self.table.times[self.table.offsets[series] + origin - 1])

    def _gather(self, first: np.ndarray, rows: int, series: np.ndarray) -> tuple[Tensor, Tensor]:
        """Scaled values (B, rows, columns) with 0 where missing, and where they are observed."""
        block = torch.from_numpy(_windows(self.table.values, rows, first))
        # One long row per window: broadcasting over a short last axis takes twenty times as long.
        center, scale = (self._in_rows(t, rows, series) for t in (self._center, self._scale))
        block.view(len(block), -1).sub_(center).mul_(scale)
        if not self.table.has_missing:
            return block, torch.ones(1, 1, 1, dtype=torch.bool).expand(block.shape)
        missing = block.isnan()
        return block.masked_fill_(missing, 0), missing.logical_not_()

    def _in_rows(self, values: Tensor, rows: int, series: np.ndarray) -> Tensor:
        """(N, columns) as (B or 1, rows x columns), those of each window's series."""
        if len(values) > 1:
            return values[torch.from_numpy(series)].repeat(1, rows)
        return values.expand(rows, -1).reshape(1, -1)

    def _time_features(self, first: np.ndarray, rows: int) -> Tensor:
        """Calendar features (B, rows, T) of rows of the table."""
        if self._calendar is None:
            return torch.zeros(len(first), rows, 0)
        features = self.table.time_features
        if features is not None:
            return torch.from_numpy(_windows(features, rows, first))
        clock, day = (_windows(codes, rows, first) for codes in self.table.time_codes)
        return torch.from_numpy(self._calendar.features(clock, day))

    def _times_after(self, series: np.ndarray, origin: np.ndarray) -> Tensor:
        """Calendar features (B, H, T) of the steps after some windows, which the table need not hold."""
        if self._calendar is None:
            return torch.zeros(len(series), self.pred_len, 0)
        ends = self.origin_times(series, origin)
        times = [future_times(int(time), self.table.freq, self.pred_len) for time in ends]
        return torch.from_numpy(self._calendar(np.stack(times)))


def identity(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The collate function of `WindowDataset`, whose items are batches already."""
    return batch


def _windows(array: np.ndarray, length: int, first: np.ndarray) -> np.ndarray:
    """A copy (B, length, ...) of the windows array[i : i + length], i of `first`. `array` is contiguous.

    Each window is one record of bytes, so that numpy copies it in one piece: a fifth of the time of indexing a view
    of overlapping windows, which it copies number by number.
    """
    record = np.dtype((np.void, length * array.strides[0]))
    places = (max(0, len(array) - length + 1),)
    windows = np.ndarray(places, record, buffer=array, strides=(array.strides[0],))
    return windows[first].view(array.dtype).reshape(len(first), length, *array.shape[1:])
