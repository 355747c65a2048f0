"""Gated linear attention by its recurrence, one token after another: the oracle of the other backends.

B batch, L length, G groups of heads that share q and k, H heads, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear_attention import accumulation_dtype


def naive_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    *,
    scale: float,
    chunk: int | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t, in a loop; differentiable twice.

    q, k: (B, L, G, K). v: (B, L, H, V). log_decay: (B or 1, L or 1, H, K or 1). initial: (B, H, K, V) or None.
    chunk, return_state: not used. Returns o (B, L, H, V) and the last state (B, H, K, V).
    """
    acc = accumulation_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        batch, length, heads, value = v.shape
        share = heads // q.shape[2] if q.shape[2] else 1
        q_BLHK, k_BLHK = (t.to(acc).repeat_interleave(share, 2) for t in (q, k))
        v_BLHV = v.to(acc)
        decay = log_decay.to(acc).exp().expand(batch, length, heads, -1)
        s_BHKV = v_BLHV.new_zeros(batch, heads, q.shape[3], value) if initial is None else initial.to(acc)
        rows = []
        for t in range(length):
            s_BHKV = decay[:, t, :, :, None] * s_BHKV + k_BLHK[:, t, :, :, None] * v_BLHV[:, t, :, None, :]
            rows.append(scale * (q_BLHK[:, t, :, :, None] * s_BHKV).sum(2))
        o_BLHV = torch.stack(rows, 1) if rows else v_BLHV.new_empty(v.shape)
        return o_BLHV.to(v.dtype), s_BHKV
