"""The damped EMA with its whole kernel and an FFT, as published: O(L log L). Its rounding mixes positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ..s4d_conv.chunked import from_channels, to_channels
from ..s4d_conv.fft import fast_length
from .chunked import CHUNK, advance, final_state, make_tables, split, with_tail
from .naive import Coefficients, EmaState


def ema_kernel(weights: Coefficients, length: int) -> Tensor:
    """k_l = sum_n c_n b_n q_n^l, (D, length): q^(i + T j) = q^i q^(T j), one product instead of D N L exponentials."""
    log_q, b, c = weights
    inner = max(1, round(length**0.5))
    near = torch.arange(inner, device=b.device, dtype=b.dtype)
    far = torch.arange(0, length, inner, device=b.device, dtype=b.dtype)
    low = torch.exp(log_q.unsqueeze(-1) * near) * (c * b).unsqueeze(-1)
    high = torch.exp(log_q.unsqueeze(-1) * far)
    return (high.transpose(1, 2) @ low).flatten(1)[:, :length]


def ema_fft(
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
    batch, length, dim = x.shape
    channels = to_channels(x)
    full = None if truncation is None else with_tail(channels, truncation, state)
    # With a truncated kernel the inputs before the first are convolved too; else they are in the state alone.
    source, before = (channels, 0) if full is None or state is None else (full, full.shape[2] - length)
    taps = length if truncation is None else min(truncation, length + before)
    size = fast_length(source.shape[2] + taps)
    kernel = ema_kernel(ahead, taps)
    if skip is not None:
        kernel = torch.cat((kernel[:, :1] + skip.unsqueeze(1), kernel[:, 1:]), 1)
    kernel = F.pad(kernel, (0, size - taps))
    if behind is not None:
        reverse = ema_kernel(behind, taps)  # lag -l stands at size - l, lag 0 counts in both
        kernel = kernel + torch.cat((reverse[:, :1], kernel.new_zeros(dim, size - taps), reverse[:, 1:].flip(1)), 1)
    spectrum = torch.fft.rfft(source, n=size) * torch.fft.rfft(kernel, n=size).unsqueeze(1)
    y = torch.fft.irfft(spectrum, n=size)[..., before : before + length]
    if state is None and not output_state:
        return from_channels(y), None
    chunk = min(CHUNK, length)
    tables = make_tables(ahead, chunk, truncation)
    parts = [channels] if full is None else [full[..., :length], channels]
    drive = torch.cat([split(part, chunk) for part in parts], 3)
    if state is not None and full is None:
        alone = advance(torch.zeros_like(drive), tables, state)
        y = y + (alone.flatten(1, 2) @ tables.read).view(dim, batch, -1)[..., :length]
    if not output_state:
        return from_channels(y), None
    states = advance(drive, tables, state)
    return from_channels(y), final_state(drive, full, tables, states, lengths, length)
