"""Kernels of VQ attention in Triton: sums of cells, and the walk of a block of queries over its keys and cells.

Positions are those of a frame in which blocks begin at multiples of C. Without a state it begins with the row; after
one, with the block before the first new token's, wherever in its block that token stands (`places`).

B batch, L queries, S keys, H heads, K key width, V value width, M codes, C block length.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(places_ptr, b, chunk, STATE: tl.constexpr):
    """Of row b: what leads from a position to the place in k, v and code; first and last + 1 of the positions with a
    visible key; the position of the first query."""
    shift = tl.load(places_ptr + 3 * b).to(tl.int32)
    first = tl.load(places_ptr + 3 * b + 1).to(tl.int32)
    end = tl.load(places_ptr + 3 * b + 2).to(tl.int32)
    start = tl.zeros_like(shift)
    if STATE:
        start = 2 * chunk - 1 - shift
    return shift, first, end, start


@triton.jit
def cell_kernel(
    v_ptr, code_ptr, places_ptr, number_ptr, total_ptr,
    source, heads, codes, segments, first, size, v_b, v_l, v_h,
    V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens of BM cells and the sums of their values, number (B, H, P, M) and total (B, H, P, M, V), for one of P
    segments: segment p has the positions first + p size .. first + (p + 1) size - 1. A product with the indicator of
    the codes: no atomic addition."""
    cell = tl.program_id(0) * BM + tl.arange(0, BM)
    segment = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    b, h = row // heads, row % heads
    dv = tl.arange(0, BV)
    shift, low, end, _ = place(places_ptr, b, 0, False)
    low = tl.maximum(low, first + segment * size)
    end = tl.minimum(end, first + (segment + 1) * size)
    number, total = tl.zeros([BM], tl.float32), tl.zeros([BM, BV], tl.float32)
    for start in range(low, end, BN):
        at = start + tl.arange(0, BN)
        there = at < end
        token = (at + shift).to(tl.int64)
        code = tl.load(code_ptr + (b * source + token) * heads + h, mask=there, other=-1)
        v = tl.load(
            v_ptr + b * v_b + h * v_h + token[:, None] * v_l + dv[None, :],
            mask=there[:, None] & (dv < V)[None, :],
            other=0.0,
        )
        own = (cell[:, None] == code[None, :]) & there[None, :]
        number += tl.sum(own.to(tl.float32), 1)
        total = tl.dot(own.to(FACTOR), v.to(FACTOR), total, input_precision=PRECISION)
    to = (row * segments + segment) * codes + cell
    tl.store(number_ptr + to, number, mask=cell < codes)
    tl.store(total_ptr + to[:, None] * V + dv[None, :], total, mask=(cell < codes)[:, None] & (dv < V)[None, :])


@triton.jit
def _absorb(top, total, acc, s, v, FACTOR: tl.constexpr, PRECISION: tl.constexpr):
    """The online softmax after the scores s (BM, BN), in powers of two, of values v (BN, BV)."""
    high = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(high == float("-inf"), 0.0, high)
    p = tl.exp2(s - shift[:, None])
    keep = tl.exp2(top - shift)
    acc = tl.dot(p.to(FACTOR), v.to(FACTOR), acc * keep[:, None], input_precision=PRECISION)
    return high, total * keep + tl.sum(p, 1), acc


@triton.jit
def _descend(acc, s, k, v, do, lse, delta, FACTOR: tl.constexpr, PRECISION: tl.constexpr):
    """The queries' gradient with what comes through the scores s (BM, BN) of keys k (BK, BN) and values v (BN, BV)."""
    dp = tl.dot(do, tl.trans(v.to(FACTOR)), input_precision=PRECISION)
    ds = tl.exp2(s - lse[:, None]) * (dp - delta[:, None])
    return tl.dot(ds.to(FACTOR), tl.trans(k.to(FACTOR)), acc, input_precision=PRECISION)


@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, code_ptr, book_ptr, bias_ptr, places_ptr, number_ptr, mean_ptr, o_ptr, lse_ptr, do_ptr,
    dq_ptr, delta_ptr,
    tiles, per_block, skip, length, source, heads, codes, groups, group, chunk, entries, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
    K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, TABLES: tl.constexpr,
    GRADIENT: tl.constexpr, LOG2_E: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o (B, L, H, V) of BM queries of one block and head, and the logarithm (to 2) of what their softmax divides by,
    lse (B, L, H); or, with GRADIENT, from these and do their gradient dq and delta = do . o (B, L, H).

    `group` blocks share a table of cells, number (B, H, groups, M) and mean (B, H, groups, M, V). The first `skip`
    blocks have no queries.
    """
    pid = tl.program_id(0)
    tile, row = pid % tiles, (pid // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    shift, first, end, begin = place(places_ptr, b, chunk, STATE)
    block = tile // per_block + skip
    inside = tile % per_block * BM + tl.arange(0, BM)
    at = block * chunk + inside
    i = at - begin
    real = (inside < chunk) & (i >= 0) & (i < length)
    busy = tl.max(real.to(tl.int32), 0) > 0
    d, dv, n = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BN)
    q = tl.load(
        q_ptr + b * q_b + h * q_h + i.to(tl.int64)[:, None] * q_l + d[None, :],
        mask=real[:, None] & (d < K)[None, :],
        other=0.0,
    ).to(FACTOR)
    stat = (b * length + i) * heads + h
    out, column = stat[:, None] * V + dv[None, :], real[:, None] & (dv < V)[None, :]
    if GRADIENT:
        acc = tl.zeros([BM, BK], tl.float32)
        do = tl.load(do_ptr + out, mask=column, other=0.0)
        delta = tl.sum(do.to(tl.float32) * tl.load(o_ptr + out, mask=column, other=0.0).to(tl.float32), 1)
        tl.store(delta_ptr + stat, delta, mask=real)
        do = do.to(FACTOR)
        lse = tl.load(lse_ptr + stat, mask=real, other=float("inf"))
    else:
        acc = tl.zeros([BM, BV], tl.float32)
        top, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    book = book_ptr + h * codes * K
    held = block // group
    if WINDOW:
        end = tl.where(busy, end, 0)
        v_base, k_base = v_ptr + b * v_b + h * v_h, k_ptr + b * k_b + h * k_h
        low = tl.maximum((held * group - 1) * chunk, first)  # the table has what lies before ..
        near, past = tl.maximum((block - 1) * chunk, first), (block + 2) * chunk
        high = ((held + 1) * group + 1) * chunk  # .. and, where the future is seen, what lies from here on
        if CAUSAL:
            past = tl.minimum((block + 1) * chunk, block * chunk + (tile % per_block + 1) * BM)
            high = past
        past, high = tl.minimum(past, end), tl.minimum(high, end)
        # Keys that are far, yet not in the table, before the window and behind it: as codewords.
        before = tl.cdiv(tl.maximum(tl.minimum(near, end) - low, 0), BN)
        behind = tl.cdiv(tl.maximum(high - past, 0), BN)
        for step in range(before + behind):
            j = tl.where(step < before, low + step * BN, past + (step - before) * BN) + n
            there = j < tl.where(step < before, tl.minimum(near, end), high)
            token = (j + shift).to(tl.int64)
            code = tl.load(code_ptr + (b * source + token) * heads + h, mask=there, other=0)
            c = tl.load(book + code[None, :] * K + d[:, None], mask=there[None, :] & (d < K)[:, None], other=0.0)
            s = tl.dot(q, c.to(FACTOR), input_precision=PRECISION) * (scale * LOG2_E)
            v = tl.load(v_base + token[:, None] * v_l + dv[None, :], mask=there[:, None] & (dv < V)[None, :], other=0.0)
            s = tl.where(there[None, :], s, float("-inf"))
            if GRADIENT:
                acc = _descend(acc, s, c, v, do, lse, delta, FACTOR, PRECISION)
            else:
                top, total, acc = _absorb(top, total, acc, s, v, FACTOR, PRECISION)
        for from_j in range(near, past, BN):
            j = from_j + n
            there = j < past
            token = (j + shift).to(tl.int64)
            k = tl.load(k_base + token[None, :] * k_l + d[:, None], mask=there[None, :] & (d < K)[:, None], other=0.0)
            s = tl.dot(q, k.to(FACTOR), input_precision=PRECISION) * (scale * LOG2_E)
            visible = tl.broadcast_to(there[None, :], [BM, BN])
            distance = at[:, None] - j[None, :]
            if CAUSAL:
                visible &= distance >= 0
            if BIAS:
                entry = distance
                if not CAUSAL:
                    entry += 2 * chunk - 1
                s += tl.load(bias_ptr + h * entries + entry, mask=visible & real[:, None], other=0.0) * LOG2_E
            v = tl.load(v_base + token[:, None] * v_l + dv[None, :], mask=there[:, None] & (dv < V)[None, :], other=0.0)
            s = tl.where(visible, s, float("-inf"))
            if GRADIENT:
                acc = _descend(acc, s, k, v, do, lse, delta, FACTOR, PRECISION)
            else:
                top, total, acc = _absorb(top, total, acc, s, v, FACTOR, PRECISION)
    if TABLES:
        table = (row * groups + held) * codes
        seen = tl.where(busy, codes, 0)
        if CAUSAL and not STATE:
            seen = tl.where(held > 0, seen, 0)
        for from_cell in range(0, seen, BN):
            cell = from_cell + n
            number = tl.load(number_ptr + table + cell, mask=cell < codes, other=0.0)
            there = number > 0
            c = tl.load(book + cell[None, :] * K + d[:, None], mask=there[None, :] & (d < K)[:, None], other=0.0)
            mean = tl.load(
                mean_ptr + (table + cell)[:, None] * V + dv[None, :], mask=there[:, None] & (dv < V)[None, :], other=0.0
            )
            s = tl.dot(q, c.to(FACTOR), input_precision=PRECISION) * (scale * LOG2_E)
            s += tl.log2(tl.where(there, number, 1.0))[None, :]
            s = tl.where(there[None, :], s, float("-inf"))
            if GRADIENT:
                acc = _descend(acc, s, c, mean, do, lse, delta, FACTOR, PRECISION)
            else:
                top, total, acc = _absorb(top, total, acc, s, mean, FACTOR, PRECISION)
    if GRADIENT:
        to = stat[:, None] * K + d[None, :]
        tl.store(dq_ptr + to, (acc * scale).to(dq_ptr.dtype.element_ty), mask=real[:, None] & (d < K)[None, :])
    else:
        some = tl.where(total > 0, total, 1.0)
        tl.store(o_ptr + out, (acc / some[:, None]).to(o_ptr.dtype.element_ty), mask=column)
        # Where nothing is visible, every weight is exp2(s - inf) = 0.
        tl.store(lse_ptr + stat, tl.where(total > 0, top + tl.log2(some), float("inf")), mask=real)
