"""Sizes of blocks and segments, and the calls of the kernels in fused_core.py and fused_walk.py."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .fused_core import fold, scan
from .fused_walk import walk

# Programs that keep a large GPU busy: two for each of 132 multiprocessors; from ENOUGH on no row is split.
BUSY, ENOUGH = 264, 160
# Chunks that a segment has at least.
SHORTEST = 4
NO_DECAY, CONSTANT, HEAD, KEY, COLUMN = range(5)


class Plan(NamedTuple):
    """How rows are cut: sequences into segments of `size` positions, those into chunks of `chunk`.

    segments: of each sequence, or the most that all packed ones can have. table: int32 (segments, 5), of packed
    sequences: number, first and last position + 1, is first, is last; firsts: int32 (N + 1,), where each one's begin.
    """

    rows: int
    length: int
    chunk: int
    size: int
    segments: int
    split: bool
    total: int
    table: Tensor | None = None
    firsts: Tensor | None = None

    @property
    def kept(self) -> int:
        """Segments for which memory is taken: known before the bounds of packed sequences are."""
        return 0 if not self.split else self.segments if self.firsts is not None else self.total


def power(size: int) -> int:
    """The power of two that covers `size`, at least the 16 that a product needs."""
    return max(16, triton.next_power_of_2(size))


def ceil_div(a: int, b: int) -> int:
    """How many of b cover a; for the sizes of a traced graph too."""
    return -(-a // b)


def chunk_length(length: int, key: int, value: int, dtype: torch.dtype, channels: bool, wanted: int | None) -> int:
    """Positions that go through dense products together."""
    width = max(key, value)
    short = channels or dtype == torch.float32 or (dtype == torch.float16 and width > 64)
    largest = 16 if dtype != torch.bfloat16 and width > 128 else 32 if short else 64
    covering = 16 if length <= 16 else 32 if length <= 32 else 64  # comparisons, which a traced length allows
    return max(16, min(largest, wanted or largest, covering))


def column_block(length: int, width: int) -> int:
    """Columns of the state that one program keeps: few for short inputs, which only load and store it."""
    return min(16 if length <= 16 else 64, power(width))


def cut(rows: int, heads: int, width: int, length: int, chunk: int) -> tuple[int, int, bool]:
    """Size of a segment, segments of a row and whether there are several."""
    programs = rows * heads * ceil_div(width, column_block(length, width))
    several = 1 if programs >= ENOUGH else ceil_div(BUSY, max(1, programs))
    size = max(SHORTEST * chunk, ceil_div(ceil_div(length, several), chunk) * chunk)
    segments = ceil_div(length, size)
    return size, segments, segments > 1


def plan_rows(rows: int, heads: int, width: int, length: int, chunk: int) -> Plan:
    size, segments, split = cut(rows, heads, width, length, chunk)
    return Plan(rows, length, chunk, size, segments, split, rows * segments)


def packed_segments(sequences: int, heads: int, width: int, length: int, chunk: int) -> tuple[int, int, bool]:
    """As `cut`, of packed sequences whose bounds are not known: the most segments there can be."""
    size, _, split = cut(1, heads, width, length, chunk)
    return size, length // size + sequences, split


def plan_packed(bounds: list[int], device: torch.device, heads: int, width: int, length: int, chunk: int) -> Plan:
    """Of sequences between `bounds`. Raises ValueError for bounds that do not rise from 0 to the length."""
    if bounds[0] != 0 or bounds[-1] != length or any(a > b for a, b in pairwise(bounds)):
        raise ValueError(f"cu_seqlens={bounds} must rise from 0 to the length of the packed row, {length}")
    size, most, split = packed_segments(len(bounds) - 1, heads, width, length, chunk)
    table, firsts = [], [0]
    for number, (start, stop) in enumerate(pairwise(bounds)):
        for at in range(start, stop, size):
            table.append((number, at, min(at + size, stop), at == start, at + size >= stop))
        firsts.append(len(table))
    cuts = torch.tensor(table, dtype=torch.int32).view(-1, 5).to(device)
    begins = torch.tensor(firsts, dtype=torch.int32).to(device)
    return Plan(len(bounds) - 1, length, chunk, size, most, split, len(table), cuts, begins)


def _operands(dtype: torch.dtype) -> tuple[Any, str]:
    """What products are taken in. float16 goes through tf32, which holds its digits and a state beyond 65504."""
    if dtype == torch.bfloat16:
        # Triton's interpreter multiplies bfloat16 as if it were integers.
        return tl.bfloat16 if isinstance(walk, triton.JITFunction) else tl.float32, "ieee"
    return tl.float32, "tf32" if dtype == torch.float16 else "tf32x3"


def readable(x: Tensor) -> Tensor:
    """x with its last axis contiguous."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(x: Tensor | None, number: int) -> tuple[int, ...]:
    return (0,) * number if x is None else x.stride()[:number]


def _levels(decay: int, chunk: int) -> int:
    return chunk.bit_length() - 1 if decay in (KEY, COLUMN) else 0


def run_fold(
    y: Tensor,
    z: Tensor,
    plan: Plan,
    *,
    decay: int = NO_DECAY,
    g: Tensor | None = None,
    extra: Tensor | None = None,
    vector: int = 0,
    reverse: bool = False,
    everything: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the segments (segments, H, M, N), (segments, H, M) or empty, and their decays."""
    heads, m, n = z.shape[2], y.shape[3], z.shape[3]
    op, precision = _operands(y.dtype)
    kept = max(plan.total, plan.kept)
    sums = z.new_empty(kept, heads, m, n, dtype=torch.float32)
    vectors = z.new_empty(kept if vector else 0, heads, m, dtype=torch.float32)
    totals = z.new_empty(kept if decay else 0, heads, *([m] if decay == KEY else []), dtype=torch.float32)
    block = min(64, power(n))
    blocks = ceil_div(n, block)
    if plan.total and heads and m and n:
        fold[(plan.total * heads * blocks,)](
            y, z, y if g is None else g, y if extra is None else extra, sums, vectors, totals,
            plan.table if plan.table is not None else y,
            *_strides(y, 3), *_strides(z, 3), *_strides(g, 3), *_strides(extra, 3),
            plan.length, plan.size, plan.segments, heads, heads // y.shape[2],
            M=m, N=n, BM=power(m), BN=block, NB=blocks, C=plan.chunk, OP=op, PRECISION=precision, DECAY=decay,
            VECTOR=vector, REVERSE=reverse, ALL=everything, PACKED=plan.table is not None,
            num_warps=_warps(y.dtype, m, block, plan.chunk), num_stages=_stages(y.dtype, m),
        )  # fmt: skip
    return sums, vectors, totals


def _warps(dtype: torch.dtype, m: int, block: int, chunk: int, more: bool = False) -> int:
    """Warps of a program: as many as keep its registers from spilling far; more: for what keeps more in them."""
    if power(m) * block <= 16 * 64 and chunk <= 32:
        return 2
    return 8 if power(m) > 128 or (power(m) > 64 and (more or dtype != torch.bfloat16)) else 4


def _stages(dtype: torch.dtype, m: int) -> int:
    """Of loads that run ahead; two copies of wide float32 rows do not fit into shared memory."""
    return 1 if dtype == torch.float32 and power(m) > 128 else 2


def run_scan(
    sums: Tensor,
    totals: Tensor,
    initial: Tensor | None,
    plan: Plan,
    *,
    decay: int = NO_DECAY,
    reverse: bool = False,
    final: bool = False,
) -> Tensor | None:
    """Turns sums (segments, H, M, N) into the state before each (after, if reverse); with `final` returns the last."""
    heads, m, n = sums.shape[1:]
    last = sums.new_empty(plan.rows, heads, m, n) if final else None
    block = min(1024, triton.next_power_of_2(max(1, m * n)))
    if plan.rows and heads and m * n:
        scan[(plan.rows * heads * ceil_div(m * n, block),)](
            sums, totals, initial if initial is not None else sums, last if last is not None else sums,
            plan.firsts if plan.firsts is not None else sums, *_strides(initial, 4), plan.segments, heads,
            M=m, N=n, BLOCK=block, DECAY=decay, REVERSE=reverse, INITIAL=initial is not None, FINAL=final,
            PACKED=plan.firsts is not None,
        )  # fmt: skip
    return last


def run_walk(
    x: Tensor,
    y: Tensor,
    z: Tensor,
    out: Tensor,
    plan: Plan,
    *,
    causal: bool = True,
    reverse: bool = False,
    scale: float = 1.0,
    state: Tensor | None = None,
    vector: Tensor | None = None,
    split: bool = False,
    final: Tensor | None = None,
    final_vector: Tensor | None = None,
    decay: int = NO_DECAY,
    g: Tensor | None = None,
    den: Tensor | None = None,
    eps: float = 0.0,
    extra: Tensor | None = None,
    column: int = 0,
    w: Tensor | None = None,
    dg: Tensor | None = None,
    between: Tensor | None = None,
    following: Tensor | None = None,
    following_last: Tensor | None = None,
) -> None:
    """`fused_walk.walk` into out (B, L, H, N); z may have fewer heads, and so may x and y."""
    heads, m, n = out.shape[2], x.shape[3], out.shape[3]
    op, precision = _operands(x.dtype)
    block = column_block(plan.length, n)
    blocks = ceil_div(n, block)
    beside = den if den is not None else extra
    if not (plan.total and heads and m and n):
        return

    def some(t: Tensor | None) -> Tensor:
        return out if t is None else t

    walk[(plan.total * heads * blocks,)](
        x, y, z, some(w), out, some(g), some(extra), some(den), some(dg), some(between), some(state), some(vector),
        some(final), some(final_vector), some(following), some(following_last), some(plan.table),
        *_strides(x, 3), *_strides(y, 3), *_strides(z, 3), *_strides(w, 3), *_strides(out, 3), *_strides(g, 3),
        *_strides(beside, 3), *_strides(dg, 4), *_strides(state, 4), *_strides(vector, 2), *_strides(final, 4),
        *_strides(final_vector, 2), *_strides(following, 4), *_strides(following_last, 4),
        plan.length, plan.size, plan.segments, heads, heads // x.shape[2], heads // z.shape[2], scale, eps,
        M=m, N=n, BM=power(m), BN=block, NB=blocks, C=plan.chunk, LEVELS=_levels(decay, plan.chunk), OP=op,
        PRECISION=precision, CAUSAL=causal, REVERSE=reverse, DECAY=decay, NORMALIZE=den is not None, EXTRA=column,
        GRADIENT=dg is not None, SPLIT=split, INITIAL=state is not None, FINAL=final is not None,
        PACKED=plan.table is not None, num_warps=_warps(x.dtype, m, block, plan.chunk, decay >= KEY or dg is not None),
        num_stages=_stages(x.dtype, m),
    )  # fmt: skip
