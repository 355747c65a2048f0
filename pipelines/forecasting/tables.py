"""A table of series as memory-mapped columns: `load_table(path)` reads CSV and Parquet, wide and long."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from ..cache import cached_folder
from ..errors import UserError
from .calendar import Calendar, calendar_fields
from .frequency import infer_frequency, parse_frequency
from .ingest import TIMES, VALUES, Roles, check_gaps, check_order, history_lengths, write_rows
from .readers import Source, mostly_numbers, near, open_source
from .timestamps import looks_like_times

logger = logging.getLogger("seqzoo")

FORMAT = 1  # part of the cache key; raise it when the files of a cached table change
_MAX_FEATURES = 8_000_000  # 32 MB
_READ = 1 << 17  # rows
GAPS = ("error", "fill")
WIDE_ID = "series"  # the unique_id of a wide file's only series
_ID_NAMES = ("unique_id",)
_TIME_NAMES = ("ds", "date", "time", "timestamp", "datetime", "date_time")
_INDEX_NAMES = ("", "Unnamed: 0", "index", "__index_level_0__")


@dataclass(frozen=True)
class SeriesTable:
    """Series of one file as read-only memory-mapped columns; made by `load_table`.

    unique_ids: names of the N series. offsets: int64 (N+1,), row bounds of each series. values: float32
    (rows, columns), NaN = missing (only if has_missing), the columns of `column_names` in order targets,
    past, future covariates. times: int64 (rows,), ns since 1970. static: float32 (N, S). history: int64 (N,),
    rows of each series before its future-only rows. freq: pandas alias. source: path of the file. folder:
    where the arrays lie; a copy sent to another process opens it again.
    """

    unique_ids: list[str]
    offsets: np.ndarray
    values: np.ndarray
    times: np.ndarray
    static: np.ndarray
    history: np.ndarray
    targets: tuple[str, ...]
    past_covariates: tuple[str, ...]
    future_covariates: tuple[str, ...]
    static_names: tuple[str, ...]
    freq: str
    source: str
    time_column: str
    id_column: str | None
    has_missing: bool
    folder: Path

    @classmethod
    def open(cls, folder: Path) -> SeriesTable:
        """Open a folder that `load_table` wrote."""
        meta = json.loads((folder / "table.json").read_text())
        roles = meta["roles"]
        targets, past = tuple(roles["targets"]), tuple(roles["past_covariates"])
        future = tuple(roles["future_covariates"])
        offsets = np.load(folder / "offsets.npy")
        rows = int(offsets[-1])
        return cls(
            unique_ids=meta["unique_ids"],
            offsets=offsets,
            values=np.memmap(folder / VALUES, np.float32, "r", shape=(rows, len(targets + past + future))),
            times=np.memmap(folder / TIMES, np.int64, "r", shape=(rows,)),
            static=np.load(folder / "static.npy"),
            history=np.load(folder / "history.npy"),
            targets=targets,
            past_covariates=past,
            future_covariates=future,
            static_names=tuple(roles["static_covariates"]),
            freq=meta["freq"],
            source=meta["source"],
            time_column=roles["time_column"],
            id_column=roles["id_column"],
            has_missing=meta["has_missing"],
            folder=folder,
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return (SeriesTable.open, (self.folder,))

    @property
    def num_series(self) -> int:
        return len(self.unique_ids)

    @property
    def num_rows(self) -> int:
        return int(self.offsets[-1])

    @property
    def lengths(self) -> np.ndarray:
        """Rows of each series, int64 (N,)."""
        return np.diff(self.offsets)

    @property
    def column_names(self) -> tuple[str, ...]:
        return self.targets + self.past_covariates + self.future_covariates

    @cached_property
    def columns(self) -> dict[str, np.ndarray]:
        """Each column that varies with time, float32 (rows,): views of `values`."""
        return {name: self.values[:, i] for i, name in enumerate(self.column_names)}

    @cached_property
    def time_span(self) -> tuple[int, int]:
        """The first and the last timestamp of all series, int64 ns."""
        return int(self.times[self.offsets[:-1]].min()), int(self.times[self.offsets[1:] - 1].max())

    @cached_property
    def time_codes(self) -> tuple[np.ndarray, np.ndarray]:
        """`Calendar.codes` of every row: 4 bytes a row where the features would take up to 24."""
        calendar = Calendar(self.freq, *self.time_span)
        clock, day = (np.empty(self.num_rows, dtype=codes.dtype) for codes in calendar.codes(self.times[:1]))
        # Read, not mapped: mapped pages would stay resident.
        with open(self.folder / TIMES, "rb") as file:
            for begin in range(0, self.num_rows, _READ):
                chunk = slice(begin, begin + _READ)
                clock[chunk], day[chunk] = calendar.codes(np.fromfile(file, np.int64, _READ))
        return clock, day

    @cached_property
    def time_features(self) -> np.ndarray | None:
        """Calendar features of every row, float32 (rows, T); None where they would take too much memory."""
        if self.num_rows * len(calendar_fields(self.freq)) > _MAX_FEATURES:
            return None
        return Calendar(self.freq, *self.time_span)(self.times)


def load_table(
    path: str | Path,
    *,
    targets: str | Sequence[str] | None = None,
    time_column: str | None = None,
    id_column: str | None = None,
    past_covariates: Sequence[str] = (),
    future_covariates: Sequence[str] = (),
    static_covariates: Sequence[str] = (),
    freq: str | None = None,
    cache_dir: str | Path | None = None,
    gaps: str = "error",
) -> SeriesTable:
    """Read a CSV (also compressed) or Parquet file into memory-mapped columns; the second time from the
    cache.

    Long files have a row per series and time and a column that names the series (`id_column`, or one called
    `unique_id`); the rows of a series need not be contiguous but must be in time order. Any other file is
    wide: one series, a row per time, a column per channel.

    targets: the columns to forecast; default `y` in a long file that has it, else all numeric columns without
    another role. time_column: default the only one that holds dates. freq: default inferred. gaps: "error",
    or "fill" to insert rows of missing values. Covariates: past (known up to now), future (known ahead; rows
    after the last observed target are the future), static (constant in a series; numbers). Cells may be
    missing, infinity is refused.

    Raises UserError, one line, for whatever in the file or the arguments makes no sense.
    """
    if gaps not in GAPS:
        raise UserError(f"data.gaps={gaps!r} is unknown.{near(gaps, GAPS)}")
    if freq is not None:
        freq = parse_frequency(freq).alias
    source = open_source(path)
    with _utf8(source.path):
        roles = find_roles(
            source,
            targets=_names(targets) if targets is not None else None,
            time_column=time_column,
            id_column=id_column,
            past_covariates=_names(past_covariates),
            future_covariates=_names(future_covariates),
            static_covariates=_names(static_covariates),
        )
    options = {"format": FORMAT, "roles": asdict(roles), "freq": freq, "gaps": gaps}

    def build(folder: Path) -> None:
        rows = write_rows(source, roles, folder, WIDE_ID)
        check_order(rows, source, roles)
        try:
            frequency = parse_frequency(freq) if freq else infer_frequency(rows.times(), rows.offsets)
        except UserError as error:
            raise UserError(f"{source.path}: {error}") from None
        rows = check_gaps(rows, frequency, source, roles, gaps)
        history = history_lengths(rows, len(roles.targets), bool(roles.future_covariates))
        for name, array in (("offsets", rows.offsets), ("static", rows.static), ("history", history)):
            np.save(folder / f"{name}.npy", array)
        meta = {
            "unique_ids": rows.unique_ids,
            "has_missing": rows.has_missing,
            "freq": frequency.alias,
            "roles": asdict(roles),
        }
        (folder / "table.json").write_text(json.dumps({**meta, "source": str(source.path)}))

    with _utf8(source.path):
        return SeriesTable.open(cached_folder(source.path, options, cache_dir, build))


@contextmanager
def _utf8(path: Path) -> Iterator[None]:
    """A text of a Parquet file may be any bytes, which shows when it is looked at."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise UserError(f"{path} has a text that is not UTF-8 ({error})") from None


def find_roles(
    source: Source,
    *,
    targets: tuple[str, ...] | None,
    time_column: str | None,
    id_column: str | None,
    past_covariates: tuple[str, ...] = (),
    future_covariates: tuple[str, ...] = (),
    static_covariates: tuple[str, ...] = (),
) -> Roles:
    """Decide which column plays which part. Raises UserError for unknown, double or undecidable ones."""
    covariates = past_covariates + future_covariates + static_covariates
    for name in (
        *(targets or ()),
        *covariates,
        *(item for item in (time_column, id_column) if item is not None),
    ):
        if name not in source.types:
            raise UserError(f"{source.path} has no column {name!r}.{near(name, source.names)}")
    if targets is not None and not targets:
        raise UserError("data.targets is empty; name at least one column, or leave it out to take all numeric ones")
    head = _head(source)
    if id_column is None:
        id_column = next((name for name in _ID_NAMES if name in source.types), None)
    if time_column is None:
        time_column = _find_time(source, head, {*(targets or ()), *covariates, id_column})
    taken = (time_column, *([id_column] if id_column else []), *covariates, *(targets or ()))
    double = [name for name in dict.fromkeys(taken) if taken.count(name) > 1]
    if double:
        raise UserError(f"the column {double[0]!r} has two roles in the data config; a column can have one")
    if targets is None:
        targets = _find_targets(source, head, set(taken), long=id_column is not None)
    return Roles(time_column, id_column, targets, past_covariates, future_covariates, static_covariates)


def _find_time(source: Source, head: dict[str, pa.Array], others: set[str | None]) -> str:
    free = [name for name in source.names if name not in others]
    candidates = [name for name in free if looks_like_times(head[name])]
    if not candidates:  # a column of the right name is read, or says why it cannot be
        candidates = [
            name for name in free if name.lower() in _TIME_NAMES and not pa.types.is_floating(head[name].type)
        ]
    if len(candidates) > 1:
        raise UserError(
            f"{source.path} has several columns of timestamps: {', '.join(candidates)}; choose one with "
            "data.time_column"
        )
    if not candidates:
        raise UserError(
            f"{source.path} has no column of timestamps among {', '.join(source.names[:12])}; name it in "
            "data.time_column"
        )
    return candidates[0]


def _find_targets(source: Source, head: dict[str, pa.Array], taken: set[str], *, long: bool) -> tuple[str, ...]:
    free = [name for name in source.names if name not in taken and name not in _INDEX_NAMES]
    if long and "y" in free:
        return ("y",)
    numeric = [name for name in free if mostly_numbers(head[name])]
    text = [name for name in free if name not in numeric]
    if not numeric:
        raise UserError(f"{source.path} has no numeric column besides {', '.join(sorted(taken))}")
    if text:
        logger.warning("%s: columns that are not numbers are left out: %s", source.path, ", ".join(text[:8]))
    return tuple(numeric)


def _head(source: Source) -> dict[str, pa.Array]:
    """The first rows of all columns that are text, times or numbers."""
    usable = [name for name, kind in source.types.items() if not pa.types.is_nested(kind)]
    batch = next(iter(source.batches(usable)), None)
    if batch is None:
        raise UserError(f"{source.path} has no rows")
    head = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        column = column[:1000]
        head[name] = column.dictionary_decode() if pa.types.is_dictionary(column.type) else column
    for name in source.names:
        head.setdefault(name, pa.nulls(0, source.types[name]))
    return head


def _names(names: str | Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(str(name) for name in names)
