"""From a continuous diagonal state space to the discrete one, and the powers of its transition."""

from __future__ import annotations

import torch
from torch import Tensor


def discretize(a: Tensor, b: Tensor, dt: Tensor, method: str = "zoh") -> tuple[Tensor, Tensor]:
    """(log Abar, Bbar), complex (D, N), of x' = a x + b u sampled every dt.

    zoh: Abar = exp(dt a), Bbar = (exp(dt a) - 1) / a * b. bilinear: Abar = (1 + dt a / 2) / (1 - dt a / 2),
    Bbar = dt b / (1 - dt a / 2). a, b: complex (D, N) or (N,), Re a < 0. dt: real (D,).
    """
    z = dt.unsqueeze(-1) * a
    if method == "zoh":
        return z, _expm1(z) / a * b
    if method == "bilinear":
        return torch.log((2 + z) / (2 - z)), dt.unsqueeze(-1) * b / (1 - z / 2)
    raise ValueError(f"discretization={method!r}: choose from zoh, bilinear")


def _expm1(z: Tensor) -> Tensor:
    """exp(z) - 1 without cancellation for small z, where dt is small and fp32 would lose half of its
    digits."""
    real, imag = z.real, z.imag
    grown = torch.expm1(real)
    half = torch.sin(imag / 2)
    return torch.complex(grown * torch.cos(imag) - 2 * half * half, (grown + 1) * torch.sin(imag))


def powers(log_a: Tensor, count: int) -> Tensor:
    """a^0 .. a^(count - 1), complex (D, N, count), by doubling: as many products as entries and few
    exponentials.

    The factors a^(2^k) are squared in double precision, so an entry carries log2(count) roundings of its own
    dtype.
    """
    factor = torch.exp(log_a.to(torch.complex128))
    table = torch.ones_like(log_a).unsqueeze(-1)
    while table.shape[-1] < count:
        more = table[..., : count - table.shape[-1]] * factor.to(log_a.dtype).unsqueeze(-1)
        table = torch.cat((table, more), -1)
        factor = factor * factor
    return table
