"""The dilated convolution as a sum of shifted products, one per tap, over blocks of tokens that stay in cache.

Taps that reach beyond the sequence cost nothing. A depthwise tap is a multiply-add of (B, n, D), a grouped one a matrix
product of (G B, n, I / G); in float32 on a CPU all depthwise taps are one pass (direct.py). Forward and backward are
custom operators, so that a compiler sees one node each; autograd through the slices would fill a tensor of x's size per
tap.

Letters: B batch, L tokens, I channels in, O channels out, G groups, K taps, P tokens of the tail.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from . import direct
from .naive import tap_shifts

# Numbers of an output block: 1 MiB of float32, which with its input stays in a cache through all taps.
BLOCK = 262144


def _pieces(length: int, past: int, shifts: list[int], block: int) -> Iterator[tuple[int, bool, slice, slice]]:
    """(tap, whether it reads the tail, tokens written, tokens read), block by block."""
    for start in range(0, length, block):
        stop = min(start + block, length)
        for k, shift in enumerate(shifts):
            low, high = max(start, shift), min(stop, length + shift)
            if low < high:
                yield k, False, slice(low, high), slice(low - shift, high - shift)
            if past and shift > start:
                end = min(stop, shift)
                yield k, True, slice(start, end), slice(past + start - shift, past + end - shift)


def _layout(x: Tensor, groups: int) -> Tensor:
    """(B, L, C) as it is for depthwise weights, else with the groups as further rows, (G B, L, C / G)."""
    return x if groups == 0 else x.unflatten(2, (groups, -1)).permute(2, 0, 1, 3).flatten(0, 1)


def _restore(y: Tensor, groups: int) -> Tensor:
    return y if groups == 0 else y.unflatten(0, (groups, -1)).permute(1, 2, 0, 3).flatten(2)


def _taps(weight: Tensor, groups: int, batch: int) -> list[Tensor]:
    """The weight of each tap: (D,) for depthwise ones, else (G B, I / G, O / G)."""
    if groups == 0:
        return list(weight[:, 0].t().contiguous().unbind(0))
    taps = weight.unflatten(0, (groups, -1)).permute(3, 0, 2, 1)
    return [tap.repeat_interleave(batch, 0) for tap in taps.unbind(0)]


def _groups(x: Tensor, weight: Tensor) -> int:
    """0 for depthwise weights with as many channels out as in."""
    groups = x.shape[2] // weight.shape[1]
    return 0 if groups == x.shape[2] == weight.shape[0] else groups


def _block(rows: Tensor) -> int:
    return max(64, BLOCK // max(1, rows.shape[0] * rows.shape[2]))


def _direct(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, dilation: int, causal: bool) -> Tensor:
    """The depthwise forward in one pass through the taps."""
    source, past = (torch.cat((tail, x), 1), tail.shape[1]) if tail.shape[1] else (x, 0)
    shift = tap_shifts(weight.shape[2], dilation, causal)[0]
    kernel, y = weight[:, 0].t(), x.new_empty(x.shape)
    for rows, first, last in direct.blocks(x.shape[0], 0, x.shape[1], x.shape[2]):
        where = {"dilation": dilation, "shift": shift, "first": past + first, "last": past + last}
        y[rows, first:last] = direct.correlate(source[rows], kernel, bias, **where)
    return y


def _direct_input_gradient(g: Tensor, weight: Tensor, past: int, dilation: int, causal: bool) -> tuple[Tensor, Tensor]:
    """Gradients of x and of the tail: the taps the other way round."""
    shift = -tap_shifts(weight.shape[2], dilation, causal)[-1]
    kernel = weight[:, 0].t().flip(0)
    dx, dtail = g.new_empty(g.shape), g.new_empty(g.shape[0], past, g.shape[2])
    for wanted, start, stop in ((dx, 0, g.shape[1]), (dtail, -past, 0)):
        for rows, first, last in direct.blocks(g.shape[0], start, stop, g.shape[2]):
            where = {"dilation": dilation, "shift": shift, "first": first, "last": last}
            wanted[rows, first - start : last - start] = direct.correlate(g[rows], kernel, None, **where)
    return dx, dtail


@torch.library.custom_op("seqzoo::dilated_conv", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, dilation: int, causal: bool) -> Tensor:
    groups, (batch, length, _) = _groups(x, weight), x.shape
    if groups == 0 and direct.serves(x):
        return _direct(x, weight, bias, tail, dilation, causal)
    source, before = _layout(x, groups), _layout(tail, groups)
    y = _layout(x.new_zeros(batch, length, weight.shape[0]), groups)
    taps = _taps(weight, groups, batch)
    shifts = tap_shifts(weight.shape[2], dilation, causal)
    for k, old, into, out_of in _pieces(length, tail.shape[1], shifts, _block(y)):
        read = (before if old else source)[:, out_of]
        if groups == 0:
            y[:, into].addcmul_(read, taps[k])
        else:
            y[:, into].baddbmm_(read, taps[k])
    y = _restore(y, groups)
    return y if bias is None else y.add_(bias)


@torch.library.custom_op("seqzoo::dilated_conv_backward", mutates_args=())
def _backward(
    g: Tensor, x: Tensor, weight: Tensor, tail: Tensor, dilation: int, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and tail."""
    groups, (batch, length, _) = _groups(x, weight), x.shape
    source, before, arriving = _layout(x, groups), _layout(tail, groups), _layout(g, groups)
    one_pass = groups == 0 and direct.serves(x)
    if one_pass:
        dx, dtail = _direct_input_gradient(g, weight, tail.shape[1], dilation, causal)
    else:
        dx, dtail = torch.zeros_like(source), torch.zeros_like(before)
    taps = _taps(weight, groups, batch)
    dtaps = [torch.zeros_like(tap) for tap in taps]
    shifts = tap_shifts(weight.shape[2], dilation, causal)
    for k, old, into, out_of in _pieces(length, tail.shape[1], shifts, _block(arriving)):
        read, given = (before if old else source)[:, out_of], arriving[:, into]
        wanted = (dtail if old else dx)[:, out_of]
        if groups == 0:
            if not one_pass:
                wanted.addcmul_(given, taps[k])
            dtaps[k] += (given * read).sum((0, 1))
        else:
            wanted.baddbmm_(given, taps[k].transpose(1, 2))
            dtaps[k].baddbmm_(read.transpose(1, 2), given)
    stacked = torch.stack(dtaps, -1)
    if groups == 0:
        dweight = stacked.unsqueeze(1)
    else:  # (G B, I / G, O / G, K) summed over the batch
        dweight = stacked.unflatten(0, (groups, batch)).sum(1).transpose(1, 2).flatten(0, 1)
    return _restore(dx, groups).contiguous(), dweight.contiguous(), _restore(dtail, groups).contiguous()


@_forward.register_fake
def _(x, weight, bias, tail, dilation, causal):
    return x.new_empty(*x.shape[:2], weight.shape[0])


@_backward.register_fake
def _(g, x, weight, tail, dilation, causal):
    return tuple(torch.empty_like(t, memory_format=torch.contiguous_format) for t in (x, weight, tail))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, tail, ctx.dilation, ctx.causal = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(x, weight, tail)


def _differentiate(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, tail = ctx.saved_tensors
    dx, dweight, dtail = _backward(g, x, weight, tail, ctx.dilation, ctx.causal)
    return dx, dweight, g.sum((0, 1)) if ctx.has_bias else None, dtail, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def dilated_conv_shifted(
    x: Tensor, weight: Tensor, bias: Tensor | None, tail: Tensor, dilation: int, causal: bool
) -> Tensor:
    """`dilated_conv` with checked arguments."""
    return _forward(x, weight, bias, tail, dilation, causal)
