"""What the command does for videos: build, check, report and classify."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from ...checkpoints import check_same_run, saved_parameters
from ...classification import check_output, report_classes, report_labels
from ...errors import UserError
from ...nets import mixer_class, mixer_name
from ...results import print_table, write_csv
from .data import VideoClipData
from .looking import Vectors
from .module import VideoClipModule

Data = VideoClipData
# Every process answers for its part; the first one writes the answers of all.
SHARES_PREDICTIONS = True
# What a checkpoint was trained with and is of no use without.
_FIXED = ("features", "encoder_key", "output", "sampling", "rate", "size")


def build_data(cfg: dict[str, Any]) -> VideoClipData:
    """The data module of a config."""
    data = VideoClipData(**cfg["data"], seed=cfg["seed"])
    data.tested = bool(cfg.get("test_after_fit"))
    return data


def build_module(cfg: dict[str, Any], data: VideoClipData) -> VideoClipModule:
    """The module of a config, for the labels of the data; says what the data have."""
    model, schema = dict(cfg["model"]), data.schema()
    task = {**cfg["task"], "seed": cfg["seed"]}
    module = VideoClipModule(
        model, task, cfg["optimizer"], cfg["scheduler"], schema, mixer_class=mixer_class(model, cfg)
    )
    sizes = ", ".join(f"{len(clips):,} {stage}" for stage, clips in data.sets.items())
    print(f"{schema['title']}: {sizes} clips in {len(data.labels)} classes", *data.notes, sep="\n", flush=True)
    return module


def load_module(checkpoint: dict[str, Any], path: Path, cfg: dict[str, Any]) -> VideoClipModule:
    """The module that a checkpoint holds. Raises UserError when it is not one of videos."""
    saved = saved_parameters(checkpoint, "video_classify", path)
    saved["model"] = without_weights(saved["model"])
    module = VideoClipModule(**saved, mixer_class=mixer_class(saved["model"], cfg))
    module.load_state_dict(checkpoint["state_dict"])
    return module


def without_weights(model: dict[str, Any]) -> dict[str, Any]:
    """The model of a config whose encoder fetches no weights: a checkpoint brings them."""
    encoder = model.get("encoder")
    return (
        {**model, "encoder": {**encoder, "weights": None}}
        if isinstance(encoder, dict) and "weights" in encoder
        else model
    )


def check_resume(checkpoint: dict[str, Any], module: VideoClipModule, path: Path) -> None:
    """Raise UserError naming what differs when a checkpoint is of another model or other data."""
    check_same_run(checkpoint, module.hparams, path)


def check_schema(module: VideoClipModule, data: VideoClipData, path: Path) -> None:
    """Number the labels as the checkpoint does. Raises UserError when it was trained to look at other frames."""
    here = data.schema()
    for key in _FIXED:
        if module.schema[key] != here[key]:
            raise UserError(f"{path} was trained with {key} {module.schema[key]!r}, here the data give {here[key]!r}")
    data.use_labels(module.schema["labels"])


def prepare_test(module: VideoClipModule, data: VideoClipData) -> None:
    """Nothing to choose."""


def report(
    trainer: Any, module: VideoClipModule, data: VideoClipData, run_dir: Path, cfg: dict[str, Any]
) -> dict[str, Any]:
    """Print and write accuracy beside the majority label and chance, and beside the nearest training clip by the mean
    of its vectors, the confusion matrix, and what was skipped."""
    model = module.hparams["model"]
    name = f"{model['name']}, {mixer_name(model)}" if "mixer" in model else model["name"]
    found = report_classes(module, data.counts("test"), name, data.schema()["title"], run_dir, items="clips")
    if isinstance(data.looking, Vectors):
        share = nearest_accuracy(data)
        row = {"method": "nearest training clip by the mean of its vectors", "accuracy": share}
        print_table([row], title="without learning")
        write_csv(run_dir / "nearest.csv", [row])
        found["test/nearest"] = share
    if data.bad is not None and data.bad.causes:
        print(data.bad.report(), flush=True)
    return found


def nearest_accuracy(data: VideoClipData) -> float:
    """The share of test clips whose nearest training clip, by the cosine of the means of their vectors, has their
    label: what is told apart by looks alone, whatever the order of the frames."""

    def means(stage: str) -> np.ndarray:
        vectors = []
        for batch in data.evaluation(data.sets[stage]):
            frames, mask = batch["frames"].flatten(2).numpy(), batch["mask"].numpy()
            vectors.append((frames * mask[..., None]).sum(1) / mask.sum(1, keepdims=True))
        found = np.concatenate(vectors)
        return found / np.maximum(np.linalg.norm(found, axis=1, keepdims=True), 1e-12)

    best = (means("test") @ means("train").T).argmax(1)
    labels = np.array([clip.label for clip in data.sets["train"]])[best]
    return float(np.mean(labels == np.array([clip.label for clip in data.sets["test"]])))


def predict(trainer: Any, module: VideoClipModule, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Label the videos of `data.path`, into predictions.csv."""
    from .predict import classify

    output = check_output(cfg.get("output") or run_dir / "predictions.csv")
    rows = classify(trainer, module, build_data(cfg))
    if not trainer.is_global_zero:
        return {}
    return report_labels(rows, module.schema["labels"], output, items="clips")
