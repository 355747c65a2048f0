"""A grid of tokens cut into windows, and back."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Windows(NamedTuple):
    """A grid of `sizes` (H, W) or (T, H, W) tokens cut into windows of `sides` tokens, the last ones partial.

    The tokens of a window follow each other: (B, L, ...) becomes (B, R w, ...), with zeros where a window reaches
    beyond the grid. R windows of w tokens, in the order of the grid.
    """

    sizes: tuple[int, ...]
    sides: tuple[int, ...]

    @property
    def counts(self) -> tuple[int, ...]:
        """Windows along each axis."""
        return tuple(-(-size // side) for size, side in zip(self.sizes, self.sides, strict=True))

    @property
    def tokens(self) -> int:
        """w, tokens of a window."""
        return math.prod(self.sides)

    @property
    def whole(self) -> bool:
        """Whether the windows fill the grid."""
        return all(size % side == 0 for size, side in zip(self.sizes, self.sides, strict=True))

    def split(self, x: Tensor) -> Tensor:
        """(B, L, ...) to (B, R w, ...)."""
        rest, axes = x.shape[2:], len(self.sizes)
        x = x.reshape(x.shape[0], *self.sizes, *rest)
        for axis, (size, side, count) in enumerate(zip(self.sizes, self.sides, self.counts, strict=True), start=1):
            if size % side:
                shape = (*x.shape[:axis], count * side - size, *x.shape[axis + 1 :])
                x = torch.cat((x, x.new_zeros(shape)), axis)
        pairs = [n for pair in zip(self.counts, self.sides, strict=True) for n in pair]
        x = x.reshape(x.shape[0], *pairs, *rest)
        order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), *range(2 * axes + 1, x.dim())]
        return x.permute(order).reshape(x.shape[0], -1, *rest)

    def join(self, y: Tensor) -> Tensor:
        """(B, R w, ...) back to (B, L, ...)."""
        rest, axes = y.shape[2:], len(self.sizes)
        y = y.reshape(y.shape[0], *self.counts, *self.sides, *rest)
        order = [0, *(n for axis in range(1, axes + 1) for n in (axis, axis + axes)), *range(2 * axes + 1, y.dim())]
        y = y.permute(order)
        for axis, (size, side, count) in enumerate(zip(self.sizes, self.sides, self.counts, strict=True), start=1):
            y = y.reshape(*y.shape[:axis], count * side, *y.shape[axis + 2 :]).narrow(axis, 0, size)
        return y.reshape(y.shape[0], -1, *rest)
