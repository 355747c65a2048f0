"""Time and peak memory of one call."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Time of one call: CPU time on a CPU, so that a busy machine slows nothing (use one thread), else wall time."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start
    start = time.process_time()
    run()
    return time.process_time() - start


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
