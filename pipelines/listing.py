"""`lightning mixers` and `lightning models`: the registries as tables or JSON."""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any


def _value(value: Any) -> Any:
    """A default as JSON can hold it."""
    if isinstance(value, (list, tuple)):
        return [_value(v) for v in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Option -> default; an option that must be given has none."""
    return {k: "required" if v is inspect.Parameter.empty else _value(v) for k, v in options.items()}


def mixer_rows() -> list[dict[str, Any]]:
    """One row per registered mixer; `options` holds the constructor's options and their defaults."""
    from ..blocks.registry import list_mixers, mixer_info

    rows = []
    for name in list_mixers():
        info = mixer_info(name)
        rows.append(
            {
                "name": name,
                "class": info.cls.__name__,
                "paper": info.paper,
                "origin": info.origin,
                "patterns": list(info.patterns),
                "streaming": info.streaming,
                "options": _options(info.options),
            }
        )
    return rows


def model_rows() -> list[dict[str, Any]]:
    """One row per registered model: name, task, tags of its weights, paper, summary, options with defaults."""
    from ..zoo import list_models, model_info

    # What the data decide is not for the user to choose.
    given = {"seq_len", "pred_len", "in_channels", "out_channels", "loss", "quantiles"}
    rows = []
    for name in list_models():
        info = model_info(name)
        options = {k: v for k, v in info.options.items() if k not in given and not k.startswith("num_")}
        if "num_heads" in info.options:
            options["num_heads"] = info.options["num_heads"]
        rows.append(
            {
                "name": name,
                "task": info.task,
                "paper": info.paper,
                "mixer": "any" if "mixer" in info.options else "its own",
                "pretrained": info.tags,
                "summary": info.summary,
                "options": _options(options),
            }
        )
    return rows


def _cell(value: Any) -> Any:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return ", ".join(map(str, value)) if isinstance(value, list) else value


def _option_lines(row: Mapping[str, Any], width: int) -> str:
    """The options of one row as `name: a=1, b=2`, wrapped under each other."""
    pairs = [f"{k}={json.dumps(v) if v is None or isinstance(v, bool) else v}" for k, v in row["options"].items()]
    indent = " " * (len(row["name"]) + 2)
    text = f"{row['name']}: {', '.join(pairs) or 'none'}"
    return textwrap.fill(text, width, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)


def print_rows(rows: Sequence[Mapping[str, Any]], title: str, *, as_json: bool) -> None:
    """As JSON, or as a table with the options below it."""
    if as_json:
        json.dump(list(rows), sys.stdout, indent=2)
        print()
        return
    from .results import print_table

    print_table([{k: _cell(v) for k, v in row.items() if k != "options"} for row in rows], title=title)
    width = min(shutil.get_terminal_size((110, 24)).columns, 140)
    print("\noptions and their defaults\n")
    for row in rows:
        print(_option_lines(row, width))
