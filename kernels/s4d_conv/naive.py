"""S4D by its formulas: the Vandermonde kernel, a dense Toeplitz product, explicit powers for the state.
Oracle only."""

from __future__ import annotations

import torch
from torch import Tensor


def s4d_kernel_naive(log_a: Tensor, weight: Tensor, length: int) -> Tensor:
    """K_l = 2 Re sum_n weight_n exp(l log_a_n), (D, length), from the (D, N, length) Vandermonde matrix."""
    place = torch.arange(length, device=log_a.device)
    return 2 * (weight.unsqueeze(-1) * torch.exp(log_a.unsqueeze(-1) * place)).real.sum(1)


def s4d_conv_naive(
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
    batch, length, _ = u.shape
    place = torch.arange(length, device=u.device)
    lag = place.unsqueeze(1) - place
    kernel = s4d_kernel_naive(log_a, b * c, length)
    toeplitz = torch.where(lag >= 0, kernel[:, lag.clamp(min=0)], 0)
    if c_reverse is not None:
        kernel = s4d_kernel_naive(log_a, b * c_reverse, length)
        toeplitz = toeplitz + torch.where(lag < 0, kernel[:, (-lag - 1).clamp(min=0)], 0)
    y = torch.einsum("dts,bsd->btd", toeplitz, u)
    if skip is not None:
        y = y + skip * u
    start = None if state is None else torch.view_as_complex(state.contiguous())
    if start is not None:
        ahead = torch.exp(log_a.unsqueeze(-1) * (place + 1))
        y = y + 2 * torch.einsum("dn,dnt,bdn->btd", c, ahead, start).real
    if not output_state:
        return y, None
    count = torch.full((batch,), length, device=u.device) if lengths is None else lengths
    distance = count.unsqueeze(1) - 1 - place  # of token t from the last one of its row
    decay = torch.exp(log_a[None, :, :, None] * distance.clamp(min=0)[:, None, None])
    decay = decay * (distance >= 0)[:, None, None]
    final = torch.einsum("bdnt,dn,btd->bdn", decay, b, u.to(b.dtype))
    if start is not None:
        final = final + torch.exp(log_a * count.view(-1, 1, 1)) * start
    return y, torch.view_as_real(final)
