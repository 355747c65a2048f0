"""ProbSparse attention without any L x S tensor: the CPU backend, and a good one on a GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .sampled import sampled_extent
from .sampling import KeySample, budget, budgets

# Elements of K gathered at a time under per-query sampling: a few MB stay in a CPU's cache, a GPU wants full
# waves.
_GATHER = {"cpu": 1 << 19, "cuda": 1 << 26}
_HASHED = 1024  # queries whose samples are drawn at a time


def prob_sparse_chunked(
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
    measure: Callable[..., Tensor] | None = None,
) -> Tensor:
    """`prob_sparse_attention` with checked arguments. measure: in the place of `_measure`.

    Rows with pads are handled by rank: `order` lists a row's real positions first, the measure is taken over
    ranks, and the selected ranks are mapped back to positions. Budgets are those of the full length, the
    surplus is masked off.
    """
    _, length, heads, width = q.shape
    source = k.shape[1]
    everything = torch.full((1,), source, device=q.device)
    q_order, q_count = _order(query_mask)
    k_order, k_count = _order(key_mask)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        ranked = q.detach() if q_order is None else q.detach().gather(1, q_order[..., None, None].expand_as(q))
        peaked = (measure or _measure)(
            ranked,
            k.detach(),
            k_order,
            everything if k_count is None else k_count,
            sample,
            divide_by_keys,
            block,
        )
        if q_count is not None:
            hidden = torch.arange(length, device=q.device) >= q_count.unsqueeze(1)
            peaked = peaked.masked_fill(hidden.unsqueeze(2), -torch.inf)
        chosen = _largest(peaked.transpose(1, 2), budget(length, factor))  # (B, H, u) ranks
        if q_order is not None:
            chosen = q_order.unsqueeze(1).expand(-1, heads, -1).gather(2, chosen)
    index = chosen.transpose(1, 2).unsqueeze(3)  # (B, u, H, 1)
    selected = q.gather(1, index.expand(-1, -1, -1, width)).transpose(1, 2)
    visible, blind = _visible(chosen, key_mask, source, masked)
    attended = F.scaled_dot_product_attention(
        selected, k.transpose(1, 2), v.transpose(1, 2), attn_mask=visible, scale=scale
    ).transpose(1, 2)
    lazy = _lazy(v, key_mask, k_count, length, masked, lazy_mean)
    index = index.expand_as(attended)
    if blind is not None:
        attended = attended.masked_fill(blind.transpose(1, 2), 0)
    if q_count is not None:
        taken = torch.arange(chosen.shape[2], device=q.device) < budgets(q_count, factor).unsqueeze(1)
        attended = torch.where(taken[..., None, None], attended, lazy.gather(1, index))
    out = lazy.scatter(1, index, attended.to(lazy.dtype))
    return out if query_mask is None else out.masked_fill(~query_mask[..., None, None], 0)


def _largest(measure: Tensor, number: int) -> Tensor:
    """Ranks of the `number` largest of (B, H, L), falling; of equal ones the first, but on a GPU and where compiled."""
    most = measure.topk(min(number + 1, measure.shape[2]), dim=2)
    if measure.device.type == "cpu" and not torch.compiler.is_compiling():
        first, then = most.values[..., :-1], most.values[..., 1:]
        if bool(((first == then) & (then > -torch.inf)).any()):  # topk leaves their order open
            return measure.sort(dim=2, descending=True, stable=True).indices[..., :number]
    return most.indices[..., :number]


def _order(mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Positions with the real ones first, in order, (B, L), and their number (B,)."""
    if mask is None:
        return None, None
    return mask.logical_not().to(torch.uint8).sort(dim=1, stable=True).indices, mask.sum(1)


def _measure(
    q: Tensor,
    k: Tensor,
    k_order: Tensor | None,
    keys: Tensor,
    sample: KeySample,
    divide_by_keys: bool,
    block: int,
) -> Tensor:
    """M (B, L, H) of the queries, in fp32 or fp64; q stands in order of rank, keys is (1,) or (B,) real keys
    per row."""
    batch, length, heads, width = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    table = k.reshape(batch * k.shape[1], heads * width)
    offset = torch.arange(batch, device=q.device).view(-1, 1, 1) * k.shape[1]
    rows = -(-length // block)
    partial = keys.shape[0] > 1 or k_order is not None  # rows, or padded ones, whose samples are cut short
    if block == 1 and q.device.type == "cpu":
        place, valid = _places(sample, length, keys, k_order)
        largest, total = sampled_extent(q, k, place, valid if partial else None, sample.width)
        counts = keys.view(-1, 1, 1) if divide_by_keys else valid.sum(2, keepdim=True)
        return largest - total / counts.clamp(min=1)
    if block > 1:
        step = max(1, _GATHER.get(q.device.type, 1 << 22) // (batch * heads * block * (sample.width + width)))
    else:
        step = max(1, _GATHER.get(q.device.type, 1 << 22) // (batch * sample.width * heads * width))
    parts = []
    for first in range(0, rows, step):
        last = min(first + step, rows)
        ranks, valid = sample.rows(first, last, keys)
        place = ranks if k_order is None else k_order.gather(1, ranks.flatten(1)).view_as(ranks)
        drawn = table.index_select(0, (place + offset).flatten()).to(dtype)
        drawn = drawn.view(batch, last - first, sample.width, heads, width)
        queries = q[:, first * block : last * block].to(dtype)
        if block > 1:
            queries = F.pad(queries, (0, 0, 0, 0, 0, (last - first) * block - queries.shape[1]))
            queries = queries.reshape(batch, last - first, block, heads, width).transpose(2, 3)
            scores = queries @ drawn.permute(0, 1, 3, 4, 2)  # (B, blocks, H, block, U)
            valid = valid[:, :, None, None]
        else:
            scores = (drawn * queries.unsqueeze(2)).sum(-1).transpose(2, 3).unsqueeze(3)  # (B, chunk, H, 1, U)
            valid = valid[:, :, None, None]
        if partial:
            largest = scores.masked_fill(~valid, -torch.inf).amax(-1)
            total = scores.masked_fill(~valid, 0).sum(-1)
        else:
            largest, total = scores.amax(-1), scores.sum(-1)
        divisor = keys.view(-1, 1, 1, 1) if divide_by_keys else valid.sum(-1)
        part = largest - total / divisor.clamp(min=1)
        parts.append(part.transpose(2, 3).reshape(batch, (last - first) * block, heads))
    return torch.cat(parts, 1)[:, :length]


def _places(sample: KeySample, length: int, keys: Tensor, k_order: Tensor | None) -> tuple[Tensor, Tensor]:
    """The sampled keys of all queries, int32 (B or 1, L, U), and which of them count, bool of that shape."""
    places, valids = [], []
    for first in range(0, length, _HASHED):
        ranks, valid = sample.rows(first, min(first + _HASHED, length), keys)
        place = ranks if k_order is None else k_order.gather(1, ranks.flatten(1)).view_as(ranks)
        places.append(place.int())
        valids.append(valid)
    return torch.cat(places, 1), torch.cat(valids, 1)


def _visible(chosen: Tensor, key_mask: Tensor | None, source: int, masked: bool) -> tuple[Tensor | None, Tensor | None]:
    """Keys that the chosen positions (B, H, u) see, bool (B, H|1, u, S), None for all; and who sees none,
    last dim 1."""
    past = torch.arange(source, device=chosen.device) <= chosen.unsqueeze(3) if masked else None
    if key_mask is None:
        return past, None
    visible = key_mask[:, None, None].expand(-1, 1, chosen.shape[2], -1)
    if past is not None:
        visible = visible & past
    # What SDPA gives a query that sees nothing, in forward and backward, depends on its kernel: let it see
    # all, the caller replaces its output.
    blind = ~visible.any(3, keepdim=True)
    return visible | blind, blind


def _lazy(
    v: Tensor, key_mask: Tensor | None, keys: Tensor | None, length: int, masked: bool, lazy_mean: bool
) -> Tensor:
    """What a query takes that was not selected, (B, L, H, V): the mean of V, or V accumulated up to its
    position."""
    dtype = torch.promote_types(v.dtype, torch.float32)
    if key_mask is not None:
        v = v.masked_fill(~key_mask[..., None, None], 0)
    if not masked:
        count = v.shape[1] if keys is None else keys.clamp(min=1).view(-1, 1, 1, 1)
        mean = v.sum(1, keepdim=True, dtype=dtype) / count
        return mean.to(v.dtype).expand(-1, length, -1, -1)
    total = v.cumsum(1, dtype=dtype)
    if lazy_mean:
        seen = torch.arange(1, length + 1, device=v.device) if key_mask is None else key_mask.cumsum(1).clamp(min=1)
        total = total / seen.view(-1, length, 1, 1)
    return total.to(v.dtype)
