"""Triton kernels of the depthwise convolution over time: outputs, and all gradients in one pass.

The tokens t = r, r + D, r + 2 D ... meet only each other: a class of their own, in which the convolution has no
dilation. A program goes through a piece of a class token after token, so that every input is read once; the window of
K inputs stays in registers, T new ones are loaded at a time. C is a constant of the compiler.

B batch, L length, C channels (BC of a block), K taps, D dilation, P tokens of the tail, T tokens of a group, A taps
ahead of the token. Places are those of a class: place q of class r is token r + q D; it may lie before the first.
"""

# ruff: noqa: RUF005 (Triton compiles no stars in a tuple)
# Unrolled loops let tuples grow.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def token_of(pointer, row, t, low, high, L, c, C: tl.constexpr):
    """One token's channels in float32, zeros unless low <= t < high. pointer: (B, L, C)."""
    at = pointer + (row.to(tl.int64) * L + t) * C
    return tl.load(at + c, mask=(c < C) & (t >= low) & (t < high), other=0.0).to(tl.float32)


@triton.jit
def window(x, tail, row, r, first, L, P, c, D, C: tl.constexpr, K: tl.constexpr, TAIL: tl.constexpr):
    """The K - 1 inputs from place `first` on, those before the first token from the tail."""
    rows = ()
    for k in tl.static_range(K - 1):
        t = r + (first + k) * D
        value = token_of(x, row, t, 0, L, L, c, C)
        if TAIL:
            value += token_of(tail, row, P + t, 0, P, P, c, C)
        rows = rows + (value,)
    return rows


@triton.jit
def taps_of(weight, c, C: tl.constexpr, K: tl.constexpr):
    taps = ()
    for k in tl.static_range(K):
        taps = taps + (tl.load(weight + k * C + c, mask=c < C, other=0.0),)
    return taps


@triton.jit
def conv_outputs(
    x, weight, bias, tail, y,
    L, P, D, pieces, piece,
    C: tl.constexpr, BC: tl.constexpr, K: tl.constexpr, T: tl.constexpr, A: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """y (B, L, C). weight: (K, C), bias: (C,), both float32. A piece is `piece` places of a class."""
    blocks: tl.constexpr = (C + BC - 1) // BC
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    part = tl.program_id(0) // blocks
    r, row = part % D, part // D // pieces
    first = part // D % pieces * piece
    stop = min(first + piece, tl.cdiv(L - r, D))
    taps = taps_of(weight, c, C, K)
    start = tl.load(bias + c, mask=c < C, other=0.0) if BIAS else tl.zeros((BC,), tl.float32)
    xs = window(x, tail, row, r, first - (K - 1) + A, L, P, c, D, C, K, TAIL)
    for place in range(first, stop, T):
        for j in tl.static_range(T):
            xs = xs + (token_of(x, row, r + (place + j + A) * D, 0, L, L, c, C),)
        for j in tl.static_range(T):
            sum_C = start
            for k in tl.static_range(K):
                sum_C += taps[k] * xs[j + k]
            if SILU:
                sum_C *= tl.sigmoid(sum_C)
            at = y + (row.to(tl.int64) * L + r + (place + j) * D) * C
            tl.store(at + c, sum_C.to(y.dtype.element_ty), mask=(c < C) & (place + j < stop))
        kept = ()
        for k in tl.static_range(K - 1):
            kept = kept + (xs[T + k],)
        xs = kept


@triton.jit
def conv_gradients(
    dy, x, weight, bias, tail, dx, dtail, dweight, dbias,
    L, P, D, pieces, piece, together,
    C: tl.constexpr, BC: tl.constexpr, K: tl.constexpr, T: tl.constexpr, A: tl.constexpr,
    SILU: tl.constexpr, BIAS: tl.constexpr, TAIL: tl.constexpr,
):  # fmt: skip
    """dx (B, L, C), dtail (B, P, C); dweight (parts, K, C) and dbias (parts, C) in float32, to be summed.

    A program takes `together` classes one after another. It owns the places of its piece; the K - 1 tokens on either
    side, whose outputs read these places, it computes again.
    """
    blocks: tl.constexpr = (C + BC - 1) // BC
    c = tl.program_id(0) % blocks * BC + tl.arange(0, BC)
    part = tl.program_id(0) // blocks
    bunches = tl.cdiv(D, together)
    low, row = part % bunches * together, part // bunches // pieces
    first = part // bunches % pieces * piece
    taps = taps_of(weight, c, C, K)
    start = tl.load(bias + c, mask=c < C, other=0.0) if BIAS else tl.zeros((BC,), tl.float32)
    sums = ()
    for _ in tl.static_range(K):
        sums = sums + (tl.zeros((BC,), tl.float32),)
    sum_g = tl.zeros((BC,), tl.float32)
    for r in range(low, min(low + together, D)):
        stop = max(first, min(first + piece, tl.cdiv(L - r, D)))
        xs = window(x, tail, row, r, first - (K - 1), L, P, c, D, C, K, TAIL)
        gs = ()  # gradients of the sums of the K - 1 places before
        for _ in tl.static_range(K - 1):
            gs = gs + (tl.zeros((BC,), tl.float32),)
        for place in range(first - A, stop - A + K - 1, T):  # the output of a place reads inputs up to place + A
            for j in tl.static_range(T):
                xs = xs + (token_of(x, row, r + (place + j + A) * D, 0, L, L, c, C),)
            for j in tl.static_range(T):
                t = r + (place + j) * D
                g_C = token_of(dy, row, t, 0, L, L, c, C)
                if SILU:
                    sum_C = start
                    for k in tl.static_range(K):
                        sum_C += taps[k] * xs[j + k]
                    share = tl.sigmoid(sum_C)
                    g_C *= share * (1 + sum_C * (1 - share))
                gs = gs + (g_C,)
            for j in tl.static_range(T):
                own = (place + j >= first) & (place + j < stop)
                mine_C = tl.where(own, gs[K - 1 + j], 0.0)
                sum_g += mine_C
                grown = ()
                for k in tl.static_range(K):
                    grown = grown + (sums[k] + mine_C * xs[j + k],)
                sums = grown
            for j in tl.static_range(T):
                q = place + j + A - (K - 1)  # the place that no later output reads
                t = r + q * D
                dx_C = tl.zeros((BC,), tl.float32)
                for k in tl.static_range(K):
                    dx_C += taps[K - 1 - k] * gs[j + k]
                real = (c < C) & (q >= first) & (q < stop)
                at = dx + (row.to(tl.int64) * L + t) * C
                tl.store(at + c, dx_C.to(dx.dtype.element_ty), mask=real & (t < L))
                if TAIL:
                    at = dtail + (row.to(tl.int64) * P + P + t) * C
                    tl.store(at + c, dx_C.to(dtail.dtype.element_ty), mask=(c < C) & (t < 0) & (first == 0))
            kept_x, kept_g = (), ()
            for k in tl.static_range(K - 1):
                kept_x, kept_g = kept_x + (xs[T + k],), kept_g + (gs[T + k],)
            xs, gs = kept_x, kept_g
    for k in tl.static_range(K):
        tl.store(dweight + (part.to(tl.int64) * K + k) * C + c, sums[k], mask=c < C)
    tl.store(dbias + part.to(tl.int64) * C + c, sum_g, mask=c < C)
