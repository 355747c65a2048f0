"""The short causal convolution in Triton: `dilated_conv`'s depthwise kernels, undilated, with the silu fused."""

from __future__ import annotations

from torch import Tensor

from ..dilated_conv.fused import depthwise_conv


def fused_short_conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, *, silu: bool) -> Tensor:
    """`naive_short_conv`; no second derivatives."""
    return depthwise_conv(x, weight, bias, state, dilation=1, ahead=0, silu=silu)
