"""Chunks with a decay per token and key channel: pairs of tokens meet in blocks that halve.

The decay from s to r is exp(G_r - G_s), G the running sum of the log decay: as a product exp(G_r) exp(-G_s) it
overflows, as a difference it needs C x C x K numbers. Here s and r meet at a token between them. A block of 2h
tokens is two halves: r in the right one has decayed since its middle, s in the left one decays until the middle, and
both exponents are sums of what is at most 0. Log2(C) levels, h = 1, 2, ..., C / 2, cover all pairs s < r.

n chunks, R rows, G heads (J = 1), C chunk length, K key width, V value width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .head_decay import from_end


def halves(x: Tensor, h: int) -> tuple[Tensor, Tensor]:
    """(..., C, K) to its left and right halves, (..., C / 2h, h, K) each."""
    left, right = x.unflatten(-2, (-1, 2, h)).unbind(-3)
    return left, right


def corner(a: Tensor, h: int) -> Tensor:
    """Of (..., C, C), the entries with a row in a right half and a column in its left one, (..., C / 2h, h, h)."""
    blocks = a.unflatten(-1, (-1, 2, h)).select(-2, 0).unflatten(-3, (-1, 2, h)).select(-4, 1)
    return blocks.diagonal(dim1=-4, dim2=-2).movedim(-1, -3)


class ChannelDecay:
    """q, k: (n, R, G, C, K). v: (n, R, G, 1, C, V). g: (n, R, C, G, K), the log decay.

    total: (n, R, G, K, 1, 1), the decay over a chunk.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> None:
        self.q, self.k, self.v = q, k, v.squeeze(3)
        since = g.transpose(2, 3).contiguous()  # the log decay since the block's start, token included
        until = torch.zeros_like(since)  # and until its end, token excluded
        self.a = q.new_zeros(*q.shape[:4], q.shape[3])
        self.a.diagonal(dim1=-2, dim2=-1).copy_((q * k).sum(-1))
        self.levels: list[tuple[int, Tensor, Tensor, Tensor, Tensor]] = []
        h = 1
        while h < q.shape[3]:
            (since_left, since_right), (until_left, _) = halves(since, h), halves(until, h)
            fq, fk = since_right.exp(), until_left.exp()
            qr, kl = halves(q, h)[1] * fq, halves(k, h)[0] * fk
            corner(self.a, h).copy_(qr @ kl.mT)
            self.levels.append((h, fq, fk, qr, kl))
            until_left += since_right[..., -1:, :]
            since_right += since_left[..., -1:, :]
            h *= 2
        self.since, self.until = since.exp_(), until.exp_()
        self.total = self.since[..., -1, :, None, None]

    def update(self) -> Tensor:
        """(n, R, G, K, 1, V): what each chunk adds to the state at its end."""
        return ((self.k * self.until).mT @ self.v).unsqueeze(4)

    def output(self, states: Tensor) -> Tensor:
        """o from the state before each chunk."""
        return (self.a @ self.v + (self.q * self.since) @ states.squeeze(4)).unsqueeze(3)

    def adjoint(self, do: Tensor) -> Tensor:
        """(n, R, G, K, 1, V): what each chunk's outputs add to the gradient of the state before it."""
        return ((self.q * self.since).mT @ do.squeeze(3)).unsqueeze(4)

    def gradients(
        self, do: Tensor, states: Tensor, dstates: Tensor, decays: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of q, k, v and, if `decays`, of g; from the states before and their gradients after each chunk."""
        q, k, v = self.q, self.k, self.v
        do, s, ds = do.squeeze(3), states.squeeze(4), dstates.squeeze(4)
        dv = self.a.mT @ do + (k * self.until) @ ds
        da = do @ v.mT
        dq, dk = torch.zeros_like(q), torch.zeros_like(k)
        for h, fq, fk, qr, kl in self.levels:
            block = corner(da, h).contiguous()
            halves(dq, h)[1].addcmul_(block @ kl, fq)
            halves(dk, h)[0].addcmul_(block.mT @ qr, fk)
        # As in HeadDecay: what meets r >= t, what comes from s < t, and the two states; no token decays itself.
        later = q * dq - k * dk
        dq_state, dk_state = (do @ s.mT).mul_(self.since), (v @ ds.mT).mul_(self.until)
        own = da.diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
        dq.add_(dq_state).addcmul_(own, k)
        dk.add_(dk_state).addcmul_(own, q)
        if not decays:
            return dq, dk, dv.unsqueeze(3), None
        earlier = k * dk_state
        dg = from_end(later.addcmul_(q, dq_state)) + earlier.cumsum(-2) - earlier
        dg += (self.since[..., -1, :] * (s * ds).sum(-1)).unsqueeze(-2)
        return dq, dk, dv.unsqueeze(3), dg.transpose(2, 3)
