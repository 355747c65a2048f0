"""What the pages of a Parquet file say of their size, looked at before Arrow allocates it.

A page begins with a PageHeader in Thrift's compact protocol, whose fields 2 and 3 are its sizes before and after
compression (parquet-format, parquet.thrift). Arrow takes them at their word: three kilobytes of file can ask for two
gigabytes.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

_HEADER = 1 << 12  # bytes of a file that are read for a header; statistics in it may be longer
_ALLOWED = 64 << 20  # bytes of a page that are not questioned


def oversized(path: Path, metadata: Any) -> str | None:
    """Why a file is not to be read: a page that claims more than its whole column has, None for every other file.

    metadata: pyarrow's FileMetaData. A file of another form than is known here is left to Arrow.
    """
    with path.open("rb") as file:
        for group in range(metadata.num_row_groups):
            for column in range(metadata.num_columns):
                chunk = metadata.row_group(group).column(column)
                places = [p for p in (chunk.dictionary_page_offset, chunk.data_page_offset) if p]
                place = min(places, default=0)
                end = place + chunk.total_compressed_size
                while 0 < place < end:
                    file.seek(place)
                    sizes = _sizes(file.read(_HEADER))
                    if sizes is None:
                        break
                    whole, stored, length = sizes
                    of_column = chunk.total_uncompressed_size, chunk.total_compressed_size
                    for said, most in zip((whole, stored), of_column, strict=True):
                        if said > max(most, _ALLOWED):
                            name = chunk.path_in_schema
                            return f"a page of the column {name!r} claims {said:,} bytes, the column has {most:,}"
                    if stored < 0:
                        break
                    place += length + stored
    return None


def _sizes(head: bytes) -> tuple[int, int, int] | None:
    """(size of the page, size as stored, length of the header) of a PageHeader, None for what is none."""
    found: dict[int, int] = {}
    try:
        end = _struct(head, 0, found, 0)
    except (IndexError, ValueError):
        return None
    return (found[2], found[3], end) if {2, 3} <= found.keys() else None


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("no number")


def _struct(data: bytes, at: int, found: dict[int, int], depth: int) -> int:
    """The place after a struct; its own 32-bit numbers by field go into `found`."""
    field = 0
    while data[at]:
        step, kind = data[at] >> 4, data[at] & 15
        at += 1
        if step:
            field += step
        else:
            number, at = _number(data, at)
            field = (number >> 1) ^ -(number & 1)
        if kind == 5:
            number, at = _number(data, at)
            number &= 0xFFFFFFFF  # as Arrow reads it
            found[field] = (number >> 1) ^ -(number & 1)
        else:
            at = _after(data, at, kind, depth)
    return at + 1


def _after(data: bytes, at: int, kind: int, depth: int) -> int:
    """The place after a value of a field."""
    if kind in (1, 2):  # true, false
        return at
    if kind == 3:
        return at + 1
    if kind in (4, 5, 6):
        return _number(data, at)[1]
    if kind == 7:
        return at + 8
    if kind == 8:
        length, at = _number(data, at)
        return at + length
    if kind == 12 and depth < 8:
        return _struct(data, at, {}, depth + 1)
    raise ValueError(f"no type of a page header: {kind}")  # lists and maps are in none
