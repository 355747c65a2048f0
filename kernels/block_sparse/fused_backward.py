"""Gradients of block-sparse attention in Triton, from scores computed anew.

Queries (and weights) by the tiles of the forward pass; keys and values by blocks of keys, each of which goes over the
queries that chose it (`sorted_pairs`): nothing is added atomically, so the same input gives the same bits.

Letters as in fused.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_tiles import LOG2_E, Pairs, arguments, inner_contiguous, key_tiling, sorted_pairs, tiling, visit


@triton.jit(do_not_specialize=["slot"])
def query_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, weight_ptr, position_ptr, mask_ptr,
    order_ptr, starts_ptr, tile_block_ptr, tile_first_ptr,
    o_ptr, lse_ptr, do_ptr, delta_ptr, dq_ptr, sum_ptr, dweight_ptr,
    slot, tiles, per_group, length, source, groups, slots, blocks, heads, routing_heads, q_block, k_block, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WEIGHT: tl.constexpr, POSITION: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, FACTOR: tl.constexpr,
    SORTED: tl.constexpr, LOG2_E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """dQ, delta = rowsum(dO o) (B H L) and each query's part of the weights' gradient, (B, H, L, T), with the tiles of
    `forward_kernel`; sum (B H L, K) carries dQ to the next slot."""
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
    real_d, real_v = real[:, None] & (d < K)[None, :], real[:, None] & (dv < V)[None, :]
    q = tl.load(q_ptr + b * q_b + h * q_h + rows[:, None] * q_l + d[None, :], mask=real_d, other=0.0)
    out = ((b * length + rows) * heads + h)[:, None] * V + dv[None, :]
    do = tl.load(do_ptr + out, mask=real_v, other=0.0)
    o = tl.load(o_ptr + out, mask=real_v, other=0.0)
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    lse = tl.load(lse_ptr + at, mask=real, other=0.0) * LOG2_E
    acc = tl.zeros([BM, BK], tl.float32)
    carried = sum_ptr + row * length * K + (rows.to(tl.int32)[:, None] * K + d[None, :])
    if SORTED:
        acc = tl.load(carried, mask=real_d & (slot > 0), other=0.0)
    dweight = tl.zeros([BM], tl.float32)
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
            k_base + first * k_l + inside[:, None] * k_l + d[None, :], mask=seen[:, None] & (d < K)[None, :], other=0.0
        )
        v = tl.load(
            v_base + first * v_l + inside[None, :] * v_l + dv[:, None],
            mask=seen[None, :] & (dv < V)[:, None],
            other=0.0,
        )
        product = tl.dot(q.to(FACTOR), tl.trans(k).to(FACTOR), input_precision=PRECISION) * scale
        s = product
        if WEIGHT:
            at_weight = (route * groups + rows // q_block) * slots + t
            weight = tl.load(weight_ptr + at_weight, mask=real, other=0.0).to(tl.float32)
            s = product * weight[:, None]
        visible = tl.broadcast_to(seen[None, :], [BM, BN])
        if POSITION:
            visible &= (first + inside)[None, :] <= position[:, None]
        p = tl.where(visible, tl.exp2(tl.where(visible, s, 0.0) - lse[:, None]), 0.0)
        dp = tl.dot(do.to(FACTOR), v.to(FACTOR), input_precision=PRECISION)
        if WEIGHT:
            ds = p * (dp * weight[:, None] - delta[:, None])
            # `product` is in powers of two.
            dweight += tl.sum(p * dp + ds * product / LOG2_E, 1)
            ds *= weight[:, None]
            if not SORTED:
                whole = (start + BN >= k_block) & real
                tl.store(dweight_ptr + at * slots + t, dweight, mask=whole)
                dweight = tl.where(start + BN >= k_block, 0.0, dweight)
        else:
            ds = p * (dp - delta[:, None])
        acc = tl.dot(ds.to(FACTOR), k.to(FACTOR), acc, input_precision=PRECISION)
    done = real_d
    if SORTED:
        tl.store(carried, acc, mask=real_d & (slot < slots - 1))
        done = real_d & (slot == slots - 1)
    to = ((b * length + rows) * heads + h)[:, None] * K + d[None, :]
    tl.store(dq_ptr + to, (acc * (scale / LOG2_E)).to(dq_ptr.dtype.element_ty), mask=done)
    tl.store(delta_ptr + at, delta, mask=real)
    if WEIGHT and SORTED:
        tl.store(dweight_ptr + at * slots + slot, dweight, mask=real)


@triton.jit
def key_kernel(
    q_ptr, k_ptr, v_ptr, index_ptr, weight_ptr, position_ptr, mask_ptr,
    order_ptr, starts_ptr, tile_block_ptr, tile_first_ptr, lse_ptr, do_ptr, delta_ptr, dk_ptr, dv_ptr,
    tiles, per_block, length, source, groups, slots, blocks, heads, routing_heads, q_block, k_block, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
    K: tl.constexpr, V: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WEIGHT: tl.constexpr, POSITION: tl.constexpr, MASK: tl.constexpr, PRECISION: tl.constexpr, FACTOR: tl.constexpr,
    LOG2_E: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """dK and dV of BN keys of one block and one head, over all queries that chose the block, BM at a time.

    WHOLE: q_block is a multiple of BM, so that BM queries are neighbours.
    """
    pid = tl.program_id(0)
    tile, row = pid % tiles, (pid // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    route = b * routing_heads + h // (heads // routing_heads)
    block = tile // per_block
    inside = tile % per_block * BN + tl.arange(0, BN)
    first = block.to(tl.int64) * k_block
    own = (inside < k_block) & (first + inside < source)
    seen = own
    if MASK:
        seen &= tl.load(mask_ptr + b * source + first + inside, mask=own, other=0) != 0
    d, dv = tl.arange(0, BK), tl.arange(0, BV)
    own_d, own_v = own[:, None] & (d < K)[None, :], own[:, None] & (dv < V)[None, :]
    k = tl.load(k_ptr + b * k_b + h * k_h + (first + inside)[:, None] * k_l + d[None, :], mask=own_d, other=0.0)
    v = tl.load(v_ptr + b * v_b + h * v_h + (first + inside)[:, None] * v_l + dv[None, :], mask=own_v, other=0.0)
    table = starts_ptr + route * ((blocks + 1) * slots + 1) + block * slots
    begin = tl.load(table)
    number = (tl.load(table + slots) - begin) * q_block
    dk_acc, dv_acc = tl.zeros([BN, BK], tl.float32), tl.zeros([BN, BV], tl.float32)
    q_base, do_base = q_ptr + b * q_b + h * q_h, do_ptr + (b * length * heads + h) * V
    order = order_ptr + route * groups * slots + begin
    for start in range(0, number, BM):
        if WHOLE:
            pair = tl.load(order + start // q_block).to(tl.int64) + tl.zeros([BM], tl.int64)
            rows = pair // slots * q_block + (start % q_block + tl.arange(0, BM))
            real = rows < length
        else:
            place = start + tl.arange(0, BM)
            pair = tl.load(order + place // q_block, mask=place < number, other=0).to(tl.int64)
            rows = pair // slots * q_block + place % q_block
            real = (place < number) & (rows < length)
        q = tl.load(q_base + rows[:, None] * q_l + d[None, :], mask=real[:, None] & (d < K)[None, :], other=0.0)
        do = tl.load(
            do_base + rows[:, None] * (heads * V) + dv[None, :], mask=real[:, None] & (dv < V)[None, :], other=0.0
        )
        lse = tl.load(lse_ptr + row * length + rows, mask=real, other=0.0) * LOG2_E
        delta = tl.load(delta_ptr + row * length + rows, mask=real, other=0.0)
        s = tl.dot(k.to(FACTOR), tl.trans(q).to(FACTOR), input_precision=PRECISION) * scale
        if WEIGHT:
            weight = tl.load(weight_ptr + route * groups * slots + pair, mask=real, other=0.0).to(tl.float32)
            s *= weight[None, :]
        visible = seen[:, None] & real[None, :]
        if POSITION:
            position = tl.load(position_ptr + b * length + rows, mask=real, other=-1)
            visible &= (first + inside)[:, None] <= position[None, :]
        p = tl.where(visible, tl.exp2(tl.where(visible, s, 0.0) - lse[None, :]), 0.0)
        dp = tl.dot(v.to(FACTOR), tl.trans(do).to(FACTOR), input_precision=PRECISION)
        if WEIGHT:
            ds = p * (dp * weight[None, :] - delta[None, :]) * weight[None, :]
            p *= weight[None, :]
        else:
            ds = p * (dp - delta[None, :])
        dv_acc = tl.dot(p.to(FACTOR), do.to(FACTOR), dv_acc, input_precision=PRECISION)
        dk_acc = tl.dot(ds.to(FACTOR), q.to(FACTOR), dk_acc, input_precision=PRECISION)
    to = ((b * source + first + inside) * heads + h)[:, None]
    tl.store(dk_ptr + to * K + d[None, :], (dk_acc * (scale / LOG2_E)).to(dk_ptr.dtype.element_ty), mask=own_d)
    tl.store(dv_ptr + to * V + dv[None, :], dv_acc.to(dv_ptr.dtype.element_ty), mask=own_v)


def backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    weight: Tensor | None,
    q_position: Tensor | None,
    key_mask: Tensor | None,
    pairs: Pairs | None,
    o: Tensor,
    lse: Tensor,
    q_block: int,
    k_block: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the weights (empty without). pairs: of the forward pass, where it sorted."""
    is_sorted = pairs is not None
    shape = tiling(q, k, v, q_block, k_block, sorted_rows=is_sorted, gradient=True)
    q, k, v = (inner_contiguous(t) for t in (q, k, v))
    do = do.contiguous()
    batch, length, heads, width = q.shape
    source, slots = k.shape[1], index.shape[3]
    if pairs is None:
        pairs = sorted_pairs(index, -(-source // k_block), None)
    dq, dk, dv = (torch.empty(t.shape, dtype=t.dtype, device=q.device) for t in (q, k, v))
    delta = torch.empty_like(lse)
    carried, by_query = lse, lse  # never touched where they are not needed
    if is_sorted and slots > 1:
        carried = lse.new_empty(batch * heads * length * width)
    if weight is not None:
        by_query = lse.new_empty(batch, heads, length, slots)
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3]
    inputs, sizes, flags = arguments(
        q, k, v, index, weight, q_position, key_mask, pairs, q_block=q_block, k_block=k_block, scale=scale
    )
    keys = key_tiling(q, k, v, q_block, k_block)
    with torch.cuda.device_of(q):
        for slot in range(slots if is_sorted else 1):
            query_kernel[(shape.tiles * batch * heads,)](
                *inputs, o, lse, do, delta, dq, carried, by_query, slot, shape.tiles, shape.per_group, *sizes,
                *strides, **flags, SORTED=is_sorted, LOG2_E=LOG2_E, BM=shape.rows, BN=shape.keys,
                num_warps=shape.warps, num_stages=shape.stages,
            )  # fmt: skip
        key_kernel[(keys.tiles * batch * heads,)](
            *inputs, lse, do, delta, dk, dv, keys.tiles, keys.per_group, *sizes, *strides, **flags, LOG2_E=LOG2_E,
            BM=keys.rows, BN=keys.keys, WHOLE=q_block % keys.rows == 0, num_warps=keys.warps, num_stages=keys.stages,
        )  # fmt: skip
    if weight is None:
        return dq, dk, dv, lse.new_empty(0)
    by_group = torch.nn.functional.pad(by_query, (0, 0, 0, -length % q_block)).unflatten(2, (-1, q_block)).sum(3)
    return dq, dk, dv, by_group.unflatten(1, (index.shape[1], -1)).sum(2).to(weight.dtype)
