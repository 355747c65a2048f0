"""What the command does for clips: build, check, report and classify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...checkpoints import check_same_run, saved_parameters
from ...classification import check_output, report_classes, report_labels
from ...errors import UserError
from ...nets import mixer_class, mixer_name
from .data import AudioClipData
from .module import AudioClipModule

Data = AudioClipData
# Every process answers for its part; the first one writes the answers of all.
SHARES_PREDICTIONS = True


def build_data(cfg: dict[str, Any]) -> AudioClipData:
    """The data module of a config."""
    data = AudioClipData(**cfg["data"], seed=cfg["seed"])
    data.tested = bool(cfg.get("test_after_fit"))
    return data


def build_module(cfg: dict[str, Any], data: AudioClipData) -> AudioClipModule:
    """The module of a config, for the labels of the data, with the statistics of their features; says what the data
    have."""
    model, schema = dict(cfg["model"]), data.schema()
    task = {**cfg["task"], "seed": cfg["seed"]}
    module = AudioClipModule(
        model, task, cfg["optimizer"], cfg["scheduler"], schema, mixer_class=mixer_class(model, cfg)
    )
    module.net.encoder.measure(data.measured())
    sizes = ", ".join(f"{len(clips):,} {stage}" for stage, clips in data.sets.items())
    print(f"{schema['title']}: {sizes} clips in {len(data.labels)} classes", *data.notes, sep="\n", flush=True)
    return module


def load_module(checkpoint: dict[str, Any], path: Path, cfg: dict[str, Any]) -> AudioClipModule:
    """The module that a checkpoint holds. Raises UserError when it is not one of clips."""
    saved = saved_parameters(checkpoint, "audio_classify", path)
    module = AudioClipModule(**saved, mixer_class=mixer_class(saved["model"], cfg))
    module.load_state_dict(checkpoint["state_dict"])
    return module


def check_resume(checkpoint: dict[str, Any], module: AudioClipModule, path: Path) -> None:
    """Raise UserError naming what differs when a checkpoint is of another model or other data."""
    check_same_run(checkpoint, module.hparams, path)


def check_schema(module: AudioClipModule, data: AudioClipData, path: Path) -> None:
    """Number the labels as the checkpoint does. Raises UserError when it was trained at another sample rate."""
    there, here = module.schema["sample_rate"], data.sample_rate
    if there != here:
        raise UserError(f"{path} was trained at {there} Hz, here it is data.sample_rate={here}")
    data.use_labels(module.schema["labels"])


def prepare_test(module: AudioClipModule, data: AudioClipData) -> None:
    """Nothing to choose."""


def report(
    trainer: Any, module: AudioClipModule, data: AudioClipData, run_dir: Path, cfg: dict[str, Any]
) -> dict[str, Any]:
    """Print and write accuracy beside the majority label and chance, the confusion matrix, and what was skipped."""
    model = module.hparams["model"]
    found = report_classes(
        module,
        data.counts("test"),
        f"{model['name']}, {mixer_name(model)}",
        data.schema()["title"],
        run_dir,
        items="clips",
    )
    if data.bad is not None and data.bad.causes:
        print(data.bad.report(), flush=True)
    return found


def predict(trainer: Any, module: AudioClipModule, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Label the recordings of `data.path`, into predictions.csv."""
    from .predict import classify

    output = check_output(cfg.get("output") or run_dir / "predictions.csv")
    rows = classify(trainer, module, build_data(cfg))
    if not trainer.is_global_zero:
        return {}
    return report_labels(rows, module.schema["labels"], output, items="clips")
