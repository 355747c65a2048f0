"""Tables of labelled examples, CSV, TSV or JSON lines, read row by row; what splits may be called."""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .errors import UserError

TABLES = (".csv", ".tsv", ".jsonl", ".ndjson")
SPLIT_NAMES = {
    **{"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val", "dev": "val"},
    **{"eval": "val", "test": "test", "testing": "test"},
}


def table_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table with the number of their line."""
    if file.suffix.lower() in (".jsonl", ".ndjson"):
        yield from _json_rows(file)
        return
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a document is a field
    with file.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as opened:
        head = opened.readline()
        opened.seek(0)
        delimiter = "\t" if file.suffix.lower() == ".tsv" else ";" if ";" in head and "," not in head else ","
        reader = csv.reader(opened, delimiter=delimiter, strict=True)
        try:
            header = next(reader, None)
            if not header:
                raise UserError(f"{file} is empty: its first line names the columns")
            line = reader.line_num + 1
            for fields in reader:
                if len(fields) > len(header) or (0 < len(fields) < len(header)):
                    raise UserError(
                        f"{file}, line {line}: {len(fields)} fields, but {len(header)} columns; "
                        "a text with commas or line breaks stands in double quotes"
                    )
                if fields:
                    yield line, dict(zip(header, fields, strict=True))
                line = reader.line_num + 1
        except csv.Error as error:
            raise UserError(f"{file}, line {reader.line_num} is not CSV: {error}") from None


def file_of_row(table: Path, text: str, where: str) -> Path:
    """The file that a cell names, relative to the table: anywhere that the user can read, also through "..", links or
    an absolute path. It need not be there. Raises UserError for a text that can be no path."""
    try:
        found = table.parent / Path(text).expanduser()
        found.is_file()
    except (OSError, RuntimeError, ValueError) as error:  # too long; the home of nobody; a zero byte
        why = getattr(error, "strerror", None) or error
        raise UserError(f"{where}: {text[:80]!r} can be no path ({why})") from None
    return found


def _json_rows(file: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file.open("rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line.decode("utf-8", "surrogateescape"))
            except (ValueError, RecursionError) as error:  # also of a number with too many digits
                raise UserError(f"{file}, line {number} is not JSON: {error}") from None
            if not isinstance(record, dict):
                raise UserError(f"{file}, line {number} holds a {type(record).__name__}, expected an object")
            yield number, record
