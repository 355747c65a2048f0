"""Labelled clips of Hugging Face `datasets`: their audio stays encoded and is decoded by our reader."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from ..hub_datasets import open_dataset
from .clips import Clip
from .faults import AudioError


@dataclass(frozen=True)
class HubAudio:
    """A cell of an audio column: a `Stored`. table: the column alone, undecoded."""

    name: str
    table: Any
    column: str
    row: int

    def content(self) -> bytes:
        cell = self.table[self.row][self.column]
        if cell is not None and cell["bytes"] is not None:
            return bytes(cell["bytes"])
        if cell is None or cell["path"] is None:
            raise AudioError(f"{self.name} has no audio", "missing")
        return Path(cell["path"]).read_bytes()


def hub_clips(
    name: str,
    *,
    split: str = "train",
    audio_column: str | None = None,
    label_column: str | None = None,
    group_column: str | None = None,
) -> list[Clip]:
    """The rows of a dataset with an audio column and labels: a folder of `save_to_disk`, files or a folder that
    `datasets` reads, or a name that a hub knows.

    audio_column: None for the only one. label_column: None for "label"; numbers with names become names. group_column:
    what splits keep together. Raises UserError for a column that is not there or not audio, naming the nearest.
    """
    found = open_dataset(name, split, False)
    import datasets  # the line before says what to install

    features = found.features
    audio = [column for column, feature in features.items() if _is_audio(feature)]
    if audio_column is None:
        if len(audio) != 1:
            what = f"{len(audio)} audio columns ({', '.join(audio)})" if audio else "no audio column"
            raise UserError(f"{name} has {what}; name one.{nearest('audio', features)}")
        audio_column = audio[0]
    for column, option in ((audio_column, "audio"), (label_column or "label", "label"), (group_column, "group")):
        if column is not None and column not in features:
            raise UserError(f"{name} has no column {column!r} ({option}_column).{nearest(column, features)}")
    if audio_column not in audio:
        raise UserError(f"{name}: the column {audio_column!r} is not audio.{nearest(audio_column, audio)}")
    label_column = label_column or "label"
    table = found.select_columns([audio_column]).cast_column(audio_column, datasets.Audio(decode=False))
    labels, names = found[label_column], getattr(features[label_column], "names", None)
    groups = found[group_column] if group_column is not None else [None] * len(found)
    clips = []
    for row, (label, group) in enumerate(zip(labels, groups, strict=True)):
        where = f"{name}, record {row}"
        if label is None or label == "":
            raise UserError(f"{where}: the column {label_column!r} is empty")
        if names and not 0 <= int(label) < len(names):
            raise UserError(f"{where}: the column {label_column!r} is {label}, which has no name in the dataset")
        text = str(names[int(label)]) if names else str(label)
        clips.append(
            Clip(HubAudio(where, table, audio_column, row), 0.0, None, text, None if group is None else str(group))
        )
    return clips


def _is_audio(feature: Any) -> bool:
    """An audio column, or what it is in a table that does not say so: bytes and a path."""
    import datasets

    if isinstance(feature, datasets.Audio):
        return True
    return isinstance(feature, dict) and set(feature) == {"bytes", "path"}
