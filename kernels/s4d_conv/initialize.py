"""Initial values of a diagonal state space, arXiv:2206.11893, in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

INITS = ("lin", "inv", "real", "legs")


def initialize(name: str, d_state: int) -> tuple[Tensor, Tensor]:
    """(A, B), complex128 (d_state / 2,): one of each conjugate pair, with n = 0 .. d_state / 2 - 1.

    lin: A = -1/2 + i pi n. inv: A = -1/2 + i N/pi (N / (2n + 1) - 1), N = d_state. real: A = -(n + 1). B = 1
        for these.
    legs: A the eigenvalues, in the upper half plane, of the normal part of HiPPO-LegS, B HiPPO's B in the
    eigenbasis whose phases make it positive (C absorbs a phase).
    """
    if name == "legs":
        return _legs(d_state)
    n = torch.arange(d_state // 2, dtype=torch.float64)
    half = torch.full_like(n, -0.5)
    if name == "lin":
        a = torch.complex(half, torch.pi * n)
    elif name == "inv":
        a = torch.complex(half, d_state / torch.pi * (d_state / (2 * n + 1) - 1))
    elif name == "real":
        a = torch.complex(-(n + 1), torch.zeros_like(n))
    else:
        raise ValueError(f"init={name!r}: choose from {', '.join(INITS)}")
    return a, torch.ones_like(a)


def _legs(size: int) -> tuple[Tensor, Tensor]:
    """HiPPO-LegS is A = S - 1/2 - p p^T with S skew, p_n = sqrt(n + 1/2), and B = sqrt(2) p; S - 1/2 is
    normal."""
    p = torch.sqrt(torch.arange(size, dtype=torch.float64) + 0.5)
    outer = p.unsqueeze(1) * p
    skew = outer.triu(1) - outer.tril(-1)
    values, vectors = torch.linalg.eigh(-1j * skew)
    upper = slice(size // 2, size)  # ascending, in +- pairs
    a = torch.complex(torch.full((size // 2,), -0.5, dtype=torch.float64), values[upper])
    b = (vectors[:, upper].mH @ (p * 2**0.5).to(vectors.dtype)).abs()
    return a, torch.complex(b, torch.zeros_like(b))
