"""Saving and loading: a folder with weights (safetensors), a config of names and plain values, and a card."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..blocks.protocol import Mixer
from ..blocks.registry import list_mixers, mixer_info
from ._registry import create_model

SCHEMA_VERSION = 1
_PLAIN = (str, int, float, bool, type(None))


def _plain(value: Any, where: str) -> Any:
    """`value` as plain containers; a registered Mixer class becomes its name. Raises ValueError for anything else."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, type) and issubclass(value, Mixer):
        for name in list_mixers():
            if mixer_info(name).cls is value:
                return name
        raise ValueError(
            f"{where} is the unregistered mixer {value.__name__}; give it @register_mixer to save the model"
        )
    raise ValueError(f"{where} holds a {type(value).__name__}; a saved model holds names and plain values only")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def clean_keys(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State-dict keys without the prefixes that torch.compile and DDP add."""
    cleaned = {}
    for key, value in state.items():
        while key.startswith(("_orig_mod.", "module.")):
            key = key.split(".", 1)[1]
        cleaned[key.replace("._orig_mod.", ".")] = value
    return cleaned


def save_model(model: nn.Module, folder: str | Path, *, preprocessing: dict[str, Any] | None = None) -> Path:
    """Write `model` (made by `create_model`) to a folder: model.safetensors, config.json, README.md.

    preprocessing: plain values that belong to the artefact (scaler, column names, frequency). Files are written under
    a temporary name and renamed. Raises ValueError for a model without a config or with options that are not plain.
    """
    from safetensors.torch import save_file

    config = getattr(model, "config", None)
    if not isinstance(config, dict) or "name" not in config:
        raise ValueError("save_model takes models made by create_model (they carry their config)")
    record = {
        "schema_version": SCHEMA_VERSION,
        "name": config["name"],
        "options": _plain(config["options"], "options"),
        "preprocessing": _plain(preprocessing or {}, "preprocessing"),
        "num_parameters": sum(p.numel() for p in model.parameters()),
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = folder / "model.safetensors"
    state = {k: v.detach().cpu().contiguous().clone() for k, v in clean_keys(model.state_dict()).items()}
    temporary = weights.with_suffix(f".tmp{os.getpid()}")
    try:
        save_file(state, str(temporary))
        record["sha256"] = _sha256(temporary)
        os.replace(temporary, weights)
    finally:
        temporary.unlink(missing_ok=True)
    _write(folder / "config.json", json.dumps(record, indent=2) + "\n")
    _write(folder / "README.md", _card(record))
    return folder


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _card(record: dict[str, Any]) -> str:
    return (
        "---\nlibrary_name: seqzoo\n---\n\n"
        f"# {record['name']}\n\n{record['num_parameters']:,} parameters; weights sha256 `{record['sha256']}`.\n\n"
        "```python\nimport seqzoo\n\nmodel = seqzoo.load_model('this folder')\n```\n"
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a saved model. Raises ValueError naming what is wrong with the folder."""
    folder = Path(folder)
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} is not a saved model: it has no config.json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(record, dict) or "name" not in record:
        raise ValueError(f"{path} has no model name")
    if record.get("schema_version", 0) > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {record['schema_version']}, this seqzoo reads up to {SCHEMA_VERSION}"
        )
    if "_target_" in json.dumps(record):
        raise ValueError(f"{path} holds a _target_; a saved model holds names and plain values only")
    return record


def load_model(folder: str | Path, **overrides: Any) -> nn.Module:
    """Load a folder written by `save_model`, in eval mode; `overrides` replace options of the model.

    Nothing is unpickled and nothing that the folder names is imported. Raises ValueError when the weights' sha256 is
    not the config's (both are printed), when a name is unknown, and for missing, unexpected or misshaped tensors.
    """
    from safetensors.torch import load_file

    folder = Path(folder)
    record = read_config(folder)
    weights = folder / "model.safetensors"
    if not weights.is_file():
        raise ValueError(f"{folder} has no model.safetensors")
    found = _sha256(weights)
    if found != record.get("sha256"):
        raise ValueError(f"{weights} has sha256 {found}, its config says {record.get('sha256')}; it is not loaded")
    model = create_model(record["name"], **{**record.get("options", {}), **overrides})
    state = clean_keys(load_file(str(weights)))
    own = model.state_dict()
    wrong = [
        f"{k} {tuple(state[k].shape)} instead of {tuple(own[k].shape)}"
        for k in own
        if k in state and state[k].shape != own[k].shape
    ]
    missing, extra = sorted(set(own) - set(state)), sorted(set(state) - set(own))
    if wrong or missing or extra:
        parts = [
            f"{label}: {', '.join(names)}"
            for label, names in (("misshaped", wrong), ("missing", missing), ("unexpected", extra))
            if names
        ]
        raise ValueError(f"{weights} does not fit {record['name']}: {'; '.join(parts)}")
    model.load_state_dict(state)
    return model.eval()
