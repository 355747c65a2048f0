"""The damped EMA in Triton: the custom operators and their launches. One pass where channels are many, else chunks."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from ..selective_scan.fused import LOG2_E, Launch, carry, padded, width_of
from .fused_kernels import ema_ends, ema_gradients, ema_outputs
from .naive import Coefficients, EmaState

KEPT, GROUP = 8, 8  # steps per kept state; steps loaded ahead of their use
WARPS = 1024  # that keep a large GPU busy


def plan(batch: int, length: int, channels: int, dims: int) -> Launch:
    """256 averages to a warp, 128 where there are few; as many chunks as fill a GPU, of 64 tokens at least."""
    width = width_of(dims)
    tile = 256 // width
    if batch * triton.cdiv(channels, tile) < WARPS:
        tile //= 2
    warps = batch * triton.cdiv(channels, tile)
    number = 1 if 2 * warps >= WARPS else max(1, min(2 * WARPS // max(1, warps), length // 64))
    chunk = triton.cdiv(triton.cdiv(length, number), KEPT) * KEPT
    return Launch(width, tile, chunk, triton.cdiv(length, chunk))


@torch.library.custom_op("seqzoo::ema_triton", mutates_args=())
def _forward(
    x: Tensor, log_q: Tensor, b: Tensor, c: Tensor, initial: Tensor, reverse: bool, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, D) like x, the padded states before each KEPT steps (none unless save), the last state."""
    (batch, length, channels), dims = x.shape, b.shape[1]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    width, tile, chunk, number = plan(batch, length, channels, dims)
    longer = triton.cdiv(length, KEPT) * KEPT
    x, before = x.contiguous(), padded(initial, width)
    log_q, b, c = padded(log_q, width), padded(b, width), padded(c, width)
    q = log_q.exp()
    saved = before.new_empty((batch, longer // KEPT, channels, width) if save else 0)
    last, grid = torch.empty_like(before), (triton.cdiv(channels, tile) * batch * number,)
    sizes = {"D": channels, "N": width, "BD": tile, "T": GROUP, "REVERSE": reverse, "num_warps": 1}
    if number > 1:
        ends = before.new_empty(batch, number, channels, width)
        ema_ends[grid](x, b, q, ends, length, number, chunk, GRADIENT=False, **sizes)
        carry(ends, _steps(ends, length, chunk), log_q * LOG2_E, before, last, reverse=False)
        before = ends
    ema_outputs[grid](x, q, b, c, before, y, saved, last, length, longer, number, chunk, S=KEPT, SAVE=save, **sizes)
    return y, saved, last[..., :dims].clone()


def _steps(ends: Tensor, length: int, chunk: int) -> Tensor:
    """The steps of each chunk, (B, G, D)."""
    batch, number, channels, _ = ends.shape
    counts = torch.full((number,), float(chunk), device=ends.device)
    counts[-1] = length - (number - 1) * chunk
    return counts.view(1, number, 1).expand(batch, number, channels).contiguous()


@torch.library.custom_op("seqzoo::ema_triton_backward", mutates_args=())
def _backward(
    dy: Tensor, dlast: Tensor, x: Tensor, log_q: Tensor, b: Tensor, c: Tensor, saved: Tensor, reverse: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, log_q, b, c and the initial state."""
    (batch, length, channels), dims = x.shape, b.shape[1]
    width, tile, chunk, number = plan(batch, length, channels, dims)
    dy, x, leaving = dy.contiguous(), x.contiguous(), padded(dlast, width)
    log_q, wide_b, wide_c = padded(log_q, width), padded(b, width), padded(c, width)
    q = log_q.exp()
    entering, first = leaving.new_empty(batch, number, channels, width), torch.empty_like(leaving)
    grid = (triton.cdiv(channels, tile) * batch * number,)
    sizes = {"D": channels, "N": width, "BD": tile, "REVERSE": reverse, "num_warps": 1}
    ema_ends[grid](dy, wide_c, q, entering, length, number, chunk, T=GROUP, GRADIENT=True, **sizes)
    carry(entering, _steps(entering, length, chunk), log_q * LOG2_E, leaving, first, reverse=True)
    dx, sums = torch.empty_like(x), [torch.empty_like(entering) for _ in range(3)]
    longer = saved.shape[1] * KEPT
    ema_gradients[grid](
        dy, x, q, wide_b, wide_c, saved, entering, dx, *sums, length, longer, number, chunk, S=KEPT, **sizes
    )
    dlog_q, db, dc = (t.sum((0, 1))[:, :dims].to(b.dtype, copy=True).contiguous() for t in sums)
    return dx, dlog_q, db, dc, first[..., :dims].clone()


@_forward.register_fake
def _(x, log_q, b, c, initial, reverse, save):
    kept = x.shape[0], -(-x.shape[1] // KEPT), x.shape[2], width_of(b.shape[1])
    return x.new_empty(x.shape), initial.new_empty(kept if save else 0), initial.new_empty(initial.shape)


@_backward.register_fake
def _(dy, dlast, x, log_q, b, c, saved, reverse):
    return tuple(t.new_empty(t.shape) for t in (x, log_q, b, c, dlast))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.reverse, _ = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.set_materialize_grads(False)  # zeros like the kept states would be as large as they are


def _gradient(ctx: Any, dy: Tensor | None, dsaved: None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    x, log_q, b, c, initial, saved = ctx.saved_tensors
    dy = torch.zeros_like(x) if dy is None else dy
    dlast = torch.zeros_like(initial) if dlast is None else dlast
    return (*_backward(dy, dlast, x, log_q, b, c, saved, ctx.reverse), None, None)


_forward.register_autograd(_gradient, setup_context=_setup_context)


def fused_ema(
    x: Tensor,
    ahead: Coefficients,
    behind: Coefficients | None,
    *,
    skip: Tensor | None,
    truncation: None,
    lengths: Tensor | None,
    state: EmaState | None,
    output_state: bool,
) -> tuple[Tensor, EmaState | None]:
    """`ema` with checked arguments, whole kernels only; x with zeros beyond `lengths`, in its own dtype."""
    zeros = torch.zeros(x.shape[0], *ahead[0].shape, device=x.device)
    initial = zeros if state is None else state.h

    def average(weights: Coefficients, start: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, *weights, start))
        y, _, last = _forward(x, *weights, start, reverse, save)
        return y, last

    y, last = average(ahead, initial, False)
    if behind is not None:
        y = y + average(behind, zeros, True)[0]
    if skip is not None:
        y = torch.addcmul(y, x, skip.to(x.dtype))
    return y, EmaState(last) if output_state else None
