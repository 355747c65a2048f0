"""Rows with feature vectors as a Parquet file that grows batch by batch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..atomic import atomic_path
from ..errors import UserError

VECTOR = "features"
_BUFFERED = 16 * 2**20  # bytes of vectors that are gathered before they are written


class VectorTable:
    """A Parquet file with a column for each key of `columns` and the float32 list `features` of fixed size `dim`.

    metadata: texts by name, into the schema of the file. Memory is that of 16 MiB of vectors.
    """

    def __init__(self, path: Path, columns: Mapping[str, pa.DataType], dim: int, metadata: Mapping[str, str]) -> None:
        fields = [pa.field(name, kind) for name, kind in columns.items()]
        fields.append(pa.field(VECTOR, pa.list_(pa.float32(), dim)))
        self.schema = pa.schema(fields, metadata=dict(metadata))
        self.dim, self.rows = dim, 0
        self._writer = pq.ParquetWriter(path, self.schema)
        self._ids: list[dict[str, Any]] = []
        self._vectors: list[np.ndarray] = []
        self._held = 0

    def add(self, ids: Sequence[Mapping[str, Any]], vectors: np.ndarray) -> None:
        """vectors: float32 (N, dim), a row without any real token NaN throughout: it is written as null."""
        if vectors.shape != (len(ids), self.dim):
            raise ValueError(f"{len(ids)} rows have vectors of shape {vectors.shape}, expected {self.dim} each")
        self._ids += [dict(row) for row in ids]
        self._vectors.append(np.ascontiguousarray(vectors, dtype=np.float32))
        self._held += vectors.nbytes
        if self._held >= _BUFFERED:
            self.flush()

    def flush(self) -> None:
        if not self._ids:
            return
        arrays = [
            pa.array([row.get(field.name) for row in self._ids], field.type)
            for field in self.schema
            if field.name != VECTOR
        ]
        flat = np.concatenate(self._vectors)
        missing = np.isnan(flat).all(1)
        values = pa.array(flat.reshape(-1), pa.float32())
        kind = self.schema.field(VECTOR).type
        mask = pa.array(missing) if missing.any() else None
        arrays.append(pa.FixedSizeListArray.from_arrays(values, type=kind, mask=mask))
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self.schema))
        self.rows += len(self._ids)
        self._ids, self._vectors, self._held = [], [], 0

    def close(self) -> None:
        self.flush()
        self._writer.close()


def check_output(path: str | Path) -> Path:
    """The path, or UserError before any work is done if no Parquet file could be written there."""
    path = Path(path)
    if path.is_dir() or path.suffix.lower() != ".parquet":
        raise UserError(f"cannot write features to {path}: give the name of a .parquet file")
    return path


@contextmanager
def vector_table(
    path: Path, columns: Mapping[str, pa.DataType], dim: int, metadata: Mapping[str, str]
) -> Iterator[VectorTable]:
    """A `VectorTable` that stands at `path` once it is complete. After an error or Ctrl-C what is there stands beside
    it, as <name>.partial.parquet, which is said."""
    with atomic_path(path) as temporary:
        table = VectorTable(temporary, columns, dim, metadata)
        try:
            yield table
            table.close()
        except BaseException:
            table.close()
            if table.rows:
                partial = path.with_suffix(".partial.parquet")
                temporary.replace(partial)
                print(f"stopped: the first {table.rows:,} rows are in {partial}", flush=True)
            raise
