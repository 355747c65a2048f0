"""Decayed linear attention as mixers use it: causal or from both ends, over all tokens or over one rank's part."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...kernels.gated_linear_attention import (
    bidirectional_gated_linear_attention,
    gated_chunk_summary,
    gated_linear_attention,
)
from ..protocol import Exchange


def decayed_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    causal: bool,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    exchange: Exchange | None = None,
    lengths: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """`gated_linear_attention`, or without causal its bidirectional form: o (B, L, H, V), and the state or None.

    exchange: of a mixer whose sequence is split over ranks. The states of the other ranks' parts come in one all-gather
    (from both ends: one each), then the operation runs on own tokens after them (LASP-2, arXiv:2502.07563). state and
    what is returned belong to the whole sequence.
    """
    if exchange is None:
        options["lengths"] = lengths
        if not causal:
            return bidirectional_gated_linear_attention(q, k, v, log_decay, **options), None
        options |= {"initial_state": initial_state, "return_state": return_state}
        return gated_linear_attention(q, k, v, log_decay, **options)
    decay, state = gated_chunk_summary(k, v, log_decay)
    start = None if initial_state is None else [initial_state]
    (before,), last = exchange.prefix([decay], [state], start, return_last=return_state)
    if causal:
        o, _ = gated_linear_attention(q, k, v, log_decay, initial_state=before, **options)
        return o, None if last is None else last[0]
    turned = log_decay if log_decay.dim() == 1 else log_decay.flip(1)
    decay, state = gated_chunk_summary(k.flip(1), v.flip(1), turned)
    (behind,), _ = exchange.reversed.prefix([decay], [state])
    return bidirectional_gated_linear_attention(q, k, v, log_decay, before=before, behind=behind, **options), None
