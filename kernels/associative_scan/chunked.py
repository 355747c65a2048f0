"""The linear recurrence in place: step after step where a step is long, else a tree in chunks of the sequence.

What a chunk needs besides its result is its decays, which the tree uses up (README.md).
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# A call of PyTorch costs as much as some thousand elements: a step as long goes by itself, in two thirds of the
# tree's work; shorter steps go by the tree, in calls on all pairs of a level. (On a GPU a call costs far more.)
LONG_STEP = {"cpu": 4096, "cuda": 1 << 20}
BUFFER = {"cpu": 1 << 18, "cuda": 1 << 24}  # elements of a chunk: as many as stay in the cache of a CPU core


def scan_(a: Tensor, x: Tensor, *, reverse: bool = False) -> None:
    """x_t <- x_t + a_t x_{t-1}, t = 1, 2, ..., in place (reverse: x_t + a_t x_{t+1}, from the end); uses up a.

    a, x: (T, ...), any strides. Each x_t is a sum over s <= t only, in an order that the sizes decide; the first
    a (reverse: the last) is not used.
    """
    if x.shape[0] and x[0].numel() >= LONG_STEP.get(x.device.type, LONG_STEP["cuda"]):
        _loop_(a, x, reverse)
    else:
        _tree_(a, x, reverse)


def _loop_(a: Tensor, x: Tensor, reverse: bool) -> None:
    steps = list(zip(a.unbind(0), x.unbind(0), strict=True))
    if reverse:
        steps.reverse()
    for (_, before), (decay, here) in pairwise(steps):
        here.addcmul_(decay, before)


def _tree_(a: Tensor, x: Tensor, reverse: bool) -> None:
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


@torch.library.custom_op("seqzoo::associative_scan", mutates_args=())
def _scan(a: Tensor, x: Tensor, initial: Tensor, dim: int, reverse: bool) -> Tensor:
    h = x.clone(memory_format=torch.contiguous_format)
    if h.numel() == 0:
        return h
    h_T = h.movedim(dim, 0)  # time first, a view
    a_T = a.resolve_conj().movedim(dim, 0)
    if a_T.shape[0] == 1:
        a_T = a_T.expand(h_T.shape[0], *a_T.shape[1:])
    length, kind = h_T.shape[0], h.device.type
    with torch.autocast(kind, enabled=False):
        first = length - 1 if reverse else 0
        h_T[first].addcmul_(a_T[first], initial)
        if h_T[0].numel() >= LONG_STEP.get(kind, LONG_STEP["cuda"]):
            _loop_(a_T, h_T, reverse)  # reads a, so its broadcast costs nothing
            return h
        chunk = max(2, BUFFER.get(kind, BUFFER["cuda"]) // h_T[0].numel())
        # Neighbouring chunks share a step: the last of one is the first of the next.
        for start in range(0, max(1, length - 1), chunk - 1):
            at = slice(max(0, length - start - chunk), length - start) if reverse else slice(start, start + chunk)
            part = h_T[at]
            _tree_(a_T[at].expand_as(part).clone(), part, reverse)
    return h


@_scan.register_fake
def _(a, x, initial, dim, reverse):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, _, initial, ctx.dim, ctx.reverse = inputs
    ctx.save_for_backward(a, initial, output)


def _gradient(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
    """With g_t = dh_t + conj(a_{t+1}) g_{t+1}: dx = g, da_t = g_t conj(h_{t-1}), dh_0 = conj(a_1) g_1."""
    a, initial, h = ctx.saved_tensors
    dim, reverse, length = ctx.dim, ctx.reverse, h.shape[ctx.dim]
    if length == 0:
        return torch.zeros_like(a), dh, torch.zeros_like(initial), None, None
    # The first step, where all but the first begin, and where the steps before those begin.
    first, rest, others = (length - 1, 0, 1) if reverse else (0, 1, 0)
    decay = a.conj()
    shifted = decay
    if a.shape[dim] > 1:  # the decay of the next step; the one at the end meets no state
        parts = decay.narrow(dim, rest, length - 1), decay.narrow(dim, first, 1)
        shifted = torch.cat(parts[::-1] if reverse else parts, dim)
    g = _scan(shifted, dh, torch.zeros_like(initial), dim, not reverse)
    last = decay.select(dim, first if a.shape[dim] > 1 else 0)
    da = None
    if ctx.needs_input_grad[0]:
        pieces = initial.unsqueeze(dim), h.narrow(dim, others, length - 1)
        before = torch.cat(pieces[::-1] if reverse else pieces, dim)
        da = (g * before.conj()).sum_to_size(a.shape)
    return da, g, last * g.select(dim, first), None, None


_scan.register_autograd(_gradient, setup_context=_setup_context)


def chunked_associative_scan(a: Tensor, x: Tensor, initial: Tensor, dim: int, reverse: bool) -> Tensor:
    """`naive_associative_scan` in time linear in the length, in few calls."""
    return _scan(a, x, initial, dim, reverse)
