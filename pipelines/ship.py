"""`lightning ship`: from a run folder of `lightning fit` to weights that ship, their record and their card.

Reads the run's `model/` folder, the table of its test (`test.csv`, forecasts `test.json`), the command line in
`config.yaml` and `environment.json`; writes `zoo/weights/<model>.<tag>/` and `model_cards/<model>.<tag>.md`.
"""

from __future__ import annotations

import csv
import importlib.resources
import json
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..zoo._weights import LOWER_IS_BETTER
from .errors import UserError, nearest

USAGE = """usage: lightning ship RUN MODEL.TAG license=SPDX data="WHAT" purpose="FOR WHAT" limits="NOT A; NOT B"
                [data_license=SPDX] [metric=COLUMN] [beats="BASELINE; ..."] [dtype=auto|float32|bfloat16] [default=true]
                [usage=FILE.py] [command="..."] [weights=FOLDER] [cards=FOLDER]
       makes the model of a run folder part of the package: its weights, at most 8 MiB, the record and the card.
       metric decides, the first of the table by default; the model must be better than every row below it, or than
       those that beats names. usage: lines after `model = ...` for the card; command: where config.yaml has none"""
MAX_BYTES = 8 << 20
_OPTIONS = {
    **dict.fromkeys(("license", "data", "purpose", "limits")),
    **dict.fromkeys(("data_license", "metric", "beats", "usage", "command", "weights", "cards"), ""),
    "dtype": "auto",
    "default": "false",
}
# Where a run lies and how it looks does not belong to what made the weights.
_OF_THE_RUN = re.compile(r"(paths|hydra|callbacks|logger|debug)\.|ckpt_path=|name=")


def main(arguments: Sequence[str]) -> int:
    """Run the command with its words after `ship`; returns the exit status."""
    if not arguments or {"--help", "-h"} & set(arguments):
        print(USAGE)
        return 0
    if len(arguments) < 2 or "=" in arguments[1]:
        raise UserError("lightning ship needs a run folder and MODEL.TAG; see lightning ship --help")
    given: dict[str, Any] = dict(_OPTIONS)
    for argument in arguments[2:]:
        key, equals, value = argument.partition("=")
        if not equals or key not in given:
            raise UserError(f"lightning ship has no option {argument!r}.{nearest(key, given)}")
        given[key] = value
    missing = [key for key, value in given.items() if not value and _OPTIONS[key] is None]
    if missing:
        raise UserError(f"lightning ship needs {' and '.join(f'{key}=...' for key in missing)}")
    given["default"] = given["default"].lower() == "true"
    folder = ship(Path(arguments[0]), arguments[1], **given)
    size = (folder / "model.safetensors").stat().st_size
    print(f"{folder}: {size:,} bytes; its card stands in model_cards/, python docs/tables.py writes it anew")
    return 0


def ship(
    run: Path,
    name: str,
    *,
    license: str,
    data: str,
    purpose: str,
    limits: str,
    data_license: str = "",
    metric: str = "",
    beats: str = "",
    usage: str = "",
    command: str = "",
    dtype: str = "auto",
    default: bool = False,
    weights: Path | str = "",
    cards: Path | str = "",
) -> Path:
    """The work of the command; its options are those of `USAGE`. Returns the folder of the weights. Raises UserError
    for a run that lacks something, for weights that are too large and for a model that its baselines beat."""
    from ..zoo import load_model, read_config, save_model
    from ..zoo._cards import model_card
    from ..zoo._weights import TAG, weights_folder
    from .atomic import atomic_write_text

    model_name, _, tag = name.partition(".")
    if not TAG.fullmatch(tag):
        raise UserError(f"{name!r} must be MODEL.TAG, the tag of small letters, digits and _")
    if not (run / "model" / "config.json").is_file():
        raise UserError(f"{run} has no model/: it is no run folder of lightning fit, or its model was not exported")
    config = read_config(run / "model")
    if config["name"] != model_name:
        raise UserError(f"{run} trained {config['name']!r}, not {model_name!r}")
    rows = read_results(run)
    metric = metric or next((k for k, v in rows[0].items() if isinstance(v, (int, float))), "")
    rows = own_first(rows, model_name, metric)
    check_better(rows, model_name, metric, [word.strip() for word in beats.split(";") if word.strip()])
    command = command or read_command(run)
    model: Any = load_model(run / "model")
    record = {
        "tag": tag,
        "license": license,
        "data": data,
        "data_license": data_license,
        "command": command,
        "results": rows,
        "metric": metric,
        "purpose": purpose,
        "limits": [limit.strip() for limit in limits.split(";") if limit.strip()],
        "usage": Path(usage).read_text(encoding="utf-8").strip() if usage else "",
        "default": default,
        "input": model.input_spec,
        "environment": read_environment(run),
    }
    refuse_paths({"options": config["options"], "preprocessing": config["preprocessing"], "record": record})
    home = Path(weights) if weights else weights_folder()
    chosen = _dtype(model, dtype)
    folder = save_model(model, home / name, dtype=chosen, record=record)
    (folder / "README.md").unlink()  # the card stands in model_cards
    place = Path(cards) if cards else Path(str(importlib.resources.files("seqzoo.model_cards")))
    atomic_write_text(place / f"{name}.md", model_card(read_config(folder), name, shipped=True))
    return folder


def read_results(run: Path) -> list[dict[str, Any]]:
    """The rows of the run's test, the model's first. Raises UserError for a run without one."""
    path = run / "test.json"
    if path.is_file():
        content = json.loads(path.read_text(encoding="utf-8")).get("test", {})
        if content and all(isinstance(v, dict) and "scaled" in v for v in content.values()):
            from .forecasting.report import score_rows

            return [dict(row) for row in score_rows(content)]
    path = run / "test.csv"
    if path.is_file():
        with path.open(encoding="utf-8", newline="") as file:
            rows = [{k: _number(v) for k, v in row.items() if k} for row in csv.DictReader(file)]
        if rows and "method" in rows[0]:
            return rows
    raise UserError(f"{run} has no table of a test beside its baselines (test.csv or test.json): lightning test ...")


def _number(text: str | None) -> Any:
    if not text:
        return None
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if number.is_integer() and "." not in text and "e" not in text else number


def own_first(rows: Sequence[Mapping[str, Any]], model: str, metric: str) -> list[dict[str, Any]]:
    """The rows with the model's best first: a test may have several of it (texts read row by row, or carried on), which
    begin with its name."""
    own = [dict(row) for row in rows if re.match(rf"{re.escape(model)}\b", str(row.get("method", "")))] or [
        dict(rows[0])
    ]
    others = [dict(row) for row in rows if dict(row) not in own]
    if metric in own[0]:
        own.sort(key=lambda row: row[metric] if LOWER_IS_BETTER.search(metric) else -row[metric])
    return own + others


def check_better(rows: Sequence[Mapping[str, Any]], model: str, metric: str, beats: Sequence[str]) -> None:
    """The first row must be better by `metric` than those of others, or than those that `beats` names. Raises UserError
    where it is not, with both numbers."""
    columns = [k for k, v in rows[0].items() if isinstance(v, (int, float))]
    if metric not in columns:
        raise UserError(f"metric={metric!r} is no column of numbers of the table.{nearest(metric, columns)}")
    others = {
        str(row["method"]): row[metric]
        for row in rows[1:]
        if row.get(metric) is not None and not re.match(rf"{re.escape(model)}\b", str(row["method"]))
    }
    for word in beats:
        if word not in others:
            raise UserError(f"beats={word!r} is no row of the table.{nearest(word, others)}")
    if not others:
        raise UserError(f"the table has no baseline with {metric!r} to be better than")
    best, lower = rows[0][metric], LOWER_IS_BETTER.search(metric) is not None
    for method, value in others.items():
        if (not beats or method in beats) and not (best < value if lower else best > value):
            raise UserError(f"the model's {metric} is {best:.6g}, no better than {value:.6g} of {method}: not shipped")


def read_command(run: Path) -> str:
    """`lightning fit ...` as the first line of config.yaml has it, without what only says where the run lies. Raises
    UserError where there is none, or where it resumed another run."""
    path = run / "config.yaml"
    first = path.read_text(encoding="utf-8").split("\n", 1)[0] if path.is_file() else ""
    found = re.match(r"# (?:seqzoo|lightning) fit ?(.*)", first)
    if found is None:
        raise UserError(f"{path} does not say which command made the run: give command='lightning fit ...'")
    # Not split as a shell does: a value of braces stands there as it was typed, without its quotes.
    words, depth, word = [], 0, ""
    for letter in f"{found[1]} ":
        depth += (letter in "[{(") - (letter in "]})")
        if letter == " " and depth == 0 and word:
            words.append(word)
            word = ""
        elif letter != " " or depth:
            word += letter
    if any(word.startswith("ckpt_path=") for word in words):
        raise UserError(f"{run} resumed another run (ckpt_path): give command='...' with how both were made")
    kept = [word for word in words if not _OF_THE_RUN.match(word)]
    return " ".join(["lightning fit", *(shlex.quote(word) for word in kept)])


def read_environment(run: Path) -> dict[str, Any]:
    """Versions that made the run."""
    path = run / "environment.json"
    if not path.is_file():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    versions = content.get("versions", {})
    return {key: versions.get(key, content.get(key)) for key in ("seqzoo", "torch", "python")}


def refuse_paths(value: Any, where: str = "") -> None:
    """Raise UserError for a value that names a place on this machine."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            refuse_paths(inner, f"{where}.{key}".lstrip("."))
    elif isinstance(value, (list, tuple)):
        for i, inner in enumerate(value):
            refuse_paths(inner, f"{where}[{i}]")
    elif isinstance(value, str) and re.search(r"(^|[\s='\"])(/|~/|[A-Za-z]:\\)\w", value):
        raise UserError(f"{where} names a place on this machine, {value!r}: it does not belong into the package")


def _dtype(model: Any, dtype: str) -> str:
    """float32 where that is small enough, else bfloat16. Raises UserError for more than 8 MiB."""
    state = model.state_dict().values()
    sizes = {
        "float32": sum(v.numel() * v.element_size() for v in state),
        "bfloat16": sum(v.numel() * (2 if v.is_floating_point() else v.element_size()) for v in state),
    }
    if dtype not in ("auto", *sizes):
        raise UserError(f"dtype={dtype!r} is not a choice.{nearest(dtype, ['auto', *sizes])}")
    chosen = dtype if dtype != "auto" else "float32" if sizes["float32"] < MAX_BYTES * 0.98 else "bfloat16"
    if sizes[chosen] > MAX_BYTES:
        raise UserError(
            f"the weights have {sizes[chosen]:,} bytes in {chosen}, more than the {MAX_BYTES:,} of one file"
        )
    return chosen
