"""Reading a checkpoint: a folder in the form of Hugging Face, or a state dict and a config."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ._config import Config
from ._names import shorten

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".bin.index.json")
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
_QUANTISED = ("quantization_config", "quantization", "compression_config")


class Source(NamedTuple):
    """config, tensors, and the folder they come from (None: from Python)."""

    config: Config
    tensors: dict[str, Tensor]
    folder: Path | None


def read_source(source: Any, config: Any = None) -> Source:
    """See `convert`. Raises ValueError saying what is wrong with the folder, the files or the arguments."""
    if isinstance(source, (str, Path)):
        if config is not None:
            raise ValueError("config is that of a state dict; a folder has its own config.json")
        return _read_folder(Path(source).expanduser())
    if not isinstance(source, Mapping):
        raise ValueError(f"source is a {type(source).__name__}; expected a folder, or a state dict with config=")
    if config is None:
        raise ValueError("a state dict needs config=, the values of its config.json")
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        raise ValueError(f"config is a {type(config).__name__}; expected a dict or something with to_dict()")
    wrong = [str(k) for k, v in source.items() if not isinstance(k, str) or not isinstance(v, Tensor)]
    if wrong:
        raise ValueError(f"the state dict holds other things than tensors: {shorten(wrong)}")
    return _checked(Config(values, "the config"), dict(source), None)


def _checked(config: Config, tensors: dict[str, Tensor], folder: Path | None) -> Source:
    for key in _QUANTISED:
        if config.get(key):
            raise ValueError(f"{config.where} has {key}: quantised weights cannot be converted")
    packed = [
        f"{k} ({str(v.dtype).removeprefix('torch.')})"
        for k, v in tensors.items()
        if v.dtype not in _FLOATS and (v.is_floating_point() or k.endswith(("weight", "weight_packed", "qweight")))
    ]
    if packed:
        raise ValueError(f"quantised weights cannot be converted: {shorten(packed)}")
    return Source(config, tensors, folder)


def _read_folder(folder: Path) -> Source:
    if not folder.is_dir():
        hint = ""
        if not folder.is_absolute() and len(folder.parts) == 2:
            hint = f"; to fetch it from the Hub: hf download {folder} --local-dir {folder.name}"
        raise ValueError(f"no such folder: {folder}{hint}")
    path = folder / "config.json"
    if not path.is_file():
        raise ValueError(f"{folder} has no config.json")
    config = _json(path)
    if "schema_version" in config and "name" in config:
        raise ValueError(f"{folder} is a model of seqzoo already: load_model reads it")
    where = Config(config, str(path))
    for key in _QUANTISED:  # before gigabytes are read
        if config.get(key):
            raise ValueError(f"{path} has {key}: quantised weights cannot be converted")
    if (folder / WEIGHTS).is_file():
        return _checked(where, _load(folder / WEIGHTS), folder)
    if (folder / INDEX).is_file():
        return _checked(where, _load_shards(folder), folder)
    pickles = sorted(p.name for p in folder.iterdir() if p.name.endswith(_PICKLES))
    if pickles:
        raise ValueError(
            f"{folder} has {shorten(pickles)} but no {WEIGHTS}: such files are pickles, which can run code, and "
            "nothing is unpickled here; load them with the library that wrote them and save them as safetensors"
        )
    raise ValueError(f"{folder} has neither {WEIGHTS} nor {INDEX}")


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is not an object of names and values")
    return values


def _load(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(str(path))
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is not a whole safetensors file: {error}") from error


def _load_shards(folder: Path) -> dict[str, Tensor]:
    """The tensors of the files that the index names, each in the file it says."""
    places = _json(folder / INDEX).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(v, str) for v in places.values()):
        raise ValueError(f"{folder / INDEX} has no weight_map from tensors to files")
    files = sorted(set(places.values()))
    for name in files:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise ValueError(f"{folder / INDEX} names {name!r}; expected .safetensors files of the same folder")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / INDEX} names {name}, which is not there")
    tensors: dict[str, Tensor] = {}
    for name in files:
        found = _load(folder / name)
        wanted = {tensor for tensor, file in places.items() if file == name}
        if set(found) != wanted:
            absent, extra = sorted(wanted - set(found)), sorted(set(found) - wanted)
            parts = [f"{word} {shorten(names)}" for word, names in (("lacks", absent), ("also has", extra)) if names]
            raise ValueError(f"{folder / name} is not as its index says: it {' and '.join(parts)}")
        tensors.update(found)
    return tensors
