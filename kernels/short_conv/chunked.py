"""The short causal convolution slab by slab, so that what a slab needs stays in cache; it is the backend for the CPU.

Saved for the backward pass are the inputs alone: it computes what the activation was applied to again.

R rows, M places, C channels, K taps, n places of a slab.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..dilated_conv import direct

SLAB = 1 << 19  # elements of a slab on a CPU, 2 MiB of float32; a GPU takes all at once
MIN_SLAB = 16


def _groups(x: Tensor) -> list[slice]:
    """Rows that are taken together: many where they are short, else one."""
    rows, length, channels = x.shape
    together = max(1, SLAB // max(1, length * channels)) if x.device.type == "cpu" else max(1, rows)
    return [slice(row, min(row + together, rows)) for row in range(0, rows, together)]


def _slabs(x: Tensor) -> list[slice]:
    """The places of a group of rows, x, slab by slab."""
    rows, length, channels = x.shape
    size = max(MIN_SLAB, SLAB // max(1, rows * channels)) if x.device.type == "cpu" else max(1, length)
    return [slice(first, min(first + size, length)) for first in range(0, length, size)]


def _source(x: Tensor, state: Tensor, at: slice, dtype: torch.dtype) -> Tensor:
    """The inputs of a slab's outputs, (R, K - 1 + n, C): those before it too."""
    past = state.shape[1]
    if at.start >= past:
        return x[:, at.start - past : at.stop].to(dtype)
    return torch.cat((state[:, at.start :], x[:, : at.stop]), 1).to(dtype)


def _sums(source: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """bias + sum_k weight_k source_{t+k}, (R, n, C), in one pass where there is one, else tap after tap."""
    length = source.shape[1] - weight.shape[0] + 1
    if direct.serves(source):
        return direct.correlate(source, weight, bias, dilation=1, shift=0, first=0, last=length)
    if bias is None:
        bias = weight.new_zeros(weight.shape[1])
    y = torch.addcmul(bias, source[:, :length], weight[0])
    for k in range(1, weight.shape[0]):
        y.addcmul_(source[:, k : k + length], weight[k])
    return y


@torch.library.custom_op("seqzoo::short_conv", mutates_args=())
def _forward(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, silu: bool) -> Tensor:
    y = x.new_empty(x.shape)
    for rows in _groups(x):
        for at in _slabs(x[rows]):
            out = _sums(_source(x[rows], state[rows], at, weight.dtype), weight, bias)
            y[rows, at] = F.silu(out, inplace=True) if silu else out
    return y


@torch.library.custom_op("seqzoo::short_conv_backward", mutates_args=())
def _backward(
    dy: Tensor, x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, state, weight and bias."""
    past, dtype = state.shape[1], weight.dtype
    dx, dstate = x.new_empty(x.shape), state.new_zeros(state.shape)
    dweight, dbias = torch.zeros_like(weight), torch.zeros_like(bias)
    turned = weight.flip(0)
    for rows in _groups(x):
        behind = dy.new_zeros(state[rows].shape, dtype=dtype)  # the gradients after the slab
        for at in reversed(_slabs(x[rows])):
            source, g = _source(x[rows], state[rows], at, dtype), dy[rows, at].to(dtype)
            if silu:
                g = torch.ops.aten.silu_backward(g, _sums(source, weight, bias))
            for k in range(past + 1):
                dweight[k] += (g * source[:, k : k + g.shape[1]]).sum((0, 1))
            dbias += g.sum((0, 1))
            g = torch.cat((g, behind), 1)
            dx[rows, at] = _sums(g, turned, None)
            behind = g[:, :past]
        if past and x.shape[1]:  # nothing before the first place has a gradient of its own
            dstate[rows] = _sums(torch.cat((torch.zeros_like(behind), behind), 1), turned, None)
    return dx, dstate, dweight, dbias


@_forward.register_fake
def _(x, state, weight, bias, silu):
    return x.new_empty(x.shape)


@_backward.register_fake
def _(dy, x, state, weight, bias, silu):
    return tuple(t.new_empty(t.shape) for t in (x, state, weight, bias))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.silu = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(dy, *ctx.saved_tensors, ctx.silu), None)


_forward.register_autograd(_gradient, setup_context=_setup_context)


def chunked_short_conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, *, silu: bool) -> Tensor:
    """`naive_short_conv` without tensors of the length beside input, output and their gradients."""
    return _forward(x, state, weight, bias, silu)
