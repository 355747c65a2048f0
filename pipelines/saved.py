"""What `lightning test` and `predict` read of a saved model (`model.pretrained=NAME`): the same as of a checkpoint.

A saved model has the schema of its data, the section `task` of its run and what its validation chose, a threshold, in
`preprocessing`, so that it answers without the run that made it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

TASK, CHOSEN = "task", "chosen"


def module_preprocessing(schema: Mapping[str, Any], task: Mapping[str, Any], module: nn.Module) -> dict[str, Any]:
    """The `preprocessing` of an exported model. module: the LightningModule, whose net is `module.net`."""
    chosen = {k: v.tolist() for k, v in module.state_dict().items() if not k.startswith("net.")}
    return {**schema, TASK: dict(task), **({CHOSEN: chosen} if chosen else {})}


def saved_model_section(name: str) -> dict[str, Any]:
    """The section `model` of a command that answers with a saved model: the saved one's name in place of a default of
    the config, which it has nothing to do with. Raises UserError for a name that is no saved model."""
    from ..zoo import read_config
    from ..zoo._loading import find_saved
    from .errors import UserError

    try:
        return {"name": read_config(find_saved(name).folder)["name"], "pretrained": name}
    except (ValueError, OSError) as error:
        raise UserError(f"model.pretrained={name}: {error}") from error


def saved_checkpoint(name: str, task: Mapping[str, Any]) -> dict[str, Any]:
    """A saved model ("<model>.<tag>", a folder, "org/name@revision") as the task's `load_module` takes a checkpoint.

    task: the section of the config, for models that were saved without theirs. Raises UserError for a name that is no
    saved model, and for a model of another task.
    """
    from ..zoo import load_model, model_info
    from .errors import UserError
    from .validate import task_package

    try:
        net: Any = load_model(name)
    except (ValueError, OSError) as error:
        raise UserError(f"model.pretrained={name}: {error}") from error
    of = model_info(net.config["name"]).task
    wanted = getattr(task_package(task["name"]), "MODELS", task["name"])
    if of != wanted:
        raise UserError(f"model.pretrained={name} is a model for the task {of!r}, not {wanted!r}: give task={of}")
    schema = dict(net.preprocessing)
    own, chosen = schema.pop(TASK, None), schema.pop(CHOSEN, {})
    if own is None and not schema:
        raise UserError(f"model.pretrained={name} was saved without what its data look like: lightning fit exports it")
    if schema.get("tokenizer") in net.files:
        schema["tokenizer"] = str(net.files[schema["tokenizer"]])
    return {
        "hyper_parameters": {
            "model": {"name": net.config["name"], **net.config["options"]},
            "task": own if own is not None else dict(task),
            "optimizer": {},
            "scheduler": {},
            "schema": schema,
        },
        "state_dict": {
            **{f"net.{key}": value for key, value in net.state_dict().items()},
            **{key: torch.tensor(value, dtype=torch.float64) for key, value in chosen.items()},
        },
    }
