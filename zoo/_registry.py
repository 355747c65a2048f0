"""The registry of models: the name of the function is the name of the model."""

from __future__ import annotations

import fnmatch
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..blocks.registry import did_you_mean, list_mixers
from ._features import give_interface
from ._weights import known_weights, split_name, tags_of

Entrypoint = Callable[..., nn.Module]


@dataclass(frozen=True)
class ModelInfo:
    """What the registry knows of a model. `defaults` are the options it is built with unless overridden."""

    name: str
    build: Entrypoint
    cls: type[nn.Module]
    task: str
    paper: str
    modality: str = ""

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
    def mixers(self) -> tuple[str, ...]:
        """Names of the mixers that it is built with unless told otherwise."""
        own: tuple[str, ...] = getattr(self.cls, "mixers", ())
        return tuple(dict.fromkeys([*mixer_names(self.options.get("mixer")), *own]))

    @property
    def has_features(self) -> bool:
        """Whether it gives intermediates, so that `features_only=True` takes it."""
        return getattr(self.cls, "no_features", None) is None

    @property
    def tags(self) -> list[str]:
        """Tags of its pretrained weights, the default first."""
        return tags_of(self.name)

    @property
    def defaults(self) -> dict[str, Any]:
        return dict(getattr(self.build, "defaults", {}))


_MODALITIES = {"documents": "text", "forecasting": "series"}  # else the first word of the task
_REGISTRY: dict[str, ModelInfo] = {}


def register_model(
    cls: type[nn.Module], *, task: str, paper: str = "", modality: str | None = None, **defaults: Any
) -> Callable[[Entrypoint], Entrypoint]:
    """Decorator: the function's name becomes a model of class `cls` with these default options.

    The function receives the merged options and returns the model. paper: where it is defined. modality: "text",
    "series", "audio", "video", "image" or your own; None: the task's. A class that is no `ZooModel` is given what it
    lacks of one (`forward_intermediates` and so on). Raises ValueError for a name that is taken or holds a dot.
    """

    def register(function: Entrypoint) -> Entrypoint:
        name = function.__name__
        if "." in name:
            raise ValueError(f"the model name {name!r} holds a dot; a tag of weights stands behind it")
        known = _REGISTRY.get(name)
        if known is not None and known.build.__module__ != function.__module__:
            raise ValueError(f"the model name {name!r} is already taken by {known.build.__module__}")
        function.defaults = defaults  # type: ignore[attr-defined]
        give_interface(cls)
        of_task = _MODALITIES.get(task, task.partition("_")[0])
        _REGISTRY[name] = ModelInfo(name, function, cls, task, paper, modality or of_task)
        return function

    return register


def mixer_names(choice: Any) -> list[str]:
    """Names in what the option `mixer` holds: a name, a dict with one, or a list of those."""
    parts = choice if isinstance(choice, (list, tuple)) else [choice]
    names = [part.get("name") if isinstance(part, Mapping) else part for part in parts]
    return list(dict.fromkeys(name for name in names if isinstance(name, str)))


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
    """The record of one model, with or without a tag. Raises ValueError with the close names for an unknown one."""
    _load_all()
    model = split_name(name)[0]
    if model not in _REGISTRY:
        raise ValueError(f"unknown model {model!r}.{did_you_mean(model, _REGISTRY)}")
    return _REGISTRY[model]


def list_models(
    filter: str | Sequence[str] = "*",
    *,
    pretrained: bool = False,
    exclude: str | Sequence[str] = (),
    task: str | None = None,
    modality: str | None = None,
    mixer: str | None = None,
    features_only: bool = False,
) -> list[str]:
    """Names of the registered models, sorted.

    filter, exclude: one or several wildcards, of which one fits. pretrained: those with weights, as "<model>.<tag>"
    (a wildcard may fit with or without the tag). task, modality: that they are of. mixer: that they have, unless told
    otherwise. features_only: those that give intermediates. Raises ValueError for a task, modality or mixer that there
    is not, naming the nearest.
    """
    _load_all()
    _check("task", task, {info.task for info in _REGISTRY.values()})
    _check("modality", modality, {info.modality for info in _REGISTRY.values()})
    _check("mixer", mixer, list_mixers())
    wanted, unwanted = _patterns(filter) or ["*"], _patterns(exclude)

    def fits(name: str, patterns: Iterable[str]) -> bool:
        forms = (name, split_name(name)[0])
        return any(fnmatch.fnmatchcase(form, pattern) for form in forms for pattern in patterns)

    names = sorted(known_weights() if pretrained else _REGISTRY)
    return [
        name
        for name, info in ((name, _REGISTRY.get(split_name(name)[0])) for name in names)
        if info is not None
        and fits(name, wanted)
        and not fits(name, unwanted)
        and (task is None or info.task == task)
        and (modality is None or info.modality == modality)
        and (mixer is None or mixer in info.mixers)
        and (info.has_features or not features_only)
    ]


def _patterns(given: str | Sequence[str]) -> list[str]:
    return [pattern for pattern in ([given] if isinstance(given, str) else given) if pattern]


def _check(what: str, value: str | None, known: Iterable[str]) -> None:
    known = set(known)
    if value is not None and value not in known:
        raise ValueError(f"unknown {what} {value!r}.{did_you_mean(value, known)}")
