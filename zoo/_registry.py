"""The registry of models: the name of the function is the name of the model."""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..blocks.registry import did_you_mean

Entrypoint = Callable[..., nn.Module]


@dataclass(frozen=True)
class ModelInfo:
    """What the registry knows of a model. `defaults` are the options it is built with unless overridden."""

    name: str
    build: Entrypoint
    cls: type[nn.Module]
    task: str
    paper: str

    @property
    def summary(self) -> str:
        return (self.build.__doc__ or "").strip().split("\n")[0]

    @property
    def options(self) -> dict[str, Any]:
        """Options of the model's class with their defaults (the entry point's own values first)."""
        own = self.defaults
        parameters = inspect.signature(self.cls.__init__).parameters.values()
        return {p.name: own.get(p.name, p.default) for p in parameters if p.name not in ("self", "device", "dtype")}

    @property
    def defaults(self) -> dict[str, Any]:
        return dict(getattr(self.build, "defaults", {}))


_REGISTRY: dict[str, ModelInfo] = {}


def register_model(
    cls: type[nn.Module], *, task: str, paper: str, **defaults: Any
) -> Callable[[Entrypoint], Entrypoint]:
    """Decorator: the function's name becomes a model of class `cls` with these default options.

    The function receives the merged options and returns the model. Raises ValueError for a name already taken.
    """

    def register(function: Entrypoint) -> Entrypoint:
        name = function.__name__
        known = _REGISTRY.get(name)
        if known is not None and known.build.__module__ != function.__module__:
            raise ValueError(f"the model name {name!r} is already taken by {known.build.__module__}")
        function.defaults = defaults  # type: ignore[attr-defined]
        _REGISTRY[name] = ModelInfo(name, function, cls, task, paper)
        return function

    return register


def register_sizes(
    family: str,
    cls: type[nn.Module],
    sizes: Mapping[str, tuple[str, Mapping[str, Any]]],
    *,
    module: str,
    task: str,
    paper: str,
    **shared: Any,
) -> None:
    """Register `<family>_<size>` for every size: a line on what it is, and its own options beside the shared ones.

    module: `__name__` of the caller.
    """
    for size, (summary, options) in sizes.items():

        def build(**given: Any) -> nn.Module:
            return cls(**given)

        build.__name__ = build.__qualname__ = f"{family}_{size}"
        build.__module__, build.__doc__ = module, summary
        register_model(cls, task=task, paper=paper, **{**shared, **options})(build)


def _load_all() -> None:
    package = importlib.import_module("..zoo", __package__)
    for module in pkgutil.iter_modules(package.__path__):
        if not module.name.startswith("_") and not module.ispkg:
            importlib.import_module(f".{module.name}", package.__name__)


def model_info(name: str) -> ModelInfo:
    """The record of one model. Raises ValueError with the close names for an unknown one."""
    _load_all()
    if name not in _REGISTRY:
        raise ValueError(f"unknown model {name!r}.{did_you_mean(name, _REGISTRY)}")
    return _REGISTRY[name]


def list_models(filter: str = "*", *, task: str | None = None, pretrained: bool = False) -> list[str]:
    """Names of the registered models that match a wildcard, optionally of one task.

    pretrained: only those with weights (none ship yet).
    """
    _load_all()
    if pretrained:
        return []
    return sorted(n for n, i in _REGISTRY.items() if fnmatch.fnmatch(n, filter) and (task is None or i.task == task))


def create_model(name: str, pretrained: bool = False, **overrides: Any) -> nn.Module:
    """Build a registered model; `overrides` replace options of its class.

    Raises ValueError for an unknown name or option, naming the nearest, and for `pretrained` (no weights ship yet).
    The model remembers `config = {"name", "options"}`, from which `save_model` writes it.
    """
    info = model_info(name)
    if pretrained:
        raise ValueError(f"no pretrained weights ship for {name!r}; load_model(folder) loads your own")
    valid = info.options
    for key in overrides:
        if key not in valid:
            raise ValueError(f"model {name!r} has no option {key!r}.{did_you_mean(key, valid)}")
    missing = [k for k, v in valid.items() if v is inspect.Parameter.empty and k not in overrides]
    if missing:
        raise ValueError(f"model {name!r} needs {', '.join(missing)}")
    model = info.build(**{**info.defaults, **overrides})
    model.config = {"name": name, "options": dict(overrides)}  # type: ignore[assignment]
    return model
