"""Chunks with one decay per token and head: the decay between two tokens is a C x C matrix beside Q K^T.

The matrix comes from blocks that double. In a block of 2h tokens, one in the right half has decayed since the middle
and one in the left half decays until it, and the two numbers multiply. Every factor is at most 1: nothing overflows,
and no small exponent is the difference of two large ones. The decays of a span are made together; then its chunks
follow one after another.

n chunks, R rows, G groups of J heads that share q and k, C chunk length, K key width, V value width. A state is
(R, G, K, J, V), so that one product per group serves all its heads.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import Shape, corner, flat, from_end, halves, power_of_two, swap


class _Chunk(NamedTuple):
    """One chunk of the buffers, as batches of matrices. vj, doj: (R, G, C, J, V)."""

    q: Tensor
    k: Tensor
    kt: Tensor
    v: Tensor
    vj: Tensor
    between: Tensor
    since: Tensor
    until: Tensor
    total: Tensor


class HeadDecay:
    """The buffers of one shape of span. `constant`: all spans decay as the first. `states`: the state counts.

    between: (n or 1, R or 1, G, J, C, C), the decay from column to row. since, until: (n or 1, R or 1, G, C, J, 1),
    from the chunk's start, token included, and to its end, token excluded.
    """

    def __init__(self, like: Tensor, shape: Shape, *, constant: bool, states: bool, gradients: bool) -> None:
        self.shape, self.like, self.constant, self.carries = shape, like, constant, states
        n, rows, groups, share, length, key, value = shape
        q, k, v = self.layout(groups, key), self.layout(groups, key), self.layout(groups * share, value)
        v = v.unflatten(2, (groups, share))
        self.inputs = [q, k, v]
        self.make_decays(constant)
        self.chunks = []
        for i in range(n):
            d = 0 if constant else i
            decays = self.between[d], self.since[d], self.until[d], self.since[d][:, :, -1:]
            q3, k3, v3 = (flat(t[i]) for t in (q, k, v))
            self.chunks.append(_Chunk(q3, k3, k3.transpose(1, 2), v3, swap(v[i]), *decays))
        self.a = like.new_empty(rows, groups, 1, length, length)
        # With one head per group its weights may overwrite the products of the group.
        alike = share == 1 and not gradients
        self.w = self.a if alike else like.new_empty(rows, groups, share, length, length)
        self.o = like.new_empty(rows, groups, share, length, value)
        self.a3, self.w3, self.o3 = (flat(t) for t in (self.a, self.w, self.o))
        self.oj = swap(self.o)
        joint = rows, groups, length, share, value
        if states:
            self.x, self.vd = like.new_empty(joint), like.new_empty(joint)
            self.x3, self.vd3 = (t.view(rows * groups, length, share * value) for t in (self.x, self.vd))
        if gradients:
            self.make_gradients(joint)

    def layout(self, heads: int, width: int) -> Tensor:
        """A buffer (n, R, heads, C, width). One row is laid out as it comes in, which is the fastest to read."""
        n, rows, length = self.shape.number, self.shape.rows, self.shape.length
        if rows == 1:
            return self.like.new_empty(rows, n, length, heads, width).permute(1, 0, 3, 2, 4)
        return self.like.new_empty(n, rows, heads, length, width)

    def make_decays(self, constant: bool) -> None:
        n, rows, groups, share, length = self.shape[:5]
        lead = (1, 1) if constant else (n, rows)
        self.wide, self.ready = power_of_two(length), False
        # In float64: rounding exp(g) would count once per token, and alike where tokens decay alike.
        wide = (*lead, groups, share, self.wide)
        self.from_start, self.to_end = (self.like.new_empty(wide, dtype=torch.float64) for _ in "su")
        m = self.like.new_zeros(*lead, groups, share, self.wide, self.wide)
        m.diagonal(dim1=-2, dim2=-1).fill_(1)
        self.levels = []
        for h in (1 << i for i in range(self.wide.bit_length() - 1)):
            (left, right), (until_left, _) = (halves(t, h, -1) for t in (self.from_start, self.to_end))
            column = self.like.new_empty(*right.shape, 1)
            row = self.like.new_empty(*until_left.shape[:-1], 1, h)
            self.levels.append((right, until_left, left[..., -1:], right[..., -1:], column, row, corner(m, h)))
        self.between = m[..., :length, :length]
        self.since, self.until = (self.like.new_empty(*lead, groups, length, share, 1) for _ in "su")

    def make_gradients(self, joint: tuple[int, ...]) -> None:
        n, rows, groups, share, length, key, value = self.shape
        new = self.like.new_empty
        do = self.layout(groups * share, value).unflatten(2, (groups, share))
        self.inputs.append(do)
        self.do3, self.doj = [flat(t) for t in do.unbind(0)], [swap(t) for t in do.unbind(0)]
        self.dod = new(joint)
        self.dod3 = self.dod.view(rows * groups, length, share * value)
        self.da = new(rows, groups, share, length, length)
        self.da3 = flat(self.da)
        self.dqk = self.da if share == 1 else new(rows, groups, 1, length, length)
        self.dqk3 = flat(self.dqk)
        self.dq, self.dk = (new(rows, groups, length, key) for _ in "qk")
        self.dq3, self.dk3 = flat(self.dq), flat(self.dk)
        self.later, self.earlier = (new(n, rows, groups, length, share) for _ in "le")
        self.both = new(n, rows, groups, share)
        if self.carries:
            self.s = new(n, rows, groups, key, share, value)
            self.s3 = self.s.view(n, rows * groups, key, share * value).unbind(0)

    def load(self, *tensors: Tensor) -> None:
        for buffer, tensor in zip(self.inputs, tensors, strict=True):
            buffer.copy_(tensor)

    def decay(self, g: Tensor) -> None:
        """The decays of the span, from the log decay (n or 1, R or 1, H, C or 1, 1)."""
        if self.ready:
            return
        length = self.shape.length
        by_token = self.from_start.flatten(2, 3)
        by_token[..., :length].copy_(g.squeeze(-1))
        by_token[..., length:].zero_()
        by_token.exp_()
        self.to_end.fill_(1)
        for right, until_left, end_left, end_right, column, row, to in self.levels:
            column.squeeze(-1).copy_(right)
            row.squeeze(-2).copy_(until_left)
            torch.mul(column, row, out=to)
            until_left.mul_(end_right)
            right.mul_(end_left)
        for joined, by_head in ((self.since, self.from_start), (self.until, self.to_end)):
            joined.squeeze(-1).copy_(by_head[..., :length].transpose(-2, -1))
        self.ready = self.constant

    def weigh(self, chunk: _Chunk, scale: float) -> None:
        """w: scale q k^T times the decay between."""
        torch.baddbmm(self.a3, chunk.q, chunk.kt, beta=0, alpha=scale, out=self.a3)
        torch.mul(self.a, chunk.between, out=self.w)

    def add(self, x: Tensor, factor: Tensor, to: Tensor) -> None:
        """o + x factor into `to`, all (R, G, C, J, V)."""
        if to.dtype == x.dtype:
            torch.addcmul(self.oj, x, factor, out=to)
        else:
            to.copy_(x.mul_(factor).add_(self.oj))

    def forward(self, g: Tensor, scale: float, state: Tensor, to: Tensor) -> None:
        """o into `to`, (n, R, G, J, C, V); the state moves on from before the span to after it."""
        self.decay(g)
        if self.carries:
            s3 = state.flatten(3).flatten(0, 1)
        for chunk, out in zip(self.chunks, to.unbind(0), strict=True):
            self.weigh(chunk, scale)
            torch.bmm(self.w3, chunk.v, out=self.o3)
            if not self.carries:
                out.copy_(self.o)
                continue
            torch.baddbmm(self.x3, chunk.q, s3, beta=0, alpha=scale, out=self.x3)
            self.add(self.x, chunk.since, swap(out))
            torch.mul(chunk.vj, chunk.until, out=self.vd)
            state.mul_(chunk.total)
            s3.baddbmm_(chunk.kt, self.vd3)

    def states(self, first: Tensor) -> None:
        """s: the state before each chunk, from that before the span."""
        self.s[0].copy_(first)
        for i, chunk in enumerate(self.chunks[:-1]):
            torch.mul(chunk.vj, chunk.until, out=self.vd)
            torch.mul(self.s[i], chunk.total, out=self.s[i + 1])
            self.s3[i + 1].baddbmm_(chunk.kt, self.vd3)

    def backward(
        self, g: Tensor, scale: float, first: Tensor, ds: Tensor, to: tuple[Tensor, Tensor, Tensor], decays: bool
    ) -> Tensor | None:
        """The gradients of q, k and v into `to`; returns the log decay's, (n, R, H, C, 1), if `decays`.

        first: the state before the span. ds: the gradient of the state after it, which becomes that before it.
        """
        self.decay(g)
        if self.carries:
            self.states(first)
        for i in reversed(range(self.shape.number)):
            self.chunk_backward(i, scale, ds, decays)
            dq, dk, dv = (t[i] for t in to)
            dq.copy_(self.dq)
            dk.copy_(self.dk)
            if self.carries:
                self.add(self.x, self.chunks[i].until, swap(dv))
            else:
                dv.copy_(self.o)
        if not decays:
            return None
        dg = from_end(self.later, 3)
        if self.carries:  # the tokens before t and the state after the chunk, and the states on both sides of it
            dg += self.earlier.cumsum(3).sub_(self.earlier).add_(self.both.unsqueeze(3))
        return dg.transpose(3, 4).flatten(2, 3).unsqueeze(-1)

    def chunk_backward(self, i: int, scale: float, ds: Tensor, decays: bool) -> None:
        chunk = self.chunks[i]
        self.weigh(chunk, scale)
        torch.bmm(self.do3[i], chunk.v.transpose(1, 2), out=self.da3)
        self.da.mul_(chunk.between)
        torch.bmm(self.w3.transpose(1, 2), self.do3[i], out=self.o3)
        if self.shape.share > 1:
            torch.sum(self.da, 2, keepdim=True, out=self.dqk)
        torch.baddbmm(self.dq3, self.dqk3, chunk.k, beta=0, alpha=scale, out=self.dq3)
        torch.baddbmm(self.dk3, self.dqk3.transpose(1, 2), chunk.q, beta=0, alpha=scale, out=self.dk3)
        if decays:  # pairs r >= t > s of the chunk; a token does not decay itself: no diagonal
            w = self.da.mul_(self.a).tril_(-1)
            self.later[i].copy_(w.sum(-1).sub_(w.sum(-2)).transpose(-2, -1))
        if not self.carries:
            return
        s, s3, ds3 = self.s[i], self.s3[i], ds.flatten(3).flatten(0, 1)
        torch.mul(chunk.vj, chunk.until, out=self.vd)
        torch.mul(self.doj[i], chunk.since, out=self.dod)
        self.dq3.baddbmm_(self.dod3, s3.transpose(1, 2), alpha=scale)
        self.dk3.baddbmm_(self.vd3, ds3.transpose(1, 2))
        if decays:  # the state before the chunk and the tokens from t on
            torch.baddbmm(self.x3, chunk.q, s3, beta=0, alpha=scale, out=self.x3)
            self.later[i].add_(self.x.mul_(self.dod).sum(-1))
        torch.bmm(chunk.k, ds3, out=self.x3)
        if decays:
            torch.sum(self.vd.mul_(self.x), -1, out=self.earlier[i])
            torch.mul((s * ds).sum((2, 4)), chunk.total.flatten(2), out=self.both[i])
        ds.mul_(chunk.total)
        ds3.baddbmm_(chunk.q.transpose(1, 2), self.dod3, alpha=scale)
