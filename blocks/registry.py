"""The registry of token mixers: a name, a class, the paper it implements."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from .protocol import PATTERNS, Mixer

MixerT = TypeVar("MixerT", bound=type[Mixer])


@dataclass(frozen=True)
class MixerInfo:
    """What the registry knows of a mixer; the fields are the arguments of `register_mixer`."""

    name: str
    cls: type[Mixer]
    paper: str
    origin: str
    cost: str = ""
    kernels: tuple[str, ...] = ()
    ours: frozenset[str] = frozenset()

    @property
    def patterns(self) -> tuple[str, ...]:
        return tuple(p for p in PATTERNS if p in self.cls.patterns)

    @property
    def streaming(self) -> bool:
        return self.cls.streaming

    @property
    def options(self) -> dict[str, Any]:
        """Keyword options of the constructor with their defaults."""
        parameters = inspect.signature(self.cls.__init__).parameters.values()
        skipped = {"self", "dim", "causal", "cross", "device", "dtype"}
        return {p.name: p.default for p in parameters if p.name not in skipped}


_REGISTRY: dict[str, MixerInfo] = {}


def did_you_mean(name: str, known: Iterable[str], *, number: int = 3) -> str:
    """' Did you mean a, b?' or, with nothing close, ' Known: ...'; for the end of an error message."""
    known = sorted(known)
    close = difflib.get_close_matches(str(name), known, n=number, cutoff=0.5)
    return f" Did you mean {', '.join(close)}?" if close else f" Known: {', '.join(known)}."


def register_mixer(
    name: str,
    *,
    paper: str,
    origin: str = "paper",
    cost: str = "",
    kernels: Iterable[str] = (),
    ours: Iterable[str] = (),
) -> Callable[[MixerT], MixerT]:
    """Class decorator that puts a `Mixer` subclass into the registry under `name`.

    paper: where it is defined, e.g. "arXiv:2012.07436". origin: "paper", "reconstruction" (published description, no
    public code) or "seqzoo" (our own extension). For the table of capabilities: cost, the growth of the work with the
    length, in the letters of blocks/README.md; kernels, the operations of `kernels/` that do it; ours, the patterns
    that the paper does not define. Raises ValueError for a name that another class already has.
    """
    extensions = frozenset(ours)
    if not extensions <= set(PATTERNS):
        raise ValueError(f"ours={sorted(extensions)} must be patterns: {', '.join(PATTERNS)}")

    def register(cls: MixerT) -> MixerT:
        known = _REGISTRY.get(name)
        if known is not None and known.cls.__qualname__ != cls.__qualname__:
            raise ValueError(f"the mixer name {name!r} is already taken by {known.cls.__qualname__}")
        if not issubclass(cls, Mixer):
            raise TypeError(f"{cls.__qualname__} must be a subclass of seqzoo.Mixer to be registered")
        _REGISTRY[name] = MixerInfo(name, cls, paper, origin, cost, tuple(kernels), extensions)
        return cls

    return register


def _load_all() -> None:
    package = importlib.import_module(".mixers", __package__)
    for module in pkgutil.iter_modules(package.__path__):
        importlib.import_module(f".{module.name}", package.__name__)


def mixer_info(name: str) -> MixerInfo:
    """The record of one mixer. Raises ValueError with the close names for an unknown one."""
    _load_all()
    if name not in _REGISTRY:
        raise ValueError(f"unknown mixer {name!r}.{did_you_mean(name, _REGISTRY)}")
    return _REGISTRY[name]


def list_mixers(*, pattern: str | None = None, streaming: bool | None = None) -> list[str]:
    """Names of the registered mixers, optionally those that honour a pattern or carry a state."""
    _load_all()
    if pattern is not None and pattern not in PATTERNS:
        raise ValueError(f"unknown pattern {pattern!r}.{did_you_mean(pattern, PATTERNS)}")
    return sorted(
        name
        for name, info in _REGISTRY.items()
        if (pattern is None or pattern in info.cls.patterns) and (streaming is None or info.streaming == streaming)
    )


def create_mixer(mixer: str | dict[str, Any] | type[Mixer] | Callable[..., Mixer], dim: int, **options: Any) -> Mixer:
    """Build a mixer of width `dim` from a name, `{"name": ..., **options}`, a `Mixer` subclass or any factory.

    Raises ValueError for an unknown name, option or pattern, naming the nearest valid choices.
    """
    factory: Callable[..., Mixer]
    if isinstance(mixer, dict):
        options = {**{k: v for k, v in mixer.items() if k != "name"}, **options}
        if "name" not in mixer:
            raise ValueError(f"a mixer given as a dict needs the key 'name', got {sorted(mixer)}")
        mixer = mixer["name"]
    if isinstance(mixer, str):
        info = mixer_info(mixer)
        factory, label = info.cls, mixer
    elif callable(mixer):
        factory, label = mixer, getattr(mixer, "__name__", str(mixer))
    else:
        raise TypeError(f"a mixer is a name, a dict, a Mixer subclass or a factory, not {type(mixer).__name__}")
    if inspect.isclass(factory):
        valid = set(inspect.signature(factory.__init__).parameters) - {"self"}
        for key in options:
            if key not in valid:
                raise ValueError(f"mixer {label!r} has no option {key!r}.{did_you_mean(key, valid - {'dim'})}")
    built = factory(dim, **options)
    if not isinstance(built, Mixer):
        raise TypeError(f"the mixer factory {label!r} returned a {type(built).__name__}, not a seqzoo.Mixer")
    return built
