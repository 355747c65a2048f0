"""Gated linear attention in Triton: the walk of linear_attention/fused_core.py with decays.

B batch, L length, G groups of J heads that share q and k, H = G J heads, K key width, V value width.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..linear_attention.fused_launch import (
    COLUMN,
    CONSTANT,
    HEAD,
    KEY,
    Plan,
    chunk_length,
    column_block,
    plan_rows,
    readable,
    run_fold,
    run_scan,
    run_walk,
)

# Heads of a group whose gradients of q and k, which are added up, are in memory together.
TOGETHER = 16


def _plan(q: Tensor, v: Tensor, g: Tensor, chunk: int | None) -> Plan:
    (batch, length, heads, value), key = v.shape, q.shape[3]
    length_of_chunk = chunk_length(length, key, value, q.dtype, g.shape[3] > 1, chunk)
    return plan_rows(batch, heads, value, length, length_of_chunk)


def _kind(g: Tensor) -> int:
    if g.shape[3] > 1:
        return KEY
    return CONSTANT if g.shape[0] == g.shape[1] == 1 else HEAD


def _spread(g: Tensor, q: Tensor, v: Tensor) -> Tensor:
    """The log decay as (B, L, H, K or 1), which takes no memory."""
    return readable(g).expand(*v.shape[:3], -1)


@torch.library.custom_op("seqzoo::gated_linear_attention_triton", mutates_args=())
def _forward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, initial: Tensor | None, scale: float, chunk: int | None
) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, L, H, V), the last state (B, H, K, V), and the state before each segment, if there are several."""
    batch, _, heads, value = v.shape
    plan, kind = _plan(q, v, g, chunk), _kind(g)
    q, k, v, g = readable(q), readable(k), readable(v), _spread(g, q, v)
    o = torch.empty_like(v, memory_format=torch.contiguous_format)
    if plan.total == 0:
        state = _start(initial, (batch, heads, q.shape[3], value), v)
        return o, state, state.new_empty(_kept(q, v, plan))
    state = v.new_empty(batch, heads, q.shape[3], value, dtype=torch.float32)
    starts = state.new_empty(_kept(q, v, plan))
    if plan.split:
        starts, _, totals = run_fold(k, v, plan, decay=kind, g=g)
        run_scan(starts, totals, initial, plan, decay=kind)
    before = starts if plan.split else initial
    run_walk(q, k, v, o, plan, scale=scale, state=before, split=plan.split, final=state, decay=kind, g=g)
    return o, state, starts


def _start(initial: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    return like.new_zeros(shape, dtype=torch.float32) if initial is None else initial.float().clone()


def _kept(q: Tensor, v: Tensor, plan: Plan) -> tuple[int, ...]:
    return plan.kept, v.shape[2], q.shape[3], v.shape[3]


def _slices(heads: int, groups: int) -> Iterator[tuple[slice, slice]]:
    """Heads, and their groups, whose gradients are computed together."""
    share = heads // groups
    if share <= TOGETHER:
        yield slice(0, heads), slice(0, groups)
        return
    for group in range(groups):
        for first in range(0, share, TOGETHER):
            start = group * share
            yield slice(start + first, start + min(first + TOGETHER, share)), slice(group, group + 1)


@torch.library.custom_op("seqzoo::gated_linear_attention_triton_backward", mutates_args=())
def _backward(
    do: Tensor,
    dstate: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    initial: Tensor | None,
    state: Tensor,
    starts: Tensor,
    scale: float,
    chunk: int | None,
    decays: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v, the log decay (empty unless `decays`) and the initial state."""
    plan, kind = _plan(q, v, g, chunk), _kind(g)
    shape = g.shape if decays else (0,)
    if plan.total == 0:
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        return dq, dk, dv, dstate.new_zeros(shape), dstate.clone()
    do = readable(do if scale == 1 else do * scale)
    q, k, v, g = readable(q), readable(k), readable(v), _spread(g, q, v)
    dstate = dstate.contiguous()
    dq, dk = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k))
    dv, dinitial = torch.empty_like(v, memory_format=torch.contiguous_format), torch.empty_like(dstate)
    ends = dstate
    if plan.split:
        ends, _, totals = run_fold(q, do, plan, decay=kind, g=g, reverse=True)
        run_scan(ends, totals, dstate, plan, decay=kind, reverse=True)
    before = starts if plan.split else initial
    back: dict[str, Any] = {"reverse": True, "split": plan.split, "g": g}
    run_walk(k, q, do, dv, plan, state=ends, final=dinitial, decay=kind, **back)
    kind = COLUMN if kind == KEY else kind
    heads, groups, key = v.shape[2], q.shape[2], q.shape[3]
    slabs = []
    sums_q, sums_k = (q.new_zeros(q.shape if heads > groups else 0, dtype=torch.float32) for _ in range(2))
    for of, among in _slices(heads, groups):
        hv, hdo, hg, hq, hk = v[:, :, of], do[:, :, of], g[:, :, of], q[:, :, among], k[:, :, among]
        number = hv.shape[2]
        shared = heads > groups
        out_q, out_k = (hv.new_empty(*hv.shape[:3], key, dtype=torch.float32) for _ in range(2)) if shared else (dq, dk)
        gradient: dict[str, Any] = {}
        if decays:
            columns = (1, key) if kind == COLUMN else (-(-key // column_block(plan.length, key)), 1)
            dg = do.new_empty(columns[0], *hv.shape[:3], columns[1], dtype=torch.float32)
            across = dg.new_empty(plan.total * -(-plan.size // plan.chunk), number, columns[0] * columns[1])
            gradient = {"dg": dg, "between": across}
            slabs.append(dg)
        mine = None if before is None else before[:, of].mT
        if decays:
            gradient["w"] = hq
        run_walk(hdo, hv, hk, out_q, plan, state=mine, split=plan.split, decay=kind, g=hg, **gradient)
        if decays:
            gradient["w"] = hk
            gradient["following"] = starts[:, of].mT if plan.split else None
            gradient["following_last"] = state[:, of].mT
        run_walk(hv, hdo, hq, out_k, plan, state=ends[:, of].mT, decay=kind, **back | {"g": hg}, **gradient)
        if shared:
            sums_q[:, :, among] += out_q.unflatten(2, (hq.shape[2], -1)).sum(3)
            sums_k[:, :, among] += out_k.unflatten(2, (hq.shape[2], -1)).sum(3)
    if heads > groups:
        dq, dk = sums_q.to(q.dtype), sums_k.to(k.dtype)
    if not decays:
        return dq, dk, dv, dstate.new_zeros(0), dinitial
    dg = torch.cat([part.sum(0) for part in slabs], 2) if len(slabs) > 1 else slabs[0].sum(0)
    return dq, dk, dv, dg.sum((0, 1), keepdim=True) if shape[:2] == (1, 1) else dg, dinitial


@_forward.register_fake
def _(q, k, v, g, initial, scale, chunk):
    plan = _plan(q, v, g, chunk)
    state = v.new_empty(v.shape[0], v.shape[2], q.shape[3], v.shape[3], dtype=torch.float32)
    return v.new_empty(v.shape), state, state.new_empty(_kept(q, v, plan))


@_backward.register_fake
def _(do, dstate, q, k, v, g, initial, state, starts, scale, chunk, decays):
    dg = dstate.new_empty(g.shape if decays else 0)
    return (*(t.new_empty(t.shape) for t in (q, k, v)), dg, dstate.new_empty(dstate.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, g, initial, scale, chunk = inputs
    ctx.save_for_backward(q, k, v, g, initial, *output[1:])
    ctx.options = scale, chunk


def _gradient(ctx: Any, do: Tensor, dstate: Tensor, dstarts: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, g, initial, state, starts = ctx.saved_tensors
    decays = ctx.needs_input_grad[3]
    dq, dk, dv, dg, dinitial = _backward(do, dstate, q, k, v, g, initial, state, starts, *ctx.options, decays)
    given = None if initial is None else dinitial.to(initial.dtype)
    return dq, dk, dv, dg.to(g.dtype) if decays else None, given, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)


def fused_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    initial: Tensor | None,
    *,
    scale: float,
    chunk: int | None = None,
    return_state: bool = True,
) -> tuple[Tensor, Tensor]:
    """`naive_gated_linear_attention` in Triton, which always has the last state.

    chunk: at most so many positions per product, None for the default.
    """
    o, state, _ = _forward(q, k, v, log_decay, initial, scale, chunk)
    return o, state
