"""The S4D convolution of plain torch operations on real numbers, for any length: what an exported model holds.

B batch, L length, D channels, N states, C chunk length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..portable import Parts, chunk_scan, delayed
from .chunked import s4d_conv_chunked

CHUNK = 64


def s4d_conv_portable(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    skip: Tensor | None,
    c_reverse: Tensor | None,
    lengths: Tensor | None,
    state: Tensor | None,
    output_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """`s4d_conv` with checked arguments, u in fp32 or fp64 with zeros beyond `lengths`. With a state as
    `s4d_conv_chunked`."""
    if state is not None or output_state:
        ends = {"lengths": lengths, "state": state, "output_state": output_state}
        return s4d_conv_chunked(u, log_a, b, c, skip=skip, c_reverse=c_reverse, **ends)
    y = _convolved(u, log_a, b, c)
    if c_reverse is not None:  # later tokens, of which the next is at lag 0
        y = y + _convolved(delayed(u.flip(1), 1), log_a, b, c_reverse).flip(1)
    return (y if skip is None else y + skip * u), None


def _convolved(u: Tensor, log_a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """y_t = 2 Re sum_n c_n b_n sum_{s <= t} a_n^(t - s) u_s."""
    length = u.shape[1]
    size = max(1, min(CHUNK, length)) if isinstance(length, int) else CHUNK
    place = torch.arange(size, device=u.device)
    steps = place.to(u.dtype)
    kernel = 2 * _power(log_a, steps, b * c)[0].sum(1)  # (D, C)
    lag = place.unsqueeze(1) - place
    toeplitz = kernel[:, lag.clamp(min=0)] * (lag >= 0)  # (D, C, C)
    write = _power(log_a, steps.flip(0), b)
    decay = _power(log_a, steps.new_full((1,), size), None)
    real, imag = _power(log_a, steps + 1, 2 * c)
    given = toeplitz, real.transpose(1, 2), imag.transpose(1, 2), *write, *decay
    zero = u.new_zeros(*log_a.shape, u.shape[0])
    return chunk_scan(_chunk, (zero, zero.clone()), (u,), size, given)[1]


def _chunk(carried: Parts, parts: Parts, given: Parts) -> tuple[Parts, Tensor]:
    toeplitz, real, imag, write_real, write_imag, ar, ai = given
    chunk, (xr, xi) = parts[0].permute(2, 1, 0), carried  # (D, C, B), (D, N, B) twice
    y = toeplitz @ chunk + real @ xr - imag @ xi
    after = xr * ar - xi * ai + write_real @ chunk, xr * ai + xi * ar + write_imag @ chunk
    return after, y.permute(2, 1, 0)


def _power(log_a: Tensor, steps: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """weight a^steps, (D, N, C), as real and imaginary part."""
    size = torch.exp(log_a.real.unsqueeze(2) * steps)
    angle = log_a.imag.unsqueeze(2) * steps
    real, imag = size * torch.cos(angle), size * torch.sin(angle)
    if weight is None:
        return real, imag
    wr, wi = weight.real.unsqueeze(2), weight.imag.unsqueeze(2)
    return wr * real - wi * imag, wr * imag + wi * real
