"""Linear attention chunk by chunk: the fast PyTorch form, and the backend for the CPU.

The loop works on a few buffers that stay in cache: one chunk of q, k, v, its C x C products and the running
state. Nothing else grows with the length but one denominator per row. The normaliser is one more value column
that is always 1, so that the state [s | z] and every formula of the unnormalised form serve both (README.md).

B batch, L queries, S keys, H heads, K key width, V value width, W = V + 1 (normalised) or V, C chunk length,
G = batch rows x heads in the loop, N sequences of a packed row.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from .naive import LinearState, accumulation_dtype

# The fastest of 32, 64, 128, 256 on CPUs at K = V = 64, where the C x C products cost what the state's do.
CHUNK = 64
# Batch rows go through the loop together up to this many (row, head, position) triples, so that buffers stay
# in cache.
BLOCK = 4096


def _bounds(cu_seqlens: Tensor, length: int) -> list[int]:
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens={bounds} must rise from 0 to the length of the packed row, {length}")
    return bounds


def _chunks(
    x: Tensor, cu_seqlens: Tensor | None, chunk: int, *, backwards: bool = False
) -> Iterator[tuple[slice, slice, slice]]:
    """(batch rows, state rows, positions) of the chunks of x (B, L, H, K); those of a state in order."""
    batch, length, heads = x.shape[:3]
    if cu_seqlens is None:
        size = batch if x.is_cuda else max(1, BLOCK // (heads * max(1, min(chunk, length))))
        blocks = [slice(first, min(first + size, batch)) for first in range(0, batch, max(1, size))]
        segments = [(rows, rows, 0, length) for rows in blocks]
    else:
        pairs = enumerate(pairwise(_bounds(cu_seqlens, length)))
        segments = [(slice(0, 1), slice(n, n + 1), start, stop) for n, (start, stop) in pairs]
    for rows, states, start, stop in segments:
        firsts = range(start, stop, chunk)
        for first in reversed(firsts) if backwards else firsts:
            yield rows, states, slice(first, min(first + chunk, stop))


class _Tile:
    """One chunk of a (B, L, H, V) tensor as matrices m (G, C, W); t is m transposed.

    body (rows, C, H, V) is where the chunk is read and written; last (rows, C, H, W - V) is the column of
    ones.
    """

    def __init__(self, like: Tensor, rows: int, length: int, heads: int, width: int, extra: int = 0) -> None:
        self.m = like.new_empty(rows * heads, length, width + extra)
        self.t = self.m.transpose(1, 2)
        view = self.m.view(rows, heads, length, width + extra).transpose(1, 2)
        self.body, self.last = view[..., :width], view[..., width:]
        self.last.fill_(1)


class _Buffers:
    """Tiles q, k (width K), v, w, with `gradients` also g (width W), and the products a (G, C, C)."""

    def __init__(self, k: Tensor, v: Tensor, extra: int, *, gradients: bool = False) -> None:
        self._like = torch.empty(0, dtype=accumulation_dtype(k.dtype), device=k.device)
        self._heads, self._key, self._value = k.shape[2], k.shape[3], v.shape[3]
        self._extra, self._gradients, self._shape = extra, gradients, (-1, -1)

    def fit(self, rows: slice, positions: slice) -> None:
        """Give the buffers the size of this chunk; only the last chunk of a segment differs."""
        shape = rows.stop - rows.start, positions.stop - positions.start
        if shape == self._shape:
            return
        self._shape = shape
        self.q, self.k = (_Tile(self._like, *shape, self._heads, self._key) for _ in range(2))
        self.v, self.w = (_Tile(self._like, *shape, self._heads, self._value, self._extra) for _ in range(2))
        if self._gradients:
            self.g = _Tile(self._like, *shape, self._heads, self._value, self._extra)
        self.a = self._like.new_empty(shape[0] * self._heads, shape[1], shape[1])


# Products are written in place or with `out`, which autocast leaves in the precision of the buffers.
@torch.library.custom_op("seqzoo::linear_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    normalize: bool,
    eps: float,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, L, H, V), denominators (B, L, H, 1) or empty, and the final state [s | z] (B or N, H, K, W)."""
    o = v.new_empty(*q.shape[:3], v.shape[3])
    den = initial.new_empty(*q.shape[:3], int(normalize))
    state = initial.clone(memory_format=torch.contiguous_format)  # its rows are updated in place, as views
    buf = _Buffers(k, v, int(normalize))
    if not causal:
        for rows, states, at in _chunks(k, cu_seqlens, chunk):
            buf.fit(rows, at)
            buf.k.body.copy_(k[rows, at])
            buf.v.body.copy_(v[rows, at])
            state[states].flatten(0, 1).baddbmm_(buf.k.t, buf.v.m)
    for rows, states, at in _chunks(q, cu_seqlens, chunk):
        buf.fit(rows, at)
        s = state[states].flatten(0, 1)
        buf.q.body.copy_(q[rows, at])
        torch.baddbmm(buf.w.m, buf.q.m, s, beta=0, alpha=scale, out=buf.w.m)
        if causal:
            buf.k.body.copy_(k[rows, at])
            buf.v.body.copy_(v[rows, at])
            torch.bmm(buf.q.m, buf.k.t, out=buf.a).tril_()
            buf.w.m.baddbmm_(buf.a, buf.v.m, alpha=scale)
            s.baddbmm_(buf.k.t, buf.v.m)
        if normalize:
            torch.add(buf.w.last, eps, out=den[rows, at])
            torch.div(buf.w.body, den[rows, at], out=o[rows, at])
        else:
            o[rows, at] = buf.w.body
    return o, den, state


@torch.library.custom_op("seqzoo::linear_attention_backward", mutates_args=())
def _backward(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    den: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    normalize: bool,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state; `state` is the initial one if causal, else the final one.

    The queries' gradients need the state before each chunk, which a walk forwards rebuilds; those of keys and
    values need the gradient of the state after each chunk, which the walk backwards sums.
    """
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    state = state.clone(memory_format=torch.contiguous_format) if causal else state
    dstate = dstate.clone(memory_format=torch.contiguous_format)
    buf = _Buffers(k, v, int(normalize), gradients=True)

    def load_g(rows: slice, at: slice) -> None:
        """The gradient of the numerator and, as the last column, of the denominator, times `scale`."""
        if normalize:
            torch.div(do[rows, at], den[rows, at], out=buf.g.body)
            torch.mul(buf.g.body, o[rows, at], out=buf.w.body)
            torch.sum(buf.w.body, -1, keepdim=True, out=buf.g.last).neg_()
        else:
            buf.g.body.copy_(do[rows, at])
        if scale != 1:
            buf.g.m.mul_(scale)

    for rows, states, at in _chunks(q, cu_seqlens, chunk):
        buf.fit(rows, at)
        s, ds = state[states].flatten(0, 1), dstate[states].flatten(0, 1)
        load_g(rows, at)
        if causal:
            buf.k.body.copy_(k[rows, at])
            buf.v.body.copy_(v[rows, at])
            torch.bmm(buf.g.m, s.transpose(1, 2), out=buf.q.m)
            torch.bmm(buf.g.m, buf.v.t, out=buf.a).tril_()
            buf.q.m.baddbmm_(buf.a, buf.k.m)
            s.baddbmm_(buf.k.t, buf.v.m)
        else:
            buf.q.body.copy_(q[rows, at])
            ds.baddbmm_(buf.q.t, buf.g.m)
            torch.bmm(buf.g.m, s.transpose(1, 2), out=buf.q.m)
        dq[rows, at] = buf.q.body
    for rows, states, at in _chunks(k, cu_seqlens, chunk, backwards=True):
        buf.fit(rows, at)
        ds = dstate[states].flatten(0, 1)
        buf.k.body.copy_(k[rows, at])
        buf.v.body.copy_(v[rows, at])
        if causal:
            load_g(rows, at)  # before dv, which it shares a buffer with
            buf.q.body.copy_(q[rows, at])
            torch.bmm(buf.q.m, buf.k.t, out=buf.a).tril_()
            torch.bmm(buf.a.transpose(1, 2), buf.g.m, out=buf.w.m)
            buf.w.m.baddbmm_(buf.k.m, ds)
            torch.bmm(buf.g.m, buf.v.t, out=buf.a).tril_()
            torch.bmm(buf.a.transpose(1, 2), buf.q.m, out=buf.k.m)
            buf.k.m.baddbmm_(buf.v.m, ds.transpose(1, 2))
            ds.baddbmm_(buf.q.t, buf.g.m)
        else:
            torch.bmm(buf.k.m, ds, out=buf.w.m)
            torch.bmm(buf.v.m, ds.transpose(1, 2), out=buf.k.m)
        dk[rows, at] = buf.k.body
        dv[rows, at] = buf.w.body
    return dq, dk, dv, dstate


@_forward.register_fake
def _(q, k, v, initial, cu_seqlens, causal, normalize, eps, scale, chunk):
    shape = q.shape[:3]
    return (
        v.new_empty(*shape, v.shape[3]),
        initial.new_empty(*shape, int(normalize)),
        initial.new_empty(initial.shape),
    )


@_backward.register_fake
def _(do, dstate, q, k, v, o, den, state, cu_seqlens, causal, normalize, scale, chunk):
    return (*(t.new_empty(t.shape) for t in (q, k, v)), state.new_empty(state.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, initial, cu_seqlens, causal, normalize, _, scale, chunk = inputs
    o, den, state = output
    ctx.save_for_backward(q, k, v, o, den, initial if causal else state, cu_seqlens)
    ctx.options = causal, normalize, scale, chunk


def _gradient(ctx: Any, do: Tensor, dden: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, o, den, state, cu_seqlens = ctx.saved_tensors
    grads = _backward(do, dstate, q, k, v, o, den, state, cu_seqlens, *ctx.options)
    return (*grads, *[None] * 6)


_forward.register_autograd(_gradient, setup_context=_setup_context)


def chunked_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: LinearState | None,
    *,
    causal: bool,
    normalize: bool,
    eps: float,
    scale: float,
    cu_seqlens: Tensor | None,
    chunk: int = CHUNK,
) -> tuple[Tensor, LinearState]:
    """`naive_linear_attention` in time and memory linear in the length. chunk: positions per step."""
    acc = accumulation_dtype(q.dtype)
    if initial is None:
        rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        joint = q.new_zeros(rows, q.shape[2], q.shape[3], v.shape[3] + int(normalize), dtype=acc)
    elif initial.z is None:
        joint = initial.s.to(acc)
    else:
        joint = torch.cat([initial.s.to(acc), initial.z.to(acc).unsqueeze(-1)], -1)
    o, _, state = _forward(q, k, v, joint, cu_seqlens, causal, normalize, eps, scale, chunk)
    if not normalize:
        return o, LinearState(state, None)
    return o, LinearState(state[..., :-1], state[..., -1])
