"""Triton kernels of the selective scan: outputs, the ends of chunks, what is carried between them.

One warp owns a few channels with all of their states and goes token after token. Its states lie in registers as
(channels, states), four neighbouring states to a thread, so that b and c come in one load and the sum over the states
takes two shuffles. Tokens are loaded a group ahead of their use. a2 = a log2(e): decays are exp2(dt a2).

E is a constant of the compiler, which folds the distances between tokens into the loads. N is padded to a power of two
and b and c, float32 (B, M, N), with zero tokens to a multiple of S: their loads need no mask.

B batch, L length (M padded), E channels (BE of a tile), N states, G chunks, T tokens of a group, S tokens per kept
state.
"""

# ruff: noqa: RUF005, SIM102 (what Triton compiles has neither stars in a tuple nor `and` with a constant)
# Unrolled loops let tuples grow.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def place(program, G, E: tl.constexpr, N: tl.constexpr, BE: tl.constexpr):
    """The row, chunk, channels and states of a program; neighbouring programs have neighbouring channels."""
    tiles: tl.constexpr = (E + BE - 1) // BE
    part = program // tiles
    return part // G, part % G, program % tiles * BE + tl.arange(0, BE), tl.arange(0, N)


@triton.jit
def rows_of(at, e, left, E: tl.constexpr, BE: tl.constexpr, T: tl.constexpr):
    """The channels of T tokens from the pointers `at` of the first on, as a tuple; zeros from token `left` on."""
    rows = ()
    for k in tl.static_range(T):
        mask = k < left if E % BE == 0 else (e < E) & (k < left)
        rows = rows + (tl.load(at + k * E, mask=mask, other=0.0),)
    return rows


@triton.jit
def real_rows_of(at, e, E: tl.constexpr, BE: tl.constexpr, T: tl.constexpr):
    """`rows_of` where all T tokens are real."""
    rows = ()
    for k in tl.static_range(T):
        if E % BE == 0:
            rows = rows + (tl.load(at + k * E),)
        else:
            rows = rows + (tl.load(at + k * E, mask=e < E, other=0.0),)
    return rows


@triton.jit
def put_row(at, value, e, real, E: tl.constexpr, BE: tl.constexpr):
    tl.store(at, value.to(at.dtype.element_ty), mask=real if E % BE == 0 else (e < E) & real)


@triton.jit
def tile(pointer, e, n, E: tl.constexpr, N: tl.constexpr):
    """(channels, states) of a contiguous (E, N)."""
    return tl.load(pointer + (e[:, None] * N + n[None, :]), mask=(e < E)[:, None], other=0.0)


@triton.jit
def put_tile(pointer, value, e, n, E: tl.constexpr, N: tl.constexpr):
    tl.store(pointer + (e[:, None] * N + n[None, :]), value, mask=(e < E)[:, None])


@triton.jit
def one_token(h_EN, u, dt, a2_EN, at_b, at_c, through, SKIP: tl.constexpr):
    """The state after a token and its y."""
    dt_E, u_E = dt.to(tl.float32), u.to(tl.float32)
    h_EN = tl.exp2(dt_E[:, None] * a2_EN) * h_EN + (dt_E * u_E)[:, None] * tl.load(at_b)[None, :]
    y_E = tl.sum(h_EN * tl.load(at_c)[None, :], 1)
    if SKIP:
        y_E += through * u_E
    return h_EN, y_E


@triton.jit
def scan_outputs(
    u, dt, b, c, a2, skip, before, y, saved, last,
    L, M, G, chunk,
    E: tl.constexpr, N: tl.constexpr, BE: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
    SKIP: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """y (B, L, E); with SAVE the states before each S tokens; the last state of each row.

    before: (B, G, E, N), the states before the chunks, of `chunk` tokens each, a multiple of S, S of T.
    """
    row, g, e, n = place(tl.program_id(0), G, E, N, BE)
    a2_EN = tile(a2, e, n, E, N)
    h_EN = tile(before + (row * G + g).to(tl.int64) * (E * N), e, n, E, N)
    through = tl.load(skip + e, mask=e < E, other=0.0) if SKIP else 0.0
    start, stop = g * chunk, min(L, g * chunk + chunk)
    full = start + (stop - start) // T * T
    kept = (row * (M // S)).to(tl.int64)
    base, padded = row.to(tl.int64) * L, row.to(tl.int64) * M
    next_u = rows_of(u + (base + start) * E + e, e, stop - start, E, BE, T)
    next_dt = rows_of(dt + (base + start) * E + e, e, stop - start, E, BE, T)
    for first in range(start, full, T):
        now_u, now_dt = next_u, next_dt
        ahead = base + min(first + T, full - T)  # the last group loads itself again
        next_u = real_rows_of(u + ahead * E + e, e, E, BE, T)
        next_dt = real_rows_of(dt + ahead * E + e, e, E, BE, T)
        if SAVE:
            if first % S == 0:
                put_tile(saved + (kept + first // S) * (E * N), h_EN, e, n, E, N)
        at_b, at_c = b + (padded + first) * N + n, c + (padded + first) * N + n
        ys = ()
        for k in tl.static_range(T):
            h_EN, y_E = one_token(h_EN, now_u[k], now_dt[k], a2_EN, at_b + k * N, at_c + k * N, through, SKIP)
            ys = ys + (y_E,)
        at = y + (base + first) * E + e
        for k in tl.static_range(T):  # all loads stand before the stores, which they could not pass
            put_row(at + k * E, ys[k], e, True, E, BE)
    for token in range(full, stop):
        if SAVE:
            if token % S == 0:
                put_tile(saved + (kept + token // S) * (E * N), h_EN, e, n, E, N)
        at, at_N = (base + token) * E + e, (padded + token) * N + n
        now_u, now_dt = real_rows_of(u + at, e, E, BE, 1), real_rows_of(dt + at, e, E, BE, 1)
        h_EN, y_E = one_token(h_EN, now_u[0], now_dt[0], a2_EN, b + at_N, c + at_N, through, SKIP)
        put_row(y + at, y_E, e, True, E, BE)
    if g == G - 1:
        put_tile(last + row.to(tl.int64) * (E * N), h_EN, e, n, E, N)


@triton.jit
def scan_ends(
    x, dt, b, a2, end, total,
    L, M, G, chunk,
    E: tl.constexpr, N: tl.constexpr, BE: tl.constexpr, T: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state after it, end (B, G, E, N), and its sum of dt, total (B, G, E).

    Forwards h_t = exp(dt_t a) h_{t-1} + dt_t x_t b_t from 0. REVERSE: w_t = exp(dt_t a) (w_{t+1} + x_t b_t) from the
    end, where x is dy and b is c: the gradient of the state before the chunk.
    """
    row, g, e, n = place(tl.program_id(0), G, E, N, BE)
    a2_EN = tile(a2, e, n, E, N)
    h_EN = tl.zeros((BE, N), tl.float32)
    sum_E = tl.zeros((BE,), tl.float32)
    start, stop = g * chunk, min(L, g * chunk + chunk)
    base, padded = row.to(tl.int64) * L, row.to(tl.int64) * M
    number = tl.cdiv(stop - start, T)
    first = start + (number - 1) * T if REVERSE else start
    next_x = rows_of(x + (base + first) * E + e, e, stop - first, E, BE, T)
    next_dt = rows_of(dt + (base + first) * E + e, e, stop - first, E, BE, T)
    for i in range(number):
        first = start + (number - 1 - i) * T if REVERSE else start + i * T
        after = first - T if REVERSE else first + T
        now_x, now_dt = next_x, next_dt
        real = tl.where(after < start, 0, stop - after)  # none when there is no further group
        next_x = rows_of(x + (base + after) * E + e, e, real, E, BE, T)
        next_dt = rows_of(dt + (base + after) * E + e, e, real, E, BE, T)
        at_b = b + (padded + first) * N + n
        for k in tl.static_range(T - 1 if REVERSE else 0, -1 if REVERSE else T, -1 if REVERSE else 1):
            x_E, dt_E, b_N = now_x[k].to(tl.float32), now_dt[k].to(tl.float32), tl.load(at_b + k * N)
            decay_EN = tl.exp2(dt_E[:, None] * a2_EN)
            sum_E += dt_E
            if REVERSE:
                h_EN = decay_EN * (h_EN + x_E[:, None] * b_N[None, :])
            else:
                h_EN = decay_EN * h_EN + (dt_E * x_E)[:, None] * b_N[None, :]
    put_tile(end + (row * G + g).to(tl.int64) * (E * N), h_EN, e, n, E, N)
    tl.store(total + (row * G + g).to(tl.int64) * E + e, sum_E, mask=e < E)


@triton.jit
def carry_ends(
    end, total, a2, first, last,
    G, E: tl.constexpr, N: tl.constexpr, BE: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """end (B, G, E, N) of `scan_ends` becomes, in place, what enters each chunk; first, last (B, E, N): the two ends.

    REVERSE: from the last chunk to the first.
    """
    row, _, e, n = place(tl.program_id(0), 1, E, N, BE)
    row = row.to(tl.int64)
    a2_EN = tile(a2, e, n, E, N)
    h_EN = tile(first + row * (E * N), e, n, E, N)
    for i in range(G):
        g = row * G + (G - 1 - i if REVERSE else i)
        added_EN = tile(end + g * (E * N), e, n, E, N)
        sum_E = tl.load(total + g * E + e, mask=e < E, other=0.0)
        put_tile(end + g * (E * N), h_EN, e, n, E, N)
        h_EN = tl.exp2(sum_E[:, None] * a2_EN) * h_EN + added_EN
    put_tile(last + row * (E * N), h_EN, e, n, E, N)
