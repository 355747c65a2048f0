"""CSV and Parquet files as streams of arrow record batches, with errors that say where in the file they
happened.
"""

from __future__ import annotations

import csv
import difflib
import io
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from ..errors import UserError
from .parquet_pages import oversized

_COMPRESSED = (".gz", ".bz2", ".zst")
_TEXT = (".csv", ".tsv", ".txt")
_PARQUET = (".parquet", ".pq")
_BLOCK = 4 << 20
_ROWS = 1 << 16
# The texts that pandas takes for a missing value.
_MISSING_TEXTS = ["", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN"]
_MISSING_TEXTS += ["<NA>", "N/A", "NA", "NULL", "NaN", "None", "n/a", "nan", "null"]
_MISSING = pa.array(_MISSING_TEXTS)


@dataclass(frozen=True)
class Source:
    """An opened table file. `types` maps column names to arrow types; every column of a CSV file is text
    here.
    """

    path: Path
    types: dict[str, pa.DataType]
    delimiter: str | None = None  # None for Parquet
    skip_rows: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.types)

    def batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        """The rows of some columns in file order, a few MB at a time."""
        try:
            if self.delimiter is None:
                # Buffering whole row groups or mapping the file would count as resident memory.
                with pq.ParquetFile(self.path, buffer_size=1 << 20, pre_buffer=False) as file:
                    yield from file.iter_batches(batch_size=_ROWS, columns=columns, use_threads=False)
            else:
                yield from self._csv_batches(columns)
        except (pa.ArrowException, OSError, EOFError) as error:
            raise UserError(self._explain(error)) from None

    def place(self, row: int) -> str:
        """'line 7' of a CSV file or 'row 6' of a Parquet file, for data row `row` counted from 0."""
        if self.delimiter is None:
            return f"row {row + 1}"
        with self._open_text() as text:
            reader = csv.reader(text, delimiter=self.delimiter)
            count = -1  # the header
            for fields in reader:
                count += bool(fields)
                if count == row + 1:
                    return f"line {reader.line_num}"
        return f"data row {row + 1}"

    def _csv_batches(self, columns: list[str]) -> Iterator[pa.RecordBatch]:
        names = list(self.types)
        with pa.input_stream(str(self.path), compression="detect") as stream:
            yield from pa_csv.open_csv(
                stream,
                read_options=pa_csv.ReadOptions(
                    column_names=names, skip_rows=self.skip_rows, block_size=_BLOCK, use_threads=False
                ),
                parse_options=pa_csv.ParseOptions(delimiter=self.delimiter, newlines_in_values=False),
                convert_options=pa_csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()),
                    include_columns=columns,
                    strings_can_be_null=False,
                ),
            )

    def _explain(self, error: BaseException) -> str:
        text = str(error).splitlines()[0]
        if "Empty CSV file" in text:
            return f"{self.path} has a header and no rows"
        if "UTF8" in text or "utf-8" in text:
            return f"{self.path} is not UTF-8 text ({text}); save it with that encoding"
        if "Expected" in text and "columns" in text:
            with self._open_text() as lines:
                reader = csv.reader(lines, delimiter=self.delimiter or ",")
                for fields in reader:
                    if fields and len(fields) != len(self.types):
                        place = f"{self.path} line {reader.line_num}"
                        return f"{place}: {len(fields)} fields where the header has {len(self.types)}"
        return f"cannot read {self.path}: {text}"

    def _open_text(self) -> io.TextIOWrapper:
        stream = pa.input_stream(str(self.path), compression="detect")
        return io.TextIOWrapper(stream, encoding="utf-8-sig", errors="replace", newline="")


def open_source(path: str | Path) -> Source:
    """Open a CSV (also .gz, .bz2, .zst; `,` `;` tab or `|`) or Parquet file and read the names of its
    columns.

    Raises UserError for a missing, empty, unreadable or unknown file, naming the nearest files or kinds.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise UserError(f"no file {path}.{_near_files(path)}")
    if path.is_dir():
        raise UserError(f"{path} is a folder; data.path must be one CSV or Parquet file.{_files_in(path)}")
    suffix = table_suffix(path)
    if suffix in _PARQUET:
        return _open_parquet(path)
    if suffix in _TEXT:
        return _open_csv(path)
    raise UserError(
        f"{path} ends in {path.suffix!r}; known are {' '.join((*_TEXT, *_PARQUET))}, text also compressed as .gz"
    )


def table_suffix(path: Path) -> str:
    """The suffix that tells the kind of table, below a suffix of compression."""
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSED else path
    return name.suffix.lower()


def near(name: str, known: list[str] | tuple[str, ...]) -> str:
    """' Did you mean a?' or ' Known: a, b.' for the end of a message (without regard to case)."""
    lower = {str(item).lower(): str(item) for item in known}
    close = difflib.get_close_matches(str(name).lower(), list(lower), n=3, cutoff=0.5)
    if close:
        return f" Did you mean {', '.join(lower[item] for item in close)}?"
    shown = ", ".join(str(item) for item in known[:12])
    return f" Known: {shown}{', ...' if len(known) > 12 else ''}." if known else ""


def to_float32(array: pa.Array, column: str, source: Source, first_row: int) -> np.ndarray:
    """One batch of a column as float32, missing as NaN. Raises UserError with row and column for text or
    infinity.
    """
    kind = array.type
    if pa.types.is_dictionary(kind):
        return to_float32(array.dictionary_decode(), column, source, first_row)
    if is_text(kind):
        values = _parse_numbers(array)
        if isinstance(values, int):
            text = array[values].as_py()
            hint = "; decimals are written with a point" if "," in text else ""
            raise UserError(
                f"{source.path} {source.place(first_row + values)}, column {column!r}: {text!r} is not a number{hint}"
            )
    elif pa.types.is_null(kind):
        values = np.full(len(array), np.nan)
    elif is_number(kind):
        integral = pa.types.is_integer(kind)
        array = array.cast(pa.uint8()) if pa.types.is_boolean(kind) else array
        # Large integers lose digits as float32 anyway, so that arrow need not refuse them.
        values = array.cast(pa.float64(), safe=not integral).to_numpy(zero_copy_only=False)
    else:
        raise UserError(f"{source.path}, column {column!r} is of type {kind}, not numbers")
    with np.errstate(over="ignore"):
        result = values.astype(np.float32)
    infinite = np.isinf(result)
    if infinite.any():
        row = int(infinite.argmax())
        what = "infinite" if np.isinf(values[row]) else "too large for float32"
        raise UserError(f"{source.path} {source.place(first_row + row)}, column {column!r}: {values[row]} is {what}")
    return result


def is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)


def is_number(kind: pa.DataType) -> bool:
    return (
        pa.types.is_integer(kind)
        or pa.types.is_floating(kind)
        or pa.types.is_boolean(kind)
        or pa.types.is_decimal(kind)
    )


def mostly_numbers(array: pa.Array) -> bool:
    """Whether a column is numeric, or text of which at least half parses as numbers (or which is all
    missing).
    """
    if pa.types.is_null(array.type) or is_number(array.type):
        return True
    if not is_text(array.type):
        return False
    present = array.filter(pc.invert(_is_missing(array)))[:200]
    good = sum(not isinstance(_parse_numbers(present[i : i + 1]), int) for i in range(len(present)))
    return 2 * good >= len(present)


def _is_missing(array: pa.Array) -> pa.Array:
    return pc.is_in(pc.utf8_trim_whitespace(array.cast(pa.string())), value_set=_MISSING)


def _parse_numbers(array: pa.Array) -> np.ndarray | int:
    """float64 with NaN where missing, or the index of the first text that is no number."""
    text = pc.utf8_trim_whitespace(array.cast(pa.string()))
    text = pc.if_else(pc.is_in(text, value_set=_MISSING), pa.scalar(None, pa.string()), text)
    try:
        return pc.cast(text, pa.float64()).to_numpy(zero_copy_only=False)
    except pa.ArrowInvalid:
        for index in range(len(text)):
            try:
                pc.cast(text[index], pa.float64())
            except pa.ArrowInvalid:
                return index
        raise


def _open_parquet(path: Path) -> Source:
    try:
        with pq.ParquetFile(path) as file:
            schema, rows = file.schema_arrow, file.metadata.num_rows
            wrong = oversized(path, file.metadata)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # a name of a column may be any bytes
        detail = "the file is empty" if path.stat().st_size == 0 else str(error).splitlines()[0]
        raise UserError(f"cannot read {path} as Parquet: {detail}") from None
    if wrong is not None:
        raise UserError(f"{path} is damaged: {wrong}; write or fetch it again")
    if rows == 0:
        raise UserError(f"{path} has columns and no rows")
    _check_names(path, schema.names)
    return Source(path, dict(zip(schema.names, schema.types, strict=True)))


def _open_csv(path: Path) -> Source:
    try:
        with pa.input_stream(str(path), compression="detect") as stream:
            start = stream.read(1 << 20)
    except (pa.ArrowException, OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0]}") from None
    text = start.decode("utf-8-sig", errors="replace")
    lines = text.splitlines()
    blank = next((i for i, line in enumerate(lines) if line.strip()), None)
    if blank is None:
        raise UserError(f"{path} is empty")
    delimiter = max(",;\t|", key=lambda mark: (lines[blank].count(mark), mark == ","))
    names = [name.strip() for name in next(csv.reader([lines[blank]], delimiter=delimiter))]
    if all(_is_value(name) for name in names):
        raise UserError(f"{path}: the first line must hold the names of the columns, got {lines[blank][:80]!r}")
    if not any(line.strip() for line in lines[blank + 1 :]):
        raise UserError(f"{path} has a header and no rows")
    _check_names(path, names)
    return Source(path, dict.fromkeys(names, pa.string()), delimiter, blank + 1)


def _check_names(path: Path, names: list[str]) -> None:
    double = sorted({name for name in names if names.count(name) > 1})
    if double:
        raise UserError(f"{path} has several columns of the name {double[0]!r}; rename them")


def _is_value(text: str) -> bool:
    """Whether a header field is a number or starts like a date."""
    try:
        float(text)
    except ValueError:
        return len(text) > 4 and text[:4].isdigit() and text[4] in "-/"
    return True


def _near_files(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" There is no folder {folder} either."
    names = sorted(item.name for item in folder.iterdir() if table_suffix(item) in (*_TEXT, *_PARQUET))
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else _files_in(folder)


def _files_in(folder: Path) -> str:
    names = sorted(item.name for item in folder.iterdir() if table_suffix(item) in (*_TEXT, *_PARQUET))
    if not names:
        return f" The folder {folder.resolve()} holds no table."
    return f" {folder} holds {', '.join(names[:8])}{', ...' if len(names) > 8 else ''}."
