"""The damped EMA by its recurrence, one token after another. Oracle only."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class EmaState(NamedTuple):
    """h: (B, D, N) after the last token, fp32 or fp64. tail: (B, W, D), the last W inputs, None without truncation."""

    h: Tensor
    tail: Tensor | None = None


class Coefficients(NamedTuple):
    """log_q, b, c: (D, N), see `ema_coefficients`."""

    log_q: Tensor
    b: Tensor
    c: Tensor


def ema_naive(
    x: Tensor,
    ahead: Coefficients,
    behind: Coefficients | None,
    *,
    skip: Tensor | None,
    truncation: int | None,
    lengths: Tensor | None,
    state: EmaState | None,
    output_state: bool,
) -> tuple[Tensor, EmaState | None]:
    """`ema` with checked arguments, x in fp32 or fp64 with zeros beyond `lengths`."""
    y, final = _recurrence(x, ahead, truncation, lengths, state)
    if behind is not None:
        y = y + _recurrence(x.flip(1), behind, truncation, None, None)[0].flip(1)
    if skip is not None:
        y = y + skip * x
    return y, final if output_state else None


def _recurrence(
    x: Tensor, weights: Coefficients, truncation: int | None, lengths: Tensor | None, state: EmaState | None
) -> tuple[Tensor, EmaState]:
    """h_t = q h_{t-1} + b x_t - q^W b x_{t-W}: with truncation W, h holds the last W inputs only."""
    batch, length, dim = x.shape
    q, gone = torch.exp(weights.log_q), torch.exp(weights.log_q * (truncation or 0)) * weights.b
    h = x.new_zeros(batch, *weights.b.shape) if state is None else state.h
    tail = None
    if truncation is not None:
        tail = x.new_zeros(batch, truncation, dim) if state is None or state.tail is None else state.tail
    outputs = []
    for t in range(length):
        token = x[:, t, :, None]
        after = q * h + weights.b * token
        real = torch.ones(batch, dtype=torch.bool, device=x.device) if lengths is None else t < lengths
        real = real.view(-1, 1, 1)
        if tail is not None:
            after = after - gone * tail[:, 0, :, None]
            tail = torch.where(real, torch.cat((tail[:, 1:], x[:, t : t + 1]), 1), tail)
        h = torch.where(real, after, h)
        outputs.append((weights.c * after).sum(-1))
    return torch.stack(outputs, 1), EmaState(h, tail)
