"""The S4D convolution of plain torch operations on real numbers, for any length: what an exported model holds.

B batch, L length, D channels, N states, C chunk length, n chunks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..portable import complex_scan, delayed, from_blocks, to_blocks
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
        return s4d_conv_chunked(u, log_a, b, c, skip=skip, c_reverse=c_reverse, **ends)  # type: ignore[arg-type]
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
    toeplitz = kernel[:, lag.clamp(min=0)] * (lag >= 0)
    blocks = to_blocks(u, size)  # (B, n, C, D)
    y = torch.einsum("dts,bnsd->bntd", toeplitz, blocks)
    written = [torch.einsum("dms,bnsd->bndm", part, blocks) for part in _power(log_a, steps.flip(0), b)]
    decay = [part[None, None, :, :, 0] for part in _power(log_a, steps.new_full((1,), size), None)]
    states = complex_scan((decay[0], decay[1]), (written[0], written[1]))
    real, imag = _power(log_a, steps + 1, c)
    before = [delayed(part, 1) for part in states]
    y = y + 2 * torch.einsum("dmt,bndm->bntd", real, before[0]) - 2 * torch.einsum("dmt,bndm->bntd", imag, before[1])
    return from_blocks(y, length)


def _power(log_a: Tensor, steps: Tensor, weight: Tensor | None) -> tuple[Tensor, Tensor]:
    """weight a^steps, (D, N, C), as real and imaginary part."""
    size = torch.exp(log_a.real.unsqueeze(2) * steps)
    angle = log_a.imag.unsqueeze(2) * steps
    real, imag = size * torch.cos(angle), size * torch.sin(angle)
    if weight is None:
        return real, imag
    wr, wi = weight.real.unsqueeze(2), weight.imag.unsqueeze(2)
    return wr * real - wi * imag, wr * imag + wi * real
