"""ProbSparse attention of plain torch operations, for any length: what an exported model holds. Quadratic in memory.

Which queries attend is a mask over ranks, not a list: its length, of the order of log L, would be a number that
follows from L.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .chunked import _lazy, _order
from .sampling import KeySample, budgets


def prob_sparse_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    sample: KeySample,
    factor: int,
    divide_by_keys: bool,
    key_mask: Tensor | None,
    query_mask: Tensor | None,
    masked: bool,
    lazy_mean: bool,
    block: int,
    scale: float,
) -> Tensor:
    """`prob_sparse_attention` with checked arguments."""
    length, source = q.shape[1], k.shape[1]
    wide = torch.promote_types(q.dtype, torch.float32)
    _, q_count = _order(query_mask)
    k_order, k_count = _order(key_mask)
    keys = torch.full((1,), source, device=q.device) if k_count is None else k_count
    queries = torch.full((1,), length, device=q.device) if q_count is None else q_count
    with torch.autocast(q.device.type, enabled=False):
        scores_BHLS = torch.einsum("blhk,bshk->bhls", q.to(wide), k.to(wide))
        active = _active(
            scores_BHLS.detach(), sample, factor, divide_by_keys, query_mask, k_order, keys, queries, block
        )
        visible = torch.ones(1, 1, length, source, dtype=torch.bool, device=q.device)
        visible = visible.tril() if masked else visible
        if key_mask is not None:
            visible = visible & key_mask[:, None, None]
        blind = ~visible.any(3, keepdim=True)
        weight = (scores_BHLS * scale).masked_fill(~(visible | blind), float("-inf")).softmax(3)
        dense = torch.einsum("bhls,bshv->blhv", weight.masked_fill(blind, 0.0), v.to(wide))
    lazy = _lazy(v, key_mask, k_count, length, masked, lazy_mean)
    out = torch.where(active.transpose(1, 2).unsqueeze(3), dense.to(lazy.dtype), lazy)
    return out if query_mask is None else out.masked_fill(~query_mask[..., None, None], 0)


def _active(
    scores: Tensor,
    sample: KeySample,
    factor: int,
    divide_by_keys: bool,
    query_mask: Tensor | None,
    k_order: Tensor | None,
    keys: Tensor,
    queries: Tensor,
    block: int,
) -> Tensor:
    """Which queries attend, bool (B, H, L): the `budgets` with the largest measure."""
    batch, heads, length, _ = scores.shape
    ranks, valid = sample.rows(0, (length + block - 1) // block, keys)  # (R, blocks, U)
    place = ranks if k_order is None else k_order.gather(1, ranks.flatten(1)).view_as(ranks)
    if query_mask is None:
        row = (torch.arange(length, device=scores.device) // block).unsqueeze(0)
    else:
        row = (query_mask.cumsum(1) - 1).clamp(min=0) // block
    number = row.shape[0] if query_mask is not None else place.shape[0]
    row = row.expand(number, -1).unsqueeze(2).expand(-1, -1, sample.width)
    place, valid = (t.expand(number, -1, -1).gather(1, row).unsqueeze(1) for t in (place, valid))
    drawn = scores.gather(3, place.expand(batch, heads, -1, -1))
    largest = drawn.masked_fill(~valid, float("-inf")).amax(3)
    divisor = keys.view(-1, 1, 1) if divide_by_keys else valid.sum(3)
    measure = largest - drawn.masked_fill(~valid, 0.0).sum(3) / divisor.clamp(min=1)
    if query_mask is not None:
        measure = measure.masked_fill(~query_mask.unsqueeze(1), float("-inf"))
    order = measure.argsort(dim=2, descending=True, stable=True)
    return order.argsort(2) < budgets(queries, factor).view(-1, 1, 1)
