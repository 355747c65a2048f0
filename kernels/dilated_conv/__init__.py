"""Dilated convolution over time, causal or centred, depthwise or grouped, with the inputs before the first carried."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import choose_backend, register_backend
from ..triton_support import lazily, unusable
from .naive import dilated_conv_naive
from .portable import dilated_conv_portable
from .shifted import dilated_conv_shifted

__all__ = ["dilated_conv"]

register_backend(
    "dilated_conv",
    "triton",
    lazily(".fused", "fused_dilated_conv", __name__),
    note="depthwise: one pass, the window in registers",
    dtypes=(torch.float32,),  # of the sums; x may be narrower
    devices=("cuda",),
    limits={"taps": 32},
    interpretable=True,
    probe=unusable,
)
register_backend(
    "dilated_conv", "shifted", dilated_conv_shifted, note="a shifted multiply-add per tap", features=("grouped",)
)
register_backend("dilated_conv", "naive", dilated_conv_naive, note="the formula, token by token", features=("grouped",))
register_backend(
    "dilated_conv", "portable", dilated_conv_portable, note="torch's own", features=("grouped",), portable=True
)


def dilated_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    dilation: int = 1,
    causal: bool = True,
    lengths: Tensor | None = None,
    tail: Tensor | None = None,
    return_tail: bool = False,
    backend: Literal["auto", "triton", "naive", "shifted"] = "auto",
) -> tuple[Tensor, Tensor | None]:
    """y_t = bias + sum_k W_k x_{t - shift_k}, shift_k = (K - 1 - k) dilation, less (K - 1) / 2 dilation if not causal.

    x: (B, L, I). weight: (O, I / groups, K), as `nn.Conv1d` has it; the groups follow from its shape. bias: (O,).
    lengths: int64 (B,), real tokens per row, which stand first; what comes after counts as zero.
    tail: (B, P, I) with P = (K - 1) dilation, the inputs before the first, None for zeros. causal only.
    return_tail: return the last P inputs of each row too, in the dtype of `tail` (of x without one).
    Returns y (B, L, O), the same length as x, in its dtype, and the tail or None.

    Sums are float32 (float64 for float64), under autocast too. No output depends, not even by rounding, on an input
    that its taps do not read. Raises ValueError for shapes that do not go together and an even K with causal=False.
    """
    if x.dim() != 3 or weight.dim() != 3 or weight.shape[1] < 1 or x.shape[2] % weight.shape[1]:
        raise ValueError(f"x {tuple(x.shape)} and weight {tuple(weight.shape)} are not (B, L, I), (O, I / groups, K)")
    batch, length, dim = x.shape
    out, per_group, size = weight.shape
    if out % (dim // per_group):
        raise ValueError(f"weight {tuple(weight.shape)}: {dim // per_group} groups do not divide {out} channels out")
    if dilation < 1:
        raise ValueError(f"dilation={dilation} must be at least 1")
    if not causal and size % 2 == 0:
        raise ValueError(f"a centred convolution needs an odd number of taps, got {size}; nearest: {size + 1}")
    if not causal and (tail is not None or return_tail):
        raise ValueError("a centred convolution looks ahead and carries no tail; give causal=True")
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"bias has shape {tuple(bias.shape)}, expected ({out},)")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected ({batch},)")
    past = (size - 1) * dilation
    if tail is not None and tail.shape != (batch, past, dim):
        raise ValueError(f"tail has shape {tuple(tail.shape)}, expected {(batch, past, dim)}")
    wide = torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)
    choice = choose_backend(
        "dilated_conv",
        backend,
        dtype=wide,
        device=x.device,
        sizes={"taps": size},
        grouped=not (per_group == 1 and dim == out),
    )
    if lengths is not None:
        beyond = torch.arange(length, device=x.device) >= lengths.unsqueeze(1)
        x = x.masked_fill(beyond.unsqueeze(2), 0)
    before = x.new_zeros(batch, 0, dim) if tail is None else tail
    with torch.autocast(x.device.type, enabled=False):
        source = x if choice.name == "triton" else x.to(wide)  # that one reads x as it is
        offset = None if bias is None else bias.to(wide)
        if length == 0:
            y = x.new_zeros(batch, 0, out)
        else:
            y = choice.run(source, weight.to(wide), offset, before.to(wide), dilation, causal)
    y = y.to(x.dtype)
    if not return_tail:
        return y, None
    full = F.pad(x, (0, 0, past, 0)) if tail is None else torch.cat((tail, x.to(tail.dtype)), 1)
    if lengths is None:
        return y, full[:, length:].clone()  # a copy: a view would keep the whole row alive
    place = lengths.unsqueeze(1) + torch.arange(past, device=x.device)
    return y, full.gather(1, place.unsqueeze(2).expand(-1, -1, dim))
