"""Loading: from a folder, from weights that ship, or from the hub, to a model."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks.backbone import Backbone
from ._factory import build_model
from ._features import find_backbone
from ._files import CONFIG, WEIGHTS, file_sha256, read_config, read_state
from ._hub import download, parse_hub_id
from ._limits import BoundedBuilding
from ._registry import list_models
from ._weights import Weights, split_name, weights_info

logger = logging.getLogger("seqzoo.zoo")
_SHOWN = 8  # names in an error
_OF_A_RUN = "model"  # where the folder of a run has its model


class Saved(NamedTuple):
    """A folder to load, and the sha256 that a record asks of its weights."""

    folder: Path
    sha256: str | None


def load_model(
    source: str | Path,
    *,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    device: torch.device | str | None = None,
    **overrides: Any,
) -> nn.Module:
    """A saved model with its weights, in eval mode.

    source: a folder written by `save_model`, or that of a run; "<model>.<tag>" or "<model>", weights that ship; or
    "org/name", if wanted with "@revision", on the hub. revision: a branch, tag or commit there; a commit pins
    it. cache_dir: where downloads are kept; None: the variable SEQZOO_CACHE, else the hub's own cache. With
    HF_HUB_OFFLINE=1 nothing is asked of the network. overrides: options of the model, as in `create_model`. Its
    `preprocessing` is what was saved beside it, its `files` the paths of what lies there.

    Nothing is unpickled and nothing that the folder names is imported. Raises ValueError when the weights' sha256 is
    not the config's (both are printed), for unknown names and for tensors that do not fit, by name.
    """
    saved = find_saved(source, revision=revision, cache_dir=cache_dir)
    model = _restore(saved, overrides).eval()
    return model if device is None else model.to(device)


def load_backbone(source: str | Path, **arguments: Any) -> Backbone:
    """The `Backbone` of a saved model, to build another model around it; arguments as of `load_model`. Raises
    ValueError for a model without one."""
    return find_backbone(load_model(source, **arguments))


def load_weights(record: Weights, overrides: Mapping[str, Any]) -> nn.Module:
    """The model of a record with its weights, in the mode of a new model."""
    return _restore(_of_record(record, None), overrides)


def start_from(model: nn.Module, source: str | Path, *, cache_dir: str | Path | None = None) -> list[str]:
    """Give a model that was built already the weights of a saved one, and return the names of what stays as it was.

    Of the same class, all tensors but those of its heads must fit. Of another class (a language model's for a
    classifier), those of the `Backbone` must fit; what lies beside it under the same name, such as the embedding, is
    taken where it fits. Raises ValueError listing what does not.
    """
    saved = find_saved(source, cache_dir=cache_dir)
    other: Any = _restore(saved, {})
    state, where = other.state_dict(), str(saved.folder)
    if type(other) is type(model):
        return fit_state(model, state, where, changed=True)
    ends = [next((n for n, p in m.named_modules() if isinstance(p, Backbone)), None) for m in (other, model)]
    if ends[0] is None or ends[1] is None:
        raise ValueError(f"{where} holds a {type(other).__name__}, which has no backbone for a {type(model).__name__}")
    before, after = (end.removesuffix("backbone") for end in ends if end is not None)
    given = {after + key.removeprefix(before): value for key, value in state.items() if key.startswith(before)}
    own = model.state_dict()
    trunk = f"{after}backbone."
    wrong = [
        k
        for k in {*own, *given}
        if k.startswith(trunk) and (k not in own or k not in given or own[k].shape != given[k].shape)
    ]
    if wrong:
        raise ValueError(f"the backbone of {where} does not fit the {type(model).__name__}: {_names(wrong)}")
    heads: tuple[str, ...] = getattr(model, "heads", ())
    taken = {
        k: v
        for k, v in given.items()
        if k in own and own[k].shape == v.shape and (k.startswith(trunk) or not k.startswith(heads))
    }
    model.load_state_dict(taken, strict=False)
    new = [k for k in own if k not in taken]
    logger.warning("%s: the %s takes its backbone; at their start stay %s", where, type(model).__name__, _names(new))
    return new


def find_saved(source: str | Path, *, revision: str | None = None, cache_dir: str | Path | None = None) -> Saved:
    """Where a source lies, downloaded if need be. Raises ValueError for what is nowhere."""
    path, text = Path(source).expanduser(), str(source)
    if not (path / CONFIG).is_file() and (path / _OF_A_RUN / CONFIG).is_file():
        return Saved(path / _OF_A_RUN, None)
    if isinstance(source, Path) or (path / CONFIG).is_file():
        return Saved(path, None)
    if split_name(text)[0] in list_models():
        return _of_record(weights_info(text), cache_dir)
    if path.exists():
        return Saved(path, None)
    found = parse_hub_id(text)
    if found is None:
        raise ValueError(
            f"load_model({text!r}): no such folder, no weights of this name and no hub id such as org/name; "
            f"weights that ship: {', '.join(list_models(pretrained=True)) or 'none yet'}"
        )
    repo, pinned = found
    if revision is not None and pinned is not None and revision != pinned:
        raise ValueError(f"load_model({text!r}) names another revision than revision={revision!r}")
    return Saved(download(repo, revision or pinned, cache_dir=cache_dir), None)


def _of_record(record: Weights, cache_dir: str | Path | None) -> Saved:
    if Path(record.source).is_dir():
        return Saved(Path(record.source), record.sha256)
    found = parse_hub_id(record.source)
    if found is None:
        raise ValueError(f"the weights {record.name} are at {record.source!r}: neither a folder nor org/name@revision")
    return Saved(download(*found, cache_dir=cache_dir), record.sha256)


def _restore(saved: Saved, overrides: Mapping[str, Any]) -> nn.Module:
    config = read_config(saved.folder)
    weights = saved.folder / WEIGHTS
    if not weights.is_file():
        raise ValueError(f"{saved.folder} has no {WEIGHTS}: copy the whole folder that save_model wrote")
    _check_sha256(weights, config.get("sha256"), "its config")
    if saved.sha256 is not None:
        _check_sha256(weights, saved.sha256, "its record")
    for name, digest in config["files"].items():
        if not (saved.folder / name).is_file():
            raise ValueError(f"{saved.folder} has no {name}, which its config names")
        _check_sha256(saved.folder / name, digest, "its config")
    state = read_state(weights)
    options = {**without_sources(config["options"]), **overrides}
    try:
        with BoundedBuilding(weights.stat().st_size, len(state), str(weights)):
            model: Any = build_model(config["name"], options)
    except (RuntimeError, MemoryError, OverflowError, RecursionError, TypeError) as error:
        why = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise ValueError(f"{saved.folder}: no {config['name']} can be built from its config ({why})") from error
    fit_state(model, state, str(weights), changed=bool(overrides))
    model.preprocessing = config["preprocessing"]
    model.files = {name: saved.folder / name for name in config["files"]}
    return model


def _check_sha256(path: Path, expected: Any, whose: str) -> None:
    found = file_sha256(path)
    if found != expected:
        raise ValueError(f"{path} has sha256 {found}, {whose} says {expected}; it is not loaded: fetch it again")


def without_sources(options: Any) -> Any:
    """Options without files or hubs to fetch weights of parts from (`encoder.weights`): a saved model has them all."""
    if isinstance(options, dict):
        return {k: None if k == "weights" and isinstance(v, str) else without_sources(v) for k, v in options.items()}
    return [without_sources(v) for v in options] if isinstance(options, list) else options


def fit_state(model: nn.Module, state: Mapping[str, Tensor], where: str, *, changed: bool) -> list[str]:
    """Load tensors into a model. changed: its options are not those of the weights, so that tensors of its `heads` that
    do not fit start anew, which is said. Returns their names. Raises ValueError listing all else that does not fit."""
    own = model.state_dict()
    wrong = [key for key in own if key in state and state[key].shape != own[key].shape]
    missing, extra = [key for key in own if key not in state], [key for key in state if key not in own]
    heads: tuple[str, ...] = getattr(model, "heads", ()) if changed else ()
    new = [key for key in (*wrong, *missing) if key.startswith(heads)] if heads else []
    left = [key for key in extra if heads and key.startswith(heads)]
    shapes = [f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}" for k in wrong if k not in new]
    parts = [
        f"{label}: {_names(names)}"
        for label, names in (
            ("misshaped", shapes),
            ("missing", [k for k in missing if k not in new]),
            ("unexpected", [k for k in extra if k not in left]),
        )
        if names
    ]
    if parts:
        raise ValueError(f"{where} does not fit the {type(model).__name__}: {'; '.join(parts)}")
    model.load_state_dict({k: v for k, v in state.items() if k in own and k not in new}, strict=False)
    if new:
        logger.warning("%s: the head starts anew, the backbone has its weights: %s", where, _names(new))
    return new


def _names(names: Sequence[str]) -> str:
    names = sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
