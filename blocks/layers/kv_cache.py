"""The cache of keys and values of softmax attention: growing, or the newest of a window plus sinks."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .growing import grown
from .rows import take


class KVState(NamedTuple):
    """Keys and values seen so far; `position` alone decides what a query sees, so pads do no harm anywhere.

    k: (B, S, Hkv, K), turned already where positions are rotary. v: (B, S, Hkv, V).
    position: int64 (B, S), the place of the slot's token among the real tokens of its row, -1 for an empty
    slot.
    length: int64 (B,), real tokens seen. room: (B, max_len, 0), no elements, its shape bounds S; None for no
    bound. A windowed cache holds, in this order, num_sinks slots for the first tokens, then window_size - 1
    for the newest.
    """

    k: Tensor
    v: Tensor
    position: Tensor
    length: Tensor
    room: Tensor | None = None


def empty_cache(
    batch_size: int,
    slots: int,
    kv_heads: int,
    head_dim: int,
    *,
    max_len: int | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> KVState:
    """A cache of `slots` empty slots. max_len: tokens that a growing cache may come to hold."""
    k = torch.zeros(batch_size, slots, kv_heads, head_dim, device=device, dtype=dtype)
    return KVState(
        k,
        torch.zeros_like(k),
        torch.full((batch_size, slots), -1, device=device, dtype=torch.int64),
        torch.zeros(batch_size, device=device, dtype=torch.int64),
        None if max_len is None else k.new_empty(batch_size, max_len, 0),
    )


def append(state: KVState, k: Tensor, v: Tensor, position: Tensor) -> KVState:
    """A growing cache with L more slots, see `grown`. k, v: (B, L, Hkv, ...). position: int64 (B, L), -1 for a pad.

    Raises ValueError when the cache outgrows its max_len.
    """
    slots = state.k.shape[1] + k.shape[1]
    if state.room is not None and slots > state.room.shape[1]:
        raise ValueError(
            f"{k.shape[1]} tokens after {state.k.shape[1]} exceed max_len={state.room.shape[1]} of this state"
        )
    most = None if state.room is None else state.room.shape[1]
    return state._replace(
        k=grown(state.k, k, most=most),
        v=grown(state.v, v, most=most),
        position=grown(state.position, position, most=most),
        length=state.length + (position >= 0).sum(1),
    )


def with_window(state: KVState, k: Tensor, v: Tensor, position: Tensor, num_sinks: int) -> tuple[KVState, KVState]:
    """What a chunk of L new tokens meets: the sinks, old or new; the window's slots, then the new ones.

    k, v: (B, L, Hkv, ...) and position: int64 (B, L), in which the real tokens of a row come first, then -1.
    Returns two states, of num_sinks and of (window_size - 1) + L slots; their `length` counts the new tokens
    too.
    """
    k, v = k.to(state.k.dtype), v.to(state.v.dtype)
    number = (position >= 0).sum(1)
    length = state.length + number
    recent = state._replace(
        k=torch.cat((state.k[:, num_sinks:], k), 1),
        v=torch.cat((state.v[:, num_sinks:], v), 1),
        position=torch.cat((state.position[:, num_sinks:], position), 1),
        length=length,
    )
    # Sink j is token j of the row: in its slot already, or in this chunk at j - (tokens seen before), or
    # still to come.
    place = torch.arange(num_sinks, device=k.device) - state.length.unsqueeze(1)
    arrives = (place >= 0) & (place < number.unsqueeze(1))
    place = place.clamp(0, max(k.shape[1] - 1, 0))
    sinks = state._replace(
        k=torch.where(arrives[..., None, None], take(k, place), state.k[:, :num_sinks]),
        v=torch.where(arrives[..., None, None], take(v, place), state.v[:, :num_sinks]),
        position=torch.where(arrives, take(position, place), state.position[:, :num_sinks]),
        length=length,
    )
    return sinks, recent


def keep_window(state: KVState, sinks: KVState, recent: KVState) -> KVState:
    """The next state: the sinks, and of `recent` the newest window_size - 1 real tokens of each row."""
    size = state.k.shape[1] - sinks.k.shape[1]
    # The window's slots come first and are aligned to their end, so the newest end where the row's new tokens
    # do.
    place = (recent.length - state.length).unsqueeze(1) + torch.arange(size, device=recent.k.device)
    return state._replace(
        k=torch.cat((sinks.k, take(recent.k, place)), 1),
        v=torch.cat((sinks.v, take(recent.v, place)), 1),
        position=torch.cat((sinks.position, take(recent.position, place)), 1),
        length=recent.length,
    )
