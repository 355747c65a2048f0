"""The linear recurrence by its formula, step after step: the oracle of the other backends."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_associative_scan(a: Tensor, x: Tensor, initial: Tensor, dim: int, reverse: bool) -> Tensor:
    """h_t = a_t h_{t-1} + x_t (reverse: h_{t+1}); a: 1 or the size of x in every dimension, all of one dtype."""
    length = x.shape[dim]
    h, states = initial, []
    with torch.autocast(x.device.type, enabled=False):
        for t in range(length - 1, -1, -1) if reverse else range(length):
            h = a.select(dim, t if a.shape[dim] > 1 else 0) * h + x.select(dim, t)
            states.append(h)
    if not states:
        return x.clone()
    return torch.stack(states[::-1] if reverse else states, dim)
