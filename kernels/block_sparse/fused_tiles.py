"""What the Triton kernels of block-sparse attention share: tiles, the sorted choices, sizes of programs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2_E = 1.4426950408889634
_FACTORS = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


class Pairs(NamedTuple):
    """The choices (query block, slot) by the key block they name, of equal ones by slot, then by query block.

    order: int32 (N, G T), g T + t. starts: int32 (N, (R + 1) T + 1), where those of block r and slot t begin is
    starts[r T + t]; block R is "none". tile_block, tile_first: int32 (N, T, tiles): for one slot, tiles of queries
    that share a block, the block (above R: no such tile) and where the tile begins in `order`; None if not needed.
    """

    order: Tensor
    starts: Tensor
    tile_block: Tensor | None
    tile_first: Tensor | None


def most_tiles(length: int, blocks: int, rows: int) -> int:
    """Tiles of `rows` queries that any choice of `blocks` blocks, or none, can need: at most one per block is not
    full."""
    return length // rows + min(blocks + 1, length)


def sorted_pairs(index: Tensor, blocks: int, rows: int | None) -> Pairs:
    """Sort the choices index (B, Hr, G, T); with tiles of `rows` queries where they are given. Never waits for the
    device."""
    groups, slots = index.shape[2:]
    chosen = index.flatten(0, 1)
    slot = torch.arange(slots, device=index.device)
    key = (torch.where(chosen < 0, blocks, chosen) * slots + slot).flatten(1).to(torch.int32)
    # Stable: a query keeps its place among those of its block whatever later ones choose.
    key, order = key.sort(dim=1, stable=True)
    bins = torch.arange((blocks + 1) * slots + 1, device=index.device, dtype=torch.int32).expand(len(key), -1)
    starts = torch.searchsorted(key, bins.contiguous(), out_int32=True)
    if rows is None:
        return Pairs(order.to(torch.int32), starts, None, None)
    first = starts[:, :-1].view(-1, blocks + 1, slots).transpose(1, 2)  # (N, T, R + 1)
    number = starts.diff(dim=1).view(-1, blocks + 1, slots).transpose(1, 2)
    number = (number + (rows - 1)).div(rows, rounding_mode="floor")
    ends = number.cumsum(2)
    place = torch.arange(most_tiles(groups, blocks, rows), device=index.device).expand(*ends.shape[:2], -1).contiguous()
    block = torch.searchsorted(ends, place, right=True)
    held = block.clamp(max=blocks)
    begin = first.gather(2, held) + (place - (ends - number).gather(2, held)) * rows
    return Pairs(order.to(torch.int32), starts, block.to(torch.int32), begin.to(torch.int32))


class Tiling(NamedTuple):
    """Queries and keys of a step, programs per head (tiles) and per query block, warps, stages of loads."""

    rows: int
    keys: int
    tiles: int
    per_group: int
    warps: int
    stages: int


def _power(size: int, low: int, high: int) -> int:
    """The power of two in [low, high] that holds `size`, as far as one does."""
    return min(max(triton.next_power_of_2(size), low), high)


def tiling(
    q: Tensor, k: Tensor, v: Tensor, q_block: int, k_block: int, *, sorted_rows: bool, gradient: bool = False
) -> Tiling:
    """The tiles of the forward pass and, as many queries in each, of the queries' gradient."""
    length, blocks = q.shape[1], -(-k.shape[1] // k_block)
    wide = max(padded(q.shape[3]), padded(v.shape[3]))
    # As large as registers hold them: three TF32 products need each float32 twice.
    if q.dtype == torch.float32:
        most, keys = {128: (32, 16), 256: (16, 16)}.get(wide, (64, 32))
    else:
        most, keys = (64, 32) if wide > 128 else (128, 64 if sorted_rows or gradient or wide <= 64 else 128)
    # Sorted queries come in lots of about L / R: larger tiles would stay half empty.
    rows = _power(length // blocks if sorted_rows else q_block, 16, most)
    per_group = 1 if sorted_rows else -(-q_block // rows)
    tiles = most_tiles(length, blocks, rows) if sorted_rows else -(-length // q_block) * per_group
    stages = 3 if wide <= 64 and q.dtype != torch.float32 and not (sorted_rows or gradient) else 2
    return Tiling(rows, _power(k_block, 16, keys), tiles, per_group, _warps(q, rows, wide, sorted_rows), stages)


def key_tiling(q: Tensor, k: Tensor, v: Tensor, q_block: int, k_block: int) -> Tiling:
    """The tiles of the gradients of keys and values: `keys` of a block to a program, `rows` queries at a time."""
    wide = max(padded(q.shape[3]), padded(v.shape[3]))
    if q.dtype == torch.float32:
        rows, keys = (16, 16) if wide > 64 else (32, 32)
    else:
        rows, keys = (32, 64) if wide > 128 else (32, 128)
    keys = _power(k_block, 16, keys)
    per_block = -(-k_block // keys)
    if q_block % rows:
        # Queries that are looked up one by one: with loads that run ahead of the lookup a GPU gave an illegal access.
        stages = 1
    elif q.dtype == torch.float32:
        stages = 1 if wide > 128 else 2
    else:
        stages = 3 if wide <= 64 else 2
    return Tiling(
        rows, keys, -(-k.shape[1] // k_block) * per_block, per_block, _warps(q, keys, wide, q_block % rows != 0), stages
    )


def _warps(q: Tensor, rows: int, wide: int, lookup: bool) -> int:
    """lookup: the rows are no neighbours, their places take registers too."""
    if q.dtype != torch.float32 and wide <= 64 and not lookup:
        return 4
    return 8 if rows * wide >= 64 * 128 or (q.dtype == torch.float32 and wide > 64) else 4


def padded(width: int) -> int:
    """A head size as the kernels hold it: a power of two, at least 16."""
    return max(16, triton.next_power_of_2(width))


def inner_contiguous(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    weight: Tensor | None,
    q_position: Tensor | None,
    key_mask: Tensor | None,
    pairs: Pairs | None,
    *,
    q_block: int,
    k_block: int,
    scale: float,
) -> tuple[tuple[Tensor, ...], tuple[Any, ...], dict[str, Any]]:
    """What all kernels take: tensors (q for one that is not there), sizes, and compile-time constants."""
    given = [None if t is None else t.contiguous() for t in (weight, q_position, key_mask)]
    if given[2] is not None:
        given[2] = given[2].view(torch.uint8)
    held = pairs or (None,) * 4
    tensors = (q, k, v, index.contiguous(), *(q if t is None else t for t in (*given, *held)))
    length, heads, source = q.shape[1], q.shape[2], k.shape[1]
    sizes = (
        length, source, index.shape[2], index.shape[3], -(-source // k_block), heads, index.shape[1], q_block, k_block,
        scale * LOG2_E,
    )  # fmt: skip
    # Triton's interpreter multiplies bfloat16 as if it were integers.
    widened = q.dtype == torch.bfloat16 and not isinstance(visit, triton.JITFunction)
    flags = {
        "K": q.shape[3],
        "V": v.shape[3],
        "BK": padded(q.shape[3]),
        "BV": padded(v.shape[3]),
        "WEIGHT": weight is not None,
        "POSITION": q_position is not None,
        "MASK": key_mask is not None,
        "FACTOR": tl.float32 if widened else _FACTORS[q.dtype],
        # Three products of TF32 halves are as good as float32 to 1e-6.
        "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
    }
    return tensors, sizes, flags


@triton.jit
def visit(
    tile, route, slot, order_ptr, starts_ptr, tile_block_ptr, tile_first_ptr,
    tiles, per_group, length, slots, blocks, q_block, SORTED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """The queries of a tile (int64), which of them are real, their key block (SORTED; above R: no such tile) and their
    query block."""
    if SORTED:
        at = (route * slots + slot) * tiles + tile
        block = tl.load(tile_block_ptr + at)
        held = tl.minimum(block, blocks)
        end = tl.load(starts_ptr + route * ((blocks + 1) * slots + 1) + held * slots + slot + 1)
        place = tl.load(tile_first_ptr + at) + tl.arange(0, BM)
        real = (place < end) & (block <= blocks)
        rows = tl.load(order_ptr + route * length * slots + place, mask=real, other=0).to(tl.int64) // slots
        group = tile
    else:
        group = tile // per_group
        inside = tile % per_group * BM + tl.arange(0, BM)
        rows = group.to(tl.int64) * q_block + inside
        real = (inside < q_block) & (rows < length)
        block = 0
    return rows, real, block, group
