"""The selective scan of plain torch operations, for any length: what an exported model holds.

B batch, L length, E channels, N state width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..portable import linear_scan


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
    """As `naive_selective_scan`, all steps at once: needs memory for several tensors (B, L, E, N)."""
    with torch.autocast(u.device.type, enabled=False):
        u, dt, a, b, c = (t.to(initial.dtype) for t in (u, dt, a, b, c))
        decay_BLEN = torch.exp(dt.unsqueeze(3) * a)
        x_BLEN = (dt * u).unsqueeze(3) * b.unsqueeze(2)
        first = torch.addcmul(x_BLEN[:, :1], decay_BLEN[:, :1], initial.unsqueeze(1))
        h_BLEN = linear_scan(decay_BLEN, torch.cat((first, x_BLEN[:, 1:]), 1))
        return (h_BLEN * c.unsqueeze(2)).sum(3), h_BLEN[:, -1]
