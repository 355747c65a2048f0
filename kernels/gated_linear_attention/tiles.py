"""What chunks with a decay per head (head_decay.py) and per key channel (channel_decay.py) have in common."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Shape(NamedTuple):
    """Sizes of a span: n chunks of R rows, G groups of J heads, C chunk length, K key width, V value width."""

    number: int
    rows: int
    groups: int
    share: int
    length: int
    key: int
    value: int


def swap(x: Tensor) -> Tensor:
    """(..., J, C, V) to (..., C, J, V) or back."""
    return x.transpose(-3, -2)


def flat(x: Tensor) -> Tensor:
    """The matrices of a tensor as one batch."""
    return x.flatten(0, -3)


def halves(x: Tensor, h: int, axis: int = -2) -> tuple[Tensor, Tensor]:
    """Blocks of 2h along an axis to their left and right halves: that axis becomes (C / 2h, h)."""
    left, right = x.unflatten(axis, (-1, 2, h)).unbind(axis - 1)
    return left, right


def corner(a: Tensor, h: int) -> Tensor:
    """Of (..., C, C), the entries with a row in a right half and a column in its left one, (..., C / 2h, h, h)."""
    blocks = a.unflatten(-1, (-1, 2, h)).select(-2, 0).unflatten(-3, (-1, 2, h)).select(-4, 1)
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


def power_of_two(length: int) -> int:
    """The smallest that is not below `length`."""
    return 1 << max(0, length - 1).bit_length()


def from_end(x: Tensor, axis: int) -> Tensor:
    """Sums over positions t and later."""
    return x.flip(axis).cumsum(axis).flip(axis)
