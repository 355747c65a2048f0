"""A small module of grounding, as training would build it."""

from __future__ import annotations

from typing import Any

import torch

from seqzoo.pipelines.video.grounding.module import VideoGroundingModule

DIM = 8
SCHEMA = {"scorer": "colours", "scorer_options": {}, "scorer_key": "colours", "dim": DIM, "fps": 2.0, "window": 10.0}
SCHEMA |= {"inside": 0.2, "event_seconds": 2.0, "source": "composed", "title": "x"}
TASK = {"window_overlap": 4.0, "edge_weight": 0.5, "low_ratio": 0.5, "max_gap": 0.6, "min_seconds": 0.0}


def module(model: dict[str, Any] | None = None, **task: Any) -> VideoGroundingModule:
    torch.manual_seed(0)
    options = {"name": "video_grounder_tiny", "dim": 16, "depth": 1, **(model or {})}
    return VideoGroundingModule(
        options, {**TASK, **task}, {"name": "adamw", "lr": 1e-3}, {"name": "none"}, dict(SCHEMA)
    ).eval()
