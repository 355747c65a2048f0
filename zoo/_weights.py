"""Records of pretrained weights: what a tag stands for, where it lies, how it was made and what it scored.

Weights that ship lie in `zoo/weights/<model>.<tag>/`, a saved model whose config.json has a section `record`; all else
of a record is there already. Weights elsewhere are made known with `register_weights`.
"""

from __future__ import annotations

import functools
import importlib.resources
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..blocks.registry import did_you_mean

TAG = re.compile(r"[a-z0-9][a-z0-9_]*")
# Of a column of `results`: whether more of it is better.
LOWER_IS_BETTER = re.compile(r"loss|mse|mae|rmse|mase|smape|mape|wql|crps|perplexity|bits|error|seconds", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """One set of pretrained weights.

    model, tag: `name` is "<model>.<tag>". source: the folder of a saved model, or "org/name@revision" on the hub.
    sha256: of model.safetensors. options: of `create_model`. preprocessing: what the data need (labels, scaler, mel or
    frame settings, the tokenizer). input: `ZooModel.input_spec`. license: of the weights (SPDX); data, data_license:
    what they were trained on. command: that trained them. results: rows of a table, the first one the model's, the
    others its baselines; `method` names them. metric: the column that decides. purpose: what they are for. limits:
    what they are not for. usage: lines of Python, "" for those of the task. default: the tag that the bare name takes.
    environment: versions and machine.
    """

    model: str
    tag: str
    source: str
    sha256: str
    num_parameters: int
    dtype: str = "float32"
    options: Mapping[str, Any] = field(default_factory=dict)
    preprocessing: Mapping[str, Any] = field(default_factory=dict)
    input: Mapping[str, Any] = field(default_factory=dict)
    license: str = ""
    data: str = ""
    data_license: str = ""
    command: str = ""
    results: Sequence[Mapping[str, Any]] = ()
    metric: str = ""
    purpose: str = ""
    limits: Sequence[str] = ()
    usage: str = ""
    default: bool = False
    environment: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not TAG.fullmatch(self.tag):
            raise ValueError(f"tag={self.tag!r} must be small letters, digits and _, as in mamba2_tiny.stdlib")
        if not re.fullmatch(r"[0-9a-f]{64}", self.sha256):
            raise ValueError(f"sha256={self.sha256!r} of {self.name} must be 64 hexadecimal digits")

    @property
    def name(self) -> str:
        return f"{self.model}.{self.tag}"

    @property
    def metrics(self) -> dict[str, float]:
        """What the model itself scored, by name."""
        own = self.results[0] if self.results else {}
        return {k: float(v) for k, v in own.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}

    def section(self) -> dict[str, Any]:
        """The section `record` of config.json: all that the rest of it does not hold."""
        return {key: _plain(getattr(self, key)) for key in _SECTION}


_SECTION = (
    *("tag", "license", "data", "data_license", "command", "results", "metric", "purpose", "limits", "usage"),
    *("default", "input", "environment"),
)
_REGISTERED: dict[str, Weights] = {}


def weights_of_config(config: Mapping[str, Any], source: str) -> Weights | None:
    """The record in a config.json, None where it has none. Raises ValueError for one that is incomplete or odd."""
    section = config.get("record")
    if not isinstance(section, Mapping):
        return None
    unknown = sorted(set(section) - set(_SECTION))
    if unknown:
        raise ValueError(f"{source}: the record has unknown fields {', '.join(unknown)}")
    shared = {key: config[key] for key in ("sha256", "num_parameters", "options", "preprocessing", "dtype")}
    return Weights(model=config["name"], source=source, **shared, **section)


def weights_folder() -> Path:
    """Where the weights that ship lie."""
    return Path(str(importlib.resources.files(__package__))) / "weights"


def register_weights(record: Weights) -> Weights:
    """Make weights known that do not ship, on the hub or in a folder of yours. Raises ValueError for a name that is
    taken."""
    if record.name in known_weights() and known_weights()[record.name] != record:
        raise ValueError(f"the weights {record.name!r} are already known, from {known_weights()[record.name].source}")
    _REGISTERED[record.name] = record
    return record


def known_weights() -> dict[str, Weights]:
    """All records by name: those that ship and those that were registered."""
    folder = weights_folder()
    paths = sorted(folder.glob("*/config.json"))
    shipped = _shipped(tuple((path, path.stat().st_mtime_ns) for path in paths))
    return {**shipped, **_REGISTERED}


@functools.lru_cache(maxsize=4)
def _shipped(files: tuple[tuple[Path, int], ...]) -> dict[str, Weights]:
    from ._files import read_config

    found = {}
    for path, _ in files:
        record = weights_of_config(read_config(path.parent), str(path.parent))
        if record is None or record.name != path.parent.name:
            raise ValueError(f"{path} must hold the record of the weights {path.parent.name!r}")
        found[record.name] = record
    return found


def tags_of(model: str) -> list[str]:
    """Tags of a model, its default first."""
    records = [record for record in known_weights().values() if record.model == model]
    return [r.tag for r in sorted(records, key=lambda r: (not r.default, r.tag))]


def split_name(name: str) -> tuple[str, str | None]:
    """("mamba2_tiny", "stdlib") of "mamba2_tiny.stdlib"; None where there is no tag."""
    model, dot, tag = name.partition(".")
    return model, tag if dot else None


def weights_info(name: str) -> Weights:
    """The record of "<model>.<tag>", or of the default tag of "<model>". Raises ValueError naming the nearest tag, or
    the models that have weights."""
    model, tag = split_name(name)
    tags = tags_of(model)
    if not tags:
        others = sorted(known_weights())
        raise ValueError(
            f"there are no weights for {model!r}; "
            + (f"there are for {', '.join(others)}" if others else "none ship yet")
            + "; load_model(folder) loads your own"
        )
    if tag is None:
        return known_weights()[f"{model}.{tags[0]}"]
    if tag not in tags:
        raise ValueError(f"{model!r} has no weights with the tag {tag!r}.{did_you_mean(tag, tags)}")
    return known_weights()[f"{model}.{tag}"]


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return [_plain(v) for v in value] if isinstance(value, (list, tuple)) else value
