"""The depthwise convolution over time in Triton: the custom operators, also of `short_conv`, and their launches."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .fused_kernels import conv_gradients, conv_outputs

GROUP = 8  # tokens loaded at once
PARTS = 4096  # warps that keep a large GPU busy


class Launch(NamedTuple):
    """block: channels of a program. piece, pieces: tokens of one, within a class, and how many cover the class.

    together: classes that a program of the backward pass takes, so that its sums of the taps' gradients stay few.
    """

    block: int
    piece: int
    pieces: int
    together: int


def plan(batch: int, length: int, channels: int, taps: int, dilation: int) -> Launch:
    """As many channels as the registers hold the windows of, and pieces that are long beside the K - 1 tokens around.

    Channels are halved, and pieces too, where there are few programs.
    """
    block = 128 if taps <= 4 else 64 if taps <= 8 else 32
    block = min(block, max(32, triton.next_power_of_2(channels)))
    places = max(1, triton.cdiv(length, dilation))
    shortest = max(32, 4 * triton.next_power_of_2(taps))
    piece = min(256, max(shortest, triton.next_power_of_2(places)))

    def parts() -> int:
        return batch * min(dilation, length) * triton.cdiv(places, piece) * triton.cdiv(channels, block)

    while piece > shortest and parts() < PARTS:
        piece //= 2
    if block > 32 and parts() < PARTS // 4:
        block //= 2
    together = min(dilation, max(1, shortest // places))
    return Launch(block, piece, triton.cdiv(places, piece), together)


@torch.library.custom_op("seqzoo::depthwise_conv_triton", mutates_args=())
def _forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, dilation: int, ahead: int, silu: bool
) -> Tensor:
    """y (B, L, C) like x. weight: (K, C). tail: (B, P, C), P = 0 without one. ahead: taps ahead of a token."""
    (batch, length, channels), taps = x.shape, weight.shape[0]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    if y.numel() == 0:
        return y
    block, piece, pieces, _ = plan(batch, length, channels, taps, dilation)
    grid = (batch * dilation * pieces * triton.cdiv(channels, block),)
    conv_outputs[grid](
        x.contiguous(), *_wide(weight, bias), tail.contiguous(), y,
        length, tail.shape[1], dilation, pieces, piece, C=channels, BC=block, K=taps, T=GROUP, A=ahead,
        SILU=silu, BIAS=bias is not None, TAIL=tail.shape[1] > 0, num_warps=1,
    )  # fmt: skip
    return y


@torch.library.custom_op("seqzoo::depthwise_conv_triton_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, dilation: int, ahead: int, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, weight, bias (zeros (C,) without one) and tail."""
    (batch, length, channels), taps = x.shape, weight.shape[0]
    if x.numel() == 0:
        return torch.zeros_like(x), torch.zeros_like(weight), weight.new_zeros(channels), torch.zeros_like(tail)
    dx, dtail = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, tail))
    block, piece, pieces, together = plan(batch, length, channels, taps, dilation)
    parts = batch * triton.cdiv(dilation, together) * pieces
    dweight = torch.empty(parts, taps, channels, device=x.device, dtype=torch.float32)
    dbias = torch.empty(parts, channels, device=x.device, dtype=torch.float32)
    conv_gradients[(parts * triton.cdiv(channels, block),)](
        dy.contiguous(), x.contiguous(), *_wide(weight, bias), tail.contiguous(), dx, dtail, dweight, dbias,
        length, tail.shape[1], dilation, pieces, piece, together,
        C=channels, BC=block, K=taps, T=GROUP, A=ahead, SILU=silu, BIAS=bias is not None, TAIL=tail.shape[1] > 0,
        num_warps=1,
    )  # fmt: skip
    like = weight.dtype if bias is None else bias.dtype
    return dx, dweight.sum(0).to(weight.dtype), dbias.sum(0).to(like), dtail


def _wide(weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    return weight.float().contiguous(), None if bias is None else bias.float().contiguous()


@_forward.register_fake
def _(x, weight, bias, tail, dilation, ahead, silu):
    return x.new_empty(x.shape)


@_backward.register_fake
def _(dy, x, weight, bias, tail, dilation, ahead, silu):
    dbias = (weight if bias is None else bias).new_empty(x.shape[2])
    return x.new_empty(x.shape), weight.new_empty(weight.shape), dbias, tail.new_empty(tail.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.dilation, ctx.ahead, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, bias, tail = ctx.saved_tensors
    dx, dweight, dbias, dtail = _backward(dy, x, weight, bias, tail, ctx.dilation, ctx.ahead, ctx.silu)
    return dx, dweight, None if bias is None else dbias, dtail, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)


def depthwise_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, *, dilation: int, ahead: int, silu: bool
) -> Tensor:
    """y_t = act(bias + sum_k weight_k x_{t - (K - 1 - ahead - k) dilation}) per channel; weight: (K, C)."""
    return _forward(x, weight, bias, tail, dilation, ahead, silu)


def fused_dilated_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, dilation: int, causal: bool
) -> Tensor:
    """`dilated_conv` of a depthwise weight (C, 1, K) with checked arguments, x in its own dtype."""
    ahead = 0 if causal else (weight.shape[2] - 1) // 2
    return depthwise_conv(x, weight[:, 0].t(), bias, tail, dilation=dilation, ahead=ahead, silu=False)
