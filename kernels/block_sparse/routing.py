"""Which blocks of keys a query, or a block of queries, is sent to: those whose mean key it agrees with most."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Affinities in one step: there are L R of them where every query routes for itself.
_STEP = 1 << 22


def block_sums(x: Tensor, size: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sums over blocks of `size` tokens, (B, R, D) in float32 or wider, and their numbers of tokens, int64 (B, R).

    x: (B, S, D); the last block may be partial. mask: bool (B, S), the tokens that count; None for all.
    """
    extra = -x.shape[1] % size
    real = x.new_ones(x.shape[:2], dtype=torch.bool) if mask is None else mask
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if mask is not None:
        x = x.masked_fill(~mask.unsqueeze(2), 0.0)
    x, real = F.pad(x, (0, 0, 0, extra)), F.pad(real, (0, extra))
    return x.unflatten(1, (-1, size)).sum(2), real.unflatten(1, (-1, size)).sum(2)


def block_means(x: Tensor, size: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As `block_sums`, means instead of sums; 0 for a block without tokens."""
    total, number = block_sums(x, size, mask)
    return total / number.clamp(min=1).unsqueeze(2), number


def route(q: Tensor, k: Tensor, number: int, *, exists: Tensor | None = None, before: Tensor | None = None) -> Tensor:
    """The `number` blocks of largest q . k, by falling affinity, int64 (B, Hr, G, min(number, R)); -1 for none.

    q: (B, G, Hr, K), of the queries. k: (B, R, Hr, K), of the blocks. exists: bool (B, R), the blocks that may be
    chosen. before: int64 (B, G), only blocks below this one may. Of equal affinities the lowest block comes first,
    on every device. In float32 or wider; no gradient.
    """
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        wide = torch.promote_types(torch.promote_types(q.dtype, k.dtype), torch.float32)
        q, k = q.to(wide).transpose(1, 2), k.to(wide).permute(0, 2, 3, 1)  # (B, Hr, G, K), (B, Hr, K, R)
        batch, heads, groups, blocks = *q.shape[:3], k.shape[3]
        number = min(number, blocks)
        if number == 0 or groups == 0:
            return torch.zeros(batch, heads, groups, number, dtype=torch.int64, device=q.device)
        place = torch.arange(blocks, device=q.device)
        step = max(1, _STEP // (batch * heads * blocks))
        parts = []
        for first in range(0, groups, step):
            affinity = q[:, :, first : first + step] @ k
            if exists is not None:
                affinity = affinity.masked_fill(~exists[:, None, None], float("-inf"))
            if before is not None:
                future = place >= before[:, first : first + step].unsqueeze(2)
                affinity = affinity.masked_fill(future.unsqueeze(1), float("-inf"))
            parts.append(_largest(affinity, number))
        return torch.cat(parts, 2)


def _largest(affinity: Tensor, number: int) -> Tensor:
    """Places of the `number` largest along the last axis, -1 for -inf; topk leaves the order of ties open."""
    found = []
    for _ in range(number):
        at = affinity.argmax(-1, keepdim=True)  # the first of equal ones
        found.append(torch.where(affinity.gather(-1, at) > float("-inf"), at, -1))
        affinity = affinity.scatter(-1, at, float("-inf"))
    return torch.cat(found, -1)
