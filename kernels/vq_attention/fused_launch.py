"""Launches of the kernels of VQ attention: groups of blocks, tables of cells, tile sizes.

A table of cells for each block would be L M V / C numbers, so G = M / C blocks share one, of what is far from all of
them. Between that and the window lie at most G blocks (on either side), whose keys are read one by one, as their
codewords; a query then reads about M + G C keys. README.md has the definition.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .fused_backward import bias_kernel, key_kernel, table_kernel
from .fused_forward import attend_kernel, cell_kernel

LOG2_E = 1.4426950408889634
FACTORS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
# Tokens, or queries, that one program sums over where there is no window; blocks, for the gradient of the bias: so
# many that the sums of each split are a fraction of the activations.
SEGMENT = 1024
SPLIT = 32


class Plan(NamedTuple):
    """size: tokens of a block. blocks: in the frame of fused_forward.py, of which the first `skip` have no queries.
    group, groups: blocks that share a table, and tables. window, state: whether there are such."""

    size: int
    blocks: int
    skip: int
    group: int
    groups: int
    window: bool
    state: bool

    @property
    def tables(self) -> bool:
        """Whether any cell can have a token."""
        return not self.window or self.state or self.groups > 1


def plan_blocks(length: int, codes: int, chunk: int | None, state: bool) -> Plan:
    if chunk is None:
        return Plan(length, 1, 0, 1, 1, False, False)
    size = chunk if state else min(chunk, length)  # a row within one block is one block, however long blocks are
    blocks = 1 - (1 - size - length) // size if state else -(-length // size)
    group = max(1, codes // size)  # as many keys to read one by one as there are cells, about
    return Plan(size, blocks, int(state), group, -(-blocks // group), True, state)


def _padded(width: int) -> int:
    return max(16, triton.next_power_of_2(width))


def _products(dtype: torch.dtype) -> dict[str, Any]:
    """How products of this dtype are taken. Triton's interpreter multiplies bfloat16 as if it were integers."""
    widened = dtype == torch.bfloat16 and not isinstance(attend_kernel, triton.JITFunction)
    return {
        "FACTOR": tl.float32 if widened else FACTORS[dtype],
        "PRECISION": "tf32x3" if dtype == torch.float32 else "tf32",
    }


def readable(t: Tensor) -> Tensor:
    return t if t.stride(3) == 1 else t.contiguous()


def cells(
    v: Tensor, code: Tensor, places: Tensor, codes: int, first: int, size: int, segments: int
) -> tuple[Tensor, Tensor]:
    """What `cell_kernel` returns."""
    batch, source, heads, value = v.shape
    number = torch.empty(batch, heads, segments, codes, dtype=torch.float32, device=v.device)
    total = number.new_empty(*number.shape, value)
    small = v.dtype == torch.float32 or _padded(value) > 128
    block = min(32 if small else 64, _padded(codes))
    cell_kernel[(-(-codes // block), segments, batch * heads)](
        v, code, places, number, total, source, heads, codes, segments, first, size, *v.stride()[:3],
        V=value, BM=block, BN=32 if small else 64, BV=_padded(value), num_warps=8 if _padded(value) > 128 else 4,
        **_products(v.dtype),
    )  # fmt: skip
    return number, total


def tables(
    v: Tensor, code: Tensor, places: Tensor, codes: int, plan: Plan, causal: bool, state: tuple[Tensor, Tensor] | None
) -> tuple[Tensor, Tensor]:
    """Tokens in the cells of each group (B, H, groups, M), and the means of their values. state: those before all, a
    contiguous number and mean."""
    batch, source, heads, value = v.shape
    if not plan.window:
        parts = cells(v, code, places, codes, 0, SEGMENT, max(1, -(-source // SEGMENT)))
        number, total = (t.sum(2, keepdim=True) for t in parts)
        return number, _mean(number, total, v)
    if state is None:
        number = torch.zeros(batch, heads, 1, codes, dtype=torch.float32, device=v.device)
        total = number.new_zeros(*number.shape, value)
    else:
        number = state[0].unsqueeze(2)
        if plan.groups == 1:
            return number, state[1].unsqueeze(2).to(v.dtype)
        total = number.unsqueeze(4) * state[1].unsqueeze(2)
    span, more = plan.group * plan.size, plan.groups - 1
    if more:
        # Group g: blocks below g G - 1, and, where the future is seen, blocks above (g + 1) G.
        parts = cells(v, code, places, codes, -plan.size, span, more)
        number, total = (torch.cat(pair, 2).cumsum(2) for pair in zip((number, total), parts, strict=True))
        if not causal:
            parts = cells(v, code, places, codes, plan.size + span, span, more)
            behind = (t.flip(2).cumsum(2).flip(2) for t in parts)
            for all_cells, part in zip((number, total), behind, strict=True):
                all_cells[:, :, :-1] += part
    return number, _mean(number, total, v)


def _mean(number: Tensor, total: Tensor, v: Tensor) -> Tensor:
    return (total / number.clamp(min=1).unsqueeze(4)).to(v.dtype)


class Call(NamedTuple):
    """What all launches of one call share. q, k, v: with a last stride of 1; code, codebook, bias: contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor
    code: Tensor
    codebook: Tensor
    bias: Tensor | None
    places: Tensor
    plan: Plan
    causal: bool
    scale: float

    @property
    def wide(self) -> int:
        return max(_padded(self.q.shape[3]), _padded(self.v.shape[3]))

    @property
    def entries(self) -> int:
        return 0 if self.bias is None else self.bias.shape[1]

    def options(self, *flags: str) -> dict[str, Any]:
        known = {
            "WINDOW": self.plan.window, "CAUSAL": self.causal, "BIAS": self.bias is not None,
            "STATE": self.plan.state, "TABLES": self.plan.tables,
        }  # fmt: skip
        width, value = self.q.shape[3], self.v.shape[3]
        return {
            "K": width, "V": value, "BK": _padded(width), "BV": _padded(value), "LOG2_E": LOG2_E,
            **{flag: known[flag] for flag in flags}, **_products(self.q.dtype),
        }  # fmt: skip


def attend(
    call: Call,
    number: Tensor | None,
    mean: Tensor | None,
    o: Tensor,
    lse: Tensor,
    do: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Fills o and lse; or, with do, their gradient, gives dq and delta (see `attend_kernel`)."""
    q, plan = call.q, call.plan
    batch, length, heads, _ = q.shape
    wide, small, back = call.wide, q.dtype == torch.float32, do is not None
    most = (64 if wide <= 64 else 32 if wide <= 128 else 16) * (1 if small else 2)
    rows = min(most, _padded(plan.size))
    keys = 16 if small and wide > 64 else 32 if small or wide > 128 or (back and wide > 64) else 64
    per_block = -(-plan.size // rows)
    tiles = (plan.blocks - plan.skip) * per_block
    dq, delta = o, lse
    if back:
        dq, delta = torch.empty_like(q, memory_format=torch.contiguous_format), torch.empty_like(lse)
    attend_kernel[(tiles * batch * heads,)](
        q, call.k, call.v, call.code, call.codebook, q if call.bias is None else call.bias, call.places,
        lse if number is None else number, o if mean is None else mean, o, lse, o if do is None else do, dq, delta,
        tiles, per_block, plan.skip, length, call.v.shape[1], heads, call.codebook.shape[1], plan.groups, plan.group,
        plan.size, call.entries, call.scale, *q.stride()[:3], *call.k.stride()[:3], *call.v.stride()[:3],
        BM=rows, BN=keys, GRADIENT=back, num_warps=8 if wide > 64 or (back and rows > 64) else 4, num_stages=2,
        **call.options("WINDOW", "CAUSAL", "BIAS", "STATE", "TABLES"),
    )  # fmt: skip
    return dq, delta


def _large(call: Call) -> bool:
    return call.q.dtype == torch.float32 and call.wide > 128


def _tile(call: Call) -> tuple[int, int]:
    """Keys, or cells, that a program owns in the backward pass, and queries that it takes at a time."""
    if call.q.dtype == torch.float32:
        return (32, 32) if call.wide <= 64 else (16, 16)
    return (64, 64) if call.wide <= 64 else (64, 32) if call.wide <= 128 else (32, 32)


def table_gradients(call: Call, number: Tensor, do: Tensor, lse: Tensor, delta: Tensor) -> tuple[Tensor, Tensor | None]:
    """Gradients of the sums of values in the tables (B, H, groups, M, V) and, with a state, of the numbers."""
    q, plan = call.q, call.plan
    batch, length, heads, _ = q.shape
    codes = call.codebook.shape[1]
    span = plan.group * plan.size if plan.window else SEGMENT
    parts = plan.groups if plan.window else max(1, -(-length // SEGMENT))
    dtotal = number.new_empty(batch, heads, parts, codes, call.v.shape[3])
    dnumber = number.new_empty(dtotal.shape[:4] if plan.state else 0)
    own, queries = _tile(call)
    own = min(own, _padded(codes))
    table_kernel[(-(-codes // own), parts, batch * heads)](
        q, call.codebook, call.places, number, do, lse, delta, dtotal, dnumber,
        parts, 1 if plan.window else parts, span, length, heads, codes, plan.groups, plan.size, call.scale,
        *q.stride()[:3], BM=queries, BN=own, num_warps=8 if call.wide > 128 else 4, num_stages=2,
        **call.options("STATE"),
    )  # fmt: skip
    if not plan.window and parts > 1:
        dtotal = dtotal.sum(2, keepdim=True)
    return dtotal, dnumber if plan.state else None


def key_gradients(
    call: Call, dtotal: Tensor | None, do: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor
) -> Tensor | None:
    """Fills dk and dv; gives the gradient of the sums of values that were there before all tokens."""
    q, plan = call.q, call.plan
    batch, length, heads, _ = q.shape
    source = call.v.shape[1]
    before = behind = dtotal
    if dtotal is not None and plan.groups > 1:
        before = dtotal.flip(2).cumsum(2).flip(2)
        behind = before if call.causal else dtotal.cumsum(2)
    own, queries = _tile(call)
    size = plan.size if plan.window else source
    own = min(own, _padded(size))
    per_block = -(-size // own)
    tiles = plan.blocks * per_block
    key_kernel[(tiles * batch * heads,)](
        q, call.k, call.v, call.code, call.codebook, q if call.bias is None else call.bias, call.places, do, lse, delta,
        lse if before is None else before, lse if behind is None else behind, dk, dv,
        tiles, per_block, length, source, heads, call.codebook.shape[1], plan.groups, plan.group, size, call.entries,
        call.scale, *q.stride()[:3], *call.k.stride()[:3], *call.v.stride()[:3],
        BM=queries, BN=own, num_warps=8 if call.wide > 64 else 4, num_stages=1 if _large(call) else 2,
        **call.options("WINDOW", "CAUSAL", "BIAS", "STATE", "TABLES"),
    )  # fmt: skip
    return None if before is None else before[:, :, 0]


def bias_gradient(call: Call, do: Tensor, lse: Tensor, delta: Tensor) -> Tensor:
    """(H, entries), in float32: the diagonals of the scores' gradients in a window, summed over blocks."""
    q, plan, bias = call.q, call.plan, call.bias
    assert bias is not None
    batch, length, heads, _ = q.shape
    width = (2 if call.causal else 3) * plan.size
    small = q.dtype == torch.float32
    block = (32 if call.wide <= 64 else 16) if small else (64 if call.wide <= 128 else 32)
    block = min(block, _padded(plan.size))
    splits = -(-(plan.blocks - plan.skip) // SPLIT)
    across = -(-width // block)
    ds = delta.new_empty(batch, heads, splits, plan.size, width)
    bias_kernel[(-(-plan.size // block) * across, splits, batch * heads)](
        q, call.k, call.v, bias, call.places, do, lse, delta, ds,
        across, splits, SPLIT, plan.skip, plan.blocks, length, heads, width, plan.size, call.entries, call.scale,
        *q.stride()[:3], *call.k.stride()[:3], *call.v.stride()[:3],
        BM=block, BN=block, num_warps=8 if call.wide > 64 or block > 32 else 4, num_stages=2,
        **call.options("CAUSAL", "STATE"),
    )  # fmt: skip
    # Row a, column C + a - distance; reversed and shifted by a, each distance is a column of its own.
    lines = F.pad(ds.sum((0, 2)).flip(2), (0, plan.size)).flatten(1)[:, : -plan.size]
    sums = lines.unflatten(1, (plan.size, -1)).sum(1)
    return sums[:, plan.size - 1 :].contiguous() if call.causal else sums
