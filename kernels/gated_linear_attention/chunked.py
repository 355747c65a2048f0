"""Gated linear attention chunk by chunk: the fast PyTorch form, and the backend for the CPU.

A span is as many chunks of as many rows as stay in cache. All that happens inside chunks is done for a whole span
in a few batched products (head_decay.py, channel_decay.py); only the state walks from chunk to chunk. The forward
keeps the state before each span, so that the backward needs a single walk (README.md).

B batch, L length, G groups of J heads that share q and k, H = G J heads, K key width, V value width, C chunk
length, n chunks of a span, R rows of a span.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..linear_attention import accumulation_dtype
from .channel_decay import ChannelDecay
from .head_decay import HeadDecay

# Numbers in a span's largest tensor: what stays in the cache of a CPU; on a GPU, what keeps it busy.
SPAN = {"cpu": 1 << 17, "gpu": 1 << 26}
# A decay below exp(-100) = 4e-44 counts as that, so that -inf is a number; no sum can tell.
LOWEST = -100.0


def _spans(length: int, chunk: int, size: int) -> list[tuple[int, int, int]]:
    """(first position, chunks, chunk length): full chunks, then the rest in chunks of falling powers of two."""
    number, several = length // chunk, max(1, size // chunk)
    spans = [(i * chunk, min(several, number - i), chunk) for i in range(0, number, several)]
    start = number * chunk
    while start < length:
        chunk //= 2
        if length - start >= chunk:
            spans.append((start, 1, chunk))
            start += chunk
    return spans


def _default_chunk(key: int, value: int) -> int:
    """The fastest of 32, 64, 128 on CPUs: products with the state cost what those inside a chunk do."""
    return 32 if max(key, value) <= 32 else 64


def _plan(q: Tensor, v: Tensor, chunk: int) -> tuple[list[slice], list[tuple[int, int, int]]]:
    """The blocks of batch rows, and the spans that each of them walks along."""
    batch, length, heads = v.shape[:3]
    size = SPAN["cpu" if v.device.type == "cpu" else "gpu"] // max(1, q.shape[3], v.shape[3], chunk)
    rows = max(1, min(batch, size // max(1, heads * length)))
    blocks = [slice(first, min(first + rows, batch)) for first in range(0, batch, rows)]
    return blocks, _spans(length, chunk, max(1, size // max(1, rows * heads)))


class _Span:
    """One span of q, k, v and the log decay, its chunks as matrices in the dtype of the state."""

    def __init__(
        self, tensors: tuple[Tensor, ...], rows: slice, span: tuple[int, int, int], scale: float, acc: torch.dtype
    ) -> None:
        q, k, v, g = tensors
        self.start, self.number, self.chunk = span
        self.rows, self.at = rows, slice(self.start, self.start + self.number * self.chunk)
        self.acc, self.groups = acc, q.shape[2]
        scaled = self.load(q)
        constant = g.shape[0] == g.shape[1] == 1  # one number per head: all chunks of a span are alike
        decay = g.expand(1, self.chunk, -1, -1).unsqueeze(0) if constant else self.split(g).transpose(0, 1)
        kind = HeadDecay if g.shape[3] == 1 else ChannelDecay
        self.part = kind(
            scaled * scale if scale != 1 else scaled, self.load(k), self.load_heads(v), decay.to(acc).clamp(min=LOWEST)
        )

    def split(self, x: Tensor) -> Tensor:
        """(B, L, ...) to (R, n, C, ...)."""
        return x[self.rows, self.at].unflatten(1, (self.number, self.chunk))

    def load(self, x: Tensor) -> Tensor:
        """(B, L, G, K) to (n, R, G, C, K)."""
        return self.split(x).permute(1, 0, 3, 2, 4).to(self.acc).contiguous()

    def load_heads(self, x: Tensor) -> Tensor:
        """(B, L, H, V) to (n, R, G, J, C, V)."""
        return self.split(x).unflatten(3, (self.groups, -1)).permute(1, 0, 3, 4, 2, 5).to(self.acc).contiguous()

    def store(self, part: Tensor, to: Tensor) -> None:
        self.split(to).copy_(part.permute(1, 0, 3, 2, 4))

    def store_heads(self, part: Tensor, to: Tensor) -> None:
        self.split(to).unflatten(3, (self.groups, -1)).copy_(part.permute(1, 0, 4, 2, 3, 5))

    def states(self, first: Tensor) -> Tensor:
        """(n + 1, R, G, K, J, V): the state before each chunk, and after the last."""
        update, total = self.part.update(), self.part.total.expand(self.number, *[-1] * 5)
        states = update.new_empty(self.number + 1, *update.shape[1:])
        states[0] = first
        for i in range(self.number):
            torch.addcmul(update[i], total[i], states[i], out=states[i + 1])
        return states

    def state_gradients(self, cotangent: Tensor, last: Tensor) -> Tensor:
        """(n + 1, R, G, K, J, V): the gradient of the state before each chunk, and of that after the last."""
        update, total = self.part.adjoint(cotangent), self.part.total.expand(self.number, *[-1] * 5)
        states = update.new_empty(self.number + 1, *update.shape[1:])
        states[self.number] = last
        for i in reversed(range(self.number)):
            torch.addcmul(update[i], total[i], states[i + 1], out=states[i])
        return states


def _walk(
    tensors: tuple[Tensor, ...], scale: float, chunk: int, *, backwards: bool = False
) -> Iterator[tuple[int, _Span]]:
    """The spans, those of a block of rows in order, with their number in that order."""
    blocks, spans = _plan(tensors[0], tensors[2], chunk)
    order = list(enumerate(spans))
    for rows in blocks:
        for number, span in reversed(order) if backwards else order:
            yield number, _Span(tensors, rows, span, scale, accumulation_dtype(tensors[2].dtype))


@torch.library.custom_op("seqzoo::gated_linear_attention", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial: Tensor, scale: float, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, L, H, V), the last state (B, G, K, J, V), and the state before each span."""
    o = v.new_empty(v.shape)
    state = initial.clone(memory_format=torch.contiguous_format)
    starts = state.new_empty(len(_plan(q, v, chunk)[1]), *state.shape)
    with torch.autocast(v.device.type, enabled=False):
        for number, span in _walk((q, k, v, g), scale, chunk):
            states = span.states(state[span.rows])
            span.store_heads(span.part.output(states[:-1]), o)
            starts[number, span.rows], state[span.rows] = states[0], states[-1]
    return o, state, starts


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
    """Gradients of q, k, v, the log decay (empty unless `decays`) and the initial state."""
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    dg = dstate.new_zeros(g.shape if decays else 0)
    dstate = dstate.clone(memory_format=torch.contiguous_format)
    with torch.autocast(v.device.type, enabled=False):
        for number, span in _walk((q, k, v, g), scale, chunk, backwards=True):
            cotangent = span.load_heads(do)
            states = span.states(starts[number, span.rows])
            dstates = span.state_gradients(cotangent, dstate[span.rows])
            sq, sk, sv, sg = span.part.gradients(cotangent, states[:-1], dstates[1:], decays)
            span.store(sq * scale if scale != 1 else sq, dq)
            span.store(sk, dk)
            span.store_heads(sv, dv)
            if sg is not None and g.shape[0] == g.shape[1] == 1:
                dg += sg.sum((0, 1, 2))
            elif sg is not None:
                span.split(dg).copy_(sg.transpose(0, 1))
            dstate[span.rows] = dstates[0]
    return dq, dk, dv, dg, dstate


@_forward.register_fake
def _(q, k, v, g, initial, scale, chunk):
    spans = len(_plan(q, v, chunk)[1])
    return v.new_empty(v.shape), initial.new_empty(initial.shape), initial.new_empty(spans, *initial.shape)


@_backward.register_fake
def _(do, dstate, q, k, v, g, starts, scale, chunk, decays):
    dg = dstate.new_empty(g.shape if decays else 0)
    return (*(t.new_empty(t.shape) for t in (q, k, v)), dg, dstate.new_empty(dstate.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, _, scale, chunk = inputs
    ctx.save_for_backward(q, k, v, g, output[2])
    ctx.options = scale, chunk


def _gradient(ctx: Any, do: Tensor, dstate: Tensor, dstarts: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, g, starts = ctx.saved_tensors
    decays = ctx.needs_input_grad[3]
    dq, dk, dv, dg, dinitial = _backward(do, dstate, q, k, v, g, starts, *ctx.options, decays)
    return dq, dk, dv, dg.to(g.dtype) if decays else None, dinitial, None, None


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
) -> tuple[Tensor, Tensor]:
    """`naive_gated_linear_attention` in time and memory linear in the length. chunk: None for the default."""
    acc = accumulation_dtype(v.dtype)
    (batch, _, groups, key), (heads, value) = q.shape, v.shape[2:]
    if initial is None:
        first = v.new_zeros(batch, groups, key, heads // groups, value, dtype=acc)
    else:
        first = initial.to(acc).unflatten(1, (groups, -1)).transpose(2, 3)
    o, state, _ = _forward(q, k, v, log_decay, first, scale, chunk or _default_chunk(key, value))
    return o, state.transpose(2, 3).flatten(1, 2)
