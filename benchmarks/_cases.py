"""A case of a benchmark: several sides with the same inputs, compared, timed in turn, and set against a bar."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from _measure import difference, seconds
from torch import Tensor

Run = Callable[[], Sequence[Tensor]]


class Missing(Exception):
    """A side that cannot run here; the message says why."""


@dataclass(frozen=True)
class Work:
    """What a case has to do at least, whatever computes it: floating-point operations, bytes moved, exponentials."""

    flops: float = 0.0
    bytes: float = 0.0
    exps: float = 0.0

    def seconds(self, roofs: dict[str, float], product: str) -> float:
        """Of a machine that does the three at once, each at its measured rate."""
        rates = (product, self.flops), ("copy GB/s", self.bytes), ("exp G/s", self.exps)
        return max(amount / (roofs[name] * 1e9) for name, amount in rates)


@dataclass
class Sides:
    """The sides of one case, built: each a function without arguments that returns its outputs, or why it is missing.

    pairs: two functions whose outputs must agree, by name of the side; by default every side agrees with the first.
    work: of our side. facts: further entries of the rows. tolerance: of `difference`.
    """

    runs: dict[str, Run | Missing]
    work: Work = Work()
    pairs: dict[str, tuple[Run, Run]] | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 1e-4


@dataclass(frozen=True)
class Bar:
    """ours / peer must be at most `limit` (None: shown only).

    of: "time"; "memory", growth of the peak, where a peer given in bytes is a size to compare with; or "roof": our
    part of the roof must be at least `limit`. fastest: the sides of which the fastest is the peer. product: the rate,
    among the roofs, of our matrix products.
    """

    ours: str
    peer: str
    limit: float | None = None
    of: str = "time"
    peer_bytes: int | None = None
    product: str = "product GFLOP/s"
    fastest: tuple[str, ...] = ()


@dataclass(frozen=True)
class Case:
    """One interleaved run. build: makes the sides for a length. quick: whether a quick run has it. threads: of torch;
    with more than one, wall time counts."""

    operation: str
    case: str
    length: int
    passes: str
    bars: tuple[Bar, ...]
    build: Callable[[int], Sides]
    quick: bool = False
    threads: int = 1

    @property
    def key(self) -> str:
        return f"{self.operation} | {self.case} | {self.length} | {self.passes}"


def attempt(build: Callable[[], Run]) -> Run | Missing:
    """The run that `build` makes, or why it cannot be made: a package or a device that is missing."""
    try:
        return build()
    except Missing as error:
        return error
    except ImportError as error:
        return Missing(f"{error.name or error} is not installed")
    except Exception as error:
        return Missing(reason(error))


def reason(error: Exception) -> str:
    """The kind and the first line of an error."""
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"


def forward(function: Callable[..., Tensor], tensors: Sequence[Tensor]) -> Run:
    """[output], without gradients."""

    def run() -> list[Tensor]:
        with torch.no_grad():
            return [function(*tensors)]

    return run


def training(function: Callable[..., Tensor], tensors: Sequence[Tensor], leaves: Iterable[int] | None = None) -> Run:
    """[output, gradient of each leaf] for one random cotangent. leaves: places of the inputs that get a gradient."""
    wanted = set(range(len(tensors)) if leaves is None else leaves)
    inputs = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(tensors)]
    with torch.no_grad():
        shape = function(*tensors)
    generator = torch.Generator(shape.device).manual_seed(1)
    cotangent = torch.randn(shape.shape, generator=generator, device=shape.device, dtype=shape.dtype)
    del shape

    def run() -> list[Tensor]:
        output = function(*inputs)
        return [output.detach(), *torch.autograd.grad(output, [t for t in inputs if t.requires_grad], cotangent)]

    return run


def either(
    backward: bool, function: Callable[..., Tensor], tensors: Sequence[Tensor], leaves: Iterable[int] | None = None
) -> Run:
    return training(function, tensors, leaves) if backward else forward(function, tensors)


def measure(
    case: Case,
    device: torch.device,
    roofs: dict[str, float],
    *,
    rounds: int = 7,
    slow: float = 3.0,
    memory: Callable[[str], float] | None = None,
) -> list[dict[str, Any]]:
    """A row for each bar of the case.

    Sides run in turn, round by round; a case one of whose calls takes more than `slow` seconds gets three rounds, and
    its rows say so. memory: peak MiB of a side, for the bars on memory. Sides whose outputs differ are an error, with
    the difference and without times.
    """
    torch.set_num_threads(case.threads)
    try:
        sides = case.build(case.length)
    except Exception as error:
        empty = Sides({bar.ours: Missing(reason(error)) for bar in case.bars})
        rows = [_row(case, bar, empty, {}, {}, {}, {bar.ours: reason(error)}, roofs) for bar in case.bars]
        return [{**row, "error": reason(error), "met": False} for row in rows]
    missing = {name: str(run) for name, run in sides.runs.items() if isinstance(run, Missing)}
    runs = {name: run for name, run in sides.runs.items() if not isinstance(run, Missing)}
    apart, longest = _compare(runs, sides, slow, device, missing)
    wall = case.threads > 1
    timed = any(bar.of != "memory" for bar in case.bars)
    number = rounds if longest <= slow else min(rounds, 3)
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    used = 0.0
    calls = min(50, math.ceil(0.01 / longest)) if longest else 1  # 10 ms, on a GPU
    if timed and runs and not any(apart.get(name, 0.0) > sides.tolerance for name in runs):
        begin = time.perf_counter(), time.process_time()
        for i in range(number):
            for name in names[i % len(names) :] + names[: i % len(names)]:
                times[name].append(seconds(runs[name], device, wall=wall, calls=calls))
        used = (time.process_time() - begin[1]) / (time.perf_counter() - begin[0])
    peaks = {
        name: memory(name)
        for name in dict.fromkeys(n for bar in case.bars if bar.of == "memory" for n in (bar.ours, bar.peer))
        if memory is not None and name in runs
    }
    rows = []
    for bar in case.bars:
        row = _row(case, bar, sides, apart, times, peaks, missing, roofs)
        if bar.ours in missing and not isinstance(sides.runs[bar.ours], Missing):
            row["error"], row["met"] = missing[bar.ours], False  # ours was there and failed
        if bar.of != "memory" and times.get(bar.ours):
            row["rounds"] = number
            if wall:
                busy = f"wall time, {used:.1f} of {case.threads} threads busy"
                row["note"] = f"{row['note']}; {busy}" if row["note"] else busy
                if used < 0.9 * case.threads and row["met"] is not None:
                    row["met"], row["note"] = None, f"{row['note']}: void, the machine was busy"
        rows.append(row)
    return rows


def _compare(
    runs: dict[str, Run], sides: Sides, slow: float, device: torch.device, missing: dict[str, str]
) -> tuple[dict[str, float], float]:
    """{side: difference}, and the seconds of the longest call. A side that raises becomes a missing one."""
    apart: dict[str, float] = {}
    longest, reference = 0.0, None
    for name, run in list(runs.items()):
        try:
            found, took = _timed(run)
            if took <= slow or device.type == "cuda":  # a GPU's first call compiles and tunes
                found, took = _timed(run)
        except Exception as error:
            missing[name] = reason(error)
            del runs[name]
            continue
        longest = max(longest, took)
        if sides.pairs is None and reference is not None:
            apart[name] = difference(found, reference)
        elif sides.pairs is None:
            reference = found
    for name, (ours, expected) in (sides.pairs or {}).items():
        if name in runs:
            apart[name] = difference(ours(), expected())
    return apart, longest


def _timed(run: Run) -> tuple[Sequence[Tensor], float]:
    begin = time.process_time()
    return run(), time.process_time() - begin


def _row(
    case: Case,
    bar: Bar,
    sides: Sides,
    apart: dict[str, float],
    times: dict[str, list[float]],
    peaks: dict[str, float],
    missing: dict[str, str],
    roofs: dict[str, float],
) -> dict[str, Any]:
    middle = {name: 1e3 * statistics.median(values) for name, values in times.items() if values}
    rivals = [name for name in bar.fastest or (bar.peer,) if name in middle]
    peer = min(rivals, key=lambda name: middle[name], default=bar.peer)
    involved = bar.ours, *(bar.fastest or (bar.peer,))
    differs = {name: apart[name] for name in involved if name in apart}
    row: dict[str, Any] = {
        "operation": case.operation,
        "case": case.case,
        "length": case.length,
        "pass": case.passes,
        "ours": bar.ours,
        "peer": bar.peer,
        "of": bar.of,
        "ours ms": None if bar.of == "memory" else middle.get(bar.ours),
        "peer ms": middle.get(peer) if bar.of == "time" else None,
        "ours MiB": peaks.get(bar.ours) if bar.of == "memory" else None,
        "peer MiB": None,
        "ratio": None,
        "of minima": None,
        "bar": bar.limit,
        "met": None,
        "of roof": None,
        "difference": max(differs.values(), default=None),  # type: ignore[type-var]
        "rounds": None,
        "note": None,
        **sides.facts,
    }
    notes = [f"not run: {name}: {missing[name]}" for name in involved if name in missing]
    if bar.fastest and rivals:
        notes.insert(0, f"the fastest: {peer}")
    row["note"] = "; ".join(notes) or None
    wrong = [name for name, value in differs.items() if value > sides.tolerance]
    if wrong:
        row["error"] = f"outputs differ by {max(differs.values()):.1e}, more than {sides.tolerance:.0e}"
        row["met"] = False
        return row
    if bar.ours in middle and sides.work != Work():
        row["of roof"] = 1e3 * sides.work.seconds(roofs, bar.product) / middle[bar.ours]
    if bar.of == "roof":
        row["met"] = None if row["of roof"] is None or bar.limit is None else row["of roof"] >= bar.limit
        return row
    if bar.of == "memory":
        row["peer MiB"] = peaks.get(bar.peer) if bar.peer_bytes is None else bar.peer_bytes / 2**20
        pair = row["ours MiB"], row["peer MiB"]
    else:
        pair = row["ours ms"], row["peer ms"]
        if None not in pair:
            row["of minima"] = min(times[bar.ours]) / min(times[peer])
    if None not in pair and pair[1] > 0:
        row["ratio"] = pair[0] / pair[1]
        row["met"] = None if bar.limit is None else row["ratio"] <= bar.limit
    if len(set(sides.facts.get("state bytes", ()))) > 1:  # a state that grows misses whatever its time
        row["met"] = False
    return row
