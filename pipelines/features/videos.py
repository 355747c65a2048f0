"""Videos as rows: files, or the spans of a table, in windows of seconds, looked at as in training."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from ..errors import UserError
from ..labelled_tables import TABLES
from ..video.cache import FeatureCache
from ..video.classify.data import VideoClipData, own_clips, padded
from ..video.classify.looking import Looked, Vectors
from ..video.classify.predict import follow
from ..video.clips import VideoClip
from ..video.faults import VideoError
from ..video.grounding.data import VideoGroundingData, load_scorer
from ..video.grounding.module import with_cosine
from ..video.reader import open_video
from ..video.scoring.encoding import encode_video
from ..video.scoring.scorer import check_queries
from ..video.skipping import checked_clips
from ..video.sources import videos_in
from .reading import Rows, check_window, data_options, groups, windows
from .trained import Trained

_COLUMNS = {"name": pa.string(), "label": pa.string(), "start": pa.float64(), "end": pa.float64()}


class ClipReader:
    """Videos for a classifier of videos: of each window the frames that training would look at.

    window: seconds; None: a whole file, or a span of a table, is one row. Start, end and the times of tokens are
    seconds of the file. A file that turns out to be damaged is named and left. Raises UserError for no videos, and
    where the vectors of frames are not those of the training.
    """

    def __init__(self, trained: Trained, cfg: dict[str, Any]) -> None:
        net: Any = trained.net
        given = data_options(cfg, trained, VideoClipData)
        if given.get("path") is None:
            raise UserError("data.path is missing: a video, a folder of videos, or a CSV or JSONL table")
        if "sampling" not in trained.schema:
            raise UserError(f"{trained.source} was saved without which frames of a video it looks at")
        self.data = VideoClipData(**given)
        follow(SimpleNamespace(schema=trained.schema), self.data)  # type: ignore[arg-type]
        self.window, self.stride = check_window(cfg["task"], whole=False, what="seconds")
        self.clips = checked_clips(_clips(self.data), backend=self.data.backend)
        self.tubelet = int(net.encoder.tubelet)
        self.columns, self.time, self.unit = dict(_COLUMNS), pa.float64(), "seconds"
        self.failed: list[str] = []

    def _windows(self) -> Iterator[tuple[VideoClip, Looked]]:
        damaged: set[str] = set()
        for clip in self.clips:
            for start, stop in windows(float(clip.end or 0.0) - clip.start, self.window, self.stride):
                if clip.name in damaged:
                    break
                part = clip._replace(start=clip.start + start, end=clip.start + stop)
                try:
                    if isinstance(self.data.looking, Vectors):
                        self.data.looking.fill([part], training=False)
                    times = self.data.sampling.times(part.start, float(part.end or 0.0), None)
                    yield part, self.data.looking.look(part, times, None)
                except VideoError as error:
                    print(f"skipped: {error}", file=sys.stderr, flush=True)
                    self.failed.append(str(error))
                    damaged.add(clip.name)

    def batches(self, size: int) -> Iterator[Rows]:
        for group in groups(self._windows(), size):
            found = padded([looked for _, looked in group])
            clips = [clip for clip, _ in group]
            ids = [{"name": c.name, "label": c.label or None, "start": c.start, "end": c.end} for c in clips]
            times = found["times"].numpy()[:, :: self.tubelet] + np.array([[c.start] for c in clips])
            yield Rows(ids, (found["frames"], found["mask"], found["times"]), {}, _each_place(times))


class MomentReader:
    """Videos for a grounder, whose features depend on `query`: a row for each query and window of a video.

    window: seconds; None: that of the training. label is the query. Raises UserError as `ClipReader`, and without a
    query.
    """

    def __init__(self, trained: Trained, cfg: dict[str, Any]) -> None:
        given, schema = data_options(cfg, trained, VideoGroundingData), trained.schema
        if given.get("path") is None:
            raise UserError("data.path is missing: a video or a folder of videos")
        if "scorer" not in schema:
            raise UserError(f"{trained.source} was saved without what makes vectors of its frames")
        self.queries, self.files = check_queries(cfg.get("query")), videos_in(given["path"])
        checked_clips([VideoClip(file, 0.0, None, "") for file in self.files], backend=given.get("backend", "auto"))
        gigabytes = float(given.get("cache_gb") or 0.0)
        self.cache = FeatureCache(given.get("cache_dir"), int(gigabytes * 2**30)) if gigabytes else None
        self.scorer = load_scorer(schema["scorer"], schema["scorer_options"], self.cache)
        if self.scorer.key != schema["scorer_key"]:
            raise UserError(
                f"{trained.source} was trained on vectors of the scorer {schema['scorer']} with weights "
                f"{schema['scorer_key']}, here they are {self.scorer.key}"
            )
        window, stride = check_window(cfg["task"], whole=False, what="seconds")
        self.fps, self.backend = float(schema["fps"]), given.get("backend", "auto")
        self.window = max(round(float(window or schema["window"]) * self.fps), 1)
        self.stride = None if stride is None else max(round(stride * self.fps), 1)
        self.cosine = bool((schema.get("task") or {}).get("cosine", True))
        self.columns, self.time, self.unit = dict(_COLUMNS), pa.float64(), "seconds"
        self.failed: list[str] = []

    def _windows(self) -> Iterator[tuple[str, str, np.ndarray, np.ndarray, np.ndarray]]:
        vectors = [(query, np.asarray(self.scorer.encode_query(query), np.float32)) for query in self.queries]
        for file in self.files:
            try:
                with open_video(file, backend=self.backend, size=self.scorer.size) as reader:
                    seen = encode_video(reader, self.scorer, fps=self.fps, cache=self.cache)
            except VideoError as error:
                print(f"skipped: {error}", file=sys.stderr, flush=True)
                self.failed.append(str(error))
                continue
            for start, stop in windows(len(seen.times), self.window, self.stride):
                for query, vector in vectors:
                    yield str(file), query, vector, seen.times[start:stop], seen.features[start:stop]

    def batches(self, size: int) -> Iterator[Rows]:
        for group in groups(self._windows(), size):
            found = padded([Looked(np.asarray(f, np.float32), t - t[0]) for _, _, _, t, f in group])
            query = torch.from_numpy(np.stack([vector for _, _, vector, _, _ in group]))
            frames, mask = found["frames"], found["mask"]
            given = with_cosine(frames, query, mask) if self.cosine else frames
            ids = [
                {"name": name, "label": text, "start": float(t[0]), "end": float(t[-1])}
                for name, text, _, t, _ in group
            ]
            times = found["times"].numpy() + np.array([[t[0]] for _, _, _, t, _ in group])
            yield Rows(ids, (given, query, mask, found["times"]), {}, _each_place(times))


def _each_place(times: np.ndarray) -> Any:
    """The times (B, T) of steps for tokens, of which a step may have many, one for each place of a picture."""
    return lambda length: list(times.repeat(max(length // times.shape[1], 1), axis=1))


def _clips(data: VideoClipData) -> list[VideoClip]:
    """The spans of a table, the files of a pattern of names, or whole videos."""
    path = Path(str(data.path)).expanduser()
    if data.pattern is not None or path.suffix.lower() in TABLES:
        return own_clips(path, data.pattern, data.columns)
    return [VideoClip(file, 0.0, None, "") for file in videos_in(path)]
