"""S4D in Triton: the chunks of `chunked` with a program per channel. One pass where there are many, else pieces.

Inside, a channel's tokens lie together: (D, B, L). Outputs and the gradient of the input are views of such memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .chunked import CHUNK, s4d_conv_in_chunks
from .fused_kernels import carry_over, chunk_outputs, piece_ends, table_gradients, to_channels

PROGRAMS = 1024  # that keep a large GPU busy
ROWS = 32  # chunks of a segment at most


class Launch(NamedTuple):
    """rows: chunks M of a segment. piece: tokens of a piece, whole segments. number: of pieces of a row."""

    rows: int
    piece: int
    number: int


def plan(batch: int, length: int, channels: int) -> Launch:
    """As many pieces as fill a GPU; none where rows and channels do."""
    rows = max(16, min(ROWS, triton.next_power_of_2(triton.cdiv(length, CHUNK))))
    segments = triton.cdiv(length, rows * CHUNK)
    pieces = 1 if 2 * batch * channels >= PROGRAMS else min(segments, triton.cdiv(PROGRAMS, batch * channels))
    piece = triton.cdiv(segments, pieces) * rows * CHUNK
    return Launch(rows, piece, triton.cdiv(length, piece))


def _options(x: Tensor, states: int) -> dict[str, Any]:
    """tf32 takes numbers of half precision as they are; float32 needs three products."""
    width = max(16, triton.next_power_of_2(states))
    return {"T": CHUNK, "BN": width, "PRECISION": "tf32x3" if x.dtype == torch.float32 else "tf32"}


def _channels(x: Tensor) -> Tensor:
    """(D, B, L) of x (B, L, D): itself where a channel's tokens lie together already."""
    batch, length, dim = x.shape
    if x.permute(2, 0, 1).is_contiguous():
        return x.permute(2, 0, 1)
    out = x.new_empty(dim, batch, length)
    tiles = triton.cdiv(length, 64)
    to_channels[tiles * batch, triton.cdiv(dim, 64)](x, out, dim, length, tiles, *x.stride(), batch, BL=64, BD=64)
    return out


class Way(NamedTuple):
    """One way along the tokens of (D, B, L): from x to y by the tables, or from dy to dx by the same ones transposed.

    write, read: a table and the strides of its t, n and parts. block: with those of its rows and columns.
    """

    block: tuple[Tensor | None, int, int]
    write: tuple[Tensor, int, int, int]
    read: tuple[Tensor, int, int, int]
    decay: Tensor
    gradient: bool
    down: bool


def _ways(block: Tensor | None, write: Tensor, read: Tensor, decay: Tensor, reverse: bool) -> tuple[Way, Way]:
    """The recurrence and its gradient. block: (D, T, T). write: (D, T, 2 N). read: (D, 2 N, T)."""
    block = None if block is None else block.contiguous()
    states = decay.shape[1]
    writes, reads = (write.contiguous(), 2 * states, 2, 1), (read.contiguous(), 1, 2 * CHUNK, CHUNK)
    decay = decay.contiguous()
    return (
        Way((block, CHUNK, 1), writes, reads, decay, False, reverse),
        Way((block, 1, CHUNK), reads, writes, decay, True, not reverse),
    )


def _run(
    way: Way, x: Tensor, first: Tensor, last: Tensor, arriving: Tensor, *, save: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y (D, B, L); the states before `last`, or the last one of a gradient (D, B, N, 2); those before the segments."""
    (dim, batch, length), states, decay = x.shape, first.shape[2], way.decay
    rows, piece, number = plan(batch, length, dim)
    wanted, asked = torch.zeros_like(first), last.shape[0] > 0
    kept = first.new_empty((dim, batch, -(-length // (rows * CHUNK)), states, 2) if save else 0)
    y, grid, before = torch.empty_like(x), (dim * batch * number,), first
    (block, *block_at), (write, *write_at), (read, *read_at) = way.block, way.write, way.read
    options = {"M": rows, "DOWN": way.down, "GRADIENT": way.gradient, **_options(x, states)}
    if number > 1:
        before = first.new_empty(dim, batch, number, states, 2)
        piece_ends[grid](
            x, write, decay, last, arriving, before, batch, length, number, piece, states, *write_at,
            LAST=asked, num_warps=4, **options,
        )  # fmt: skip
        carry_over[dim * batch,](
            before, decay, first, batch, number, piece // CHUNK, states,
            BN=options["BN"], DOWN=way.down, GRADIENT=way.gradient, num_warps=1,
        )  # fmt: skip
    chunk_outputs[grid](
        x, block, write, read, decay, before, last, arriving, y, wanted, kept,
        batch, length, number, piece, -(-length // (rows * CHUNK)), states, *write_at, *read_at, *block_at,
        BLOCK=block is not None, LAST=asked, SAVE=save, num_warps=2, **options,
    )  # fmt: skip
    return y, wanted, kept


@torch.library.custom_op("seqzoo::chunk_recurrence_triton", mutates_args=())
def _forward(
    x: Tensor,
    block: Tensor | None,
    write: Tensor,
    read: Tensor,
    decay: Tensor,
    start: Tensor | None,
    last: Tensor,
    reverse: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (D, B, L), the states before the chunks `last` (D, B, N, 2), and before the segments (none unless save)."""
    first = decay.new_zeros(x.shape[2], x.shape[0], *decay.shape[1:]) if start is None else start.contiguous()
    way, _ = _ways(block, write, read, decay, reverse)
    return _run(way, _channels(x), first, last, first, save=save)


@torch.library.custom_op("seqzoo::chunk_recurrence_triton_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dwanted: Tensor,
    x: Tensor,
    block: Tensor | None,
    write: Tensor,
    read: Tensor,
    decay: Tensor,
    kept: Tensor,
    last: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, as (D, B, L), block (empty without one), write, read, decay; of start, but what arrives there."""
    (batch, length, dim), states = x.shape, decay.shape[1]
    x, dy, dwanted = _channels(x), _channels(dy.permute(1, 2, 0)), dwanted.contiguous()
    _, way = _ways(block, write, read, decay, reverse)
    dx, leaving, met = _run(way, dy, torch.zeros_like(dwanted), last, dwanted, save=True)
    splits = min(batch * kept.shape[2], triton.cdiv(PROGRAMS, dim))
    sums = [decay.new_empty(splits, *t.shape) for t in (write, read, decay)]
    dblock = decay.new_empty(0 if block is None else (splits, *block.shape))
    together = x.dtype != torch.float32 and states <= 32  # one launch for both would spill its registers else
    for inputs, within in ((True, True),) if together else ((True, False), (False, True)):
        table_gradients[dim * splits,](
            dy, x, way.read[0], way.write[0], way.decay, kept, met, last, dwanted, dblock, *sums,
            batch, length, kept.shape[2], splits, states,
            M=plan(batch, length, dim).rows, DOWN=reverse, BLOCK=block is not None, LAST=last.shape[0] > 0,
            INPUT=inputs, STATES=within, num_warps=4 if together else 8, **_options(x, states),
        )  # fmt: skip
    dwrite, dread, ddecay = (t.sum(0) for t in sums)
    return dx, dblock if block is None else dblock.sum(0), dwrite, dread, ddecay, leaving


@_forward.register_fake
def _(x, block, write, read, decay, start, last, reverse, save):
    batch, length, dim = x.shape
    first = decay.new_empty(dim, batch, *decay.shape[1:])
    segments = -(-length // (plan(batch, length, dim).rows * CHUNK))
    kept = decay.new_empty((dim, batch, segments, *decay.shape[1:]) if save else 0)
    return x.new_empty(dim, batch, length), first, kept


@_backward.register_fake
def _(dy, dwanted, x, block, write, read, decay, kept, last, reverse):
    batch, length, dim = x.shape
    dblock = decay.new_empty(0 if block is None else block.shape)
    return x.new_empty(dim, batch, length), dblock, *(t.new_empty(t.shape) for t in (write, read, decay, dwanted))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, block, write, read, decay, start, last, ctx.reverse, _ = inputs
    ctx.has_start = start is not None
    ctx.save_for_backward(x, block, write, read, decay, output[2], last)
    ctx.set_materialize_grads(False)  # zeros like the kept states would be as large as they are


def _differentiate(ctx: Any, dy: Tensor | None, dwanted: Tensor | None, dkept: None) -> tuple[Tensor | None, ...]:
    x, block, write, read, decay, kept, last = ctx.saved_tensors
    dim, batch = read.shape[0], x.shape[0]
    dy = x.new_zeros(dim, batch, x.shape[1]) if dy is None else dy
    dwanted = decay.new_zeros(dim, batch, *decay.shape[1:]) if dwanted is None else dwanted
    dx, dblock, *tables, dstart = _backward(dy, dwanted, x, block, write, read, decay, kept, last, ctx.reverse)
    start = None
    if ctx.has_start:  # it is the state before the first chunk: what arrives there is still missing
        arriving = dy[..., :CHUNK].to(read.dtype) @ read[..., : dy.shape[2]].transpose(1, 2)
        start = dstart + arriving.unflatten(2, (-1, 2))
        if last.shape[0]:
            start = start + dwanted * (last == 0).view(-1, 1, 1)
    return dx.permute(1, 2, 0), None if block is None else dblock, *tables, start, None, None, None


_forward.register_autograd(_differentiate, setup_context=_keep)


def chunk_recurrence(
    x: Tensor,
    block: Tensor | None,
    write: Tensor,
    read: Tensor,
    decay: Tensor,
    *,
    start: Tensor | None = None,
    last: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """`spans.chunk_recurrence` with complex states and chunks of 32; `start` and `last` not with `reverse`."""
    chunks = torch.empty(0, dtype=torch.int64, device=x.device) if last is None else last
    needed = (x, block, write, read, decay, start)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in needed)
    y, wanted, _ = _forward(x, block, write, read, decay, start, chunks, reverse, save)
    return y.permute(1, 2, 0), wanted


def fused_s4d_conv(u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """`s4d_conv` with checked arguments, u in its own dtype with zeros beyond `lengths`."""
    return s4d_conv_in_chunks(chunk_recurrence, CHUNK, u, log_a, b, c, **options)
