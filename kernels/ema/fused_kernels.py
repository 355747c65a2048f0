"""Triton kernels of the damped EMA: as those of the selective scan, with decays that no token changes.

One warp owns a few channels with all of their averages, (channels, averages) in registers, and goes token after token.

B batch, L length (M padded to a multiple of S), D channels (BD of a tile), N averages (a power of two), G chunks,
S tokens per kept state, T tokens of a group. REVERSE: the average runs from the last token to the first.
"""

# ruff: noqa: RUF005, SIM102 (Triton compiles no stars in a tuple, no `and` with a constant)
# Unrolled loops let tuples grow.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from ..selective_scan.fused_forward import place, put_row, put_tile, tile


@triton.jit
def token_at(s, L, REVERSE: tl.constexpr):
    """Where the step s of the recurrence stands."""
    return L - 1 - s if REVERSE else s


@triton.jit
def steps_of(x, row, first, left, e, L, D: tl.constexpr, BD: tl.constexpr, T: tl.constexpr, REVERSE: tl.constexpr):
    """The channels of T steps from step `first` on; zeros from `left` of them on."""
    at = x + (row.to(tl.int64) * L + token_at(first, L, REVERSE)) * D + e
    rows = ()
    for k in tl.static_range(T):
        value = tl.load(at + (-k * D if REVERSE else k * D), mask=(e < D) & (k < left), other=0.0)
        rows = rows + (value.to(tl.float32),)
    return rows


@triton.jit
def ema_ends(
    x, weight, q, end,
    L, G, chunk,
    D: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, T: tl.constexpr, REVERSE: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    """What a chunk adds to the state after it, (B, G, D, N): h = q h + weight x from 0, step by step.

    GRADIENT: h = q (h + weight x), from the chunk's last step to its first: the gradient of the state before it.
    """
    row, g, e, n = place(tl.program_id(0), G, D, N, BD)
    q_DN, weight_DN = tile(q, e, n, D, N), tile(weight, e, n, D, N)
    h_DN = tl.zeros((BD, N), tl.float32)
    start = g * chunk
    stop = min(L, start + chunk)
    number = tl.cdiv(stop - start, T)
    for i in range(number):
        first = start + (number - 1 - i if GRADIENT else i) * T
        xs = steps_of(x, row, first, stop - first, e, L, D, BD, T, REVERSE)
        for k in tl.static_range(T - 1 if GRADIENT else 0, -1 if GRADIENT else T, -1 if GRADIENT else 1):
            added_DN = weight_DN * xs[k][:, None]
            after_DN = q_DN * (h_DN + added_DN) if GRADIENT else q_DN * h_DN + added_DN
            h_DN = tl.where(first + k < stop, after_DN, h_DN)
    put_tile(end + (row * G + g).to(tl.int64) * (D * N), h_DN, e, n, D, N)


@triton.jit
def ema_outputs(
    x, q, b, c, before, y, saved, last,
    L, M, G, chunk,
    D: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, S: tl.constexpr, T: tl.constexpr,
    REVERSE: tl.constexpr, SAVE: tl.constexpr,
):  # fmt: skip
    """y (B, L, D); with SAVE the states before each S steps, (B, M / S, D, N); the last state, (B, D, N)."""
    row, g, e, n = place(tl.program_id(0), G, D, N, BD)
    q_DN, b_DN, c_DN = tile(q, e, n, D, N), tile(b, e, n, D, N), tile(c, e, n, D, N)
    h_DN = tile(before + (row * G + g).to(tl.int64) * (D * N), e, n, D, N)
    start = g * chunk
    stop = min(L, start + chunk)
    next_x = steps_of(x, row, start, stop - start, e, L, D, BD, T, REVERSE)
    for first in range(start, stop, T):
        xs = next_x
        next_x = steps_of(x, row, first + T, stop - first - T, e, L, D, BD, T, REVERSE)
        if SAVE:
            if first % S == 0:
                put_tile(saved + (row * (M // S) + first // S).to(tl.int64) * (D * N), h_DN, e, n, D, N)
        ys = ()
        for k in tl.static_range(T):
            h_DN = tl.where(first + k < stop, q_DN * h_DN + b_DN * xs[k][:, None], h_DN)
            ys = ys + (tl.sum(c_DN * h_DN, 1),)
        at = y + (row.to(tl.int64) * L + token_at(first, L, REVERSE)) * D + e
        for k in tl.static_range(T):
            put_row(at + (-k * D if REVERSE else k * D), ys[k], e, first + k < stop, D, BD)
    if g == G - 1:
        put_tile(last + row.to(tl.int64) * (D * N), h_DN, e, n, D, N)


@triton.jit
def ema_gradients(
    dy, x, q, b, c, saved, entering, dx, dlog_q, db, dc,
    L, M, G, chunk,
    D: tl.constexpr, N: tl.constexpr, BD: tl.constexpr, S: tl.constexpr, REVERSE: tl.constexpr,
):  # fmt: skip
    """dx (B, L, D); dlog_q, db, dc (B, G, D, N) in float32, to be summed.

    entering: (B, G, D, N), q times the gradient of the state after the first step behind the chunk.
    """
    row, g, e, n = place(tl.program_id(0), G, D, N, BD)
    q_DN, b_DN, c_DN = tile(q, e, n, D, N), tile(b, e, n, D, N), tile(c, e, n, D, N)
    w_DN = tile(entering + (row * G + g).to(tl.int64) * (D * N), e, n, D, N)
    dq_DN, db_DN, dc_DN = (tl.zeros((BD, N), tl.float32), tl.zeros((BD, N), tl.float32), tl.zeros((BD, N), tl.float32))
    start = g * chunk
    stop = min(L, start + chunk)
    number = tl.cdiv(stop - start, S)
    for i in range(number):
        first = start + (number - 1 - i) * S
        left = stop - first
        xs = steps_of(x, row, first, left, e, L, D, BD, S, REVERSE)
        dys = steps_of(dy, row, first, left, e, L, D, BD, S, REVERSE)
        h_DN = tile(saved + (row * (M // S) + first // S).to(tl.int64) * (D * N), e, n, D, N)
        hs = (h_DN,)
        for k in tl.static_range(S):
            h_DN = q_DN * h_DN + b_DN * xs[k][:, None]
            hs = hs + (h_DN,)
        at = dx + (row.to(tl.int64) * L + token_at(first, L, REVERSE)) * D + e
        for k in tl.static_range(S - 1, -1, -1):
            real = k < left
            g_DN = tl.where(real, c_DN * dys[k][:, None] + w_DN, 0.0)  # the gradient of the state after this step
            put_row(at + (-k * D if REVERSE else k * D), tl.sum(g_DN * b_DN, 1), e, real, D, BD)
            dc_DN += hs[k + 1] * dys[k][:, None]
            db_DN += g_DN * xs[k][:, None]
            v_DN = q_DN * g_DN
            dq_DN += v_DN * hs[k]
            w_DN = tl.where(real, v_DN, w_DN)
    part = (row * G + g).to(tl.int64) * (D * N)
    put_tile(dlog_q + part, dq_DN, e, n, D, N)
    put_tile(db + part, db_DN, e, n, D, N)
    put_tile(dc + part, dc_DN, e, n, D, N)
