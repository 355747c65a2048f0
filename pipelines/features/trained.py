"""The model whose features are asked for: a saved one (`model.pretrained`), or a checkpoint of a run (`ckpt_path`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from ..errors import UserError


class Trained(NamedTuple):
    """net: in eval mode. schema: of its data, plain values. task: whose models it belongs to. model: its name in the
    registry. source: what the user called it. sha256: of the file with its weights."""

    net: nn.Module
    schema: dict[str, Any]
    task: str
    model: str
    source: str
    sha256: str


def load_trained(cfg: dict[str, Any], run_dir: Path) -> Trained:
    """The model of a config. Raises UserError where none is named, for one that is nowhere, and for one without
    features, with the reason."""
    pretrained = (cfg.get("model") or {}).get("pretrained")
    if pretrained and cfg.get("ckpt_path"):
        raise UserError("model.pretrained and ckpt_path both name a model: give one of them")
    if not pretrained and not cfg.get("ckpt_path"):
        raise UserError(
            "features needs a model: model.pretrained=NAME (a tag, a folder, a run or org/name), or ckpt_path=<file>"
        )
    trained = _saved(str(pretrained)) if pretrained else _checkpoint(cfg, run_dir)
    net: Any = trained.net
    if net.no_features is not None:
        raise UserError(f"{trained.source}: {trained.model} has no features: {net.no_features}")
    net.eval().requires_grad_(False)
    return trained


def _saved(name: str) -> Trained:
    from ...zoo import model_info
    from ...zoo._files import WEIGHTS, file_sha256
    from ...zoo._loading import find_saved, load_model

    try:
        net: Any = load_model(name)
        digest = file_sha256(find_saved(name).folder / WEIGHTS)
    except (ValueError, OSError) as error:
        raise UserError(f"model.pretrained={name}: {error}") from error
    schema = dict(net.preprocessing)
    if schema.get("tokenizer") in net.files:
        schema["tokenizer"] = str(net.files[schema["tokenizer"]])
    model = net.config["name"]
    return Trained(net, schema, model_info(model).task, model, name, digest)


def _checkpoint(cfg: dict[str, Any], run_dir: Path) -> Trained:
    from ...zoo import model_info
    from ...zoo._files import file_sha256
    from ..checkpoints import load_checkpoint
    from ..run import find_checkpoint
    from ..validate import list_tasks, task_package

    path = find_checkpoint(cfg["ckpt_path"], cfg, run_dir)
    checkpoint = load_checkpoint(path)
    saved = checkpoint.get("hyper_parameters", {})
    task, model = ((saved.get(key) or {}).get("name") for key in ("task", "model"))
    if task not in list_tasks() or not isinstance(model, str):
        raise UserError(f"{path} is no checkpoint of a run of ours: it names no task and no model")
    module = task_package(task).load_module(checkpoint, path, {**cfg, "task": saved["task"]})
    schema = {**module.schema, "task": dict(saved["task"])}
    return Trained(module.net, schema, model_info(model).task, model, str(path), file_sha256(path))
