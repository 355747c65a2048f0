"""Sliding-window attention on the CPU: torch's fused kernel on the slice of keys that each run of queries can see.

No keys are copied, and nothing outlives a run, forwards or backwards. B batch, L queries, S keys, H heads, K width, C
queries of a run.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

# A run scores C - 1 keys per query in vain; the fused kernel works better on longer runs, which pays for wide windows.
_RUN, _LONG_RUN, _WIDE = 64, 256, 1024

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


class _Runs:
    """The runs of queries: slices of queries and of keys, what is added to their scores, and who sees nothing."""

    def __init__(self, q: Tensor, k: Tensor, key_mask: Tensor | None, before: int, after: int) -> None:
        self.length, self.source, self.dtype = q.shape[1], k.shape[1], q.dtype
        self.before, self.after = before, after
        self.key_mask = None if key_mask is None or bool(key_mask.all()) else key_mask
        self._last: tuple[tuple[int, int, int], Tensor] | None = None

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
        size = _LONG_RUN if self.before + self.after >= _WIDE else _RUN
        for first in range(0, self.length, size):
            last = min(first + size, self.length)
            own = self.source - self.length + first  # the key at the place of the first query
            start = max(own - self.before, 0)
            end = max(min(own + last - first + self.after, self.source), 0)
            if start >= end:  # more queries than keys, the first of which see none
                continue
            added, blind = self._added(last - first, own - start, end - start), None
            if self.key_mask is not None and not bool(self.key_mask[:, start:end].all()):
                hidden = (added != 0) | ~self.key_mask[:, None, None, start:end]
                blind = hidden.all(3, keepdim=True)
                # Who sees nothing sees all here, and is put right by the caller.
                added = torch.zeros_like(hidden, dtype=self.dtype).masked_fill_(hidden & ~blind, float("-inf"))
            elif own - start < 0:
                blind = (added != 0).all(3, keepdim=True)
                added = added.masked_fill(blind, 0.0)
            yield slice(first, last), slice(start, end), added, blind

    def _added(self, rows: int, ahead: int, columns: int) -> Tensor:
        """(1, 1, rows, columns), -inf outside of the window; row 0 stands at column `ahead`. Most runs share one."""
        if self._last is None or self._last[0] != (rows, ahead, columns):
            distance = torch.arange(rows).unsqueeze(1) + ahead - torch.arange(columns)
            hidden = (distance > self.before) | (distance < -self.after)
            added = torch.zeros(1, 1, rows, columns, dtype=self.dtype).masked_fill_(hidden, float("-inf"))
            self._last = (rows, ahead, columns), added
        return self._last[1]


@torch.library.custom_op("seqzoo::softmax_band", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, before: int, after: int, scale: float
) -> tuple[Tensor, Tensor]:
    """o (B, L, H, K) and the log-sum-exp of the scores (B, H, L) in float32 or wider, 0 for who sees nothing."""
    o = q.new_zeros(q.shape)
    lse = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], dtype=torch.promote_types(q.dtype, torch.float32))
    heads = [t.transpose(1, 2) for t in (q, k, v)]
    for rows, columns, added, blind in _Runs(q, k, key_mask, before, after):
        part = heads[0][:, :, rows], heads[1][:, :, columns], heads[2][:, :, columns]
        found, total = _attend(*part, 0.0, False, attn_mask=added, scale=scale)
        if blind is not None:
            found, total = found.masked_fill(blind, 0.0), total.masked_fill(blind.squeeze(3), 0.0)
        o[:, rows], lse[:, :, rows] = found.transpose(1, 2), total
    return o, lse


@torch.library.custom_op("seqzoo::softmax_band_backward", mutates_args=(), device_types="cpu")
def _backward(
    do: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    lse: Tensor,
    key_mask: Tensor | None,
    before: int,
    after: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    do = do if do.stride(3) == 1 else do.contiguous()
    dq, wide = q.new_zeros(q.shape), lse.dtype
    dk, dv = (t.new_zeros(t.shape, dtype=wide) for t in (k, v))
    heads = [t.transpose(1, 2) for t in (do, q, k, v, o)]
    for rows, columns, added, blind in _Runs(q, k, key_mask, before, after):
        grad, q_part, o_part = (heads[i][:, :, rows] for i in (0, 1, 4))
        keys = heads[2][:, :, columns], heads[3][:, :, columns]
        if blind is not None:
            grad = grad.masked_fill(blind, 0.0)
        found = _attend_backward(grad, q_part, *keys, o_part, lse[:, :, rows], 0.0, False, attn_mask=added, scale=scale)
        dq[:, rows] = found[0].transpose(1, 2)
        dk[:, columns] += found[1].transpose(1, 2)
        dv[:, columns] += found[2].transpose(1, 2)
    return dq, dk.to(k.dtype), dv.to(v.dtype)


@_forward.register_fake
def _(q, k, v, key_mask, before, after, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide)


@_backward.register_fake
def _(do, q, k, v, o, lse, key_mask, before, after, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    q, k, v, key_mask, *options = inputs
    ctx.save_for_backward(q, k, v, *output, key_mask)
    ctx.options = options


def _gradient(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(do, *ctx.saved_tensors, *ctx.options), *[None] * 4


_forward.register_autograd(_gradient, setup_context=_setup_context)


def band_attention(
    q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, before: int, after: int, scale: float
) -> Tensor:
    """The window of `softmax_attention` in time O(L w), on a CPU. v as wide as k; key_mask: bool (B, S)."""
    if torch.is_autocast_enabled("cpu"):  # as SDPA does
        q, k, v = (t if t.dtype == torch.float64 else t.to(torch.get_autocast_dtype("cpu")) for t in (q, k, v))
    # The kernel walks along the channels.
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    return _forward(q, k, v, key_mask, before, after, scale)[0]
