"""What the command does for grounding: build, check, report and find."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...checkpoints import check_same_run, saved_parameters
from ...errors import UserError
from ...nets import mixer_class, mixer_name
from ...results import print_table, write_csv, write_metrics
from .baselines import baselines, cosine_levels
from .data import VideoGroundingData
from .module import VideoGroundingModule
from .scores import SCORES, GroundingSums

Data = VideoGroundingData
# What a trained model does otherwise without being another one.
DECODING = ("window", "window_overlap", "windows_at_once", "low_ratio", "max_gap", "min_seconds", "refine_seconds")


def build_data(cfg: dict[str, Any]) -> VideoGroundingData:
    """The data module of a config."""
    data = VideoGroundingData(**cfg["data"], seed=cfg["seed"])
    data.tested = bool(cfg.get("test_after_fit"))
    return data


def build_module(cfg: dict[str, Any], data: VideoGroundingData) -> VideoGroundingModule:
    """The module of a config, for the vectors of the data; says what the data have."""
    model, schema = dict(cfg["model"]), data.schema()
    task = {**cfg["task"], "seed": cfg["seed"]}
    module = VideoGroundingModule(
        model, task, cfg["optimizer"], cfg["scheduler"], schema, mixer_class=mixer_class(model, cfg)
    )
    module.set_queries(data.queries)
    share, seconds = schema["inside"], schema["event_seconds"]
    print(f"{schema['title']}, {schema['fps']:g} frames a second as {schema['scorer']}", *data.notes, sep="\n")
    print(
        f"a query is seen in {share:.1%} of the frames of training windows, {seconds:.1f} seconds at a time", flush=True
    )
    return module


def load_module(checkpoint: dict[str, Any], path: Path, cfg: dict[str, Any]) -> VideoGroundingModule:
    """The module that a checkpoint holds, which looks and decodes as the config says; a threshold of null is that of
    its validation. Raises UserError when it is not one of grounding."""
    saved = saved_parameters(checkpoint, "video_grounding", path)
    given = cfg.get("task") or {}
    saved["task"] = {**saved["task"], **{key: given[key] for key in DECODING if key in given}}
    module = VideoGroundingModule(**saved, mixer_class=mixer_class(saved["model"], cfg))
    module.load_state_dict(checkpoint["state_dict"])
    if given.get("threshold") is not None:
        module.threshold.fill_(float(given["threshold"]))
    return module


def check_resume(checkpoint: dict[str, Any], module: VideoGroundingModule, path: Path) -> None:
    """Raise UserError naming what differs when a checkpoint is of another model or other data."""
    check_same_run(checkpoint, module.hparams, path)


def check_schema(module: VideoGroundingModule, data: VideoGroundingData, path: Path) -> None:
    """Raise UserError when a checkpoint was trained on other vectors."""
    there, here = module.schema, data.schema()
    for name, key, shown in (("scorer", "scorer_key", "scorer"), ("fps", "fps", "fps")):
        if there[key] != here[key]:
            weights = " and other weights" if there[shown] == here[shown] else ""
            raise UserError(f"{path} was trained with data.{name}={there[shown]}, here it is {here[shown]}{weights}")
    module.set_queries(data.queries)


def prepare_test(module: VideoGroundingModule, data: VideoGroundingData) -> None:
    """The vectors of the queries: nothing else is to be chosen, the threshold is that of validation."""
    module.set_queries(data.queries)


def report(
    trainer: Any, module: VideoGroundingModule, data: VideoGroundingData, run_dir: Path, cfg: dict[str, Any]
) -> dict[str, Any]:
    """Print and write the scores beside the raw cosine, the whole video and chance, each query's, and a timeline."""
    schema, model = data.schema(), module.hparams["model"]
    found, videos = module.test_sums.compute(), data.sets["test"]
    gap = float(module.task.get("max_gap", 0.0))
    levels = cosine_levels(data.sets["val"], data.queries, gap)
    others = baselines(videos, data.queries, event_seconds=module.schema["event_seconds"], levels=levels, max_gap=gap)
    name = f"{model['name']}, {mixer_name(model)}"
    rows = [{"method": method, **_chosen(scores)} for method, scores in {name: found, **others}.items()]
    minutes = sum(video.duration for video in videos) / 60
    title = f"test: {schema['title']}, {found['queries']} queries, {found['events']} events in {minutes:.0f} minutes"
    print_table(rows, title=title)
    write_csv(run_dir / "test.csv", rows)
    write_csv(run_dir / "queries.csv", _by_query(module, videos))
    write_csv(run_dir / "found.csv", _found(module, videos), columns=("video", "query", "start", "end", "score"))
    _draw(module, data, run_dir)
    if data.bad is not None and data.bad.causes:
        print(data.bad.report(), flush=True)
    record = {
        "title": schema["title"],
        "test": _chosen(found),
        "rows": rows,
        "threshold": float(module.threshold),
        "cosine_levels": list(levels),
        "parameters": sum(p.numel() for p in module.net.parameters()),
    }
    write_metrics(run_dir, record, "scores")
    print(f"tables and pictures in {run_dir}", flush=True)
    return {f"test/{key}": found[key] for key in SCORES}


def _chosen(scores: dict[str, Any]) -> dict[str, Any]:
    return {key: scores[key] for key in (*SCORES, "events", "found")}


def _by_query(module: VideoGroundingModule, videos: list[Any]) -> list[dict[str, Any]]:
    """The scores of each text over the videos that are asked for it."""
    sums: dict[str, GroundingSums] = {}
    for video in videos:
        times = video.seen().times
        for text, truth in video.queries:
            spans = [(span.start, span.end) for span in module.found.get((video.name, text), [])]
            sums.setdefault(text, GroundingSums()).update(truth, spans, times)
    return [{"query": text, **_chosen(own.compute())} for text, own in sorted(sums.items())]


def _found(module: VideoGroundingModule, videos: list[Any]) -> list[dict[str, Any]]:
    return [
        {
            "video": video.name,
            "query": text,
            "start": round(span.start, 3),
            "end": round(span.end, 3),
            "score": round(span.score, 4),
        }
        for video in videos
        for text, _ in video.queries
        for span in module.found.get((video.name, text), [])
    ]


def _draw(module: VideoGroundingModule, data: VideoGroundingData, run_dir: Path) -> None:
    from .predict import draw

    video = data.sets["test"][0]
    seen, texts = video.seen(), [text for text, _ in video.queries]
    scores = [module.scores(seen, data.queries[text]).probabilities for text in texts]
    spans = [module.found.get((video.name, text), []) for text in texts]
    truth = [own for _, own in video.queries]
    draw(seen.times, scores, texts, spans, run_dir / "timeline.png", video.duration, truth=truth, title=video.name)


def predict(trainer: Any, module: VideoGroundingModule, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Find what `query` asks for in the videos of `data.path`."""
    from .predict import predict as find

    return find(trainer, module, cfg, run_dir)
