"""Linear attention chunk by chunk: the fast PyTorch form, and the backend for the CPU.

The loop works on a few buffers that stay in cache: one chunk of q, k, v, its C x C products and the running
state. Nothing else grows with the length but one denominator per row. Where the state does not matter, in a single
chunk that starts from nothing, nobody computes it. The normaliser is one more value column
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

from ..packing import packed_bounds
from .naive import LinearState, accumulation_dtype

# The fastest of 32, 64, 128, 256 on CPUs at K = V = 64, where the C x C products cost what the state's do.
CHUNK = 64
# Batch rows go through the loop together up to this many (row, head, position) triples, so that buffers stay
# in cache.
BLOCK = 4096


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
        pairs = enumerate(pairwise(packed_bounds(cu_seqlens, length)))
        segments = [(slice(0, 1), slice(n, n + 1), start, stop) for n, (start, stop) in pairs]
    for rows, states, start, stop in segments:
        firsts = range(start, stop, chunk)
        for first in reversed(firsts) if backwards else firsts:
            yield rows, states, slice(first, min(first + chunk, stop))


class _Tile:
    """One chunk of a (B, L, H, V) tensor as matrices m (G, C, W); t is m transposed.

    body (rows, C, H, V) is where the chunk is read and written; last (rows, C, H, W - V) is the column of ones. A
    single row is laid out as it comes in, (C, H, W), which is the fastest to read; a tile that products are written
    into is `contiguous`.
    """

    def __init__(
        self, like: Tensor, rows: int, length: int, heads: int, width: int, extra: int = 0, *, contiguous: bool = False
    ) -> None:
        if rows == 1 and not contiguous:
            view = like.new_empty(1, length, heads, width + extra)
            self.m = view[0].transpose(0, 1)
        else:
            self.m = like.new_empty(rows * heads, length, width + extra)
            view = self.m.view(rows, heads, length, width + extra).transpose(1, 2)
        self.t = self.m.transpose(1, 2)
        self.body, self.last = view[..., :width], view[..., width:]
        self.last.fill_(1)


class _Buffers:
    """Tiles q, k (width K), v and, with `gradients`, g (width W) for inputs; w (W), x (K), a (G, C, C) for products."""

    def __init__(self, k: Tensor, v: Tensor, extra: int, *, gradients: bool = False) -> None:
        self.like = torch.empty(0, dtype=accumulation_dtype(k.dtype), device=k.device)
        self._heads, self._key, self._value = k.shape[2], k.shape[3], v.shape[3]
        self._extra, self._gradients, self._shape = extra, gradients, (-1, -1)

    def fit(self, rows: slice, positions: slice) -> None:
        """Give the buffers the size of this chunk; only the last chunk of a segment differs."""
        shape = rows.stop - rows.start, positions.stop - positions.start
        if shape == self._shape:
            return
        self._shape = shape
        sizes = *shape, self._heads
        self.q, self.k = (_Tile(self.like, *sizes, self._key) for _ in range(2))
        self.v = _Tile(self.like, *sizes, self._value, self._extra)
        self.w = _Tile(self.like, *sizes, self._value, self._extra, contiguous=True)
        if self._gradients:
            self.g = _Tile(self.like, *sizes, self._value, self._extra)
            self.x = _Tile(self.like, *sizes, self._key, contiguous=True)
        self.a = self.like.new_empty(shape[0] * self._heads, shape[1], shape[1])


def _state_matters(
    q: Tensor, initial: Tensor | None, cu_seqlens: Tensor | None, causal: bool, chunk: int, keep: bool
) -> bool:
    """Not in a single causal chunk that starts from nothing and whose last state nobody wants."""
    return keep or not causal or initial is not None or cu_seqlens is not None or q.shape[1] > chunk


def _state_shape(k: Tensor, v: Tensor, cu_seqlens: Tensor | None, normalize: bool) -> tuple[int, ...]:
    rows = k.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    return rows, k.shape[2], k.shape[3], v.shape[3] + int(normalize)


# Products are written in place or with `out`, which autocast leaves in the precision of the buffers.
@torch.library.custom_op("seqzoo::linear_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    normalize: bool,
    eps: float,
    scale: float,
    chunk: int,
    keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, L, H, V), denominators (B, L, H, 1) or empty, and the final state [s | z] (B or N, H, K, W).

    initial: None for zeros. Unless `keep`, the state has no elements where it does not matter.
    """
    o = v.new_empty(*q.shape[:3], v.shape[3])
    buf = _Buffers(k, v, int(normalize))
    den = buf.like.new_empty(*q.shape[:3], int(normalize))
    matters = _state_matters(q, initial, cu_seqlens, causal, chunk, keep)
    if initial is None:
        state = buf.like.new_zeros(_state_shape(k, v, cu_seqlens, normalize) if matters else 0)
    else:
        state = initial.clone(memory_format=torch.contiguous_format)  # its rows are updated in place, as views
    if not causal:
        for rows, states, at in _chunks(k, cu_seqlens, chunk):
            buf.fit(rows, at)
            buf.k.body.copy_(k[rows, at])
            buf.v.body.copy_(v[rows, at])
            state[states].flatten(0, 1).baddbmm_(buf.k.t, buf.v.m)
    for rows, states, at in _chunks(q, cu_seqlens, chunk):
        buf.fit(rows, at)
        buf.q.body.copy_(q[rows, at])
        if matters:
            s = state[states].flatten(0, 1)
            torch.baddbmm(buf.w.m, buf.q.m, s, beta=0, alpha=scale, out=buf.w.m)
        if causal:
            buf.k.body.copy_(k[rows, at])
            buf.v.body.copy_(v[rows, at])
            torch.bmm(buf.q.m, buf.k.t, out=buf.a).tril_()
            torch.baddbmm(buf.w.m, buf.a, buf.v.m, beta=int(matters), alpha=scale, out=buf.w.m)
        if causal and matters:
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
    state: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    normalize: bool,
    scale: float,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the initial state; `state` is the initial one if causal, else the final one.

    dstate has no elements where the state does not matter.

    The queries' gradients need the state before each chunk, which a walk forwards rebuilds; those of keys and
    values need the gradient of the state after each chunk, which the walk backwards sums.
    """
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    matters = dstate.dim() > 1
    buf = _Buffers(k, v, int(normalize), gradients=True)
    dstate = dstate.clone(memory_format=torch.contiguous_format)
    if state is None:
        state = torch.zeros_like(dstate)
    elif causal:
        state = state.clone(memory_format=torch.contiguous_format)

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
        if matters:
            s, ds = state[states].flatten(0, 1), dstate[states].flatten(0, 1)
        load_g(rows, at)
        if causal:
            buf.k.body.copy_(k[rows, at])
            buf.v.body.copy_(v[rows, at])
            torch.bmm(buf.g.m, buf.v.t, out=buf.a).tril_()
            torch.bmm(buf.a, buf.k.m, out=buf.x.m)
        if causal and matters:
            buf.x.m.baddbmm_(buf.g.m, s.transpose(1, 2))
            s.baddbmm_(buf.k.t, buf.v.m)
        elif not causal:
            buf.q.body.copy_(q[rows, at])
            ds.baddbmm_(buf.q.t, buf.g.m)
            torch.bmm(buf.g.m, s.transpose(1, 2), out=buf.x.m)
        dq[rows, at] = buf.x.body
    for rows, states, at in _chunks(k, cu_seqlens, chunk, backwards=True):
        buf.fit(rows, at)
        if matters:
            ds = dstate[states].flatten(0, 1)
        buf.k.body.copy_(k[rows, at])
        buf.v.body.copy_(v[rows, at])
        if causal:
            load_g(rows, at)  # before dv, which it shares a buffer with
            buf.q.body.copy_(q[rows, at])
            torch.bmm(buf.q.m, buf.k.t, out=buf.a).tril_()
            torch.bmm(buf.a.transpose(1, 2), buf.g.m, out=buf.w.m)
            torch.bmm(buf.g.m, buf.v.t, out=buf.a).tril_()
            torch.bmm(buf.a.transpose(1, 2), buf.q.m, out=buf.x.m)
        if causal and matters:
            buf.w.m.baddbmm_(buf.k.m, ds)
            buf.x.m.baddbmm_(buf.v.m, ds.transpose(1, 2))
            ds.baddbmm_(buf.q.t, buf.g.m)
        elif not causal:
            torch.bmm(buf.k.m, ds, out=buf.w.m)
            torch.bmm(buf.v.m, ds.transpose(1, 2), out=buf.x.m)
        dk[rows, at] = buf.x.body
        dv[rows, at] = buf.w.body
    return dq, dk, dv, dstate


@_forward.register_fake
def _(q, k, v, initial, cu_seqlens, causal, normalize, eps, scale, chunk, keep):
    shape = q.shape[:3]
    like = v.new_empty(0, dtype=accumulation_dtype(v.dtype))
    matters = _state_matters(q, initial, cu_seqlens, causal, chunk, keep)
    return (
        v.new_empty(*shape, v.shape[3]),
        like.new_empty(*shape, int(normalize)),
        like.new_empty(_state_shape(k, v, cu_seqlens, normalize) if matters else 0),
    )


@_backward.register_fake
def _(do, dstate, q, k, v, o, den, state, cu_seqlens, causal, normalize, scale, chunk):
    return (*(t.new_empty(t.shape) for t in (q, k, v)), dstate.new_empty(dstate.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, initial, cu_seqlens, causal, normalize, _, scale, chunk, _ = inputs
    o, den, state = output
    ctx.save_for_backward(q, k, v, o, den, initial if causal else state, cu_seqlens)
    ctx.options = causal, normalize, scale, chunk
    ctx.starts_from_nothing = initial is None


def _gradient(ctx: Any, do: Tensor, dden: Tensor, dstate: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, o, den, state, cu_seqlens = ctx.saved_tensors
    *grads, dinitial = _backward(do, dstate, q, k, v, o, den, state, cu_seqlens, *ctx.options)
    return (*grads, None if ctx.starts_from_nothing else dinitial, *[None] * 7)


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
    return_state: bool = True,
) -> tuple[Tensor, LinearState | None]:
    """`naive_linear_attention` in time and memory linear in the length. chunk: positions per step."""
    acc = accumulation_dtype(q.dtype)
    joint = None
    if initial is not None:
        joint = initial.s.to(acc)
        if initial.z is not None:
            joint = torch.cat([joint, initial.z.to(acc).unsqueeze(-1)], -1)
    o, _, state = _forward(q, k, v, joint, cu_seqlens, causal, normalize, eps, scale, chunk, return_state)
    if not return_state:
        return o, None
    if not normalize:
        return o, LinearState(state, None)
    return o, LinearState(state[..., :-1], state[..., -1])
