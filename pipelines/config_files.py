"""The YAML files of the config groups, read as text: options, keys and the comments beside them.

Nothing here imports Hydra, torch or a YAML library, so that `lightning fit --help` answers at once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import NamedTuple

# "key: value  # comment"; a '#' only opens a comment at the start or after a blank, as in YAML.
_LINE = re.compile(
    r"^(?P<indent> *)(?P<key>[A-Za-z_][\w.]*):"
    r"(?: +(?P<value>[^#\s](?:[^#]|(?<!\s)#)*?))?(?:\s+#\s*(?P<doc>.*))?$"
)
_HIDDEN = {"hydra"}


class Key(NamedTuple):
    """One `key: value  # doc` line; `name` is dotted from the top of the file."""

    name: str
    value: str
    doc: str


def config_roots(config_dirs: Sequence[str | Path] = ()) -> list[Path]:
    """The folders where configs are looked for: the package's own first, then the user's."""
    return [Path(str(files("seqzoo.conf"))), *(Path(d) for d in config_dirs)]


def list_groups(config_dirs: Sequence[str | Path] = ()) -> dict[str, list[str]]:
    """Option names by group: {"mixer": ["linear", ...], "experiment": ["forecasting/weather", ...]}."""
    groups: dict[str, set[str]] = {}
    for root in config_roots(config_dirs):
        for path in sorted(root.glob("*/**/*.yaml")):
            group, *rest = path.relative_to(root).with_suffix("").parts
            if group not in _HIDDEN and not group.startswith("."):
                groups.setdefault(group, set()).add("/".join(rest))
    return {group: sorted(options) for group, options in sorted(groups.items())}


def find_option(group: str, option: str, config_dirs: Sequence[str | Path] = ()) -> Path | None:
    """The file of `group=option`, or None. An empty group looks at the top, for `config` itself."""
    for root in config_roots(config_dirs):
        path = root / group / f"{option}.yaml"
        if path.is_file():
            return path
    return None


def read_keys(path: Path) -> list[Key]:
    """The keys of one file in order, without its defaults list; a key that opens a section has no value."""
    keys: list[Key] = []
    parents: list[tuple[int, str]] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        match = _LINE.match(line.rstrip())
        if match is None:
            continue
        indent = len(match["indent"])
        while parents and parents[-1][0] >= indent:
            parents.pop()
        name = ".".join([*(p for _, p in parents), match["key"]])
        parents.append((indent, match["key"]))
        if name.split(".")[0] not in ("defaults", "hydra"):
            keys.append(Key(name, (match["value"] or "").strip(), (match["doc"] or "").strip()))
    return keys


def read_title(path: Path) -> str:
    """The first comment line of a file that is not Hydra's package line."""
    for line in path.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        if "@package" not in line:
            return line.lstrip("# ").rstrip()
    return ""


def default_options(config_dirs: Sequence[str | Path] = ()) -> dict[str, str]:
    """What config.yaml's defaults list takes for each group ("null" where it takes none)."""
    path = find_option("", "config", config_dirs)
    chosen: dict[str, str] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path else []:
        match = re.match(r"^\s+- (?:optional )?(\w+): ([\w/]+)", line)
        if match:
            chosen[match[1]] = match[2]
    return chosen
