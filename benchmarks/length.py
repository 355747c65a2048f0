"""Time and peak memory of every mixer against the length, beside softmax attention: slopes and efficiency lengths.

    python benchmarks/length.py [--lengths 1024 ... 65536] [--train] [--mixers linear mamba]

Every mixer that can be causal runs causally, the others as `self`; softmax runs both ways. One layer, batch 1, one
thread, one process that keeps freed memory (see _measure.py), the mixers in turn at each length. A mixer stops at the
length where one call would take longer than --limit seconds. The efficiency length (CAB, arXiv:2210.07661) is where the
log-log curve of a mixer crosses that of softmax. Writes benchmarks/results/length.json (length_train.json with --train:
forward and backward; length_default_allocator.json with --allocator default) and, with matplotlib, docs/pictures/.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Sequence
from typing import Any

import torch
from _measure import keep_freed_memory, peak_mib, seconds
from _runs import ROOT, write_result

import seqzoo

# Where the default of a mixer is not its linear-cost form: chunked attention, a code book of one size.
OPTIONS: dict[str, dict[str, Any]] = {"mega": {"chunk_size": 128}, "tcnca": {"chunk_size": 128}}
SLOPE_FROM = 4096  # below, the fixed costs of a call bend the curve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2**i for i in range(10, 17)])
    parser.add_argument("--mixers", nargs="+", default=None)
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=30.0, help="seconds of one call")
    parser.add_argument("--train", action="store_true", help="forward and backward instead of forward alone")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--allocator", choices=("keeping", "default"), default="keeping", help="default: glibc's own")
    options = parser.parse_args()
    if options.allocator == "keeping":
        keep_freed_memory()
    torch.set_num_threads(1)
    curves = measure(subjects(options.mixers), options)
    rows = summary(curves)
    for row in rows:
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()})
    name = "length" + "_train" * options.train + "_default_allocator" * (options.allocator == "default")
    points = [
        {"mixer": mixer, "pattern": pattern, "length": length, "ms": 1e3 * time, "mib": memory}
        for (mixer, pattern), curve in curves.items()
        for length, (time, memory) in curve.items()
    ]
    settings = {"dim": options.dim, "batch": 1, "threads": 1, "device": options.device, "train": options.train}
    settings["allocator"] = options.allocator
    print(write_result(name, {"settings": settings, "rows": rows, "points": points}))
    draw(curves, name)


def subjects(names: Sequence[str] | None) -> list[tuple[str, str]]:
    """(mixer, pattern): softmax in both patterns, then every mixer once."""
    found = [("softmax", "causal"), ("softmax", "self")]
    for name in names or seqzoo.list_mixers():
        if name != "softmax":
            found.append((name, "causal" if "causal" in seqzoo.mixer_info(name).patterns else "self"))
    return found


def measure(which: list[tuple[str, str]], options: argparse.Namespace) -> dict[tuple[str, str], dict[int, Any]]:
    """{(mixer, pattern): {length: (median seconds of a call, peak MiB)}}."""
    device = torch.device(options.device)
    curves: dict[tuple[str, str], dict[int, Any]] = {key: {} for key in which}
    torch.manual_seed(0)
    mixers = {
        (name, pattern): seqzoo.create_mixer(
            {"name": name, **OPTIONS.get(name, {})}, options.dim, causal=pattern == "causal", device=device
        ).train(options.train)
        for name, pattern in which
    }
    for length in sorted(options.lengths):
        for key, mixer in mixers.items():
            last = max(curves[key].items(), default=None)
            if last is not None and last[1][0] * 4 > options.limit:
                continue
            x = torch.randn(1, length, options.dim, device=device)

            def run(mixer: Any = mixer, x: torch.Tensor = x) -> None:
                if not options.train:
                    with torch.no_grad():
                        mixer(x)
                    return
                leaf = x.clone().requires_grad_()
                mixer(leaf).y.square().sum().backward()
                mixer.zero_grad(set_to_none=True)

            run()
            memory = peak_mib(run, device)
            rounds = options.rounds if last is None or last[1][0] < 1 else 1
            curves[key][length] = (statistics.median(seconds(run, device) for _ in range(rounds)), memory)
            time, memory = curves[key][length]
            print(f"{length:6} {key[0]:18} {key[1]:7} {1e3 * time:10.1f} ms {memory:8.1f} MiB", flush=True)
    return curves


def slope(curve: dict[int, float]) -> float | None:
    """Exponent of the growth: least squares of log y over log L from SLOPE_FROM on."""
    points = [(math.log(length), math.log(max(y, 1e-9))) for length, y in curve.items() if length >= SLOPE_FROM]
    if len(points) < 2:
        return None
    x0, y0 = (math.fsum(p[i] for p in points) / len(points) for i in (0, 1))
    return math.fsum((x - x0) * (y - y0) for x, y in points) / math.fsum((x - x0) ** 2 for x, _ in points)


def efficiency_length(curve: dict[int, float], softmax: dict[int, float]) -> str:
    """The length from which the curve lies below softmax's, between points by a straight line in log-log."""
    shared = sorted(set(curve) & set(softmax))
    gap = [math.log(max(curve[length], 1e-9)) - math.log(max(softmax[length], 1e-9)) for length in shared]
    above = [i for i, value in enumerate(gap) if value >= 0]
    if not above:
        return f"< {shared[0]}"
    last = above[-1]
    if last == len(shared) - 1:
        return f"> {shared[-1]}"
    part = gap[last] / (gap[last] - gap[last + 1])
    low, high = math.log(shared[last]), math.log(shared[last + 1])
    return str(round(math.exp(low + part * (high - low))))


def summary(curves: dict[tuple[str, str], dict[int, Any]]) -> list[dict[str, Any]]:
    rows = []
    for (name, pattern), curve in curves.items():
        time, memory = ({length: point[i] for length, point in curve.items()} for i in (0, 1))
        base = curves["softmax", pattern]
        row: dict[str, Any] = {"mixer": name, "pattern": pattern}
        for length in (4096, 16384, 65536):
            row[f"ms at {length}"] = 1e3 * time[length] if length in time else None
        for short, long in ((4096, 16384), (16384, 65536)):
            both = short in time and long in time
            row[f"{long // 1024}k / {short // 1024}k"] = time[long] / time[short] if both else None
        row["time slope"] = slope(time)
        row["MiB at 16384"] = memory.get(16384)
        row["memory slope"] = slope(memory)
        if name != "softmax":
            row["faster than softmax from"] = efficiency_length(time, {k: v[0] for k, v in base.items()})
            row["smaller than softmax from"] = efficiency_length(memory, {k: v[1] for k, v in base.items()})
        rows.append(row)
    return rows


def draw(curves: dict[tuple[str, str], dict[int, Any]], name: str) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib: no picture")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    for number, ((mixer, pattern), curve) in enumerate(sorted(curves.items())):
        for axis, index, factor in zip(axes, (0, 1), (1e3, 1), strict=True):
            style = {"linestyle": "--" if pattern == "self" else "-", "color": colours[number % len(colours)]}
            width = 2.5 if mixer == "softmax" else 1.2
            label = mixer if pattern == "causal" else f"{mixer} (self)"
            values = [factor * point[index] for point in curve.values()]
            axis.plot(list(curve), values, marker="o", markersize=3, linewidth=width, label=label, **style)
    for axis, label in zip(axes, ("CPU time of one call, ms", "peak memory of one call, MiB"), strict=True):
        axis.set(xscale="log", yscale="log", xlabel="length", ylabel=label)
        axis.set_xticks(sorted({length for curve in curves.values() for length in curve}))
        axis.xaxis.set_major_formatter(lambda value, _: f"{value / 1024:.0f}k")
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    path = ROOT / "docs" / "pictures" / f"{name}.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    print(path)


if __name__ == "__main__":
    main()
