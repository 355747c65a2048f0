"""Softmax attention through torch's scaled_dot_product_attention, in forms its fused kernels take."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..lse import attention_with_lse, merge_lse
from .band import band_attention
from .window import MIN_BLOCK, blocked_attention

_MASK = 1 << 22  # scores, above which no mask of them all is made where two parts do without


def softmax_sdpa(
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
    if window is not None:
        return _windowed(q, k, v, mask, window[0], 0 if causal else window[1], scale, drop)
    length, source, heads, kv_heads = q.shape[1], k.shape[1], q.shape[2], k.shape[2]
    width = v.shape[-1]
    if causal and mask is None and bias is None and drop == 0 and _is_long(q, k, v):
        # The earlier keys, which every query sees, and the square of the last ones, each without a mask.
        earlier, own = ([t[:, part] for t in (k, v)] for part in (slice(source - length), slice(source - length, None)))
        parts = [attention_with_lse(q, *own, causal=True, scale=scale), attention_with_lse(q, *earlier, scale=scale)]
        return merge_lse(parts)[0]
    if causal and (mask is not None or bias is not None or length != source):
        # SDPA's own causal mode excludes a mask and aligns the first query, not the last, with the first key.
        order = torch.ones(length, source, dtype=torch.bool, device=q.device).tril(source - length)
        mask, causal = order if mask is None else mask & order, False
    seeing = None
    if mask is not None:
        # What SDPA gives for a row without a visible key differs by version and kernel: such rows see all,
        # then get 0.
        seeing = mask.any(-1, keepdim=True)
        mask = mask | ~seeing
    attn_mask = mask if bias is None else bias if mask is None else bias.masked_fill(~mask, float("-inf"))
    if attn_mask is not None and attn_mask.dtype != torch.bool:
        attn_mask = attn_mask.to(q.dtype)
    if attn_mask is not None and attn_mask.dim() < 4:
        attn_mask = attn_mask[(None,) * (4 - attn_mask.dim())]
    if width < q.shape[-1]:  # the fused kernels want one width
        v = F.pad(v, (0, q.shape[-1] - width))
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    folded = heads != kv_heads and length == 1
    if folded:
        # One step of decoding: the heads of a group become rows of one product, and the cache is read once,
        # not copied.
        q = q.reshape(q.shape[0], kv_heads, heads // kv_heads, q.shape[-1])
        causal = False
        if attn_mask is not None and attn_mask.shape[1] > 1:
            attn_mask = attn_mask.reshape(attn_mask.shape[0], kv_heads, heads // kv_heads, source)
    # With a mask the kernels of an accelerator know no groups, and torch would fall back to the full score
    # matrix.
    grouped = heads != kv_heads and not folded
    if grouped and attn_mask is not None and q.device.type != "cpu":
        k, v = (t.repeat_interleave(heads // kv_heads, 1) for t in (k, v))
        grouped = False
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, dropout_p=drop, is_causal=causal, scale=scale, enable_gqa=grouped
    )
    if folded:
        y = y.reshape(y.shape[0], heads, 1, y.shape[-1])
    if seeing is not None:
        y = y.masked_fill(~seeing, 0.0)
    return y.transpose(1, 2)[..., :width]


def _is_long(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether more keys than queries, on a CPU, make a mask that costs more than the attention."""
    if q.device.type != "cpu" or torch.compiler.is_exporting() or v.shape[3] > q.shape[3]:
        return False
    return 1 < q.shape[1] < k.shape[1] and q.shape[1] * k.shape[1] > _MASK


def _windowed(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, before: int, after: int, scale: float, drop: float
) -> Tensor:
    """Keys from `before` places before the query's own to `after` behind it; mask: broadcastable to (B, 1, 1, S)."""
    length, width = q.shape[1], v.shape[-1]
    first = max(k.shape[1] - length - before, 0)  # what no query sees
    k, v = k[:, first:], v[:, first:]
    key_mask = None if mask is None else mask[..., first:].expand(q.shape[0], 1, 1, -1).flatten(0, 2)
    dense: dict[str, Any] = {"causal": False, "bias": None, "window": None, "scale": scale, "drop": drop}
    if length <= MIN_BLOCK:
        distance = torch.arange(length, device=q.device).unsqueeze(1) + (k.shape[1] - length)
        distance = distance - torch.arange(k.shape[1], device=q.device)
        seen = ((distance <= before) & (distance >= -after))[None, None]
        return softmax_sdpa(q, k, v, mask=seen if key_mask is None else seen & key_mask[:, None, None], **dense)
    if q.device.type == "cpu" and drop == 0:
        v = v if width == q.shape[-1] else F.pad(v, (0, q.shape[-1] - width))
        return band_attention(q, k, v, key_mask, before, after, scale)[..., :width]
    return blocked_attention(q, k, v, key_mask, before, after, partial(softmax_sdpa, **dense))
