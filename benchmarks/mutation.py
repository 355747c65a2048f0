"""Mutations of kernels/ and blocks/mixers/: which changes of the code does no test notice?

    python benchmarks/mutation.py --sample 400 [--paths kernels/ema blocks/mixers] [--again survivors]

cosmic-ray's operators (pip install cosmic-ray coverage; no extra has them) change one place at a time in a copy of the
repository at HEAD. The places are a sample in proportion to what a file has of them; a larger sample holds a smaller.
A mutant meets the tests of tests/kernels and tests/blocks, in the default suite, that reach its line, fastest first:
of its own file of tests what takes four times --others seconds, then of the others what takes that. It is killed when
one fails, dies or takes five times its time. Results go to benchmarks/results/mutation.json and .md as they come;
called again it goes on.
mutation_equivalent.toml lists mutants that cannot be told from the original, with the reason.
"""

from __future__ import annotations

import argparse
import compileall
import json
import multiprocessing
import os
import py_compile
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from _mutants import Place, find_places, mutate, statement
from _mutation_runs import MEASURED, Only, Reach, forked, preload, prepare, run_tests
from _runs import RESULTS, ROOT, earlier_rows, write_result

EQUIVALENT = ROOT / "benchmarks" / "mutation_equivalent.toml"
GROUPS = ("kernels, PyTorch", "kernels, Triton", "mixers")
# Tests that read what was made at import, signatures and registered backends: they reach no line of it.
READERS = {"blocks": "tests/blocks/test_registry.py::", "kernels": "tests/kernels/test_portable.py::test_the_forms"}
HEADER = (
    "| | places | mutants | killed | by a limit | survive | equivalent | share | 95 % interval |\n"
    "|---|---|---|---|---|---|---|---|---|"
)


def ordered(copy: Path, paths: list[str], seed: int, excluded: Counter[str], sizes: Counter[str]) -> list[Place]:
    """All places, such that each beginning has of every file in proportion to its places."""
    placed: list[tuple[float, Place]] = []
    for folder in MEASURED:
        for path in sorted((copy / folder).rglob("*.py")):
            name = path.relative_to(copy).as_posix()
            if not any(name == wanted or name.startswith(f"{wanted}/") for wanted in paths):
                continue
            source = path.read_text(encoding="utf-8")
            found = find_places(source, name, seed, excluded)
            sizes[f"{group(name, source)}\n{name}"] = len(found)
            shift = int.from_bytes(name.encode(), "big") * 0x9E3779B97F4A7C15 % 997 / 997  # files take turns
            placed += [((number + shift) / len(found), place) for number, place in enumerate(found)]
    return [place for _, place in sorted(placed, key=lambda pair: (pair[0], pair[1].key))]


def group(name: str, source: str) -> str:
    return GROUPS[2] if name.startswith("blocks") else GROUPS["import triton\n" in source]


def own(name: str, test: str) -> bool:
    """Whether a test stands in the file of tests of a source: test_ema_triton.py of kernels/ema/fused.py."""
    parts = Path(name).with_suffix("").parts
    key = parts[2] if parts[0] == "blocks" else parts[1]
    file = Path(test.split("::")[0])
    return file.parent.name == parts[0] and (file.stem == f"test_{key}" or file.stem.startswith(f"test_{key}_"))


def stages(reach: Reach, copy: Path, place: Place, others: float) -> Iterator[dict[str, float]]:
    """The tests that a mutant meets, with their seconds: its own, then others, worth so many seconds."""
    source = copy / place.path
    known = reach.tests(source, place.path, statement(source.read_text(encoding="utf-8"), place.line))
    if not known:  # not reached, or not seen to be: in a compiled graph, say
        known = {test: seconds for test, seconds in reach.every().items() if own(place.path, test)}
    readers = READERS[place.path.split("/")[0]]
    known |= {test: seconds for test, seconds in reach.every().items() if test.startswith(readers)}
    fastest = dict(sorted(known.items(), key=lambda item: (round(item[1], 2), item[0])))
    for mine, limit in ((True, 4 * others), (False, others)):
        chosen, spent = {}, 0.0
        for test, seconds in fastest.items():
            if own(place.path, test) == mine and spent + seconds <= limit:
                chosen[test], spent = seconds, spent + seconds
        yield chosen


def attempt(copy: Path, tests: dict[str, float], builds: bool) -> dict[str, Any]:
    """The tests in a fork. builds: the mutant is of the code that builds libraries, which must not be shared."""

    def work() -> dict[str, Any]:
        if builds:
            os.environ["TORCH_EXTENSIONS_DIR"] = tempfile.mkdtemp(dir=copy.parent)
        plugin = Only(tests)
        files = list(dict.fromkeys(test.split("::")[0] for test in tests))
        return {"code": run_tests(files, plugin, "-x"), "failed": plugin.failed, "ran": len(plugin.seconds)}

    cpu = 60 + 5 * sum(tests.values())
    return forked(copy, 4 * cpu, cpu, work)


def judge(copy: Path, reach: Reach, place: Place, others: float, change: bool = True) -> dict[str, Any] | None:
    """The row of a mutant, or None where the place has none; change=False runs the tests on the code as it is."""
    path = copy / place.path
    source = path.read_text(encoding="utf-8")
    made = mutate(source, place)
    if made is None:
        return None
    mutated, before, after = made
    row = {"key": place.key, "path": place.path, "line": place.line, "before": before, "after": after}
    row |= {"group": group(place.path, source), "outcome": "survived"}
    row["tests"] = ran = {"run": 0, "failed": ""}
    met = list(stages(reach, copy, place, others))
    try:
        path.write_text(mutated if change else source, encoding="utf-8")
        for tests in met:
            if not tests:
                continue
            got = attempt(copy, tests, place.path.endswith("compiled.py"))
            ran["run"] += got.get("ran", 0)
            if got["code"] == 0:
                continue
            if got["code"] in (3, 5):
                raise RuntimeError(f"pytest ends with {got} on {place}, see {copy}.log")
            row["outcome"] = "timeout" if got["code"] == "timeout" else "killed"
            ran["failed"] = got["code"] if isinstance(got["code"], str) else (got["failed"] or ["import"])[0]
            break
    finally:
        path.write_text(source, encoding="utf-8")
    return row


def in_turn(
    jobs: int, copies: list[Path], reach: Reach, todo: list[tuple[Place, bool]], others: float
) -> Iterator[Any]:
    """(place, row) as they come; with several jobs each process has a copy of its own."""
    if jobs == 1:
        _MINE.update(copy=copies[0], reach=reach, others=others)
        yield from map(_judge, todo)
        return
    context = multiprocessing.get_context("fork")
    free = context.Queue()
    for copy in copies:
        free.put(copy)
    with context.Pool(jobs, _take, (free, reach, others)) as pool:
        yield from pool.imap_unordered(_judge, todo)


_MINE: dict[str, Any] = {}


def _take(free: Any, reach: Reach, others: float) -> None:
    _MINE.update(copy=free.get(), reach=reach, others=others)


def _judge(task: tuple[Place, bool]) -> tuple[Place, dict[str, Any] | None]:
    place, control = task
    row = judge(_MINE["copy"], _MINE["reach"], place, _MINE["others"])
    if row is not None and control:
        plain = judge(_MINE["copy"], _MINE["reach"], place, _MINE["others"], change=False)
        row["control"] = plain["outcome"] == "survived"  # type: ignore[index]
    return place, row


# the report -----------------------------------------------------------------------------------------------------------


def equivalent() -> dict[tuple[str, str, str], str]:
    """(path, line before, line after): why no test can tell them apart."""
    known = tomllib.loads(EQUIVALENT.read_text(encoding="utf-8")) if EQUIVALENT.is_file() else {}
    return {
        (entry["path"], before, after): entry["why"]
        for entry in known.get("mutants", [])
        for before, after in entry["changes"]
    }


def figures(name: str, places: int, rows: list[dict[str, Any]], same: dict[tuple[str, str, str], str]) -> str:
    from scipy.stats import binomtest

    outcomes = Counter(row["outcome"] for row in rows)
    equal = sum(row["outcome"] == "survived" and (row["path"], row["before"], row["after"]) in same for row in rows)
    left, total = outcomes["survived"] - equal, len(rows) - equal
    share, interval = "-", "-"
    if total:
        ends = binomtest(left, total).proportion_ci(method="wilson")
        share, interval = f"{100 * left / total:.1f} %", f"{100 * ends.low:.1f} to {100 * ends.high:.1f} %"
    counts = f"{places} | {len(rows)} | {outcomes['killed']} | {outcomes['timeout']} | {left} | {equal}"
    return f"| {name} | {counts} | {share} | {interval} |"


def report(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    rows, sizes, same = result["rows"], result["places"], equivalent()
    lines = ["# Mutations", "", f"`{result['command']}`", "", HEADER, figures("all", sum(sizes.values()), rows, same)]
    first = [{**row, "outcome": row["first"]} for row in rows]
    lines.append(figures("all, when first tried", sum(sizes.values()), first, same))
    for name in GROUPS:
        chosen = [row for row in rows if row["group"] == name]
        lines.append(figures(f"**{name}**", sum(n for k, n in sizes.items() if k.split("\n")[0] == name), chosen, same))
    for name in GROUPS:
        folders: Counter[str] = Counter()
        for key, count in sizes.items():
            if key.split("\n")[0] == name:
                folders[_room(key.split("\n")[1])] += count
        for room, count in sorted(folders.items()):
            chosen = [row for row in rows if row["group"] == name and _room(row["path"]) == room]
            lines.append(figures(f"{room} ({name.split(', ')[-1]})" if "," in name else room, count, chosen, same))
    controls = [row["control"] for row in rows if "control" in row]
    text = "share: of those that are not equivalent; the interval is Wilson's. By a limit: of time or memory; killed."
    if controls:
        text += f" The tests of the first, on the code as it is: {sum(controls)} of {len(controls)} times all pass."
    excluded = ", ".join(f"{count} {rule}" for rule, count in sorted(result["excluded"].items()))
    lines += ["", text, "", f"Changes left out by rule: {excluded}.", ""]
    for title, wanted in (("Survivors", False), ("Equivalent", True)):
        lines += [
            f"## {title}",
            "",
            "| where | before | after |" + " why |" * wanted,
            "|---|---|---|" + "---|" * wanted,
        ]
        for row in sorted(rows, key=lambda row: (row["path"], row["line"])):
            why = same.get((row["path"], row["before"], row["after"]))
            if row["outcome"] == "survived" and (why is not None) == wanted:
                cells = [f"`{row[side]}`".replace("|", "\\|") for side in ("before", "after")] + ([why] if why else [])
                lines.append(f"| {row['path']}:{row['line']} | {' | '.join(cells)} |")
        lines.append("")
    return "\n".join(lines)


def _room(name: str) -> str:
    return name if name.startswith("blocks") else "/".join(Path(name).with_suffix("").parts[:2])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", type=int, default=400, help="mutants, of all paths together")
    parser.add_argument("--paths", nargs="*", default=list(MEASURED), help="files and folders")
    parser.add_argument(
        "--again", choices=["survivors"], help="try those once more that survive and are not equivalent"
    )
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--others", type=float, default=60.0, help="seconds of tests beside a mutant's own")
    parser.add_argument("--controls", type=int, default=10, help="mutants whose tests also run on the code as it is")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "seqzoo-mutation")
    options = parser.parse_args()
    preload()
    copies = [options.work / f"copy{number}" for number in range(options.jobs)]
    prepare(copies[0])
    compileall.compile_dir(copies[0], quiet=2, invalidation_mode=py_compile.PycInvalidationMode.CHECKED_HASH)
    reach = Reach(options.work / "reach")
    reach.update(copies[0])
    for copy in copies[1:]:
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(copies[0], copy, symlinks=True)
    excluded, sizes = Counter[str](), Counter[str]()
    places = ordered(copies[0], options.paths, options.seed, excluded, sizes)
    settings = {"seed": options.seed, "paths": options.paths}
    # a place that is there no more goes
    known = {row["key"]: row for row in earlier_rows("mutation", settings)}
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    result: dict[str, Any] = {"settings": settings, "commit": head.strip(), "places": sizes, "excluded": excluded}
    sample = places[: options.sample]
    rows = {place.key: known[place.key] for place in sample if place.key in known}
    same, left = equivalent(), [row for row in rows.values() if options.again and row["outcome"] == "survived"]
    again = {row["key"] for row in left if (row["path"], row["before"], row["after"]) not in same}
    todo = [place for place in sample if place.key not in rows or place.key in again]
    tasks = [(place, place in sample[: options.controls]) for place in todo]
    for number, (place, row) in enumerate(in_turn(options.jobs, copies, reach, tasks, options.others), 1):
        if row is not None:
            rows[place.key] = {**row, "first": rows.get(place.key, {}).get("first", row["outcome"])}
            print(f"{number}/{len(todo)} {row['outcome']} {row['path']}:{row['line']} {row['after']}", flush=True)
        _write(result, rows)
    _write(result, rows)


def _write(result: dict[str, Any], rows: dict[str, dict[str, Any]]) -> None:
    path = write_result("mutation", {**result, "rows": list(rows.values())})
    (RESULTS / "mutation.md").write_text(report(json.loads(path.read_text(encoding="utf-8"))), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
