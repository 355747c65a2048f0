"""The state of causal VQ attention: cells of what is old, the newest tokens as they are."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

MASKED = -1e30  # below every score, and finite: where nothing is visible the weights are even, over zeros


class VQState(NamedTuple):
    """The cells of all blocks older than the previous one, and the newest T = 2 C - 1 tokens.

    number (B, H, M), mean (B, H, M, V): tokens in a cell and the mean of their values, float32 or float64.
    k (B, T, H, K), v (B, T, H, V), code int64 (B, T, H): the newest tokens, the last one in the last slot; slots
    that no token has reached hold zeros. length: int64 (B,), tokens seen.
    """

    number: Tensor
    mean: Tensor
    k: Tensor
    v: Tensor
    code: Tensor
    length: Tensor


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of scores, counts and means: float64 for float64 inputs, float32 for all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def empty_state(
    batch_size: int,
    chunk_size: int,
    codebook_size: int,
    num_heads: int,
    key_dim: int,
    value_dim: int,
    *,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> VQState:
    """The state before the first token. dtype: of the window; cells are float32, or float64 with it."""
    dtype = dtype or torch.get_default_dtype()
    window = torch.zeros(batch_size, 2 * chunk_size - 1, num_heads, 0, device=device, dtype=dtype)
    count = torch.zeros(batch_size, num_heads, codebook_size, device=device, dtype=accumulation_dtype(dtype))
    return VQState(
        count,
        count.new_zeros(*count.shape, value_dim),
        window.new_zeros(*window.shape[:3], key_dim),
        window.new_zeros(*window.shape[:3], value_dim),
        window.new_zeros(window.shape[:3], dtype=torch.int64),
        count.new_zeros(batch_size, dtype=torch.int64),
    )


def gather_rows(x: Tensor, index: Tensor) -> Tensor:
    """Entries of each row: x (B, S, ...), index int64 (B, T), gives (B, T, ...)."""
    return x.gather(1, index.reshape(*index.shape, *[1] * (x.dim() - 2)).expand(-1, -1, *x.shape[2:]))


def extend(state: VQState, k: Tensor, v: Tensor, code: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """k, v and code of the window followed by those of L new tokens, in the window's dtype."""
    return (
        torch.cat((state.k, k.to(state.k.dtype)), 1),
        torch.cat((state.v, v.to(state.v.dtype)), 1),
        torch.cat((state.code, code), 1),
    )


def advance(
    state: VQState, joined: tuple[Tensor, Tensor, Tensor], new: Tensor, count: Tensor, total: Tensor
) -> VQState:
    """The next state. joined: from `extend`. new: int64 (B,), real ones of the new tokens. count (B, H, M) and
    total (B, H, M, V): how many tokens left the window for a cell, and the sum of their values."""
    size = state.k.shape[1]
    newest = new[:, None] + torch.arange(size, device=new.device)
    together = state.number + count
    # A running mean: a cell that nothing enters keeps its bits, however long the stream.
    step = (total - count[..., None] * state.mean) / together.clamp(min=1)[..., None]
    k, v, code = (gather_rows(part, newest) for part in joined)
    return VQState(together, state.mean + step, k, v, code, state.length + new)


def leaving(state: VQState, chunk: int, new: Tensor, slots: int) -> Tensor:
    """bool (B, slots): which tokens of the joined window are old after `new` more tokens, and were not before."""
    at = state.length[:, None] - state.k.shape[1] + torch.arange(slots, device=new.device)
    before, after = ((n.div(chunk, rounding_mode="floor") - 1) * chunk for n in (state.length, state.length + new))
    return (at >= before.clamp(min=0)[:, None]) & (at < after[:, None])
