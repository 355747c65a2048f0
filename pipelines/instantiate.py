"""Building objects that a config names by `_target_`, from an allow-list.

A config file may come from anyone, and Hydra's own `instantiate` calls what it is told to. Here a dotted name
must pass twice: as it is written, before anything is imported, and as what it turns out to be, since a module
reaches others through its attributes (`torch.nn.modules.torch.hub.load`). The whole tree is checked before
the first call.

Allowed from files: the public classes of `lightning.pytorch.callbacks`, `lightning.pytorch.loggers`,
`torch.optim`, `torch.optim.lr_scheduler` and `torch.nn`, and seqzoo's own classes of those kinds. Anything of
a package that the user names with `--allow my_pkg` or SEQZOO_ALLOW=my_pkg,other. For a mixer also the exact
name typed on the command line.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from .errors import UserError, nearest

if TYPE_CHECKING:
    from ..blocks.protocol import Mixer

# As written -> where the class must really live. One capital name after the module, nothing deeper.
_LIBRARIES = {
    "lightning.pytorch.callbacks": ("lightning.pytorch.callbacks",),
    "lightning.pytorch.loggers": ("lightning.pytorch.loggers",),
    "torch.optim": ("torch.optim",),
    "torch.optim.lr_scheduler": ("torch.optim.lr_scheduler",),
    "torch.nn": ("torch.nn.modules",),
}
_OWN = ("seqzoo.blocks", "seqzoo.zoo", "seqzoo.pipelines")
_NAME = re.compile(r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")
_KEYS = {"_target_", "_args_", "_partial_"}


def allowed_packages(allow: Sequence[str] = ()) -> tuple[str, ...]:
    """The packages that the user trusts: those of `allow` and of the variable SEQZOO_ALLOW (separated by
    commas).
    """
    names = [*allow, *os.environ.get("SEQZOO_ALLOW", "").split(",")]
    return tuple(dict.fromkeys(n.strip().rstrip(".") for n in names if n.strip().rstrip(".")))


def _inside(name: str, packages: Sequence[str]) -> bool:
    return any(name == p or name.startswith(f"{p}.") for p in packages)


def _refused(dotted: str, why: str) -> UserError:
    return UserError(
        f"_target_ {dotted!r} {why}; allowed are classes of {', '.join(_LIBRARIES)} and seqzoo, and of "
        "packages of your own that you name with --allow PACKAGE"
    )


def _check_text(dotted: Any, packages: Sequence[str]) -> None:
    """The name as it is written, before anything is imported. Raises UserError."""
    if not isinstance(dotted, str) or not _NAME.match(dotted):
        raise UserError(f"_target_ must be a dotted name such as my_module.MyClass, got {dotted!r}")
    if _inside(dotted, (*packages, "seqzoo")):
        return
    if dotted.rpartition(".")[0] not in _LIBRARIES:
        raise _refused(dotted, "is not on the list")


def _check_object(dotted: str, target: Any, packages: Sequence[str]) -> None:
    """What the name turned out to be: where it is defined, and of which kind. Raises UserError."""
    home = getattr(target, "__module__", None)
    real = f"{home}.{getattr(target, '__qualname__', type(target).__name__)}"
    if not callable(target) or not isinstance(home, str):
        raise UserError(f"_target_ {dotted!r} is a {type(target).__name__}, not a class")
    if _inside(home, packages):
        return
    module = dotted.rpartition(".")[0]
    homes = _LIBRARIES.get(module, ()) if not _inside(dotted, packages) else ()
    if not _inside(home, homes or _OWN):
        raise _refused(dotted, f"is really {real}, which is not on the list")
    if not inspect.isclass(target) or not issubclass(target, _kinds()):
        raise _refused(dotted, "is not a callback, logger, optimizer, scheduler or module class")


@functools.cache
def _kinds() -> tuple[type, ...]:
    from lightning.pytorch.callbacks import Callback
    from lightning.pytorch.loggers import Logger
    from torch.nn import Module
    from torch.optim import Optimizer
    from torch.optim.lr_scheduler import LRScheduler

    return Callback, Logger, Module, Optimizer, LRScheduler


@contextmanager
def working_folder_importable() -> Iterator[None]:
    """The folder where the command runs on sys.path (last, so that it hides nothing) while the user's code
    loads.
    """
    folder = os.getcwd()
    present = folder in sys.path
    if not present:
        sys.path.append(folder)
        importlib.invalidate_caches()
    try:
        yield
    finally:
        if not present and folder in sys.path:
            sys.path.remove(folder)


def _locate(dotted: str) -> Any:
    """Import what a dotted name stands for. Raises UserError when a module or attribute does not exist."""
    parts = dotted.split(".")
    for split in range(len(parts) - 1, 0, -1):
        module_name = ".".join(parts[:split])
        try:
            with working_folder_importable():
                found: Any = importlib.import_module(module_name)
        except ModuleNotFoundError as error:
            # Only "this very module is not there" lets us try its parent; a failing import inside it is the
            # news.
            if error.name is None or not (module_name == error.name or module_name.startswith(f"{error.name}.")):
                raise UserError(f"_target_ {dotted!r}: importing {module_name} failed: {error}") from error
            continue
        except Exception as error:
            message = f"_target_ {dotted!r}: importing {module_name} failed: {type(error).__name__}: {error}"
            raise UserError(message) from error
        for attribute in parts[split:]:
            if not hasattr(found, attribute):
                public = [n for n in dir(found) if not n.startswith("_")]
                raise UserError(f"_target_ {dotted!r}: {module_name} has no {attribute!r}.{nearest(attribute, public)}")
            found = getattr(found, attribute)
        return found
    raise UserError(f"_target_ {dotted!r}: no module {parts[0]!r} here or in the folder {os.getcwd()}")


def _check_tree(node: Any, packages: Sequence[str], path: str) -> None:
    """Every `_target_` in the tree, as text and as an object, and every reserved key. Raises UserError."""
    if isinstance(node, Mapping):
        if "_target_" in node:
            _check_text(node["_target_"], packages)
            _check_object(node["_target_"], _locate(node["_target_"]), packages)
        for key, value in node.items():
            if isinstance(key, str) and key.startswith("_") and key.endswith("_") and key not in _KEYS:
                raise UserError(f"{path}: the key {key!r} is not supported.{nearest(key, _KEYS)}")
            _check_tree(value, packages, f"{path}.{key}")
    elif isinstance(node, (list, tuple)):
        for i, value in enumerate(node):
            _check_tree(value, packages, f"{path}[{i}]")


def _build(node: Any) -> Any:
    """Children first, as Hydra does; the tree has been checked."""
    if isinstance(node, (list, tuple)):
        return [_build(value) for value in node]
    if not isinstance(node, Mapping):
        return node
    if "_target_" not in node:
        return {key: _build(value) for key, value in node.items()}
    dotted = node["_target_"]
    target = _locate(dotted)
    positional = [_build(value) for value in node.get("_args_", ())]
    options = {str(key): _build(value) for key, value in node.items() if key not in _KEYS}
    parameters = inspect.signature(target).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for key in options:
            if key not in parameters:
                raise UserError(f"{dotted} has no option {key!r}.{nearest(key, parameters)}")
    if node.get("_partial_", False):
        return functools.partial(target, *positional, **options)
    try:
        return target(*positional, **options)
    except UserError:
        raise
    except Exception as error:
        given = ", ".join(f"{k}={v!r}" for k, v in options.items())
        raise UserError(f"{dotted}({given}) failed: {type(error).__name__}: {error}") from error


def safe_instantiate(
    node: Mapping[str, Any], *, allow: Sequence[str] = (), expected: type | tuple[type, ...] | None = None
) -> Any:
    """Build the object that a config node describes: `{"_target_": "a.B", option: value, ...}`, nested as you
    like.

    node: a plain mapping; `_args_` holds positional arguments, `_partial_: true` gives a functools.partial.
    allow: packages trusted beside those of SEQZOO_ALLOW; never take them from a config file. expected: base
    class (or classes) of the result, checked before anything is called. Raises UserError for a name that is
    not allowed, does not exist, is not of the expected class or refuses its options.
    """
    if not isinstance(node, Mapping) or "_target_" not in node:
        keys = f"the keys {sorted(map(str, node))}" if isinstance(node, Mapping) else repr(node)
        raise UserError(f"a node to be built needs the key _target_, got {keys}")
    _check_tree(node, allowed_packages(allow), "node")
    if expected is not None:
        target = _locate(node["_target_"])
        if inspect.isclass(target) and not issubclass(target, expected):
            raise UserError(f"_target_ {node['_target_']!r} is not a {_class_names(expected)}")
    built = _build(node)
    if expected is not None and not node.get("_partial_", False) and not isinstance(built, expected):
        raise UserError(f"_target_ {node['_target_']!r} made a {type(built).__name__}, not a {_class_names(expected)}")
    return built


def _class_names(expected: type | tuple[type, ...]) -> str:
    return " or ".join(c.__name__ for c in (expected if isinstance(expected, tuple) else (expected,)))


def resolve_mixer_target(
    dotted: str, allow: Sequence[str] = (), command_line_targets: Sequence[str] = ()
) -> type[Mixer]:
    """The `Mixer` subclass that `mixer._target_` names.

    The name must have been typed on the command line (`command_line_targets`), or belong to seqzoo or to an
    allowed package; then it is imported, with the folder where the command runs on sys.path. Raises UserError
    otherwise, and for anything that is not a subclass of `seqzoo.Mixer`.
    """
    from ..blocks.protocol import Mixer

    packages = allowed_packages(allow)
    typed = dotted in command_line_targets
    if not isinstance(dotted, str) or not _NAME.match(dotted):
        raise UserError(f"mixer._target_ must be a dotted name such as my_module.MyMixer, got {dotted!r}")
    if not (typed or _inside(dotted, (*packages, "seqzoo"))):
        raise UserError(
            f"mixer._target_ {dotted!r} comes from a file: type mixer._target_={dotted} on the command line, "
            f"or trust its package with --allow {dotted.split('.')[0]}"
        )
    target = _locate(dotted)
    if not inspect.isclass(target) or not issubclass(target, Mixer):
        raise UserError(f"mixer._target_ {dotted!r} is not a subclass of seqzoo.Mixer")
    if not typed and not _inside(target.__module__, (*packages, *_OWN)):
        raise UserError(
            f"mixer._target_ {dotted!r} is really {target.__module__}.{target.__qualname__}: name that, "
            f"or trust its package with --allow {target.__module__.split('.')[0]}"
        )
    return target
