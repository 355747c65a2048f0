"""Output distributions of a forecaster: how P raw numbers per step become a point, quantiles and a loss.

Shapes: raw and params (..., P), target and observed (...).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

DEFAULT_LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)


def _mean(loss: Tensor, observed: Tensor | None) -> Tensor:
    """Mean over the observed targets; 0 (with a gradient path) when there is none."""
    if observed is None:
        return loss.mean()
    return torch.where(observed, loss, loss.new_zeros(())).sum() / observed.sum().clamp_min(1)


class _LinearOutput:
    """Outputs whose parameters live in the units of the data."""

    num_params: int

    @property
    def locations(self) -> tuple[int, ...]:
        """Indices of the parameters that move with the data."""
        return tuple(range(self.num_params))

    def constrain(self, raw: Tensor) -> Tensor:
        return raw

    def affine(self, params: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        """The parameters of loc + scale * Y; loc and scale broadcast against (...)."""
        return params * scale.unsqueeze(-1) + loc.unsqueeze(-1)


class PointOutput(_LinearOutput):
    """One number per step, trained with loss "mse", "mae" or "huber" (threshold 1 on scaled data)."""

    def __init__(self, loss: str = "mse") -> None:
        if loss not in ("mse", "mae", "huber"):
            raise ValueError(f"unknown point loss {loss!r}; known: mse, mae, huber")
        self.loss_name = loss
        self.num_params = 1
        self.levels: tuple[float, ...] = ()

    def point(self, params: Tensor) -> Tensor:
        return params[..., 0]

    def quantile(self, params: Tensor, levels: Sequence[float]) -> Tensor:
        raise ValueError("a point forecast has no quantiles; train with task.loss=quantile or task.loss=student_t")

    def loss(self, params: Tensor, target: Tensor, observed: Tensor | None = None) -> Tensor:
        error = params[..., 0].float() - target
        if self.loss_name == "mse":
            value = error.square()
        elif self.loss_name == "mae":
            value = error.abs()
        else:
            value = F.huber_loss(error, torch.zeros_like(error), reduction="none")
        return _mean(value, observed)


class QuantileOutput(_LinearOutput):
    """One number per quantile level, trained with the pinball loss max(q e, (q - 1) e), e = target - prediction."""

    def __init__(self, levels: Sequence[float] = DEFAULT_LEVELS) -> None:
        levels = tuple(float(q) for q in levels)
        if not levels or list(levels) != sorted(set(levels)) or not 0 < levels[0] <= levels[-1] < 1:
            raise ValueError(f"quantiles={list(levels)} must be increasing and between 0 and 1")
        if 0.5 not in levels:
            raise ValueError(f"quantiles={list(levels)} must contain 0.5, the point forecast")
        self.levels = levels
        self.num_params = len(levels)

    def point(self, params: Tensor) -> Tensor:
        return self.quantile(params, (0.5,))[..., 0]

    def quantile(self, params: Tensor, levels: Sequence[float]) -> Tensor:
        """(..., len(levels)): crossing quantiles are sorted, levels between the trained ones interpolated linearly."""
        ordered = params.float().sort(dim=-1).values
        known = torch.tensor(self.levels, dtype=torch.float64)
        columns = []
        for level in levels:
            if not self.levels[0] - 1e-9 <= level <= self.levels[-1] + 1e-9:
                raise ValueError(f"quantile {level} lies outside the trained levels {list(self.levels)}")
            right = min(int(torch.searchsorted(known, level - 1e-9)), len(self.levels) - 1)
            left = max(right - 1, 0)
            span = self.levels[right] - self.levels[left]
            weight = 1.0 if span == 0 else (level - self.levels[left]) / span
            columns.append(ordered[..., left] * (1 - weight) + ordered[..., right] * weight)
        return torch.stack(columns, dim=-1)

    def loss(self, params: Tensor, target: Tensor, observed: Tensor | None = None) -> Tensor:
        levels = torch.tensor(self.levels, device=params.device, dtype=torch.float32)
        error = target.unsqueeze(-1) - params.float()
        # twice the pinball loss, so that with the median alone it is the absolute error
        pinball = 2 * torch.maximum(levels * error, (levels - 1) * error)
        return _mean(pinball.mean(-1), observed)


class StudentTOutput:
    """Student's t with degrees of freedom 2 + softplus, location and scale softplus; trained by likelihood."""

    num_params = 3
    locations = (1,)
    levels: tuple[float, ...] = ()
    _EPS = 1e-4

    def constrain(self, raw: Tensor) -> Tensor:
        df, loc, scale = raw.float().unbind(-1)
        return torch.stack((2 + F.softplus(df), loc, F.softplus(scale) + self._EPS), dim=-1)

    def affine(self, params: Tensor, loc: Tensor, scale: Tensor) -> Tensor:
        df, m, s = params.unbind(-1)
        return torch.stack((df, m * scale + loc, s * scale.abs()), dim=-1)

    def point(self, params: Tensor) -> Tensor:
        return params[..., 1]

    def quantile(self, params: Tensor, levels: Sequence[float]) -> Tensor:
        df, loc, scale = (p.unsqueeze(-1) for p in params.double().unbind(-1))
        return (loc + scale * student_t_quantile(df, levels)).to(params.dtype)

    def loss(self, params: Tensor, target: Tensor, observed: Tensor | None = None) -> Tensor:
        df, loc, scale = params.float().unbind(-1)
        return _mean(-torch.distributions.StudentT(df, loc, scale, validate_args=False).log_prob(target), observed)


def _student_t_cdf(t: Tensor, df: Tensor) -> Tensor:
    """P(T <= t) by 64-point Gauss-Legendre integration of cos^(df-1) over the angle arctan(t / sqrt(df)), fp64."""
    nodes, weights = _legendre(64)
    theta = torch.atan(t / df.sqrt())
    angles = theta.unsqueeze(-1) * (nodes + 1) / 2
    integral = (torch.cos(angles).pow(df.unsqueeze(-1) - 1) * weights).sum(-1) * theta / 2
    log_beta = math.lgamma(0.5) + torch.lgamma(df / 2) - torch.lgamma((df + 1) / 2)
    return 0.5 + integral / log_beta.exp()


def _legendre(count: int) -> tuple[Tensor, Tensor]:
    import numpy as np

    nodes, weights = np.polynomial.legendre.leggauss(count)
    return torch.from_numpy(nodes), torch.from_numpy(weights)


def student_t_quantile(df: Tensor, levels: Sequence[float]) -> Tensor:
    """Standard quantiles for df (..., 1) >= 2, (..., len(levels)) fp64, from an exact table over 1/df, interpolated.

    The quantile is a smooth function of 1/df on (0, 1/2]; 2,049 points keep the error under 1e-6.
    """
    grid = torch.linspace(0.0, 0.5, 2049, dtype=torch.float64)
    table_df = 1 / grid.clamp_min(1e-6)
    position = (1 / df.double().clamp_min(2.0)).clamp(grid[0], grid[-1]) * (len(grid) - 1) / 0.5
    left = position.floor().long().clamp(max=len(grid) - 2)
    columns = []
    for level in levels:
        if not 0 < level < 1:
            raise ValueError(f"quantile {level} must be between 0 and 1")
        low = torch.full_like(grid, -1.0)
        while bool((_student_t_cdf(low, table_df) > min(level, 1 - level)).any()):
            low = low * 2
        high = torch.zeros_like(grid)
        for _ in range(60):  # bisection in fp64: the interval ends below rounding
            middle = (low + high) / 2
            below = _student_t_cdf(middle, table_df) < min(level, 1 - level)
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        table = ((low + high) / 2 * (1.0 if level <= 0.5 else -1.0)).to(df.device)
        weight = position - left
        columns.append(table[left] * (1 - weight) + table[left + 1] * weight)
    return torch.cat(columns, dim=-1)


OutputDistribution = PointOutput | QuantileOutput | StudentTOutput


def create_output(name: str, *, levels: Sequence[float] | None = None, **options: Any) -> OutputDistribution:
    """Build an output by the name of its loss: mse, mae, huber (points), quantile, student_t."""
    if options:
        raise ValueError(f"unknown options {sorted(options)} for the output {name!r}")
    if name in ("mse", "mae", "huber"):
        return PointOutput(name)
    if name == "quantile":
        return QuantileOutput(DEFAULT_LEVELS if levels is None else levels)
    if name == "student_t":
        return StudentTOutput()
    from ..registry import did_you_mean

    raise ValueError(f"unknown loss {name!r}.{did_you_mean(name, ['mse', 'mae', 'huber', 'quantile', 'student_t'])}")
