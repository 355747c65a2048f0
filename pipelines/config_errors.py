"""Hydra's and OmegaConf's errors as one line with the nearest valid names."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from .config_files import list_groups
from .errors import nearest, one_line
from .overrides import split_override

_MERGING = "Error merging override "
_COULD_NOT = re.compile(r"Could not override '([^']+)'")
_ADD = " (use +{key}={value} to add a new one)"


def _base_config(overrides: Sequence[str], config_dirs: Sequence[str]) -> dict[str, Any]:
    """The config with the command line's group choices and none of its values; {} where even that fails."""
    from hydra import compose, initialize_config_module
    from hydra.core.global_hydra import GlobalHydra
    from omegaconf import OmegaConf

    groups = list_groups(config_dirs)
    chosen = [o for o in overrides if split_override(o)[1] in groups or split_override(o)[1] == "hydra.searchpath"]
    GlobalHydra.instance().clear()
    for attempt in (chosen, []):
        try:
            with initialize_config_module("seqzoo.conf", version_base="1.3"):
                cfg = compose("config", overrides=attempt)
            return dict(OmegaConf.to_container(cfg, resolve=False))  # type: ignore[arg-type]
        except Exception:  # this only feeds a hint; the error itself is already at hand
            continue
    return {}


def unknown_key(key: str, value: str, cfg: Mapping[str, Any], groups: Mapping[str, Sequence[str]]) -> str:
    """The line for a key that the config does not have, with the nearest ones of the same section."""
    node: Any = cfg
    parents: list[str] = []
    for part in key.split("."):
        if not isinstance(node, Mapping) or part not in node:
            break
        node = node[part]
        parents.append(part)
    section = ".".join(parents)
    if isinstance(node, Mapping):
        known = {f"{section}.{k}" if section else str(k) for k in node}
        if not section:
            known |= set(groups)
        hint = nearest(key, known, number=3)
    else:
        hint = f" {section} is a value, not a section."
    return f"unknown key {key!r}.{hint}{_ADD.format(key=key, value=value)}"


def _unknown_option(missing: str, groups: Mapping[str, Sequence[str]]) -> str:
    group, _, option = missing.partition("/")
    if group not in groups:
        return f"no config group {group!r}.{nearest(group, groups)}"
    return f"no option {option!r} in the group {group!r} ({group}={option}).{nearest(option, groups[group])}"


def _merging(word: str, cause: BaseException | None) -> str:
    """The line for a value of another kind than its default, which Hydra would have merged with it."""
    prefix, key, value = split_override(word)
    text = str(cause or "")
    mixed = "Cannot merge DictConfig with ListConfig" in text  # whichever of them is the default
    if mixed and "object_type=list" in text:
        return (
            f"the default of {key} is a list, a mapping cannot be merged over it: give a list, "
            f'"{prefix}{key}=[{value}]"'
        )
    if mixed:
        return (
            f'the default of {key} is a section, a list cannot take its place: give its keys, "{key}={{name: value}}"'
        )
    reason = one_line(text.splitlines()[0]) if text else "it does not fit the default"
    return f"cannot take {word!r}: {reason}"


def explain(error: BaseException, overrides: Sequence[str], config_dirs: Sequence[str]) -> str:
    """One line: the cause, the value, the nearest valid choices."""
    from hydra.errors import MissingConfigException, OverrideParseException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError

    groups = list_groups(config_dirs)
    text = str(error)
    if isinstance(error, OverrideParseException):
        word = error.override
        if "=" not in word:
            names = [*groups, *_base_config([], config_dirs)]
            return f"{word!r} is not of the form key=value.{nearest(word, names)}"
        cause = one_line(text.splitlines()[0])
        return f"cannot read {word!r}: {cause}; put values with special signs in quotes: \"key='a, b'\""
    if isinstance(error, MissingConfigException) and error.missing_cfg_file:
        return _unknown_option(re.sub(r"\.yaml$", "", str(error.missing_cfg_file)), groups)
    if "Config group override" in text:
        for _, key, value in map(split_override, overrides):
            if key in groups and value not in groups[key]:
                return _unknown_option(f"{key}/{value}", groups)
    if text.startswith(_MERGING):
        return _merging(text.removeprefix(_MERGING), error.__cause__)
    found = _COULD_NOT.search(text)
    if found:
        key = found[1].split("@")[0]
        values = {k: v for _, k, v in map(split_override, overrides)}
        cfg = _base_config(overrides, config_dirs)
        if key in groups:
            return f"the group {key!r} is not in the defaults list; use +{key}={values.get(key)}"
        if isinstance(error.__cause__, (ConfigAttributeError, ConfigKeyError)) or key not in cfg:
            return unknown_key(key, values.get(key) or "value", cfg, groups)
    if isinstance(error, (ConfigAttributeError, ConfigKeyError)) and error.full_key:
        cfg = _base_config(overrides, config_dirs)
        return f"{unknown_key(str(error.full_key), 'value', cfg, groups)}, in a config file"
    return one_line(text)
