"""Calls of linear_attention whose Triton kernels are compiled without a GPU, forwards and backwards."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from seqzoo.kernels.linear_attention import linear_attention


def call(dtype: torch.dtype, width: int, length: int, causal: bool, normalize: bool, heads: int) -> None:
    """Few heads make a row long enough to be split into segments."""
    q, k, v = (torch.zeros(1, length, heads, width, dtype=dtype, requires_grad=True) for _ in range(3))
    options = {"causal": causal, "normalize": normalize, "return_state": True, "backend": "triton"}
    o, state = linear_attention(q, k, v, **options)
    (o.float().sum() + state.s.sum()).backward()


def cases() -> Iterator[tuple[str, Callable[[], None]]]:
    for dtype, width, heads, causal, normalize in (
        (torch.bfloat16, 64, 2, True, True),
        (torch.bfloat16, 128, 2, True, True),
        (torch.bfloat16, 256, 100, True, True),
        (torch.bfloat16, 128, 2, False, True),
        (torch.float32, 64, 200, True, True),
        (torch.float32, 128, 200, True, True),
        (torch.float32, 256, 100, True, True),
    ):
        label = f"{dtype} {width}{' causal' if causal else ''}{' normalized' if normalize else ''}, {heads} heads"
        yield label, partial(call, dtype, width, 2048, causal, normalize, heads)
    yield "one token", partial(call, torch.bfloat16, 128, 1, True, True, 16)
