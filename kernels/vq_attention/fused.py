"""VQ attention in Triton: the operators, their gradients, and the state around them.

The kernels are in fused_forward.py and fused_backward.py, what they are given in fused_launch.py. Tables of cells are
summed again in the backward pass: only o and one number per query are kept.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .fused_launch import (
    FACTORS,
    SEGMENT,
    Call,
    attend,
    bias_gradient,
    cells,
    key_gradients,
    plan_blocks,
    readable,
    table_gradients,
    tables,
)
from .state import VQState, advance, extend


def _call(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    code: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    places: Tensor,
    number: Tensor | None,
    chunk: int | None,
    causal: bool,
    scale: float,
) -> Call:
    q = readable(q)
    plan = plan_blocks(q.shape[1], codebook.shape[1], chunk, number is not None)
    return Call(
        q,
        q if k is None else readable(k),
        readable(v),
        code.contiguous(),
        codebook.contiguous(),
        None if bias is None else bias.contiguous(),
        places.contiguous(),
        plan,
        causal,
        scale,
    )


def _tables(call: Call, number: Tensor | None, mean: Tensor | None) -> tuple[Tensor, Tensor] | tuple[None, None]:
    if not call.plan.tables:
        return None, None
    state = None if number is None or mean is None else (number, mean)
    return tables(call.v, call.code, call.places, call.codebook.shape[1], call.plan, call.causal, state)


@torch.library.custom_op("seqzoo::vq_attention_triton", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    code: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    places: Tensor,
    number: Tensor | None,
    mean: Tensor | None,
    chunk: int | None,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """o (B, L, H, V) and, in float32, the logarithm (to 2) of what each softmax divides by, (B, L, H).

    k, v (B, S, ...) and codebook in the dtype of q, bias in float32. places: int64 (B, 3), of each row what
    fused_forward.py's `place` reads. number (B, H, M) and mean (B, H, M, V), float32: cells of what lies before k and
    v, which then begin with the last 2 C - 1 tokens; contiguous.
    """
    call = _call(q, k, v, code, codebook, bias, places, number, chunk, causal, scale)
    o = torch.empty(*q.shape[:3], v.shape[3], dtype=v.dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        counts, means = _tables(call, number, mean)
        attend(call, counts, means, o, lse)
    return o, lse


@_forward.register_fake
def _(q, k, v, code, codebook, bias, places, number, mean, chunk, causal, scale):
    return v.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(q.shape[:3], dtype=torch.float32)


@torch.library.custom_op("seqzoo::vq_attention_triton_backward", mutates_args=())
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    code: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    places: Tensor,
    number: Tensor | None,
    mean: Tensor | None,
    o: Tensor,
    lse: Tensor,
    chunk: int | None,
    causal: bool,
    scale: float,
    with_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, bias, number and mean; empty for those that are not there (bias: unless `with_bias`)."""
    call = _call(q, k, v, code, codebook, bias, places, number, chunk, causal, scale)
    do = do.contiguous()
    new = torch.zeros_like if number is not None else torch.empty_like  # of a state, the oldest slots are in no block
    dv = new(v, memory_format=torch.contiguous_format)
    dk = v.new_empty(0) if k is None else new(k, memory_format=torch.contiguous_format)
    dbias, dnumber, dmean = (lse.new_empty(0) for _ in range(3))
    with torch.cuda.device_of(q):
        counts, means = _tables(call, number, mean)
        dq, delta = attend(call, counts, means, o, lse, do)
        dtotal = rest = None
        if counts is not None:
            dtotal, rest = table_gradients(call, counts, do, lse, delta)
        dstart = key_gradients(call, dtotal, do, lse, delta, dk, dv)
        if with_bias:
            dbias = bias_gradient(call, do, lse, delta)
        if number is not None and mean is not None and dstart is not None and rest is not None:
            # The sums began with number x mean.
            dmean = number.unsqueeze(3) * dstart
            dnumber = rest.sum(2) + (mean * dstart).sum(3)
    return dq, dk, dv, dbias, dnumber, dmean


@_backward.register_fake
def _(do, q, k, v, code, codebook, bias, places, number, mean, o, lse, chunk, causal, scale, with_bias):
    return (
        q.new_empty(q.shape),
        q.new_empty(0) if k is None else k.new_empty(k.shape),
        v.new_empty(v.shape),
        lse.new_empty(bias.shape if with_bias else 0),
        lse.new_empty(0) if number is None else number.new_empty(number.shape),
        lse.new_empty(0) if mean is None else mean.new_empty(mean.shape),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:9], *output)
    ctx.options = inputs[9:]


def _gradient(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    with_bias = ctx.needs_input_grad[5]
    dq, dk, dv, dbias, dnumber, dmean = _backward(do, *ctx.saved_tensors, *ctx.options, with_bias)
    _, k, *_, number, _, _, _ = ctx.saved_tensors
    keys, counts, means = None if k is None else dk, None if number is None else dnumber, dmean
    if number is None:
        means = None
    return dq, keys, dv, None, None, dbias if with_bias else None, None, counts, means, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)


@torch.library.custom_op("seqzoo::vq_cells_triton", mutates_args=())
def _cells(v: Tensor, code: Tensor, places: Tensor, codes: int) -> tuple[Tensor, Tensor]:
    """Tokens in each cell (B, H, M) and the sums of their values (B, H, M, V), float32, of slots first .. end - 1."""
    with torch.cuda.device_of(v):
        segments = max(1, -(-v.shape[1] // SEGMENT))
        number, total = cells(readable(v), code.contiguous(), places.contiguous(), codes, 0, SEGMENT, segments)
        return number.sum(2), total.sum(2)


@_cells.register_fake
def _(v, code, places, codes):
    number = v.new_empty(v.shape[0], v.shape[2], codes, dtype=torch.float32)
    return number, number.new_empty(*number.shape, v.shape[3])


def _setup_cells(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    v, code, places, _ = inputs
    ctx.save_for_backward(code, places)
    ctx.dtype = v.dtype


def _cells_gradient(ctx: Any, dnumber: Tensor, dtotal: Tensor) -> tuple[Tensor | None, ...]:
    code, places = ctx.saved_tensors
    slot = torch.arange(code.shape[1], device=code.device)
    there = (slot >= places[:, 1:2]) & (slot < places[:, 2:])
    dv = dtotal.transpose(1, 2).gather(1, code.unsqueeze(3).expand(-1, -1, -1, dtotal.shape[3]))
    return dv.masked_fill(~there[..., None, None], 0).to(ctx.dtype), None, None, None


_cells.register_autograd(_cells_gradient, setup_context=_setup_cells)


def fused_vq_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    code: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    *,
    chunk: int | None,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
    state: VQState | None,
    return_state: bool,
) -> tuple[Tensor, VQState | None]:
    """`naive_vq_attention` in time L (M + W), in Triton."""
    book = codebook.detach().to(q.dtype)
    table = None if bias is None else bias.float()
    new = torch.full_like(code[:, 0, 0], v.shape[1]) if lengths is None else lengths
    if state is None or k is None or chunk is None:
        if table is not None and chunk is not None and chunk > q.shape[1]:
            # Blocks end with the row; the table's middle stays where it is.
            size = q.shape[1]
            table = table[:, : 2 * size] if causal else table[:, 2 * (chunk - size) : 2 * (chunk + size) - 1]
        none = torch.zeros_like(new)
        places = torch.stack((none, none, new), 1)
        keys, values = None if k is None or chunk is None else k.to(q.dtype), v.to(q.dtype)
        o, _ = _forward(q, keys, values, code, book, table, places, None, None, chunk, causal, scale)
        return o.to(v.dtype), None
    joined = extend(state, k, v, code)
    phase = state.length % chunk
    first = torch.where(state.length < chunk, chunk, 0)
    places = torch.stack((chunk - 1 - phase, first, chunk + phase + new), 1)
    cell = state.number.float().contiguous(), state.mean.float().contiguous()
    keys, values = (t.to(q.dtype) for t in joined[:2])
    o, _ = _forward(q, keys, values, joined[2], book, table, places, *cell, chunk, True, scale)
    if not return_state:
        return o.to(v.dtype), None
    # Slots of the joined window whose tokens lie in no block that the next window has.
    before, after = ((n.div(chunk, rounding_mode="floor") - 1) * chunk for n in (state.length, state.length + new))
    origin = state.k.shape[1] - state.length
    old = torch.stack((torch.zeros_like(new), before.clamp(min=0) + origin, after + origin), 1)
    gone = joined[1] if joined[1].dtype in FACTORS else joined[1].float()
    count, total = _cells(gone, joined[2], old, book.shape[1])
    return o.to(v.dtype), advance(state, joined, new, count, total)
