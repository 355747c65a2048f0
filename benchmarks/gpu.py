"""Every operation beside its peers on a GPU, in bfloat16: times, ratios, bars, and how near the device's roof.

    python benchmarks/gpu.py [--only linear SSD ...] [--match 16384] [--list]
    python benchmarks/gpu.py --device cpu --tiny --out /tmp/results     all but the device: tiny shapes, in seconds

Sides of a case get the same inputs in one process, their outputs are compared, and they run in turn; times are between
two CUDA events around calls in a row (10 ms, or 50 calls), medians of nine rounds. The roofs are measured in the same
run (copy, bf16 product); the exponential rate is that of the special-function units, 16 a clock and multiprocessor. A
side that cannot run (a package that is missing, a backend that refuses the shape) is named in its row. Writes
benchmarks/results/gpu.json and gpu.md; rows of cases that --only leaves out stay.
"""

from __future__ import annotations

import argparse
import gc
import logging
import sys
import warnings
from pathlib import Path

import torch
from _gpu_cases import Where, cases
from _measure import roofs
from _peers import PACKAGES
from _report import run_cases
from _runs import RESULTS

HOW = (
    "Sides interleaved in one process, same inputs, outputs compared; CUDA events around calls in a row, medians; "
    "ratio = ours / peer."
)
CLOCK = 1.98e9  # of an H100 or H200 at most, where torch does not tell
PER_CLOCK = 16  # exponentials of a multiprocessor


def measured_roofs(device: torch.device, tiny: bool) -> dict[str, float]:
    found = roofs(device, tiny=tiny)
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        clock = 1e3 * getattr(facts, "clock_rate", 0) or CLOCK
        found["exp G/s"] = facts.multi_processor_count * PER_CLOCK * clock / 1e9
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=None, metavar="OPERATION", help="these operations")
    parser.add_argument("--match", default="", metavar="TEXT", help="cases whose line of --list holds this")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--backend", default="auto", help="of our kernels")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: a test of this script, not a measurement")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    parser.add_argument("--list", action="store_true", help="the cases, and nothing else")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available() and not options.list:
        sys.exit("no CUDA device; --device cpu --tiny tries all but the device")
    if options.tiny and options.out is None:
        parser.error("--tiny measures nothing that is worth keeping: give --out, a folder of its own")
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    device = torch.device(options.device)
    known = cases(Where(device, backend=options.backend, tiny=options.tiny))
    names = list(dict.fromkeys(case.operation for case in known))
    if unknown := set(options.only or ()) - set(names):
        parser.error(f"unknown operations {', '.join(sorted(unknown))}; choose from {', '.join(names)}")
    chosen = [
        case for case in known if (not options.only or case.operation in options.only) and options.match in case.key
    ]
    if options.list:
        print("\n".join(case.key for case in chosen))
        return
    rows = run_cases(
        "gpu",
        "Kernels on a GPU",
        chosen,
        known,
        device,
        {"device": measured_roofs(device, options.tiny)},
        settings={"dtype": "bfloat16", "device": device.type, "tiny": options.tiny, "backend": options.backend},
        how=HOW,
        packages=PACKAGES,
        rounds=2 if options.tiny else options.rounds,
        folder=options.out or RESULTS,
        after=release if device.type == "cuda" else None,
    )
    judged = [row for row in rows if row["met"] is not None]
    print(f"{sum(row['met'] for row in judged)} of {len(judged)} bars met; {(options.out or RESULTS) / 'gpu.md'}")


def release() -> None:
    """Memory of one case is free for the next."""
    gc.collect()
    torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
