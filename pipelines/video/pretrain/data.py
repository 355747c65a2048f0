"""The data module of videos without labels, each cut in time: its first part trains, the last ones are evaluated."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from ..classify.data import VideoClipData
from ..classify.looking import Vectors
from ..clips import SPLITS, VideoClip, cut_clips
from ..skipping import BadFiles, checked_clips
from ..sources import videos_in


class VideoPretrainData(VideoClipData):
    """Videos without labels, for fit, validate and test.

    path: a video or a folder of videos, at any depth. split_ratio: the parts of each video, in time, for train, val and
    test, with gap seconds between them. clip_seconds: parts are cut in clips of about this length, of which each is an
    example; None: a part is a clip. All other arguments are those of `VideoClipData`.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        clip_seconds: float | None = 8.0,
        split_ratio: Sequence[float] = (0.7, 0.15, 0.15),
        gap: float = 0.5,
        features: str | None = "packaged",
        weights: str | None = None,
        output: str = "pooled",
        rate: float = 8.0,
        size: int = 112,
        num_frames: int | None = 32,
        fps: float | None = None,
        max_frames: int = 256,
        jitter: bool = True,
        crop: bool = True,
        flip: bool = False,
        backend: str = "auto",
        cache_dir: str | Path | None = None,
        cache_gb: float = 4.0,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        steps: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        options: dict[str, Any] = {k: v for k, v in locals().items() if k not in ("self", "clip_seconds", "__class__")}
        super().__init__(options.pop("path"), **options)
        if clip_seconds is not None and not 0 < clip_seconds < math.inf:
            raise UserError(f"data.clip_seconds={clip_seconds!r} must be above 0, or null for whole parts")
        self.clip_seconds = clip_seconds

    def load(self) -> None:
        """Find the videos, cut them, and make the vectors of their frames, once. A file that cannot be opened is left
        out and counted."""
        if self.sets:
            return
        if self.path is None:
            raise UserError("data.path is missing: a video or a folder of videos")
        files = videos_in(self.path)
        self.bad = BadFiles(str(file) for file in files)
        whole = checked_clips([VideoClip(file, 0.0, None, "") for file in files], self.bad, backend=self.backend)
        parts = np.array(self.split_ratio, float) / sum(self.split_ratio)
        cut = cut_clips(whole, parts.tolist(), gap=float(self.leaving["gap"]))
        sets = {stage: pieces([c for c in cut if c.split == stage], self.clip_seconds) for stage in SPLITS}
        if isinstance(self.looking, Vectors):
            for stage in SPLITS:
                sets[stage] = self.looking.fill(sets[stage], training=stage == "train", bad=self.bad)
        self.labels, self.sets = [""], sets

    def setup(self, stage: str | None = None) -> None:
        """Find the clips and see that the stage has some."""
        self.load()
        stages = {"validate": ("val",), "test": ("test",)}
        for needed in stages.get(stage or "fit", SPLITS if self.tested else SPLITS[:2]):
            if not self.sets[needed]:
                raise UserError(
                    f"data.path={self.path}: no clip for {needed}; videos are too short for data.split_ratio="
                    f"{list(self.split_ratio)} with data.gap={self.leaving['gap']:g}"
                )


def pieces(clips: Sequence[VideoClip], seconds: float | None) -> list[VideoClip]:
    """Each clip cut in equal pieces of about so many seconds."""
    if seconds is None:
        return list(clips)
    found = []
    for clip in clips:
        length = float(clip.end or 0.0) - clip.start
        number = max(1, round(length / seconds))
        edges = clip.start + length / number * np.arange(number + 1)
        found += [clip._replace(start=float(a), end=float(b)) for a, b in itertools.pairwise(edges)]
    return found
