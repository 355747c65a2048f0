"""The selective scan of plain torch operations, for any length: what an exported model holds.

B batch, L length, E channels, N state width, C chunk length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..portable import chunk_scan, linear_steps

CHUNK = 16


def portable_selective_scan(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    initial: Tensor,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """As `naive_selective_scan`. chunk_size: not used."""
    with torch.autocast(u.device.type, enabled=False):
        u, dt, a, b, c = (t.to(initial.dtype) for t in (u, dt, a, b, c))

        def body(carried, parts, given):
            u, dt, b, c = parts
            decay_BCEN = torch.exp(dt.unsqueeze(3) * given[0])
            h_BCEN = linear_steps(decay_BCEN, (dt * u).unsqueeze(3) * b.unsqueeze(2), carried[0])
            return (h_BCEN[:, -1],), (h_BCEN * c.unsqueeze(2)).sum(3)

        (last,), y = chunk_scan(body, (initial,), (u, dt, b, c), CHUNK, (a,))
        return y, last
