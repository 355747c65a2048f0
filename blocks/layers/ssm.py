"""What the selective state spaces have in common: how their time steps start and where they are checked."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def check_step_options(dt_min: float, dt_max: float, dt_init_floor: float) -> None:
    """Raises ValueError for bounds of the initial time step out of order."""
    if not 0 < dt_min <= dt_max:
        raise ValueError(f"dt_min={dt_min} and dt_max={dt_max} must satisfy 0 < dt_min <= dt_max")
    if not dt_init_floor > 0:
        raise ValueError(f"dt_init_floor={dt_init_floor} must be positive")


def inner_width(dim: int, expand: float) -> int:
    """int(expand * dim), E. Raises ValueError when that is below 1."""
    inner = int(expand * dim)
    if inner < 1:
        raise ValueError(f"expand={expand!r} leaves int(expand * dim)={inner} channels for dim={dim}")
    return inner


def step_bias(
    number: int, *, dt_min: float, dt_max: float, floor: float, device: torch.device | str | None = None
) -> Tensor:
    """softplus^-1(dt) for `number` steps dt, log dt uniform between log dt_min and log dt_max, dt at least `floor`."""
    low, high = math.log(dt_min), math.log(dt_max)
    dt = torch.exp(torch.rand(number, device=device, dtype=torch.float32) * (high - low) + low).clamp(min=floor)
    return dt + torch.log(-torch.expm1(-dt))  # log(exp(dt) - 1) without the overflow
