"""A table whose target columns are series of their own: what a model of single series reads of any file."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ..cache import cached_folder
from ..errors import UserError
from .ingest import TIMES, VALUES, Roles
from .tables import SeriesTable

TARGET = "y"
_ROWS = 1 << 20


def separate_columns(table: SeriesTable, cache_dir: str | Path | None = None) -> SeriesTable:
    """The table with each target of each series as a series of the one target `y`, from the cache the second time.

    A wide file's series have the names of its columns; in a long file with several targets they are
    "<unique_id>/<column>". Covariates are left out. Raises UserError where two would have one name.
    """
    number, wide = len(table.targets), table.id_column is None
    names = [
        target if wide else unique_id if number == 1 else f"{unique_id}/{target}"
        for unique_id in table.unique_ids
        for target in table.targets
    ]
    double = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    if double:
        raise UserError(f"{table.source}: two series would have the name {double[0]!r}; rename a column or an id")

    def build(folder: Path) -> None:
        with (folder / VALUES).open("wb") as values, (folder / TIMES).open("wb") as times:
            for first, last in zip(table.offsets[:-1], table.offsets[1:], strict=True):
                for column in range(number):
                    for begin in range(first, last, _ROWS):
                        rows = slice(begin, min(begin + _ROWS, last))
                        np.ascontiguousarray(table.values[rows, column]).tofile(values)
                        table.times[rows].tofile(times)
        lengths = np.repeat(table.lengths, number)
        np.save(folder / "offsets.npy", np.concatenate([[0], np.cumsum(lengths)]))
        np.save(folder / "static.npy", np.zeros((len(names), 0), np.float32))
        np.save(folder / "history.npy", np.repeat(table.history, number))
        roles = Roles(table.time_column, table.id_column, (TARGET,), (), (), ())
        meta = {
            "unique_ids": names,
            "has_missing": table.has_missing,
            "freq": table.freq,
            "roles": roles.__dict__,
            "source": table.source,
        }
        (folder / "table.json").write_text(json.dumps(meta))

    return SeriesTable.open(cached_folder(Path(table.source), {"separate": table.folder.name}, cache_dir, build))
