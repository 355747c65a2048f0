"""The selective scan chunk by chunk: the fast PyTorch form, and the backend for the CPU.

A chunk's decays and inputs, (T, B, N, E) with the channels innermost, are scanned in place by a tree of T - 1 pairs up
and as many down, each level one product over all of its pairs. Nothing is divided, so nothing overflows where decays
underflow. What grows with the length is one state per chunk, from which the backward pass computes the chunk's
states again (README.md).

B batch, L length, E channels, N state width, T tokens of a chunk, G chunks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

# Tokens per chunk by default: as many as keep a buffer of the chunk in the cache of a CPU core (of a GPU: busy). At
# least MIN_CHUNK, so that the saved states (L / chunk, N, E) are no larger than the inputs at the usual N = 16.
BUFFER = {"cpu": 1 << 18, "cuda": 1 << 24}
MIN_CHUNK, MAX_CHUNK = 16, 256


def default_chunk(batch: int, length: int, channels: int, states: int, device: str) -> int:
    """Tokens per chunk, a power of two unless the whole sequence is shorter."""
    chunk = MAX_CHUNK
    while chunk > MIN_CHUNK and chunk * batch * channels * states > BUFFER.get(device, BUFFER["cuda"]):
        chunk //= 2
    return max(1, min(chunk, length))


def scan_(a: Tensor, x: Tensor, *, reverse: bool = False) -> None:
    """x_t <- x_t + a_t x_{t-1} for t = 1, 2, ... in place (reverse: x_t + a_t x_{t+1}, from the end); a is used up.

    a, x: (T, ...). Each x_t is a sum over s <= t only, whatever the order of the sums.
    """
    length = x.shape[0]

    def every(first: int, step: int, number: int) -> slice:
        """`number` places from the first on, counted from the end if reverse."""
        last = first + (number - 1) * step
        return slice(length - 1 - last, length - first, step) if reverse else slice(first, last + 1, step)

    size = 1
    while 2 * size <= length:  # pairs of blocks of `size`: the end of the second gets what the first ends with
        number = length // (2 * size)
        ends, before = every(2 * size - 1, 2 * size, number), every(size - 1, 2 * size, number)
        x[ends].addcmul_(a[ends], x[before])
        a[ends].mul_(a[before])
        size *= 2
    while size >= 1:  # the ends of the blocks of 2 size are done: they complete the blocks of `size` between them
        number = (length - size) // (2 * size)
        if number > 0:
            ends, before = every(3 * size - 1, 2 * size, number), every(2 * size - 1, 2 * size, number)
            x[ends].addcmul_(a[ends], x[before])
        size //= 2


class _Chunk:
    """Buffers a, x (T, B, N, E) of a chunk, and its dt, u, b, c with time first, in the dtype of the state."""

    def __init__(self, like: Tensor, u: Tensor, dt: Tensor, a_NE: Tensor, b: Tensor, c: Tensor, chunk: int) -> None:
        self._sources = [t.transpose(0, 1) for t in (u, dt, b, c)]
        self._like, self._a_NE = like, a_NE
        shape = chunk, u.shape[0], *a_NE.shape
        self._a, self._x = like.new_empty(shape), like.new_empty(shape)

    def load(self, at: slice) -> None:
        """Fill the buffers with the decays exp(dt a) and the inputs dt u b of these tokens."""
        self.u, self.dt, self.b, self.c = (t[at].to(self._like.dtype) for t in self._sources)
        size = self.dt.shape[0]
        self.a, self.x, self.du = self._a[:size], self._x[:size], self.dt * self.u
        torch.mul(self.dt[:, :, None], self._a_NE, out=self.a).exp_()
        torch.mul(self.du[:, :, None], self.b[..., None], out=self.x)

    def states(self, before: Tensor) -> Tensor:
        """The states after each token, (T, B, N, E), given the one before the first; uses up a."""
        self.x[0].addcmul_(self.a[0], before)
        scan_(self.a, self.x)
        return self.x


def _chunks(length: int, chunk: int) -> list[slice]:
    return [slice(first, min(first + chunk, length)) for first in range(0, length, chunk)]


@torch.library.custom_op("seqzoo::selective_scan", mutates_args=())
def _forward(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, E), the states before each chunk (G, B, N, E) and after the last token (B, E, N)."""
    y = u.new_empty(u.shape, dtype=initial.dtype)
    parts = _chunks(u.shape[1], chunk)
    h_BNE = initial.transpose(1, 2).contiguous().clone()
    saved = h_BNE.new_empty(len(parts), *h_BNE.shape)
    with torch.autocast(u.device.type, enabled=False):
        tokens = _Chunk(h_BNE, u, dt, a.to(initial.dtype).t().contiguous(), b, c, chunk)
        for number, at in enumerate(parts):
            saved[number] = h_BNE
            tokens.load(at)
            h_TBNE = tokens.states(h_BNE)
            y[:, at] = _over_states(tokens.c, h_TBNE).transpose(0, 1)
            h_BNE.copy_(h_TBNE[-1])
    return y, saved, h_BNE.transpose(1, 2).contiguous()


def _over_states(c: Tensor, h: Tensor) -> Tensor:
    """sum_n c_n h_n: (T, B, N) and (T, B, N, E) give (T, B, E)."""
    return torch.bmm(c.flatten(0, 1).unsqueeze(1), h.flatten(0, 1)).view(*h.shape[:2], h.shape[3])


@torch.library.custom_op("seqzoo::selective_scan_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dlast: Tensor,
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    saved: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, a, b, c and the initial state: chunks from the last to the first."""
    du, ddt, db, dc = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (u, dt, b, c))
    a_NE = a.to(saved.dtype).t().contiguous()
    da_NE = torch.zeros_like(a_NE)
    dh_BNE = dlast.transpose(1, 2).contiguous().clone()  # the gradient of the state after the chunk
    parts = _chunks(u.shape[1], chunk)
    with torch.autocast(u.device.type, enabled=False):
        tokens = _Chunk(saved, u, dt, a_NE, b, c, chunk)
        decays, gradient = saved.new_zeros(chunk + 1, *saved.shape[1:]), saved.new_empty(chunk, *saved.shape[1:])
        for number in range(len(parts) - 1, -1, -1):
            at, before = parts[number], saved[number]
            tokens.load(at)
            size = tokens.dt.shape[0]
            decay, g = decays[:size], gradient[:size]
            decay.copy_(tokens.a)
            h = tokens.states(before)
            # Through the decay: dt a gets g_t exp(dt_t a) h_{t-1}.
            w = tokens.a
            torch.mul(decay[0], before, out=w[0])
            torch.mul(decay[1:], h[:-1], out=w[1:])

            # g_t = c_t dy_t + exp(dt_{t+1} a) g_{t+1}, the gradient of the state after token t.
            dy_TBE = dy[:, at].transpose(0, 1).to(saved.dtype)
            torch.mul(tokens.c[..., None], dy_TBE[:, :, None], out=g)
            g[-1].add_(dh_BNE)
            scan_(decays[1 : size + 1], g, reverse=True)
            torch.mul(decay[0], g[0], out=dh_BNE)

            scratch = h.mul_(dy_TBE[:, :, None])
            dc[:, at] = scratch.sum(-1).transpose(0, 1)
            torch.mul(g, tokens.du[:, :, None], out=scratch)
            db[:, at] = scratch.sum(-1).transpose(0, 1)
            dx_TBE = _over_states(tokens.b, g)
            w.mul_(g)
            torch.mul(w, a_NE, out=scratch)
            du[:, at] = (dx_TBE * tokens.dt).transpose(0, 1)
            ddt[:, at] = torch.addcmul(scratch.sum(2), dx_TBE, tokens.u).transpose(0, 1)
            da_NE += w.mul_(tokens.dt[:, :, None]).sum((0, 1))
    return du, ddt, da_NE.t().to(a.dtype, copy=True), db, dc, dh_BNE.transpose(1, 2).contiguous()


@_forward.register_fake
def _(u, dt, a, b, c, initial, chunk):
    batch, channels, states = initial.shape
    saved = initial.new_empty(-(-u.shape[1] // chunk), batch, states, channels)
    return u.new_empty(u.shape, dtype=initial.dtype), saved, initial.new_empty(initial.shape)


@_backward.register_fake
def _(dy, dlast, u, dt, a, b, c, saved, chunk):
    return (*(t.new_empty(t.shape) for t in (u, dt, a, b, c)), dlast.new_empty(dlast.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, chunk = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.chunk = chunk


def _gradient(ctx: Any, dy: Tensor, dsaved: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(dy, dlast, *ctx.saved_tensors, ctx.chunk), None)


_forward.register_autograd(_gradient, setup_context=_setup_context)


def chunked_selective_scan(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    initial: Tensor,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive_selective_scan` in time and memory linear in the length; no second derivatives."""
    batch, length, channels = u.shape
    chunk = chunk_size or default_chunk(batch, length, channels, a.shape[1], u.device.type)
    y, _, last = _forward(u, dt, a, b, c, initial, max(1, min(chunk, length)))
    return y, last
