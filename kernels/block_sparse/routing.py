"""Which blocks of keys a query, or a block of queries, is sent to: those whose mean key it agrees with most."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

# Affinities in one step (there are L R of them where every query routes for itself): a CPU keeps them in cache.
_STEP = {"cpu": 1 << 19, "cuda": 1 << 24}
_GROUP = 32  # affinities of which the largest are looked at first, where there are many


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
        if torch.compiler.is_exporting():  # at once, whatever the sizes are
            return _largest_of_any(q @ k, number, exists, before)
        number = min(number, blocks)
        if 0 in (batch, number, groups):
            return torch.zeros(batch, heads, groups, number, dtype=torch.int64, device=q.device)
        step = max(1, _STEP.get(q.device.type, 1 << 22) // (batch * heads * blocks))
        parts = []
        for first in range(0, groups, step):
            bound = None if before is None else before[:, first : first + step]
            low, high = _bounds(bound, blocks)
            affinity = q[:, :, first : first + step] @ k[..., :high]
            if exists is not None:
                affinity = affinity.masked_fill(~exists[:, None, None, :high], float("-inf"))
            if bound is not None and low < high:
                future = torch.arange(low, high, device=q.device) >= bound.unsqueeze(2)
                affinity[..., low:].masked_fill_(future.unsqueeze(1), float("-inf"))
            parts.append(_largest(affinity, number))
        return torch.cat(parts, 2)


def _largest_of_any(affinity: Tensor, number: int, exists: Tensor | None, before: Tensor | None) -> Tensor:
    """As `route` with all affinities (B, Hr, G, R) at once, R not known; always `number` places."""
    if exists is not None:
        affinity = affinity.masked_fill(~exists[:, None, None], float("-inf"))
    if before is not None:
        late = torch.arange(affinity.shape[3], device=affinity.device) >= before.unsqueeze(2)
        affinity = affinity.masked_fill(late.unsqueeze(1), float("-inf"))
    return _one_by_one(F.pad(affinity, (0, number), value=float("-inf")), number)


def _bounds(before: Tensor | None, blocks: int) -> tuple[int, int]:
    """All of these queries may choose below the first number and none from the second on, as far as that is known."""
    if before is None:
        return blocks, blocks
    if before.device.type != "cpu" or torch.compiler.is_compiling():
        return 0, blocks
    return int(before.min().clamp(0, blocks)), int(before.max().clamp(0, blocks))


def _largest(affinity: Tensor, number: int) -> Tensor:
    """Places of the `number` largest along the last axis, -1 for -inf; of equals the first. Overwrites affinity.

    (topk leaves the order of ties open.) The largest of many stand in the `number` groups with the largest maxima, so
    that all but these groups are read once.
    """
    blocks = affinity.shape[-1]
    if blocks < 2 * _GROUP * number:
        return _one_by_one(affinity, number)
    grouped = F.pad(affinity, (0, -blocks % _GROUP), value=float("-inf")).unflatten(-1, (-1, _GROUP))
    groups = _one_by_one(grouped.amax(-1), number).sort(-1).values  # rising: the first of equals stays the first
    chosen = groups.clamp(min=0).unsqueeze(-1)
    candidates = grouped.gather(-2, chosen.expand(*chosen.shape[:-1], _GROUP))
    candidates = candidates.masked_fill(groups.unsqueeze(-1) < 0, float("-inf")).flatten(-2)
    at = _one_by_one(candidates, number)
    place = groups.gather(-1, at.clamp(min=0) // _GROUP) * _GROUP + at % _GROUP
    return torch.where(at < 0, -1, place)


def _one_by_one(affinity: Tensor, number: int) -> Tensor:
    """As `_largest`, in `number` passes over all."""
    found = []
    there = affinity.shape[-1]
    for step in range(min(number, there) if isinstance(there, int) else number):
        highest, at = affinity.max(-1, keepdim=True)  # the first of equal ones
        found.append(torch.where(highest > float("-inf"), at, -1))
        if step + 1 < number:
            affinity = affinity.scatter_(-1, at, float("-inf"))
    return F.pad(torch.cat(found, -1) if found else affinity.long(), (0, number - len(found)), value=-1)
