"""What a scorer of frames is, and the three that there are, by name."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from ...errors import UserError, nearest

SCORERS = ("concepts", "clip", "example")


class FrameScorer(Protocol):
    """Frames and queries as vectors of length 1, whose product is the score, a cosine: `features @ query`.

    key: names the scorer, its settings and its weights; features under equal keys are equal. size: height and width in
    which it looks at frames, so that a reader may give them so; frames of any other size are scaled to it. dim: D.
    A scorer may have a `floor`, the least score of a frame that fits a query at all.
    """

    key: str
    size: tuple[int, int]
    dim: int

    def encode_frames(self, frames: np.ndarray) -> np.ndarray:
        """Vectors float32 (n, D) of frames uint8 (n, H, W, 3), RGB; each depends on its own frame alone."""
        ...

    def encode_query(self, query: str | Path) -> np.ndarray:
        """The vector float32 (D,) of a text, or of an image or video file. Raises UserError for one without content."""
        ...


def create_scorer(name: str, **options: Any) -> FrameScorer:
    """A scorer by its name: "concepts" (concepts.py; offline, from two packages), "clip" (clip.py), "example"
    (example.py).

    options: of its constructor. Raises UserError for an unknown name or option with the nearest, and where weights are
    missing, saying what to install.
    """
    if name not in SCORERS:
        raise UserError(f"unknown scorer {name!r}.{nearest(str(name), SCORERS)}")
    build = _constructor(name)
    known = [key for key in inspect.signature(build).parameters if key != "self"]
    for key in options:
        if key not in known:
            raise UserError(f"scorer {name!r} has no option {key!r}.{nearest(key, known)}")
    return build(**options)


def scorer_options(name: str) -> dict[str, Any]:
    """The options of a scorer and their defaults."""
    if name not in SCORERS:
        raise UserError(f"unknown scorer {name!r}.{nearest(str(name), SCORERS)}")
    return {key: value.default for key, value in inspect.signature(_constructor(name)).parameters.items()}


def _constructor(name: str) -> Any:
    # each stands on packages of its own
    if name == "concepts":
        from .concepts import ConceptScorer

        return ConceptScorer
    if name == "clip":
        from .clip import ClipScorer

        return ClipScorer
    from .example import ExampleScorer

    return ExampleScorer


def check_query(query: object) -> str:
    """A query of words, without the blanks around it. Raises UserError where nothing is left."""
    text = "" if query is None else str(query).strip()
    if not text:
        raise UserError(f"the query is empty, {query!r}: give what is seen, such as query='a taxi cab'")
    return text


def check_frames(frames: np.ndarray) -> np.ndarray:
    """Raise UserError unless the frames are uint8 (n, H, W, 3)."""
    shape = getattr(frames, "shape", None)
    if not isinstance(frames, np.ndarray) or frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3:
        raise UserError(f"frames must be uint8 (n, H, W, 3), got {getattr(frames, 'dtype', type(frames))} {shape}")
    return frames


def check_queries(queries: Any) -> list[str]:
    """One query or a list of them. Raises UserError for an empty one, naming its place."""
    if queries is None:
        raise UserError("query is missing: give what is looked for, such as query='a taxi cab', or a list [a, b]")
    asked = list(queries) if isinstance(queries, Sequence) and not isinstance(queries, str) else [queries]
    if not asked:
        raise UserError("query is an empty list: give what is looked for, such as query='a taxi cab'")
    for place, query in enumerate(asked):
        if not str("" if query is None else query).strip():
            where = f"query {place + 1} of {len(asked)}" if len(asked) > 1 else "the query"
            raise UserError(f"{where} is empty, {query!r}: give what is seen, such as query='a taxi cab'")
    return list(dict.fromkeys(str(query).strip() for query in asked))
