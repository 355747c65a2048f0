"""The formulas: errors and scores of single forecasts, elementwise unless a docstring says otherwise.

y is the target, f the point forecast (the 0.5 quantile of a quantile forecast, the location of Student's t),
q the forecast quantile at level tau. The means over observed targets are taken in metrics.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

DECILES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)


def squared_error(forecast: Tensor, target: Tensor) -> Tensor:
    """(y - f)^2. Its mean is MSE, the root of that mean RMSE."""
    return (target - forecast).square()


def absolute_error(forecast: Tensor, target: Tensor) -> Tensor:
    """|y - f|. Its mean is MAE; divided by the seasonal scale first, MASE."""
    return (target - forecast).abs()


def percentage_error(forecast: Tensor, target: Tensor, zero: float | Tensor = 0.0) -> Tensor:
    """|y - f| / |y| as a fraction, NaN where |y| <= zero. Its mean over the rest is MAPE."""
    size = target.abs()
    return torch.where(size > zero, (target - forecast).abs() / size.clamp_min(1e-300), torch.nan)


def symmetric_percentage_error(forecast: Tensor, target: Tensor, zero: float | Tensor = 0.0) -> Tensor:
    """2 |y - f| / (|y| + |f|), between 0 and 2, and 0 where both are zero. Its mean is sMAPE."""
    size = target.abs() + forecast.abs()
    # NaN in, NaN out: a forecast that is not a number must not score as perfect.
    return torch.where(size <= zero, 0.0, 2 * (target - forecast).abs() / size.clamp_min(1e-300))


def pinball(quantile: Tensor, target: Tensor, level: float) -> Tensor:
    """max(tau (y - q), (tau - 1)(y - q)), half the absolute error at tau = 0.5."""
    if not 0 < level < 1:
        raise ValueError(f"level={level} must be between 0 and 1")
    error = target - quantile
    return torch.maximum(level * error, (level - 1) * error)


def crps_quantiles(quantiles: Tensor, target: Tensor, levels: Sequence[float]) -> Tensor:
    """CRPS approximated by the mean over the levels of twice the pinball loss.

    CRPS = 2 int_0^1 pinball(q_tau, y, tau) dtau, which the mean over evenly spaced levels approaches.
    quantiles: (..., Q); target: (...).
    """
    if len(levels) != quantiles.shape[-1]:
        raise ValueError(f"{len(levels)} levels, but quantiles has shape {tuple(quantiles.shape)}")
    total = torch.zeros_like(target)
    for quantile, level in zip(quantiles.unbind(-1), levels, strict=True):
        total = total + 2 * pinball(quantile, target, level)
    return total / len(levels)


def crps_samples(samples: Tensor, target: Tensor) -> Tensor:
    """CRPS of the empirical distribution of n samples: mean |x_i - y| - sum_ij |x_i - x_j| / (2 n^2).

    samples: (..., n); target: (...). The double sum is taken from the sorted samples in O(n log n).
    """
    n = samples.shape[-1]
    ordered = samples.sort(dim=-1).values
    rank = torch.arange(n, device=samples.device, dtype=samples.dtype)
    spread = (ordered * (2 * rank - n + 1)).sum(-1) / n**2
    return (samples - target.unsqueeze(-1)).abs().mean(-1) - spread


def crps_student_t(df: Tensor, loc: Tensor, scale: Tensor, target: Tensor) -> Tensor:
    """Exact CRPS of Student's t with df > 1, in fp64 (Jordan, Krueger & Lerch 2019, appendix A).

    With z = (y - loc) / scale, F and p the standard distribution function and density:
    CRPS / scale = z (2 F(z) - 1) + 2 p(z) (df + z^2) / (df - 1)
                   - 2 sqrt(df) / (df - 1) B(1/2, df - 1/2) / B(1/2, df/2)^2.
    Above df = 1e6 the value at 1e6 is taken (it differs from the normal one by less than 1e-6 of the scale).
    """
    df, loc, scale, target = torch.broadcast_tensors(df.double(), loc.double(), scale.double(), target.double())
    if bool((df <= 1).any()) or bool((scale <= 0).any()):
        raise ValueError(
            f"the CRPS of Student's t needs df > 1 and scale > 0, not df={df.min():g}, scale={scale.min():g}"
        )
    df = df.clamp_max(1e6)
    z = (target - loc) / scale
    log_beta = math.lgamma(0.5) + torch.lgamma(df / 2) - torch.lgamma((df + 1) / 2)
    density = torch.exp(-(df + 1) / 2 * torch.log1p(z.square() / df) - log_beta) / df.sqrt()
    log_beta_2 = math.lgamma(0.5) + torch.lgamma(df - 0.5) - torch.lgamma(df)
    constant = 2 * df.sqrt() / (df - 1) * torch.exp(log_beta_2 - 2 * log_beta)
    # z (2F - 1) = |z| (1 - P(|T| > |z|)), which keeps its digits in the tails
    inner = z.abs() * (1 - _two_sided_tail(z, df))
    return scale * (inner + 2 * density * (df + z.square()) / (df - 1) - constant)


def _two_sided_tail(z: Tensor, df: Tensor) -> Tensor:
    """P(|T| > |z|) = I_x(df/2, 1/2) at x = df / (df + z^2), the regularised incomplete beta."""
    half = torch.full_like(df, 0.5)
    x = df / (df + z.square())
    y = z.square() / (df + z.square())  # 1 - x without cancellation
    direct = x < (df / 2 + 1) / (df / 2 + 2.5)  # where the continued fraction converges fast
    a, b = torch.where(direct, df / 2, half), torch.where(direct, half, df / 2)
    u, v = torch.where(direct, x, y), torch.where(direct, y, x)
    log_beta = torch.lgamma(a) + torch.lgamma(b) - torch.lgamma(a + b)
    front = torch.exp(a * torch.log(u) + b * torch.log(v) - log_beta) / a
    value = front * _beta_fraction(a, b, u)
    # at z = 0 and z = inf the logarithms above are infinite and the limits known
    value = torch.where(u == 0, 0.0, value)
    return torch.where(direct, value, 1 - value)


def _beta_fraction(a: Tensor, b: Tensor, x: Tensor) -> Tensor:
    """Lentz's continued fraction of the incomplete beta function (Press et al., Numerical Recipes, 6.4)."""
    tiny = 1e-300
    c = torch.ones_like(x)
    d = 1 / _away_from_zero(1 - (a + b) * x / (a + 1), tiny)
    h = d
    for m in range(1, 400):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        factor = torch.ones_like(x)
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d, tiny)
            c = _away_from_zero(1 + term / c, tiny)
            factor = factor * d * c
        h = h * factor
        if bool(((factor - 1).abs() < 1e-13).all()):
            break
    return h


def _away_from_zero(value: Tensor, tiny: float) -> Tensor:
    return torch.where(value.abs() < tiny, tiny, value)


def seasonal_scale(values: np.ndarray, season: int, observed: np.ndarray | None = None) -> float:
    """MASE's denominator: the in-sample mean |y_t - y_{t - season}| over t >= season where both are observed.

    values: (L,), the train part of one series; NaN is unobserved. NaN where no such pair exists (MASE then
    skips the series). Hyndman & Koehler 2006. Read in pieces, so a memory-mapped column is never copied
    whole.
    """
    if season < 1:
        raise ValueError(f"season={season} must be at least 1")
    total, count, piece = 0.0, 0, 1 << 20
    for start in range(season, len(values), piece):
        now = np.asarray(values[start : start + piece], dtype=np.float64)
        before = np.asarray(values[start - season : start - season + len(now)], dtype=np.float64)
        both = np.isfinite(now) & np.isfinite(before)
        if observed is not None:
            both &= observed[start : start + len(now)] & observed[start - season : start - season + len(now)]
        total += float(np.abs(now - before)[both].sum())
        count += int(both.sum())
    return total / count if count else math.nan


def zero_threshold(mean: np.ndarray | Tensor, std: np.ndarray | Tensor) -> Tensor:
    """The size below which an original-unit value counts as zero after a round trip through float32 scaling.

    A true zero (solar radiation at night) comes back as about 6e-8 |mean|; without this MAPE would divide by
    it.
    """
    return 1e-6 * (torch.as_tensor(mean).double().abs() + torch.as_tensor(std).double().abs())
