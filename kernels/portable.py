"""Recurrences of plain torch operations alone: what an exported model is made of.

The fast forms of `kernels` are operations of their own, which a program without this package does not know, and they
loop over a length that they must know. Here a recurrence is one loop over chunks, which torch's `scan` keeps as a loop
in the program, whatever the length; all that happens within a chunk is of known sizes.

B batch, L length, n chunks, C steps of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

Parts = tuple[Tensor, ...]
Combine = Callable[[Parts, Parts], Parts]
Body = Callable[[Parts, Parts, Parts], tuple[Parts, Tensor]]


def to_blocks(x: Tensor, size: int) -> Tensor:
    """(B, L, ...) to (B, n, size, ...), the last block filled up with zeros."""
    length = x.shape[1]
    number = (length + size - 1) // size
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, number * size - length))
    return x.reshape(x.shape[0], number, size, *x.shape[2:])


def from_blocks(x: Tensor, length: int) -> Tensor:
    """(B, n, C, ...) to (B, L, ...)."""
    number, size = x.shape[1:3]
    torch._check(length <= number * size)
    # A copy in any case: whether one is needed would be a question about sizes.
    x = x.clone(memory_format=torch.contiguous_format)
    return x.view(x.shape[0], number * size, *x.shape[3:]).narrow(1, 0, length)


def chunk_scan(body: Body, first: Parts, parts: Sequence[Tensor], size: int, given: Parts = ()) -> tuple[Parts, Tensor]:
    """Walk along rows (B, L, ...) in chunks of up to `size` steps, the last filled up with zeros.

    body: (carried, the chunk of every part, (B, C, ...), given) to (what the next chunk is given, y (B, C, ...)); it
    reads no other tensors. first: what the first chunk is given. given: what all chunks are. Returns what is carried at
    the end and y (B, L, ...).
    """
    length = parts[0].shape[1]
    if isinstance(length, int) and length == 0:  # a chunk of zeros says what y looks like
        _, y = body(first, tuple(F.pad(part, (0, 0) * (part.dim() - 2) + (0, size)) for part in parts), given)
        return first, y[:, :0]
    if isinstance(length, int) and length <= size:
        return body(first, tuple(parts), given)
    chunks = [to_blocks(part, size).movedim(1, 0) for part in parts]
    if torch.compiler.is_exporting():
        carried, ys = _kept_loop(body, first, chunks, given)
    else:
        carried, found = first, []
        for chunk in zip(*chunks, strict=True):
            carried, y = body(carried, chunk, given)
            found.append(y)
        ys = torch.stack(found)
    return carried, from_blocks(ys.movedim(0, 1), length)


def _kept_loop(body: Body, first: Parts, chunks: Sequence[Tensor], given: Parts) -> tuple[Parts, Tensor]:
    """The loop as torch's operation, not by the function around it, which would start the compiler for each."""
    from torch._higher_order_ops.scan import scan_op

    number, width = len(first), len(first) + len(chunks)

    def step(*tensors: Tensor) -> list[Tensor]:
        carried, y = body(tensors[:number], tensors[number:width], tensors[width:])
        # no output may be a view
        return [t.clone(memory_format=torch.contiguous_format) for t in (*carried, y)]

    *carried, ys = scan_op(step, [t.clone() for t in first], [*chunks], given)
    return tuple(carried), ys


def delayed(x: Tensor, steps: int, dim: int = 1, fill: float = 0.0) -> Tensor:
    """x moved `steps` places along `dim`, with `fill` before it; `dim` has at least as many places."""
    kept = x.narrow(dim, 0, x.shape[dim] - steps)
    shape = [*x.shape[:dim], steps, *x.shape[dim + 1 :]]
    return torch.cat((x.new_full(shape, fill), kept), dim)


def doubled(parts: Parts, combine: Combine, identity: Sequence[float]) -> Parts:
    """Inclusive scan along dimension 1 of tensors (B, C, ...) that go together, C known, in log C steps.

    combine: associative, of what is earlier and what is later. identity: its neutral element, a number for each part.
    """
    shift = 1
    while shift < parts[0].shape[1]:
        earlier = tuple(delayed(p, shift, fill=one) for p, one in zip(parts, identity, strict=True))
        parts = combine(earlier, parts)
        shift *= 2
    return parts


def _affine(first: Parts, then: Parts) -> Parts:
    (a, x), (b, y) = first, then
    return a * b, y + b * x


def linear_steps(a: Tensor, x: Tensor, before: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + x_t within a chunk. a, x: (B, C, ...). before: (B, ...), the h before it."""
    a, x = doubled((a, x), _affine, (1.0, 0.0))
    return x + a * before.unsqueeze(1)


def running_max(x: Tensor, before: Tensor) -> Tensor:
    """The largest of `before` (B, ...) and x_1 .. x_t within a chunk."""
    (top,) = doubled((x,), lambda first, then: (torch.maximum(first[0], then[0]),), (float("-inf"),))
    return torch.maximum(top, before.unsqueeze(1))
