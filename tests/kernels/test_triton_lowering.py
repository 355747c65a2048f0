"""Every Triton kernel compiles for a GPU, here, where there is none: forwards and backwards, in several dtypes.

`lowering/<operation>.py` lists the calls; what the interpreter accepts, the compiler may not.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
SHARED_MEMORY = 232_448  # bytes that one block may have on an H100 or H200


@pytest.mark.parametrize("operation", sorted(path.stem for path in (HERE / "lowering").glob("*.py")))
def test_kernels_compile_for_a_gpu(operation):
    pytest.importorskip("triton", reason="needs the package triton")
    script = HERE.parent / "helpers" / "triton_lowering.py"
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, script, HERE / "lowering" / f"{operation}.py"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    kernels = [json.loads(line) for line in done.stdout.splitlines()]
    assert kernels, "no kernel was launched"
    for kernel in kernels:
        assert kernel["shared"] <= SHARED_MEMORY, kernel


def test_every_triton_backend_is_compiled_here():
    from seqzoo.kernels.dispatch import backends

    compiled = {path.stem for path in (HERE / "lowering").glob("*.py")}
    assert {op for op, names in backends().items() if "triton" in names} == compiled
