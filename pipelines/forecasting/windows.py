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
    of the first future step. Use it with `DataLoader(dataset, sampler=IndexSampler(...), batch_size=None,
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
        # Rows of the table that a window gathers: future covariates are read ahead also where the target is not known.
        self._span = seq_len + (pred_len if future or table.future_covariates else 0)
        self._center = self._in_rows(scaler.mean)
        self._scale = self._in_rows(1 / scaler.std)
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
        # One pass for both ends: a negative number is a huge one without its sign.
        if len(index) and index.view(np.uint64).max() >= len(self):
            raise IndexError(f"window {index.min()}..{index.max()} of {len(self)}")
        if len(self.ranges) == 1:
            return np.zeros(len(index), np.int64), self.ranges[0, 0] + index * self.stride
        series = np.searchsorted(self._ends, index, side="right")
        before = np.where(series > 0, self._ends[series - 1], 0)
        return series, self.ranges[series, 0] + (index - before) * self.stride

    def __getitem__(self, index: Any) -> dict[str, Tensor]:
        """A batch: of one window for a number, of several for a list or array of numbers."""
        return self.__getitems__(np.atleast_1d(np.asarray(index)))

    def __getitems__(self, indices: Sequence[int] | np.ndarray) -> dict[str, Tensor]:
        table, seq_len = self.table, self.seq_len
        widths = (len(table.targets), len(table.past_covariates), len(table.future_covariates))
        series, start = self.locate(indices)
        first = table.offsets[series] + start
        values, missing = self._gather(first, series)
        # narrow and split_with_sizes, not indexing: its Python counts in batches this small
        past_target, past_covariates, _ = values.narrow(1, 0, seq_len).split_with_sizes(widths, 2)
        if self._span > seq_len:
            future_covariates = values.narrow(2, widths[0] + widths[1], widths[2])
        else:
            future_covariates = values.new_empty(len(first), seq_len + self.pred_len, 0)
        batch = {
            "past_target": past_target,
            "past_observed": self._observed(missing, slice(0, seq_len), past_target),
            "past_time": self._time_features(first, seq_len),
            "past_covariates": past_covariates,
            "future_covariates": future_covariates,
            "static_covariates": torch.from_numpy(self._static[series]),
            "series": torch.from_numpy(series),
            "origin": torch.from_numpy(start + seq_len),
        }
        if self.future:
            future_target = values.narrow(1, seq_len, self.pred_len).narrow(2, 0, widths[0])
            batch["future_time"] = self._time_features(first + seq_len, self.pred_len)
            batch["future_target"] = future_target
            batch["future_observed"] = self._observed(missing, slice(seq_len, None), future_target)
        else:
            batch["future_time"] = self._times_after(series, start + seq_len)
        return batch

    def origin_times(self, series: np.ndarray, origin: np.ndarray) -> np.ndarray:
        """Timestamps of the last past row of some windows, int64 ns (B,)."""
        return np.asarray(self.table.times[self.table.offsets[series] + origin - 1])

    def _gather(self, first: np.ndarray, series: np.ndarray) -> tuple[Tensor, Tensor | None]:
        """Scaled values (B, span, columns) with 0 where missing, and where they are missing, None for nowhere."""
        block = torch.from_numpy(_windows(self.table.values, self._span, first))
        center, scale = self._center, self._scale
        if len(center) > 1:
            index = torch.from_numpy(series)
            center, scale = center[index].repeat(1, self._span), scale[index].repeat(1, self._span)
        block.view(len(block), -1).sub_(center).mul_(scale)
        if not self.table.has_missing:
            return block, None
        missing = block.isnan()
        return block.masked_fill_(missing, 0), missing

    def _in_rows(self, values: np.ndarray) -> Tensor:
        """(series, columns) as float32; for one series (1, span x columns), those of a window in one long row:
        broadcasting over a short last axis takes twenty times as long."""
        tensor = torch.from_numpy(values.astype(np.float32))
        return tensor.repeat(1, self._span) if len(tensor) == 1 else tensor

    def _observed(self, missing: Tensor | None, rows: slice, like: Tensor) -> Tensor:
        """Where the targets of some rows of the windows are known, bool, of the shape of `like`."""
        if missing is None:
            return _TRUE.expand(like.shape)
        return missing[:, rows, : like.shape[2]].logical_not()

    def _time_features(self, first: np.ndarray, rows: int) -> Tensor:
        """Calendar features (B, rows, T) of rows of the table."""
        if self._calendar is None:
            return self._center.new_empty(len(first), rows, 0)
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


_TRUE = torch.ones(1, 1, 1, dtype=torch.bool)


def _windows(array: np.ndarray, length: int, first: np.ndarray) -> np.ndarray:
    """A copy (B, length, ...) of the windows array[i : i + length], i of `first`. `array` is contiguous.

    Each window is one record of bytes, so that numpy copies it in one piece: a fifth of the time of indexing a view
    of overlapping windows, which it copies number by number.
    """
    record = np.dtype((np.void, length * array.strides[0]))
    places = (max(0, len(array) - length + 1),)
    windows = np.ndarray(places, record, buffer=array, strides=(array.strides[0],))
    return windows[first].view(array.dtype).reshape(len(first), length, *array.shape[1:])
