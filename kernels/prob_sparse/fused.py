"""ProbSparse attention with a measure in Triton: sampled keys are read where they lie, scores stay on the chip.

Only the measure is ours: selection, the selected queries' attention and the lazy rows are those of chunked.py. The
sample is computed in the kernel, bit for bit as sampling.py has it. B batch, L queries, S keys, H heads, K key width,
U sampled keys.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .chunked import prob_sparse_chunked
from .sampling import KeySample, budgets

_FACTORS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def _mix(x):
    """`sampling._mix` in uint32, whose products wrap as its mask has them."""
    x = ((x >> 16) ^ x) * 0x45D9F3B
    x = ((x >> 16) ^ x) * 0x45D9F3B
    return (x >> 16) ^ x


@triton.jit
def _sampled(
    row, column, real, seed_ptr, index_ptr, order_ptr, keys, used, width, INDEX: tl.constexpr, ORDER: tl.constexpr
):  # fmt: skip
    """The keys (int64) in these columns of sample `row`, and which of them count. row and column broadcast; real: there
    is such a row."""
    inside = (column < width) & real
    if INDEX:
        rank = tl.load(index_ptr + row.to(tl.int64) * width + column, mask=inside, other=0)
        valid = inside & (rank < keys)
        rank = tl.minimum(rank, tl.maximum(keys - 1, 0))
    else:
        start = tl.load(seed_ptr).to(tl.uint32) + _mix((row + 1).to(tl.uint32))
        bits = _mix(_mix(start) + column.to(tl.uint32) * 0x9E3779B1)
        rank = (bits.to(tl.int64) * keys) >> 32
        valid = inside & (column < used)
    if ORDER:
        rank = tl.load(order_ptr + rank, mask=valid, other=0)
    return rank, valid


@triton.jit
def measure_kernel(
    q_ptr, k_ptr, seed_ptr, index_ptr, order_ptr, keys_ptr, used_ptr, out_ptr,
    tiles, length, source, heads, width, keys_stride,
    q_b, q_l, q_h, k_b, k_l, k_h,
    K: tl.constexpr, BQ: tl.constexpr, BU: tl.constexpr, BK: tl.constexpr, BLOCK: tl.constexpr,
    INDEX: tl.constexpr, ORDER: tl.constexpr, BY_KEYS: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """M (B, L, H) of BQ queries of one head. BLOCK = 1: each has a sample; else BLOCK of them in a row share one, and
    BQ divides BLOCK."""
    pid = tl.program_id(0)
    tile, head = pid % tiles, (pid // tiles).to(tl.int64)
    b, h = head // heads, head % heads
    keys = tl.load(keys_ptr + b * keys_stride)
    used = tl.load(used_ptr + b * keys_stride)
    rows, d = tile * BQ + tl.arange(0, BQ), tl.arange(0, BK)
    real = rows < length
    q = tl.load(
        q_ptr + b * q_b + h * q_h + rows.to(tl.int64)[:, None] * q_l + d[None, :],
        mask=real[:, None] & (d < K)[None, :],
        other=0.0,
    )
    k_base, order = k_ptr + b * k_b + h * k_h, order_ptr + b * source
    largest = tl.full([BQ], float("-inf"), tl.float32)
    total, number = tl.zeros([BQ], tl.float32), tl.zeros([BQ], tl.int32)
    for start in range(0, width, BU):
        column = start + tl.arange(0, BU)
        if BLOCK == 1:
            place, valid = _sampled(
                rows[:, None],
                column[None, :],
                real[:, None],
                seed_ptr,
                index_ptr,
                order,
                keys,
                used,
                width,
                INDEX,
                ORDER,
            )
            k = tl.load(
                k_base + place[:, :, None] * k_l + d[None, None, :],
                mask=valid[:, :, None] & (d < K)[None, None, :],
                other=0.0,
            )
            s = tl.sum(q.to(tl.float32)[:, None, :] * k.to(tl.float32), 2)
        else:
            place, valid = _sampled(
                tile * BQ // BLOCK, column, True, seed_ptr, index_ptr, order, keys, used, width, INDEX, ORDER
            )
            k = tl.load(k_base + place[None, :] * k_l + d[:, None], mask=valid[None, :] & (d < K)[:, None], other=0.0)
            s = tl.dot(q.to(FACTOR), k.to(FACTOR), input_precision=PRECISION)
            valid = tl.broadcast_to(valid[None, :], [BQ, BU])
        largest = tl.maximum(largest, tl.max(tl.where(valid, s, float("-inf")), 1))
        total += tl.sum(tl.where(valid, s, 0.0), 1)
        number += tl.sum(valid.to(tl.int32), 1)
    if BY_KEYS:
        divisor = tl.zeros([BQ], tl.float32) + keys.to(tl.float32)
    else:
        divisor = number.to(tl.float32)
    out = (b * length + rows) * heads + h
    tl.store(out_ptr + out, largest - total / tl.maximum(divisor, 1.0), mask=real)


def _tiles(dtype: torch.dtype, width: int, sampled: int, block: int) -> tuple[int, int, int]:
    """Queries and sampled keys of a step, and warps."""
    if block > 1:
        small = dtype == torch.float32 and width > 64
        return (32, 16, 4) if small else (64, 32, 4)
    keys = min(16, triton.next_power_of_2(sampled))
    return max(1, 8192 // (width * keys)), keys, 4


@torch.library.custom_op("seqzoo::prob_sparse_measure", mutates_args=())
def _measure(
    q: Tensor,
    k: Tensor,
    k_order: Tensor | None,
    keys: Tensor,
    used: Tensor,
    seed: Tensor,
    index: Tensor | None,
    sampled: int,
    divide_by_keys: bool,
    block: int,
) -> Tensor:
    """M (B, L, H), float32. keys, used: int64 (1,) or (B,), real keys of a row and how many it samples."""
    batch, length, heads, width = q.shape
    q, k = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k))
    out = torch.empty(batch, length, heads, dtype=torch.float32, device=q.device)
    padded = max(16, triton.next_power_of_2(width))
    rows, step, warps = _tiles(q.dtype, padded, sampled, block)
    tiles = -(-length // rows)
    # Triton's interpreter multiplies bfloat16 as if it were integers.
    widened = q.dtype == torch.bfloat16 and not isinstance(measure_kernel, triton.JITFunction)
    options: dict[str, Any] = {
        "FACTOR": tl.float32 if widened else _FACTORS[q.dtype],
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }
    with torch.cuda.device_of(q):
        measure_kernel[(tiles * batch * heads,)](
            q, k, seed, seed if index is None else index.contiguous(),
            seed if k_order is None else k_order.contiguous(), keys, used, out,
            tiles, length, k.shape[1], heads, sampled, int(keys.shape[0] > 1),
            *q.stride()[:3], *k.stride()[:3], K=width, BQ=rows, BU=step, BK=padded, BLOCK=block,
            INDEX=index is not None, ORDER=k_order is not None, BY_KEYS=divide_by_keys, num_warps=warps, **options,
        )  # fmt: skip
    return out


@_measure.register_fake
def _(q, k, k_order, keys, used, seed, index, sampled, divide_by_keys, block):
    return q.new_empty(q.shape[:3], dtype=torch.float32)


def fused_measure(
    q: Tensor,
    k: Tensor,
    k_order: Tensor | None,
    keys: Tensor,
    sample: KeySample,
    divide_by_keys: bool,
    block: int,
) -> Tensor:
    """`chunked._measure` without a copy of the sampled keys."""
    used = budgets(keys, sample.factor)
    return _measure(q, k, k_order, keys, used, sample.seed, sample.index, sample.width, divide_by_keys, block)


def fused_prob_sparse(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> Tensor:
    """`prob_sparse_naive` with the measure in one kernel; the rest, and all gradients, as `prob_sparse_chunked`."""
    return prob_sparse_chunked(q, k, v, measure=fused_measure, **options)
