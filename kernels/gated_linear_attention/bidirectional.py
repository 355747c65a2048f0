"""Both directions at once (ours): each token sees those before and after it through the decay between them."""

from __future__ import annotations

import torch
from torch import Tensor


def beyond(lengths: Tensor, length: int) -> Tensor:
    """bool (B, L, 1, 1): places beyond the tokens of their row."""
    return (torch.arange(length, device=lengths.device) >= lengths.unsqueeze(1))[:, :, None, None]


def diagonal(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """(B, L, H, V): what each token gets from itself, scale (q_t . k_t) v_t."""
    own = (q * k).sum(-1, keepdim=True) * scale
    return own.repeat_interleave(v.shape[2] // q.shape[2], 2) * v
