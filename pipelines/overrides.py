"""What was typed after `lightning fit`, as text: our own flags, Hydra's flags, and the overrides."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .errors import UserError, nearest

_OVERRIDE = re.compile(r"^(?P<prefix>\+\+|\+|~)?(?P<key>[^=@~+]+)(?:@[^=]*)?(?:=(?P<value>.*))?$", re.DOTALL)
_TAKES_VALUE = {"--cfg": "--cfg", "-c": "--cfg", "--package": "--package", "-p": "--package"}
_PLAIN = {
    "--multirun",
    "-m",
    "--resolve",
    "--run",
    "-r",
    "--info",
    "-i",
    "--shell-completion",
    "-sc",
    "--hydra-help",
}
_TEXTS = {"task.prompt", "query"}  # values that are read as they stand
_ADDED = {"model.pretrained", "model.frozen", "model.lora"}  # keys of every model that no YAML file has
_OURS = {"--config-dir", "-cd", "--allow", "--help", "-h"}


@dataclass(frozen=True)
class Request:
    """One command line: the command, its overrides, Hydra's flags, extra config folders, allowed packages."""

    command: str
    overrides: list[str] = field(default_factory=list)
    flags: list[str] = field(default_factory=list)
    config_dirs: list[str] = field(default_factory=list)
    allow: list[str] = field(default_factory=list)
    help: bool = False

    @property
    def sweep(self) -> bool:
        return "-m" in self.flags or "--multirun" in self.flags


def split_override(text: str) -> tuple[str, str, str | None]:
    """(prefix, key, value) of an override: ("++", "a.b", "3"); ("", text, None) where it is none."""
    match = _OVERRIDE.match(text)
    if match is None:
        return "", text, None
    return match["prefix"] or "", match["key"].strip(), match["value"]


def quote(value: str) -> str:
    """A value in single quotes, as Hydra's override grammar reads it back."""
    return "'" + re.sub(r"(\\+)$", r"\1\1", value.replace("'", "\\'")) + "'"


def _as_text(word: str) -> str:
    """A prompt may hold whatever Hydra's grammar gives a meaning: brackets, commas, equal signs."""
    prefix, key, value = split_override(word)
    if key not in _TEXTS or not value or value[0] in "'\"[$" or value == "null":
        return word
    return f"{prefix}{key}={quote(value)}"


def parse_arguments(command: str, arguments: Sequence[str]) -> Request:
    """Sort the words of a command line. Raises UserError for an unknown flag or one without its value."""
    overrides: list[str] = []
    flags: list[str] = []
    config_dirs: list[str] = []
    allow: list[str] = []
    wants_help = False
    rest = list(arguments)
    while rest:
        word = rest.pop(0)
        if not word.startswith("-"):
            prefix, key, _ = split_override(word)
            overrides.append(f"++{word}" if key in _ADDED and not prefix else _as_text(word))
            continue
        name, equals, value = word.partition("=")
        if name in _PLAIN:
            flags.append(name)
        elif name in ("--help", "-h"):
            wants_help = True
        elif name in _TAKES_VALUE or name in _OURS:
            if not equals:
                if not rest:
                    raise UserError(f"{name} needs a value")
                value = rest.pop(0)
            if name == "--allow":
                allow.append(value)
            elif name in ("--config-dir", "-cd"):
                if not Path(value).is_dir():
                    raise UserError(f"--config-dir {value}: no such folder")
                config_dirs.append(os.path.abspath(value))
            else:
                flags += [_TAKES_VALUE[name], value]
        else:
            known = {*_PLAIN, *_TAKES_VALUE, *_OURS}
            raise UserError(f"unknown flag {name}.{nearest(name, {k for k in known if k.startswith('--')})}")
    if config_dirs and any(split_override(o)[1] == "hydra.searchpath" for o in overrides):
        raise UserError("give either --config-dir or hydra.searchpath, not both")
    # A folder ./conf of the user's is looked at as well; in a checkout it is the package's own.
    local = Path.cwd() / "conf"
    if local.is_dir() and not (local / "__init__.py").exists() and str(local) not in config_dirs:
        config_dirs.append(str(local))
    return Request(command, overrides, flags, config_dirs, allow, wants_help)


def complete_mixer(overrides: Sequence[str]) -> list[str]:
    """Make `mixer._target_=my_module.MyMixer mixer.rank=3` what Hydra needs for a mixer that has no YAML
    file.

    `mixer=custom` is inserted where no `mixer=` was chosen, and options of a custom mixer are added
    (`++mixer.rank=3`), since only the mixer itself knows which ones it has. Raises UserError when a
    registered mixer is chosen as well.
    """
    parts = [split_override(o) for o in overrides]
    target = any(key == "mixer._target_" for _, key, _ in parts)
    choices = [value for _, key, value in parts if key == "mixer"]
    if not target and "custom" not in choices:
        return list(overrides)
    others = [c for c in choices if c != "custom"]
    if others:
        if not target:  # a sweep over several mixers, say
            return list(overrides)
        raise UserError(
            f"mixer._target_ names a mixer of your own, mixer={others[0]} a registered one: give one of them"
        )
    done = [] if choices else ["mixer=custom"]
    for text, (prefix, key, _) in zip(overrides, parts, strict=True):
        option = key.startswith("mixer.") and key != "mixer._target_"
        done.append(f"++{text}" if option and not prefix else text)
    return done


def command_line_targets(overrides: Sequence[str]) -> list[str]:
    """The dotted names that the user typed as values of `..._target_=` overrides."""
    targets = []
    for text in overrides:
        _, key, value = split_override(text)
        if value is not None and key.split(".")[-1] == "_target_":
            targets.append(value.strip().strip("'\""))
    return targets
