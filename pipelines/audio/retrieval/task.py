"""What the command does for recordings and texts: build, check, report and search."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...checkpoints import check_same_run, saved_parameters
from ...classification import check_output
from ...errors import UserError
from ...nets import mixer_class, mixer_name
from ...results import print_table, write_csv, write_metrics
from .data import AudioPairData
from .module import DIRECTIONS, AudioTextModule
from .scores import check_recall_at

Data = AudioPairData
# Every process answers for its part; the first one writes the answers of all.
SHARES_PREDICTIONS = True
_SHOWN = 10  # recordings of each query on the terminal


def build_data(cfg: dict[str, Any]) -> AudioPairData:
    """The data module of a config."""
    data = AudioPairData(**cfg["data"], seed=cfg["seed"])
    data.tested = bool(cfg.get("test_after_fit"))
    data.words = "token" in (cfg["model"].get("scores") or ("token",))
    return data


def build_module(cfg: dict[str, Any], data: AudioPairData) -> AudioTextModule:
    """The module of a config, with the statistics of the features of the data; says what the data have."""
    sizes = {stage: len(clips) for stage, clips in data.sets.items()}
    searched = {stage: sizes[stage] for stage in ("val", "test") if stage == "val" or data.tested}
    check_recall_at(cfg["task"]["recall_at"], searched)
    model, schema = dict(cfg["model"]), data.schema()
    task = {**cfg["task"], "seed": cfg["seed"]}
    module = AudioTextModule(
        model, task, cfg["optimizer"], cfg["scheduler"], schema, mixer_class=mixer_class(model, cfg)
    )
    module.net.encoder.measure(data.measured())
    several = ", ".join(f"{size:,} {stage}" for stage, size in sizes.items())
    print(f"{schema['title']}: {several} recordings with texts", *data.notes, sep="\n", flush=True)
    return module


def load_module(checkpoint: dict[str, Any], path: Path, cfg: dict[str, Any]) -> AudioTextModule:
    """The module that a checkpoint holds. Raises UserError when it is not one of recordings and texts."""
    saved = saved_parameters(checkpoint, "audio_retrieval", path)
    module = AudioTextModule(**saved, mixer_class=mixer_class(saved["model"], cfg))
    module.load_state_dict(checkpoint["state_dict"])
    return module


def check_resume(checkpoint: dict[str, Any], module: AudioTextModule, path: Path) -> None:
    """Raise UserError naming what differs when a checkpoint is of another model or other data."""
    check_same_run(checkpoint, module.hparams, path)


def check_schema(module: AudioTextModule, data: AudioPairData, path: Path) -> None:
    """Raise UserError when a checkpoint was trained at another sample rate or with another text encoder."""
    there, here = module.schema["sample_rate"], data.sample_rate
    if there != here:
        raise UserError(f"{path} was trained at {there} Hz, here it is data.sample_rate={here}")
    data.words = module.net.score.needs_tokens
    dim = data.schema()["text_dim"]
    if dim != module.schema["text_dim"]:
        raise UserError(
            f"{path} was trained with texts of {module.schema['text_dim']} numbers, data.text_encoder gives {dim}"
        )


def prepare_test(module: AudioTextModule, data: AudioPairData) -> None:
    """The first ranks that are scored must be there."""
    check_recall_at(list(module.recall_at), {"test": len(data.sets["test"])})


def report(
    trainer: Any, module: AudioTextModule, data: AudioPairData, run_dir: Path, cfg: dict[str, Any]
) -> dict[str, Any]:
    """Print and write recall and median rank of both directions beside chance, and the rank of every pair."""
    found, model = module.tested, module.hparams["model"]
    name = f"{model['name']}, {mixer_name(model)}"
    rows = [{"method": f"{name}: {direction.replace('_', ' ')}", **found[direction]} for direction in DIRECTIONS]
    rows.append({"method": "chance: a fair guess", **found["chance"]})
    title = data.schema()["title"]
    print_table(rows, title=f"test: {title}, {found['pairs']:,} recordings and their texts")
    write_csv(run_dir / "test.csv", rows)
    clips = [data.sets["test"][place] for place in found["clip"]]
    write_csv(
        run_dir / "pairs.csv",
        [
            {
                "recording": clip.name,
                "text": clip.label,
                "rank_of_recording": found["ranks"]["text_to_audio"][row],
                "rank_of_text": found["ranks"]["audio_to_text"][row],
                "score": found["similarity"][row, row],
                "first_text": clips[int(found["similarity"][row].argmax())].label,
            }
            for row, clip in enumerate(clips)
        ],
    )
    scores = {key: found[key] for key in ("pairs", "loss", "mean_recall", *DIRECTIONS, "chance")}
    record = {
        "title": title,
        "test": scores,
        "train_pairs": module.schema["train_pairs"],
        "parameters": sum(p.numel() for p in module.net.parameters()),
    }
    write_metrics(run_dir, record, "scores")
    if data.bad is not None and data.bad.causes:
        print(data.bad.report(), flush=True)
    print(f"tables in {run_dir}", flush=True)
    values = {"test/loss": found["loss"], "test/mean_recall": found["mean_recall"]}
    for direction in (*DIRECTIONS, "chance"):
        values |= {f"test/{direction}/{key}": value for key, value in found[direction].items()}
    return values


def predict(trainer: Any, module: AudioTextModule, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Rank the recordings of `data.path` for the texts of `query`, into predictions.csv."""
    from .predict import check_queries, search

    queries = check_queries(cfg.get("query"))
    output = check_output(cfg.get("output") or run_dir / "predictions.csv")
    rows = search(trainer, module, build_data(cfg), queries, float(cfg["task"]["window_seconds"]))
    if not trainer.is_global_zero:
        return {}
    write_csv(output, rows)
    for query in queries:
        own = [row for row in rows if row["query"] == query]
        columns = ("rank", "recording", "score", "start", "end")
        print_table([{key: row[key] for key in columns} for row in own[:_SHOWN]], title=f"{query!r}")
    print(f"{len(rows) // len(queries):,} recording(s) for {len(queries)} text(s) in {output}", flush=True)
    return {"recordings": len(rows) // len(queries), "queries": len(queries)}
