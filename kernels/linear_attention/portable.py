"""Linear attention of plain torch operations, for any length: what an exported model holds.

B batch, L queries, S keys, H heads, K key width, V value width, C chunk length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..portable import Parts, chunk_scan
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
        state = value.new_zeros(q.shape[0], q.shape[2], q.shape[3], value.shape[3])
        if initial is not None:
            state = initial.s.to(acc)
            if initial.z is not None:
                state = torch.cat((state, initial.z.to(acc).unsqueeze(3)), 3)
        if causal:
            (state,), o = chunk_scan(_chunk, (state,), (query, key, value), CHUNK)
        else:
            state = state + torch.einsum("bshk,bshv->bhkv", key, value)
            o = torch.einsum("blhk,bhkv->blhv", query, state)
        if not normalize:
            return o.to(v.dtype), LinearState(state, None)
        o = o[..., :-1] / (o[..., -1:] + eps)
        return o.to(v.dtype), LinearState(state[..., :-1], state[..., -1])


def _chunk(carried: Parts, parts: Parts, _: Parts) -> tuple[Parts, Tensor]:
    q, k, v = (t.transpose(1, 2) for t in parts)  # (B, H, C, .)
    o = (q @ k.transpose(2, 3)).tril() @ v + q @ carried[0]
    return (carried[0] + k.transpose(2, 3) @ v,), o.transpose(1, 2)
