"""From a file to plain arrays on disk: rows streamed in batches, grouped by series, checked, gaps filled.

The files: values.f32 (rows, columns) row-major, times.i64 (rows,). Whole tables are never held in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from ..errors import UserError
from .frequency import CHUNK, Frequency, neighbours
from .readers import Source, to_float32
from .timestamps import BadTime, TimeParser

VALUES, TIMES, _CODES = "values.f32", "times.i64", "codes.i32"


@dataclass(frozen=True)
class Roles:
    """Which column plays which part. `id_column` is None for a wide file, which is one series."""

    time_column: str
    id_column: str | None
    targets: tuple[str, ...]
    past_covariates: tuple[str, ...] = ()
    future_covariates: tuple[str, ...] = ()
    static_covariates: tuple[str, ...] = ()

    @property
    def values(self) -> tuple[str, ...]:
        """The columns that vary with time, in their order on disk."""
        return self.targets + self.past_covariates + self.future_covariates


@dataclass
class Rows:
    """Rows on disk, grouped by series. `order[i]` is the row of the file that row i came from (None: the
    same).
    """

    folder: Path
    width: int
    unique_ids: list[str]
    offsets: np.ndarray
    static: np.ndarray
    has_missing: bool = False
    order: np.ndarray | None = None

    @property
    def count(self) -> int:
        return int(self.offsets[-1])

    def values(self) -> np.ndarray:
        return np.memmap(self.folder / VALUES, np.float32, "r", shape=(self.count, self.width))

    def times(self) -> np.ndarray:
        return np.memmap(self.folder / TIMES, np.int64, "r", shape=(self.count,))

    def file_row(self, row: int) -> int:
        return row if self.order is None else int(self.order[row])

    def series_of(self, row: int) -> str:
        return self.unique_ids[int(np.searchsorted(self.offsets, row, side="right")) - 1]


@dataclass
class _Series:
    """What is known of the series while rows stream by."""

    codes: dict[str, int] = field(default_factory=dict)
    counts: list[int] = field(default_factory=list)
    static: list[np.ndarray] = field(default_factory=list)


def write_rows(source: Source, roles: Roles, folder: Path, single_id: str) -> Rows:
    """Stream the columns of `roles` into `folder`, then group the rows by series.

    `single_id` names the one series of a wide file. Raises UserError for text, infinity, unreadable
    timestamps, missing ids, a static covariate that varies, and a target without any value.
    """
    columns = [roles.time_column, *([roles.id_column] if roles.id_column else []), *roles.values]
    columns += list(roles.static_covariates)
    parser, series = TimeParser(), _Series()
    present = np.zeros(len(roles.values), dtype=np.int64)
    first_row = 0
    with (
        open(folder / VALUES, "wb") as value_file,
        open(folder / TIMES, "wb") as time_file,
        open(folder / _CODES, "wb") as code_file,
    ):
        for batch in source.batches(columns):
            by_name = dict(zip(batch.schema.names, batch.columns, strict=True))
            try:
                times = parser(by_name[roles.time_column])
            except BadTime as error:
                place = source.place(first_row + error.index)
                text = "the timestamp is missing" if error.value is None else str(error)
                raise UserError(f"{source.path} {place}, column {roles.time_column!r}: {text}") from None
            values = np.empty((len(times), len(roles.values)), dtype=np.float32)
            for position, name in enumerate(roles.values):
                values[:, position] = to_float32(by_name[name], name, source, first_row)
            ids = by_name[roles.id_column] if roles.id_column else None
            codes = _encode(ids, single_id, len(times), series, source, roles, first_row)
            static = [to_float32(by_name[name], name, source, first_row) for name in roles.static_covariates]
            _check_static(static, codes, series, source, roles, first_row)
            present += (~np.isnan(values)).sum(axis=0)
            values.tofile(value_file)
            times.tofile(time_file)
            if roles.id_column:
                codes.tofile(code_file)
            first_row += len(times)
    pa.default_memory_pool().release_unused()
    if first_row == 0:
        raise UserError(f"{source.path} has no rows")
    for name, count in zip(roles.targets, present, strict=False):
        if count == 0:
            raise UserError(f"{source.path}: the target {name!r} has no value in any row; leave it out of data.targets")
    offsets = np.concatenate([[0], np.cumsum(series.counts)]).astype(np.int64)
    static_table = np.array(series.static, dtype=np.float32).reshape(len(series.codes), len(roles.static_covariates))
    rows = Rows(
        folder,
        len(roles.values),
        list(series.codes),
        offsets,
        static_table,
        bool((present < first_row).any()),
    )
    if roles.id_column:
        _group(rows)
    (folder / _CODES).unlink()
    return rows


def check_order(rows: Rows, source: Source, roles: Roles) -> None:
    """Raise UserError where a timestamp within a series does not come after the one before."""
    times = rows.times()
    for begin, end, same in neighbours(times, rows.offsets):
        wrong = same & (times[begin + 1 : end + 1] <= times[begin:end])
        if not wrong.any():
            continue
        row = begin + int(wrong.argmax())
        before, after = source.place(rows.file_row(row)), source.place(rows.file_row(row + 1))
        whose = f" of series {rows.series_of(row)!r}" if roles.id_column else ""
        hint = "" if roles.id_column else "; if the file holds several series, name their column in data.id_column"
        if times[row] == times[row + 1]:
            raise UserError(
                f"{source.path} {after}: duplicate timestamp {show_time(times[row])}{whose}, also on {before}{hint}"
            )
        raise UserError(
            f"{source.path} {after}: timestamps{whose} are not sorted, {show_time(times[row + 1])} comes "
            "after "
            f"{show_time(times[row])} on {before}; sort the file by time{hint}"
        )


def check_gaps(rows: Rows, frequency: Frequency, source: Source, roles: Roles, gaps: str) -> Rows:
    """Compare the rows with the grid of `frequency`; fill missing steps with rows of NaN when gaps="fill".

    Raises UserError for a row off the grid, and for a gap when gaps="error".
    """
    times = rows.times()
    found: list[np.ndarray] = []  # (row before the gap, missing steps)
    for begin, _, same in neighbours(times, rows.offsets):
        pairs = begin + np.flatnonzero(same)
        if not len(pairs):
            continue
        missing = frequency.missing_between(times[pairs], times[pairs + 1])
        if (missing < 0).any():
            row = int(pairs[int((missing < 0).argmax())]) + 1
            raise UserError(
                f"{source.path} {source.place(rows.file_row(row))}: {show_time(times[row])} is not a "
                "whole number of "
                f"steps of {frequency.alias} after {show_time(times[row - 1])}; correct it or set data.freq"
            )
        found.append(np.stack([pairs[missing > 0], missing[missing > 0]]))
    jumps = np.concatenate(found, axis=1) if found else np.zeros((2, 0), dtype=np.int64)
    if not jumps.shape[1]:
        return rows
    total = int(jumps[1].sum())
    if gaps == "error":
        row = int(jumps[0, 0])
        whose = f" in series {rows.series_of(row)!r}" if roles.id_column else ""
        raise UserError(
            f"{source.path} {source.place(rows.file_row(row + 1))}: a gap{whose}, {int(jumps[1, 0])} "
            "step(s) of "
            f"{frequency.alias} are missing after {show_time(times[row])} ({jumps.shape[1]} gap(s) and "
            f"{total} missing "
            f"row(s) in all); set data.gaps=fill to insert them as missing values"
        )
    if total > 10 * rows.count + 1_000_000:
        raise UserError(
            f"{source.path}: data.gaps=fill would add {total} rows to {rows.count} at the step "
            f"{frequency.alias}; check the "
            "timestamps or set data.freq"
        )
    return _fill(rows, frequency, jumps)


def history_lengths(rows: Rows, num_targets: int, known_ahead: bool) -> np.ndarray:
    """Rows of each series up to the end of its history, int64 (N,).

    With covariates that are known ahead, the rows after the last observed target are the future; otherwise
    all rows are history.
    """
    lengths = np.diff(rows.offsets)
    if not known_ahead:
        return lengths
    values, last = rows.values(), np.full(len(lengths), -1, dtype=np.int64)
    for begin in range(0, rows.count, CHUNK):
        seen = begin + np.flatnonzero(~np.isnan(values[begin : begin + CHUNK, :num_targets]).all(axis=1))
        np.maximum.at(last, np.searchsorted(rows.offsets, seen, side="right") - 1, seen)
    return np.where(last < 0, lengths, last + 1 - rows.offsets[:-1])


def show_time(time: int | np.int64) -> str:
    """A timestamp as people write it."""
    return str(pd.Timestamp(int(time)))


def _encode(
    ids: pa.Array | None,
    single_id: str,
    count: int,
    series: _Series,
    source: Source,
    roles: Roles,
    first_row: int,
) -> np.ndarray:
    """Series number of each row, int32 (count,), in order of first appearance."""
    if ids is None:
        labels: Sequence[str] = [single_id]
        local = np.zeros(count, dtype=np.int32)
    else:
        ids = pc.utf8_trim_whitespace(ids.cast(pa.string()))
        missing = pc.fill_null(pc.equal(ids, ""), True).to_numpy(zero_copy_only=False)
        if missing.any():
            place = source.place(first_row + int(missing.argmax()))
            raise UserError(f"{source.path} {place}, column {roles.id_column!r}: the name of the series is missing")
        encoded = pc.dictionary_encode(ids)
        labels, local = encoded.dictionary.to_pylist(), encoded.indices.to_numpy()
    known = np.array([series.codes.setdefault(label, len(series.codes)) for label in labels], dtype=np.int32)
    series.counts += [0] * (len(series.codes) - len(series.counts))
    for code, number in zip(known, np.bincount(local, minlength=len(labels)), strict=True):
        series.counts[code] += int(number)
    return known[local]


def _check_static(
    static: list[np.ndarray], codes: np.ndarray, series: _Series, source: Source, roles: Roles, first_row: int
) -> None:
    if not static:
        return
    block = np.stack(static, axis=1)
    present, first = np.unique(codes, return_index=True)
    new = len(series.static)
    series.static += [block[row] for code, row in zip(present, first, strict=True) if code >= new]
    expected = np.stack([series.static[code] for code in present])[np.searchsorted(present, codes)]
    differs = (block != expected) & ~(np.isnan(block) & np.isnan(expected))
    if differs.any():
        row = int(differs.any(axis=1).argmax())
        column = int(differs[row].argmax())
        name = list(series.codes)[codes[row]]
        raise UserError(
            f"{source.path} {source.place(first_row + row)}: the static covariate "
            f"{roles.static_covariates[column]!r} "
            f"varies within series {name!r} ({expected[row, column]:g}, then {block[row, column]:g}); "
            "list it in "
            "data.past_covariates or data.future_covariates"
        )


def _group(rows: Rows) -> None:
    """Make the rows of each series contiguous, in their order; sets `rows.order` when something moved."""
    codes = np.fromfile(rows.folder / _CODES, dtype=np.int32)
    if np.all(codes[1:] >= codes[:-1]):
        return
    order = np.argsort(codes, kind="stable")
    del codes
    for name, array in ((VALUES, rows.values()), (TIMES, rows.times())):
        with open(rows.folder / "grouped", "wb") as file:
            for begin in range(0, rows.count, CHUNK):
                np.ascontiguousarray(array[order[begin : begin + CHUNK]]).tofile(file)
        (rows.folder / "grouped").replace(rows.folder / name)
    rows.order = order


def _fill(rows: Rows, frequency: Frequency, jumps: np.ndarray) -> Rows:
    """New files with a row for every step; `jumps` (2, gaps): row before the gap, missing steps."""
    before, missing = jumps
    shift = np.cumsum(missing)
    # A row moves by the missing steps of all gaps before it, also those in the series ahead of its own.
    offsets = rows.offsets + np.concatenate([[0], shift])[np.searchsorted(before, rows.offsets, side="left")]
    total = int(offsets[-1])
    values = np.memmap(rows.folder / "filled", np.float32, "w+", shape=(total, rows.width))
    times = np.memmap(rows.folder / "filled_times", np.int64, "w+", shape=(total,))
    old_values, old_times = rows.values(), rows.times()
    for begin in range(0, total, CHUNK):
        values[begin : begin + CHUNK] = np.nan
    for begin in range(0, rows.count, CHUNK):
        index = np.arange(begin, min(begin + CHUNK, rows.count))
        target = index + np.concatenate([[0], shift])[np.searchsorted(before, index, side="left")]
        values[target], times[target] = old_values[index], old_times[index]
    position = before + shift - missing  # where the row before each gap went
    for row, first, count in zip(before.tolist(), position.tolist(), missing.tolist(), strict=True):
        times[first + 1 : first + 1 + count] = frequency.after(int(old_times[row]), count)
    values.flush()
    times.flush()
    (rows.folder / "filled").replace(rows.folder / VALUES)
    (rows.folder / "filled_times").replace(rows.folder / TIMES)
    return Rows(rows.folder, rows.width, rows.unique_ids, offsets, rows.static, has_missing=True)
