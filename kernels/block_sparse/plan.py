"""Which queries meet which blocks of keys in one step: tiles, with the same number of queries and blocks in each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

# Queries that are routed one by one are sorted into tiles of this size, where there are as many.
TILE = 32


class Tiles(NamedTuple):
    """n tiles of C queries, which all see the same J blocks of keys.

    route: int64 (n,), which of the B Hr routings. rows: int64 (n, C), queries, -1 for none. blocks: int64 (n, J), -1
    for none. group: int64 (n,), the query block over all routings, where the tiles are query blocks.
    """

    route: Tensor
    rows: Tensor
    blocks: Tensor
    group: Tensor | None = None


def plan(index: Tensor, length: int, blocks: int, q_block: int, budget: int, *, whole: bool) -> Iterator[Tiles]:
    """Tiles for index (B Hr, G, T) over `length` queries and `blocks` blocks of keys.

    Query blocks are tiles as they are, with all their T blocks at once; single queries are sorted, once per slot.
    In either case the tiles between two sights of a query are all of its slots or one of them, in order. budget:
    queries x blocks in one step. whole: do not sort.
    """
    routes, groups, slots = index.shape
    if not whole and q_block == 1 and length >= TILE:
        for slot in range(slots):
            yield from _sorted(index[..., slot], blocks, max(1, budget // TILE))
        return
    rows = torch.arange(groups * q_block, device=index.device).view(groups, q_block)
    flat = index.flatten(0, 1)
    step = max(1, budget // (q_block * slots))
    for first in range(0, routes * groups, step):
        at = torch.arange(first, min(first + step, routes * groups), device=index.device)
        yield Tiles(at // groups, rows[at % groups], flat[at], at)


def _sorted(chosen: Tensor, blocks: int, step: int) -> Iterator[Tiles]:
    """Tiles of the queries of each block; chosen: int64 (B Hr, L), the block of each query, -1 for none.

    A query keeps its place among those of its block, and all steps have one size, whatever later queries choose:
    so not even the rounding of its output depends on them.
    """
    routes, length = chosen.shape
    device, bins = chosen.device, blocks + 1  # the last bin collects the queries that chose none
    key = torch.where(chosen < 0, blocks, chosen) + torch.arange(routes, device=device).unsqueeze(1) * bins
    key, order = key.flatten().sort(stable=True)
    count = torch.bincount(key, minlength=routes * bins)
    rank = torch.arange(len(order), device=device) - (count.cumsum(0) - count)[key]
    tiles = (count + TILE - 1) // TILE
    tiles.view(routes, bins)[:, blocks] = 0
    number = int(tiles.sum())
    step = min(step, routes * (length // TILE + blocks))  # no choice needs more tiles
    padded = -(-number // step) * step
    place = (tiles.cumsum(0) - tiles)[key] * TILE + rank
    real = key % bins < blocks
    rows = torch.full((padded * TILE,), -1, device=device)
    rows[place[real]] = order[real] % length
    owner = torch.full((padded,), blocks, device=device)  # a tile of padding belongs to the bin of none
    owner[:number] = torch.repeat_interleave(torch.arange(routes * bins, device=device), tiles)
    block = owner % bins
    block = torch.where(block == blocks, -1, block).unsqueeze(1)
    for first in range(0, padded, step):
        part = slice(first, first + step)
        yield Tiles(owner[part] // bins, rows.view(-1, TILE)[part], block[part])
