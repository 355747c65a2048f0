"""Time and peak memory of one call, the roofs of a machine, and how far two outputs are apart."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def keep_freed_memory() -> None:
    """Start this program again with an allocator that keeps what is freed, unless it does already (glibc only).

    By default glibc hands blocks above 32 MiB back to the system, which clears them page by page when they are next
    asked for: a jump where tensors pass that size, half the time of some calls, and no property of what is measured.
    """
    wanted = {"MALLOC_MMAP_THRESHOLD_": str(4 << 30), "MALLOC_TRIM_THRESHOLD_": str(8 << 30)}
    if sys.platform == "linux" and not wanted.keys() <= os.environ.keys():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**wanted, **os.environ})


def seconds(run: Callable[[], Any], device: torch.device, *, wall: bool = False, calls: int = 1) -> float:
    """Time of one call: CPU time on a CPU, so that a busy machine slows nothing (use one thread), else wall time.

    wall: wall time on a CPU too, for more than one thread. On a GPU, time between two events of the device around
    `calls` calls in a row: the next is launched while one runs, as in training.
    """
    if device.type == "cuda":
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        for _ in range(calls):
            run()
        stop.record()
        torch.cuda.synchronize()
        return start.elapsed_time(stop) * 1e-3 / calls
    clock = time.perf_counter if wall else time.process_time
    begin = clock()
    run()
    return clock() - begin


def peak_mib(run: Callable[[], Any], device: torch.device) -> float:
    """Growth of the peak memory over one call, in MiB; on a CPU the resident set of the process (Linux), else nan."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory kept by malloc would hide growth
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status("VmRSS")
    except OSError:
        return float("nan")
    run()
    return (status("VmHWM") - before) / 1024


def difference(found: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest root-mean-square difference of two tensors, relative to the expected one; inf for other shapes."""
    if [t.shape for t in found] != [t.shape for t in expected]:
        return float("inf")
    worst = 0.0
    for a, b in zip(found, expected, strict=True):
        a, b = a.detach().to(torch.float32), b.detach().to(torch.float32)
        error = float((a - b).norm() / b.norm().clamp(min=1e-30))
        worst = max(worst, error if error == error else float("inf"))
    return worst


def _fastest(run: Callable[[], Any], device: torch.device, wall: bool, rounds: int) -> float:
    run()
    return min(seconds(run, device, wall=wall) for _ in range(rounds))


def roofs(device: torch.device, *, tiny: bool = False) -> dict[str, float]:
    """What the machine reaches now, with the threads that torch has: copy bandwidth (read and written bytes, GB/s), the
    rate of a matrix product (GFLOP/s; float32 on a CPU, bfloat16 on a GPU) and of torch.exp (billions a second).

    The best of a few rounds: a roof that noise lowers would flatter. torch.exp is not the fastest exponential there
    is: compiled code can pass that roof.
    """
    gpu = device.type == "cuda"
    wall = torch.get_num_threads() > 1
    size, width, count = (
        (1 << 20, 64, 1 << 12) if tiny else ((1 << 30, 8192, 1 << 26) if gpu else (1 << 28, 1536, 1 << 16))
    )
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    matrix = torch.randn(width, width, device=device, dtype=torch.bfloat16 if gpu else torch.float32)
    half = matrix.to(torch.bfloat16)
    numbers = torch.linspace(-8, 0, count, device=device)
    powers = torch.empty_like(numbers)
    repeats = 1 if gpu or tiny else 64  # of a call that is short beside the clock

    def exponentials() -> None:
        for _ in range(repeats):
            torch.exp(numbers, out=powers)

    rounds = 2 if tiny else 5
    return {
        "copy GB/s": 2 * size / _fastest(lambda: target.copy_(source), device, wall, rounds) / 1e9,
        "product GFLOP/s": 2 * width**3 / _fastest(lambda: matrix @ matrix, device, wall, rounds) / 1e9,
        "bf16 product GFLOP/s": 2 * width**3 / _fastest(lambda: half @ half, device, wall, rounds) / 1e9,
        "exp G/s": repeats * count / _fastest(exponentials, device, wall, rounds) / 1e9,
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """The processor, its cores and memory, and the GPU."""
    found: dict[str, Any] = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        model = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        flags = next(line for line in lines if line.startswith("flags"))
        wide = [name for name in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {name}" in flags]
        found["processor"] = f"{model} ({', '.join(wide)})" if wide else model
        found["memory GiB"] = round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30)
    except (OSError, StopIteration, ValueError):
        pass
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def versions(*packages: str) -> dict[str, str | None]:
    """Of Python and the packages, None for one that is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "torch": torch.__version__}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
