"""Chunks with one decay per token and head: the decay between two tokens is a C x C matrix beside Q K^T.

n chunks, R rows, G groups of J heads, C chunk length, K key width, V value width. A state is (n, R, G, K, J, V), so
that one product per group serves all its heads.
"""

from __future__ import annotations

from torch import Tensor


def from_end(x: Tensor) -> Tensor:
    """Sums over positions t and later, along the second last axis."""
    return x.flip(-2).cumsum(-2).flip(-2)


class HeadDecay:
    """q, k: (n, R, G, C, K). v: (n, R, G, J, C, V). g: (n or 1, R or 1, C, H, 1), the log decay.

    total: (n or 1, R or 1, G, 1, J, 1), the decay over a chunk.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> None:
        self.q, self.k, self.v = q, k, v
        # In float64, because neighbours late in a chunk are the difference of two large sums.
        p = g.double().squeeze(4).cumsum(2).movedim(2, 3).unflatten(2, v.shape[2:4])
        self.since = p.to(q.dtype).exp().unsqueeze(-1)  # (n, R, G, J, C, 1): from the start, token included
        self.until = (p[..., -1:] - p).to(q.dtype).exp().unsqueeze(-1)  # to the end, token excluded
        self.between = (p.unsqueeze(-1) - p.unsqueeze(-2)).clamp_(max=0).to(q.dtype).exp_().tril_()
        self.total = self.since[..., -1:, :].movedim(3, 4)

    def joined(self, x: Tensor) -> Tensor:
        """(n, R, G, J, C, V) to (n, R, G, C, J V)."""
        return x.transpose(3, 4).flatten(4)

    def parted(self, x: Tensor) -> Tensor:
        """(n, R, G, C, J V) to (n, R, G, J, C, V)."""
        return x.unflatten(4, (self.v.shape[3], -1)).transpose(3, 4)

    def update(self) -> Tensor:
        """(n, R, G, K, J, V): what each chunk adds to the state at its end."""
        return (self.k.mT @ self.joined(self.v * self.until)).unflatten(4, (self.v.shape[3], -1))

    def output(self, states: Tensor) -> Tensor:
        """o from the state before each chunk."""
        o = ((self.q @ self.k.mT).unsqueeze(3) * self.between) @ self.v
        return o.addcmul_(self.parted(self.q @ states.flatten(4)), self.since)

    def adjoint(self, do: Tensor) -> Tensor:
        """(n, R, G, K, J, V): what each chunk's outputs add to the gradient of the state before it."""
        return (self.q.mT @ self.joined(do * self.since)).unflatten(4, (self.v.shape[3], -1))

    def gradients(
        self, do: Tensor, states: Tensor, dstates: Tensor, decays: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Of q, k, v and, if `decays`, of g; from the states before and their gradients after each chunk."""
        q, k, v = self.q, self.k, self.v
        s, ds = states.flatten(4), dstates.flatten(4)
        do_since = do * self.since
        a = (q @ k.mT).unsqueeze(3)
        da = (do @ v.mT).mul_(self.between)
        dqk = da.sum(3)
        dq = dqk @ k + self.joined(do_since) @ s.mT
        dk = dqk.mT @ q + self.joined(v * self.until) @ ds.mT
        across = self.parted(k @ ds) * self.until
        dv = (a * self.between).mT @ do + across
        if not decays:
            return dq, dk, dv, None
        # The log decay of t counts wherever t lies between: pairs r >= t > s of the chunk, the state before it and
        # r >= t, s < t and the state after it, and both states. A token does not decay itself: no diagonal.
        w = da.mul_(a).tril_(-1)
        later = w.sum(-1) - w.sum(-2) + (do_since * self.parted(q @ s)).sum(-1)
        earlier = (v * across).sum(-1)
        dg = from_end(later.unsqueeze(-1)).squeeze(-1) + earlier.cumsum(-1) - earlier
        dg += (self.total * states * dstates).sum((3, 5)).unsqueeze(-1)
        return dq, dk, dv, dg.flatten(2, 3).movedim(2, 3).unsqueeze(-1)
