"""Causal block routing: each token is sent to its own block and to earlier, complete ones (ours, see `attend`).

B rows whose real tokens come first, L tokens, S slots of the cache, H heads, K channels of a head, Hr heads that route
(1 or H), R blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.weak import WeakTensorKeyDictionary

from ...kernels.block_sparse import block_sparse_attention, block_sums, route
from .growing import grown


class BlockRoutingState(NamedTuple):
    """Keys and values seen so far, each at the slot of its place among the real tokens of its row.

    k, v: (B, S, H, K), zero beyond a row's tokens. sums: (B, R, H K), of the keys of each block, R = S / size rounded
    up, float32 or wider. tail: (B, taps - 1, D), the last inputs of the convolution. length: int64 (B,), real tokens
    seen. room: (B, max_len, 0), its shape bounds S; None for no bound.
    """

    k: Tensor
    v: Tensor
    sums: Tensor
    tail: Tensor
    length: Tensor
    room: Tensor | None = None


def empty_state(
    tail: Tensor, heads: int, width: int, *, max_len: int | None, device: torch.device | str, dtype: torch.dtype
) -> BlockRoutingState:
    """Before the first token. tail: of the convolution, (B, taps - 1, D)."""
    batch = tail.shape[0]
    k = torch.zeros(batch, 0, heads, width, device=device, dtype=dtype)
    wide = torch.promote_types(dtype, torch.float32)
    return BlockRoutingState(
        k,
        k.clone(),
        torch.zeros(batch, 0, heads * width, device=device, dtype=wide),
        tail,
        torch.zeros(batch, device=device, dtype=torch.int64),
        None if max_len is None else k.new_empty(batch, max_len, 0),
    )


# Keys of caches in which no row has a pad; what is not here may be one too.
_all_real = WeakTensorKeyDictionary()


def _full(state: BlockRoutingState) -> bool:
    """Whether every slot of the cache holds a token; known for a cache that only ever got full rows."""
    if state.k.shape[1] == 0:
        return True
    if torch.compiler.is_compiling():
        return False
    return state.k in _all_real or bool((state.length == state.k.shape[1]).all())


def append(state: BlockRoutingState, k: Tensor, v: Tensor, number: Tensor | None, size: int) -> BlockRoutingState:
    """The cache with L more slots. k, v: (B, L, H, K), zero at pads. number: int64 (B,), real tokens, None for L.

    size: tokens of a block. `tail` stays. Raises ValueError when the cache outgrows its max_len.
    """
    batch, more = k.shape[:2]
    slots = state.k.shape[1] + more
    if state.room is not None and slots > state.room.shape[1]:
        raise ValueError(f"{more} tokens after {state.k.shape[1]} exceed max_len={state.room.shape[1]} of this state")
    place = state.length.unsqueeze(1) + torch.arange(more, device=k.device)

    most = None if state.room is None else state.room.shape[1]
    full = number is None and _full(state)

    def put(old: Tensor, new: Tensor) -> Tensor:
        if full:
            return grown(old, new, most=most)
        copy = torch.cat((old, old.new_zeros(batch, more, *old.shape[2:])), 1)  # our own, so written in place
        return copy.scatter_(1, place[..., None, None].expand_as(new), new.to(old.dtype))

    sums = F.pad(state.sums, (0, 0, 0, -(-slots // size) - state.sums.shape[1]))
    block = (place // size).unsqueeze(2).expand(batch, more, sums.shape[2])
    keys = put(state.k, k)
    if full and not torch.compiler.is_compiling():
        _all_real[keys] = True
    return state._replace(
        k=keys,
        v=put(state.v, v),
        sums=sums.scatter_add(1, block, k.detach().flatten(2).to(sums.dtype)),
        length=state.length + (more if number is None else number),
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    size: int,
    topk: int,
    routing_heads: int,
    scale: float,
    position: Tensor,
    sums: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal attention of each token to `topk` blocks: its own up to itself, and complete ones before it.

    The token's query scores the mean key of every block that ends before its own begins; the topk - 1 best, fewer
    where there are fewer, and its own block enter one softmax. So neither the scores nor the choice depend on later
    tokens. q: (B, L, H, K). k, v: (B, S, H, K). position: int64 (B, L), the slot of each query's own key. sums:
    (B, R, H K) of the keys, None to compute them.
    """
    if sums is None:
        sums, _ = block_sums(k.detach().flatten(2), size)
    means = (sums / size).unflatten(2, (routing_heads, -1))  # of complete blocks; the others are never chosen
    own = position // size
    index = route(q.detach().flatten(2).unflatten(2, (routing_heads, -1)), means, topk - 1, before=own)
    index = torch.cat((index, own[:, None, :, None].expand(-1, routing_heads, -1, -1)), 3)
    return block_sparse_attention(
        q, k, v, index, q_block=1, k_block=size, q_position=position, scale=scale, backend=backend
    )
