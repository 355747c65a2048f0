"""The dilated convolution by its formula, tap by tap and token by token. Oracle only."""

from __future__ import annotations

import torch
from torch import Tensor


def tap_shifts(kernel_size: int, dilation: int, causal: bool) -> list[int]:
    """How far back each tap reads: tap k of the weight reads x_{t - shift_k}; the last tap reads furthest ahead."""
    ahead = 0 if causal else (kernel_size - 1) // 2
    return [(kernel_size - 1 - ahead - k) * dilation for k in range(kernel_size)]


def dilated_conv_naive(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, dilation: int, causal: bool
) -> Tensor:
    """`dilated_conv` with checked arguments: x (B, L, I), zeros beyond lengths; tail (B, P, I), P = 0 without one."""
    batch, length, dim = x.shape
    out, per_group, size = weight.shape
    groups = dim // per_group
    past = tail.shape[1]
    source = torch.cat((tail, x), 1).view(batch, past + length, groups, per_group)
    kernel = weight.view(groups, out // groups, per_group, size)
    tokens = []
    for t in range(length):
        y = x.new_zeros(batch, groups, out // groups)
        for k, shift in enumerate(tap_shifts(size, dilation, causal)):
            place = past + t - shift
            if 0 <= place < past + length:
                y = y + torch.einsum("bgi,goi->bgo", source[:, place], kernel[..., k])
        tokens.append(y.flatten(1) if bias is None else y.flatten(1) + bias)
    return torch.stack(tokens, 1)
