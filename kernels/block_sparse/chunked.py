"""Block-sparse attention tile by tile: the fast PyTorch form, and the backend for the CPU.

A tile is a few queries and the blocks of keys that they all see (plan.py), so its scores are one dense product. A step
gathers the keys of a few tiles, so that copies of keys never outlive it, forwards or backwards. Where a query is met
more than once, its softmax is merged as in flash attention (README.md).

B batch, L queries, S keys, H heads, K key width, V value width, Hr heads that route (1 or H), h = H / Hr heads per
routing, G query blocks, T routed blocks, R key blocks, W keys of a block; n tiles of C queries and J blocks in a step.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .plan import Tiles, plan
from .single import single_query

# Scores of the tiles in one step: a CPU keeps them in cache, a GPU wants full waves.
_STEP = {"cpu": 1 << 19, "cuda": 1 << 24}


class _Step(NamedTuple):
    """A few tiles: their rows in the tables, what stands there, and which scores do not count.

    q_at: (n h C,), one past the last row for no query. k_at: (n h J,). q: (n h, C, K). k, v: (n h, J W, ...).
    hidden: bool (n, 1, 1 or C, J W). gain: (n, 1, 1, J W), the weights of the blocks, None for 1. group: see `Tiles`.
    """

    q_at: Tensor
    k_at: Tensor
    q: Tensor
    k: Tensor
    v: Tensor
    hidden: Tensor
    gain: Tensor | None
    group: Tensor | None

    def by_tile(self, x: Tensor) -> Tensor:
        """(n h, C, J W) as (n, h, C, J W)."""
        return x.view(len(self.hidden), -1, *x.shape[1:])

    def products(self, scale: float) -> Tensor:
        return torch.bmm(self.q, self.k.transpose(1, 2)).mul_(scale)

    def scores(self, products: Tensor) -> Tensor:
        """(n h, C, J W), -inf where nothing is seen; without a gain in the place of the products."""
        s = self.by_tile(products)
        s = s if self.gain is None else s * self.gain
        return s.masked_fill_(self.hidden, float("-inf")).flatten(0, 1)

    def weighted(self, p: Tensor) -> Tensor:
        return p if self.gain is None else (self.by_tile(p) * self.gain).flatten(0, 1)


class _Tables:
    """The inputs with one row per head and query, or per head and block of keys, and the steps over them."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        index: Tensor,
        weight: Tensor | None,
        q_position: Tensor | None,
        key_mask: Tensor | None,
        q_block: int,
        k_block: int,
    ) -> None:
        self.batch, self.length, self.heads = q.shape[:3]
        self.q_block, self.k_block = q_block, k_block
        self.blocks, self.routing_heads = k.shape[1] // k_block, index.shape[1]
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.q, self.k, self.v = self.queries(q), self.keys(k), self.keys(v)
        self.index = index.flatten(0, 1)
        self.weight = None if weight is None else weight.flatten(0, 2).to(self.wide)  # (B Hr G, T)
        self.q_position = q_position
        self.key_mask = None if key_mask is None else key_mask.view(self.batch, self.blocks, k_block)

    def queries(self, x: Tensor) -> Tensor:
        """(B, L, H, K) to (B H L, K)."""
        return x.transpose(1, 2).reshape(-1, x.shape[3])

    def keys(self, x: Tensor) -> Tensor:
        """(B, S, H, K) to (B H R, W K)."""
        return x.transpose(1, 2).reshape(-1, self.k_block * x.shape[3])

    def tokens(self, table: Tensor, length: int, dtype: torch.dtype) -> Tensor:
        """A table of queries or keys as (B, L or S, H, ...)."""
        x = table.view(self.batch, self.heads, length, -1).transpose(1, 2)
        return x.to(dtype, memory_format=torch.contiguous_format, copy=True)

    def query_rows(self, table: Tensor, at: Tensor, rows: int) -> Tensor:
        """(n h, C, ...) of a table of queries."""
        found = table.index_select(0, at.clamp(max=len(table) - 1)).to(self.wide)
        return found.view(-1, rows, *table.shape[1:])

    def steps(self) -> Iterator[_Step]:
        shared = self.heads // self.routing_heads
        budget = max(1, _STEP.get(self.q.device.type, 1 << 22) // (shared * self.k_block))
        whole = self.weight is not None
        for tiles in plan(self.index, self.length, self.blocks, self.q_block, budget, whole=whole):
            yield self._step(tiles, shared)

    def _step(self, t: Tiles, shared: int) -> _Step:
        device = t.rows.device
        inside, heads = torch.arange(self.k_block, device=device), torch.arange(shared, device=device)
        row, block, query = t.route // self.routing_heads, t.blocks.clamp(min=0), t.rows.clamp(min=0)
        head = ((t.route * shared).unsqueeze(1) + heads).unsqueeze(2)  # (n, h, 1)
        q_at = torch.where(t.rows.unsqueeze(1) < 0, len(self.q), head * self.length + query.unsqueeze(1)).flatten()
        k_at = (head * self.blocks + block.unsqueeze(1)).flatten()
        k, v = (
            table.index_select(0, k_at).to(self.wide).view(len(t.route) * shared, block.shape[1] * self.k_block, -1)
            for table in (self.k, self.v)
        )
        hidden = (t.blocks < 0).unsqueeze(2).expand(-1, -1, self.k_block)
        if self.key_mask is not None:
            hidden = hidden | ~self.key_mask[row.unsqueeze(1), block]
        hidden = hidden.flatten(1).unsqueeze(1)
        if t.group is None:  # sorted tiles have places without a query, which must not reach the keys' gradients
            hidden = hidden | (t.rows < 0).unsqueeze(2)
        if self.q_position is not None:
            place = (block.unsqueeze(2) * self.k_block + inside).flatten(1).unsqueeze(1)
            hidden = hidden | (place > self.q_position[row.unsqueeze(1), query].unsqueeze(2))
        gain = None
        if self.weight is not None and t.group is not None:
            gain = self.weight[t.group].repeat_interleave(self.k_block, 1)[:, None, None]
        q = self.query_rows(self.q, q_at, query.shape[1])
        return _Step(q_at, k_at, q, k, v, hidden.unsqueeze(1), gain, t.group)


@torch.library.custom_op("seqzoo::block_sparse", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    weight: Tensor | None,
    q_position: Tensor | None,
    key_mask: Tensor | None,
    q_block: int,
    k_block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o (B, L, H, V) and the log-sum-exp of the scores (B, H, L), 0 for a query that sees nothing."""
    with torch.autocast(q.device.type, enabled=False):
        tables = _Tables(q, k, v, index, weight, q_position, key_mask, q_block, k_block)
        # One more row, for the places of a tile without a query.
        o = torch.zeros(len(tables.q) + 1, v.shape[3], dtype=tables.wide, device=q.device)
        top = o.new_full((len(o),), float("-inf"))
        total = o.new_zeros(len(o))
        for step in tables.steps():
            s = step.scores(step.products(scale))
            before = top.index_select(0, step.q_at)
            high = torch.maximum(before, s.amax(2).flatten())
            shift = high.masked_fill(high == float("-inf"), 0.0)
            p = s.sub_(shift.view(*s.shape[:2], 1)).exp_()
            keep = before.sub_(shift).exp_()
            mass = total.index_select(0, step.q_at).mul_(keep).add_(p.sum(2).flatten())
            mixed = torch.bmm(step.weighted(p), step.v).flatten(0, 1)
            mixed.addcmul_(o.index_select(0, step.q_at), keep.unsqueeze(1))
            for table, rows in ((top, high), (total, mass), (o, mixed)):
                table.index_copy_(0, step.q_at, rows)
        seen = total > 0
        o.div_(total.masked_fill(~seen, 1.0).unsqueeze(1))
        lse = torch.where(seen, top + total.log(), 0.0)[:-1]
        return tables.tokens(o[:-1], tables.length, v.dtype), lse.view(tables.batch, tables.heads, -1)


@torch.library.custom_op("seqzoo::block_sparse_backward", mutates_args=())
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    weight: Tensor | None,
    q_position: Tensor | None,
    key_mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q_block: int,
    k_block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the weights (empty without), from scores computed anew."""
    with torch.autocast(q.device.type, enabled=False):
        tables = _Tables(q, k, v, index, weight, q_position, key_mask, q_block, k_block)
        grad, lse = tables.queries(do), lse.flatten()
        delta = tables.queries((do.to(tables.wide) * o.to(tables.wide)).sum(3, keepdim=True)).squeeze(1)
        dq = torch.zeros(len(tables.q) + 1, q.shape[3], dtype=tables.wide, device=q.device)
        dk, dv = (torch.zeros_like(t, dtype=tables.wide) for t in (tables.k, tables.v))
        dweight = lse.new_zeros(0 if weight is None else weight.shape, dtype=tables.wide)
        for step in tables.steps():
            rows = step.q.shape[1]
            g = tables.query_rows(grad, step.q_at, rows)
            products = step.products(scale)
            s = step.scores(products)
            p = s.sub_(tables.query_rows(lse, step.q_at, rows).unsqueeze(2)).exp_()
            dv.index_add_(0, step.k_at, torch.bmm(step.weighted(p).transpose(1, 2), g).view(len(step.k_at), -1))
            dp = torch.bmm(g, step.v.transpose(1, 2))
            through = step.weighted(dp) - tables.query_rows(delta, step.q_at, rows).unsqueeze(2)
            ds = through.mul_(p)
            if weight is not None and step.group is not None:
                both = step.by_tile(p * dp).sum((1, 2)) + step.by_tile(ds * products).sum((1, 2))  # (n, J W)
                dweight.view(-1, weight.shape[3])[step.group] = both.unflatten(1, (-1, k_block)).sum(2)
            ds = step.weighted(ds).mul_(scale)
            dk.index_add_(0, step.k_at, torch.bmm(ds.transpose(1, 2), step.q).view(len(step.k_at), -1))
            mixed = torch.bmm(ds, step.k).flatten(0, 1).add_(dq.index_select(0, step.q_at))
            dq.index_copy_(0, step.q_at, mixed)
        source = k.shape[1]
        return (
            tables.tokens(dq[:-1], tables.length, q.dtype),
            tables.tokens(dk, source, k.dtype),
            tables.tokens(dv, source, v.dtype),
            dweight if weight is None else dweight.to(weight.dtype),
        )


@_forward.register_fake
def _(q, k, v, index, weight, q_position, key_mask, q_block, k_block, scale):
    batch, length, heads = q.shape[:3]
    wide = torch.promote_types(q.dtype, torch.float32)
    return v.new_empty(batch, length, heads, v.shape[3]), q.new_empty(batch, heads, length, dtype=wide)


@_backward.register_fake
def _(do, q, k, v, index, weight, q_position, key_mask, o, lse, q_block, k_block, scale):
    dweight = lse.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dweight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.options = inputs[7:]


def _gradient(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dweight = _backward(do, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, None, dweight if ctx.needs_input_grad[4] else None, *[None] * 5


_forward.register_autograd(_gradient, setup_context=_setup_context)


def chunked_block_sparse(
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
    """`naive_block_sparse` in time and memory that do not know L x S; partial last blocks are filled up."""
    length, source = q.shape[1], k.shape[1]
    if length == 1:
        return single_query(q, k, v, index, weight, q_position, key_mask, k_block=k_block, scale=scale)
    ahead, behind = -length % q_block, -source % k_block
    if ahead:
        q = F.pad(q, (0, 0, 0, 0, 0, ahead))
        q_position = None if q_position is None else F.pad(q_position, (0, ahead), value=-1)
    if behind:
        k, v = (F.pad(t, (0, 0, 0, 0, 0, behind)) for t in (k, v))
        real = q.new_ones(q.shape[0], source, dtype=torch.bool) if key_mask is None else key_mask
        key_mask = F.pad(real, (0, behind))
    o, _ = _forward(q, k, v, index, weight, q_position, key_mask, q_block, k_block, scale)
    return o[:, :length]
