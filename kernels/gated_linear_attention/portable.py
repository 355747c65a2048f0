"""Gated linear attention of plain torch operations, for any length: what an exported model holds.

B batch, L length, G groups of heads that share q and k, H heads, K key width, V value width, C chunk length, n chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear_attention import accumulation_dtype
from ..portable import delayed, from_blocks, linear_scan, to_blocks

HEAD_CHUNK = 64
CHANNEL_CHUNK = 16  # its weights are of every pair and every key channel
LOWEST = -100.0


def portable_gated_linear_attention(
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
    """As `naive_gated_linear_attention`; chunk, return_state: not used."""
    acc = accumulation_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        batch, length, heads, _ = v.shape
        if q.shape[2] != heads:
            q, k = (t.repeat_interleave(heads // q.shape[2], 2) for t in (q, k))
        g = log_decay.to(acc).clamp(min=LOWEST).expand(batch, length, heads, log_decay.shape[3])
        size = HEAD_CHUNK if g.shape[3] == 1 else CHANNEL_CHUNK
        if isinstance(length, int):
            size = max(1, min(size, length))
        q, k, value, g = (to_blocks(t.to(acc), size) for t in (q, k, v, g))  # (B, n, C, H, .)
        total = g.cumsum(2)
        seen = torch.ones(size, size, dtype=torch.bool, device=v.device).tril()
        if g.shape[4] == 1:
            t = total.squeeze(4).transpose(2, 3)  # (B, n, H, C)
            lost = (t.unsqueeze(4) - t.unsqueeze(3)).masked_fill(~seen, float("-inf"))
            weight = torch.einsum("bnthk,bnshk->bnhts", q, k) * lost.exp()
        else:
            lost = (total.unsqueeze(3) - total.unsqueeze(2)).masked_fill(~seen[:, :, None, None], float("-inf"))
            weight = (q.unsqueeze(3) * k.unsqueeze(2) * lost.exp()).sum(5).permute(0, 1, 4, 2, 3)
        o = torch.einsum("bnhts,bnshv->bnthv", weight, value)
        end = total[:, :, -1:]
        states = torch.einsum("bnshk,bnshv->bnhkv", k * (end - total).exp(), value)
        decay = end.squeeze(2).exp().unsqueeze(4)
        if initial is not None:
            states = torch.cat((initial.to(acc).unsqueeze(1), states), 1)
            decay = torch.cat((torch.ones_like(decay[:, :1]), decay), 1)
        states = linear_scan(decay, states)
        before = delayed(states, 1) if initial is None else states[:, :-1]
        o = o + torch.einsum("bnthk,bnhkv->bnthv", q * total.exp(), before)
        return from_blocks(o * scale, length).to(v.dtype), states[:, -1]
