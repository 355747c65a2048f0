"""Documents of a user's own files: text, folders, JSON lines, and a sample that is always there.

A document is its name and its bytes. Nothing is decoded: invalid UTF-8 passes through to byte models.
"""

from __future__ import annotations

import glob
import json
import mmap
import re
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError, nearest

SAMPLES = ("stdlib",)
TEXT_SUFFIXES = (".txt", ".md", ".rst", ".tex", ".py", ".c", ".h", ".cpp", ".rs", ".go", ".java", ".js", ".ts", ".html")
LINE_SUFFIXES = (".jsonl", ".ndjson")
_NOT_SOURCES = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Document(NamedTuple):
    """name: stable over machines where it can be, since splits depend on it. The document is content[begin:end], of
    bytes or of a mapped file, which may be longer than memory."""

    name: str
    content: bytes | mmap.mmap
    begin: int
    end: int

    @property
    def size(self) -> int:
        return self.end - self.begin


def whole(name: str, content: bytes | mmap.mmap) -> Document:
    """All of `content` as one document."""
    return Document(name, content, 0, len(content))


def name_bytes(name: str) -> bytes:
    """A name as the file system has it: it need not be UTF-8."""
    return name.encode("utf-8", "surrogateescape")


def printable(name: str) -> str:
    """A name for a terminal: what is not UTF-8 as U+FFFD."""
    return name_bytes(name).decode("utf-8", "replace")


def standard_library() -> list[Path]:
    """The Python sources of the standard library in order of their names, without tests, and without the file that the
    build of this Python wrote (its paths and flags)."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = (p for p in root.rglob("*.py") if not _NOT_SOURCES & set(p.relative_to(root).parts))
    return sorted(p for p in files if not p.name.startswith("_sysconfigdata"))


def source_files(path: str | Path) -> list[Path]:
    """The files of `path`: a sample, a file, a folder (its text files, at any depth) or a pattern (`**` too).

    Raises UserError when there are none, naming the nearest.
    """
    text = str(path)
    place = Path(text).expanduser()
    if text in SAMPLES and not place.exists():
        return standard_library()
    if place.is_file():
        return [place]
    if place.is_dir():
        wanted = {*TEXT_SUFFIXES, *LINE_SUFFIXES}
        found = sorted(p for p in place.rglob("*") if p.is_file() and p.suffix.lower() in wanted)
        if not found:
            raise UserError(
                f"data.path={text}: no file ending in {', '.join(sorted(wanted))} in this folder; "
                f"give a pattern such as '{place}/**/*.log'"
            )
        return found
    if glob.has_magic(text):
        found = sorted(Path(p) for p in glob.glob(str(place), recursive=True) if Path(p).is_file())
        if not found:
            raise UserError(f"data.path={text}: no file matches this pattern")
        return found
    siblings = [p.name for p in place.parent.iterdir()] if place.parent.is_dir() else []
    raise UserError(f"no such file: data.path={text}.{nearest(place.name, [*siblings, *SAMPLES])}")


def read_documents(
    files: Sequence[Path], root: Path, *, field: str = "text", separator: bytes | None = None
) -> Iterator[Document]:
    """The documents of files one after another: a file is one, or as many as a separator cuts it into; a line of a
    .jsonl file is one. root: names are relative to it. field: of the JSON objects.

    Empty documents are left out. Raises UserError naming file and line for what cannot be read.
    """
    for path in files:
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else path.name
        if path.suffix.lower() in LINE_SUFFIXES:
            yield from _lines(path, name, field)
            continue
        try:
            with path.open("rb") as file:
                if path.stat().st_size == 0:
                    continue
                content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None
        if separator is None:
            yield whole(name, content)
            continue
        begin, number = 0, 0
        for cut in re.finditer(re.escape(separator), content):
            if cut.start() > begin:
                yield Document(f"{name}#{number}", content, begin, cut.start())
                number += 1
            begin = cut.end()
        if begin < len(content):
            yield Document(f"{name}#{number}", content, begin, len(content))


def _lines(path: Path, name: str, field: str) -> Iterator[Document]:
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:  # also of a number with too many digits
                raise UserError(f"{path}, line {number} is not JSON: {error}") from None
            yield from from_record(record, field, f"{name}#{number}", f"{path}, line {number}")


def from_record(record: Any, field: str, name: str, where: str) -> Iterator[Document]:
    """The document of a JSON object or a dataset's record, none where its text is empty. where: for messages."""
    if not isinstance(record, dict):
        raise UserError(f"{where} holds a {type(record).__name__}, expected an object with the field {field!r}")
    if field not in record:
        raise UserError(f"{where} has no field {field!r} (data.field).{nearest(field, list(record))}")
    value = record[field]
    if not isinstance(value, str):
        raise UserError(f"{where}: the field {field!r} holds a {type(value).__name__}, expected text")
    if value:
        yield whole(name, value.encode("utf-8", "surrogatepass"))


def corpus_note(path: str | Path) -> str:
    """What a result on this corpus depends on: the standard library's content is that of its Python version."""
    version = ".".join(map(str, sys.version_info[:3]))
    return f"the standard library of Python {version}" if str(path) in SAMPLES else str(path)
