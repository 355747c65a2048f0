"""Every operation beside its peers on the CPU, one thread: times, ratios, bars, and how near the machine's roof.

    python benchmarks/cpu.py [--only linear mamba ...] [--match 16384] [--quick] [--list]

Both sides of a case get the same inputs in one process, their outputs are compared, and they run in turn, seven rounds
or more (three where one call takes more than three seconds, and the row says so). Times are CPU times of one thread;
the Informer step is also timed as wall time of two. A ratio is ours / peer of the medians, smaller is better. Peak
memory is the growth of the resident set in one call, each side in a process of its own. The roof of a case is the time
of its operations, bytes and exponentials at the rates measured in the same run. Growth with the length: length.py.

`pip install 'seqzoo[peers]'` has the peers; a row says which one is missing. Writes benchmarks/results/cpu.json and
cpu.md, rows of cases that --only leaves out stay, and with matplotlib docs/pictures/cpu.png. --quick takes the cheaper
cases with three rounds and writes nothing.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from _cases import Case
from _cpu_cases import cases
from _measure import peak_mib, roofs
from _peers import PACKAGES
from _report import markdown, run_cases, summary
from _runs import RESULTS, ROOT

DEVICE = torch.device("cpu")
WARM = 512  # the length of the call before the one whose memory is measured
HOW = (
    "Sides interleaved in one process, same inputs, outputs compared; CPU time of one thread (wall time where a row "
    "says two), medians; ratio = ours / peer."
)


def peak(key: str, side: str) -> float:
    """Peak MiB of one call of a side, in this process."""
    case = next(case for case in cases() if case.key == key)
    run = case.build(WARM).runs[side]
    run()  # type: ignore[operator]
    run = case.build(case.length).runs[side]
    return peak_mib(run, DEVICE)  # type: ignore[arg-type]


def peak_elsewhere(case: Case, side: str) -> float:
    """The same in a fresh process, where nothing was set up by what ran before."""
    command = [sys.executable, str(Path(__file__).resolve()), "--peak", case.key, side]
    done = subprocess.run(command, capture_output=True, text=True)
    return float(done.stdout.split()[-1]) if done.returncode == 0 else float("nan")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=None, metavar="OPERATION", help="these operations")
    parser.add_argument("--match", default="", metavar="TEXT", help="cases whose line of --list holds this")
    parser.add_argument("--quick", action="store_true", help="cheap cases, three rounds, nothing is written")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--list", action="store_true", help="the cases, and nothing else")
    parser.add_argument("--peak", nargs=2, metavar=("CASE", "SIDE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if options.peak:
        print(peak(*options.peak))
        return
    known = cases()
    names = list(dict.fromkeys(case.operation for case in known))
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"unknown operations {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    chosen = [
        case
        for case in known
        if (not options.only or case.operation in options.only)
        and options.match in case.key
        and (case.quick or not options.quick)
    ]
    if options.list:
        print("\n".join(case.key for case in chosen))
        return
    limits = {"one thread": roofs(DEVICE)}
    torch.set_num_threads(2)
    limits["two threads"] = roofs(DEVICE)
    torch.set_num_threads(1)
    rows = run_cases(
        "cpu",
        "Kernels on the CPU",
        chosen,
        known,
        DEVICE,
        limits,
        settings={"threads": 1, "dtype": "float32", "batch": 1},
        how=HOW,
        packages=PACKAGES,
        rounds=3 if options.quick else options.rounds,
        memory=peak_elsewhere,
        folder=None if options.quick else RESULTS,
    )
    if options.quick:
        print(markdown(summary(rows)))
    else:
        draw(rows)


def draw(rows: list[dict[str, Any]]) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib: no picture")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    shown = [row for row in rows if row["ratio"] and row["bar"]][::-1]
    if not shown:
        return
    figure, axis = pyplot.subplots(figsize=(11, 1.2 + 0.23 * len(shown)), layout="constrained")
    for place, row in enumerate(shown):
        axis.barh(place, row["ratio"], color="tab:green" if row["met"] else "tab:red", alpha=0.75, height=0.7)
        axis.plot([row["bar"]] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2)
        axis.annotate(
            f"{row['ratio']:.3g}", (row["ratio"], place), (3, 0), textcoords="offset points", va="center", size=7
        )
    axis.set_yticks(range(len(shown)), [label(row) for row in shown], fontsize=7)
    axis.set(xscale="log", xlabel="ours / peer (black: the bar; green: met)", ylim=(-0.7, len(shown) - 0.3))
    axis.margins(x=0.15)
    axis.axvline(1.0, color="grey", linewidth=1, linestyle=":")
    axis.grid(axis="x", alpha=0.3)
    path = ROOT / "docs" / "pictures" / "cpu.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    print(path)


def label(row: dict[str, Any]) -> str:
    length = f"{row['length'] // 1024}k" if row["length"] >= 1024 else str(row["length"])
    ours = "" if row["ours"] == "ours" else f" ({row['ours'].removeprefix('ours, ')})"
    return f"{row['operation']}, {row['case']}, {length} {row['pass']}{ours} / {row['peer']}"


if __name__ == "__main__":
    main()
