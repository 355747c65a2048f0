"""The selective scan in Triton: the custom operators and the sizes of their launches.

Forward is one pass over the tokens where the channels alone fill a GPU; else chunks of time go at once, after a first
pass that finds what each chunk adds to the state. Backward always takes chunks (README.md).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from .fused_backward import scan_gradients
from .fused_forward import carry_ends, scan_ends, scan_outputs

KEPT = 16  # tokens per kept state: float32 (E, N) every 16 tokens is 4 bytes per element of u at N = 16
GROUP, HELD = 8, 4  # tokens loaded ahead of their use; tokens whose states the backward pass holds in registers
WARPS = 1024  # what a large GPU (132 multiprocessors of 4 schedulers) needs to be busy
LOG2_E = math.log2(math.e)


class Launch(NamedTuple):
    """width: states of a tile. tile: its channels. chunk, number: tokens of a chunk, chunks."""

    width: int
    tile: int
    chunk: int
    number: int


def width_of(states: int) -> int:
    """The states padded to a power of two, four at least."""
    return max(4, 1 << (states - 1).bit_length())


def forward_launch(batch: int, length: int, channels: int, states: int) -> Launch:
    """256 pairs of a channel and a state to a warp, 128 where there are few; one chunk if those are enough."""
    width = width_of(states)
    tile = 256 // width
    if batch * triton.cdiv(channels, tile) < WARPS:
        tile //= 2
    warps = batch * triton.cdiv(channels, tile)
    number = 1 if 2 * warps >= WARPS else max(1, min(2 * WARPS // max(1, warps), length // (4 * KEPT)))
    chunk = max(1, triton.cdiv(triton.cdiv(length, number), KEPT)) * KEPT
    return Launch(width, tile, chunk, max(1, triton.cdiv(length, chunk)))


def backward_launch(batch: int, length: int, channels: int, states: int) -> tuple[Launch, int]:
    """The launch, and the tiles of a program: 256 channels, or fewer (64 at least) where a GPU would not be full."""
    width = width_of(states)
    tile = 256 // width
    blocks = triton.cdiv(channels, tile)
    tiles = min(blocks, max(1, 256 // tile))
    chunk = 8 * KEPT
    while chunk > 2 * KEPT and batch * triton.cdiv(length, chunk) * triton.cdiv(blocks, tiles) < WARPS:
        chunk //= 2
    while tiles * tile > 64 and batch * triton.cdiv(length, chunk) * triton.cdiv(blocks, tiles) < WARPS:
        tiles = triton.cdiv(tiles, 2)
    return Launch(width, tile, chunk, max(1, triton.cdiv(length, chunk))), tiles


def padded(t: Tensor, *sizes: int) -> Tensor:
    """float32, contiguous, with zeros up to these sizes of the last axes."""
    pad = [more for size, have in zip(reversed(sizes), reversed(t.shape), strict=False) for more in (0, size - have)]
    return F.pad(t.float(), pad).contiguous()


@torch.library.custom_op("seqzoo::selective_scan_triton", mutates_args=())
def _forward(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, skip: Tensor | None, initial: Tensor, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, E) like u, the padded states before each KEPT tokens (none unless save), the last state."""
    (batch, length, channels), states = u.shape, a.shape[1]
    y = torch.empty_like(u, memory_format=torch.contiguous_format)
    if u.numel() == 0 or states == 0:
        return y.zero_(), initial.new_empty(0), initial.clone()
    width, tile, chunk, number = forward_launch(batch, length, channels, states)
    longer = triton.cdiv(length, KEPT) * KEPT
    u, dt, a2, before = u.contiguous(), dt.contiguous(), padded(a, width) * LOG2_E, padded(initial, width)
    b, c = padded(b, longer, width), padded(c, longer, width)
    sizes = {"E": channels, "N": width, "BE": tile, "T": GROUP, "num_warps": 1}
    saved = before.new_empty((batch, longer // KEPT, channels, width) if save else 0)
    last, grid = torch.empty_like(before), (triton.cdiv(channels, tile) * batch * number,)
    if number > 1:
        ends, total = before.new_empty(batch, number, channels, width), before.new_empty(batch, number, channels)
        scan_ends[grid](u, dt, b, a2, ends, total, length, longer, number, chunk, REVERSE=False, **sizes)
        carry(ends, total, a2, before, last, reverse=False)
        before = ends
    through = None if skip is None else skip.float().contiguous()
    scan_outputs[grid](
        u, dt, b, c, a2, through, before, y, saved, last, length, longer, number, chunk,
        S=KEPT, SKIP=skip is not None, SAVE=save, **sizes,
    )  # fmt: skip
    return y, saved, last[..., :states].clone()


def carry(ends: Tensor, total: Tensor, a2: Tensor, first: Tensor, last: Tensor, *, reverse: bool) -> None:
    batch, number, channels, width = ends.shape
    tile = 128 // width
    grid = (triton.cdiv(channels, tile) * batch,)
    carry_ends[grid](ends, total, a2, first, last, number, E=channels, N=width, BE=tile, REVERSE=reverse, num_warps=1)


@torch.library.custom_op("seqzoo::selective_scan_triton_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dlast: Tensor,
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    saved: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, a, b, c, skip (zeros (E,) without one) and the initial state."""
    (batch, length, channels), states = u.shape, a.shape[1]
    if u.numel() == 0 or states == 0:
        du, ddt, da, db, dc = (torch.zeros_like(t) for t in (u, dt, a, b, c))
        return du, ddt, da, db, dc, dlast.new_zeros(channels), dlast.clone()
    (width, tile, chunk, number), tiles = backward_launch(batch, length, channels, states)
    longer, groups = saved.shape[1] * KEPT, triton.cdiv(triton.cdiv(channels, tile), tiles)
    dy, u, dt, a2 = dy.contiguous(), u.contiguous(), dt.contiguous(), padded(a, width) * LOG2_E
    wide_b, wide_c, leaving = padded(b, longer, width), padded(c, longer, width), padded(dlast, width)
    sizes = {"E": channels, "N": width, "BE": tile, "num_warps": 1}
    entering, total = a2.new_empty(batch, number, channels, width), a2.new_empty(batch, number, channels)
    dinitial, grid = torch.empty_like(leaving), (triton.cdiv(channels, tile) * batch * number,)
    scan_ends[grid](dy, dt, wide_c, a2, entering, total, length, longer, number, chunk, T=GROUP, REVERSE=True, **sizes)
    carry(entering, total, a2, leaving, dinitial, reverse=True)
    du, ddt = torch.empty_like(u), torch.empty_like(dt)
    db, dc = (a2.new_empty(groups, batch, longer, width) for _ in range(2))
    da, dskip = torch.empty_like(entering), torch.zeros_like(total)
    through = None if skip is None else skip.float().contiguous()
    scan_gradients[(groups * batch * number,)](
        dy, u, dt, wide_b, wide_c, a2, through, saved, entering, du, ddt, db, dc, da, dskip,
        batch, length, longer, number, chunk, tiles, S=KEPT, T=HELD, SKIP=skip is not None, **sizes,
    )  # fmt: skip
    da_EN = da.sum((0, 1))[:, :states].to(a.dtype, copy=True)
    db, dc = (t.sum(0)[:, :length, :states] for t in (db, dc))
    db, dc = db.to(b.dtype, copy=True).contiguous(), dc.to(c.dtype, copy=True).contiguous()
    return du, ddt, da_EN.contiguous(), db, dc, dskip.sum((0, 1)), dinitial[..., :states].clone()


@_forward.register_fake
def _(u, dt, a, b, c, skip, initial, save):
    kept = u.shape[0], -(-u.shape[1] // KEPT), a.shape[0], width_of(a.shape[1])
    saved = initial.new_empty(kept if save and u.numel() and a.shape[1] else 0)
    return u.new_empty(u.shape), saved, initial.new_empty(initial.shape)


@_backward.register_fake
def _(dy, dlast, u, dt, a, b, c, skip, saved):
    gradients = (t.new_empty(t.shape) for t in (u, dt, a, b, c))
    return (*gradients, dlast.new_empty(u.shape[2]), dlast.new_empty(dlast.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, initial, _ = inputs
    ctx.save_for_backward(*tensors, output[1], initial)
    ctx.set_materialize_grads(False)  # zeros like the kept states would be as large as they are


def _gradient(ctx: Any, dy: Tensor | None, dsaved: None, dlast: Tensor | None) -> tuple[Tensor | None, ...]:
    *tensors, skip, saved, initial = ctx.saved_tensors
    dy = torch.zeros_like(tensors[0]) if dy is None else dy
    dlast = torch.zeros_like(initial) if dlast is None else dlast
    *gradients, dskip, dinitial = _backward(dy, dlast, *tensors, skip, saved)
    return (*gradients, None if skip is None else dskip.to(skip.dtype), dinitial, None)


_forward.register_autograd(_gradient, setup_context=_setup_context)


def fused_selective_scan(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    initial: Tensor,
    *,
    skip: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive_selective_scan` plus skip u, y in the dtype of u; no second derivatives."""
    inputs = (u, dt, a, b, c, skip, initial)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
    y, _, last = _forward(u, dt, a, b, c, skip, initial, save)
    return y, last
