"""Labels of new recordings from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...classification import answered
from ...errors import UserError
from ...labelled_tables import TABLES
from ...ranks import predicted
from ..clips import Clip
from ..skipping import checked_clips
from ..sources import audio_files, recordings_in
from .data import AudioClipData, cut, own_clips
from .module import AudioClipModule


def classify(trainer: Any, module: AudioClipModule, data: AudioClipData) -> list[dict[str, Any]]:
    """One record per recording, in their order: clip, label, its probability, and the label that the data give.

    data: its `path` names a recording, a folder of recordings, or labelled ones in any form that trains; digits,
    prompts and datasets give their test clips.
    """
    schema = module.schema
    data.sample_rate, data.max_seconds = schema["sample_rate"], schema["max_seconds"]
    found_clips, known = _clips(data)
    clips, longer = cut(found_clips, schema["max_seconds"])
    if longer:
        print(f"{longer:,} clip(s) are cut at {schema['max_seconds']:g} seconds, as in training", flush=True)
    found = predicted(trainer, module, data.evaluation(clips))
    names = [clip.name + ("" if clip.end is None else f" {clip.start:g}-{clip.end:g}") for clip in found_clips]
    given = [clip.label if known else None for clip in clips]
    return answered(found, names, given, schema["labels"], item="clip")


def _clips(data: AudioClipData) -> tuple[list[Clip], bool]:
    """The clips, and whether their labels are known."""
    if data.source != "files":
        data.setup("test")
        return data.sets["test"], True
    if data.path is None:
        raise UserError("data.path is missing: a recording, a folder of recordings, or a CSV or JSONL table")
    files, path = recordings_in(data.path), Path(data.path).expanduser()
    labelled = path.suffix.lower() in TABLES or data.pattern is not None or _has_label_folders(path)
    if labelled:
        return checked_clips(own_clips(path, data.pattern, data.columns)), True
    return checked_clips([Clip(file, 0.0, None, "") for file in files]), False


def _has_label_folders(path: Path) -> bool:
    """Folders with recordings in them, and none beside them."""
    if not path.is_dir():
        return False
    files = audio_files(path)
    return bool(files) and all(file.parent != path for file in files)
