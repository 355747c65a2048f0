"""Softmax attention through torch's own, also within a window, for any length: what an exported model holds.

B batch, L queries, S keys, H heads, C places of a block, n blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..portable import from_blocks, to_blocks
from .sdpa import softmax_sdpa

BLOCK = 64  # blocks are of multiples of it


def softmax_portable(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    mask: Tensor | None,
    bias: Tensor | None,
    window: tuple[int, int] | None,
    scale: float,
    drop: float,
) -> Tensor:
    """See `softmax_attention`, which checks the arguments."""
    if window is None:
        return softmax_sdpa(q, k, v, causal=causal, mask=mask, bias=bias, window=None, scale=scale, drop=drop)
    before, after = window[0], 0 if causal else window[1]
    length, source = q.shape[1], k.shape[1]
    keys = None if mask is None else mask.reshape(mask.shape[0] if mask.dim() == 4 else 1, mask.shape[-1])
    size = -(-max(before, after, 1) // BLOCK) * BLOCK
    # A few blocks are one dense product; so is what follows keys of a cache.
    if (isinstance(length, int) and length <= 2 * size) or length != source:
        return _dense(q, k, v, keys, before, after, scale, drop)
    return _in_blocks(q, k, v, keys, before, after, size, scale, drop)


def _dense(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor | None, before: int, after: int, scale: float, drop: float
) -> Tensor:
    distance = torch.arange(q.shape[1], device=q.device).unsqueeze(1) + (k.shape[1] - q.shape[1])
    distance = distance - torch.arange(k.shape[1], device=q.device)
    seen = ((distance <= before) & (distance >= -after))[None, None]
    seen = seen if keys is None else seen & keys[:, None, None]
    return softmax_sdpa(q, k, v, causal=False, mask=seen, bias=None, window=None, scale=scale, drop=drop)


def _in_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    keys: Tensor | None,
    before: int,
    after: int,
    size: int,
    scale: float,
    drop: float,
) -> Tensor:
    """Each block of queries with its own block of keys, the one before and, where it may look ahead, the next."""
    batch, length = q.shape[:2]
    real = q.new_ones(1, length) if keys is None else keys.to(q.dtype)
    real = real.expand(batch, -1)
    blocks = to_blocks(q, size)
    number = blocks.shape[1]

    def around(x: Tensor) -> Tensor:
        """(B, L, ...) to (B n, 2 C or 3 C, ...): with a block of zeros before the first and, to look ahead, behind."""
        end = number * size - length + (size if after else 0)
        x = F.pad(x, (0, 0) * (x.dim() - 2) + (size, end))
        parts = [x.narrow(1, j * size, number * size) for j in range(3 if after else 2)]
        parts = [part.reshape(batch, number, size, *x.shape[2:]) for part in parts]
        return torch.cat(parts, 2).flatten(0, 1)

    k, v, real = around(k), around(v), around(real)
    place = torch.arange(size, device=q.device)
    distance = place.unsqueeze(1) + size - torch.arange(k.shape[1], device=q.device)
    seen = (distance <= before) & (distance >= -after) & (real > 0).unsqueeze(1)
    y = softmax_sdpa(
        blocks.flatten(0, 1),
        k,
        v,
        causal=False,
        mask=seen.unsqueeze(1),
        bias=None,
        window=None,
        scale=scale,
        drop=drop,
    )
    return from_blocks(y.unflatten(0, (batch, number)), length)
