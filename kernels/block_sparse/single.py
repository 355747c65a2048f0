"""Block-sparse attention of one query per row: a step of decoding, which reads the chosen keys and no others."""

from __future__ import annotations

import torch
from torch import Tensor


def single_query(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    weight: Tensor | None,
    q_position: Tensor | None,
    key_mask: Tensor | None,
    *,
    k_block: int,
    scale: float,
) -> Tensor:
    """`naive_block_sparse` for L = 1, in time that does not know S (its gradient does). Returns (B, 1, H, V)."""
    batch, _, heads, width = q.shape
    source, routing = k.shape[1], index.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    inside = torch.arange(k_block, device=q.device)
    at = (index.squeeze(2).unsqueeze(3) * k_block + inside).flatten(2)  # (B, Hr, T W)
    visible = (at >= 0) & (at < source)
    if q_position is not None:
        visible = visible & (at <= q_position.unsqueeze(1))
    at = at.clamp(0, source - 1)
    row = torch.arange(batch, device=q.device).view(-1, 1, 1)
    if key_mask is not None:
        visible = visible & key_mask[row, at]
    head = torch.arange(routing, device=q.device).view(1, -1, 1)
    with torch.autocast(q.device.type, enabled=False):
        # (B, Hr, T W, h, ...) of the chosen tokens
        k, v = (t.unflatten(2, (routing, -1))[row, at, head].to(wide) for t in (k, v))
        s = torch.einsum("brhk,brnhk->brhn", q.to(wide).view(batch, routing, -1, width), k) * scale
        gain = None if weight is None else weight.to(wide).squeeze(2).repeat_interleave(k_block, 2).unsqueeze(2)
        s = s if gain is None else s * gain
        unseeing = ~visible.any(2)[..., None, None]
        s = s.masked_fill(~visible.unsqueeze(2), float("-inf")).masked_fill(unseeing, 0.0)
        p = s.softmax(3).masked_fill(unseeing, 0.0)
        y = torch.einsum("brhn,brnhv->brhv", p if gain is None else p * gain, v)
    return y.reshape(batch, 1, heads, -1).to(q.dtype)
