"""Labelled clips of audio files from folders, from their names, and from tables of files or of time spans."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..labelled_files import FileKind, file_or_folder, files_in, folder_files, named_files, table_files
from .clips import Clip
from .faults import missing_error

SUFFIXES = (".wav", ".flac", ".ogg", ".oga", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf", ".w64", ".rf64")
KIND = FileKind(
    "audio file",
    SUFFIXES,
    missing_error,
    {"path": ("path", "file", "filename", "audio"), "label": ("label", "class")},
)


def audio_files(root: Path) -> list[Path]:
    """The audio files of a folder at any depth, in order; hidden ones and other kinds are left out."""
    return files_in(root, KIND)


def recordings_in(path: str | Path) -> list[Path]:
    """A recording, or all audio files of a folder. Raises UserError for neither, and for a folder without any."""
    return file_or_folder(path, KIND)


def folder_clips(path: str | Path) -> list[Clip]:
    """The files of a folder whose sub-folders are labels, or whose train, val and test hold such folders:
    `folder_files`."""
    return [Clip(*found) for found in folder_files(path, KIND)]


def named_clips(path: str | Path, pattern: str) -> list[Clip]:
    """The files of a folder, with labels from their names without suffix, "{label}_{speaker}_{take}": `named_files`."""
    return [Clip(*found) for found in named_files(path, pattern, KIND)]


def table_clips(path: str | Path, columns: Mapping[str, str | None] | None = None) -> list[Clip]:
    """The rows of a CSV, TSV or JSONL table: path and label, and where there are such columns start and end in seconds,
    group (or speaker) and split: `table_files`."""
    return [Clip(*found) for found in table_files(path, KIND, columns)]
