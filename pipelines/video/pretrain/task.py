"""What the command does for videos without labels: build, check and report."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...checkpoints import check_same_run, saved_parameters
from ...errors import UserError
from ...nets import mixer_class, mixer_name
from ...results import print_table, write_csv, write_metrics
from .data import VideoPretrainData
from .module import VideoPretrainModule

Data = VideoPretrainData
# The task whose models it trains: they are for what comes after it.
MODELS = "video_classify"


def build_data(cfg: dict[str, Any]) -> VideoPretrainData:
    """The data module of a config."""
    data = VideoPretrainData(**cfg["data"], seed=cfg["seed"])
    data.tested = bool(cfg.get("test_after_fit"))
    return data


def build_module(cfg: dict[str, Any], data: VideoPretrainData) -> VideoPretrainModule:
    """The module of a config; says what the data have."""
    model, schema = dict(cfg["model"]), data.schema()
    task = {**cfg["task"], "seed": cfg["seed"]}
    module = VideoPretrainModule(
        model, task, cfg["optimizer"], cfg["scheduler"], schema, mixer_class=mixer_class(model, cfg)
    )
    sizes = ", ".join(f"{len(clips):,} {stage}" for stage, clips in data.sets.items())
    print(f"{schema['title']}: {sizes} clips without labels, pretext {task['pretext']}", flush=True)
    return module


def load_module(checkpoint: dict[str, Any], path: Path, cfg: dict[str, Any]) -> VideoPretrainModule:
    """The module that a checkpoint holds. Raises UserError when it is not one of pretraining."""
    from ..classify.task import without_weights

    saved = saved_parameters(checkpoint, "video_pretrain", path)
    saved["model"] = without_weights(saved["model"])
    module = VideoPretrainModule(**saved, mixer_class=mixer_class(saved["model"], cfg))
    module.load_state_dict(checkpoint["state_dict"])
    return module


def check_resume(checkpoint: dict[str, Any], module: VideoPretrainModule, path: Path) -> None:
    """Raise UserError naming what differs when a checkpoint is of another model or other data."""
    check_same_run(checkpoint, module.hparams, path)


def check_schema(module: VideoPretrainModule, data: VideoPretrainData, path: Path) -> None:
    """Raise UserError when a checkpoint was trained to look at other frames."""
    here = data.schema()
    for key in ("features", "encoder_key", "output", "sampling", "rate", "size"):
        if module.schema[key] != here[key]:
            raise UserError(f"{path} was trained with {key} {module.schema[key]!r}, here the data give {here[key]!r}")


def prepare_test(module: VideoPretrainModule, data: VideoPretrainData) -> None:
    """Nothing to choose."""


def report(
    trainer: Any, module: VideoPretrainModule, data: VideoPretrainData, run_dir: Path, cfg: dict[str, Any]
) -> dict[str, Any]:
    """Print and write the score beside what guessing scores."""
    found = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("test/")}
    model, name = module.hparams["model"], module.pretext.score_name
    method = f"{model['name']}, {mixer_name(model)}" if "mixer" in model else model["name"]
    rows = [
        {"method": method, name: found[f"test/{name}"], "loss": found["test/loss"]},
        {"method": "guessing", name: found["test/guess"], "loss": None},
    ]
    print_table(rows, title=f"test: {module.schema['title']}, pretext {module.task['pretext']}")
    write_csv(run_dir / "test.csv", rows)
    write_metrics(run_dir, {"title": module.schema["title"], "rows": rows}, "scores")
    print(f"start from it: lightning fit experiment=video/classify +model.pretrained={run_dir / 'model'}", flush=True)
    return found


def predict(trainer: Any, module: VideoPretrainModule, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """There is nothing to predict."""
    raise UserError(
        "a pretrained model has no answers of its own; train it with labels: lightning fit experiment=video/classify "
        "+model.pretrained=<run folder>/model"
    )
