"""What a chunk of tokens does to the state of decayed linear attention, without its outputs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..linear_attention import accumulation_dtype


def gated_chunk_summary(k: Tensor, v: Tensor, log_decay: Tensor) -> tuple[Tensor, Tensor]:
    """(decay, state) with which S_L = decay * S_0 + state: the product of the decays, and the sum of k_t v_t^T, each
    decayed by the tokens after it (LASP-2, arXiv:2502.07563, section 3; with decay as for chunks in arXiv:2312.06635).

    k: (B, L, G, K). v: (B, L, H, V). log_decay: (H,), (B, L, H) or (B, L, H, K), as in `gated_linear_attention`.
    Returns decay, broadcastable to the state (B, H, K, V), and the state, in float32 (float64 for float64). One product
    of O(L K V) per head; linear in the state, so summaries of chunks compose.
    """
    heads, wide = v.shape[2], accumulation_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        log_decay = log_decay.to(wide).clamp(min=-100.0)  # as the operation has it
        if log_decay.dim() == 1:
            place = torch.arange(v.shape[1] - 1, -1, -1, device=v.device, dtype=wide)
            after = (place.unsqueeze(1) * log_decay).view(1, -1, heads, 1)
            total = (v.shape[1] * log_decay).view(1, heads, 1)
        else:
            log_decay = log_decay if log_decay.dim() == 4 else log_decay.unsqueeze(3)
            since = log_decay.flip(1).cumsum(1).flip(1)  # that of the token itself too
            after = F.pad(since[:, 1:], (0, 0, 0, 0, 0, 1))
            total = since[:, 0] if v.shape[1] else log_decay.sum(1)
        k = k.to(wide)
        k = k if k.shape[2] == heads else k.repeat_interleave(heads // k.shape[2], 2)
        state = torch.einsum("blhk,blhv->bhkv", k * after.exp(), v.to(wide))
        return total.exp().unsqueeze(3), state
