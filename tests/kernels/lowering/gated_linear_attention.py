"""Calls of gated_linear_attention whose Triton kernels are compiled without a GPU, forwards and backwards."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from seqzoo.kernels.gated_linear_attention import gated_linear_attention


def call(dtype: torch.dtype, form: str, key: int, value: int, heads: int, groups: int, length: int = 2048) -> None:
    """Few heads make a row long enough to be split into segments."""
    q, k = (torch.zeros(1, length, groups, key, dtype=dtype, requires_grad=True) for _ in range(2))
    v = torch.zeros(1, length, heads, value, dtype=dtype, requires_grad=True)
    shape = {"constant": (heads,), "head": (1, length, heads), "channel": (1, length, heads, key)}[form]
    decay = torch.zeros(shape, requires_grad=True)
    o, state = gated_linear_attention(q, k, v, decay, return_state=True, backend="triton")
    (o.float().sum() + state.sum()).backward()


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype, form, key, value, heads, groups in (
        (torch.bfloat16, "constant", 128, 128, 2, 2),
        (torch.bfloat16, "head", 128, 64, 16, 1),
        (torch.bfloat16, "channel", 64, 64, 2, 2),
        (torch.float32, "head", 128, 64, 200, 200),
        (torch.float32, "channel", 256, 60, 2, 2),
    ):
        label = f"{dtype} {form} {key} {value}, {heads} heads of {groups} groups"
        yield label, partial(call, dtype, form, key, value, heads, groups)
    yield "one token", partial(call, torch.bfloat16, "head", 128, 64, 80, 1, 1)
