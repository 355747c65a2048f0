"""The Triton kernels of decayed linear attention: one walk along chunks serves outputs and all gradients.

Of rows x, y (width M) and z (width N), with c(s, r) the decay between the tokens s and r, the walk computes

    out_r = sum_{s <= r} c(s, r) (x_r . y_s) z_s + c(0, r) x_r S        S <- c(0, C) S + sum_s c(s, C) y_s z_s^T

chunk by chunk, the state S (M x N) in registers. With (x, y, z) = (q, k, v) out is o; with (do, v, k) it is dq; and
walking backwards in time, s >= r, (k, q, do) gives dv and (v, do, q) gives dk. What lies before a segment of chunks
comes from `fold`, the sum over a segment, and `scan`, the sum over segments, so that long rows fill a GPU too.

M and N are masked to powers of two BM and NB x BN; C chunk length. A segment is a run of chunks of one sequence.
DECAY: 0 none, 1 one constant per head, 2 per token and head, 3 per token and column of x and y, 4 per token and
column of z and out.
"""

from __future__ import annotations

import triton
import triton.language as tl

# As in the PyTorch form: a decay below exp(-100) = 4e-44 counts as that.
LOWEST = tl.constexpr(-100.0)


@triton.jit
def segment_bounds(table, seg, length, size, segments, PACKED: tl.constexpr):
    """Sequence, batch row, first and last position + 1, and whether the segment is its sequence's first or last."""
    if PACKED:
        at = table + seg * 5
        row = tl.load(at).to(tl.int64)
        return row, row * 0, tl.load(at + 1), tl.load(at + 2), tl.load(at + 3) != 0, tl.load(at + 4) != 0
    else:
        row = (seg // segments).to(tl.int64)
        number = seg % segments
        start = number * size
        return row, row, start, tl.minimum(start + size, length), number == 0, number == segments - 1


@triton.jit
def head_decays(g, stride, t0, stop, CONSTANT: tl.constexpr, REVERSE: tl.constexpr, C: tl.constexpr):
    """Decay from the chunk's start to each token, from each token to its end, between pairs (r, s), and over it.

    Of pairs only those with s <= r, or s >= r if REVERSE, are right.
    """
    i = tl.arange(0, C)
    if CONSTANT:
        a = tl.maximum(tl.load(g).to(tl.float32), LOWEST)
        number = tl.minimum(stop - t0, C)
        gap = i[None, :] - i[:, None] if REVERSE else i[:, None] - i[None, :]
        since = tl.exp(a * (i + 1))
        until = tl.exp(a * tl.maximum(number - 1 - i, 0))
        return since, until, tl.exp(a * tl.maximum(gap, 0)), tl.exp(a * number)
    else:
        at = g + (t0 + i).to(tl.int64) * stride
        a = tl.maximum(tl.load(at, mask=t0 + i < stop, other=0.0).to(tl.float32), LOWEST)
        later = tl.load(at + stride, mask=(i + 1 < C) & (t0 + i + 1 < stop), other=0.0).to(tl.float32)
        since = tl.exp(tl.cumsum(a, 0))
        until = tl.exp(tl.cumsum(tl.maximum(later, LOWEST), 0, reverse=True))
        # Neighbours late in a chunk are a small difference of large sums, so these are kept in two floats.
        p = tl.cumsum(a.to(tl.float64), 0)
        high = p.to(tl.float32)
        low = (p - high.to(tl.float64)).to(tl.float32)
        gap = (high[:, None] - high[None, :]) + (low[:, None] - low[None, :])
        if REVERSE:
            gap = -gap
        return since, until, tl.exp(tl.minimum(gap, 0.0)), tl.exp(tl.sum(a, 0))


@triton.jit
def channel_decays(g, stride, t0, stop, columns, mask, C: tl.constexpr):
    """The log decay of each token of the chunk and of the next one, (C, W): nothing after the last one."""
    i = tl.arange(0, C)
    at = g + (t0 + i).to(tl.int64)[:, None] * stride + columns[None, :]
    a = tl.load(at, mask=(t0 + i < stop)[:, None] & mask[None, :], other=0.0).to(tl.float32)
    valid = (i + 1 < C) & (t0 + i + 1 < stop)
    later = tl.load(at + stride, mask=valid[:, None] & mask[None, :], other=0.0).to(tl.float32)
    return tl.maximum(a, LOWEST), tl.maximum(later, LOWEST)


@triton.jit
def halves(a, later, H: tl.constexpr, C: tl.constexpr, W: tl.constexpr):
    """Blocks of 2H tokens: decay since the middle (0 in left halves) and until the middle (0 in right halves)."""
    i = tl.arange(0, C)
    right = ((i // H) % 2 == 1)[:, None]
    since = tl.reshape(tl.cumsum(tl.reshape(a, [C // H, H, W]), 1), [C, W])
    inside = tl.where(((i + 1) % H != 0)[:, None], later, 0.0)
    until = tl.reshape(tl.cumsum(tl.reshape(inside, [C // H, H, W]), 1, reverse=True), [C, W])
    return tl.where(right, tl.exp(since), 0.0), tl.where(right, 0.0, tl.exp(until))


@triton.jit
def same_block(H: tl.constexpr, C: tl.constexpr):
    """Whether two tokens share a block of 2H: (C, C)."""
    block = tl.arange(0, C) // (2 * H)
    return block[:, None] == block[None, :]


@triton.jit
def fold(
    y, z, g, extra, sums, vectors, totals, table,
    y_batch, y_row, y_head, z_batch, z_row, z_head, g_batch, g_row, g_head, e_batch, e_row, e_head,
    length, size, segments, heads, share,
    M: tl.constexpr, N: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, NB: tl.constexpr, C: tl.constexpr,
    OP: tl.constexpr, PRECISION: tl.constexpr, DECAY: tl.constexpr, VECTOR: tl.constexpr,
    REVERSE: tl.constexpr, ALL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """sums (segments, H, M, N): sum_s c(s, end) y_s z_s^T over a segment, or c(start, s) if REVERSE.

    vectors (segments, H, M): the sum of y_s (VECTOR 1) or of extra_s y_s (2). totals (segments, H or H x M): the
    decay over the segment. Without ALL the last segment of a sequence, whose sum nobody needs, is left out.
    """
    pid = tl.program_id(0)
    nb = pid % NB
    head = (pid // NB) % heads
    seg = pid // (NB * heads)
    _row, batch, start, stop, first, last = segment_bounds(table, seg, length, size, segments, PACKED)
    if not ALL:  # noqa: SIM102 - one is known to the compiler, one is not
        if first if REVERSE else last:
            return
    i, m, n = tl.arange(0, C), tl.arange(0, BM), nb * BN + tl.arange(0, BN)
    y += batch * y_batch + (head // share).to(tl.int64) * y_head
    z += batch * z_batch + head.to(tl.int64) * z_head
    g += batch * g_batch + head.to(tl.int64) * g_head
    extra += batch * e_batch + head.to(tl.int64) * e_head
    s = tl.zeros([BM, BN], dtype=tl.float32)
    e = tl.zeros([BM], dtype=tl.float32)
    over = tl.full([BM], 1.0, dtype=tl.float32)
    count = tl.cdiv(stop - start, C)
    for step in range(count):
        t0 = start + ((count - 1 - step) if REVERSE else step) * C
        valid = t0 + i < stop
        at = t0.to(tl.int64)
        ys = tl.load(
            y + at * y_row + i[:, None] * y_row + m[None, :], mask=valid[:, None] & (m < M)[None, :], other=0.0
        )
        zs = tl.load(
            z + at * z_row + i[:, None] * z_row + n[None, :], mask=valid[:, None] & (n < N)[None, :], other=0.0
        )
        if VECTOR == 1:
            e += tl.sum(ys.to(tl.float32), 0)
        if VECTOR == 2:
            weight = tl.load(extra + (at + i) * e_row, mask=valid, other=0.0)
            e += tl.sum(ys.to(tl.float32) * weight[:, None], 0)
        if DECAY == 1 or DECAY == 2:
            since, until, _between, total = head_decays(g, g_row, t0, stop, DECAY == 1, REVERSE, C)
            zs = zs.to(tl.float32) * (since if REVERSE else until)[:, None]
            s *= total
            over *= total
        if DECAY == 3:
            a, later = channel_decays(g, g_row, t0, stop, m, m < M, C)
            total = tl.exp(tl.sum(a, 0))
            if REVERSE:
                ys = ys.to(tl.float32) * tl.exp(tl.cumsum(a, 0))
            else:
                ys = ys.to(tl.float32) * tl.exp(tl.cumsum(later, 0, reverse=True))
            s *= total[:, None]
            over *= total
        s = tl.dot(tl.trans(ys.to(OP)), zs.to(OP), s, input_precision=PRECISION)
    to = seg.to(tl.int64) * heads + head
    inside = (m < M)[:, None] & (n < N)[None, :]
    tl.store(sums + to * (M * N) + m[:, None] * N + n[None, :], s, mask=inside)
    if VECTOR:
        tl.store(vectors + to * M + m, e, mask=(m < M) & (nb == 0))
    if DECAY == 1 or DECAY == 2:
        tl.store(totals + to + m, over, mask=(m < 1) & (nb == 0))
    if DECAY == 3:
        tl.store(totals + to * M + m, over, mask=(m < M) & (nb == 0))


@triton.jit
def scan(
    sums, totals, initial, final, firsts, i_row, i_head, i_m, i_n, segments, heads,
    M: tl.constexpr, N: tl.constexpr, BLOCK: tl.constexpr, DECAY: tl.constexpr, REVERSE: tl.constexpr,
    INITIAL: tl.constexpr, FINAL: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """In place: the sum over a segment becomes the state before it (after it, if REVERSE); final: after all."""
    pid = tl.program_id(0)
    blocks: tl.constexpr = (M * N + BLOCK - 1) // BLOCK
    at = (pid % blocks) * BLOCK + tl.arange(0, BLOCK)
    head = ((pid // blocks) % heads).to(tl.int64)
    row = (pid // (blocks * heads)).to(tl.int64)
    inside = at < M * N
    if PACKED:
        first = tl.load(firsts + row).to(tl.int64)
        count = tl.load(firsts + row + 1) - tl.load(firsts + row)
    else:
        first = row * segments
        count = segments
    p = tl.zeros([BLOCK], dtype=tl.float32)
    if INITIAL:
        p += tl.load(
            initial + row * i_row + head * i_head + (at // N) * i_m + (at % N) * i_n, mask=inside, other=0.0
        ).to(tl.float32)
    for step in range(count):
        to = (first + ((count - 1 - step) if REVERSE else step)) * heads + head
        folded = inside & (FINAL or step + 1 < count)
        u = tl.load(sums + to * (M * N) + at, mask=folded, other=0.0)
        tl.store(sums + to * (M * N) + at, p, mask=inside)
        if DECAY == 0:
            p += u
        elif DECAY == 3:
            p = p * tl.load(totals + to * M + at // N, mask=folded, other=0.0) + u
        else:
            p = p * tl.load(totals + to + at * 0, mask=folded, other=0.0) + u
    if FINAL:
        tl.store(final + (row * heads + head) * (M * N) + at, p, mask=inside)
