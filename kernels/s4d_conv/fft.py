"""S4D with the whole kernel and an FFT: O(L log L). Its rounding mixes positions, so the past is equal only
to 1e-6."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .chunked import (
    CHUNK,
    final_state,
    from_channels,
    make_tables,
    s4d_kernel_chunked,
    scan,
    to_channels,
)


def fast_length(least: int) -> int:
    """The smallest 2^i, 3 * 2^i or 5 * 2^i that is at least `least`."""
    return min(base << max(0, -(-least // base) - 1).bit_length() for base in (1, 3, 5))


def s4d_conv_fft(
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
    """`s4d_conv` with checked arguments, u in fp32 or fp64 with zeros beyond `lengths`."""
    batch, length, dim = u.shape
    size = fast_length(2 * length)
    kernel = s4d_kernel_chunked(log_a, b * c, length)
    if skip is not None:
        kernel = torch.cat((kernel[:, :1] + skip.unsqueeze(1), kernel[:, 1:]), 1)
    if c_reverse is not None:
        # lag -(m + 1) stands at size - (m + 1): the reverse kernel fills the circle from its end
        behind = s4d_kernel_chunked(log_a, b * c_reverse, length).flip(1)
        kernel = torch.cat((kernel, kernel.new_zeros(dim, size - 2 * length), behind), 1)
    channels = to_channels(u)
    spectrum = torch.fft.rfft(channels, n=size) * torch.fft.rfft(kernel, n=size).unsqueeze(1)
    y = torch.fft.irfft(spectrum, n=size)[..., :length]
    if state is None and not output_state:
        return from_channels(y), None
    chunk = min(CHUNK, length)
    groups = -(-length // chunk)
    tables = make_tables(log_a, b, c, chunk)
    decay = tables.power[..., chunk]
    channels = F.pad(channels, (0, groups * chunk - length))
    local = (channels.view(dim, batch * groups, chunk) @ tables.write).view(dim, batch, groups, -1, 2)
    local = torch.view_as_complex(local)
    start = None if state is None else torch.view_as_complex(state.contiguous()).transpose(0, 1)
    if start is not None:
        alone = torch.view_as_real(scan(torch.zeros_like(local), decay, start))
        y = y + (alone.reshape(dim, batch * groups, -1) @ tables.read).view(dim, batch, -1)[..., :length]
    if not output_state:
        return from_channels(y), None
    if lengths is None:
        lengths = torch.full((batch,), length, device=u.device)
    last = ((lengths - 1).clamp(min=0) // chunk).view(1, -1, 1, 1)
    states = scan(local, decay, start)
    before = states.gather(2, last.expand(dim, -1, 1, states.shape[3])).squeeze(2)
    return from_channels(y), final_state(u, tables, before, lengths)
