"""When a query is seen in videos of any length: spans as a table and a timeline of each video."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...classification import check_output
from ...errors import UserError
from ...results import print_table, write_csv
from ..cache import FeatureCache
from ..faults import VideoError
from ..pictures import clock, plot_search
from ..reader import open_video
from ..scoring.encoding import encode_video
from ..scoring.scorer import check_queries
from ..skipping import BadFiles
from ..sources import videos_in
from ..spans import Span
from .data import load_scorer
from .module import VideoGroundingModule
from .videos import Seen

_SHOWN = 20  # rows of the table on the terminal; the file has all


def predict(trainer: Any, module: VideoGroundingModule, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Find `query`, one or a list, in the videos of `data.path`: spans.csv, and a timeline of each video.

    The vectors are made by the scorer with which the model was trained. A video of several that cannot be read is left
    out, named and counted; more than 5 % of them are an error. Raises UserError, before a frame is read, for an empty
    query and for another scorer than that of the training.
    """
    output = check_output(cfg.get("output") or run_dir / "spans.csv")
    queries, files = check_queries(cfg.get("query")), _files(cfg["data"].get("path"))
    schema, data = module.schema, cfg["data"]
    gigabytes = float(data.get("cache_gb") or 0.0)
    cache = FeatureCache(data.get("cache_dir"), int(gigabytes * 2**30)) if gigabytes else None
    scorer = load_scorer(schema["scorer"], schema["scorer_options"], cache)
    if scorer.key != schema["scorer_key"]:
        raise UserError(
            f"the model was trained on vectors of the scorer {schema['scorer']} with weights {schema['scorer_key']}, "
            f"here they are {scorer.key}"
        )
    vectors = [scorer.encode_query(query) for query in queries]
    module.to(trainer.strategy.root_device)
    bad = BadFiles([str(file) for file in files])
    rows: list[dict[str, Any]] = []
    watched, began = 0.0, time.perf_counter()
    for file in files:
        try:
            with open_video(file, backend=data.get("backend", "auto"), size=scorer.size) as reader:
                looked = encode_video(reader, scorer, fps=schema["fps"], cache=cache)
                duration = float(reader.duration)
        except VideoError as error:
            if len(files) == 1:
                raise
            bad.skip(str(file), error)
            continue
        seen = Seen(looked.times, looked.features)
        scores = [module.scores(seen, vector) for vector in vectors]
        spans = [module.decode(seen, own, duration) for own in scores]
        watched += duration
        rows += [
            {
                "video": str(file),
                "query": query,
                "start": round(span.start, 3),
                "end": round(span.end, 3),
                "score": round(span.score, 4),
            }
            for query, found in zip(queries, spans, strict=True)
            for span in found
        ]
        picture = run_dir / f"{_unique(file, files)}.png"
        chances = [own.probabilities for own in scores]
        draw(seen.times, chances, queries, spans, picture, duration, title=f"{file.name}, {clock(duration)}")
    took = max(time.perf_counter() - began, 1e-9)
    write_csv(output, rows, columns=("video", "query", "start", "end", "score"))
    if rows:
        shown = f", the first {_SHOWN} of {len(rows):,}" if len(rows) > _SHOWN else ""
        print_table([{**row, "video": Path(row["video"]).name} for row in rows[:_SHOWN]], title=f"found{shown}")
    skipped = sum(bad.causes.values())
    print(
        f"{len(rows):,} span(s) in {clock(watched)} of {len(files) - skipped:,} video(s), looked at in {took:.1f} "
        f"seconds ({watched / took:.1f} times as fast as it is shown); table {output}, pictures in {run_dir}",
        flush=True,
    )
    if bad.causes:
        print(bad.report(), flush=True)
    return {"spans": len(rows), "videos": len(files) - skipped, "skipped": skipped, "seconds": watched}


def draw(
    times: np.ndarray,
    scores: Sequence[np.ndarray],
    queries: Sequence[str],
    spans: Sequence[Sequence[Span]],
    path: Path,
    duration: float,
    *,
    truth: Sequence[Sequence[tuple[float, float]]] | None = None,
    title: str = "",
) -> None:
    """The probability of each query over time, its spans, and the likeliest frame of each span."""
    chosen = []
    for own, found in zip(scores, spans, strict=True):
        places = []
        for span in found:
            inside = np.flatnonzero((times >= span.start) & (times <= span.end))
            if len(inside):
                places.append(int(inside[own[inside].argmax()]))
        chosen.append(np.array(places, dtype=np.int64))
    plot_search(times, np.stack(list(scores)), queries, spans, chosen, path, seconds=duration, truth=truth, title=title)


def _files(path: Any) -> list[Path]:
    if path is None:
        raise UserError("data.path is missing: a video or a folder of videos")
    return videos_in(path)


def _unique(file: Path, files: Sequence[Path]) -> str:
    """The name of a video's picture."""
    same = [other for other in files if other.stem == file.stem]
    return file.stem if len(same) == 1 else f"{file.stem}-{same.index(file) + 1}"
