"""Labelled files from folders, from their names, and from tables of files or of time spans, whatever their kind."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UserError, nearest
from .labelled_tables import SPLIT_NAMES, TABLES, file_of_row, table_rows

# The usual names of a table's columns, but for those of the path and the label, which depend on the kind.
COLUMNS: dict[str, tuple[str, ...]] = {
    "start": ("start", "onset"),
    "end": ("end", "offset"),
    "group": ("group", "speaker"),
    "split": ("split",),
}
_GROUPS = ("group", "speaker")  # fields of a pattern
_EXAMPLE = "{label}_{speaker}_{take}"
_STAGES = ("train", "val", "test")


class FileKind(NamedTuple):
    """What differs between kinds of files. one: "audio file", for messages. suffixes: in lower case. missing: the error
    of a path that is no file. columns: usual names of a table's columns by key, "path" and "label" among them."""

    one: str
    suffixes: Sequence[str]
    missing: Callable[[Path], Exception]
    columns: Mapping[str, Sequence[str]]


class Labelled(NamedTuple):
    """The fields that audio's `Clip` and video's `VideoClip` begin with."""

    path: Path
    start: float
    end: float | None
    label: str
    group: str | None = None
    split: str = ""
    where: str = ""


def files_in(root: Path, kind: FileKind) -> list[Path]:
    """The files of a kind in a folder at any depth, in order; hidden ones and other kinds are left out."""
    found = (p for p in root.rglob("*") if p.suffix.lower() in kind.suffixes and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts))


def file_or_folder(path: str | Path, kind: FileKind) -> list[Path]:
    """A file, or all files of a kind in a folder. Raises UserError for neither, and for a folder without any."""
    file = Path(path).expanduser()
    if not file.exists():
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"no such file or folder: {file}.{nearest(file.name, siblings)}")
    files = [file] if file.is_file() else files_in(file, kind)
    if not files:
        raise UserError(f"{file} has no {kind.one} ({', '.join(kind.suffixes)})")
    return files


def folder_files(path: str | Path, kind: FileKind) -> list[Labelled]:
    """The files of a folder whose sub-folders are labels, or whose train, val and test hold such folders.

    Raises UserError for a folder without sub-folders and for a label without files.
    """
    root = _folder(path, kind)
    folders = _folders(root)
    splits = {folder: SPLIT_NAMES[folder.name.lower()] for folder in folders if folder.name.lower() in SPLIT_NAMES}
    if "train" not in splits.values():
        return list(_label_folders(root, "", kind))
    others = [folder.name for folder in folders if folder not in splits]
    if others:
        raise UserError(
            f"{root} has train beside the folder {others[0]!r}: either folders of splits with labels in them, or "
            "folders of labels"
        )
    return [clip for folder, split in splits.items() for clip in _label_folders(folder, split, kind)]


def named_files(path: str | Path, pattern: str, kind: FileKind) -> list[Labelled]:
    """The files of a folder, with labels from their names without suffix: "{label}_{speaker}_{take}".

    pattern: {label}, and where wanted {speaker} or {group}, which splits keep together, {split}, and any other fields.
    A field takes as few characters as it can; a pattern with "/" is for the path below the folder. Raises UserError for
    a pattern without {label} and for a file that does not match.
    """
    root = _folder(path, kind)
    expression, wanted = _expression(pattern)
    files = files_in(root, kind)
    if not files:
        raise UserError(f"{root} has no {kind.one} ({', '.join(kind.suffixes)}){_tables_hint(root)}")
    clips, other = [], []
    for file in files:
        name = file.relative_to(root).with_suffix("").as_posix() if "/" in pattern else file.stem
        match = expression.fullmatch(name)
        if match is None:
            other.append(file)
            continue
        fields = match.groupdict()
        split = fields.get("split", "")
        if split and split.lower() not in SPLIT_NAMES:
            raise UserError(f"{file}: the split is {split!r}.{nearest(split, _STAGES)}")
        group = next((fields[field] for field in _GROUPS if field in fields), None)
        clips.append(Labelled(file, 0.0, None, fields["label"], group, SPLIT_NAMES.get(split.lower(), "")))
    if other:
        raise UserError(
            f"{len(other):,} of {len(files):,} names do not match the pattern {pattern!r} ({', '.join(wanted)}), "
            f"the first is {other[0]}"
        )
    return clips


def table_files(path: str | Path, kind: FileKind, columns: Mapping[str, str | None] | None = None) -> list[Labelled]:
    """The rows of a CSV, TSV or JSONL table: path and label, and where there are such columns start and end in seconds,
    group (or speaker) and split.

    Paths are relative to the table. A row without start and end is its whole file. columns: names for its
    keys, None: the usual ones. Raises UserError naming file and line: a column or a file that is not there, an empty
    label, a start or end that is no number, an end that is not after its start. Whether spans end within their files
    a kind's `checked_clips` says, and whether they overlap `check_overlaps`.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise kind.missing(file)
    if file.suffix.lower() not in TABLES:
        raise UserError(f"{file} ends in {file.suffix or 'nothing'}, a table in {', '.join(TABLES)}")
    chosen: dict[str, str | None] | None = None
    clips = []
    for line, row in table_rows(file):
        if chosen is None:
            chosen = _columns(file, list(row), columns or {}, kind)
        clips.append(_row(file, f"{file}, line {line}", row, chosen, kind))
    if not clips:
        raise UserError(f"{file} has no rows")
    return clips


# folders --------------------------------------------------------------------------------------------------------------


def _folder(path: str | Path, kind: FileKind) -> Path:
    root = Path(path).expanduser()
    if root.is_dir():
        return root
    if root.is_file():
        raise UserError(f"{root} is a file; a folder of {kind.one}s is expected")
    siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
    raise UserError(f"no such folder: {root}.{nearest(root.name, siblings)}")


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _label_folders(root: Path, split: str, kind: FileKind) -> Iterator[Labelled]:
    folders = _folders(root)
    if not folders:
        raise UserError(
            f"{root} has no sub-folders: each is a label, and the files in it its clips{_tables_hint(root)}"
        )
    for folder in folders:
        files = files_in(folder, kind)
        if not files:
            raise UserError(f"the label {folder.name!r} has no {kind.one} ({', '.join(kind.suffixes)}): {folder}")
        for file in files:
            yield Labelled(file, 0.0, None, folder.name, None, split)


def _tables_hint(root: Path) -> str:
    tables = [p.name for p in sorted(root.iterdir()) if p.suffix.lower() in TABLES]
    return f"; did you mean the table {root / tables[0]}?" if tables else ""


def _expression(pattern: str) -> tuple[re.Pattern[str], list[str]]:
    """A pattern as a regular expression, and the names of its fields."""
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise UserError(f"the pattern {pattern!r} cannot be read: {error}") from None
    text, fields = "", []
    for literal, field, _, _ in parts:
        text += re.escape(literal)
        if field is None:
            continue
        if not field.isidentifier() or field in fields:
            what = "twice" if field in fields else "which is no name"
            raise UserError(f"the pattern {pattern!r} has {{{field}}}, {what}; such as {_EXAMPLE!r}")
        fields.append(field)
        text += f"(?P<{field}>[^/]+?)"
    if "label" not in fields:
        raise UserError(f"the pattern {pattern!r} has no {{label}}; such as {_EXAMPLE!r}")
    return re.compile(text), fields


# tables ---------------------------------------------------------------------------------------------------------------


def _columns(file: Path, there: list[str], wanted: Mapping[str, str | None], kind: FileKind) -> dict[str, str | None]:
    """The name of each column, None for one that the table does not have."""
    known = {**kind.columns, **COLUMNS}
    for key, name in wanted.items():
        if key not in known:
            raise UserError(f"columns has the key {key!r}.{nearest(key, known)}")
        if name is not None and name not in there:
            raise UserError(f"{file} has no column {name!r} ({key}).{nearest(name, there)}")
    found = {
        key: wanted.get(key) or next((name for name in usual if name in there), None) for key, usual in known.items()
    }
    for key in ("path", "label"):
        if found[key] is None:
            raise UserError(f"{file} has no column {key!r}; name it.{nearest(key, there)}")
    if (found["start"] is None) != (found["end"] is None):
        has, lacks = ("start", "end") if found["end"] is None else ("end", "start")
        raise UserError(f"{file} has the column {found[has]!r} ({has}) and none for {lacks}.{nearest(lacks, there)}")
    return found


def _row(file: Path, where: str, row: Mapping[str, Any], columns: Mapping[str, str | None], kind: FileKind) -> Labelled:
    def cell(key: str) -> str:
        value = row.get(columns[key] or "")
        if isinstance(value, (dict, list)):
            raise UserError(f"{where}: {columns[key]!r} holds a {type(value).__name__}, expected text or a number")
        return "" if value is None else str(value).strip()

    def seconds(key: str) -> float:
        text = cell(key)
        try:
            value = float(text)
        except ValueError:
            hint = "; decimals are written with a point" if "," in text else ""
            raise UserError(f"{where}: {columns[key]!r} is {text!r}, expected seconds{hint}") from None
        if not math.isfinite(value) or value < 0:
            raise UserError(f"{where}: {columns[key]!r} is {text}, expected seconds from 0")
        return value

    for key in ("path", "label"):
        if not cell(key):
            raise UserError(f"{where}: the column {columns[key]!r} is empty")
    found = file_of_row(file, cell("path"), where)
    if not found.is_file():
        raise UserError(f"{where}: {kind.missing(found)}")
    start, end = 0.0, None
    if columns["start"] is not None and (cell("start") or cell("end")):
        start, end = seconds("start"), seconds("end")
        if end <= start:
            raise UserError(f"{where}: the span ends at {end:g}, not after its start {start:g}")
    split = cell("split")
    if split and split.lower() not in SPLIT_NAMES:
        raise UserError(f"{where}: the column {columns['split']!r} is {split!r}.{nearest(split, _STAGES)}")
    return Labelled(found, start, end, cell("label"), cell("group") or None, SPLIT_NAMES.get(split.lower(), ""), where)
