"""Labelled clips from folders, from the names of files, and from tables of files or of time spans."""

from __future__ import annotations

import math
import re
import string
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from ..labelled_tables import SPLIT_NAMES, TABLES, table_rows
from .clips import Clip
from .faults import missing_error

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64", ".rf64")
# The usual names of a table's columns.
COLUMNS = {
    "path": ("path", "file", "filename", "audio"),
    "label": ("label", "class"),
    "start": ("start", "onset"),
    "end": ("end", "offset"),
    "group": ("group", "speaker"),
    "split": ("split",),
}
_GROUPS = ("group", "speaker")  # fields of a pattern
_EXAMPLE = "{label}_{speaker}_{take}"
_STAGES = ("train", "val", "test")


def audio_files(root: Path) -> list[Path]:
    """The audio files of a folder at any depth, in order; hidden ones and other kinds are left out."""
    found = (p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())
    return sorted(p for p in found if not any(part.startswith(".") for part in p.relative_to(root).parts))


def recordings_in(path: str | Path) -> list[Path]:
    """A recording, or all audio files of a folder. Raises UserError for neither, and for a folder without any."""
    file = Path(path).expanduser()
    if not file.exists():
        siblings = [p.name for p in file.parent.iterdir()] if file.parent.is_dir() else []
        raise UserError(f"no such file or folder: {file}.{nearest(file.name, siblings)}")
    files = [file] if file.is_file() else audio_files(file)
    if not files:
        raise UserError(f"{file} has no audio file ({', '.join(SUFFIXES)})")
    return files


def folder_clips(path: str | Path) -> list[Clip]:
    """The files of a folder whose sub-folders are labels, or whose train, val and test hold such folders.

    Raises UserError for a folder without sub-folders and for a label without files.
    """
    root = _folder(path)
    folders = _folders(root)
    splits = {folder: SPLIT_NAMES[folder.name.lower()] for folder in folders if folder.name.lower() in SPLIT_NAMES}
    if "train" not in splits.values():
        return list(_label_folders(root, ""))
    others = [folder.name for folder in folders if folder not in splits]
    if others:
        raise UserError(
            f"{root} has train beside the folder {others[0]!r}: either folders of splits with labels in them, or "
            "folders of labels"
        )
    return [clip for folder, split in splits.items() for clip in _label_folders(folder, split)]


def named_clips(path: str | Path, pattern: str) -> list[Clip]:
    """The files of a folder, with labels from their names without suffix: "{label}_{speaker}_{take}".

    pattern: {label}, and where wanted {speaker} or {group}, which splits keep together, {split}, and any other fields.
    A field takes as few characters as it can; a pattern with "/" is for the path below the folder. Raises UserError for
    a pattern without {label} and for a file that does not match.
    """
    root = _folder(path)
    expression, wanted = _expression(pattern)
    files = audio_files(root)
    if not files:
        raise UserError(f"{root} has no audio file ({', '.join(SUFFIXES)}){_tables_hint(root)}")
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
        clips.append(Clip(file, 0.0, None, fields["label"], group, SPLIT_NAMES.get(split.lower(), "")))
    if other:
        raise UserError(
            f"{len(other):,} of {len(files):,} names do not match the pattern {pattern!r} ({', '.join(wanted)}), "
            f"the first is {other[0]}"
        )
    return clips


def table_clips(path: str | Path, columns: Mapping[str, str | None] | None = None) -> list[Clip]:
    """The rows of a CSV, TSV or JSONL table: path and label, and where there are such columns start and end in seconds,
    group (or speaker) and split.

    Paths are relative to the table. A row without start and end is its whole file. columns: names for the keys of
    COLUMNS, None: the usual ones. Raises UserError naming file and line: a column or a file that is not there, an empty
    label, a start or end that is no number, an end that is not after its start. Whether spans end within their files
    says `checked_clips`, and whether they overlap `check_overlaps`.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise missing_error(file)
    if file.suffix.lower() not in TABLES:
        raise UserError(f"{file} ends in {file.suffix or 'nothing'}, a table in {', '.join(TABLES)}")
    chosen: dict[str, str | None] | None = None
    clips = []
    for line, row in table_rows(file):
        if chosen is None:
            chosen = _columns(file, list(row), columns or {})
        clips.append(_row_clip(file, f"{file}, line {line}", row, chosen))
    if not clips:
        raise UserError(f"{file} has no rows")
    return clips


# folders --------------------------------------------------------------------------------------------------------------


def _folder(path: str | Path) -> Path:
    root = Path(path).expanduser()
    if root.is_dir():
        return root
    if root.is_file():
        raise UserError(f"{root} is a file; a folder of audio files is expected")
    siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
    raise UserError(f"no such folder: {root}.{nearest(root.name, siblings)}")


def _folders(root: Path) -> list[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))


def _label_folders(root: Path, split: str) -> Iterator[Clip]:
    folders = _folders(root)
    if not folders:
        raise UserError(
            f"{root} has no sub-folders: each is a label, and the files in it its clips{_tables_hint(root)}"
        )
    for folder in folders:
        files = audio_files(folder)
        if not files:
            raise UserError(f"the label {folder.name!r} has no audio file ({', '.join(SUFFIXES)}): {folder}")
        for file in files:
            yield Clip(file, 0.0, None, folder.name, None, split)


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


def _columns(file: Path, there: list[str], wanted: Mapping[str, str | None]) -> dict[str, str | None]:
    """The name of each column, None for one that the table does not have."""
    for key, name in wanted.items():
        if key not in COLUMNS:
            raise UserError(f"columns has the key {key!r}.{nearest(key, COLUMNS)}")
        if name is not None and name not in there:
            raise UserError(f"{file} has no column {name!r} ({key}).{nearest(name, there)}")
    found = {
        key: wanted.get(key) or next((name for name in usual if name in there), None) for key, usual in COLUMNS.items()
    }
    for key in ("path", "label"):
        if found[key] is None:
            raise UserError(f"{file} has no column {key!r}; name it.{nearest(key, there)}")
    if (found["start"] is None) != (found["end"] is None):
        has, lacks = ("start", "end") if found["end"] is None else ("end", "start")
        raise UserError(f"{file} has the column {found[has]!r} ({has}) and none for {lacks}.{nearest(lacks, there)}")
    return found


def _row_clip(file: Path, where: str, row: Mapping[str, Any], columns: Mapping[str, str | None]) -> Clip:
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
    audio = file.parent / Path(cell("path")).expanduser()
    if not audio.is_file():
        raise UserError(f"{where}: {missing_error(audio)}")
    start, end = 0.0, None
    if columns["start"] is not None and (cell("start") or cell("end")):
        start, end = seconds("start"), seconds("end")
        if end <= start:
            raise UserError(f"{where}: the span ends at {end:g}, not after its start {start:g}")
    split = cell("split")
    if split and split.lower() not in SPLIT_NAMES:
        raise UserError(f"{where}: the column {columns['split']!r} is {split!r}.{nearest(split, _STAGES)}")
    return Clip(audio, start, end, cell("label"), cell("group") or None, SPLIT_NAMES.get(split.lower(), ""), where)
