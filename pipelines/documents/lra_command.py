"""`lightning lra`: the accuracies of our finished runs on Long Range Arena, and, in a table of their own, the published
ones."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from ..results import print_table
from .lra.published import FAIL, MAJORITY, PUBLISHED, TASKS, TITLES

USAGE = """usage: lightning lra [runs=runs] [published=true]
       prints the test accuracies of the runs under a folder, each with its settings, and below them the published
       rows of Long Range Arena; published=false leaves those out"""
_DEFAULTS = {"runs": "runs", "published": "true"}
_SOURCES = ("listops", "lra_text", "lra_retrieval", "lra_image", "pathfinder", "citations")


def main(arguments: Sequence[str]) -> int:
    """Run the command with its words after `lra`; returns the exit status."""
    if {"--help", "-h"} & set(arguments):
        print(USAGE)
        return 0
    given = dict(_DEFAULTS)
    for argument in arguments:
        key, equals, value = argument.partition("=")
        if not equals or key not in given:
            raise UserError(f"lightning lra has no option {argument!r}.{nearest(key, given)}")
        given[key] = value
    if given["published"] not in ("true", "false"):
        raise UserError(f"published={given['published']} must be true or false")
    root = Path(given["runs"]).expanduser()
    if not root.is_dir():
        raise UserError(f"runs={root} is no folder; the runs of lightning fit are under paths.runs, here runs")
    ours = run_rows(root)
    if ours:
        print_table(ours, title="ours: test accuracy in per cent, each run with its own budget")
    else:
        print(f"no finished run of Long Range Arena under {root}: lightning fit experiment=lra/listops_transformer")
    if given["published"] == "true":
        print_table(
            published_rows(),
            title="published, in per cent, with their authors' budgets: not comparable with a shorter run",
        )
        print("\n* quoted second hand, not read from its authors' own table.  ~ at the level of the majority label.")
    return 0


def run_rows(root: Path) -> list[dict[str, Any]]:
    """One row per run with test scores below a folder, by task and accuracy: what it was, how long it trained."""
    rows = []
    for file in sorted(root.glob("**/metrics.json")):
        row = _run_row(file.parent)
        if row is not None:
            rows.append({**row, "run": file.parent.relative_to(root).as_posix()})
    return sorted(rows, key=lambda row: (row["task"], -row["accuracy"]))


def _run_row(folder: Path) -> dict[str, Any] | None:
    """The row of one run folder; None where it is of another task, untested, or unreadable."""
    import yaml

    from ..nets import mixer_name

    try:
        cfg = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        test = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError):
        return None
    if not isinstance(cfg, Mapping) or cfg.get("data", {}).get("source") not in _SOURCES or "test" not in test:
        return None
    model, data = cfg["model"], cfg["data"]
    return {
        "task": test.get("title") or data["source"],
        "model": model["name"],
        "mixer": mixer_name(model),
        "dim x depth": f"{model['dim']} x {model['depth']}",
        "parameters": test.get("parameters"),
        "documents": test.get("train_documents"),
        "steps": metrics.get("steps"),
        "batch": data["batch_size"],
        "seed": cfg.get("seed"),
        "accuracy": 100 * test["test"]["accuracy"],
        "majority": 100 * test["majority"],
    }


def published_rows() -> list[dict[str, Any]]:
    """The published table: a row per model, "*" where it is quoted second hand, "~" at a score that is at chance."""
    rows: list[dict[str, Any]] = [
        {"model": "always the majority label", **{TITLES[task]: f"{MAJORITY[task]:.2f}" for task in TASKS}}
    ]
    for row in PUBLISHED:
        if row.scores.count(None) == len(TASKS):
            continue  # nothing was read from its paper yet
        cells: dict[str, Any] = {"model": row.model if row.checked else f"{row.model} *"}
        for task in TASKS:
            score = row[task]
            mark = "~" if task in row.at_chance else ""
            cells[TITLES[task]] = score if score in (None, FAIL) else f"{score:.2f}{mark}"
        cells["mean"] = None if row.mean is None else f"{row.mean:.2f}"
        rows.append({**cells, "source": row.source})
    return rows
