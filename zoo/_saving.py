"""Saving a model as a folder of weights, names and plain values, and a card."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..blocks.layers.lora import folded
from ..blocks.protocol import Mixer
from ..blocks.registry import list_mixers, mixer_info
from ._cards import model_card
from ._files import (
    CARD,
    CONFIG,
    SCHEMA_VERSION,
    WEIGHTS,
    check_file_name,
    clean_keys,
    file_sha256,
    is_full_disk,
    write_text,
)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def save_model(
    model: nn.Module,
    folder: str | Path,
    *,
    preprocessing: Mapping[str, Any] | None = None,
    files: Mapping[str, str | Path] | None = None,
    dtype: str | None = None,
    record: Mapping[str, Any] | None = None,
) -> Path:
    """Write `model` (made by `create_model`) to a folder: model.safetensors, config.json, README.md.

    preprocessing: plain values that belong to the artefact (labels, scaler, mel settings); None: those that the model
    was loaded with. files: data files that belong to it too (a tokenizer's JSON), by the name they get. dtype: of the
    floating tensors in the file, "float32", "bfloat16" or "float16"; None: as they are. record: how it was made and
    what it scored, the section `record` of `Weights`. Files are written under temporary names and renamed, the config
    last. Raises ValueError for a model without a config, for options that are not plain, and for a full disk.
    """
    model = folded(model)  # low-rank updates become part of the weights
    config = getattr(model, "config", None)
    if not isinstance(config, dict) or "name" not in config:
        raise ValueError("save_model takes models made by create_model (they carry their config)")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not a choice: {', '.join(DTYPES)}")
    if preprocessing is None:
        preprocessing = getattr(model, "preprocessing", {})
    if files is None:
        files = getattr(model, "files", {})
    written: dict[str, Any] = {
        "schema_version": SCHEMA_VERSION,
        "name": config["name"],
        "options": plain(config["options"], "options"),
        "preprocessing": plain(preprocessing, "preprocessing"),
        "num_parameters": sum(p.numel() for p in model.parameters()),
        "dtype": dtype or "float32",
    }
    if record is not None:
        written["record"] = plain(record, "record")
    for name in files:
        check_file_name(name, "save_model")
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written["files"] = {name: _copy(Path(path), folder / name) for name, path in files.items()}
        written["sha256"] = _write_state(model, folder / WEIGHTS, dtype)
        write_text(folder / CONFIG, json.dumps(written, indent=2) + "\n")
        write_text(folder / CARD, model_card(written, str(folder.name)))
    except OSError as error:
        if is_full_disk(error):
            raise ValueError(f"no space left on the disk of {folder}; nothing half-written is kept") from error
        raise
    return folder


def plain(value: Any, where: str) -> Any:
    """`value` as plain containers; a registered Mixer class becomes its name. Raises ValueError for anything else."""
    if isinstance(value, (str, int, float, bool, type(None))):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v, f"{where}.{k}") for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, type) and issubclass(value, Mixer):
        for name in list_mixers():
            if mixer_info(name).cls is value:
                return name
        raise ValueError(
            f"{where} is the unregistered mixer {value.__name__}; give it @register_mixer to save the model"
        )
    raise ValueError(f"{where} holds a {type(value).__name__}; a saved model holds names and plain values only")


def _write_state(model: nn.Module, path: Path, dtype: str | None) -> str:
    """Write the weights and return their sha256."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    state = {}
    for key, value in clean_keys(model.state_dict()).items():
        value = value.detach().cpu()
        if dtype is not None and value.is_floating_point():
            value = value.to(DTYPES[dtype])
        state[key] = value.contiguous().clone()
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode & 0o777  # by the umask; safetensors makes files for their owner alone
        save_file(state, str(temporary))
        temporary.chmod(mode)
        digest = file_sha256(temporary)
        os.replace(temporary, path)
    except SafetensorError as error:  # an OSError inside becomes this
        if "os error 28" in str(error):
            raise OSError(28, str(error)) from error
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def _copy(source: Path, target: Path) -> str:
    if not source.is_file():
        raise ValueError(f"save_model: there is no file {source} to put beside the weights")
    temporary = target.with_name(f"{target.name}.tmp{os.getpid()}")
    try:
        shutil.copyfile(source, temporary)
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return file_sha256(target)
