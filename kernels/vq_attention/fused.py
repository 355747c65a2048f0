"""VQ attention in Triton, forwards: the window and the cells in one online softmax, scores on the chip.

Blocks come in groups of G. A group has one table of cells: of what is far from all of its blocks. Between that and the
window lie at most G blocks (on either side), whose keys are read one by one, as their codewords. So a table is kept
for G blocks instead of one for each, and a query reads about M + G C keys. README.md has the definition.

B batch, L queries, S keys, H heads, K key width, V value width, M codes, C block length, N blocks.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .state import VQState

LOG2_E = 1.4426950408889634
_FACTORS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


@triton.jit
def cell_kernel(
    v_ptr, code_ptr, lengths_ptr, number_ptr, total_ptr,
    source, heads, codes, segments, first, size, v_b, v_l, v_h,
    V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BV: tl.constexpr,
    LENGTHS: tl.constexpr, FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Tokens of BM cells and the sums of their values, number (B, H, P, M) and total (B, H, P, M, V), for one of P
    segments: segment p has the tokens first + p size .. first + (p + 1) size - 1. A product with the indicator of the
    codes: no atomic addition."""
    cell = tl.program_id(0) * BM + tl.arange(0, BM)
    segment = tl.program_id(1)
    row = tl.program_id(2).to(tl.int64)
    b, h = row // heads, row % heads
    dv = tl.arange(0, BV)
    end = tl.minimum(source, first + (segment + 1) * size)
    if LENGTHS:
        end = tl.minimum(end, tl.load(lengths_ptr + b).to(tl.int32))
    number, total = tl.zeros([BM], tl.float32), tl.zeros([BM, BV], tl.float32)
    for start in range(tl.maximum(first + segment * size, 0), end, BN):
        token = start + tl.arange(0, BN)
        there = token < end
        code = tl.load(code_ptr + (b * source + token) * heads + h, mask=there, other=-1)
        v = tl.load(
            v_ptr + b * v_b + h * v_h + token.to(tl.int64)[:, None] * v_l + dv[None, :],
            mask=there[:, None] & (dv < V)[None, :],
            other=0.0,
        )
        own = (cell[:, None] == code[None, :]) & there[None, :]
        number += tl.sum(own.to(tl.float32), 1)
        total = tl.dot(own.to(FACTOR), v.to(FACTOR), total, input_precision=PRECISION)
    to = (row * segments + segment) * codes + cell
    tl.store(number_ptr + to, number, mask=cell < codes)
    tl.store(total_ptr + to[:, None] * V + dv[None, :], total, mask=(cell < codes)[:, None] & (dv < V)[None, :])


@triton.jit
def _absorb(top, total, acc, s, v, FACTOR: tl.constexpr, PRECISION: tl.constexpr):
    """The online softmax after the scores s (BM, BN), in powers of two, of values v (BN, BV)."""
    high = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(high == float("-inf"), 0.0, high)
    p = tl.exp2(s - shift[:, None])
    keep = tl.exp2(top - shift)
    acc = tl.dot(p.to(FACTOR), v.to(FACTOR), acc * keep[:, None], input_precision=PRECISION)
    return high, total * keep + tl.sum(p, 1), acc


@triton.jit
def attend_kernel(
    q_ptr, k_ptr, v_ptr, code_ptr, book_ptr, bias_ptr, lengths_ptr, number_ptr, mean_ptr, o_ptr,
    tiles, per_block, length, source, heads, codes, groups, group, chunk, entries, scale,
    q_b, q_l, q_h, k_b, k_l, k_h, v_b, v_l, v_h,
    K: tl.constexpr, V: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, BV: tl.constexpr,
    WINDOW: tl.constexpr, CAUSAL: tl.constexpr, BIAS: tl.constexpr, LENGTHS: tl.constexpr, LOG2_E: tl.constexpr,
    FACTOR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """o (B, L, H, V) of BM queries of one block and head. `group` blocks share a table of cells (B, H, groups, M)."""
    pid = tl.program_id(0)
    tile, row = pid % tiles, (pid // tiles).to(tl.int64)
    b, h = row // heads, row % heads
    block = tile // per_block
    inside = tile % per_block * BM + tl.arange(0, BM)
    i = block * chunk + inside
    real = (inside < chunk) & (i < length)
    d, dv, n = tl.arange(0, BK), tl.arange(0, BV), tl.arange(0, BN)
    q = tl.load(
        q_ptr + b * q_b + h * q_h + i.to(tl.int64)[:, None] * q_l + d[None, :],
        mask=real[:, None] & (d < K)[None, :],
        other=0.0,
    ).to(FACTOR)
    top, total = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    book = book_ptr + h * codes * K
    held = block // group
    if WINDOW:
        end = source
        if LENGTHS:
            end = tl.minimum(source, tl.load(lengths_ptr + b).to(tl.int32))
        v_base, k_base = v_ptr + b * v_b + h * v_h, k_ptr + b * k_b + h * k_h
        low = tl.maximum((held * group - 1) * chunk, 0)  # the table has what lies before ..
        near, past = tl.maximum((block - 1) * chunk, 0), (block + 2) * chunk
        high = ((held + 1) * group + 1) * chunk  # .. and, where the future is seen, what lies from here on
        if CAUSAL:
            past = tl.minimum((block + 1) * chunk, block * chunk + (tile % per_block + 1) * BM)
            high = past
        past, high = tl.minimum(past, end), tl.minimum(high, end)
        # Keys that are far, yet not in the table, before the window and behind it: as codewords.
        before = tl.cdiv(tl.maximum(tl.minimum(near, end) - low, 0), BN)
        behind = tl.cdiv(tl.maximum(high - past, 0), BN)
        for step in range(before + behind):
            start = tl.where(step < before, low + step * BN, past + (step - before) * BN)
            j = start + n
            there = j < tl.where(step < before, tl.minimum(near, end), high)
            code = tl.load(code_ptr + (b * source + j) * heads + h, mask=there, other=0)
            c = tl.load(book + code[None, :] * K + d[:, None], mask=there[None, :] & (d < K)[:, None], other=0.0)
            s = tl.dot(q, c.to(FACTOR), input_precision=PRECISION) * (scale * LOG2_E)
            v = tl.load(
                v_base + j.to(tl.int64)[:, None] * v_l + dv[None, :],
                mask=there[:, None] & (dv < V)[None, :],
                other=0.0,
            )
            s = tl.where(there[None, :], s, float("-inf"))
            top, total, acc = _absorb(top, total, acc, s, v, FACTOR, PRECISION)
        for start in range(near, past, BN):
            j = start + n
            there = j < past
            k = tl.load(
                k_base + j.to(tl.int64)[None, :] * k_l + d[:, None],
                mask=there[None, :] & (d < K)[:, None],
                other=0.0,
            )
            s = tl.dot(q, k.to(FACTOR), input_precision=PRECISION) * (scale * LOG2_E)
            visible = tl.broadcast_to(there[None, :], [BM, BN])
            distance = i[:, None] - j[None, :]
            if CAUSAL:
                visible &= distance >= 0
            if BIAS:
                entry = distance
                if not CAUSAL:
                    entry += 2 * chunk - 1
                s += tl.load(bias_ptr + h * entries + entry, mask=visible & real[:, None], other=0.0) * LOG2_E
            v = tl.load(
                v_base + j.to(tl.int64)[:, None] * v_l + dv[None, :],
                mask=there[:, None] & (dv < V)[None, :],
                other=0.0,
            )
            s = tl.where(visible, s, float("-inf"))
            top, total, acc = _absorb(top, total, acc, s, v, FACTOR, PRECISION)
    table = (row * groups + held) * codes
    seen = codes
    if CAUSAL:
        seen = tl.where(held > 0, codes, 0)
    for start in range(0, seen, BN):
        cell = start + n
        number = tl.load(number_ptr + table + cell, mask=cell < codes, other=0.0)
        there = number > 0
        c = tl.load(book + cell[None, :] * K + d[:, None], mask=there[None, :] & (d < K)[:, None], other=0.0)
        mean = tl.load(
            mean_ptr + (table + cell)[:, None] * V + dv[None, :], mask=there[:, None] & (dv < V)[None, :], other=0.0
        )
        s = tl.dot(q, c.to(FACTOR), input_precision=PRECISION) * (scale * LOG2_E)
        s += tl.log2(tl.where(there, number, 1.0))[None, :]
        s = tl.where(there[None, :], s, float("-inf"))
        top, total, acc = _absorb(top, total, acc, s, mean, FACTOR, PRECISION)
    out = ((b * length + i) * heads + h)[:, None] * V + dv[None, :]
    o = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(o_ptr + out, o.to(o_ptr.dtype.element_ty), mask=real[:, None] & (dv < V)[None, :])


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _products(dtype: torch.dtype) -> dict[str, Any]:
    """How products of this dtype are taken. Triton's interpreter multiplies bfloat16 as if it were integers."""
    widened = dtype == torch.bfloat16 and not isinstance(attend_kernel, triton.JITFunction)
    return {
        "FACTOR": tl.float32 if widened else _FACTORS[dtype],
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def _cells(
    v: Tensor, code: Tensor, lengths: Tensor | None, codes: int, first: int, size: int, segments: int
) -> tuple[Tensor, Tensor]:
    """What `cell_kernel` returns."""
    batch, source, heads, value = v.shape
    number = torch.empty(batch, heads, segments, codes, dtype=torch.float32, device=v.device)
    total = number.new_empty(*number.shape, value)
    small = v.dtype == torch.float32 or _padded(value) > 128
    cells = min(32 if small else 64, _padded(codes))
    cell_kernel[(-(-codes // cells), segments, batch * heads)](
        v, code, code if lengths is None else lengths, number, total, source, heads, codes, segments, first, size,
        *v.stride()[:3], V=value, BM=cells, BN=32 if small else 64, BV=_padded(value), LENGTHS=lengths is not None,
        num_warps=4, **_products(v.dtype),
    )  # fmt: skip
    return number, total


def _tables(
    v: Tensor, code: Tensor, lengths: Tensor | None, codes: int, chunk: int | None, causal: bool, group: int
) -> tuple[Tensor, Tensor]:
    """Tokens in the cells of each group, and the means of their values."""
    source = v.shape[1]
    if chunk is None:
        parts = _cells(v, code, lengths, codes, 0, 1024, max(1, -(-source // 1024)))
        number, total = (t.sum(2, keepdim=True) for t in parts)
    else:
        size = group * chunk
        groups = -(-source // size)
        # Group g: blocks below g G - 1, and, where the future is seen, blocks above (g + 1) G.
        parts = _cells(v, code, lengths, codes, -chunk, size, groups)
        shifted = (torch.cat((torch.zeros_like(t[:, :, :1]), t[:, :, :-1]), 2) for t in parts)
        number, total = (t.cumsum(2) for t in shifted)
        if not causal:
            parts = _cells(v, code, lengths, codes, chunk, size, groups)
            behind = (t.flip(2).cumsum(2).flip(2) for t in parts)
            rest = [torch.cat((t[:, :, 1:], torch.zeros_like(t[:, :, :1])), 2) for t in behind]
            number, total = number + rest[0], total + rest[1]
    return number, (total / number.clamp(min=1).unsqueeze(4)).to(v.dtype)


@torch.library.custom_op("seqzoo::vq_attention_triton", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    code: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    lengths: Tensor | None,
    chunk: int | None,
    causal: bool,
    scale: float,
) -> Tensor:
    """o (B, L, H, V). k, v and codebook in the dtype of q, bias in float32."""
    q, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, v))
    k = q if k is None else k if k.stride(3) == 1 else k.contiguous()
    code, codebook = code.contiguous(), codebook.contiguous()
    bias = None if bias is None else bias.contiguous()
    batch, length, heads, width = q.shape
    codes, value = codebook.shape[1], v.shape[3]
    wide, small = max(_padded(width), _padded(value)), q.dtype == torch.float32
    most = 64 if wide <= 64 else 32 if wide <= 128 else 16
    rows = most if small else 2 * most
    size = length if chunk is None else min(chunk, length)
    rows = min(rows, _padded(size))
    # As many keys to read one by one as there are cells, about.
    group = max(1, codes // size)
    blocks, per_block = -(-length // size), -(-size // rows)
    with torch.cuda.device_of(q):
        number, mean = _tables(v, code, lengths, codes, None if chunk is None else size, causal, group)
        o = torch.empty(batch, length, heads, value, dtype=v.dtype, device=q.device)
        attend_kernel[(blocks * per_block * batch * heads,)](
            q, k, v, code, codebook, q if bias is None else bias, code if lengths is None else lengths, number, mean, o,
            blocks * per_block, per_block, length, v.shape[1], heads, codes, number.shape[2], group, size,
            0 if bias is None else bias.shape[1], scale, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3],
            K=width, V=value, BM=rows, BN=16 if small and wide > 64 else 32 if small or wide > 128 else 64,
            BK=_padded(width), BV=_padded(value), WINDOW=chunk is not None, CAUSAL=causal, BIAS=bias is not None,
            LENGTHS=lengths is not None, LOG2_E=LOG2_E, num_warps=8 if wide > 64 else 4, num_stages=2,
            **_products(q.dtype),
        )  # fmt: skip
    return o


@_forward.register_fake
def _(q, k, v, code, codebook, bias, lengths, chunk, causal, scale):
    return v.new_empty(*q.shape[:3], v.shape[3])


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
) -> tuple[Tensor, None]:
    """`naive_vq_attention` without a state and without gradients, in time L (M + W)."""
    keys, values, book = (None if t is None else t.to(q.dtype) for t in (k, v, codebook))
    table = None if bias is None else bias.float()
    if table is not None and chunk is not None and chunk > q.shape[1]:
        # Blocks end with the row; the table's middle stays where it is.
        size = q.shape[1]
        table = table[:, : 2 * size] if causal else table[:, 2 * (chunk - size) : 2 * (chunk + size) - 1]
    return _forward(q, keys, values, code, book, table, lengths, chunk, causal, scale).to(v.dtype), None
