"""Kernels of VQ attention in Triton, backwards: gradients of cells, of keys and values, and of the bias.

Each program owns what it writes, and sums over queries; the gradient of the queries is `attend_kernel`'s. Positions,
tables and letters as in fused_forward.py. With p_ij the weights and delta_i = do_i . o_i:

    dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i . v_j - delta_i),   dk_j = scale sum_i ds_ij q_i
"""

from __future__ import annotations

import triton
import triton.language as tl

from .fused_forward import place


@triton.jit
def table_kernel(
    q_ptr, book_ptr, places_ptr, number_ptr, do_ptr, lse_ptr, delta_ptr, dtotal_ptr, dnumber_ptr,
    parts, per_table, span, length, heads, codes, groups, chunk, scale, q_b, q_l, q_h,
    K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    STATE: tl.constexpr, LOG2_E: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of the sums of values in BN cells, dtotal (B, H, parts, M, V), from the `span` queries of one part.
    A table has the queries of `per_table` parts.

    With STATE also dnumber (B, H, parts, M), of the numbers of tokens: -1 / n sum_i p_i delta_i, which is what the
    score's log n and the mean total / n leave together.
    """
    cell = tl.program_id(0) * BN + tl.arange(0, BN)
    part = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    b, h = row // heads, row % heads
    _, _, _, begin = place(places_ptr, b, chunk, STATE)
    d, dv, m = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BM)
    table = (row * groups + part // per_table) * codes
    number = tl.load(number_ptr + table + cell, mask=cell < codes, other=0.0)
    there = number > 0
    c = tl.load(
        book_ptr + (h * codes + cell)[:, None] * K + d[None, :], mask=there[:, None] & (d < K)[None, :], other=0.0
    ).to(FACTOR)
    number = tl.where(there, number, 1.0)
    weight = tl.log2(number)
    acc, rest = tl.zeros([BN, BV], tl.float32), tl.zeros([BN], tl.float32)
    low = tl.maximum(part * span - begin, 0)
    past = tl.minimum((part + 1) * span - begin, length)
    past = tl.where(tl.max(there.to(tl.int32), 0) > 0, past, 0)
    for start in range(low, past, BM):
        i = start + m
        real = i < past
        stat = (b * length + i) * heads + h
        q = tl.load(
            q_ptr + b * q_b + h * q_h + i.to(tl.int64)[:, None] * q_l + d[None, :],
            mask=real[:, None] & (d < K)[None, :],
            other=0.0,
        )
        do = tl.load(do_ptr + stat[:, None] * V + dv[None, :], mask=real[:, None] & (dv < V)[None, :], other=0.0)
        lse = tl.load(lse_ptr + stat, mask=real, other=float("inf"))
        s = tl.dot(c, tl.trans(q.to(FACTOR)), input_precision=PRECISION) * (scale * LOG2_E) + weight[:, None]
        p = tl.where(there[:, None], tl.exp2(s - lse[None, :]), 0.0)
        acc = tl.dot(p.to(FACTOR), do.to(FACTOR), acc, input_precision=PRECISION)
        if STATE:
            rest += tl.sum(p * tl.load(delta_ptr + stat, mask=real, other=0.0)[None, :], 1)
    to = (row * parts + part) * codes + cell
    tl.store(
        dtotal_ptr + to[:, None] * V + dv[None, :],
        acc / number[:, None],
        mask=(cell < codes)[:, None] & (dv < V)[None, :],
    )
    if STATE:
        tl.store(dnumber_ptr + to, -rest / number, mask=cell < codes)


@triton.jit
def key_kernel(
    q_ptr, k_ptr, v_ptr, code_ptr, book_ptr, bias_ptr, places_ptr, do_ptr, lse_ptr, delta_ptr, before_ptr, behind_ptr,
    dk_ptr, dv_ptr,
    tiles, per_block, length, source, heads, codes, groups, group, chunk, entries, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
    K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, STATE: tl.constexpr, TABLES: tl.constexpr,
    LOG2_E: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk (B, S, H, K) and dv (B, S, H, V) of BN keys of one block and head: through the windows of queries, through
    queries that read the key as a codeword (dv alone), and through tables. before (B, H, groups, M, V): the sum of
    dtotal over this group and all that follow; behind: over this group and all before it."""
    pid = tl.program_id(0)
    tile, row = pid % tiles, (pid // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    shift, first, end, begin = place(places_ptr, b, chunk, STATE)
    block = tile // per_block
    inside = tile % per_block * BN + tl.arange(0, BN)
    j = block * chunk + inside
    token = (j + shift).to(tl.int64)
    mine = (inside < chunk) & (token < source)
    there = mine & (j >= first) & (j < end)
    d, dv, m = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BM)
    code = tl.load(code_ptr + (b * source + token) * heads + h, mask=there, other=0)
    columns = (dv < V)[None, :]
    dv_acc = tl.zeros([BN, BV], tl.float32)
    if WINDOW:
        dk_acc = tl.zeros([BN, BK], tl.float32)
        c = tl.load(
            book_ptr + (h * codes + code)[:, None] * K + d[None, :], mask=there[:, None] & (d < K)[None, :], other=0.0
        ).to(FACTOR)
        last = begin + length
        # Queries whose window has this block, and those behind and before them whose table does not have it yet.
        near, past = tl.maximum((block - 1) * chunk, begin), tl.minimum((block + 2) * chunk, last)
        low = tl.maximum(block - 1, 0) // group * group * chunk
        high = tl.minimum(((block + 1) // group + 1) * group * chunk, last)
        if CAUSAL:
            near = tl.maximum(block * chunk + tile % per_block * BN, begin)
            low = near
        some = tl.max(there.to(tl.int32), 0) > 0
        past, high = tl.where(some, past, 0), tl.where(some, high, 0)
        after = tl.maximum((block + 2) * chunk, begin)
        behind = tl.cdiv(tl.maximum(high - after, 0), BM)
        before = tl.cdiv(tl.maximum(tl.where(some, near, 0) - low, 0), BM)
        for step in range(before + behind):
            at = tl.where(step < before, low + step * BM, after + (step - before) * BM) + m
            i = at - begin
            real = at < tl.where(step < before, near, high)
            stat = (b * length + i) * heads + h
            q = tl.load(
                q_ptr + b * q_b + h * q_h + i.to(tl.int64)[:, None] * q_l + d[None, :],
                mask=real[:, None] & (d < K)[None, :],
                other=0.0,
            )
            do = tl.load(do_ptr + stat[:, None] * V + dv[None, :], mask=real[:, None] & columns, other=0.0).to(FACTOR)
            lse = tl.load(lse_ptr + stat, mask=real, other=float("inf"))
            s = tl.dot(c, tl.trans(q.to(FACTOR)), input_precision=PRECISION) * (scale * LOG2_E)
            p = tl.where(there[:, None], tl.exp2(s - lse[None, :]), 0.0)
            dv_acc = tl.dot(p.to(FACTOR), do, dv_acc, input_precision=PRECISION)
        k = tl.load(
            k_ptr + b * k_b + h * k_h + token[:, None] * k_l + d[None, :],
            mask=there[:, None] & (d < K)[None, :],
            other=0.0,
        ).to(FACTOR)
        v = tl.load(
            v_ptr + b * v_b + h * v_h + token[:, None] * v_l + dv[None, :], mask=there[:, None] & columns, other=0.0
        ).to(FACTOR)
        for from_i in range(near, past, BM):
            at = from_i + m
            i = at - begin
            real = at < past
            stat = (b * length + i) * heads + h
            q = tl.load(
                q_ptr + b * q_b + h * q_h + i.to(tl.int64)[:, None] * q_l + d[None, :],
                mask=real[:, None] & (d < K)[None, :],
                other=0.0,
            ).to(FACTOR)
            do = tl.load(do_ptr + stat[:, None] * V + dv[None, :], mask=real[:, None] & columns, other=0.0).to(FACTOR)
            lse = tl.load(lse_ptr + stat, mask=real, other=float("inf"))
            delta = tl.load(delta_ptr + stat, mask=real, other=0.0)
            s = tl.dot(k, tl.trans(q), input_precision=PRECISION) * (scale * LOG2_E)
            visible = there[:, None] & real[None, :]
            distance = at[None, :] - j[:, None]
            if CAUSAL:
                visible &= distance >= 0
            if BIAS:
                entry = distance
                if not CAUSAL:
                    entry += 2 * chunk - 1
                s += tl.load(bias_ptr + h * entries + entry, mask=visible, other=0.0) * LOG2_E
            p = tl.where(visible, tl.exp2(s - lse[None, :]), 0.0)
            dv_acc = tl.dot(p.to(FACTOR), do, dv_acc, input_precision=PRECISION)
            ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta[None, :])
            dk_acc = tl.dot(ds.to(FACTOR), q, dk_acc, input_precision=PRECISION)
        tl.store(
            dk_ptr + ((b * source + token) * heads + h)[:, None] * K + d[None, :],
            (dk_acc * scale).to(dk_ptr.dtype.element_ty),
            mask=mine[:, None] & (d < K)[None, :],
        )
    if TABLES:
        size = group * chunk
        held = tl.zeros_like(j)
        if WINDOW:
            held = (j + chunk) // size + 1  # the first group whose table has this key
        cell = ((row * groups + held) * codes + code)[:, None] * V + dv[None, :]
        dv_acc += tl.load(before_ptr + cell, mask=(there & (held < groups))[:, None] & columns, other=0.0)
        if WINDOW and not CAUSAL:
            held = tl.maximum(j - chunk, 0) // size - 1  # the last group that has it behind itself
            cell = ((row * groups + held) * codes + code)[:, None] * V + dv[None, :]
            dv_acc += tl.load(behind_ptr + cell, mask=(there & (held >= 0))[:, None] & columns, other=0.0)
    tl.store(
        dv_ptr + ((b * source + token) * heads + h)[:, None] * V + dv[None, :],
        dv_acc.to(dv_ptr.dtype.element_ty),
        mask=mine[:, None] & columns,
    )


@triton.jit
def bias_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, places_ptr, do_ptr, lse_ptr, delta_ptr, ds_ptr,
    across, splits, per_split, skip, blocks, length, heads, width, chunk, entries, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
    K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    CAUSAL: tl.constexpr, STATE: tl.constexpr, LOG2_E: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ds of BM queries and BN keys of a window, (B, H, splits, C, `width` = 2 C or 3 C), summed over the `per_split`
    blocks of a split."""
    pid, split = tl.program_id(0), tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    b, h = row // heads, row % heads
    shift, first, end, begin = place(places_ptr, b, chunk, STATE)
    query = pid // across * BM + tl.arange(0, BM)
    slot = pid % across * BN + tl.arange(0, BN)  # the window begins one block before the queries' own
    d, dv = tl.arange(0, BK), tl.arange(0, BV)
    distance = query[:, None] + chunk - slot[None, :]
    pair = (query < chunk)[:, None] & (slot < width)[None, :]
    entry = distance
    if CAUSAL:
        pair &= distance >= 0
    else:
        entry += 2 * chunk - 1
    bias = tl.load(bias_ptr + h * entries + entry, mask=pair, other=0.0) * LOG2_E
    acc = tl.zeros([BM, BN], tl.float32)
    low = skip + split * per_split
    past = tl.minimum(low + per_split, blocks)
    past = tl.where(tl.max(tl.max(pair.to(tl.int32), 1), 0) > 0, past, 0)
    for block in range(low, past):
        i = block * chunk + query - begin
        real = (query < chunk) & (i >= 0) & (i < length)
        j = (block - 1) * chunk + slot
        there = (slot < width) & (j >= first) & (j < end)
        token = (j + shift).to(tl.int64)
        stat = (b * length + i) * heads + h
        q = tl.load(
            q_ptr + b * q_b + h * q_h + i.to(tl.int64)[:, None] * q_l + d[None, :],
            mask=real[:, None] & (d < K)[None, :],
            other=0.0,
        )
        k = tl.load(
            k_ptr + b * k_b + h * k_h + token[None, :] * k_l + d[:, None],
            mask=there[None, :] & (d < K)[:, None],
            other=0.0,
        )
        s = tl.dot(q.to(FACTOR), k.to(FACTOR), input_precision=PRECISION) * (scale * LOG2_E) + bias
        do = tl.load(do_ptr + stat[:, None] * V + dv[None, :], mask=real[:, None] & (dv < V)[None, :], other=0.0)
        v = tl.load(
            v_ptr + b * v_b + h * v_h + token[None, :] * v_l + dv[:, None],
            mask=there[None, :] & (dv < V)[:, None],
            other=0.0,
        )
        dp = tl.dot(do.to(FACTOR), v.to(FACTOR), input_precision=PRECISION)
        lse = tl.load(lse_ptr + stat, mask=real, other=float("inf"))
        delta = tl.load(delta_ptr + stat, mask=real, other=0.0)
        p = tl.exp2(s - lse[:, None])
        acc += tl.where(pair & there[None, :], p * (dp - delta[:, None]), 0.0)
    to = ((row * splits + split) * chunk + query)[:, None] * width + slot[None, :]
    tl.store(ds_ptr + to, acc, mask=(query < chunk)[:, None] & (slot < width)[None, :])
