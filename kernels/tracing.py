"""What torch.compile is told about functions, without importing the compiler, which takes more than a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

FunctionT = TypeVar("FunctionT", bound=Callable[..., object])


def constant_result(function: FunctionT) -> FunctionT:
    """`torch.compiler.assume_constant_result`: a compiler that traces a call runs it once and takes its value."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
