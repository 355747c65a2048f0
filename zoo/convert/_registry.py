"""The registry of converters: one module of this package for each source."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from ...blocks.registry import did_you_mean
from ._config import Config
from ._names import Plan

MakePlan = Callable[[Config, Mapping[str, Tensor]], Plan]


@dataclass(frozen=True)
class Converter:
    """name: of the source and of its module. model_types: what its config.json calls itself. plan: config and tensors
    (whose names and shapes may be read, not their values) to a `Plan`."""

    name: str
    model_types: tuple[str, ...]
    plan: MakePlan

    @property
    def summary(self) -> str:
        return (self.plan.__doc__ or "").strip().split("\n")[0]


_CONVERTERS: dict[str, Converter] = {}


def register_converter(*model_types: str) -> Callable[[MakePlan], MakePlan]:
    """Decorator: the function makes the plan for checkpoints of these model types; its module names the converter."""

    def register(function: MakePlan) -> MakePlan:
        name = function.__module__.rpartition(".")[2]
        for other in _CONVERTERS.values():
            taken = set(model_types) & set(other.model_types)
            if taken and other.name != name:
                raise ValueError(f"the model types {sorted(taken)} already have the converter {other.name!r}")
        _CONVERTERS[name] = Converter(name, model_types, function)
        return function

    return register


def _load_all() -> None:
    package = importlib.import_module("..convert", __package__)
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_"):
            importlib.import_module(f".{module.name}", package.__name__)


def list_converters() -> list[str]:
    """Names of the converters: "llama", "bert" ..."""
    _load_all()
    return sorted(_CONVERTERS)


def converter_info(name: str) -> Converter:
    """The record of one converter. Raises ValueError with the close names for an unknown one."""
    if name not in list_converters():
        raise ValueError(f"unknown converter {name!r}.{did_you_mean(name, _CONVERTERS)}")
    return _CONVERTERS[name]


def find_converter(config: Config) -> Converter:
    """The converter for a config: by its model_type, or timm's for one that names an architecture instead. Raises
    ValueError for one that no converter knows, naming those there are."""
    _load_all()
    kind = config.get("model_type")
    if kind is None and isinstance(config.get("architecture"), str):
        kind = "timm"
    known = {t: c for c in _CONVERTERS.values() for t in c.model_types}
    if kind is None:
        raise ValueError(f"{config.where} names no model_type; known: {', '.join(sorted(known))}")
    if kind not in known:
        raise ValueError(f"{config.where} has model_type={kind!r}, which has no converter.{did_you_mean(kind, known)}")
    return known[kind]
