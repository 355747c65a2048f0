"""Chunks with a decay per token and key channel: pairs of tokens meet in blocks that halve.

The decay from s to r is exp(G_r - G_s), G the running sum of the log decay: as a product exp(G_r) exp(-G_s) it
overflows, as a difference it needs C x C x K numbers. Here s and r meet at a token between them. A block of 2h
tokens is two halves: r in the right one has decayed since its middle, s in the left one decays until the middle.
Log2(C) levels, h = 1, 2, ..., C / 2, cover all pairs s < r; from level to level the decays of the halves multiply.

n chunks, R rows, G heads (J = 1), C chunk length, a power of two, K key width, V value width.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .tiles import Shape, corner, flat, halves, power_of_two


class Level(NamedTuple):
    """Blocks of 2h tokens: their halves q, since (right) and k, until (left), (n, R, G, C / 2h, h, K), views.

    ends: the decays over the left and the right half. fq, fk: the decays as they were here. qf = q fq, kf = k fk.
    block: q k^T of the halves, buffer; a: where it goes.
    """

    h: int
    q: Tensor
    k: Tensor
    since: Tensor
    until: Tensor
    ends: tuple[Tensor, Tensor]
    fq: Tensor
    fk: Tensor
    qf: Tensor
    kf: Tensor
    block: Tensor
    a: Tensor


def small_product(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a b for batches (X, h, h) and (X, h, K); matrix products of few rows are slower than sums of h terms."""
    if a.shape[1] > 2:
        torch.bmm(a, b, out=out)
        return
    torch.mul(a[:, :, :1], b[:, :1], out=out)
    for i in range(1, a.shape[2]):
        out.addcmul_(a[:, :, i : i + 1], b[:, i : i + 1])


class ChannelDecay:
    """The buffers of one shape of span. `states`: the state counts. `constant` does not matter.

    Chunks are padded to a power of two, with tokens of no key and no decay. q, k: (n, R, G, C, K). v, o, do:
    (n, R, G, C, V). s, ds: (n + 1, R, G, K, V), the states before each chunk and after the last, and their gradients.
    """

    def __init__(self, like: Tensor, shape: Shape, *, constant: bool, states: bool, gradients: bool) -> None:
        self.shape, self.like, self.carries, self.chunk = shape, like, states, power_of_two(shape.length)
        n, rows, groups, _, length, key, value = shape
        lead, at = (n, rows, groups), slice(0, length)
        self.q, self.k, self.v = self.padded(*lead, key), self.padded(*lead, key), self.padded(*lead, value)
        self.o, self.a = self.new(*lead, self.chunk, value), self.new(*lead, self.chunk, self.chunk)
        self.q3, self.k3, self.v3, self.o3, self.a3 = (flat(t) for t in (self.q, self.k, self.v, self.o, self.a))
        self.inputs = [self.q[..., at, :], self.k[..., at, :], self.v[..., at, :].unsqueeze(3)]
        self.o_out = self.o[..., at, :].unsqueeze(3)
        if states:
            self.u, self.s = self.new(*lead, key, value), self.new(n + 1, rows, groups, key, value)
            self.u3, self.s3 = flat(self.u), flat(self.s[:-1])
        if gradients:
            self.do = self.padded(*lead, value)
            self.do3 = flat(self.do)
            self.inputs.append(self.do[..., at, :].unsqueeze(3))
            self.dq, self.dk = self.new(*self.q.shape), self.new(*self.q.shape)
            self.dq_out, self.dk_out = self.dq[..., at, :], self.dk[..., at, :]
        if gradients and states:
            self.ds = self.new(*self.s.shape)
            self.ds3 = flat(self.ds[1:])
        self.since, self.until = (self.new(n, rows, groups, self.chunk, key) for _ in range(2))
        self.end = self.new(n, rows, groups, key)  # the decay over the chunk
        self.qs, self.ku = (self.new(n, rows, groups, self.chunk, key) for _ in range(2))
        self.qs3, self.ku3 = flat(self.qs), flat(self.ku)
        self.a.zero_()
        self.diagonal = self.a.diagonal(dim1=-2, dim2=-1)
        shared = [self.new(self.q.numel() // 2) for _ in range(4)]
        self.levels: list[Level] = []
        if gradients:
            self.da = self.new(n, rows, groups, self.chunk, self.chunk)
            self.da3 = flat(self.da)
            self.own = self.da.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
            self.later, self.step = self.new(*self.q.shape), self.new(*self.q.shape)
            self.later3, self.step3 = flat(self.later), flat(self.step)
            ones = self.like.new_ones(self.chunk, self.chunk)
            self.until_now, self.before = ones.triu(), ones.tril(-1)
        for h in (1 << i for i in range(self.chunk.bit_length() - 1)):
            q, k, since, until = (halves(t, h) for t in (self.q, self.k, self.since, self.until))
            part = q[1].shape
            fq, fk, qf, kf = (self.new(*part) if gradients else t.view(part) for t in shared)
            kf = k[0] if h == 1 else kf
            block = self.new(*part[:-1], h)
            ends = since[0][..., -1:, :], since[1][..., -1:, :]
            self.levels.append(Level(h, q[1], k[0], since[1], until[0], ends, fq, fk, qf, kf, block, corner(self.a, h)))

    def new(self, *shape: int) -> Tensor:
        return self.like.new_empty(shape)

    def padded(self, number: int, rows: int, groups: int, width: int) -> Tensor:
        """A buffer with zeros beyond the length of the chunk: nobody writes there."""
        buffer = self.new(number, rows, groups, self.chunk, width)
        buffer[..., self.shape.length :, :].zero_()
        return buffer

    def load(self, *tensors: Tensor) -> None:
        for buffer, tensor in zip(self.inputs, tensors, strict=True):
            buffer.copy_(tensor)

    def prepare(self, g: Tensor, scale: float, *, keep: bool) -> None:
        """The weights a: scale q k^T with the decays between; since and until then span the chunk.

        g: the log decay, (n, R, G, C, K). keep: each level keeps its decays, for the gradients.
        """
        body = self.since[..., : self.shape.length, :]
        body.copy_(g)
        if self.carries:
            # Products of exp(g) round once per token, alike where tokens decay alike: over many chunks that would show.
            torch.sum(body, -2, out=self.end).exp_()
        body.exp_()
        self.since[..., self.shape.length :, :].fill_(1)
        self.until.fill_(1)
        torch.mul(self.q, self.k, out=self.qs)
        self.diagonal.copy_(self.qs.sum(-1))
        for level in self.levels:
            torch.mul(level.q, level.since, out=level.qf)
            if level.h > 1:  # the token before the middle has not decayed: kf is k
                torch.mul(level.k, level.until, out=level.kf)
            if keep:
                level.fq.copy_(level.since)
                level.fk.copy_(level.until)
            torch.bmm(flat(level.qf), flat(level.kf).transpose(1, 2), out=flat(level.block))
            level.a.copy_(level.block)
            if 2 * level.h == self.chunk and not self.carries:
                break
            end_left, end_right = level.ends
            level.until.mul_(end_right)
            level.since.mul_(end_left)
        if scale != 1:
            self.a.mul_(scale)

    def states(self, first: Tensor) -> None:
        torch.mul(self.k, self.until, out=self.ku)
        torch.bmm(self.ku3.transpose(1, 2), self.v3, out=self.u3)
        self.s[0].copy_(first.squeeze(3))
        for i, end in enumerate(self.end.unsqueeze(-1).unbind(0)):
            torch.addcmul(self.u[i], end, self.s[i], out=self.s[i + 1])

    def forward(self, g: Tensor, scale: float, state: Tensor, to: Tensor) -> None:
        """o into `to`, (n, R, G, 1, C, V); the state (R, G, K, 1, V) moves on from before the span to after it."""
        self.prepare(g, scale, keep=False)
        torch.bmm(self.a3, self.v3, out=self.o3)
        if self.carries:
            self.states(state)
            state.copy_(self.s[-1].unsqueeze(3))
            torch.mul(self.q, self.since, out=self.qs)
            self.o3.baddbmm_(self.qs3, self.s3, alpha=scale)
        to.copy_(self.o_out)

    def backward(
        self, g: Tensor, scale: float, first: Tensor, ds: Tensor, to: tuple[Tensor, Tensor, Tensor], decays: bool
    ) -> Tensor | None:
        """As in HeadDecay; the log decay's gradient is (n, R, G, C, K)."""
        dq, dk, dv = to
        self.prepare(g, scale, keep=True)
        torch.bmm(self.a3.transpose(1, 2), self.do3, out=self.o3)
        torch.baddbmm(self.da3, self.do3, self.v3.transpose(1, 2), beta=0, alpha=scale, out=self.da3)
        self.dq.zero_()
        self.dk.zero_()
        for level in self.levels:
            level.block.copy_(corner(self.da, level.h))
            block = flat(level.block)
            for dx, x, f, matrix in (
                (halves(self.dq, level.h)[1], level.kf, level.fq, block),
                (halves(self.dk, level.h)[0], level.qf, level.fk, block.transpose(1, 2)),
            ):
                part = self.step3.flatten()[: x.numel()].view(x.shape)
                small_product(flat(part), matrix, flat(x))
                dx.addcmul_(part, f)
        if decays:  # what meets r >= t, less what comes from s >= t; no token decays itself
            torch.mul(self.q, self.dq, out=self.later).addcmul_(self.k, self.dk, value=-1)
        self.dq.addcmul_(self.own, self.k)
        self.dk.addcmul_(self.own, self.q)
        dg = None
        if decays:
            dg = torch.bmm(self.until_now.expand_as(self.a3), self.later3)
        if self.carries:
            self.states(first)
            torch.mul(self.q, self.since, out=self.qs)
            torch.baddbmm(self.u3, self.qs3.transpose(1, 2), self.do3, beta=0, alpha=scale, out=self.u3)
            self.ds[-1].copy_(ds.squeeze(3))
            for i in reversed(range(self.shape.number)):
                torch.addcmul(self.u[i], self.end[i].unsqueeze(-1), self.ds[i + 1], out=self.ds[i])
            ds.copy_(self.ds[0].unsqueeze(3))
            torch.baddbmm(self.step3, self.do3, self.s3.transpose(1, 2), beta=0, alpha=scale, out=self.step3)
            self.dq.addcmul_(self.step, self.since)
            self.o3.baddbmm_(self.ku3, self.ds3)
            if dg is not None:  # the state before the chunk and the tokens from t on
                torch.mul(self.step, self.qs, out=self.later)
                dg.baddbmm_(self.until_now.expand_as(self.a3), self.later3)
            torch.bmm(self.v3, self.ds3.transpose(1, 2), out=self.step3)
            self.dk.addcmul_(self.step, self.until)
            if dg is not None:  # the tokens before t and the state after the chunk, and both states
                torch.mul(self.step, self.ku, out=self.later)
                dg.baddbmm_(self.before.expand_as(self.a3), self.later3)
                both = (self.s[:-1] * self.ds[1:]).sum(-1) * self.end
                dg += both.flatten(0, 2).unsqueeze(1)
        dq.copy_(self.dq_out)
        dk.copy_(self.dk_out)
        dv.copy_(self.o_out)
        return None if dg is None else dg.view(self.q.shape)[..., : self.shape.length, :]
