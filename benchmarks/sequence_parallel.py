"""One sequence over ranks: equality with one device, and the bytes that the collectives bring against the length.

    python benchmarks/sequence_parallel.py [--lengths 256 512 1024] [--processes 2 4] [--only equality]

Equality: every variant of every mixer that works over ranks, float64, uneven parts, after an earlier segment where it
is causal; outputs, final state and the gradients of inputs, earlier tokens and parameters (summed over the ranks), the
largest difference relative to the largest value. Ranks are threads of this process; a hybrid language model with its
loss also runs in processes of torch.distributed over gloo. Bytes: received by the rank that receives most, forward and
backward of one layer of width 64, batch 1, float32, 4 ranks.
--only replaces one of the three parts of the results. Writes benchmarks/results/sequence_parallel.json and .md.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from _runs import RESULTS, ROOT, write_result

from seqzoo.blocks.registry import create_mixer
from seqzoo.blocks.sequence_parallel import SharedSequence, even_lengths, run_ranks, sequence_parallel

sys.path.insert(0, str(ROOT / "tests" / "helpers"))  # the comparison that the tests make
from sequence_ranks import SHARED, SUBJECTS, on_rank, prepare, worst
from sequence_training import process

SPLITS = {2: [7, 6], 4: [2, 7, 1, 3]}
LAYERS: dict[str, dict[str, Any]] = {
    **{name: {"name": name} for name in SHARED if name not in ("softmax", "tcnca", "mega")},
    "mega": {"name": "mega", "chunk_size": 32},
    "tcnca": {"name": "tcnca", "chunk_size": 32, "kernel_size": 5, "dilation_factor": 2},
    "softmax, window 64": {"name": "softmax", "window_size": 64, "position": "rope"},
    "softmax": {"name": "softmax", "position": "rope"},
}


def equality() -> list[dict[str, Any]]:
    """A row per mixer, pattern and number of ranks: the worst of its variants."""
    rows: dict[tuple[str, str, int], dict[str, Any]] = {}
    for label, subject in SUBJECTS.items():
        prepared = prepare(subject, 13, started=subject.pattern == "causal")
        for size, lengths in SPLITS.items():
            ranks = run_ranks(size, lambda transport, n=lengths, p=prepared: on_rank(p, n, transport))
            key = label.partition("[")[0], subject.pattern, size
            row = rows.setdefault(
                key,
                {
                    "mixer": key[0],
                    "pattern": key[1],
                    "ranks": size,
                    "variants": 0,
                    "y": 0.0,
                    "state": 0.0,
                    "grads": 0.0,
                },
            )
            row["variants"] += 1
            for name, value in zip(("y", "state", "grads"), worst(prepared, ranks), strict=True):
                row[name] = max(row[name], value)
    return sorted(rows.values(), key=lambda row: (row["mixer"], row["pattern"], row["ranks"]))


def over_gloo(sizes: list[int]) -> list[dict[str, Any]]:
    """A training step of the hybrid language model by spawned processes, against one device."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory() as folder:
            torch.multiprocessing.spawn(process, (size, f"{folder}/store", folder), nprocs=size)
            found = [torch.load(Path(folder) / f"{rank}.pt") for rank in range(size)]
        rows.append({"processes": size, "difference": max(error for error, _ in found), "calls": found[0][1]})
    return rows


def volume(lengths: list[int], ranks: int = 4) -> list[dict[str, Any]]:
    """A row per layer: bytes at each length, forward and backward, and the collectives that ran."""
    rows = []
    for label, options in LAYERS.items():
        for causal in (True, False):
            torch.manual_seed(0)
            mixer = create_mixer(options, 64, causal=causal)
            row: dict[str, Any] = {"layer": label, "pattern": mixer.pattern, "bytes": {}}
            for length in lengths:
                found = run_ranks(ranks, lambda transport, m=mixer, n=length: _received(m, n, transport))
                row["bytes"][str(length)] = max(received for received, _ in found)
                row["calls"] = found[0][1]
            rows.append(row)
    return rows


def _received(mixer: torch.nn.Module, length: int, transport: Any) -> tuple[int, dict[str, int]]:
    own = copy.deepcopy(mixer)
    exchange = SharedSequence(transport, even_lengths(length, transport.size))
    with sequence_parallel(own, exchange):
        own(exchange.split(torch.randn(1, length, 64)).requires_grad_()).y.sum().backward()
    return sum(transport.received.values()), dict(transport.calls)


def table(result: dict[str, Any]) -> str:
    lines = ["# One sequence over ranks", "", "Written by `python benchmarks/sequence_parallel.py`.", ""]
    if "equality" in result:
        lines += ["## Ranks against one device", "", "float64, largest relative difference over the variants.", ""]
        lines += [
            "| mixer | pattern | ranks | variants | output | final state | gradients |",
            "|---|---|---|---|---|---|---|",
        ]
        for row in result["equality"]:
            state = f"{row['state']:.0e}" if row["pattern"] == "causal" else "-"
            numbers = f"{row['y']:.0e} | {state} | {row['grads']:.0e}"
            lines.append(f"| {row['mixer']} | {row['pattern']} | {row['ranks']} | {row['variants']} | {numbers} |")
        lines.append("")
    if result.get("gloo"):
        lines += ["## Processes over gloo", "", "A step of a hybrid language model, loss and gradients, float64.", ""]
        lines += ["| processes | largest difference | collectives of a rank |", "|---|---|---|"]
        for row in result["gloo"]:
            calls = ", ".join(f"{number} {name}" for name, number in sorted(row["calls"].items()))
            lines.append(f"| {row['processes']} | {row['difference']:.0e} | {calls} |")
        lines.append("")
    if "volume" in result:
        lengths = [str(n) for n in result["volume"][0]["bytes"]]
        lines += ["## Bytes received against the length", ""]
        lines += [
            "One layer of width 64, batch 1, float32, 4 ranks, forward and backward, the rank that receives most.",
            "",
        ]
        lines += ["| layer | pattern | " + " | ".join(lengths) + " | collectives |"]
        lines += ["|---|---|" + "---:|" * len(lengths) + "---|"]
        for row in result["volume"]:
            calls = ", ".join(f"{number} {name}" for name, number in sorted(row["calls"].items()))
            cells = " | ".join(f"{row['bytes'][n]:,}" for n in lengths)
            lines.append(f"| {row['layer']} | {row['pattern']} | {cells} | {calls} |")
        lines.append("")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--processes", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--only", choices=("equality", "volume", "gloo"), default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    result: dict[str, Any] = {}
    if options.only in (None, "volume"):
        result["volume"] = volume(options.lengths)
    if options.only in (None, "equality"):
        result["splits"] = {str(size): lengths for size, lengths in SPLITS.items()}
        result["equality"] = equality()
    if options.only in (None, "gloo"):
        result["gloo"] = over_gloo(options.processes)
    before = RESULTS / "sequence_parallel.json"
    if options.only and before.exists():
        result = {**json.loads(before.read_text()), **result}
    text = table(result)
    print(text)
    result["command"] = "python benchmarks/sequence_parallel.py"
    write_result("sequence_parallel", result).with_suffix(".md").write_text(text)


if __name__ == "__main__":
    main()
