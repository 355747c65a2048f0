"""Recurrences of plain torch operations alone: what an exported model is made of.

The fast forms of `kernels` are operations of their own, which a program without this package does not know, and loop
over a length that they must know. Here a recurrence is a scan in a fixed number of levels, whatever the length: steps
are combined within blocks of 16 by doubling, then blocks, then blocks of blocks.

B batch, L length, n blocks, C steps of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

RADIX = 16
LEVELS = 6  # up to 16^6 steps where the length is not known

Parts = tuple[Tensor, ...]
Combine = Callable[[Parts, Parts], Parts]


def exporting() -> bool:
    """Whether `torch.export` traces this call."""
    return torch.compiler.is_exporting()


def to_blocks(x: Tensor, size: int, fill: float = 0.0) -> Tensor:
    """(B, L, ...) to (B, n, size, ...), the last block filled up."""
    length = x.shape[1]
    number = (length + size - 1) // size
    x = F.pad(x, (0, 0) * (x.dim() - 2) + (0, number * size - length), value=fill)
    return x.reshape(x.shape[0], number, size, *x.shape[2:])


def from_blocks(x: Tensor, length: int) -> Tensor:
    """(B, n, C, ...) to (B, L, ...)."""
    return x.reshape(x.shape[0], x.shape[1] * x.shape[2], *x.shape[3:])[:, :length]


def delayed(x: Tensor, steps: int, dim: int = 1, fill: float = 0.0) -> Tensor:
    """x moved `steps` places along `dim`, with `fill` before it; `dim` has at least as many places."""
    kept = x.narrow(dim, 0, x.shape[dim] - steps)
    shape = [*x.shape[:dim], steps, *x.shape[dim + 1 :]]
    return torch.cat((x.new_full(shape, fill), kept), dim)


def tree_scan(parts: Sequence[Tensor], combine: Combine, identity: Sequence[float], levels: int = LEVELS) -> Parts:
    """Inclusive scan along dimension 1 of tensors (B, L, ...) that go together.

    combine: associative, of what is earlier and what is later. identity: its neutral element, a number for each part.
    """
    found = tuple(parts)
    length = found[0].shape[1]
    known = isinstance(length, int)
    if known and length <= RADIX:
        return tuple(p.squeeze(1) for p in _doubled(tuple(p.unsqueeze(1) for p in found), combine, identity, length))
    found = tuple(to_blocks(p, RADIX, one) for p, one in zip(found, identity, strict=True))
    found = _doubled(found, combine, identity, RADIX)
    if levels > 1 or known:
        ends = tree_scan(tuple(p[:, :, -1] for p in found), combine, identity, levels - 1)
        before = tuple(delayed(p, 1, fill=one).unsqueeze(2) for p, one in zip(ends, identity, strict=True))
        found = combine(before, found)
    return tuple(from_blocks(p, length) for p in found)


def _doubled(parts: Parts, combine: Combine, identity: Sequence[float], size: int) -> Parts:
    """The scan of each block, along dimension 2 of (B, n, size, ...)."""
    shift = 1
    while shift < size:
        earlier = tuple(delayed(p, shift, 2, one) for p, one in zip(parts, identity, strict=True))
        parts = combine(earlier, parts)
        shift *= 2
    return parts


def _affine(first: Parts, then: Parts) -> Parts:
    (a, x), (b, y) = first, then
    return a * b, torch.addcmul(y, b, x)


def linear_scan(a: Tensor, x: Tensor) -> Tensor:
    """h_t = a_t h_{t-1} + x_t along dimension 1, from zero. a, x: (B, L, ...), a with 1 for what it is the same for."""
    return tree_scan((a.expand(-1, x.shape[1], *a.shape[2:]), x), _affine, (1.0, 0.0))[1]


def _complex_affine(first: Parts, then: Parts) -> Parts:
    (ar, ai, xr, xi), (br, bi, yr, yi) = first, then
    return ar * br - ai * bi, ar * bi + ai * br, yr + br * xr - bi * xi, yi + br * xi + bi * xr


def complex_scan(a: tuple[Tensor, Tensor], x: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """`linear_scan` of complex numbers, each a pair of real and imaginary parts."""
    length = x[0].shape[1]
    wide = (p.expand(-1, length, *p.shape[2:]) for p in a)
    return tree_scan((*wide, *x), _complex_affine, (1.0, 0.0, 0.0, 0.0))[2:]  # type: ignore[return-value]


def running_max(x: Tensor) -> Tensor:
    """The largest of x_1 .. x_t along dimension 1."""
    return tree_scan((x,), lambda first, then: (torch.maximum(first[0], then[0]),), (float("-inf"),))[0]
