"""The forecasts that a model has to beat, from the window alone, with missing values.

past: (B, L, C); observed: bool (B, L, C), True where a value is known; the result is (B, pred_len, C). A
channel with nothing observed in the window gets 0, which in scaled space is its mean over the train part.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Baseline = Callable[[Tensor, Tensor, int], Tensor]


def naive(past: Tensor, observed: Tensor, pred_len: int) -> Tensor:
    """The last observed value at every step."""
    _check(past, observed, pred_len)
    last, _ = _last(past, observed)
    return last.unsqueeze(1).expand(-1, pred_len, -1)


def seasonal_naive(past: Tensor, observed: Tensor, pred_len: int, season: int) -> Tensor:
    """The last observed value at the same phase of the season.

    A phase that was never observed in the window (or L < season) falls back on the last observed value at
    all.
    """
    _check(past, observed, pred_len)
    if season < 1:
        raise ValueError(f"season={season} must be at least 1")
    batch, length, channels = past.shape
    # Pad the front, so that the rows of (B, seasons, season, C) end with the window and column j is the phase
    # of forecast step j.
    pad = -length % season
    values = torch.cat((past.new_zeros(batch, pad, channels), past), 1).unflatten(1, (-1, season))
    known = torch.cat((observed.new_zeros(batch, pad, channels), observed), 1).unflatten(1, (-1, season))
    cycle, found = _last(values, known)  # (B, season, C)
    last, _ = _last(past, observed)
    cycle = torch.where(found, cycle, last.unsqueeze(1))
    return cycle[:, torch.arange(pred_len, device=past.device) % season]


def drift(past: Tensor, observed: Tensor, pred_len: int) -> Tensor:
    """The line through the first and the last observed value, continued; level when only one is observed."""
    _check(past, observed, pred_len)
    length = past.shape[1]
    last, any_observed = _last(past, observed)
    first, _ = _last(past.flip(1), observed.flip(1))
    last_at = _last_index(observed)
    first_at = length - 1 - _last_index(observed.flip(1))
    slope = (last - first) / (last_at - first_at).clamp_min(1)
    step = torch.arange(length, length + pred_len, device=past.device).view(1, -1, 1) - last_at.unsqueeze(1)
    return torch.where(any_observed.unsqueeze(1), last.unsqueeze(1) + slope.unsqueeze(1) * step, 0.0)


def mean(past: Tensor, observed: Tensor, pred_len: int) -> Tensor:
    """The mean of the observed values of the window at every step."""
    _check(past, observed, pred_len)
    total = torch.where(observed, past, 0.0).sum(1)
    return (total / observed.sum(1).clamp_min(1)).unsqueeze(1).expand(-1, pred_len, -1)


BASELINES: dict[str, Callable[..., Tensor]] = {
    "naive": naive,
    "seasonal_naive": seasonal_naive,
    "drift": drift,
    "mean": mean,
}


def create_baselines(season: int) -> dict[str, Baseline]:
    """All baselines under the names as tables have them, e.g. "seasonal-naive-24"."""

    def seasonal(past: Tensor, observed: Tensor, pred_len: int) -> Tensor:
        return seasonal_naive(past, observed, pred_len, season)

    table: dict[str, Baseline] = {"naive": naive}
    if season > 1:
        table[f"seasonal-naive-{season}"] = seasonal
    return {**table, "drift": drift, "mean": mean}


def _check(past: Tensor, observed: Tensor, pred_len: int) -> None:
    if past.dim() != 3 or observed.shape != past.shape or observed.dtype != torch.bool:
        raise ValueError(
            f"past {tuple(past.shape)} and observed {observed.dtype} {tuple(observed.shape)} must both "
            "be (B, L, C), observed bool"
        )
    if past.shape[1] < 1 or pred_len < 1:
        raise ValueError(f"the window has {past.shape[1]} steps and pred_len={pred_len}; both must be at least 1")


def _last_index(observed: Tensor) -> Tensor:
    """Index of the last True along dimension 1, 0 where there is none."""
    position = torch.arange(observed.shape[1], device=observed.device)
    return (observed * position.view(1, -1, *[1] * (observed.dim() - 2))).amax(1)


def _last(values: Tensor, observed: Tensor) -> tuple[Tensor, Tensor]:
    """The last observed value along dimension 1 (0 where there is none), and whether there is one."""
    value = values.gather(1, _last_index(observed).unsqueeze(1)).squeeze(1)
    found = observed.any(1)
    return torch.where(found, value, 0.0), found
