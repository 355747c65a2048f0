"""Gated linear attention of plain torch operations, for any length: what an exported model holds.

B batch, L length, G groups of heads that share q and k, H heads, K key width, V value width, C chunk length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..linear_attention import accumulation_dtype
from ..portable import chunk_scan

HEAD_CHUNK = 64
CHANNEL_CHUNK = 16  # its weights are of every pair and every key channel
LOWEST = -100.0


def gated_chunk(q: Tensor, k: Tensor, v: Tensor, g: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """o (B, C, H, V) of a chunk and the state (B, H, K, V) after it. g: log decay (B, C, H, 1 or K)."""
    total = g.cumsum(1)
    seen = torch.ones(g.shape[1], g.shape[1], dtype=torch.bool, device=g.device).tril()
    q, k, v, total = (t.transpose(1, 2) for t in (q, k, v, total))  # (B, H, C, .)
    if g.shape[3] == 1:
        lost = (total - total.transpose(2, 3)).masked_fill(~seen, float("-inf"))
        weight = (q @ k.transpose(2, 3)) * lost.exp()
    else:
        lost = (total.unsqueeze(3) - total.unsqueeze(2)).masked_fill(~seen.unsqueeze(2), float("-inf"))
        weight = (q.unsqueeze(3) * k.unsqueeze(2) * lost.exp()).sum(4)
    o = weight @ v + (q * total.exp()) @ before
    end = total[:, :, -1:]
    after = before * end.exp().transpose(2, 3) + (k * (end - total).exp()).transpose(2, 3) @ v
    return o.transpose(1, 2), after


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
        batch, length, heads, value = v.shape
        if q.shape[2] != heads:
            q, k = (t.repeat_interleave(heads // q.shape[2], 2) for t in (q, k))
        g = log_decay.to(acc).clamp(min=LOWEST).expand(batch, length, heads, log_decay.shape[3])
        first = v.new_zeros(batch, heads, q.shape[3], value, dtype=acc) if initial is None else initial.to(acc)

        def body(carried, parts, _):
            o, after = gated_chunk(*parts, *carried)
            return (after,), o

        size = HEAD_CHUNK if g.shape[3] == 1 else CHANNEL_CHUNK
        (state,), o = chunk_scan(body, (first,), [t.to(acc) for t in (q * scale, k, v, g)], size)
        return o.to(v.dtype), state
