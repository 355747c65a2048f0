"""The selective scan chunk by chunk: the fast PyTorch form, and the backend for the CPU.

A few rows at a time, and of those a chunk of the sequence: its decays and inputs, (R, T, N, E) with the
channels innermost, are scanned in place (`associative_scan`). Nothing is divided, so nothing overflows where
decays underflow. What grows with the length is one state per chunk, from which the backward pass computes the
chunk's states again (README.md).

B batch, L length, E channels, N state width, R rows of a block, T tokens of a chunk, G chunks.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..associative_scan.chunked import scan_

# Elements of a buffer: as many as stay in the cache of a CPU core (of a GPU: as keep it busy). Of a row at least
# MIN_CHUNK tokens, so that the saved states (L / T, N, E) are no larger than the inputs at the usual N = 16.
BUFFER = {"cpu": 1 << 18, "cuda": 1 << 24}
MIN_CHUNK, MAX_CHUNK = 16, 256


def default_chunk(length: int, channels: int, states: int, device: str) -> int:
    """Tokens per chunk, a power of two unless the whole sequence is shorter."""
    chunk = MAX_CHUNK
    while chunk > MIN_CHUNK and chunk * channels * states > BUFFER.get(device, BUFFER["cuda"]):
        chunk //= 2
    return max(1, min(chunk, length))


def _ranges(size: int, step: int) -> list[slice]:
    return [slice(first, min(first + step, size)) for first in range(0, size, step)]


def _blocks(batch: int, chunk: int, width: int, device: str) -> list[slice]:
    """Rows that go together: as many as a buffer holds with a chunk of each; width: elements of a state."""
    return _ranges(batch, max(1, BUFFER.get(device, BUFFER["cuda"]) // max(1, chunk * width)))


def _most_rows(blocks: list[slice]) -> int:
    return blocks[0].stop if blocks else 0


class _Chunk:
    """A chunk of some rows: dt, u, b, c in the dtype of the state, and buffers that every chunk reuses."""

    def __init__(self, u: Tensor, dt: Tensor, a_NE: Tensor, b: Tensor, c: Tensor, tokens: int, buffers: int) -> None:
        """tokens: of all rows of a block, at most. a_NE: in the dtype of the state."""
        self._sources, self._a_NE = (u, dt, b, c), a_NE
        self._rate_NE = a_NE / math.log(2)
        self._buffers = [a_NE.new_empty(tokens * a_NE.numel()) for _ in range(buffers)]

    def load(self, rows: slice, at: slice) -> None:
        """Take these tokens of these rows."""
        self.u, self.dt, self.b, self.c = (t[rows, at].to(self._a_NE.dtype) for t in self._sources)
        self.du = self.dt * self.u

    def buffer(self, index: int, extra: int = 0) -> Tensor:
        """Uninitialised (R, T + extra, N, E), contiguous."""
        shape = self.dt.shape[0], self.dt.shape[1] + extra, *self._a_NE.shape
        return self._buffers[index][: math.prod(shape)].view(shape)

    def decays(self, out: Tensor) -> Tensor:
        """exp(dt a), (R, T, N, E), as 2^(dt a / ln 2): exp2 takes a third of the time of PyTorch's exp."""
        return torch.mul(self.dt[:, :, None], self._rate_NE, out=out).exp2_()

    def states(self, decays: Tensor, before: Tensor, out: Tensor) -> Tensor:
        """The states after each token, (R, T, N, E), given the one before the first; uses up the decays."""
        torch.mul(self.du[:, :, None], self.b[..., None], out=out)
        out[:, 0].addcmul_(decays[:, 0], before)
        scan_(decays.transpose(0, 1), out.transpose(0, 1))
        return out


@torch.library.custom_op("seqzoo::selective_scan", mutates_args=())
def _forward(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, E), the states before each chunk (G, B, N, E) and after the last token (B, E, N)."""
    y = u.new_empty(u.shape, dtype=initial.dtype)
    parts, blocks = _ranges(u.shape[1], chunk), _blocks(u.shape[0], chunk, a.numel(), u.device.type)
    h_BNE = initial.transpose(1, 2).contiguous().clone()
    saved = h_BNE.new_empty(len(parts), *h_BNE.shape)
    with torch.autocast(u.device.type, enabled=False):
        a_NE = a.to(initial.dtype).t().contiguous()
        tokens = _Chunk(u, dt, a_NE, b, c, _most_rows(blocks) * chunk, 2)
        for rows in blocks:
            before = h_BNE[rows]
            for number, at in enumerate(parts):
                saved[number, rows] = before
                tokens.load(rows, at)
                h = tokens.states(tokens.decays(tokens.buffer(0)), before, tokens.buffer(1))
                y[rows, at] = _over_states(tokens.c, h)
                before.copy_(h[:, -1])
    return y, saved, h_BNE.transpose(1, 2).contiguous()


def _over_states(c: Tensor, h: Tensor) -> Tensor:
    """sum_n c_n h_n: (R, T, N) and (R, T, N, E) give (R, T, E)."""
    return torch.bmm(c.reshape(-1, 1, c.shape[2]), h.flatten(0, 1)).view(*h.shape[:2], h.shape[3])


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
    parts, blocks = _ranges(u.shape[1], chunk), _blocks(u.shape[0], chunk, a.numel(), u.device.type)
    with torch.autocast(u.device.type, enabled=False):
        tokens = _Chunk(u, dt, a_NE, b, c, _most_rows(blocks) * (chunk + 1), 4)
        for rows in blocks:
            dh = dh_BNE[rows]
            for number in range(len(parts) - 1, -1, -1):
                at, before = parts[number], saved[number, rows]
                tokens.load(rows, at)
                # One more than there are tokens: the scan from the end has a last decay, which it does not use.
                decay = tokens.buffer(0, extra=1)
                decay[:, -1] = 0
                w, scratch, g = tokens.buffer(1), tokens.buffer(2), tokens.buffer(3)
                h = tokens.states(w.copy_(tokens.decays(decay[:, :-1])), before, scratch)
                # Through the decay: dt a gets g_t exp(dt_t a) h_{t-1}.
                torch.mul(decay[:, 0], before, out=w[:, 0])
                torch.mul(decay[:, 1:-1], h[:, :-1], out=w[:, 1:])

                # g_t = c_t dy_t + exp(dt_{t+1} a) g_{t+1}, the gradient of the state after token t.
                dy_RTE = dy[rows, at].to(saved.dtype)
                torch.mul(tokens.c[..., None], dy_RTE[:, :, None], out=g)
                g[:, -1].add_(dh)
                scan_(decay[:, 1:].transpose(0, 1), g.transpose(0, 1), reverse=True)
                torch.mul(decay[:, 0], g[:, 0], out=dh)

                dc[rows, at] = h.mul_(dy_RTE[:, :, None]).sum(-1)
                db[rows, at] = torch.mul(g, tokens.du[:, :, None], out=scratch).sum(-1)
                dx_RTE = _over_states(tokens.b, g)
                w.mul_(g)
                du[rows, at] = dx_RTE * tokens.dt
                ddt[rows, at] = torch.mul(w, a_NE, out=scratch).sum(2).addcmul_(dx_RTE, tokens.u)
                da_NE += w.mul_(tokens.dt[:, :, None]).sum((0, 1))
    return du, ddt, da_NE.t().contiguous().to(a.dtype), db, dc, dh_BNE.transpose(1, 2).contiguous()


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
    _, length, channels = u.shape
    chunk = chunk_size or default_chunk(length, channels, a.shape[1], u.device.type)
    y, _, last = _forward(u, dt, a, b, c, initial, max(1, min(chunk, length)))
    return y, last
