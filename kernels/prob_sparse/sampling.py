"""How many keys and queries ProbSparse attention takes, and which keys: a counter-based sample.

A sampled key is a function of (seed, query, column, number of keys) alone, not of a place in a random stream.
So the same sample comes out on any device, in any chunking, and for a sequence whether it stands alone, in a
batch or padded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 128  # queries that share a sample under sampling="block"
_MASK = 0xFFFFFFFF
_MOST = 14  # ceil(ln L) for L up to 1,202,604


def budget(length: int, factor: int) -> int:
    """min(factor * ceil(ln length), length), and 1 for a single position, where the published formula gives
    0. Of a length that is not known while a model is exported, what the longest takes."""
    if not isinstance(length, int):
        return factor * _MOST
    return min(factor * max(math.ceil(math.log(length)), 1), length) if length > 0 else 0


def budgets(lengths: Tensor, factor: int) -> Tensor:
    """`budget` of every element of an int64 tensor."""
    steps = lengths.clamp(min=1).double().log().ceil().clamp(min=1).long()
    return torch.minimum(factor * steps, lengths)


def _mix(x: Tensor) -> Tensor:
    """A 32-bit integer hash in int64; both multipliers are below 2^31, so no product overflows."""
    x = ((x >> 16) ^ x) * 0x45D9F3B & _MASK
    x = ((x >> 16) ^ x) * 0x45D9F3B & _MASK
    return (x >> 16) ^ x


@dataclass(frozen=True)
class KeySample:
    """The keys sampled for each query (or block of queries), as ranks among a row's valid keys.

    seed: int64 scalar tensor, used where index is None. index: explicit int64 (rows, width). width: columns.
    """

    seed: Tensor
    index: Tensor | None
    width: int
    factor: int

    def rows(self, first: int, last: int, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Ranks and their validity for rows first..last; keys: int64 (R,) valid keys. Both are (R,
        last-first, width)."""
        count = keys.view(-1, 1, 1)
        if self.index is not None:
            ranks = self.index[first:last].expand(keys.shape[0], -1, -1)
            return torch.minimum(ranks, (count - 1).clamp(min=0)), ranks < count
        row = torch.arange(first, last, device=keys.device).unsqueeze(1)
        column = torch.arange(self.width, device=keys.device)
        bits = _mix((_mix((self.seed + _mix(row + 1)) & _MASK) + column * 0x9E3779B1) & _MASK)
        ranks = (bits * count) >> 32
        valid = (column < budgets(keys, self.factor).view(-1, 1, 1)).expand_as(ranks)
        return ranks, valid
