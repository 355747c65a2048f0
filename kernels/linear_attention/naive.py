"""Linear attention by its formula, with the dense kernel matrix: the oracle of the other backends.

B batch, L queries, S keys, H heads, K key width, V value width, N sequences of a packed row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..packing import packed_bounds


class LinearState(NamedTuple):
    """What causal linear attention carries: s (B, H, K, V), the sum of k v^T, and z (B, H, K), the sum of k.

    z is None for the unnormalised form. Both are float32, or float64 for float64 inputs.
    """

    s: Tensor
    z: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and states: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def naive_linear_attention(
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
    """o_i = sum_j w_ij v_j / (sum_j w_ij + eps), w_ij = scale q_i . k_j, over all j or, if causal, j <= i.

    Shapes as in `linear_attention`, whose arguments these are (return_state is not used); the initial state adds to
    both sums. Needs L x
    S memory, and N times that for a packed row, which becomes a batch of N copies that each see the keys of
    one sequence.
    """
    acc = accumulation_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        q_BLHK, k_BSHK, v_BSHV = q.to(acc) * scale, k.to(acc), v.to(acc)
        member = None
        if cu_seqlens is not None:
            packed_bounds(cu_seqlens, q.shape[1])
            positions = torch.arange(q.shape[1], device=q.device)
            bounds = cu_seqlens.long()[:, None]
            member = ((bounds[:-1] <= positions) & (positions < bounds[1:]))[:, :, None, None]  # (N, L, 1, 1)
            k_BSHK = k_BSHK * member
            q_BLHK, v_BSHV = q_BLHK.expand(len(member), -1, -1, -1), v_BSHV.expand(len(member), -1, -1, -1)

        w_BHLS = torch.einsum("blhk,bshk->bhls", q_BLHK, k_BSHK)
        if causal:
            w_BHLS = w_BHLS.tril()
        s_BHKV = torch.einsum("bshk,bshv->bhkv", k_BSHK, v_BSHV)
        z_BHK = k_BSHK.sum(1)
        o_BLHV = torch.einsum("bhls,bshv->blhv", w_BHLS, v_BSHV)
        den_BLH = w_BHLS.sum(-1).transpose(1, 2) + eps
        if initial is not None:
            s_BHKV = s_BHKV + initial.s
            o_BLHV = o_BLHV + torch.einsum("blhk,bhkv->blhv", q_BLHK, initial.s)
            if initial.z is not None:
                z_BHK = z_BHK + initial.z
                den_BLH = den_BLH + torch.einsum("blhk,bhk->blh", q_BLHK, initial.z)
        if normalize:
            o_BLHV = o_BLHV / den_BLH[..., None]
        if member is not None:
            o_BLHV = torch.where(member, o_BLHV, 0).sum(0, keepdim=True)
        return o_BLHV.to(v.dtype), LinearState(s_BHKV, z_BHK if normalize else None)
