"""`lightning predict experiment=video/search`: spans, chosen frames, a timeline and contact sheets of each video."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ...atomic import atomic_write_text
from ...classification import check_output
from ...errors import UserError, check_whole
from ...results import plain_values, print_table, write_csv
from ..faults import VideoError, check_file
from ..pictures import clock, plot_search, plot_sheet
from ..samplers import create_sampler
from ..scoring.scorer import FrameScorer, create_scorer, scorer_options
from ..skipping import BadFiles
from ..time_search import Spot, Trace
from .data import SearchData
from .finding import Found, Search, check_spans, find

_SHOWN = 20  # rows of the table on the terminal; the file has all
_SIDE = 270  # pixels of the shorter side of a picture in a sheet


def predict(cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Look for `query`, one or a list, in the videos of `data.path`: spans.csv, frames.csv, trace.json, and of each
    video a timeline and a contact sheet for each query.

    A video of several that cannot be read is left out, named and counted; more than 5 % of them are an error. Raises
    UserError, before a frame is read, for an empty query, an unknown scorer or sampler, or options that they lack.
    """
    run_dir = Path(run_dir)
    task, data = dict(cfg["task"]), SearchData(**cfg["data"])
    output = check_output(cfg.get("output") or run_dir / "spans.csv")
    jobs = data.jobs(cfg.get("query"))
    if len(jobs) == 1:
        check_file(next(iter(jobs)))
    sampler = create_sampler(task["sampler"], **_options(task, "sampler_options"))
    check_spans(task.get("spans"))
    check_whole("task.budget", task["budget"], 1)
    scorer = _scorer(task, data, cfg)
    for query in {query: None for queries in jobs.values() for query in queries}:
        scorer.encode_query(query)  # an example that cannot be read is known now
    bad = BadFiles([str(file) for file in jobs])
    rows, frames, traces = [], [], []
    seconds, took, scored, encoded = 0.0, 0.0, 0, 0
    for file, queries in jobs.items():
        began = time.perf_counter()
        try:
            search = _search(file, queries, scorer, sampler, data, task, cfg)
            took += time.perf_counter() - began
            _draw(search, file, list(jobs), data, run_dir)
        except VideoError as error:
            if len(jobs) == 1:
                raise
            bad.skip(str(file), error)
            continue
        seconds, scored, encoded = seconds + search.seconds, scored + search.scored, encoded + search.encoded
        for found in search.found:
            name = {"video": str(file), "query": found.query}
            rows += [{**name, **_rounded(span._asdict(), 4)} for span in found.spans]
            frames += [
                {**name, "time": round(float(search.times[place]), 4), "frame": int(search.indices[place])}
                | {"score": round(float(found.scores[place]), 5)}
                for place in found.chosen
            ]
            if found.trace is not None:
                traces.append({**name, **trace_record(found.trace, search.times)})
    write_csv(output, rows, columns=("video", "query", "start", "end", "score"))
    write_csv(run_dir / "frames.csv", frames, columns=("video", "query", "time", "frame", "score"))
    if traces:
        atomic_write_text(run_dir / "trace.json", json.dumps(traces, indent=1) + "\n")
    _say(rows, jobs, output)
    speed, skipped = seconds / max(took, 1e-9), sum(bad.causes.values())
    print(
        f"{clock(seconds)} of {len(jobs) - skipped:,} video(s) searched in {took:.1f} seconds, {speed:.1f} times as "
        f"fast as they play; {scored:,} frames scored, {encoded:,} of them read now; pictures in {run_dir}",
        flush=True,
    )
    if bad.causes:
        print(bad.report(), flush=True)
    return {
        "videos": len(jobs) - skipped,
        "skipped": skipped,
        "spans": len(rows),
        "seconds": seconds,
        "frames_scored": scored,
        "frames_read": encoded,
        "frames_chosen": len(frames),
        "search_seconds": took,
        "hours_per_hour": speed,
    }


def trace_record(trace: Trace, times: np.ndarray) -> dict[str, Any]:
    """What a search looked at, as plain values; times: of the frames, whose numbers the trace has."""

    def spots(found: Sequence[Spot]) -> list[dict[str, float]]:
        return [{**_rounded(spot.window._asdict(), 4), "confidence": round(spot.confidence, 5)} for spot in found]

    looks = [
        {
            **_rounded(look.window._asdict(), 4),
            "confidence": round(look.confidence, 5),
            "depth": look.depth,
            "looked_at": [round(float(times[int(frame)]), 3) for frame in look.frames],
            "spotted": spots(look.spotted),
            "pushed": spots(look.pushed),
        }
        for look in trace.looks
    ]
    plain = {"frames": trace.frames, "calls": trace.calls, "stopped": trace.stopped}
    return plain_values({**plain, "evidence": spots(trace.evidence), "looks": looks})


def _scorer(task: Mapping[str, Any], data: SearchData, cfg: Mapping[str, Any]) -> FrameScorer:
    options = _options(task, "scorer_options")
    known = scorer_options(task["scorer"])
    if "cache" in known:
        options.setdefault("cache", data.cache)
    if (cfg.get("trainer") or {}).get("accelerator") == "cpu":
        options.setdefault("device", "cpu")
    return create_scorer(task["scorer"], **options)


def _options(task: Mapping[str, Any], key: str) -> dict[str, Any]:
    value = task.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise UserError(f"task.{key}={value!r} must be a section of options, such as '{{name: value}}', or null")
    return dict(value or {})


def _search(
    file: Path,
    queries: Sequence[str],
    scorer: FrameScorer,
    sampler: Any,
    data: SearchData,
    task: Mapping[str, Any],
    cfg: Mapping[str, Any],
) -> Search:
    with data.open(file, size=scorer.size) as reader:
        search = find(
            reader,
            scorer,
            queries,
            sampler=sampler,
            budget=task["budget"],
            fps=task["fps"],
            max_frames=task.get("max_frames"),
            spans=task.get("spans"),
            batch_size=task.get("batch_size", 32),
            cache=data.cache,
            progress=(cfg.get("callbacks") or {}).get("progress", "auto"),
            seed=cfg.get("seed", 0),
        )
    if search.fps < task["fps"]:
        print(
            f"note: {file.name} is {clock(search.seconds)} long: looked at {search.fps:.3g} frames a second, not "
            f"{task['fps']:g}, for task.max_frames={task['max_frames']:,}",
            flush=True,
        )
    return search


def _draw(search: Search, file: Path, files: Sequence[Path], data: SearchData, run_dir: Path) -> None:
    """The timeline of all queries, and a sheet for each."""
    name = _unique(file, files)
    several = f", {len(search.found)} queries" if len(search.found) > 1 else ""
    plot_search(
        search.times,
        np.stack([found.scores for found in search.found]),
        [_named(found.query) for found in search.found],
        [found.spans for found in search.found],
        [found.chosen for found in search.found],
        run_dir / f"{name}.png",
        seconds=search.seconds,
        title=f"{file.name}: {clock(search.seconds)}{several}",
    )
    places = np.unique(np.concatenate([found.chosen for found in search.found]))
    with data.open(file, short_side=_SIDE) as reader:
        pictures = reader.read(search.indices[places])
    used: set[str] = set()
    for found in search.found:
        plot_sheet(
            pictures[np.searchsorted(places, found.chosen)],
            search.times[found.chosen],
            found.scores[found.chosen],
            run_dir / f"{name}-{_slug(found.query, used)}.png",
            spans=found.spans,
            title=_heading(found, file),
        )


def _heading(found: Found, file: Path) -> str:
    best = found.spans[0] if found.spans else None
    where = f"best from {clock(best.start)} to {clock(best.end)}" if best else "nothing stands out"
    return f"{_named(found.query)} in {file.name}: {where}, {len(found.chosen)} frames chosen"


def _say(rows: Sequence[Mapping[str, Any]], jobs: Mapping[Path, Sequence[str]], output: Path) -> None:
    shown = [
        {
            "video": Path(row["video"]).name,
            "query": _named(row["query"]),
            "from": clock(row["start"]),
            "to": clock(row["end"]),
            "score": row["score"],
        }
        for row in rows[:_SHOWN]
    ]
    if shown:
        more = f", the first {_SHOWN} of {len(rows):,}" if len(rows) > _SHOWN else ""
        print_table(shown, title=f"found, the best first{more}")
    there = {(row["video"], row["query"]) for row in rows}
    nothing = [
        f"{_named(query)!r} in {file.name}"
        for file, queries in jobs.items()
        for query in queries
        if (str(file), query) not in there
    ]
    if nothing:
        several = f" and {len(nothing) - 5:,} more" if len(nothing) > 5 else ""
        print(f"nothing stands out for {', '.join(nothing[:5])}{several}", flush=True)
    print(f"{len(rows):,} span(s); table {output}", flush=True)


def _named(query: str) -> str:
    """A query as it is shown: of an example's path the file."""
    try:
        return Path(query).name if Path(query.partition("#t=")[0]).is_file() else query
    except (OSError, ValueError):  # a question that is too long for a name
        return query


def _rounded(values: Mapping[str, float], digits: int) -> dict[str, float]:
    return {key: round(float(value), digits) for key, value in values.items()}


def _unique(file: Path, files: Sequence[Path]) -> str:
    """The name of a video's pictures."""
    same = [other for other in files if other.stem == file.stem]
    return file.stem if len(same) == 1 else f"{file.stem}-{same.index(file) + 1}"


def _slug(query: str, used: set[str]) -> str:
    """A query as a part of a file's name, another one for each."""
    base = re.sub(r"[^\w]+", "_", _named(query)).strip("_")[:40] or "query"
    slug, number = base, 2
    while slug.lower() in used:
        slug, number = f"{base}_{number}", number + 1
    used.add(slug.lower())
    return slug
