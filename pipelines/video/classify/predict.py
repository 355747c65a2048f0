"""Labels of new videos from a trained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...classification import answered
from ...errors import UserError
from ...labelled_tables import TABLES
from ...ranks import predicted
from ..clips import VideoClip
from ..skipping import checked_clips
from ..sources import video_files, videos_in
from .data import VideoClipData, own_clips
from .looking import Vectors
from .module import VideoClipModule
from .protocol import Sampling


def classify(trainer: Any, module: VideoClipModule, data: VideoClipData) -> list[dict[str, Any]]:
    """One record per video, in their order: clip, label, its probability, and the label that the data give.

    data: its `path` names a video, a folder of videos, or labelled ones in any form that trains. Frames are looked at
    as in training.
    """
    follow(module, data)
    clips, known = _clips(data)
    if isinstance(data.looking, Vectors):
        data.looking.fill(clips, training=False)
    found = predicted(trainer, module, data.evaluation(clips))
    names = [clip.name if clip.start == 0 else f"{clip.name} {clip.start:g}-{clip.end:g}" for clip in clips]
    given = [clip.label if known else None for clip in clips]
    return answered(found, names, given, module.schema["labels"], item="clip")


def follow(module: VideoClipModule, data: VideoClipData) -> None:
    """Look at videos as the model was trained to. Raises UserError when its encoder is not the one that is there."""
    schema = module.schema
    data.sampling = Sampling(*schema["sampling"])
    data.features, data.output = schema["features"], schema["output"] or data.output
    data.rate, data.size = schema["rate"] or data.rate, schema["size"] or data.size
    if isinstance(data.looking, Vectors) and data.looking.key != schema["encoder_key"]:
        raise UserError(
            f"the model was trained on vectors of {schema['features']!r} with other weights; give them as data.weights"
        )


def _clips(data: VideoClipData) -> tuple[list[VideoClip], bool]:
    """The clips, and whether their labels are known."""
    if data.path is None:
        raise UserError("data.path is missing: a video, a folder of videos, or a CSV or JSONL table")
    path = Path(data.path).expanduser()
    if path.suffix.lower() in TABLES or data.pattern is not None or _has_label_folders(path):
        return checked_clips(own_clips(path, data.pattern, data.columns), backend=data.backend), True
    clips = [VideoClip(file, 0.0, None, "") for file in videos_in(path)]
    return checked_clips(clips, backend=data.backend), False


def _has_label_folders(path: Path) -> bool:
    """Folders with videos in them, and none beside them."""
    if not path.is_dir():
        return False
    files = video_files(path)
    return bool(files) and all(file.parent != path for file in files)
