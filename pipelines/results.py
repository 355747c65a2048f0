"""What a run says and leaves behind: tables on the terminal, metrics and tables as files."""

from __future__ import annotations

import csv
import json
import math
import numbers
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from .atomic import atomic_path, atomic_write_text

Row = Mapping[str, Any]


def format_cell(value: Any) -> str:
    """A number with four significant digits, whole numbers whole, "-" for what is absent, text as it is."""
    if value is None:
        return "-"
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        return str(value)
    if isinstance(value, numbers.Integral):
        return str(int(value))
    number = float(value)
    if not math.isfinite(number):
        return "-" if math.isnan(number) else str(number)
    if number == 0 or 1e-3 <= abs(number) < 1e5:
        # fixed point keeps the digits of a column under each other
        return f"{number:.{max(0, 3 - math.floor(math.log10(abs(number)))) if number else 1}f}"
    return f"{number:.3g}"


def format_table(rows: Sequence[Row], columns: Sequence[str] | None = None, title: str = "") -> str:
    """The table as plain text: a header, a rule of dashes, numbers to the right; every cell whole."""
    names, cells, is_number = _cells(rows, columns)
    widths = [max(len(line[i]) for line in [names, *cells]) for i in range(len(names))]

    def line(values: Sequence[str]) -> str:
        fields = [
            value.rjust(width) if right else value.ljust(width)
            for value, width, right in zip(values, widths, is_number, strict=True)
        ]
        return "  ".join(fields).rstrip()

    lines = [line(names), "  ".join("-" * width for width in widths), *(line(row) for row in cells)]
    return "\n".join(([title, ""] if title else []) + lines)


def print_table(
    rows: Sequence[Row], columns: Sequence[str] | None = None, title: str = "", *, file: TextIO | None = None
) -> None:
    """Print rows as a table: with rich on a terminal, else as plain aligned text, never cut.

    rows: one mapping a line; a missing key or None prints as "-". columns: which keys, in order; None takes
    all in the order of their first appearance. file: where to, None for standard output.
    """
    out = sys.stdout if file is None else file
    if not out.isatty():
        print("\n" + format_table(rows, columns, title), file=out, flush=True)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    names, cells, is_number = _cells(rows, columns)
    table = Table(title=Text(title) if title else None, title_justify="left")
    for name, right in zip(names, is_number, strict=True):
        # fold, not crop: a narrow terminal breaks a long cell over lines
        table.add_column(Text(name), justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))  # Text, so that brackets in a name are not markup
    Console(file=out).print(table)


def _cells(rows: Sequence[Row], columns: Sequence[str] | None) -> tuple[list[str], list[list[str]], list[bool]]:
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[format_cell(row.get(column)) for column in columns] for row in rows]
    is_number = []
    for column in columns:
        values = [row[column] for row in rows if row.get(column) is not None]
        is_number.append(bool(values) and all(isinstance(v, numbers.Real) and not isinstance(v, bool) for v in values))
    return list(columns), cells, is_number


def write_metrics(run_dir: str | Path, metrics: Mapping[str, Any], name: str = "metrics") -> Path:
    """Write `<name>.json`, nested as given, and `<name>.csv`, a line for each number; returns the first.

    A number that JSON cannot hold (NaN, infinity) is null there and empty in the CSV.
    """
    plain = plain_values(metrics)
    path = Path(run_dir) / f"{name}.json"
    atomic_write_text(path, json.dumps(plain, indent=2, allow_nan=False) + "\n")
    write_csv(Path(run_dir) / f"{name}.csv", [{"name": key, "value": value} for key, value in flatten(plain)])
    return path


def write_csv(path: str | Path, rows: Sequence[Row], columns: Sequence[str] | None = None) -> Path:
    """Write rows as CSV at full precision, all or nothing; an absent value is an empty field."""
    if columns is None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows([["" if (v := row.get(c)) is None else v for c in columns] for row in rows])
    return Path(path)


def plain_values(value: Any) -> Any:
    """Tensors, arrays and numpy numbers as Python ones, paths as text, NaN and infinity as None."""
    if isinstance(value, Mapping):
        return {str(key): plain_values(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain_values(item) for item in value]
    if hasattr(value, "tolist"):  # numpy and torch, scalars included
        return plain_values(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """The leaves of nested mappings and lists with their path: ("test/horizon/mae/0", 0.31), ..."""
    if isinstance(value, Mapping):
        items = [(str(key), item) for key, item in value.items()]
    elif isinstance(value, (list, tuple)):
        items = [(str(index), item) for index, item in enumerate(value)]
    else:
        yield prefix, value
        return
    for key, item in items:
        yield from flatten(item, f"{prefix}/{key}" if prefix else key)
