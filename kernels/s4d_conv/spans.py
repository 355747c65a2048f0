"""A linear recurrence per channel over chunks of T inputs, a span of chunks at a time: all buffers stay in cache.

    y_c = x_c block + s_c read        s_{c+1} = decay s_c + x_c write

Forward and backward are custom operators. The forward keeps the state before every span; the backward computes the
states inside a span again. Nothing of the length is allocated beside the output and the gradient of the input.

Letters: B rows, L tokens, D channels, T chunk, G chunks, N states of a channel, P their parts: 1 if real, 2 (real and
imaginary) if complex, R rows and S chunks of a span.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor

# Numbers of a span's inputs: 1 MiB of float32, so that all buffers stay in the last cache of a CPU and its products are
# still large enough to be fast. A GPU takes all at once.
SPAN = 1 << 18


def _chunks(x: Tensor, chunk: int) -> tuple[int, int]:
    """The chunks of a row, and those of a span."""
    groups = (x.shape[1] + chunk - 1) // chunk
    return groups, max(1, SPAN // max(1, x.shape[2] * chunk)) if x.device.type == "cpu" else max(1, groups)


def _number_of_spans(x: Tensor, chunk: int) -> int:
    groups, several = _chunks(x, chunk)
    return (groups + several - 1) // several


class _Pool:
    """Buffers by name, allocated once and taken again by every span: memory fresh from the system costs page faults."""

    def __init__(self, like: Tensor) -> None:
        self.like = like
        self.kept: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int) -> Tensor:
        size = prod(shape)
        if name not in self.kept or self.kept[name].shape[0] < size:
            self.kept[name] = self.like.new_empty(size)
        return self.kept[name][:size].view(shape)


class _Span:
    """R rows and S chunks of a sequence, in the order in which the recurrence meets them."""

    def __init__(self, number: int, rows: slice, first: int, last: int, length: int, chunk: int, reverse: bool) -> None:
        self.number, self.rows = number, rows
        self.at = slice(first * chunk, min(last * chunk, length))
        self.chunks = range(last - 1, first - 1, -1) if reverse else range(first, last)
        self.order = [c - first for c in self.chunks]
        self.count, self.chunk = last - first, chunk

    def load(self, x: Tensor, name: str, pool: _Pool) -> Tensor:
        """(D, R S, T) of x (B, L, D), zeros beyond its end."""
        part = x[self.rows, self.at]
        rows, number, dim = part.shape
        whole = pool(name, dim, rows, self.count * self.chunk)
        if number == whole.shape[2] and part.is_contiguous():
            whole.view(dim, -1).copy_(part.view(-1, dim).t())  # as matrices: the copy that takes blocks
        else:
            whole[..., :number].copy_(part.permute(2, 0, 1))
            whole[..., number:].zero_()
        return whole.view(dim, -1, self.chunk)

    def store(self, y: Tensor, to: Tensor) -> None:
        """y (D, R S, T) to its place in (B, L, D)."""
        into = to[self.rows, self.at]
        rows, number, dim = into.shape
        if number == self.count * self.chunk and into.is_contiguous():
            into.view(-1, dim).copy_(y.view(dim, -1).t())
        else:
            into.copy_(y.view(dim, rows, -1)[..., :number].permute(1, 2, 0))

    def at_chunk(self, chunks: Tensor) -> tuple[Tensor, Tensor]:
        """Of the R rows' chunks (B,): the rows, and chunks, that lie in this span, both within it."""
        place = chunks[self.rows] - min(self.chunks)
        found = ((place >= 0) & (place < self.count)).nonzero().squeeze(1)
        return found, place[found]


def _spans(x: Tensor, chunk: int, reverse: bool, backwards: bool = False) -> Iterator[_Span]:
    """All spans; those of a block of rows in the order of the recurrence, or the other way round."""
    batch, length, dim = x.shape
    groups, several = _chunks(x, chunk)
    rows = max(1, SPAN // max(1, length * dim)) if x.device.type == "cpu" else max(1, batch)
    starts = list(enumerate(range(0, groups, several)))
    for first_row in range(0, batch, rows):
        for number, first in reversed(starts) if reverse != backwards else starts:
            block = slice(first_row, min(first_row + rows, batch))
            yield _Span(number, block, first, min(first + several, groups), length, chunk, reverse)


def _number(pair: Tensor) -> Tensor:
    """(..., N, P) as (..., N) numbers, complex if P = 2."""
    return torch.view_as_complex(pair) if pair.shape[-1] == 2 else pair.squeeze(-1)


def _parts(number: Tensor) -> Tensor:
    return torch.view_as_real(number) if number.is_complex() else number.unsqueeze(-1)


def _scan(added: Tensor, carry: Tensor, decay: Tensor, order: Sequence[int], states: Tensor) -> None:
    """States before the chunks, in `order`: s_0 = carry, s_next = decay s + added; the one after them goes to carry.

    added, states: (D, R, S, N, P). carry: (D, R, N, P). decay: (D, 1, N) numbers.
    """
    local, before, kept = _number(added).unbind(2), _number(states).unbind(2), _number(carry)
    before[order[0]].copy_(kept)
    for here, there in pairwise(order):
        torch.addcmul(local[here], decay, before[here], out=before[there])
    torch.addcmul(local[order[-1]], decay, before[order[-1]], out=kept)


@torch.library.custom_op("seqzoo::chunk_recurrence", mutates_args=())
def _forward(
    x: Tensor,
    block: Tensor | None,
    write: Tensor,
    read: Tensor,
    decay: Tensor,
    start: Tensor | None,
    last: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the states before the chunks `last` (zeros without any), and those before each span (spans, D, B, N, P)."""
    dim, chunk = read.shape[0], read.shape[2]
    y, pool = x.new_empty(x.shape), _Pool(read)
    carry = _first(x, decay, start)
    wanted = torch.zeros_like(carry)
    carried = _carried(x, chunk, start, last)
    starts = carry.new_empty(_number_of_spans(x, chunk) if carried else 0, *carry.shape)
    steady = _number(decay).unsqueeze(1)
    for span in _spans(x, chunk, reverse):
        tokens = span.load(x, "tokens", pool)
        out = pool("out", *tokens.shape)
        if block is not None:
            torch.bmm(tokens, block, out=out)
        if carried:
            starts[span.number, :, span.rows] = carry[:, span.rows]
            added, states = (pool(name, *tokens.shape[:2], read.shape[1]) for name in ("added", "states"))
            torch.bmm(tokens, write, out=added)
            shape = dim, -1, span.count, *decay.shape[1:]
            _scan(added.view(shape), carry[:, span.rows], steady, span.order, states.view(shape))
            torch.baddbmm(out, states, read, beta=0 if block is None else 1, out=out)
            if last.shape[0]:
                found, place = span.at_chunk(last)
                wanted[:, span.rows][:, found] = states.view(shape)[:, found, place]
        span.store(out, y)
    return y, wanted, starts


def _first(x: Tensor, decay: Tensor, start: Tensor | None) -> Tensor:
    """A copy of the state before the first chunk."""
    if start is None:
        return decay.new_zeros(decay.shape[0], x.shape[0], *decay.shape[1:])
    return start.clone(memory_format=torch.contiguous_format)


def _carried(x: Tensor, chunk: int, start: Tensor | None, last: Tensor) -> bool:
    """Whether a state matters."""
    return x.shape[1] > chunk or start is not None or last.shape[0] > 0


@torch.library.custom_op("seqzoo::chunk_recurrence_backward", mutates_args=())
def _backward(
    g: Tensor,
    dwanted: Tensor,
    x: Tensor,
    block: Tensor | None,
    write: Tensor,
    read: Tensor,
    decay: Tensor,
    starts: Tensor,
    last: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, block (empty without one), write, read, decay and start."""
    dim, chunk = read.shape[0], read.shape[2]
    dx, pool = x.new_empty(x.shape), _Pool(read)
    dblock = write.new_zeros(0 if block is None else block.shape)
    dwrite, dread, ddecay = (t.new_zeros(t.shape) for t in (write, read, decay))
    carry = torch.zeros_like(dwanted, memory_format=torch.contiguous_format)
    steady = _number(decay).unsqueeze(1)
    for span in _spans(x, chunk, reverse, backwards=True):
        tokens, given = span.load(x, "tokens", pool), span.load(g, "given", pool)
        out = pool("out", *tokens.shape)
        if block is not None:
            torch.bmm(given, block.transpose(1, 2), out=out)
            dblock.baddbmm_(tokens.transpose(1, 2), given)
        if starts.shape[0]:
            flat = *tokens.shape[:2], read.shape[1]
            shape = dim, -1, span.count, *decay.shape[1:]
            added, states, after = (pool(name, *flat) for name in ("added", "states", "after"))
            torch.bmm(tokens, write, out=added)
            first = starts[span.number, :, span.rows].clone()
            _scan(added.view(shape), first, steady, span.order, states.view(shape))
            torch.bmm(given, read.transpose(1, 2), out=added)  # what arrives at the states before the chunks
            if last.shape[0]:
                found, place = span.at_chunk(last)
                added.view(shape)[:, found, place] += dwanted[:, span.rows][:, found]
            _scan(added.view(shape), carry[:, span.rows], steady.conj(), span.order[::-1], after.view(shape))
            torch.baddbmm(out, after, write.transpose(1, 2), beta=0 if block is None else 1, out=out)
            dwrite.baddbmm_(tokens.transpose(1, 2), after)
            dread.baddbmm_(states.transpose(1, 2), given)
            ddecay += _parts((_number(states.view(shape)).conj() * _number(after.view(shape))).sum((1, 2)))
        span.store(out, dx)
    return dx, dblock, dwrite, dread, ddecay, carry


@_forward.register_fake
def _(x, block, write, read, decay, start, last, reverse):
    first = decay.new_empty(decay.shape[0], x.shape[0], *decay.shape[1:])
    spans = _number_of_spans(x, read.shape[2]) if _carried(x, read.shape[2], start, last) else 0
    return x.new_empty(x.shape), first, first.new_empty(spans, *first.shape)


@_backward.register_fake
def _(g, dwanted, x, block, write, read, decay, starts, last, reverse):
    dblock = write.new_empty(0 if block is None else block.shape)
    return (x.new_empty(x.shape), dblock, *(t.new_empty(t.shape) for t in (write, read, decay, dwanted)))


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, block, write, read, decay, start, last, ctx.reverse = inputs
    ctx.has_start = start is not None
    ctx.save_for_backward(x, block, write, read, decay, output[2], last)


def _differentiate(ctx: Any, g: Tensor, dwanted: Tensor, dstarts: Tensor) -> tuple[Tensor | None, ...]:
    x, block, write, read, decay, starts, last = ctx.saved_tensors
    dx, dblock, *tables, dstart = _backward(g, dwanted, x, block, write, read, decay, starts, last, ctx.reverse)
    return dx, None if block is None else dblock, *tables, dstart if ctx.has_start else None, None, None


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
    """The recurrence of the module over x (B, L, D), its last chunk filled with zeros.

    block: (D, T, T), None for zero. write: (D, T, N P). read: (D, N P, T). decay: (D, N, P). start: (D, B, N, P), the
    state before the first chunk, None for zeros. last: int64 (B,), the chunk of each row whose state to return.
    reverse: the chunks follow one another from the last to the first.
    Returns y (B, L, D) in x's dtype and the states before `last`, (D, B, N, P). Sums are in the dtype of `read`.
    """
    chunks = torch.empty(0, dtype=torch.int64, device=x.device) if last is None else last
    y, wanted, _ = _forward(x, block, write, read, decay, start, chunks, reverse)
    return y, wanted
