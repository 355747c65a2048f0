"""The associative scan in Triton: Triton's own scan within a block of steps, a carried state from block to block.

Where the columns alone do not fill a GPU, chunks of time go at once: a first pass finds the product of a chunk's decays
and what the chunk ends with; these are a shorter recurrence of the same kind; the last pass starts each chunk from it.

O outer, T time, I inner: the tensors are (O, T, I). G chunks; BT, BI of a block.
"""

# ruff: noqa: E741 (I names a size)

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # elements of a block: one warp holds them
WARPS = 2048  # that keep a large GPU busy


@triton.jit
def combine(a_1, x_1, a_2, x_2):
    return a_1 * a_2, a_2 * x_1 + x_2


@triton.jit
def scan_blocks(
    a, x, initial, states, h, products, ends, before, first, da,
    T, I, G, chunk, a_o, a_t, a_i,
    BT: tl.constexpr, BI: tl.constexpr, REVERSE: tl.constexpr, SHIFT: tl.constexpr, ENDS: tl.constexpr,
    GRADIENT: tl.constexpr,
):  # fmt: skip
    """h (O, T, I) of a chunk, from `initial` (O, I) or the state (O, G, I) before it. Step t decays by a_{t + SHIFT}.

    ENDS: only the product of the decays and the state from 0 at the end, both (O, G, I).
    GRADIENT: of a scan that gave `before` from `first`, in the other direction: da_t = h_t before_{t-1} too.
    """
    blocks = tl.cdiv(I, BI)
    part = tl.program_id(0) // blocks
    i = tl.program_id(0) % blocks * BI + tl.arange(0, BI)
    o, g = (part // G).to(tl.int64), part % G
    start = g * chunk
    stop = min(T, start + chunk)
    real_i = i < I
    product = tl.full((BI,), 1.0, tl.float32)
    carry = tl.zeros((BI,), tl.float32)
    if not ENDS:
        origin = G - 1 if REVERSE else 0
        if g == origin:
            carry = tl.load(initial + o * I + i, mask=real_i, other=0.0).to(tl.float32)
        else:
            before_g = o * G + (g + 1 if REVERSE else g - 1)
            carry = tl.load(states + before_g * I + i, mask=real_i, other=0.0).to(tl.float32)
    number = tl.cdiv(stop - start, BT)
    for s in range(number):
        low = start + (number - 1 - s if REVERSE else s) * BT
        t = low + tl.arange(0, BT)
        real = (t < stop)[:, None] & real_i[None, :]
        at = (o * T + t)[:, None] * I + i[None, :]
        met = real & ((t + SHIFT >= 0) & (t + SHIFT < T))[:, None]
        at_a = a + o * a_o + (t + SHIFT).to(tl.int64)[:, None] * a_t + i[None, :] * a_i
        # Steps that are none keep the state: decay 1, input 0.
        decay = tl.load(at_a, mask=met, other=1.0).to(tl.float32)
        value = tl.load(x + at, mask=real, other=0.0).to(tl.float32)
        power, value = tl.associative_scan((decay, value), 0, combine, reverse=REVERSE)
        value += power * carry[None, :]
        last = (t == (low if REVERSE else low + BT - 1))[:, None]
        carry = tl.sum(tl.where(last, value, 0.0), 0)
        if ENDS:
            product *= tl.sum(tl.where(last, power, 0.0), 0)
        else:
            tl.store(h + at, value.to(h.dtype.element_ty), mask=real)
        if GRADIENT:
            step: tl.constexpr = -1 if REVERSE else 1
            inside = ((t + step >= 0) & (t + step < T))[:, None]
            old = tl.load(before + at + step * I, mask=real & inside, other=0.0).to(tl.float32)
            origin_I = tl.load(first + o * I + i, mask=real_i, other=0.0).to(tl.float32)
            old = tl.where(inside, old, origin_I[None, :])
            tl.store(da + at, (value * old).to(da.dtype.element_ty), mask=real)
    if ENDS:
        tl.store(products + (o * G + g) * I + i, product, mask=real_i)
        tl.store(ends + (o * G + g) * I + i, carry, mask=real_i)


class Launch(NamedTuple):
    """rows, columns: of a block of steps. chunk: steps of a chunk. number: of chunks."""

    rows: int
    columns: int
    chunk: int
    number: int


def plan(outer: int, length: int, inner: int) -> Launch:
    columns = min(64, triton.next_power_of_2(inner))
    rows = min(max(8, BLOCK // columns), triton.next_power_of_2(length))
    warps = outer * triton.cdiv(inner, columns)
    number = 1 if 4 * warps >= WARPS else max(1, min(WARPS // warps, length // (4 * rows)))
    chunk = triton.cdiv(triton.cdiv(length, number), rows) * rows
    return Launch(rows, columns, chunk, triton.cdiv(length, chunk))


def _launch(
    a: Tensor,
    x: Tensor,
    initial: Tensor,
    h: Tensor,
    *,
    reverse: bool,
    shift: int = 0,
    gradient: tuple[Tensor, ...] = (),
) -> None:
    """Fill h (O, T, I), contiguous like x and initial (O, I); a: (O, T, I) in any strides."""
    outer, length, inner = x.shape
    rows, columns, chunk, number = plan(outer, length, inner)
    before, first, da = gradient or (x, initial, h)
    states = products = ends = initial
    grid = (outer * number * triton.cdiv(inner, columns),)
    shape = (length, inner, number, chunk, *a.stride())
    options = {"BT": rows, "BI": columns, "REVERSE": reverse, "SHIFT": shift, "num_warps": 1}
    if number > 1:
        products, ends, states = (
            torch.empty(outer, number, inner, device=x.device, dtype=torch.float32) for _ in range(3)
        )
        scan_blocks[grid](
            a, x, initial, states, h, products, ends, before, first, da, *shape, ENDS=True, GRADIENT=False, **options
        )
        _launch(products, ends, initial, states, reverse=reverse)
    scan_blocks[grid](
        a, x, initial, states, h, products, ends, before, first, da,
        *shape, ENDS=False, GRADIENT=bool(gradient), **options,
    )  # fmt: skip


def _three(t: Tensor, shape: torch.Size, dim: int) -> Tensor:
    """As (O, T, I), broadcast to the shape: a view where its strides allow one."""
    return t.expand(shape).reshape(math.prod(shape[:dim]), shape[dim], math.prod(shape[dim + 1 :]))


@torch.library.custom_op("seqzoo::associative_scan_triton", mutates_args=())
def _scan(a: Tensor, x: Tensor, initial: Tensor, dim: int, reverse: bool) -> Tensor:
    h = torch.empty_like(x, memory_format=torch.contiguous_format)
    if h.numel():
        wide = _three(x.contiguous(), x.shape, dim)
        start = initial.reshape(wide.shape[0], wide.shape[2]).contiguous()
        _launch(_three(a, x.shape, dim), wide, start, h.view(wide.shape), reverse=reverse)
    return h


@torch.library.custom_op("seqzoo::associative_scan_triton_backward", mutates_args=())
def _backward(
    dh: Tensor, a: Tensor, h: Tensor, initial: Tensor, dim: int, reverse: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of a, x and the initial state."""
    if h.numel() == 0:
        return torch.zeros_like(a), torch.zeros_like(dh), torch.zeros_like(initial)
    dx = torch.empty_like(h)
    da = torch.empty_like(h, dtype=a.dtype if a.shape == h.shape else torch.float32)
    wide, decays = _three(dh.contiguous(), h.shape, dim), _three(a, h.shape, dim)
    start = initial.reshape(wide.shape[0], wide.shape[2]).contiguous()
    gradient = (h.view(wide.shape), start, da.view(wide.shape))
    nothing, shift = torch.zeros_like(start), -1 if reverse else 1
    _launch(decays, wide, nothing, dx.view(wide.shape), reverse=not reverse, shift=shift, gradient=gradient)
    first = h.shape[dim] - 1 if reverse else 0
    dinitial = a.expand(h.shape).select(dim, first).float() * dx.select(dim, first)
    return da.sum_to_size(a.shape).to(a.dtype), dx, dinitial.to(initial.dtype).contiguous()


@_scan.register_fake
def _(a, x, initial, dim, reverse):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@_backward.register_fake
def _(dh, a, h, initial, dim, reverse):
    return a.new_empty(a.shape), torch.empty_like(h), initial.new_empty(initial.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, initial, ctx.dim, ctx.reverse = inputs
    ctx.save_for_backward(a, initial, output)


def _gradient(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    a, initial, h = ctx.saved_tensors
    return (*_backward(dh, a, h, initial, ctx.dim, ctx.reverse), None, None)


_scan.register_autograd(_gradient, setup_context=_setup_context)


def fused_associative_scan(a: Tensor, x: Tensor, initial: Tensor, dim: int, reverse: bool) -> Tensor:
    """`naive_associative_scan`, computed in float32, in the dtype of x; no second derivatives."""
    return _scan(a, x, initial, dim, reverse)
