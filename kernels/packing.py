"""Sequences packed without padding into one row: their bounds, as cu_seqlens (N+1,) has them, checked in one place."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor


def packed_bounds(cu_seqlens: Tensor, length: int) -> list[int]:
    """The N+1 bounds as numbers, sequence i from bounds[i] to bounds[i + 1]; a sequence may be empty.

    cu_seqlens: (N+1,), integers, N >= 1. length: tokens of the row. Raises ValueError for bounds that do not rise from
    0 to length. Waits for the device.
    """
    bounds = cu_seqlens.tolist()
    if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens={bounds} must rise from 0 to the length of the packed row, {length}")
    return bounds
