"""The formula row by row with the full score matrix, in fp32 or fp64: the oracle. Quadratic in memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .sampling import KeySample, budget


def prob_sparse_naive(
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
    """`prob_sparse_attention` with checked arguments; pads are dropped from every row before anything
    else."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    everything = torch.ones(q.shape[0], max(q.shape[1], k.shape[1]), dtype=torch.bool, device=q.device)
    out = torch.zeros(*q.shape[:3], v.shape[-1], dtype=dtype, device=q.device)
    for b in range(q.shape[0]):
        rows = (everything[b, : q.shape[1]] if query_mask is None else query_mask[b]).nonzero().squeeze(1)
        cols = (everything[b, : k.shape[1]] if key_mask is None else key_mask[b]).nonzero().squeeze(1)
        n, m = len(rows), len(cols)
        if n == 0 or m == 0:
            continue
        qb, kb, vb = (t.to(dtype).transpose(0, 1) for t in (q[b, rows], k[b, cols], v[b, cols]))
        scores = qb @ kb.transpose(1, 2)  # (H, n, m)
        ranks, valid = sample.rows(0, -(-n // block), torch.tensor([m], device=q.device))
        ranks = ranks[0].repeat_interleave(block, 0)[:n].expand(len(scores), -1, -1)
        valid = valid[0].repeat_interleave(block, 0)[:n]
        sampled = scores.gather(2, ranks)
        divisor = m if divide_by_keys else valid.sum(1)
        measure = sampled.masked_fill(~valid, -torch.inf).amax(2) - sampled.masked_fill(~valid, 0).sum(2) / divisor
        chosen = measure.sort(dim=1, descending=True, stable=True).indices[:, : budget(n, factor)]
        active = torch.zeros_like(measure, dtype=torch.bool).scatter(1, chosen, True)
        visible = cols <= rows.unsqueeze(1) if masked else torch.ones(n, m, dtype=torch.bool, device=q.device)
        dense = (scores * scale).masked_fill(~visible, -torch.inf).softmax(2) @ vb
        weights = visible.to(dtype)
        if lazy_mean or not masked:
            weights = weights / weights.sum(1, keepdim=True).clamp(min=1)
        out = out.index_put(
            (torch.tensor(b, device=q.device), rows),
            torch.where(active.unsqueeze(2), dense.nan_to_num(0.0), weights @ vb).transpose(0, 1),
        )
    return out.to(v.dtype)
