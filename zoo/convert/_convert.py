"""From a public checkpoint to a model of the zoo, and to a folder that `load_model` reads."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ._names import Plan, check_fit
from ._registry import find_converter
from ._source import Source, read_source

_TOKENIZER = "tokenizer.json"


def make_plan(source: str | Path | Mapping[str, Tensor], *, config: Any = None) -> Plan:
    """What a checkpoint becomes: the name and the options of a model, and the table of names. Arguments and errors as
    `convert`. `Plan.translate` also takes the gradients of the checkpoint's model."""
    found = read_source(source, config)
    return find_converter(found.config).plan(found.config, found.tensors)


class Conversion(NamedTuple):
    """model: in eval mode. plan: what was decided. left_out: names of tensors that the model has no use for."""

    model: nn.Module
    plan: Plan
    left_out: list[str]


def convert(
    source: str | Path | Mapping[str, Tensor],
    target: str | Path | None = None,
    *,
    config: Any = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> nn.Module:
    """A public checkpoint as a model of the zoo, in eval mode.

    source: a folder with config.json and model.safetensors (or its parts and their index), or a state dict, then with
    config: the values of the config.json, or an object with to_dict(). target: a folder to write, which `load_model`
    reads; a tokenizer.json goes with it. dtype: of the weights, None for the widest of the checkpoint's. overwrite: the
    target may hold files.

    Nothing is unpickled and nothing is downloaded. Raises ValueError, before anything is written, for a model type
    without converter, for options that ours do not have, and for missing, unexpected, misshaped and quantised tensors,
    all by name.
    """
    return convert_report(source, target, config=config, dtype=dtype, overwrite=overwrite).model


def convert_report(
    source: str | Path | Mapping[str, Tensor],
    target: str | Path | None = None,
    *,
    config: Any = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Conversion:
    """As `convert`, with what was decided and what was left out."""
    from .. import create_model, save_model

    found = read_source(source, config)
    _check_target(target, found, overwrite)
    plan = find_converter(found.config).plan(found.config, found.tensors)
    with torch.device("meta"):  # no start is drawn for weights that are replaced
        model: Any = create_model(plan.name, **plan.options)
    where = "the state dict" if found.folder is None else str(found.folder)
    state, left_out = plan.translate(found.tensors)
    check_fit(plan, state, model.state_dict(), where)
    if dtype is None:
        dtype = _widest(state)
    own = found.folder is None  # tensors of the caller are never shared with the model
    state = {k: v.detach().to(dtype, copy=own).contiguous() for k, v in state.items()}
    model.load_state_dict(state, assign=True)
    model.requires_grad_(True).eval()
    model.preprocessing, model.files = plan.preprocessing, _files(found)
    if target is not None:
        save_model(model, Path(target).expanduser(), record=_record(model, found))
    return Conversion(model, plan, left_out)


def _record(model: Any, found: Source) -> dict[str, Any]:
    """What the card says of where the weights come from."""
    kind = found.config.get("model_type") or found.config.get("architecture")
    name = str(found.config.get("_name_or_path"))
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):  # a name of the Hub, not a path
        name = "a model in memory" if found.folder is None else found.folder.name
    return {
        "tag": "converted",
        "purpose": f"The weights of {name} ({kind}), converted: they give the outputs of the original.",
        "limits": ["Licence, training data and limits are those of the original and not known here."],
        "input": model.input_spec,
    }


def _files(found: Source) -> dict[str, Path]:
    """What goes beside the weights: the tokenizer."""
    path = None if found.folder is None else found.folder / _TOKENIZER
    return {} if path is None or not path.is_file() else {_TOKENIZER: path}


def _widest(state: Mapping[str, Tensor]) -> torch.dtype:
    dtype = next(iter(state.values())).dtype
    for tensor in state.values():
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def _check_target(target: str | Path | None, found: Source, overwrite: bool) -> None:
    if target is None:
        return
    path = Path(target).expanduser()
    if found.folder is not None and path.resolve() == found.folder.resolve():
        raise ValueError(f"target is the source, {path}; give another folder")
    if path.exists() and not path.is_dir():
        raise ValueError(f"target {path} is a file; give a folder")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise ValueError(f"target {path} holds files; give another folder, or overwrite=True")
