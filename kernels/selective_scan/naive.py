"""The selective scan by its formula, token after token: the oracle of the other backends.

B batch, L length, E channels, N state width.
"""

from __future__ import annotations

import torch
from torch import Tensor


def naive_selective_scan(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    initial: Tensor,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t u_t b_t, y_t = h_t c_t; arguments and shapes as in `selective_scan`.

    initial: (B, E, N), in whose dtype all is computed. Returns y (B, L, E) and the last h. chunk_size is not used.
    """
    with torch.autocast(u.device.type, enabled=False):
        u, dt, a, b, c = (t.to(initial.dtype) for t in (u, dt, a, b, c))
        h_BEN, outputs = initial, []
        for t in range(u.shape[1]):
            decay_BEN = torch.exp(dt[:, t, :, None] * a)
            h_BEN = decay_BEN * h_BEN + (dt[:, t] * u[:, t])[:, :, None] * b[:, t, None]
            outputs.append((h_BEN * c[:, t, None]).sum(-1))
        return torch.stack(outputs, 1) if outputs else torch.zeros_like(u), h_BEN
