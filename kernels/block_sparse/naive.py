"""Block-sparse attention by its formula, with the full score matrix: the oracle."""

from __future__ import annotations

import torch
from torch import Tensor


def naive_block_sparse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    weight: Tensor | None,
    q_position: Tensor | None,
    key_mask: Tensor | None,
    *,
    q_block: int,
    k_block: int,
    scale: float,
) -> Tensor:
    """See `block_sparse_attention`, which checks the arguments. The routing becomes a mask over L x S."""
    length, source, heads = q.shape[1], k.shape[1], q.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    blocks = torch.arange(-(-source // k_block), device=q.device)
    chosen = index.unsqueeze(-1) == blocks  # (B, Hr, G, T, R)

    def expand(x: Tensor) -> Tensor:
        """(B, Hr, G, R) to (B, H, L, S)."""
        x = x.repeat_interleave(k_block, 3)[..., :source].repeat_interleave(q_block, 2)[:, :, :length]
        return x.repeat_interleave(heads // x.shape[1], 1)

    visible = expand(chosen.any(3))
    if key_mask is not None:
        visible = visible & key_mask[:, None, None, :]
    if q_position is not None:
        visible = visible & (torch.arange(source, device=q.device) <= q_position[:, None, :, None])
    scores = torch.einsum("blhk,bshk->bhls", q.to(wide), k.to(wide)) * scale
    factor = None if weight is None else expand((chosen * weight.to(wide).unsqueeze(-1)).sum(3))
    if factor is not None:
        scores = scores * factor
    scores = scores.masked_fill(~visible, float("-inf"))
    unseeing = ~visible.any(-1, keepdim=True)
    p = scores.masked_fill(unseeing, 0.0).softmax(-1).masked_fill(unseeing, 0.0)
    return torch.einsum("bhls,bshv->blhv", p if factor is None else p * factor, v.to(wide)).to(v.dtype)
