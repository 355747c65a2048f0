"""Fill the tables of README.md from the registries and from benchmarks/results/*.json.

    python docs/tables.py            rewrite README.md
    python docs/tables.py --check    exit 1, naming the tables, when README.md is not what this would write

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


def mixers() -> str:
    from seqzoo import list_mixers, mixer_info
    from seqzoo.blocks.protocol import PATTERNS

    infos = [info for info in map(mixer_info, list_mixers()) if shipped(info.cls)]
    return markdown(
        [
            {
                "key": f"[`{info.name}`](blocks/mixers/{info.name}.py)",
                "class": f"`{info.cls.__name__}`",
                "defined by": paper(info.paper),
                "origin": info.origin,
                **{pattern: pattern in info.patterns for pattern in PATTERNS},
                "streaming": info.streaming,
            }
            for info in infos
        ]
    )


def models() -> str:
    from seqzoo.zoo import list_models, model_info

    infos = [info for info in map(model_info, list_models()) if shipped(info.build)]
    return markdown(
        [
            {
                "name": f"`{info.name}`",
                "task": info.task,
                "defined by": paper(info.paper),
                "mixer": "any" if "mixer" in info.options else "its own",
                "what": info.summary,
            }
            for info in infos
        ]
    )


def results() -> str:
    """One table per results file, with the command, the day and the machine that made it."""
    parts = []
    for path in sorted(RESULTS.glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        link = f"[`{path.stem}`](benchmarks/results/{path.name})"
        command = record.get("command", f"python benchmarks/{path.stem}.py")
        cores = record.get("machine", {}).get("cores")
        made = [f"`{command}`", record.get("date"), f"{cores} cores" if cores else None]
        if "versions" in record:
            made.append(f"torch {record['versions'].get('torch', '?')}")
        parts.append(f"{link}: {', '.join(part for part in made if part)}")
        rows = record.get("rows", record.get("results", []))
        flat = [{k: v for k, v in row.items() if not isinstance(v, (list, dict))} for row in rows]
        if flat:
            parts.append(markdown(flat))
    return "\n\n".join(parts) or "None yet: `make bench` writes them."


TABLES: dict[str, Callable[[], str]] = {"mixers": mixers, "models": models, "results": results}


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
    text = README.read_text(encoding="utf-8")
    if "--check" in sys.argv[1:]:
        names = stale(text)
        print(f"README.md is behind in {', '.join(names)}: make docs" if names else "README.md is up to date")
        return 1 if names else 0
    README.write_text(filled(text), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
