"""The damped EMA of plain torch operations, for any length: what an exported model holds.

B batch, L length, D channels, N averages of a channel, C chunk length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..portable import Parts, chunk_scan
from .chunked import ema_chunked
from .naive import Coefficients, EmaState

CHUNK = 32


def ema_portable(
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
    """`ema` with checked arguments, x in fp32 or fp64 with zeros beyond `lengths`. With a state as `ema_chunked`."""
    if state is not None or output_state:
        options = {"skip": skip, "truncation": truncation, "lengths": lengths}
        return ema_chunked(x, ahead, behind, **options, state=state, output_state=output_state)  # type: ignore[arg-type]
    y = _one_sided(x, ahead, truncation)
    if behind is not None:
        y = y + _one_sided(x.flip(1), behind, truncation).flip(1)
    return (y if skip is None else y + skip * x), None


def _one_sided(x: Tensor, weights: Coefficients, truncation: int | None) -> Tensor:
    y = _average(x, weights)
    length = x.shape[1]
    if truncation is None or (isinstance(length, int) and truncation >= length):
        return y
    # What W steps have passed since is taken back: the same average, delayed and weaker by q^W.
    log_q, b, c = weights
    late = torch.nn.functional.pad(x, (0, 0, truncation, 0))[:, :length]
    return y - _average(late, Coefficients(log_q, b * torch.exp(log_q * truncation), c))


def _average(x: Tensor, weights: Coefficients) -> Tensor:
    """y_t = sum_n c_n b_n sum_{s <= t} q_n^(t - s) x_s."""
    log_q, b, c = weights
    length = x.shape[1]
    size = max(1, min(CHUNK, length)) if isinstance(length, int) else CHUNK
    place = torch.arange(size, device=x.device)
    power = torch.exp(log_q.unsqueeze(2) * place.to(x.dtype))  # (D, N, C)
    kernel = ((b * c).unsqueeze(2) * power).sum(1)
    lag = place.unsqueeze(1) - place
    toeplitz = kernel[:, lag.clamp(min=0)] * (lag >= 0)  # (D, C, C)
    write = b.unsqueeze(2) * power.flip(2)
    read = (c * torch.exp(log_q)).unsqueeze(2) * power
    decay = torch.exp(log_q * size).unsqueeze(2)
    first = x.new_zeros(*b.shape, x.shape[0])
    return chunk_scan(_chunk, (first,), (x,), size, (toeplitz, read.transpose(1, 2), write, decay))[1]


def _chunk(carried: Parts, parts: Parts, given: Parts) -> tuple[Parts, Tensor]:
    toeplitz, read, write, decay = given
    chunk, h = parts[0].permute(2, 1, 0), carried[0]  # (D, C, B), (D, N, B)
    y = toeplitz @ chunk + read @ h
    return (h * decay + write @ chunk,), y.permute(2, 1, 0)
