"""Sliding-window softmax attention by blocks: cost and memory O(L w), never O(L^2)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

# Shorter blocks than this spend their time in launching.
MIN_BLOCK = 64

Bias = Callable[[Tensor, Tensor], Tensor]


class Sinks(NamedTuple):
    """The first tokens of each row, which every query sees.

    k: (B, M, Hkv, K). v: (B, M, Hkv, V). position: int64 (B, M), negative for a slot without a token.
    horizon: where given, queries stand no further than this position when seen from a sink (bias only).
    """

    k: Tensor
    v: Tensor
    position: Tensor
    horizon: int | None = None


class Blocks(NamedTuple):
    """L queries cut into `number` blocks of `size`, which see `reach` keys before and `after` behind them.

    With more than one block, reach and after are multiples of size.
    """

    size: int
    number: int
    reach: int
    after: int

    def queries(self, x: Tensor, fill: int = 0) -> Tensor:
        """(B, L, ...) to (B * number, size, ...)."""
        x = _pad(x, 0, self.size * self.number - x.shape[1], fill)
        return x.reshape(x.shape[0] * self.number, self.size, *x.shape[2:])

    def keys(self, x: Tensor, before: int, fill: int = 0) -> Tensor:
        """(B, before + L, ...) to (B * number, reach + size + after, ...): the keys that a block can see."""
        return x if self.number == 1 else self.spread(x, before, fill)

    def spread(self, x: Tensor, before: int, fill: int = 0) -> Tensor:
        """As `keys`, whatever the number of blocks."""
        length = x.shape[1] - before
        x = _pad(x, self.reach - before, self.size * self.number - length + self.after, fill)
        # Shifted copies of whole blocks: the backward of `unfold`, one scatter, takes far longer than that of
        # slices.
        blocks = x.unflatten(1, (-1, self.size))
        shifts = blocks.shape[1] - self.number + 1
        return torch.cat([blocks[:, s : s + self.number] for s in range(shifts)], 2).flatten(0, 1)

    def rows(self, x: Tensor) -> Tensor:
        """(B, ...) to (B * number, ...), every block a copy."""
        return x.unsqueeze(1).expand(-1, self.number, *x.shape[1:]).flatten(0, 1)


def _pad(x: Tensor, front: int, back: int, fill: int) -> Tensor:
    return F.pad(x, [0, 0] * (x.dim() - 2) + [front, back], value=fill)


def cut(length: int, window_size: int, before: int, causal: bool) -> Blocks:
    """The blocks for `length` queries whose rows hold `before` earlier keys, 0 or window_size - 1."""
    # Half a window: shorter blocks copy each key more often, longer ones score more keys outside of the
    # window.
    size = max(window_size // 2, MIN_BLOCK)
    if not isinstance(length, int) or length <= size:  # one block too for what is exported for any length
        return Blocks(length, 1, before, 0)
    reach = -(-(window_size - 1) // size) * size
    return Blocks(size, -(-length // size), reach, 0 if causal else reach)


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_mask: Tensor | None,
    before: int,
    after: int,
    attend: Callable[..., Tensor],
) -> Tensor:
    """The window of `softmax_attention` as one dense call over all blocks; key_mask: bool (B, S)."""
    batch, length = q.shape[:2]
    size = min(max((before + after + 1) // 2, MIN_BLOCK), length)
    blocks = Blocks(size, -(-length // size), -(-before // size) * size, -(-after // size) * size)
    real = k.new_ones(batch, k.shape[1], dtype=torch.bool) if key_mask is None else key_mask
    ahead = k.shape[1] - length  # keys that precede the queries
    if ahead < 0:
        k, v, real, ahead = _pad(k, -ahead, 0, 0), _pad(v, -ahead, 0, 0), _pad(real, -ahead, 0, 0), 0
    i, j = (torch.arange(n, device=q.device) for n in (size, blocks.reach + size + blocks.after))
    distance = (i + blocks.reach).unsqueeze(1) - j
    seen = ((distance <= before) & (distance >= -after)) & blocks.spread(real, ahead).unsqueeze(1)
    y = attend(blocks.queries(q), blocks.spread(k, ahead), blocks.spread(v, ahead), mask=seen.unsqueeze(1))
    return y.reshape(batch, blocks.number * size, *y.shape[2:])[:, :length]


def visible(
    q_position: Tensor,
    k_position: Tensor,
    *,
    causal: bool,
    window_size: int | None = None,
    num_sinks: int = 0,
) -> Tensor:
    """Which keys a query sees: bool (B, L, S). Positions int64 (B, L), (B, S); negative ones hold no token.

    causal: 0 <= i - j (< window_size). Otherwise |i - j| < window_size. Keys at positions below num_sinks:
    False, they are seen as sinks, not through the window.
    """
    i, j = q_position.unsqueeze(-1), k_position.unsqueeze(-2)
    seen = (j >= num_sinks) & (i >= 0)
    if causal:
        seen = seen & (j <= i)
    if window_size is not None:
        seen = seen & (i - j < window_size)
        if not causal:
            seen = seen & (j - i < window_size)
    return seen


def _negative(position: Tensor) -> Tensor | None:
    """Where positions are negative; None if nowhere, where that costs nothing to know."""
    negative = position < 0
    if position.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(negative.any()):
        return None
    return negative


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    q_position: Tensor,
    k_position: Tensor,
    window_size: int,
    causal: bool,
    attend: Callable[..., Tensor],
    sinks: Sinks | None = None,
    bias: Bias | None = None,
) -> Tensor:
    """Softmax attention in which a query sees the keys less than window_size positions away, and the sinks.

    Longformer (arXiv:2004.05150) and Mistral (arXiv:2310.06825) windows, sinks of StreamingLLM
    (arXiv:2309.17453). Queries are cut into blocks; each block meets the keys of its neighbourhood in one
    dense call, masked by position.

    q: (B, L, H, K). k: (B, P + L, Hkv, K), v: (B, P + L, Hkv, V): P = 0, or window_size - 1 keys that precede
    the queries (causal only). Key P + t belongs to query t, and positions rise by one along the real tokens
    of a row: that makes distance in the row distance in position. q_position: int64 (B, L), k_position: (B, P
    + L), negative for a slot without a token. attend: `softmax_attention` with its scale, dropout and backend
    bound. sinks: see `Sinks`; the window then passes over them. bias: called with positions (B, L), (B, S)
    for a score bias (B, H, L, S). Returns (B, L, H, V), 0 for a query that sees nothing.
    """
    batch, length = q.shape[:2]
    before = k.shape[1] - length
    if before not in (0, window_size - 1) or (before and not causal):
        raise ValueError(
            f"{before} keys precede the queries; a causal window of {window_size} takes 0 or "
            f"{window_size - 1}, any other window 0"
        )
    if length == 0:
        return q.new_zeros(batch, 0, q.shape[2], v.shape[3])
    if sinks is None and bias is None:
        # Distance in the row is distance in position, so which slots hold a token is all that positions tell.
        hidden, absent = _negative(k_position), _negative(q_position)
        mask = None if hidden is None else ~hidden[:, None, None]
        y = attend(q, k, v, window=(window_size - 1, 0 if causal else window_size - 1), mask=mask)
        return y if absent is None else y.masked_fill(absent[..., None, None], 0.0)
    blocks = cut(length, window_size, before, causal)
    q_position, k_position = q_position.expand(batch, -1), k_position.expand(batch, -1)
    q, q_position = blocks.queries(q), blocks.queries(q_position, fill=-1)
    k, v = blocks.keys(k, before), blocks.keys(v, before)
    k_position = blocks.keys(k_position, before, fill=-1)
    num_sinks = 0 if sinks is None else sinks.position.shape[1]
    mask = visible(q_position, k_position, causal=causal, window_size=window_size, num_sinks=num_sinks)
    score = None if bias is None else bias(q_position, k_position)
    if sinks is not None:
        sink_position = blocks.rows(sinks.position.expand(batch, -1))
        k, v = torch.cat((k, blocks.rows(sinks.k)), 1), torch.cat((v, blocks.rows(sinks.v)), 1)
        mask = torch.cat((mask, visible(q_position, sink_position, causal=causal)), -1)
        if score is not None and bias is not None:
            stand = q_position if sinks.horizon is None else q_position.clamp(max=sinks.horizon)
            score = torch.cat((score, bias(stand, sink_position)), -1)
    y = attend(q, k, v, mask=mask.unsqueeze(1), bias=score)
    return y.reshape(batch, blocks.number * blocks.size, *y.shape[2:])[:, :length]
