"""Labelled documents of a user's own files: a folder whose sub-folders are labels, or a table with a column of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, nearest
from ..labelled_tables import SPLIT_NAMES, TABLES, file_of_row, table_rows

_DEFAULTS = {"text": "text", "file": "file", "label": "label"}


class Example(NamedTuple):
    """name: relative path, or file and row. content: its bytes, or the file that has them. label: None where there is
    none. split: "train", "val", "test" or "" where the files do not say."""

    name: str
    content: bytes | Path
    label: str | None
    split: str


def find_parts(path: str, *, labelled: bool = True) -> list[tuple[str, Path]]:
    """The folders and tables that `path` stands for, each with its split: itself under "", or its train, val and test.

    labelled=False: `path` as a whole, which may be a single document. Raises UserError, naming the nearest, where there
    is nothing.
    """
    root = Path(path).expanduser()
    if root.is_file():
        if labelled:
            _check_table(path, root)
        return [("", root)]
    if not root.is_dir():
        siblings = [p.name for p in root.parent.iterdir()] if root.parent.is_dir() else []
        raise UserError(f"no such file or folder: data.path={path}.{nearest(root.name, siblings)}")
    if not labelled:
        return [("", root)]
    entries = sorted(p for p in root.iterdir() if not p.name.startswith("."))
    parts = []
    for entry in entries:
        stem = entry.name if entry.is_dir() else entry.stem
        if stem.lower() in SPLIT_NAMES and (entry.is_dir() or entry.suffix.lower() in TABLES):
            parts.append((SPLIT_NAMES[stem.lower()], entry))
    names = [name for name, _ in parts]
    if "train" not in names:
        return [("", root)]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        found = ", ".join(entry.name for name, entry in parts if name == twice[0])
        raise UserError(f"data.path={path} has {twice[0]} twice: {found}; keep one")
    others = [entry.name for entry in entries if entry.is_dir() and entry not in [p for _, p in parts]]
    if others:
        raise UserError(
            f"data.path={path} has train beside the folder {others[0]!r}: "
            "either folders of splits (train, val, test) with labels in them, or folders of labels"
        )
    return parts


def part_files(part: Path) -> list[Path]:
    """Every file that a part is read from, for the key of the cache (a table's `file` column not followed)."""
    return [part] if part.is_file() else sorted(p for p in part.rglob("*") if p.is_file() and not _hidden(p, part))


def read_part(split: str, part: Path, columns: Mapping[str, str | None], *, labelled: bool = True) -> Iterator[Example]:
    """The examples of a folder or table. labelled=False asks for no labels: a folder's files, a table's texts, or
    the file itself."""
    if part.suffix.lower() in TABLES and part.is_file():
        yield from _read_table(split, part, columns, labelled)
    elif part.is_file():
        yield Example(part.name, part, None, split)
    elif labelled:
        yield from _read_folder(split, part)
    else:
        for file in part_files(part):
            yield Example(file.relative_to(part).as_posix(), file, None, split)


def _hidden(file: Path, root: Path) -> bool:
    return any(name.startswith(".") for name in file.relative_to(root).parts)


def _check_table(path: str, file: Path) -> None:
    if file.suffix.lower() not in TABLES:
        raise UserError(
            f"data.path={path} is a file ending in {file.suffix or 'nothing'}: labelled documents come as a folder of "
            f"folders, or as a table ({', '.join(TABLES)})"
        )


def _read_folder(split: str, root: Path) -> Iterator[Example]:
    folders = sorted(p for p in root.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not folders:
        tables = [p.name for p in sorted(root.iterdir()) if p.suffix.lower() in TABLES]
        hint = f"; did you mean data.path={root / tables[0]}?" if tables else ""
        raise UserError(f"{root} has no sub-folders: each is a label, and the files in it are its documents{hint}")
    for folder in folders:
        files = part_files(folder)
        if not files:
            raise UserError(f"the label {folder.name!r} has no documents: {folder} is empty")
        for file in files:
            name = file.relative_to(root).as_posix()
            yield Example(f"{split}/{name}" if split else name, file, folder.name, split)


def _read_table(split: str, file: Path, columns: Mapping[str, str | None], labelled: bool) -> Iterator[Example]:
    chosen: dict[str, str | None] | None = None
    for number, row in table_rows(file):
        where = f"{file}, line {number}"
        if chosen is None:
            chosen = _columns(file, list(row), columns, labelled)
        content: bytes | Path
        if chosen["text"] is not None:
            content = _cell(row, chosen["text"], where).encode("utf-8", "surrogateescape")
            if not content:
                raise UserError(f"{where}: the column {chosen['text']!r} is empty; remove the row")
        else:
            content = file_of_row(file, _cell(row, str(chosen["file"]), where), where)
            if not content.is_file():
                siblings = [p.name for p in content.parent.iterdir()] if content.parent.is_dir() else []
                raise UserError(f"{where}: no such file {content}.{nearest(content.name, siblings)}")
        label = None
        if chosen["label"] is not None:
            label = _cell(row, chosen["label"], where).strip()
            if not label and labelled:
                raise UserError(f"{where}: the column {chosen['label']!r} is empty; label the row or remove it")
        part = split
        if chosen["split"] is not None and not split:
            given = _cell(row, chosen["split"], where).strip()
            if given.lower() not in SPLIT_NAMES:
                raise UserError(
                    f"{where}: the column {chosen['split']!r} is {given!r}.{nearest(given, ('train', 'val', 'test'))}"
                )
            part = SPLIT_NAMES[given.lower()]
        yield Example(f"{file.name}:{number}", content, label or None, part)


def _columns(file: Path, there: list[str], wanted: Mapping[str, str | None], labelled: bool) -> dict[str, str | None]:
    """The name of each column; text or file, and label, are found by their usual names where none is given."""
    for key, name in wanted.items():
        if name is not None and name not in there:
            raise UserError(f"{file} has no column {name!r} (data.{key}_column).{nearest(name, there)}")
    found = {key: name or (_DEFAULTS.get(key) if _DEFAULTS.get(key) in there else None) for key, name in wanted.items()}
    if wanted["text"] is None and wanted["file"] is not None:
        found["text"] = None
    if found["text"] is None and found["file"] is None:
        raise UserError(
            f"{file} has no column 'text' or 'file'; name the documents' with data.text_column or data.file_column."
            f" Known: {', '.join(there)}."
        )
    if labelled and found["label"] is None:
        raise UserError(f"{file} has no column 'label'; name it with data.label_column.{nearest('label', there)}")
    return found


def _cell(row: Mapping[str, Any], column: str, where: str) -> str:
    value = row.get(column)
    if value is None:
        return ""
    if isinstance(value, (dict, list)):
        raise UserError(f"{where}: {column!r} holds a {type(value).__name__}, expected text or a number")
    return str(value)
