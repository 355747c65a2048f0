"""The walk of fused_core.py, one program per segment, head and block of columns of z."""

from __future__ import annotations

import triton
import triton.language as tl

from .fused_core import channel_decays, halves, head_decays, same_block, segment_bounds


@triton.jit
def pairs(xs, ys, a, later, mask, LEVELS: tl.constexpr, C: tl.constexpr, BM: tl.constexpr,
          OP: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr):  # fmt: skip
    """DECAY 3: x_r . y_s with the decay of each column between s and r, (C, C), 0 where s comes after r."""
    i = tl.arange(0, C)
    own = tl.sum(xs.to(tl.float32) * ys.to(tl.float32), 1)
    out = tl.where(i[:, None] == i[None, :], own[:, None], 0.0)
    for level in tl.static_range(LEVELS):
        since, until = halves(a, later, 1 << level, C, BM)
        fx = xs * (until if REVERSE else since)
        fy = ys * (since if REVERSE else until)
        block = tl.dot(fx.to(OP), tl.trans(fy.to(OP)), input_precision=PRECISION)
        out += tl.where(same_block(1 << level, C), block, 0.0)
    return out


@triton.jit
def weighted(products, zs, a, later, LEVELS: tl.constexpr, C: tl.constexpr, BN: tl.constexpr,
             OP: tl.constexpr, PRECISION: tl.constexpr, REVERSE: tl.constexpr):  # fmt: skip
    """DECAY 4: sum_s a_rs z_s with the decay of each column between s and r, without s = r, (C, BN)."""
    i = tl.arange(0, C)
    out = tl.zeros([C, BN], dtype=tl.float32)
    for level in tl.static_range(LEVELS):
        since, until = halves(a, later, 1 << level, C, BN)
        right = (i // (1 << level)) % 2 == 1
        across = (right[:, None] != right[None, :]) & same_block(1 << level, C)
        towards = (i[:, None] < i[None, :]) if REVERSE else (i[:, None] > i[None, :])
        block = tl.where(across & towards, products, 0.0)
        fz = zs * (since if REVERSE else until)
        sums = tl.dot(block.to(OP), fz.to(OP), input_precision=PRECISION)
        out += sums * (until if REVERSE else since)
    return out


@triton.jit
def walk(
    x, y, z, w, out, g, extra, den, dg, between, state, vector, final, final_vector, following, following_last, table,
    x_batch, x_row, x_head, y_batch, y_row, y_head, z_batch, z_row, z_head, w_batch, w_row, w_head,
    o_batch, o_row, o_head, g_batch, g_row, g_head, e_batch, e_row, e_head, d_block, d_batch, d_row, d_head,
    s_row, s_head, s_m, s_n, v_row, v_head, f_row, f_head, f_m, f_n, fv_row, fv_head,
    n_row, n_head, n_m, n_n, l_row, l_head, l_m, l_n,
    length, size, segments, heads, share_xy, share_z, scale, eps,
    M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NB: tl.constexpr, C: tl.constexpr,
    LEVELS: tl.constexpr, OP: tl.constexpr, PRECISION: tl.constexpr, CAUSAL: tl.constexpr, REVERSE: tl.constexpr,
    DECAY: tl.constexpr, NORMALIZE: tl.constexpr, EXTRA: tl.constexpr, GRADIENT: tl.constexpr,
    SPLIT: tl.constexpr, INITIAL: tl.constexpr, FINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """out = scale (the sums at the top of fused_core.py); without CAUSAL only scale x_r S, S as it is.

    state: of each segment (SPLIT) or each sequence, where INITIAL. final: S after the last segment.
    NORMALIZE: out / den, den = scale (sum_{s <= r} x_r . y_s + x_r . vector) + eps, kept in den; vector: the sum of y.
    EXTRA: x and y have one more column, extra and 1 (1) or 1 and extra (2), S one more row, vector.
    GRADIENT: w is q in the walk for dq, k in that for dk, which comes second; both add their part of the gradient of
    the log decay to dg (README of gated_linear_attention), `between` (chunks, H, NB or N) carries the first's sums of
    q . dq that come from S to the second. following: S of the next segment, following_last: S after all.
    """
    pid = tl.program_id(0)
    nb = pid % NB
    head = (pid // NB) % heads
    seg = pid // (NB * heads)
    row, batch, start, stop, first, last = segment_bounds(table, seg, length, size, segments, PACKED)
    i, m, n = tl.arange(0, C), tl.arange(0, BM), nb * BN + tl.arange(0, BN)
    in_m, in_n = m < M, n < N
    wide = head.to(tl.int64)
    x += batch * x_batch + (head // share_xy).to(tl.int64) * x_head
    y += batch * y_batch + (head // share_xy).to(tl.int64) * y_head
    z += batch * z_batch + (head // share_z).to(tl.int64) * z_head
    w += batch * w_batch + (head // share_z).to(tl.int64) * w_head
    out += batch * o_batch + wide * o_head
    g += batch * g_batch + wide * g_head
    extra += batch * e_batch + wide * e_head
    den += batch * e_batch + wide * e_head
    dg += batch * d_batch + wide * d_head
    of_state = seg.to(tl.int64) if SPLIT else row
    s = tl.zeros([BM, BN], dtype=tl.float32)
    e = tl.zeros([BM if NORMALIZE else BN], dtype=tl.float32)
    if SPLIT or INITIAL:
        at_s = of_state * s_row + wide * s_head + m[:, None] * s_m + n[None, :] * s_n
        s += tl.load(state + at_s, mask=in_m[:, None] & in_n[None, :], other=0.0).to(tl.float32)
        if NORMALIZE:
            e += tl.load(vector + of_state * v_row + wide * v_head + m, mask=in_m, other=0.0).to(tl.float32)
        elif EXTRA:
            e += tl.load(vector + of_state * v_row + wide * v_head + n, mask=in_n, other=0.0).to(tl.float32)
    if GRADIENT and REVERSE:  # the product of S and its gradient at the end of the segment
        at_l = row * l_row + wide * l_head + m[:, None] * l_m + n[None, :] * l_n
        at_n = (seg + 1).to(tl.int64) * n_row + wide * n_head + m[:, None] * n_m + n[None, :] * n_n
        whole = in_m[:, None] & in_n[None, :]
        end = tl.load(following_last + at_l, mask=whole & last, other=0.0)
        if SPLIT:
            end += tl.load(following + at_n, mask=whole & (last == 0), other=0.0)
        if DECAY == 4:
            inner = tl.sum(s * end, 0)
        else:
            inner = tl.sum(s * end)
    count = tl.cdiv(stop - start, C)
    for step in range(count):
        c = (count - 1 - step) if REVERSE else step
        t0 = start + c * C
        valid = t0 + i < stop
        at = t0.to(tl.int64)
        here = valid[:, None] & in_n[None, :]
        xs = tl.load(x + at * x_row + i[:, None] * x_row + m[None, :], mask=valid[:, None] & in_m[None, :], other=0.0)
        o = tl.dot(xs.to(OP), s.to(OP), input_precision=PRECISION) if DECAY != 3 else tl.zeros([C, BN], tl.float32)
        if NORMALIZE:
            d = tl.sum(xs.to(tl.float32) * e[None, :], 1)
        if EXTRA == 1:
            xe = tl.load(extra + (at + i) * e_row, mask=valid, other=0.0)
            o += xe[:, None] * e[None, :]
        if EXTRA == 2:
            o += e[None, :]
        if CAUSAL:
            ys = tl.load(
                y + at * y_row + i[:, None] * y_row + m[None, :], mask=valid[:, None] & in_m[None, :], other=0.0
            )
            zs = tl.load(z + at * z_row + i[:, None] * z_row + n[None, :], mask=here, other=0.0)
            seen = (i[:, None] <= i[None, :]) if REVERSE else (i[:, None] >= i[None, :])
            if DECAY == 3:
                a, later = channel_decays(g, g_row, t0, stop, m, in_m, C)
                products = pairs(xs, ys, a, later, in_m, LEVELS, C, BM, OP, PRECISION, REVERSE)
                since = tl.exp(tl.cumsum(a, 0))
                until = tl.exp(tl.cumsum(later, 0, reverse=True))
                total = tl.exp(tl.sum(a, 0))
                lead = xs.to(tl.float32) * (until if REVERSE else since)
                trail = ys.to(tl.float32) * (since if REVERSE else until)
                o = tl.dot(lead.to(OP), s.to(OP), input_precision=PRECISION)
                o = tl.dot(products.to(OP), zs.to(OP), o, input_precision=PRECISION)
                s = tl.dot(tl.trans(trail.to(OP)), zs.to(OP), s * total[:, None], input_precision=PRECISION)
            else:
                products = tl.dot(xs.to(OP), tl.trans(ys.to(OP)), input_precision=PRECISION)
                trail = zs
                if EXTRA == 1:
                    products += xe[:, None]
                    e += tl.sum(zs.to(tl.float32), 0)
                if EXTRA == 2:
                    ye = tl.load(extra + (at + i) * e_row, mask=valid, other=0.0)
                    products += ye[None, :]
                    e += tl.sum(zs.to(tl.float32) * ye[:, None], 0)
                if DECAY == 1 or DECAY == 2:
                    since, until, decay, total = head_decays(g, g_row, t0, stop, DECAY == 1, REVERSE, C)
                    products *= decay
                    o *= (until if REVERSE else since)[:, None]
                    trail = zs.to(tl.float32) * (since if REVERSE else until)[:, None]
                    s *= total
                if DECAY == 4:
                    a, later = channel_decays(g, g_row, t0, stop, n, in_n, C)
                    since = tl.exp(tl.cumsum(a, 0))
                    until = tl.exp(tl.cumsum(later, 0, reverse=True))
                    total = tl.exp(tl.sum(a, 0))
                    o *= until if REVERSE else since
                    trail = zs.to(tl.float32) * (since if REVERSE else until)
                    s *= total[None, :]
                products = tl.where(seen, products, 0.0)
                if NORMALIZE:
                    d += tl.sum(products, 1)
                    e += tl.sum(ys.to(tl.float32), 0)
                if GRADIENT or DECAY == 4:  # the token itself, which does not decay, apart
                    itself = i[:, None] == i[None, :]
                    own = tl.sum(tl.where(itself, products, 0.0), 1)[:, None] * zs.to(tl.float32)
                    if DECAY == 4:
                        inside = weighted(products, zs, a, later, LEVELS, C, BN, OP, PRECISION, REVERSE)
                    else:
                        others = tl.where(itself, 0.0, products)
                        inside = tl.dot(others.to(OP), zs.to(OP), input_precision=PRECISION)
                    if GRADIENT:
                        ws = tl.load(w + at * w_row + i[:, None] * w_row + n[None, :], mask=here, other=0.0)
                        near, far = ws.to(tl.float32) * inside * scale, ws.to(tl.float32) * o * scale
                        at_b = ((seg * tl.cdiv(size, C) + c).to(tl.int64) * heads + head) * (N if DECAY == 4 else NB)
                        if DECAY == 4:
                            at_d, keep = (at + i)[:, None] * d_row + n[None, :], here
                            at_c, kept = between + at_b + n, in_n
                        else:  # one number per token: Triton 3.6 does not compile sums along a column of width 1
                            near, far = tl.sum(near, 1), tl.sum(far, 1)
                            at_d, keep = (at + i) * d_row + nb * d_block, valid
                            at_c, kept = between + at_b + nb, True
                        sums = tl.sum(far, 0)
                        if REVERSE:
                            # Below 1e-12 the product of the states is lost in the rounding of the difference.
                            beyond = tl.where(total < 1e-12, 0.0, inner - sums)
                            part = tl.cumsum(far, 0) - far - tl.cumsum(near, 0, reverse=True)
                            part += beyond[None, :] if DECAY == 4 else beyond
                            part += tl.load(dg + at_d, mask=keep, other=0.0)
                            tl.store(dg + at_d, part, mask=keep)
                            inner = beyond + tl.load(at_c, mask=kept, other=0.0)
                        else:
                            tl.store(dg + at_d, tl.cumsum(near + far, 0, reverse=True), mask=keep)
                            tl.store(at_c, sums, mask=kept)
                    o += inside + own
                else:
                    o = tl.dot(products.to(OP), zs.to(OP), o, input_precision=PRECISION)
                s = tl.dot(tl.trans(ys.to(OP)), trail.to(OP), s, input_precision=PRECISION)
        o *= scale
        if NORMALIZE:
            d = d * scale + eps
            o /= d[:, None]
            tl.store(den + (at + i) * e_row, d, mask=valid & (nb == 0))
        tl.store(out + at * o_row + i[:, None] * o_row + n[None, :], o.to(out.dtype.element_ty), mask=here)
    if FINAL:  # noqa: SIM102 - one is known to the compiler, one is not
        if first if REVERSE else last:
            at_f = row * f_row + wide * f_head + m[:, None] * f_m + n[None, :] * f_n
            tl.store(final + at_f, s, mask=in_m[:, None] & in_n[None, :])
            if NORMALIZE:
                tl.store(final_vector + row * fv_row + wide * fv_head + m, e, mask=in_m & (nb == 0))
            elif EXTRA:
                tl.store(final_vector + row * fv_row + wide * fv_head + n, e, mask=in_n)
