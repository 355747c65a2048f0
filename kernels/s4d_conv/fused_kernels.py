"""Triton kernels of a linear recurrence over chunks of tokens, channel by channel (`spans.py` has the equations).

A program owns one channel, keeps its tables in registers and goes along the tokens, a segment of M chunks at a time:
the products with the tables are matrix products of M rows, the states inside a segment come from Triton's own scan.

The state before a chunk takes the inputs of the chunk that the recurrence met just before: the one to the left, or to
the right if DOWN. So a segment's inputs are read once more, one chunk aside, and the scan needs no shift.

B rows, L tokens of a channel, T of a chunk, M chunks of a segment, G pieces of whole segments, N complex states (BN
padded). Tensors are (D, B, L) and (D, ..., N, 2); suffixes _MT, _TN, ... give the shapes of tiles; r, i: parts.
"""

# ruff: noqa: SIM102 (Triton compiles no `and` with a constant)
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def combine(ar, ai, xr, xi, br, bi, yr, yi):
    """First (a, x), then (b, y), of h = a h + x with complex numbers."""
    return ar * br - ai * bi, ar * bi + ai * br, br * xr - bi * xi + yr, br * xi + bi * xr + yi


@triton.jit
def tokens(x, first, low, high, T: tl.constexpr, M: tl.constexpr):
    """(M, T) tokens of a channel from `first` on; zeros outside low .. high - 1."""
    t = first + tl.arange(0, M)[:, None] * T + tl.arange(0, T)[None, :]
    return tl.load(x + t, mask=(t >= low) & (t < high), other=0.0).to(tl.float32)


@triton.jit
def table(x, N, t_stride, n_stride, T: tl.constexpr, BN: tl.constexpr):
    """(T, N) of a part of a table."""
    t, n = tl.arange(0, T)[:, None], tl.arange(0, BN)[None, :]
    return tl.load(x + t * t_stride + n * n_stride, mask=n < N, other=0.0)


@triton.jit
def put_table(x, value, N, t_stride, n_stride, T: tl.constexpr, BN: tl.constexpr):
    t, n = tl.arange(0, T)[:, None], tl.arange(0, BN)[None, :]
    tl.store(x + t * t_stride + n * n_stride, value, mask=n < N)


@triton.jit
def pair(x, N, BN: tl.constexpr):
    """Both parts of N numbers."""
    n = tl.arange(0, BN)
    return tl.load(x + 2 * n, mask=n < N, other=0.0), tl.load(x + 2 * n + 1, mask=n < N, other=0.0)


@triton.jit
def put_pair(x, r, i, met, N, BN: tl.constexpr):
    """Store both parts where `met`."""
    n = tl.arange(0, BN)
    tl.store(x + 2 * n, r, mask=(n < N) & met)
    tl.store(x + 2 * n + 1, i, mask=(n < N) & met)


@triton.jit
def row_of(x_MN, met_M):
    """The one row that is met, zeros where none is."""
    return tl.sum(tl.where(met_M[:, None], x_MN, 0.0), 0)


@triton.jit
def added(x_MT, wr_TN, wi_TN, cr, ci, edge_M, PRECISION: tl.constexpr):
    """What the chunks write to the state, and c in the row that is met first."""
    r_MN = tl.dot(x_MT, wr_TN, input_precision=PRECISION) + tl.where(edge_M[:, None], cr[None, :], 0.0)
    i_MN = tl.dot(x_MT, wi_TN, input_precision=PRECISION) + tl.where(edge_M[:, None], ci[None, :], 0.0)
    return r_MN, i_MN


@triton.jit
def arrived(r_MN, i_MN, arriving, met_M, N, BN: tl.constexpr):
    """With a pair in the one row that is met."""
    r, i = pair(arriving, N, BN)
    return r_MN + tl.where(met_M[:, None], r[None, :], 0.0), i_MN + tl.where(met_M[:, None], i[None, :], 0.0)


@triton.jit
def scanned(x_MN, y_MN, dr, di, M: tl.constexpr, BN: tl.constexpr, DOWN: tl.constexpr):
    """h_m = d h_before + x_m + i y_m."""
    dr_MN, di_MN = tl.broadcast_to(dr[None, :], (M, BN)), tl.broadcast_to(di[None, :], (M, BN))
    _, _, r_MN, i_MN = tl.associative_scan((dr_MN, di_MN, x_MN, y_MN), 0, combine, reverse=DOWN)
    return r_MN, i_MN


@triton.jit
def to_channels(x, out, D, L, tiles, b_stride, l_stride, d_stride, B, BL: tl.constexpr, BD: tl.constexpr):
    """out (D, B, L) of x (B, L, D) in any strides."""
    b = (tl.program_id(0) // tiles).to(tl.int64)
    t = tl.program_id(0) % tiles * BL + tl.arange(0, BL)
    d = (tl.program_id(1) * BD + tl.arange(0, BD)).to(tl.int64)
    real = (t < L)[:, None] & (d < D)[None, :]
    at = x + b * b_stride + t.to(tl.int64)[:, None] * l_stride + d[None, :] * d_stride
    value_LD = tl.load(at, mask=real, other=0.0)
    put = (t < L)[None, :] & (d < D)[:, None]
    tl.store(out + (d[:, None] * B + b) * L + t[None, :], tl.trans(value_LD), mask=put)


@triton.jit
def piece_ends(
    x, write, decay, last, arriving, ends,
    B, L, G, piece, N, w_t, w_n, w_part,
    T: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, DOWN: tl.constexpr, GRADIENT: tl.constexpr,
    LAST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a piece of tokens adds to the state after it, (D, B, G, N, 2): the recurrence from 0.

    write: (D, ...) with strides of t, n and the parts. GRADIENT: of the states, with decay*; LAST: with what arrives at
    the states before the chunks `last` (B,), (D, B, N, 2).
    """
    pid = tl.program_id(0)
    d, b, g = (pid // (B * G)).to(tl.int64), pid // G % B, pid % G
    m = tl.arange(0, M)
    x += (d * B + b) * L
    write += d * (2 * N * T)
    wr_TN, wi_TN = table(write, N, w_t, w_n, T, BN), table(write + w_part, N, w_t, w_n, T, BN)
    dr, di = pair(decay + d * (2 * N), N, BN)
    if GRADIENT:
        di = -di
    cr, ci = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    start = g * piece
    stop = min(L, start + piece)
    number = tl.cdiv(stop - start, M * T)
    for s in range(number):
        first = start + (number - 1 - s if DOWN else s) * M * T
        x_MT = tokens(x, first, start, stop, T, M)
        edge_M = m == (M - 1 if DOWN else 0)
        r_MN, i_MN = added(x_MT, wr_TN, wi_TN, dr * cr - di * ci, dr * ci + di * cr, edge_M, PRECISION)
        if GRADIENT:
            if LAST:
                met_M = m == tl.load(last + b) - first // T
                r_MN, i_MN = arrived(r_MN, i_MN, arriving + (d * B + b) * (2 * N), met_M, N, BN)
        r_MN, i_MN = scanned(r_MN, i_MN, dr, di, M, BN, DOWN)
        far_M = m == (0 if DOWN else M - 1)
        cr, ci = row_of(r_MN, far_M), row_of(i_MN, far_M)
    put_pair(ends + ((d * B + b) * G + g) * (2 * N), cr, ci, True, N, BN)


@triton.jit
def carry_over(
    ends, decay, first, B, G, chunks, N, BN: tl.constexpr, DOWN: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    """What pieces add, (D, B, G, N, 2), becomes the state before each of them, from `first` (D, B, N, 2) on."""
    row = tl.program_id(0).to(tl.int64)
    dr, di = pair(decay + row // B * (2 * N), N, BN)
    if GRADIENT:
        di = -di
    pr, pi = tl.full((BN,), 1.0, tl.float32), tl.zeros((BN,), tl.float32)
    while chunks > 0:  # decay ** chunks by squares
        if chunks % 2 == 1:
            qr = pr * dr - pi * di
            pi = pr * di + pi * dr
            pr = qr
        qr = dr * dr - di * di
        di = 2 * dr * di
        dr = qr
        chunks = chunks // 2
    cr, ci = pair(first + row * (2 * N), N, BN)
    for s in range(G):
        at = ends + (row * G + (G - 1 - s if DOWN else s)) * (2 * N)
        er, ei = pair(at, N, BN)
        put_pair(at, cr, ci, True, N, BN)
        qr = pr * cr - pi * ci + er
        ci = pr * ci + pi * cr + ei
        cr = qr


@triton.jit
def chunk_outputs(
    x, block, write, read, decay, before, last, arriving, y, wanted, states,
    B, L, G, piece, segments, N, w_t, w_n, w_part, r_t, r_n, r_part, b_s, b_t,
    T: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, DOWN: tl.constexpr, GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr, LAST: tl.constexpr, SAVE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """y (D, B, L) of a piece from the state before it, `before` (D, B, G, N, 2).

    LAST: also the state before chunk last (B,), wanted (D, B, N, 2). SAVE: those before the segments, (D, B, segments,
    N, 2). The tables come with their strides, so that GRADIENT makes dx of dy: the same recurrence the other way, its
    states the gradients of the states after the chunks. Then, LAST: with what arrives at the state before chunk last;
    wanted: decay* times the last state of the whole row.
    """
    pid = tl.program_id(0)
    d, b, g = (pid // (B * G)).to(tl.int64), pid // G % B, pid % G
    m = tl.arange(0, M)
    x += (d * B + b) * L
    y += (d * B + b) * L
    arriving += (d * B + b) * (2 * N)
    wanted += (d * B + b) * (2 * N)
    write += d * (2 * N * T)
    read += d * (2 * N * T)
    wr_TN, wi_TN = table(write, N, w_t, w_n, T, BN), table(write + w_part, N, w_t, w_n, T, BN)
    rr_TN, ri_TN = table(read, N, r_t, r_n, T, BN), table(read + r_part, N, r_t, r_n, T, BN)
    if BLOCK:
        block_TT = table(block + d * (T * T), T, b_s, b_t, T, T)
    dr, di = pair(decay + d * (2 * N), N, BN)
    if GRADIENT:
        di = -di
    cr, ci = pair(before + ((d * B + b) * G + g) * (2 * N), N, BN)
    start = g * piece
    stop = min(L, start + piece)
    number = tl.cdiv(stop - start, M * T)
    aside: tl.constexpr = T if DOWN else -T
    for s in range(number):
        first = start + (number - 1 - s if DOWN else s) * M * T
        x_MT = tokens(x, first + aside, start, stop, T, M)
        edge_M = m == (M - 1 if DOWN else 0)
        r_MN, i_MN = added(x_MT, wr_TN, wi_TN, cr, ci, edge_M, PRECISION)
        if LAST:
            place = tl.load(last + b) - first // T
            if GRADIENT:  # `before` has it where chunk last begins a piece
                met_M = (m + 1 == place) & (first + place * T < stop)
                r_MN, i_MN = arrived(r_MN, i_MN, arriving, met_M, N, BN)
        if SAVE:
            at = states + ((d * B + b) * segments + first // (M * T)) * (2 * N)
            put_pair(at, row_of(r_MN, edge_M), row_of(i_MN, edge_M), True, N, BN)
        r_MN, i_MN = scanned(r_MN, i_MN, dr, di, M, BN, DOWN)
        if LAST:
            if not GRADIENT:
                met = (place >= 0) & (place < M)
                put_pair(wanted, row_of(r_MN, m == place), row_of(i_MN, m == place), met, N, BN)
        far_M = m == (0 if DOWN else M - 1)
        hr, hi = row_of(r_MN, far_M), row_of(i_MN, far_M)
        cr, ci = dr * hr - di * hi, dr * hi + di * hr
        y_MT = tl.dot(r_MN, tl.trans(rr_TN), input_precision=PRECISION)
        y_MT = tl.dot(i_MN, tl.trans(ri_TN), y_MT, input_precision=PRECISION)
        if BLOCK:
            y_MT = tl.dot(tokens(x, first, start, stop, T, M), block_TT, y_MT, input_precision=PRECISION)
        t = first + m[:, None] * T + tl.arange(0, T)[None, :]
        tl.store(y + t, y_MT.to(y.dtype.element_ty), mask=t < stop)
    if GRADIENT:
        put_pair(wanted, cr, ci, g == (0 if DOWN else G - 1), N, BN)


@triton.jit
def table_gradients(
    dy, x, write, read, decay, states, gradients, last, arriving, dblock, dwrite, dread, ddecay,
    B, L, segments, splits, N,
    T: tl.constexpr, M: tl.constexpr, BN: tl.constexpr, DOWN: tl.constexpr, BLOCK: tl.constexpr,
    LAST: tl.constexpr, INPUT: tl.constexpr, STATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """INPUT: dblock, dwrite. STATES: dread, ddecay. Sums over every `splits`-th segment, (splits, D, ...), in float32.

    states: before the segments; gradients: of the states after their chunks that the other direction meets first; both
    (D, B, segments, N, 2). DOWN: the direction of the recurrence itself.
    """
    d, split = (tl.program_id(0) // splits).to(tl.int64), tl.program_id(0) % splits
    m = tl.arange(0, M)
    x += d * B * L
    dy += d * B * L
    write += d * (2 * N * T)
    read += d * (2 * N * T)
    rr_TN, ri_TN = table(read, N, 1, 2 * T, T, BN), table(read + T, N, 1, 2 * T, T, BN)
    dr, di = pair(decay + d * (2 * N), N, BN)
    if INPUT:
        dwr_TN, dwi_TN = tl.zeros((T, BN), tl.float32), tl.zeros((T, BN), tl.float32)
        if BLOCK:
            dblock_TT = tl.zeros((T, T), tl.float32)
    if STATES:
        wr_TN, wi_TN = table(write, N, 2 * N, 2, T, BN), table(write + 1, N, 2 * N, 2, T, BN)
        drr_TN, dri_TN = tl.zeros((T, BN), tl.float32), tl.zeros((T, BN), tl.float32)
        ddr, ddi = tl.zeros((BN,), tl.float32), tl.zeros((BN,), tl.float32)
    aside: tl.constexpr = T if DOWN else -T
    for item in range(split, B * segments, splits):
        b = (item // segments).to(tl.int64)
        first = item % segments * M * T
        stop = min(L, first + M * T)
        at = ((d * B + b) * segments + item % segments) * (2 * N)
        g_MT = tokens(dy + b * L, first - aside, first, stop, T, M)
        cr, ci = pair(gradients + at, N, BN)
        er_MN, ei_MN = added(g_MT, rr_TN, ri_TN, cr, ci, m == (0 if DOWN else M - 1), PRECISION)
        if LAST:
            place = tl.load(last + b) - first // T
            met_M = (m + 1 == place) & (first + place * T < stop)
            er_MN, ei_MN = arrived(er_MN, ei_MN, arriving + (d * B + b) * (2 * N), met_M, N, BN)
        er_MN, ei_MN = scanned(er_MN, ei_MN, dr, -di, M, BN, not DOWN)
        g_MT = tokens(dy + b * L, first, first, stop, T, M)
        if INPUT:
            x_TM = tl.trans(tokens(x + b * L, first, first, stop, T, M))
            dwr_TN = tl.dot(x_TM, er_MN, dwr_TN, input_precision=PRECISION)
            dwi_TN = tl.dot(x_TM, ei_MN, dwi_TN, input_precision=PRECISION)
            if BLOCK:
                dblock_TT = tl.dot(x_TM, g_MT, dblock_TT, input_precision=PRECISION)
        if STATES:
            x_MT = tokens(x + b * L, first + aside, first, stop, T, M)
            cr, ci = pair(states + at, N, BN)
            sr_MN, si_MN = added(x_MT, wr_TN, wi_TN, cr, ci, m == (M - 1 if DOWN else 0), PRECISION)
            sr_MN, si_MN = scanned(sr_MN, si_MN, dr, di, M, BN, DOWN)
            ddr += tl.sum(sr_MN * er_MN + si_MN * ei_MN, 0)
            ddi += tl.sum(sr_MN * ei_MN - si_MN * er_MN, 0)
            g_TM = tl.trans(g_MT)
            drr_TN = tl.dot(g_TM, sr_MN, drr_TN, input_precision=PRECISION)
            dri_TN = tl.dot(g_TM, si_MN, dri_TN, input_precision=PRECISION)
    part = split * (tl.num_programs(0) // splits) + d
    dwrite += part * (2 * N * T)
    dread += part * (2 * N * T)
    if INPUT:
        put_table(dwrite, dwr_TN, N, 2 * N, 2, T, BN)
        put_table(dwrite + 1, dwi_TN, N, 2 * N, 2, T, BN)
        if BLOCK:
            put_table(dblock + part * (T * T), dblock_TT, T, T, 1, T, T)
    if STATES:
        put_table(dread, drr_TN, N, 1, 2 * T, T, BN)
        put_table(dread + T, dri_TN, N, 1, 2 * T, T, BN)
        put_pair(ddecay + part * (2 * N), ddr, ddi, True, N, BN)
