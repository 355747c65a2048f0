"""What the command does for a search in videos: it only looks, nothing is trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .data import SearchData

Data = SearchData
NEEDS_CHECKPOINT = False


def predict(trainer: Any, module: Any, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Look for `query` in the videos of `data.path`. trainer, module: None."""
    from .predict import predict as search

    return search(cfg, run_dir)
