"""Short causal convolution: a depthwise one of a few taps, with the inputs before the first carried over."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose_backend, register_backend
from ..triton_support import lazily, unusable
from .chunked import chunked_short_conv
from .naive import naive_short_conv

__all__ = ["short_conv"]

OP = "short_conv"
register_backend(
    OP,
    "triton",
    lazily(".fused", "fused_short_conv", __name__),
    note="one pass, the window in registers",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    devices=("cuda",),
    features=("state",),
    limits={"taps": 16},
    interpretable=True,
    probe=unusable,
)
register_backend(OP, "chunked", chunked_short_conv, note="slabs that stay in cache", features=("state",))
register_backend(OP, "naive", naive_short_conv, note="a sum of shifted inputs", features=("state",), portable=True)


def short_conv(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    silu: bool = False,
    initial_state: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y_t = act(bias + sum_k weight_k x_{t-K+1+k}) for each channel, act the silu or nothing.

    x: (R, M, C). weight: (C, K). bias: (C,). initial_state: (R, K - 1, C), the inputs before the first, None for
    zeros. The taps are added one after another, in float32 (float64 if x is), so that no output knows of later inputs,
    not even by rounding. Returns (R, M, C) in the dtype of x. backend: "auto", "triton", "chunked" or "naive"
    (which also differentiates twice). Raises ValueError for shapes or a backend that cannot serve.
    """
    if x.dim() != 3 or weight.dim() != 2 or weight.shape[0] != x.shape[2] or weight.shape[1] < 1:
        raise ValueError(f"{OP}: x {tuple(x.shape)}, weight {tuple(weight.shape)} must be (R, M, C) and (C, K)")
    rows, _, channels = x.shape
    past = weight.shape[1] - 1
    if bias is not None and bias.shape != (channels,):
        raise ValueError(f"{OP}: bias has shape {tuple(bias.shape)}, expected {(channels,)}")
    if initial_state is not None and initial_state.shape != (rows, past, channels):
        raise ValueError(
            f"{OP}: initial_state has shape {tuple(initial_state.shape)}, expected {(rows, past, channels)}"
        )
    choice = choose_backend(
        OP, backend, dtype=x.dtype, device=x.device, sizes={"taps": past + 1}, state=initial_state is not None
    )
    wide = torch.promote_types(x.dtype, torch.float32)
    state = x.new_zeros(rows, past, channels) if initial_state is None else initial_state.to(x.dtype)
    offset = torch.zeros(channels, device=x.device, dtype=wide) if bias is None else bias.to(wide)
    return choice.run(x, state, weight.t().to(wide), offset, silu=silu).to(x.dtype)
