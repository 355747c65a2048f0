"""Gated linear attention chunk by chunk: the fast PyTorch form, and the backend for the CPU.

A span is as many chunks of as many rows as stay in cache. All that happens inside chunks is done for a whole span
in a few batched products (head_decay.py, channel_decay.py), in buffers that all spans share (tiles.py); only the state
walks from chunk to chunk. The forward keeps the state before each span, so that the backward needs a single walk
(README.md). Where the state does not matter, in a single chunk that starts from nothing, nobody computes it.

B batch, L length, G groups of J heads that share q and k, H = G J heads, K key width, V value width, C chunk
length, n chunks of a span, R rows of a span.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..linear_attention import accumulation_dtype
from .channel_decay import ChannelDecay
from .head_decay import HeadDecay
from .tiles import Shape

# Numbers in a span's largest tensor: what stays in the cache of a CPU; on a GPU, what keeps it busy.
SPAN = {"cpu": 1 << 17, "gpu": 1 << 26}


def _default_chunk(key: int, value: int) -> int:
    """The fastest of 32, 64, 128 on CPUs: products with the state cost what those inside a chunk do."""
    return 32 if max(key, value) <= 32 else 64


class _Region(NamedTuple):
    """`chunks` chunks of `chunk` positions from `start`, in spans of up to `several` chunks."""

    start: int
    chunks: int
    chunk: int
    several: int


def _plan(q: Tensor, v: Tensor, chunk: int) -> tuple[list[slice], list[_Region]]:
    """The blocks of batch rows, and the regions that each of them walks along: full chunks, then what is left."""
    batch, length, heads = v.shape[:3]
    size = SPAN["cpu" if v.device.type == "cpu" else "gpu"] // max(1, q.shape[3], v.shape[3], min(chunk, length))
    rows = max(1, min(batch, size // max(1, heads * length)))
    blocks = [slice(first, min(first + rows, batch)) for first in range(0, batch, rows)]
    full, rest = length // chunk, length % chunk
    several = max(1, size // max(1, rows * heads * chunk))
    regions = [_Region(0, full, chunk, min(several, full))] if full else []
    if rest:
        regions.append(_Region(full * chunk, 1, rest, 1))
    return blocks, regions


class _Span(NamedTuple):
    """number: in the order of a row. rows: of the batch. at: the chunks of the region."""

    number: int
    rows: slice
    region: _Region
    at: slice


def _spans(q: Tensor, v: Tensor, chunk: int) -> list[list[_Span]]:
    """For each block of rows its spans in order."""
    blocks, regions = _plan(q, v, chunk)
    parts = [
        (region, slice(first, min(first + region.several, region.chunks)))
        for region in regions
        for first in range(0, region.chunks, region.several)
    ]
    return [[_Span(i, rows, *part) for i, part in enumerate(parts)] for rows in blocks]


def _states_matter(v: Tensor, initial: bool, keep: bool, chunk: int) -> bool:
    """Not in a single chunk that starts from nothing and whose last state nobody wants."""
    return initial or keep or v.shape[1] > chunk


class _Walk:
    """The tiles of each shape of span, and the spans of tensors that go into them."""

    def __init__(self, q: Tensor, v: Tensor, g: Tensor, *, states: bool, gradients: bool) -> None:
        self.kind = HeadDecay if g.shape[3] == 1 else ChannelDecay
        self.constant = self.kind is HeadDecay and g.shape[0] == g.shape[1] == 1
        self.like = torch.empty(0, dtype=accumulation_dtype(v.dtype), device=v.device)
        self.groups, self.key, self.value = q.shape[2], q.shape[3], v.shape[3]
        self.share = v.shape[2] // max(1, self.groups)
        self.options = {"constant": self.constant, "states": states, "gradients": gradients}
        self.made: dict[Shape, HeadDecay | ChannelDecay] = {}

    def tiles(self, span: _Span) -> HeadDecay | ChannelDecay:
        number, rows = span.at.stop - span.at.start, span.rows.stop - span.rows.start
        shape = Shape(number, rows, self.groups, self.share, span.region.chunk, self.key, self.value)
        if shape not in self.made:
            self.made[shape] = self.kind(self.like, shape, **self.options)
        return self.made[shape]

    def keys(self, x: Tensor, span: _Span) -> Tensor:
        """(B, L, G, K) to (n, R, G, C, K)."""
        start, chunks, chunk, _ = span.region
        region = x[span.rows, start : start + chunks * chunk].unflatten(1, (chunks, chunk))
        return region.permute(1, 0, 3, 2, 4)[span.at]

    def values(self, x: Tensor, span: _Span) -> Tensor:
        """(B, L, H, V) to (n, R, G, J, C, V)."""
        return self.keys(x, span).unflatten(2, (self.groups, self.share))

    def decay(self, g: Tensor, span: _Span) -> Tensor:
        """The log decay as chunks, (n or 1, R or 1, H, C or 1, K or 1)."""
        return g.unsqueeze(3) if self.constant else self.keys(g, span)


@torch.library.custom_op("seqzoo::gated_linear_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial: Tensor | None, scale: float, chunk: int, keep: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, L, H, V), the last state (B, G, K, J, V) if `keep`, and the state before each span if it matters.

    What is not wanted has no elements. initial: (B, G, K, J, V), None for zeros.
    """
    o = v.new_empty(v.shape)
    matters = _states_matter(v, initial is not None, keep, chunk)
    walk = _Walk(q, v, g, states=matters, gradients=False)
    blocks = _spans(q, v, chunk)
    state = _first_state(walk.like, initial, q, v, matters)
    starts = state.new_empty(len(blocks[0]) if blocks and matters else 0, *state.shape)
    with torch.autocast(v.device.type, enabled=False):
        for span in (span for block in blocks for span in block):
            tiles = walk.tiles(span)
            tiles.load(walk.keys(q, span), walk.keys(k, span), walk.values(v, span))
            if matters:
                starts[span.number, span.rows] = state[span.rows]
            tiles.forward(walk.decay(g, span), scale, state[span.rows], walk.values(o, span))
    return o, state if keep else state.new_empty(0), starts


def _first_state(like: Tensor, initial: Tensor | None, q: Tensor, v: Tensor, matters: bool) -> Tensor:
    """A copy of the initial state, or zeros; without elements where it does not matter."""
    if initial is not None:
        return initial.clone(memory_format=torch.contiguous_format)
    return like.new_zeros(_state_shape(q, v) if matters else 0)


def _state_shape(q: Tensor, v: Tensor) -> tuple[int, ...]:
    (batch, _, groups, key), (heads, value) = q.shape, v.shape[2:]
    return batch, groups, key, heads // max(1, groups), value


@torch.library.custom_op("seqzoo::gated_linear_attention_backward", mutates_args=())
def _backward(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    starts: Tensor,
    scale: float,
    chunk: int,
    decays: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the log decay (empty unless `decays`) and the initial state.

    starts: as the forward left it. dstate: empty where nobody wanted the last state.
    """
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    matters = starts.dim() == 6
    walk = _Walk(q, v, g, states=matters, gradients=True)
    dg = walk.like.new_zeros(g.shape if decays else 0)
    if not matters or dstate.numel():
        dstate = dstate.clone(memory_format=torch.contiguous_format)
    else:
        dstate = walk.like.new_zeros(_state_shape(q, v))
    with torch.autocast(v.device.type, enabled=False):
        for span in (span for block in _spans(q, v, chunk) for span in reversed(block)):
            tiles = walk.tiles(span)
            tiles.load(*(walk.keys(t, span) for t in (q, k)), *(walk.values(t, span) for t in (v, do)))
            first, ds = (starts[span.number, span.rows], dstate[span.rows]) if matters else (starts, dstate)
            to = walk.keys(dq, span), walk.keys(dk, span), walk.values(dv, span)
            part = tiles.backward(walk.decay(g, span), scale, first, ds, to, decays)
            if part is None:
                continue
            if walk.constant:
                dg += part.sum((0, 1, 3)).view_as(dg)
            else:
                walk.keys(dg, span).copy_(part)
    return dq, dk, dv, dg, dstate


@_forward.register_fake
def _(q, k, v, g, initial, scale, chunk, keep):
    like = v.new_empty(0, dtype=accumulation_dtype(v.dtype))
    blocks, matters = _spans(q, v, chunk), _states_matter(v, initial is not None, keep, chunk)
    shape = _state_shape(q, v) if matters else (0,)
    starts = like.new_empty(len(blocks[0]) if blocks and matters else 0, *shape)
    return v.new_empty(v.shape), like.new_empty(shape if keep else 0), starts


@_backward.register_fake
def _(do, dstate, q, k, v, g, starts, scale, chunk, decays):
    dg = starts.new_empty(g.shape if decays else 0)
    return (*(t.new_empty(t.shape) for t in (q, k, v)), dg, starts.new_empty(starts.shape[1:]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, initial, scale, chunk, _ = inputs
    ctx.save_for_backward(q, k, v, g, output[2])
    ctx.options = scale, chunk
    ctx.starts_from_nothing = initial is None


def _gradient(ctx: Any, do: Tensor, dstate: Tensor, dstarts: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, g, starts = ctx.saved_tensors
    decays = ctx.needs_input_grad[3]
    dq, dk, dv, dg, dinitial = _backward(do, dstate, q, k, v, g, starts, *ctx.options, decays)
    return dq, dk, dv, dg.to(g.dtype) if decays else None, None if ctx.starts_from_nothing else dinitial, *[None] * 3


_forward.register_autograd(_gradient, setup_context=_setup_context)


def chunked_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    *,
    scale: float,
    chunk: int | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """`naive_gated_linear_attention` in time and memory linear in the length. chunk: None for the default."""
    groups, key, value = q.shape[2], q.shape[3], v.shape[3]
    if initial is not None:
        initial = initial.to(accumulation_dtype(v.dtype)).unflatten(1, (groups, -1)).transpose(2, 3)
    o, state, _ = _forward(q, k, v, log_decay, initial, scale, chunk or _default_chunk(key, value), return_state)
    return o, state.transpose(2, 3).flatten(1, 2) if return_state else None
