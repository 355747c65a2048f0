"""Compile Triton kernels for a GPU that is not there: `python triton_lowering.py <module>` in a process of its own.

The module (a file path) defines `cases()`, an iterable of (label, function); each function calls public operations with
`backend="triton"` on CPU tensors. Here Triton believes in an H100/H200 (sm_90): every kernel that would be launched is
compiled down to machine code by ptxas, none is run. Prints one JSON line per compiled kernel: case, kernel, shared
memory in bytes, registers, bytes spilled to local memory. TRITON_INTERPRET must not be set.
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from seqzoo.kernels import dispatch, triton_support


class PretendedDriver:
    """What a launch asks of the active driver."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


def resources(cubin: bytes) -> dict[str, int]:
    """Registers and spilled bytes of a compiled kernel, by the cuobjdump that comes with Triton."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.is_file():
        return {}
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        said = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True).stdout
    found = {name: re.search(rf"\b{name}:(\d+)", said) for name in ("REG", "STACK", "LOCAL")}
    return {key.lower(): int(match[1]) for key, match in found.items() if match}


def main() -> None:
    driver.set_active(PretendedDriver())
    # The dispatcher then lets the Triton backends have CPU tensors, as it does for Triton's interpreter.
    dispatch.interpreted = triton_support.interpreted = lambda: True
    launch, current, seen = JITFunction.run, {"case": ""}, set()

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        made = launch(self, *args, grid=grid, warmup=True, **options)
        if made.hash not in seen:
            seen.add(made.hash)
            row = {**current, "kernel": self.fn.__name__, "shared": made.metadata.shared}
            print(json.dumps({**row, **resources(made.asm["cubin"])}), flush=True)
        return made

    JITFunction.run = compile_only  # type: ignore[method-assign]
    specification = importlib.util.spec_from_file_location("cases", sys.argv[1])
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    for current["case"], function in module.cases():
        function()


if __name__ == "__main__":
    main()
