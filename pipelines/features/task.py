"""What the command does for features: `lightning predict task=features model.pretrained=NAME data.path=FILES`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError, nearest, user_errors
from .reading import Reader, Rows, option_arguments
from .table import check_output, vector_table
from .trained import Trained, load_trained

NEEDS_CHECKPOINT = False  # nothing is trained: the model is found by `load_trained`
POOLINGS = ("mean", "max", "last", "none")


class Data:
    """The files: those of the model's own task (`data_arguments`)."""


def data_arguments() -> set[str]:
    """Keys of the section `data`, which is that of any task: the model decides which make sense."""
    from ..validate import list_tasks, task_package

    packages = [task_package(name) for name in list_tasks() if name != "features"]
    return option_arguments(package.Data for package in packages)


def predict(trainer: Any, module: Any, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Write the feature vectors of the files of `data.path` to features.parquet (or `output`).

    A row is what its id columns say: a document, a series, a window of a recording or of a video; with
    task.pooling=none a token of it. The schema of the file has the model, its sha256 and the settings as metadata.
    Raises UserError, before anything is computed, for a model, files or settings that do not fit; after all else is
    written, for files that turned out to be damaged.
    """
    output, options = check_output(cfg.get("output") or run_dir / "features.parquet"), cfg["task"]
    _check_options(options)
    trained = load_trained(cfg, run_dir)
    net: Any = trained.net
    info = net.feature_info
    layer = options["layer"]
    if not -len(info) <= layer < len(info):
        raise UserError(f"task.layer={layer}: {trained.model} has {len(info)} blocks, 0 to {len(info) - 1}, or -1 ...")
    with user_errors():
        reader = _reader(trained.task)(trained, cfg)
    tokens = options["pooling"] == "none"
    columns = dict(reader.columns)
    if tokens:
        columns |= {"token": _int64(), "time": reader.time}
    dim, device = int(info[layer]["num_chs"]), _device(cfg)
    net.to(device)
    with vector_table(output, columns, dim, _metadata(trained, options, reader)) as table:
        for rows in reader.batches(options["batch_size"]):
            ids, vectors = extract(net, _moved(rows, device), options)
            table.add(ids, vectors)
    kinds = "tokens" if tokens else "rows"
    print(
        f"{table.rows:,} {kinds} of {dim} features in {output} ({trained.model}, {info[layer]['module']})", flush=True
    )
    if reader.failed:
        raise UserError(f"{len(reader.failed):,} file(s) could not be read to their end: {reader.failed[0]}")
    return {"rows": table.rows, "dim": dim}


@torch.inference_mode()
def extract(net: torch.nn.Module, rows: Rows, options: dict[str, Any]) -> tuple[list[dict[str, Any]], np.ndarray]:
    """The rows of a batch for the table, and their vectors, float32 (N, D). options: layer, norm, pooling."""
    from ...zoo._features import token_features
    from ...zoo.classifier import pool

    x, mask = token_features(net, *rows.args, index=options["layer"], norm=options["norm"], **rows.kwargs)
    x = x[: len(x) - rows.spare].float()
    mask = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device) if mask is None else mask[: len(x)]
    if len(x) != len(rows.ids):
        raise RuntimeError(f"{len(rows.ids)} rows were read, the model has features of {len(x)}")
    if options["pooling"] != "none":
        found = pool(x, mask, options["pooling"])
        return rows.ids, torch.where(mask.any(1, keepdim=True), found, torch.nan).cpu().numpy()
    times, real = rows.times(x.shape[1]), mask.cpu().numpy()
    each = [
        {**row, "token": int(place), "time": _value(when[place])}
        for row, own, when in zip(rows.ids, real, times, strict=True)
        for place in np.flatnonzero(own)
    ]
    return each, x[mask].cpu().numpy()


def _value(time: Any) -> Any:
    """A number as Python's own; none for what has no time."""
    value = time.item()
    return None if isinstance(value, float) and np.isnan(value) else value


def _int64() -> Any:
    import pyarrow as pa

    return pa.int64()


def _check_options(task: dict[str, Any]) -> None:
    if task["pooling"] not in POOLINGS:
        raise UserError(f"task.pooling={task['pooling']!r} is not a choice.{nearest(str(task['pooling']), POOLINGS)}")
    for key, least in (("batch_size", 1), ("layer", None)):
        value = task[key]
        if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
            raise UserError(
                f"task.{key}={value!r} must be a whole number" + ("" if least is None else f" of at least {least}")
            )


def _reader(task: str) -> Callable[[Trained, dict[str, Any]], Reader]:
    """The class that reads the files of a task's models. Raises UserError for a task that reads none."""
    if task in ("text", "documents"):
        from .texts import TextReader

        return TextReader
    if task == "forecasting":
        from .series import SeriesReader

        return SeriesReader
    if task in ("audio_classify", "audio_events", "audio_retrieval"):
        from .sounds import SoundReader

        return SoundReader
    if task in ("video_classify", "video_grounding"):
        from .videos import ClipReader, MomentReader

        return ClipReader if task == "video_classify" else MomentReader
    raise UserError(
        f"no pipeline reads files for models of the task {task!r}; in Python: model.forward_features(inputs)"
    )


def _metadata(trained: Trained, options: dict[str, Any], reader: Reader) -> dict[str, str]:
    from importlib.metadata import version

    info: Any = trained.net.feature_info
    return {
        "model": trained.model,
        "source": trained.source,
        "sha256": trained.sha256,
        "task": trained.task,
        "layer": str(options["layer"]),
        "module": info[options["layer"]]["module"],
        "norm": str(bool(options["norm"])).lower(),
        "pooling": options["pooling"],
        "unit": reader.unit,
        "seqzoo": version("seqzoo"),
    }


def _device(cfg: dict[str, Any]) -> torch.device:
    """The one that a Trainer with the config's accelerator would take first."""
    import lightning as L

    trainer = L.Trainer(
        accelerator=cfg["trainer"].get("accelerator", "auto"),
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    return trainer.strategy.root_device


def _moved(rows: Rows, device: torch.device) -> Rows:
    def move(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(device)
        return {k: move(v) for k, v in value.items()} if isinstance(value, dict) else value

    return rows._replace(args=tuple(map(move, rows.args)), kwargs=move(rows.kwargs))
