"""Rows of a benchmark as JSON and as a page, those of earlier runs kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from _cases import Case, measure
from _measure import hardware, versions
from _runs import RESULTS, earlier_rows, write_result

KEYS = ("operation", "case", "length", "pass", "ours", "peer", "of")


def merged(old: Iterable[dict[str, Any]], new: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The old rows, those measured again replaced, and the further ones at the end."""
    fresh = {tuple(row.get(key) for key in KEYS): row for row in new}
    kept = [fresh.pop(tuple(row.get(key) for key in KEYS), row) for row in old]
    return [*kept, *fresh.values()]


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows as they stand in a table."""

    def short(value: float | None) -> str:
        return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"

    table = []
    for row in rows:
        memory = row["of"] == "memory"
        unit = " MiB" if memory else " ms"
        pair = [row[f"{side}{unit}"] for side in ("ours", "peer")]
        ours, peer = (short(value) + unit if value is not None else "" for value in pair)
        verdict = {None: "", True: "met", False: "missed"}[row["met"]]
        table.append(
            {
                "operation": row["operation"],
                "case": row["case"],
                "length": row["length"],
                "pass": row["pass"],
                "ours": f"{row['ours']}: {ours}" if ours else row["ours"],
                "peer": f"{row['peer']}: {peer}" if peer else row["peer"],
                "ratio": short(row["ratio"]),
                "bar": "" if row["bar"] is None else f"{'>=' if row['of'] == 'roof' else '<='} {row['bar']:g}",
                "": "error" if row.get("error") else verdict,
                "of roof": "" if row["of roof"] is None else f"{100 * row['of roof']:.0f} %",
                "difference": "" if row["difference"] is None else f"{row['difference']:.0e}",
                "rounds": row["rounds"],
                "note": row.get("error") or row["note"],
            }
        )
    return table


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with the columns of the first row."""
    if not rows:
        return "No rows."
    columns = list(rows[0])

    def cell(value: Any) -> str:
        return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")

    lines = [columns, ["---"] * len(columns), *([cell(row.get(c)) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_page(path: Path, title: str) -> Path:
    """The results of a JSON file as a Markdown page beside it."""
    record = json.loads(path.read_text(encoding="utf-8"))
    facts = [
        f"`{record['command']}`, {record['date']}",
        "Machine: " + ", ".join(f"{key} {value}" for key, value in record["hardware"].items()) + ".",
        "Versions: "
        + ", ".join(f"{key} {value or 'not installed'}" for key, value in record["packages"].items())
        + ".",
        "Roofs measured in the run: "
        + "; ".join(
            f"{name}: " + ", ".join(f"{value:.4g} {key}" for key, value in values.items())
            for name, values in record["roofs"].items()
        )
        + ".",
        record["how"],
    ]
    rows = record["rows"]
    judged = [row for row in rows if row["met"] is not None]
    facts.append(f"{sum(row['met'] for row in judged)} of {len(judged)} bars met.")
    text = f"# {title}\n\n" + "\n\n".join(facts) + "\n\n" + markdown(summary(rows)) + "\n"
    page = path.with_suffix(".md")
    page.write_text(text, encoding="utf-8")
    return page


def run_cases(
    name: str,
    title: str,
    chosen: Sequence[Case],
    known: Sequence[Case],
    device: torch.device,
    roofs: dict[str, dict[str, float]],
    *,
    settings: dict[str, Any],
    how: str,
    packages: Sequence[str],
    rounds: int = 7,
    memory: Callable[[Case, str], float] | None = None,
    folder: Path | None = RESULTS,
    after: Callable[[], None] | None = None,
) -> list[dict[str, Any]]:
    """Measure the chosen cases, print and write after each, and return all rows.

    roofs: by number of threads, in words. folder: of the results; None writes nothing. known: all cases, which give the
    rows their order; rows of an earlier run with the same settings stay, if their case does. after: called after each.
    """
    facts = {"hardware": hardware(device), "packages": versions(*packages)}
    order = {case.key: place for place, case in enumerate(known)}
    rows: list[dict[str, Any]] = []
    everything: list[dict[str, Any]] = []
    for case in chosen:
        print(case.key, flush=True)
        roof = roofs["one thread" if case.threads == 1 and "one thread" in roofs else list(roofs)[-1]]
        peak = None if memory is None else (lambda side, case=case: memory(case, side))
        new = measure(case, device, roof, rounds=rounds, memory=peak)
        for row in summary(new):
            print("   ", " | ".join(str(v) for k, v in row.items() if k not in ("operation", "length", "pass") and v))
        rows += new
        if after is not None:
            after()
        earlier = [] if folder is None else [r for r in earlier_rows(name, settings, folder) if _key(r) in order]
        everything = sorted(merged(earlier, rows), key=lambda row: order.get(_key(row), len(order)))
        if folder is None:
            continue
        record = {
            "settings": settings,
            "how": how,
            "roofs": roofs,
            **facts,
            "rows": everything,
        }
        write_page(write_result(name, record, folder), title)
    return everything


def _key(row: dict[str, Any]) -> str:
    return f"{row['operation']} | {row['case']} | {row['length']} | {row['pass']}"
