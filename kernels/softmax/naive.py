"""Softmax attention by its formula, with the full score matrix: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def softmax_naive(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    window: tuple[int, int] | None,
    scale: float,
    drop: float,
) -> Tensor:
    """o_i = sum_j softmax_j(scale q_i.k_j + bias_ij) v_j over the visible j, in float32 or wider."""
    length, source, group = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    # Query head h reads key head h // group.
    k, v = k.repeat_interleave(group, 2).to(wide), v.repeat_interleave(group, 2).to(wide)
    scores = torch.einsum("blhk,bshk->bhls", q.to(wide), k) * scale
    if bias is not None:
        scores = scores + bias
    if causal:
        ahead = torch.ones(length, source, dtype=torch.bool, device=q.device).triu(source - length + 1)
        scores = scores.masked_fill(ahead, float("-inf"))
    if window is not None:
        distance = torch.arange(length, device=q.device).unsqueeze(1) + (source - length)
        distance = distance - torch.arange(source, device=q.device)
        scores = scores.masked_fill((distance > window[0]) | (distance < -window[1]), float("-inf"))
    if mask is not None:
        scores = scores.masked_fill(~mask, float("-inf"))
    unseeing = (scores == float("-inf")).all(-1, keepdim=True)
    weights = scores.masked_fill(unseeing, 0.0).softmax(-1).masked_fill(unseeing, 0.0)
    return torch.einsum("bhls,bshv->blhv", F.dropout(weights, drop), v).to(q.dtype)
