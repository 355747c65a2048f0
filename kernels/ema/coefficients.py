"""From the parameters of the damped EMA to its recurrence, and their published initial values."""

from __future__ import annotations

import torch
from torch import Tensor


def ema_coefficients(delta: Tensor, alpha: Tensor, beta: Tensor, gamma: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(log q, b, c), (D, N) in fp32 or fp64: h_t = q h_{t-1} + b x_t, y_t = sum_n c h_t.

    p = sigmoid(delta) weighs the input, q = 1 - p sigmoid(alpha) is the damped decay, b = p beta and
    c = gamma / sqrt(N) (arXiv:2209.10655, eq. 5 and 6, where p is called alpha and sigmoid(alpha) delta).
    """
    wide = torch.promote_types(delta.dtype, torch.float32)
    with torch.autocast(delta.device.type, enabled=False):
        p = torch.sigmoid(delta.to(wide))
        log_q = torch.log1p(-p * torch.sigmoid(alpha.to(wide)))
        return log_q, p * beta.to(wide), gamma.to(wide) * gamma.shape[-1] ** -0.5


def initialize_ema(rows: int, num_dims: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """delta, alpha, beta, gamma (rows, N) as published: N(0, 0.2), N(0, 0.2), +-1 in turn + N(0, 0.02), N(0, 1)."""
    shape = rows, num_dims
    sign = torch.ones(num_dims)
    sign[1::2] = -1.0
    return 0.2 * torch.randn(shape), 0.2 * torch.randn(shape), sign + 0.02 * torch.randn(shape), torch.randn(shape)
