"""What the Triton backends share: whether they can run here, and their import on first use.

Triton itself reads TRITON_INTERPRET=1, which must be set before it is imported; its kernels then run, slowly, on CPU
tensors. `auto` never takes such a run: only a backend asked for by name is interpreted.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

import torch

from .tracing import constant_result


def interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")


@constant_result
def unusable() -> str | None:
    """Why no Triton kernel can run in this process, or None."""
    if importlib.util.find_spec("triton") is None:
        return "needs the package triton"
    if not torch.cuda.is_available() and not interpreted():
        return "needs a CUDA device (or TRITON_INTERPRET=1, for tests)"
    return None


def lazily(module: str, name: str, package: str) -> Callable[..., Any]:
    """The function `name` of a module that is imported when it is first called: importing triton takes a second.

    module: relative to `package`, for example ".fused" and `__name__`.
    """

    full = importlib.util.resolve_name(module, package)

    @constant_result
    def load() -> bool:
        importlib.import_module(full)
        return True

    def run(*args: Any, **options: Any) -> Any:
        load()  # a compiler that traces this runs it once; it could not trace an import by name
        return getattr(sys.modules[full], name)(*args, **options)

    run.__name__ = run.__qualname__ = name
    return run
