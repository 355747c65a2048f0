"""Triton kernel of the selective scan's gradients: every chunk at once, given what enters it from its end.

A program owns a chunk and a group of channels, which it takes a tile at a time. From a state that the forward pass
kept it goes over T tokens again, holding their decays and states in registers, then back over them; exponentials are
never stored. The gradients of b and c are sums over channels: a program adds up those of its group in its own rows of
a buffer, so that nothing is atomic and every run gives the same bits.

B batch, L length (M padded), E channels (BE of a tile), N states, G chunks, S tokens per kept state, T tokens held in
registers, J groups of `tiles` tiles of channels.
"""

# ruff: noqa: RUF005 (Triton compiles no stars in a tuple)
# Unrolled loops let tuples grow.
# mypy: disable-error-code="assignment"

from __future__ import annotations

import triton
import triton.language as tl

from .fused_forward import put_row, put_tile, rows_of, tile


@triton.jit
def add_row(at, value, more):
    """The row becomes the value, or grows by it where there is more than this."""
    tl.store(at, value + tl.load(at, mask=more, other=0.0))


@triton.jit
def scan_gradients(
    dy, u, dt, b, c, a2, skip, saved, entering, du, ddt, db, dc, da, dskip,
    B, L, M, G, chunk, tiles,
    E: tl.constexpr, N: tl.constexpr, BE: tl.constexpr, S: tl.constexpr, T: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """du, ddt (B, L, E); db, dc (J, B, M, N), da (B, G, E, N), dskip (B, G, E): float32, to be summed.

    saved: (B, M / S, E, N). entering: (B, G, E, N), exp(dt a) times the gradient of the state after the chunk, of the
    token that follows it. chunk is a multiple of S, S of T.
    """
    groups = tl.cdiv(tl.cdiv(E, BE), tiles)
    j, n, part = tl.program_id(0) % groups, tl.arange(0, N), tl.program_id(0) // groups
    row, g = part // G, part % G
    start, stop = g * chunk, min(L, g * chunk + chunk)
    kept, number = (row * (M // S)).to(tl.int64), tl.cdiv(stop - start, S)
    base, padded, sums = row.to(tl.int64) * L, row.to(tl.int64) * M, (j * B + row).to(tl.int64) * M
    for block in range(j * tiles, min(tl.cdiv(E, BE), j * tiles + tiles)):
        e = block * BE + tl.arange(0, BE)
        more = block > j * tiles
        a2_EN = tile(a2, e, n, E, N)
        w_EN = tile(entering + (row * G + g).to(tl.int64) * (E * N), e, n, E, N)
        da_EN = tl.zeros((BE, N), tl.float32)
        dskip_E = tl.zeros((BE,), tl.float32)
        through = tl.load(skip + e, mask=e < E, other=0.0) if SKIP else 0.0
        for i in range(number):
            group = start + (number - 1 - i) * S
            at, at_b, left = (base + group) * E + e, b + (padded + group) * N + n, stop - group
            before_u, before_dt = rows_of(u + at, e, left, E, BE, S - T), rows_of(dt + at, e, left, E, BE, S - T)
            h_EN = tile(saved + (kept + group // S) * (E * N), e, n, E, N)
            starts = (h_EN,)  # the states before each T tokens
            for k in tl.static_range(S - T):
                dt_E = before_dt[k].to(tl.float32)
                x_E = dt_E * before_u[k].to(tl.float32)
                h_EN = tl.exp2(dt_E[:, None] * a2_EN) * h_EN + x_E[:, None] * tl.load(at_b + k * N)[None, :]
                if k % T == T - 1:
                    starts = starts + (h_EN,)
            for i_part in range(S // T):
                part = S // T - 1 - i_part
                h_EN = starts[0]
                for k in tl.static_range(1, S // T):
                    h_EN = tl.where(part == k, starts[k], h_EN)
                first = group + part * T
                left, at, at_N = stop - first, (base + first) * E + e, (padded + first) * N + n
                at_sum = (sums + first) * N + n
                us, dts = rows_of(u + at, e, left, E, BE, T), rows_of(dt + at, e, left, E, BE, T)
                dys = rows_of(dy + at, e, left, E, BE, T)
                hs, decays = (h_EN,), ()
                for k in tl.static_range(T):
                    dt_E = dts[k].to(tl.float32)
                    x_E = dt_E * us[k].to(tl.float32)
                    decay_EN = tl.exp2(dt_E[:, None] * a2_EN)
                    h_EN = decay_EN * h_EN + x_E[:, None] * tl.load(b + at_N + k * N)[None, :]
                    hs, decays = hs + (h_EN,), decays + (decay_EN,)
                dus, ddts, dbs, dcs = (), (), (), ()
                for k in tl.static_range(T - 1, -1, -1):
                    dt_E, u_E, dy_E = dts[k].to(tl.float32), us[k].to(tl.float32), dys[k].to(tl.float32)
                    b_N, c_N = tl.load(b + at_N + k * N), tl.load(c + at_N + k * N)
                    g_EN = dy_E[:, None] * c_N[None, :] + w_EN  # the gradient of the state after this token
                    w_EN = decays[k] * g_EN
                    v_EN = w_EN * hs[k]  # of dt a
                    dx_E = tl.sum(g_EN * b_N[None, :], 1)
                    da_EN += v_EN * dt_E[:, None]
                    ddts = (tl.sum(v_EN * a2_EN, 1) * 0.6931471805599453 + u_E * dx_E,) + ddts
                    du_E = dt_E * dx_E
                    if SKIP:
                        du_E += through * dy_E
                        dskip_E += u_E * dy_E
                    dus = (du_E,) + dus
                    dbs = (tl.sum(g_EN * (dt_E * u_E)[:, None], 0),) + dbs
                    dcs = (tl.sum(hs[k + 1] * dy_E[:, None], 0),) + dcs
                for k in tl.static_range(T):  # all loads stand before the stores, which they could not pass
                    put_row(du + at + k * E, dus[k], e, k < left, E, BE)
                    put_row(ddt + at + k * E, ddts[k], e, k < left, E, BE)
                    add_row(db + at_sum + k * N, dbs[k], more)
                    add_row(dc + at_sum + k * N, dcs[k], more)
        put_tile(da + (row * G + g).to(tl.int64) * (E * N), da_EN, e, n, E, N)
        if SKIP:
            tl.store(dskip + (row * G + g).to(tl.int64) * E + e, dskip_E, mask=e < E)
        tl.debug_barrier()  # the next tile reads the sums that other threads of this warp wrote
