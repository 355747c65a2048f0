"""Linear attention in Triton: the walk of fused_core.py without decays, and its form that is not causal.

B batch, L queries, S keys, H heads, K key width, V value width, N sequences of a packed row.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..packing import packed_bounds
from .fused_launch import (
    Plan,
    chunk_length,
    packed_segments,
    plan_packed,
    plan_rows,
    power,
    readable,
    run_fold,
    run_scan,
    run_walk,
)
from .naive import LinearState


def _plans(q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> tuple[Plan, Plan]:
    """Of the queries and of the keys."""
    (batch, length, heads, key), (source, value) = q.shape, (v.shape[1], v.shape[3])
    if cu_seqlens is not None:
        chunk = chunk_length(length, key, value, q.dtype, False, None)
        plan = plan_packed(packed_bounds(cu_seqlens, length), q.device, heads, value, length, chunk)
        return plan, plan
    plans = (
        plan_rows(batch, heads, value, size, chunk_length(size, key, value, q.dtype, False, None))
        for size in (length, source)
    )
    return next(plans), next(plans)


def _kept(q: Tensor, v: Tensor, cu_seqlens: Tensor | None) -> int:
    """Segments whose states are kept for the backward of the causal form."""
    (batch, length, heads, key), value = q.shape, v.shape[3]
    chunk = chunk_length(length, key, value, q.dtype, False, None)
    if cu_seqlens is None:
        return plan_rows(batch, heads, value, length, chunk).kept
    _, segments, split = packed_segments(cu_seqlens.shape[0] - 1, heads, value, length, chunk)
    return segments if split else 0


def _sums(
    y: Tensor, z: Tensor, plan: Plan, initial: Tensor | None, first: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor, Any, Any]:
    """Of `run_fold`, summed up: states and vectors before each segment and, with everything=True, after all."""
    sums, vectors, totals = run_fold(y, z, plan, **options)
    after: dict[str, Any] = {"reverse": options.get("reverse", False), "final": options.get("everything", False)}
    last = run_scan(sums, totals, initial, plan, **after)
    if not options.get("vector"):
        return sums, vectors, last, None
    column = None if first is None else first.unsqueeze(3)
    last_vector = run_scan(vectors.unsqueeze(3), totals, column, plan, **after)
    return sums, vectors, last, None if last_vector is None else last_vector.squeeze(3)


@torch.library.custom_op("seqzoo::linear_attention_triton", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    initial: Tensor | None,
    vector: Tensor | None,
    cu_seqlens: Tensor | None,
    causal: bool,
    normalize: bool,
    eps: float,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """o, denominators (B, L, H) or empty, S (B or N, H, K, V), z (B or N, H, K) or empty, and both before segments."""
    plan, sources = _plans(q, k, v, cu_seqlens)
    q, k, v = readable(q), readable(k), readable(v)
    vector = None if vector is None else vector.contiguous()
    (heads, key), value = q.shape[2:], v.shape[3]
    o = v.new_empty(*q.shape[:3], value)
    wide = v.new_empty(0, dtype=torch.float32)
    den = wide.new_empty(*q.shape[:2], heads if normalize else 0)
    starts = wide.new_empty(_kept(q, v, cu_seqlens) if causal else 0, heads, key, value)
    vectors = wide.new_empty(starts.shape[0] if normalize else 0, heads, key)
    ones = int(normalize)
    options: dict[str, Any] = {"scale": scale, "eps": eps, "den": den if normalize else None}
    if not causal:
        _, _, s, z = _sums(k, v, sources, initial, vector, vector=ones, everything=True)
        run_walk(q, k, v, o, plan, causal=False, state=s, vector=z, **options)
        return o, den, s, wide.new_empty(0, heads, key) if z is None else z, starts, vectors
    # A sequence without a position leaves its state as it is.
    s = _start(initial, (plan.rows, heads, key, value), plan, wide)
    z = _start(vector, (plan.rows if normalize else 0, heads, key), plan, wide)
    if plan.split:
        starts, vectors, _, _ = _sums(k, v, plan, initial, vector, vector=ones)
        initial, vector = starts, vectors
    run_walk(
        q, k, v, o, plan, state=initial, vector=vector, split=plan.split, final=s, final_vector=z, **options
    )  # fmt: skip
    return o, den, s, z, starts, vectors


def _start(initial: Tensor | None, shape: tuple[int, ...], plan: Plan, like: Tensor) -> Tensor:
    """Memory for a last state: the first where a sequence may be empty, as the walk writes nothing for those."""
    if (plan.length and plan.table is None) or 0 in shape:
        return like.new_empty(shape)
    return like.new_zeros(shape) if initial is None else initial.float().clone(memory_format=torch.contiguous_format)


@triton.jit
def cotangent(
    do, o, den, out, last, rows, scale, N: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, NORMALIZE: tl.constexpr
):
    """G = scale dO / den and the gradient of the denominator, -(G . O), of rows of N numbers."""
    row = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    n = tl.arange(0, BN)
    at = row[:, None] * N + n[None, :]
    inside = (row < rows)[:, None] & (n < N)[None, :]
    grad = tl.load(do + at, mask=inside, other=0.0).to(tl.float32) * scale
    if NORMALIZE:
        grad /= tl.load(den + row, mask=row < rows, other=1.0)[:, None]
        before = tl.load(o + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(last + row, -tl.sum(grad * before, 1), mask=row < rows)
    tl.store(out + at, grad.to(out.dtype.element_ty), mask=inside)


def _cotangent(do: Tensor, o: Tensor, den: Tensor, normalize: bool, scale: float) -> tuple[Tensor, Tensor | None]:
    """As the kernel; float16 becomes float32, because small quotients would leave its range."""
    if not normalize:
        return (do if scale == 1 else do * scale), None
    do, value = do.contiguous(), do.shape[3]
    rows = do.numel() // max(1, value)
    out = torch.empty_like(do, dtype=torch.float32 if do.dtype == torch.float16 else do.dtype)
    last = torch.empty_like(den)
    if rows and value:
        # den and o are as the forward made them: contiguous
        cotangent[(triton.cdiv(rows, 16),)](
            do, o, den, out, last, rows, scale, N=value, BN=power(value), R=16, NORMALIZE=True, num_warps=4
        )
    return out, last


@torch.library.custom_op("seqzoo::linear_attention_triton_backward", mutates_args=())
def _backward(
    do: Tensor,
    ds: Tensor,
    dz: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    den: Tensor,
    initial: Tensor | None,
    vector: Tensor | None,
    s: Tensor,
    z: Tensor,
    starts: Tensor,
    vectors: Tensor,
    cu_seqlens: Tensor | None,
    causal: bool,
    normalize: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and of the initial state, s and z."""
    plan, sources = _plans(q, k, v, cu_seqlens)
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    q, k, v = readable(q), readable(k), readable(v)
    ds, dz = ds.contiguous(), dz.contiguous()
    vector = None if vector is None else vector.contiguous()
    g, last = _cotangent(do, o, den, normalize, scale)
    g = readable(g)
    gradient = dz if normalize else None
    weights: dict[str, Any] = {"extra": last, "vector": 2 if normalize else 0}
    left: dict[str, Any] = {"extra": last, "column": 1 if normalize else 0}  # g has the column, v the ones
    right: dict[str, Any] = {"extra": last, "column": 2 if normalize else 0}
    if not causal:
        _, _, first, first_vector = _sums(q, g, plan, ds, gradient, everything=True, **weights)
        run_walk(g, v, k, dq, plan, causal=False, state=s.mT, vector=z, **left)
        run_walk(k, q, g, dv, sources, causal=False, state=first)
        run_walk(v, g, q, dk, sources, causal=False, state=first.mT, vector=first_vector, **right)
        return dq, dk, dv, first, torch.empty_like(dz) if first_vector is None else first_vector
    first, first_vector = _start(ds, ds.shape, plan, ds), _start(dz, dz.shape, plan, dz)
    ends, ends_vector = ds, gradient
    if plan.split:
        initial, vector = starts, vectors
        ends, ends_vector, _, _ = _sums(q, g, plan, ds, gradient, reverse=True, **weights)
    before = None if initial is None else initial.mT
    run_walk(g, v, k, dq, plan, state=before, vector=vector, split=plan.split, **left)
    back: dict[str, Any] = {"reverse": True, "split": plan.split}
    run_walk(k, q, g, dv, plan, state=ends, final=first, **back)
    unused = torch.empty_like(first).mT
    run_walk(
        v, g, q, dk, plan, state=ends.mT, vector=ends_vector, final=unused, final_vector=first_vector, **back, **right
    )
    return dq, dk, dv, first, first_vector


@_forward.register_fake
def _(q, k, v, initial, vector, cu_seqlens, causal, normalize, eps, scale):
    (heads, key), value = q.shape[2:], v.shape[3]
    rows = q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = v.new_empty(0, dtype=torch.float32)
    kept = _kept(q, v, cu_seqlens) if causal else 0
    return (
        v.new_empty(*q.shape[:3], value),
        wide.new_empty(*q.shape[:2], heads if normalize else 0),
        wide.new_empty(rows, heads, key, value),
        wide.new_empty(rows if normalize else 0, heads, key),
        wide.new_empty(kept, heads, key, value),
        wide.new_empty(kept if normalize else 0, heads, key),
    )


@_backward.register_fake
def _(do, ds, dz, q, k, v, o, den, initial, vector, s, z, starts, vectors, cu_seqlens, causal, normalize, scale):
    return (*(t.new_empty(t.shape) for t in (q, k, v)), ds.new_empty(ds.shape), dz.new_empty(dz.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    q, k, v, initial, vector, cu_seqlens, causal, normalize, _, scale = inputs
    o, den, *states = output
    ctx.save_for_backward(q, k, v, o, den, initial, vector, *states, cu_seqlens)
    ctx.options = causal, normalize, scale


def _gradient(ctx: Any, do: Tensor, dden: Tensor, ds: Tensor, dz: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    initial, vector = ctx.saved_tensors[5:7]
    dq, dk, dv, first, first_vector = _backward(do, ds, dz, *ctx.saved_tensors, *ctx.options)
    given = None if initial is None else first.to(initial.dtype)
    return dq, dk, dv, given, None if vector is None else first_vector.to(vector.dtype), *[None] * 5


_forward.register_autograd(_gradient, setup_context=_setup_context)


def fused_linear_attention(
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
    return_state: bool = True,
) -> tuple[Tensor, LinearState]:
    """`naive_linear_attention` in Triton, in time and memory linear in the length."""
    before, vector = (None, None) if initial is None else initial
    o, _, s, z, _, _ = _forward(q, k, v, before, vector, cu_seqlens, causal, normalize, eps, scale)
    return o, LinearState(s, z if normalize else None)
