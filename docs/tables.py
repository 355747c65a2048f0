"""Fill the tables of README.md from the registries and from benchmarks/results/*.json.

    python docs/tables.py            rewrite README.md and model_cards/*.md, the cards of the weights that ship
    python docs/tables.py --check    exit 1, naming the tables and cards that are not what this would write

A table stands between `<!-- table:NAME -->` and `<!-- /table -->`; what is between them is replaced.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
RESULTS = ROOT / "benchmarks" / "results"
TABLE = re.compile(r"(<!-- table:(?P<name>\w+) -->\n).*?(<!-- /table -->)", re.DOTALL)


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A Markdown table with a column for every key of the first row."""
    columns = list(rows[0])
    lines = [columns, ["---"] * len(columns), *([cell(row.get(c)) for c in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """A value as it stands in a table; floats with four significant digits, long integers with commas."""
    if isinstance(value, bool):
        return "yes" if value else "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and abs(value) >= 10_000:
        return f"{value:,}"
    return "" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def paper(reference: str) -> str:
    """A link for `arXiv:...`, other references as they are."""
    name, _, number = reference.partition(":")
    return f"[{reference}](https://arxiv.org/abs/{number})" if name == "arXiv" else reference


def shipped(thing: Any) -> bool:
    """Whether a registered class or function is the library's own."""
    return thing.__module__.startswith("seqzoo.")


ORIGINS = {"paper": "faithful", "reconstruction": "reconstruction", "seqzoo": "ours"}


def mixers() -> str:
    from seqzoo import list_mixers, mixer_info
    from seqzoo.blocks.protocol import PATTERNS

    rows = []
    for info in map(mixer_info, list_mixers()):
        if not shipped(info.cls):
            continue
        patterns = {p: "ours" if p in info.ours else p in info.patterns for p in PATTERNS}
        rows.append(
            {
                "key": f"[`{info.name}`](blocks/mixers/{info.name}.py)",
                "defined by": f"{paper(info.paper)}, {ORIGINS[info.origin]}",
                **patterns,
                "time": info.cost,
                "state after 1k, 64k tokens": states(info.name) if info.streaming else False,
                "kernels": ", ".join(f"{op} ({', '.join(backends_of(op))})" for op in info.kernels),
            }
        )
    return markdown(rows)


def states(mixer: str) -> str:
    """Numbers that one layer of width 64 carries after 1024 and 65536 tokens."""
    from seqzoo import create_mixer

    options = {"num_heads": 4} if "num_heads" in mixer_options(mixer) else {}
    layer = create_mixer({"name": mixer, **options}, 64, causal=True)
    few, many = (f"{layer.state_size(length):,}" for length in (1024, 65536))
    return few if few == many else f"{few}, {many}"


def mixer_options(mixer: str) -> dict[str, Any]:
    from seqzoo import mixer_info

    return mixer_info(mixer).options


def backends_of(op: str) -> list[str]:
    from seqzoo.kernels.dispatch import backends

    return list(backends()[op])


def takes_any_mixer(model: str) -> bool:
    """Whether `mixer=...` of the command puts another one into a model: its file says so."""
    path = ROOT / "conf" / "model" / f"{model}.yaml"
    return path.is_file() and "mixer: ${mixer}" in path.read_text(encoding="utf-8")


def models() -> str:
    """A row per family: models that differ in their size only share one."""
    from seqzoo.zoo import list_models, model_info

    families: dict[tuple[str, ...], list[Any]] = {}
    for info in map(model_info, list_models()):
        if shipped(info.build):
            key = info.task, info.name.rpartition("_")[0] or info.name, info.cls.__name__
            families.setdefault(key, []).append(info)
    sizes = ("tiny", "small", "base")
    rows = []
    for (task, _, _), members in sorted(families.items()):
        members.sort(key=lambda info: sizes.index(s) if (s := info.name.rpartition("_")[2]) in sizes else 9)
        first = members[0]
        rows.append(
            {
                "names": " ".join(f"`{info.name}`" for info in members),
                "task": task,
                "defined by": paper(first.paper),
                "mixer": "any" if takes_any_mixer(first.name) else "its own",
                "the smallest": first.summary,
            }
        )
    return markdown(rows)


def weights() -> str:
    """A row for every set of weights that ships: what it is for, its size, its score beside the best baseline."""
    from seqzoo.zoo import list_models, weights_info
    from seqzoo.zoo._weights import LOWER_IS_BETTER

    rows = []
    for name in list_models(pretrained=True):
        record = weights_info(name)
        if not (ROOT / "zoo" / "weights" / name).is_dir():
            continue
        metric, own = record.metric, record.results[0]
        others = [row for row in record.results if row.get(metric) is not None and not _same(row, own, record.model)]
        sign = 1 if LOWER_IS_BETTER.search(metric) else -1
        best = min(others, key=lambda row: sign * row[metric])
        size = (ROOT / "zoo" / "weights" / name / "model.safetensors").stat().st_size
        rows.append(
            {
                "weights": f"[`{name}`](model_cards/{name}.md)",
                "for": record.purpose,
                "parameters": record.num_parameters,
                "MB": f"{size / 1e6:.1f}",
                "trained on": record.data,
                "licence": record.license,
                "score": f"{metric} {cell(float(own[metric]))}",
                "best baseline": f"{cell(float(best[metric]))} ({best['method']})",
            }
        )
    return markdown(rows) if rows else "None yet."


def _same(row: dict[str, Any], own: dict[str, Any], model: str) -> bool:
    """Whether a row is of the model itself: a test may have several of it."""
    return row is own or str(row["method"]).startswith(model)


def bars(name: str, command: str) -> str:
    """The cases of benchmarks/results/<name>.json that a bar was set for: ours, the peer, their ratio."""
    path = RESULTS / f"{name}.json"
    if not path.is_file():
        return f"Not measured yet: `{command}` writes this table."
    record = json.loads(path.read_text(encoding="utf-8"))
    rows = []
    for row in (row for row in record["rows"] if row["bar"] is not None):
        unit = "MiB" if row["of"] == "memory" else "ms"
        pair = [row.get(f"{side} {unit}") for side in ("ours", "peer")]
        texts = ("" if v is None else f"{v:.0f} {unit}" if v >= 1000 else f"{v:.3g} {unit}" for v in pair)
        ours, peer = texts
        value = row["of roof"] if row["of"] == "roof" else row["ratio"]
        rows.append(
            {
                "operation": f"{row['operation']}, {row['case']}",
                "length": row["length"],
                "pass": row["pass"],
                "ours": ours if row["ours"] == "ours" else f"{row['ours'].removeprefix('ours, ')}: {ours}",
                "peer": f"{row['peer']}: {peer}" if peer else row["peer"],
                "ratio": "" if value is None else f"{value:.3g}",
                "bar": f"{'>=' if row['of'] == 'roof' else '<='} {row['bar']:g}",
                "met": "error" if row.get("error") else {None: "not run", True: "yes", False: "no"}[row["met"]],
            }
        )
    machine = record["hardware"].get("gpu") or record["hardware"]["processor"]
    judged = [row["met"] for row in rows if row["met"] in ("yes", "no", "error")]
    head = (
        f"`{command}`, {record['date']}, {machine}, torch {record['packages']['torch']}: {judged.count('yes')} of "
        f"{len(judged)} bars met. Every row with its memory, roof and note: "
        f"[{name}.md](benchmarks/results/{name}.md)."
    )
    return f"{head}\n\n{markdown(rows)}" if rows else head


def results() -> str:
    """One table per results file, with the command, the day and the machine that made it; those of `bars` apart."""
    parts = []
    for path in sorted(path for path in RESULTS.glob("*.json") if path.stem not in ("cpu", "gpu")):
        record = json.loads(path.read_text(encoding="utf-8"))
        link = f"[`{path.stem}`](benchmarks/results/{path.name})"
        command = record.get("command", f"python benchmarks/{path.stem}.py")
        cores = record.get("machine", {}).get("cores")
        made = [f"`{command}`", record.get("date"), f"{cores} cores" if cores else None]
        if "versions" in record:
            made.append(f"torch {record['versions'].get('torch', '?')}")
        line = f"{link}: {', '.join(part for part in made if part)}"
        rows = record.get("rows", record.get("results", []))
        flat = [{k: v for k, v in row.items() if not isinstance(v, (list, dict))} for row in rows]
        page = path.with_suffix(".md")
        if page.is_file():  # what it says of the figures, and those that a line cannot hold
            line += f"; see [{page.name}](benchmarks/results/{page.name})"
            flat = flat if flat == rows else []
        parts.append(line)
        if flat:
            parts.append(markdown(flat))
    return "\n\n".join(parts) or "None yet: `make bench` writes them."


TABLES: dict[str, Callable[[], str]] = {
    "mixers": mixers,
    "models": models,
    "weights": weights,
    "cpu": lambda: bars("cpu", "python benchmarks/cpu.py"),
    "gpu": lambda: bars("gpu", "bash benchmarks/gpu.sh"),
    "results": results,
}


def filled(text: str) -> str:
    """`text` with every table made anew. Raises ValueError for a table that this file does not know."""

    def fill(match: re.Match[str]) -> str:
        name = match["name"]
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; known: {', '.join(TABLES)}")
        return f"{match[1]}{TABLES[name]()}\n{match[3]}"

    return TABLE.sub(fill, text)


def stale(text: str) -> list[str]:
    """Names of the tables in `text` that are not what they should be."""
    tables = zip(TABLE.finditer(text), TABLE.finditer(filled(text)), strict=True)
    return [old["name"] for old, new in tables if old[0] != new[0]]


def main() -> int:
    from seqzoo.zoo._cards import stale_cards, write_cards

    text = README.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        names = [*stale(text), *stale_cards(ROOT / "model_cards")]
        print(f"behind are {', '.join(names)}: make docs" if names else "README.md and the cards are up to date")
        return 1 if names else 0
    README.write_text(filled(text), encoding="utf-8")
    write_cards(ROOT / "model_cards")
    return 0


if __name__ == "__main__":
    sys.exit(main())
