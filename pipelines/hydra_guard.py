"""What a config file may say in Hydra's own section: nothing that makes Hydra call, import or trust something.

Hydra builds `hydra.callbacks`, the launcher and the sweeper from their `_target_`, gives `hydra.job_logging` to
`logging.config.dictConfig`, which calls what stands under `()` and `class`, and sets the environment of a job
(`hydra.job.env_set`, SEQZOO_ALLOW among it) before `safe_instantiate` is ever asked. So every config that Hydra
composes, also those of a sweep's jobs, is looked at here first. What the user types on the command line is the user's
own.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from .errors import UserError
from .instantiate import allowed_packages
from .overrides import command_line_targets, split_override

_PLUGINS = ("hydra_plugins.", "hydra._internal.core_plugins.")
# Of Optuna's sweeper: its sampler stands beside it as a target of its own.
_BESIDE = {"callbacks": ("hydra.experimental.callbacks.",), "sweeper": (*_PLUGINS, "optuna.samplers.")}
_LOGGING = {
    "logging.StreamHandler",
    "logging.FileHandler",
    "logging.NullHandler",
    "logging.Formatter",
    "logging.handlers.RotatingFileHandler",
    "logging.handlers.TimedRotatingFileHandler",
    "colorlog.ColoredFormatter",
}
_STREAMS = {"ext://sys.stdout", "ext://sys.stderr"}
_OF_HYDRA = re.compile(r"\$\{(hydra[.:]|now:)[\w.:%-]*\}")
# Texts that nothing is called with; they may hold any ${...}.
_PLAIN_KEYS = ("filename", "level", "format", "datefmt")


@contextmanager
def guarded_composing(overrides: Sequence[str]) -> Iterator[None]:
    """While it lasts, a config that Hydra composes and that says too much is a UserError. overrides: as typed."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl

    whole = ConfigLoaderImpl.load_configuration

    @functools.wraps(whole)
    def load_configuration(self: Any, *arguments: Any, **options: Any) -> Any:
        cfg = whole(self, *arguments, **options)
        check_hydra_section(cfg, overrides)
        return cfg

    ConfigLoaderImpl.load_configuration = load_configuration  # type: ignore[method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = whole  # type: ignore[method-assign]


def check_hydra_section(cfg: Any, overrides: Sequence[str]) -> None:
    """Raise UserError for what would run or trust something that neither Hydra nor the user has named.

    cfg: a composed config with its section `hydra`. overrides: the words of the command line.
    """
    from omegaconf import OmegaConf

    if cfg.get("hydra") is None:
        return
    # As written: a ${...} that is not resolved here could still be anything later.
    section: Any = OmegaConf.to_container(cfg.hydra, resolve=False)
    packages = tuple(f"{package}." for package in allowed_packages())
    typed = command_line_targets(overrides)
    for name in ("callbacks", "launcher", "sweeper"):
        _check_targets(section.get(name), f"hydra.{name}", (*_BESIDE.get(name, _PLUGINS), *packages), typed)
    for key in _params(section.get("sweeper")):
        if key.split(".")[-1] == "_target_" or re.match(r"[+~]*hydra\b", key):
            raise UserError(f"hydra.sweeper.params has {key!r}, from a file: give it on the command line")
    for name in ("job_logging", "hydra_logging"):
        _check_logging(section.get(name), f"hydra.{name}", "")
    _check_environment(section.get("job"), overrides)


def _params(sweeper: Any) -> list[str]:
    found = sweeper.get("params") if isinstance(sweeper, Mapping) else None
    return [str(key) for key in found] if isinstance(found, Mapping) else []


def _check_targets(node: Any, where: str, known: tuple[str, ...], typed: Sequence[str]) -> None:
    if isinstance(node, Mapping):
        target = node.get("_target_")
        if target is not None and not (
            isinstance(target, str) and (target in typed or (target.startswith(known) and "${" not in target))
        ):
            raise UserError(
                f"{where}._target_={target!r} comes from a file: type it on the command line, or trust its package "
                "with --allow PACKAGE"
            )
        for key, value in node.items():
            _check_targets(value, f"{where}.{key}", known, typed)
    elif isinstance(node, (list, tuple)):
        for number, value in enumerate(node):
            _check_targets(value, f"{where}[{number}]", known, typed)
    elif isinstance(node, str) and "${" in _OF_HYDRA.sub("", node):
        raise UserError(f"{where}={node!r}: in Hydra's own section only ${{hydra...}} can stand for a value")


def _check_logging(node: Any, where: str, key: str) -> None:
    if isinstance(node, Mapping):
        for inner, value in node.items():
            if inner in ("()", "class", "factory") and value not in _LOGGING:
                raise UserError(f"{where}.{inner}={value!r} would be called; known are {', '.join(sorted(_LOGGING))}")
            _check_logging(value, f"{where}.{inner}", str(inner))
    elif isinstance(node, (list, tuple)):
        for number, value in enumerate(node):
            _check_logging(value, f"{where}[{number}]", "")
    elif isinstance(node, str):
        if "://" in node and node not in _STREAMS:
            raise UserError(f"{where}={node!r} names an object; known are {', '.join(sorted(_STREAMS))}")
        if key not in _PLAIN_KEYS and "${" in _OF_HYDRA.sub("", node):
            raise UserError(f"{where}={node!r}: in Hydra's own section only ${{hydra...}} can stand for a value")


def _check_environment(job: Any, overrides: Sequence[str]) -> None:
    names = job.get("env_set") if isinstance(job, Mapping) else None
    if not names:
        return
    given = {key: value or "" for _, key, value in map(split_override, overrides)}
    for name in names if isinstance(names, Mapping) else [names]:
        if f"hydra.job.env_set.{name}" not in given and str(name) not in given.get("hydra.job.env_set", ""):
            raise UserError(
                f"hydra.job.env_set.{name} comes from a file, which sets no variables of the environment: type "
                f"hydra.job.env_set.{name}=... on the command line, or export it"
            )
