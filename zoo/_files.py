"""What a saved model is: a folder with model.safetensors, config.json (names and plain values) and README.md.

Nothing in such a folder is unpickled and nothing that it names is imported. Links are followed, also out of the folder:
the cache of the hub keeps its files that way. Files beside these three are named in the config with their sha256.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

# 2: files, dtype, record. What an older one lacks has its default.
SCHEMA_VERSION = 2
WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
# More than any scaler or list of labels needs; a larger file is not read.
MAX_CONFIG_BYTES = 64 << 20
# As safetensors has it.
MAX_HEADER_BYTES = 100_000_000
# What Hydra would act on.
_TARGETS = ("_target_", "_partial_", "_args_", "_recursive_", "_convert_")
_FILE_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")


def file_sha256(path: Path) -> str:
    """The sha256 of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_config(folder: str | Path) -> dict[str, Any]:
    """The config.json of a saved model, every field there. Raises ValueError naming what is wrong with the folder."""
    folder = Path(folder)
    path = folder / CONFIG
    if not path.is_file():
        near = sorted(p.parent.name for p in folder.glob(f"*/{CONFIG}"))[:3] if folder.is_dir() else []
        hint = f"; the folder {near[0]} in it is one" if near else ""
        raise ValueError(f"{folder} is not a saved model: it has no {CONFIG}{hint or '; save_model writes one'}")
    size = path.stat().st_size
    if size > MAX_CONFIG_BYTES:
        raise ValueError(f"{path} has {size:,} bytes, more than the {MAX_CONFIG_BYTES:,} of any config; it is not read")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # also of a number with too many digits
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not an object with name and options")
    if not isinstance(config.get("name"), str):
        raise ValueError(f'{path} has no model name: save_model writes it, as "name": "patch_tiny"')
    version = config.get("schema_version", 1)
    if not isinstance(version, int) or version > SCHEMA_VERSION:
        raise ValueError(
            f"{path} has schema version {version}, this seqzoo reads up to {SCHEMA_VERSION}: pip install -U seqzoo"
        )
    config = {"options": {}, "preprocessing": {}, "files": {}, "dtype": "float32", "num_parameters": 0, **config}
    for key in ("options", "preprocessing", "files"):
        if not isinstance(config[key], dict):
            raise ValueError(f"{path}: {key} is a {type(config[key]).__name__}, expected an object")
    try:
        _refuse_targets(config, str(path))
    except RecursionError as error:
        raise ValueError(f"{path} is not valid JSON for a config: it is nested too deeply") from error
    for name in config["files"]:
        check_file_name(name, str(path))
    return config


def check_file_name(name: str, where: str) -> None:
    """Raise ValueError for a name that could lead out of the folder, or is one of the three files."""
    if not _FILE_NAME.fullmatch(name) or ".." in name or name in (WEIGHTS, CONFIG, CARD):
        raise ValueError(f"{where} names the file {name!r}; beside {WEIGHTS} only plain file names are allowed")


def _refuse_targets(value: Any, where: str) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            if key in _TARGETS:
                raise ValueError(f"{where} holds {key!r}; a saved model holds names and plain values only")
            _refuse_targets(inner, where)
    elif isinstance(value, list):
        for inner in value:
            _refuse_targets(inner, where)


def read_state(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file, without the prefixes of torch.compile and DDP. Raises ValueError for a file
    that is something else, is cut off or claims more than it has."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    _check_header(path)
    try:
        return clean_keys(load_file(str(path)))
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file that can be read: {error}") from error


def _check_header(path: Path) -> None:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > size - 8:
            # a header's length may begin with the same bytes, but then it fits into the file
            if start[:2] == b"PK" or start[:1] == b"\x80":
                raise ValueError(
                    f"{path} is a pickle under the name of a safetensors file; it is not opened: save_model writes none"
                )
            raise ValueError(
                f"{path} is cut off or no safetensors file: its header claims {length:,} bytes, the file has {size:,}; "
                "fetch it again"
            )
        if length > MAX_HEADER_BYTES:
            raise ValueError(f"{path} is no safetensors file: its header claims {length:,} bytes; it is not read")
        try:
            header = json.loads(file.read(length))
            ends = [int(part["data_offsets"][1]) for name, part in header.items() if name != "__metadata__"]
        except (ValueError, TypeError, LookupError, AttributeError, OverflowError, RecursionError) as error:
            raise ValueError(f"{path} is no safetensors file: its header is not what it should be ({error})") from error
    if max(ends, default=0) != size - 8 - length:
        raise ValueError(
            f"{path} is cut off or overlong: its tensors need {8 + length + max(ends, default=0):,} bytes, "
            f"the file has {size:,}; fetch it again"
        )


def clean_keys(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """State-dict keys without the prefixes that torch.compile and DDP add."""
    cleaned = {}
    for key, value in state.items():
        while key.startswith(("_orig_mod.", "module.")):
            key = key.split(".", 1)[1]
        cleaned[key.replace("._orig_mod.", ".")] = value
    return cleaned


def is_full_disk(error: BaseException) -> bool:
    """Whether the error says that the disk, the quota or the largest allowed file was reached."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def write_text(path: Path, text: str) -> None:
    """All or nothing: under a temporary name, then renamed."""
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
