"""Linear attention of plain torch operations, for any length: what an exported model holds.

B batch, L queries, S keys, H heads, K key width, V value width, C chunk length, n chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..portable import from_blocks, to_blocks
from .naive import LinearState, accumulation_dtype

CHUNK = 64


def portable_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: LinearState | None,
    *,
    causal: bool,
    normalize: bool,
    eps: float,
    scale: float,
    cu_seqlens: Tensor | None,
    return_state: bool = True,
) -> tuple[Tensor, LinearState]:
    """As `naive_linear_attention`, of one sequence a row: cu_seqlens must be None. return_state: not used."""
    acc = accumulation_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        query, key, value = q.to(acc) * scale, k.to(acc), v.to(acc)
        if normalize:  # the normaliser is the sum of one more value, which is always 1
            value = torch.cat((value, torch.ones_like(value[..., :1])), 3)
        first = None
        if initial is not None:
            first = initial.s.to(acc)
            if initial.z is not None:
                first = torch.cat((first, initial.z.to(acc).unsqueeze(3)), 3)
        if causal:
            o, state = _causal(query, key, value, first)
        else:
            state = torch.einsum("bshk,bshv->bhkv", key, value)
            state = state if first is None else state + first
            o = torch.einsum("blhk,bhkv->blhv", query, state)
        if not normalize:
            return o.to(v.dtype), LinearState(state, None)
        o = o[..., :-1] / (o[..., -1:] + eps)
        return o.to(v.dtype), LinearState(state[..., :-1], state[..., -1])


def _causal(q: Tensor, k: Tensor, v: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor]:
    length = q.shape[1]
    size = max(1, min(CHUNK, length)) if isinstance(length, int) else CHUNK
    q, k, v = (to_blocks(t, size) for t in (q, k, v))  # (B, n, C, H, .)
    o = torch.einsum("bnhts,bnshv->bnthv", torch.einsum("bnthk,bnshk->bnhts", q, k).tril(), v)
    own = torch.einsum("bnshk,bnshv->bnhkv", k, v)
    after = own.cumsum(1) if first is None else own.cumsum(1) + first.unsqueeze(1)
    o = o + torch.einsum("bnthk,bnhkv->bnthv", q, after - own)
    return from_blocks(o, length), after[:, -1]
