"""Rows whose real tokens come first: padded batches and packed sequences brought to that form, and back.

In such rows causality hides the pads by itself, and distance in the row is distance in position.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from ...kernels.packing import packed_bounds


def take(x: Tensor, index: Tensor) -> Tensor:
    """Entries of each row: x (B, S, ...), index int64 (B, M), gives (B, M, ...)."""
    if x.shape[1] == 0:
        return x.new_zeros(*index.shape, *x.shape[2:])
    index = index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:])
    return x.gather(1, index)


def rank_order(mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """How to bring the real tokens of each row to its front, in order, and back.

    mask: bool (B, L). Returns order (B, L), with which `take` sorts; back (B, L), with which `take` restores;
    and the number of real tokens (B,). All int64.
    """
    real = mask.long().cumsum(1)
    number = real[:, -1] if mask.shape[1] else real.sum(1)
    back = torch.where(mask, real - 1, number.unsqueeze(1) + (~mask).long().cumsum(1) - 1)
    place = torch.arange(mask.shape[1], device=mask.device).expand_as(back)
    return torch.empty_like(back).scatter_(1, back, place), back, number


def packed_groups(cu_seqlens: Tensor, length: int, *, together: bool) -> Iterator[tuple[Tensor, Tensor]]:
    """How to lay out sequences that are packed into one row of `length` tokens, in groups of similar length.

    cu_seqlens: (N+1,), their bounds. together: all N in one group, in order, as a state has them. Otherwise
    the longest of a group is less than twice the shortest, so padding stays under half however uneven they
    are. Yields, per group, the place of each token in the packed row, int64 (B, L), and whether there is one,
    bool (B, L). Raises ValueError for bounds that do not rise from 0 to length.
    """
    bounds = packed_bounds(cu_seqlens, length)
    lengths = [end - start for start, end in pairwise(bounds)]
    groups: dict[int, list[int]] = {}
    for sequence, number in enumerate(lengths):
        groups.setdefault(0 if together else number.bit_length(), []).append(sequence)
    for members in groups.values():
        start = torch.tensor([bounds[m] for m in members], device=cu_seqlens.device).unsqueeze(1)
        size = torch.tensor([lengths[m] for m in members], device=cu_seqlens.device).unsqueeze(1)
        step = torch.arange(max(lengths[m] for m in members), device=cu_seqlens.device)
        valid = step < size
        yield torch.where(valid, start + step, 0), valid


def zero_pads(x: Tensor, mask: Tensor | None) -> Tensor:
    """x (B, L, D) with zeros where mask, bool (B, L), is False: a pad may hold anything, NaN too."""
    return x if mask is None else x.masked_fill(~mask.unsqueeze(-1), 0)


class Layout(NamedTuple):
    """Where the tokens of a batch lie once its real tokens come first in every row: made by `lay_out`.

    valid: bool (R, M), which places of the rows hold a token; None when all do. lengths: int64 (R,), tokens of a
    row; None when all are full. R = B, or N for packed sequences.
    """

    valid: Tensor | None
    lengths: Tensor | None
    source: Tensor | None
    back: Tensor | None
    packed: bool

    def place(self, x: Tensor) -> Tensor:
        """Bring (B, L, ...) to (R, M, ...); what lies beyond a row's tokens is arbitrary."""
        if self.source is None:
            return x
        return x[0, self.source] if self.packed else take(x, self.source)

    def real(self, x: Tensor) -> Tensor:
        """As `place`, with zeros beyond a row's tokens."""
        x = self.place(x)
        return (
            x if self.valid is None else x.masked_fill(~self.valid.reshape(*self.valid.shape, *[1] * (x.dim() - 2)), 0)
        )

    def restore(self, y: Tensor) -> Tensor:
        """Bring (R, M, ...) back to (B, L, ...), with zeros where x had a pad."""
        if self.valid is None:
            return y
        if self.packed:
            return y[self.valid].unsqueeze(0)
        y = y.masked_fill(~self.valid.reshape(*self.valid.shape, *[1] * (y.dim() - 2)), 0)
        return y if self.back is None else take(y, self.back)

    def reverse(self, x: Tensor) -> Tensor:
        """Rows (R, M, ...) with the tokens of each in reverse order, still first; what lies beyond stays arbitrary."""
        if self.lengths is None:
            return x.flip(1)
        place = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        last = self.lengths.unsqueeze(1) - 1
        return take(x, torch.where(place <= last, last - place, place))


def lay_out(mask: Tensor | None, cu_seqlens: Tensor | None, length: int) -> Layout:
    """How to bring padded or packed tokens to rows whose real tokens come first, and back.

    mask: bool (B, L) or None. cu_seqlens: (N+1,) or None, one of both at most. length: L of x. With neither, rows
    stay as they are. Raises ValueError for bounds that do not rise from 0 to length.
    """
    if cu_seqlens is not None:
        index, valid = next(packed_groups(cu_seqlens, length, together=True))
        return Layout(valid, valid.sum(1), index, None, True)
    if mask is None:
        return Layout(None, None, None, None, False)
    order, back, number = rank_order(mask)
    return Layout(torch.arange(length, device=mask.device) < number.unsqueeze(1), number, order, back, False)
