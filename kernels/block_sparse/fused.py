"""Block-sparse attention in Triton: tiles of queries, an online softmax over the keys of the blocks they chose.

Query blocks are tiles as they are: a program keeps its queries and passes over the keys of all T blocks. Single queries
are sorted by the block they chose (`sorted_pairs`), slot by slot: a program has queries that share one block, and
merges what the earlier slots left in a float32 table. Either way scores stay on the chip. fused_backward.py has the
gradients, README.md the maths.

B batch, L queries, S keys, H heads, K key width, V value width, N = B Hr routings, G query blocks, T slots, R key
blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_backward import backward
from .fused_tiles import Pairs, Tiling, arguments, inner_contiguous, sorted_pairs, tiling, visit


@triton.jit(do_not_specialize=["slot"])
def forward_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, weight_ptr, position_ptr, mask_ptr,
    order_ptr, starts_ptr, tile_block_ptr, tile_first_ptr, o_ptr, lse_ptr, sum_ptr, top_ptr, total_ptr,
    slot, tiles, per_group, length, source, groups, slots, blocks, heads, routing_heads, q_block, k_block, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
    K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    SORTED: tl.constexpr, WEIGHT: tl.constexpr, POSITION: tl.constexpr, MASK: tl.constexpr, FACTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One tile of BM queries of one head. SORTED: one slot of queries that chose one block; the tables sum (B H L, V),
    top and total (B H L) carry the softmax to the next slot. Else: all slots of a part of one query block."""
    pid = tl.program_id(0)
    tile, row = pid % tiles, (pid // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    route = b * routing_heads + h // (heads // routing_heads)
    rows, real, block, group = visit(
        tile, route, slot, order_ptr, starts_ptr, tile_block_ptr, tile_first_ptr,
        tiles, per_group, length, slots, blocks, q_block, SORTED, BM,
    )  # fmt: skip
    if block > blocks:
        return
    d, dv = tl.arange(0, BK), tl.arange(0, BV)
    inner = tl.cdiv(k_block, BN)
    steps = slots * inner
    position = tl.zeros([BM], tl.int64)
    if POSITION:
        position = tl.load(position_ptr + b * length + rows, mask=real, other=-1)
    if SORTED:
        keys = tl.minimum(k_block, source - block * k_block)
        if POSITION:
            keys = tl.minimum(keys, (tl.max(position, 0) + 1 - block * k_block).to(tl.int32))
        steps = tl.where(block < blocks, tl.cdiv(tl.maximum(keys, 0), BN), 0)
    at = row * length + rows
    top, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    carried = sum_ptr + row * length * V + (rows.to(tl.int32)[:, None] * V + dv[None, :])
    if SORTED:
        again = real & (slot > 0)
        top = tl.load(top_ptr + at, mask=again, other=float("-inf"))
        total = tl.load(total_ptr + at, mask=again, other=0.0)
        acc = tl.load(carried, mask=again[:, None] & (dv < V)[None, :], other=0.0)
    q = tl.load(
        q_ptr + b * q_b + h * q_h + rows[:, None] * q_l + d[None, :], mask=real[:, None] & (d < K)[None, :], other=0.0
    )
    k_base, v_base = k_ptr + b * k_b + h * k_h, v_ptr + b * v_b + h * v_h
    for i in range(steps):
        if SORTED:
            t, start, chosen = slot, i * BN, block.to(tl.int64)
        else:
            t, start = i // inner, i % inner * BN
            chosen = tl.load(index_ptr + (route * groups + group) * slots + t)
        first = chosen * k_block
        inside = start + tl.arange(0, BN)
        seen = (inside < k_block) & (first + inside < source) & (chosen >= 0)
        if MASK:
            seen &= tl.load(mask_ptr + b * source + first + inside, mask=seen, other=0) != 0
        k = tl.load(
            k_base + first * k_l + inside[None, :] * k_l + d[:, None], mask=seen[None, :] & (d < K)[:, None], other=0.0
        )
        s = tl.dot(q.to(FACTOR), k.to(FACTOR), input_precision=PRECISION) * scale
        if WEIGHT:
            at_weight = (route * groups + rows // q_block) * slots + t
            weight = tl.load(weight_ptr + at_weight, mask=real, other=0.0).to(tl.float32)
            s *= weight[:, None]
        visible = tl.broadcast_to(seen[None, :], [BM, BN])
        if POSITION:
            visible &= (first + inside)[None, :] <= position[:, None]
        s = tl.where(visible, s, float("-inf"))
        high = tl.maximum(top, tl.max(s, 1))
        shift = tl.where(high == float("-inf"), 0.0, high)
        p = tl.exp2(s - shift[:, None])
        keep = tl.exp2(top - shift)
        total = total * keep + tl.sum(p, 1)
        if WEIGHT:
            p *= weight[:, None]
        v = tl.load(
            v_base + first * v_l + inside[:, None] * v_l + dv[None, :],
            mask=seen[:, None] & (dv < V)[None, :],
            other=0.0,
        )
        acc = tl.dot(p.to(FACTOR), v.to(FACTOR), acc * keep[:, None], input_precision=PRECISION)
        top = high
    done = real
    if SORTED:
        later, done = real & (slot < slots - 1), real & (slot == slots - 1)
        tl.store(top_ptr + at, top, mask=later)
        tl.store(total_ptr + at, total, mask=later)
        tl.store(carried, acc, mask=later[:, None] & (dv < V)[None, :])
    some = total > 0
    safe = tl.where(some, total, 1.0)
    out = ((b * length + rows) * heads + h)[:, None] * V + dv[None, :]
    tl.store(o_ptr + out, (acc / safe[:, None]).to(o_ptr.dtype.element_ty), mask=done[:, None] & (dv < V)[None, :])
    # In natural units; the scores of the kernels are in powers of two.
    tl.store(lse_ptr + at, tl.where(some, (top + tl.log2(safe)) * 0.6931471805599453, 0.0), mask=done)


def _wants_sorting(length: int, q_block: int) -> bool:
    """Single queries, enough of them to share blocks."""
    return q_block == 1 and length >= 32


def _pairs(order: Tensor | None, starts: Tensor | None, block: Tensor | None, first: Tensor | None) -> Pairs | None:
    """The tables of `sorted_pairs` as an operator has them: one by one."""
    return None if order is None or starts is None else Pairs(order, starts, block, first)


@torch.library.custom_op("seqzoo::block_sparse_triton", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    weight: Tensor | None,
    q_position: Tensor | None,
    key_mask: Tensor | None,
    order: Tensor | None,
    starts: Tensor | None,
    tile_block: Tensor | None,
    tile_first: Tensor | None,
    q_block: int,
    k_block: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o (B, L, H, V) and the log-sum-exp of the scores (B, H, L), 0 for a query that sees nothing."""
    pairs = _pairs(order, starts, tile_block, tile_first)
    shape = tiling(q, k, v, q_block, k_block, sorted_rows=pairs is not None)
    q, k, v = (inner_contiguous(t) for t in (q, k, v))
    batch, length, heads = q.shape[:3]
    slots = index.shape[3]
    o = torch.empty(batch, length, heads, v.shape[3], dtype=v.dtype, device=q.device)
    lse = torch.empty(batch, heads, length, dtype=torch.float32, device=q.device)
    carried: tuple[Tensor, ...] = (lse, lse, lse)  # never touched where one pass does it all
    if pairs is not None and slots > 1:
        rows = batch * heads * length
        carried = tuple(o.new_empty(n, dtype=torch.float32) for n in (rows * v.shape[3], rows, rows))
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    inputs, sizes, flags = arguments(
        q, k, v, index, weight, q_position, key_mask, pairs, q_block=q_block, k_block=k_block, scale=scale
    )
    with torch.cuda.device_of(q):
        for slot in range(slots if pairs is not None else 1):
            forward_kernel[(shape.tiles * batch * heads,)](
                *inputs, o, lse, *carried, slot, shape.tiles, shape.per_group, *sizes, *strides, **flags,
                SORTED=pairs is not None, BM=shape.rows, BN=shape.keys, num_warps=shape.warps, num_stages=shape.stages,
            )  # fmt: skip
    return o, lse


@torch.library.custom_op("seqzoo::block_sparse_triton_backward", mutates_args=())
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    weight: Tensor | None,
    q_position: Tensor | None,
    key_mask: Tensor | None,
    order: Tensor | None,
    starts: Tensor | None,
    tile_block: Tensor | None,
    tile_first: Tensor | None,
    o: Tensor,
    lse: Tensor,
    q_block: int,
    k_block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the weights (empty without), from scores computed anew."""
    pairs = _pairs(order, starts, tile_block, tile_first)
    return backward(do, q, k, v, index, weight, q_position, key_mask, pairs, o, lse, q_block, k_block, scale)


@_forward.register_fake
def _(q, k, v, index, weight, q_position, key_mask, order, starts, tile_block, tile_first, q_block, k_block, scale):
    batch, length, heads = q.shape[:3]
    return v.new_empty(batch, length, heads, v.shape[3]), q.new_empty(batch, heads, length, dtype=torch.float32)


@_backward.register_fake
def _(do, q, k, v, index, weight, *rest):
    dweight = q.new_empty(0) if weight is None else weight.new_empty(weight.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dweight


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:11], *output)
    ctx.options = inputs[11:]


def _gradient(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    dq, dk, dv, dweight = _backward(do, *ctx.saved_tensors, *ctx.options)
    return dq, dk, dv, None, dweight if ctx.needs_input_grad[4] else None, *[None] * 9


_forward.register_autograd(_gradient, setup_context=_setup_context)


def fused_block_sparse(
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
    """`naive_block_sparse` on a GPU, without a copy of keys and without a score in memory."""
    pairs: tuple[Tensor | None, ...] = (None,) * 4
    if _wants_sorting(q.shape[1], q_block):
        shape: Tiling = tiling(q, k, v, q_block, k_block, sorted_rows=True)
        pairs = tuple(sorted_pairs(index, -(-k.shape[1] // k_block), shape.rows))
    return _forward(q, k, v, index, weight, q_position, key_mask, *pairs, q_block, k_block, scale)[0]
