"""Forecast metrics as sums and counts, so that no batch size, order or split over processes changes them.

Only observed targets count. With the formulas of scores.py, over the observed cells of a group (all of them,
one horizon step, one channel, one series):

mse, mae        mean of (y - f)^2, |y - f|                     rmse   sqrt(mse) of the group
mape            mean of |y - f| / |y| over non-zero targets, a fraction; `mape_skipped` counts the others
smape           mean of 2 |y - f| / (|y| + |f|), 0 to 2
mase            mean of |y - f| / s, s = in-sample seasonal MAE of its series and channel in the train part;
                `mase_skipped` counts targets of series where s is zero or unknown
wql             mean over the levels of sum 2 pinball / sum |y|
crps            mean CRPS: exact where the distribution gives it, else the mean over the levels of 2 pinball
coverage-80/90  share of targets inside the closed interval between the 10/90 % (5/95 %) quantiles
width-80/90     mean width of that interval
f is one point per cell for all metrics: the 0.5 quantile of a quantile forecast, the location of Student's t.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .scores import (
    DECILES,
    absolute_error,
    percentage_error,
    pinball,
    squared_error,
    symmetric_percentage_error,
)

INTERVALS = (80, 90)


def interval_levels(percent: int) -> tuple[float, float]:
    """The lower and upper quantile level of a central interval: 80 -> (0.1, 0.9)."""
    return (100 - percent) / 200, (100 + percent) / 200


def find_level(levels: Sequence[float], level: float) -> int | None:
    """The index of `level` in `levels`, None when it is not there."""
    return next((i for i, known in enumerate(levels) if abs(known - level) < 1e-9), None)


class MetricSums:
    """Adds up forecasts (B, H, C) against targets; one object per unit (scaled, original) and forecaster.

    pred_len: H. channels: C or the channel names. levels: quantile levels that `update` will get, empty for a
    point forecast. score_levels: those that wql and crps average over; None takes 0.1 ... 0.9 where all nine
    are in `levels` (so that levels added for intervals do not tilt the score), else all of `levels`.
    season_scale: (N, C), `scores.seasonal_scale` of each series and channel, or (C,); None leaves mase out.
    num_series: N for per-series results, 0 for none. exact_crps: `update` will get crps values. zero: targets
    of at most this size count as zero, a number or (C,), see `scores.zero_threshold`. percentages: False
    leaves mape and smape out, which mean nothing on scaled data.
    """

    def __init__(
        self,
        pred_len: int,
        channels: int | Sequence[str],
        *,
        levels: Sequence[float] = (),
        score_levels: Sequence[float] | None = None,
        season_scale: Tensor | None = None,
        num_series: int = 0,
        exact_crps: bool = False,
        zero: float | Tensor = 0.0,
        percentages: bool = True,
    ) -> None:
        if pred_len < 1:
            raise ValueError(f"pred_len={pred_len} must be at least 1")
        width = channels if isinstance(channels, int) else len(channels)
        self.channels = [str(i) for i in range(width)] if isinstance(channels, int) else list(channels)
        self.levels = tuple(float(level) for level in levels)
        if score_levels is None:
            deciles = all(find_level(self.levels, level) is not None for level in DECILES)
            score_levels = DECILES if deciles else self.levels
        self.score_levels = tuple(float(level) for level in score_levels)
        self.score_index: list[int] = []
        for level in self.score_levels:
            index = find_level(self.levels, level)
            if index is None:
                raise ValueError(f"score level {level} is not among the levels {list(self.levels)}")
            self.score_index.append(index)
        self.percentages = percentages
        self.exact_crps = exact_crps
        self.num_series = num_series
        self.zero = torch.as_tensor(zero, dtype=torch.float64)
        self.season_scale = None if season_scale is None else season_scale.detach().double()
        if self.season_scale is not None and self.season_scale.shape[-1] != width:
            raise ValueError(f"season_scale has shape {tuple(self.season_scale.shape)}, expected (N, {width})")

        self.intervals: dict[int, tuple[int, int]] = {}
        for percent in INTERVALS:
            low, high = (find_level(self.levels, level) for level in interval_levels(percent))
            if low is not None and high is not None:
                self.intervals[percent] = (low, high)
        names = ["count", "squared", "absolute", "size"]
        if percentages:
            names += ["percentage", "percentage_count", "symmetric"]
        if self.season_scale is not None:
            names += ["scaled", "scaled_count"]
        if exact_crps:
            names += ["crps"]
        names += [f"pinball-{level}" for level in self.score_levels]
        names += [f"{kind}-{percent}" for percent in self.intervals for kind in ("inside", "width")]
        self.sums = {name: torch.zeros(pred_len, width, dtype=torch.float64) for name in names}
        series_names = ["count", "squared", "absolute"] + (["scaled", "scaled_count"] if "scaled" in names else [])
        self.series_sums = {
            name: torch.zeros(num_series, width, dtype=torch.float64) for name in series_names if num_series
        }

    @torch.no_grad()
    def update(
        self,
        point: Tensor,
        target: Tensor,
        observed: Tensor | None = None,
        *,
        quantiles: Tensor | None = None,
        crps: Tensor | None = None,
        series: Tensor | None = None,
    ) -> None:
        """Add a batch.

        point, target: (B, H, C). observed: bool (B, H, C), True where the target is known; None = everywhere
        it is finite. quantiles: (B, H, C, Q) at `levels`. crps: (B, H, C). series: int64 (B,), the series of
        each window.
        """
        if point.shape != target.shape or point.shape[1:] != self.sums["count"].shape:
            raise ValueError(
                f"point has shape {tuple(point.shape)} and target {tuple(target.shape)}, "
                f"expected (B, {', '.join(map(str, self.sums['count'].shape))})"
            )
        self._check(quantiles, crps, series, target)
        device = torch.device("cpu") if target.device.type == "mps" else target.device  # mps has no float64
        self._to(device)
        observed = torch.isfinite(target) if observed is None else observed
        observed = observed.to(device)
        target = target.to(device).double()
        point = point.to(device).double()

        self._add("count", observed.double(), None, series)
        self._add("squared", squared_error(point, target), observed, series)
        absolute = absolute_error(point, target)
        self._add("absolute", absolute, observed, series)
        self._add("size", target.abs(), observed)
        if self.percentages:
            percentage = percentage_error(point, target, self.zero)
            nonzero = observed & (target.abs() > self.zero)
            self._add("percentage", percentage, nonzero)
            self._add("percentage_count", nonzero.double())
            self._add("symmetric", symmetric_percentage_error(point, target, self.zero), observed)
        if self.season_scale is not None:
            scale = self.season_scale
            if scale.dim() == 2 and series is not None:
                scale = scale[series.to(device)].unsqueeze(1)
            usable = observed & (scale > 0)
            self._add("scaled", absolute / scale, usable, series)
            self._add("scaled_count", usable.double(), None, series)
        if crps is not None:
            self._add("crps", crps.to(device).double(), observed)
        if quantiles is not None:
            self._add_quantiles(quantiles, target, observed)

    def _check(self, quantiles: Tensor | None, crps: Tensor | None, series: Tensor | None, target: Tensor) -> None:
        expected = (*target.shape, len(self.levels))
        if self.levels and (quantiles is None or quantiles.shape != expected):
            given = None if quantiles is None else tuple(quantiles.shape)
            raise ValueError(f"quantiles has shape {given}, expected {expected} for the levels {list(self.levels)}")
        if quantiles is not None and not self.levels:
            raise ValueError("quantiles were given, but this MetricSums was made without levels")
        if self.exact_crps != (crps is not None):
            raise ValueError(
                f"exact_crps={self.exact_crps}, but crps was {'given' if crps is not None else 'not given'}"
            )
        if series is None and (self.num_series or (self.season_scale is not None and self.season_scale.dim() == 2)):
            raise ValueError("series is needed: per-series results or a per-series season_scale were asked for")

    def _add_quantiles(self, quantiles: Tensor, target: Tensor, observed: Tensor) -> None:
        # one level at a time: all of them at once in float64 would be the largest tensor of the evaluation
        def at(index: int) -> Tensor:
            return quantiles[..., index].to(target.device).double()

        for level, index in zip(self.score_levels, self.score_index, strict=True):
            self._add(f"pinball-{level}", pinball(at(index), target, level), observed)
        for percent, (low, high) in self.intervals.items():
            lower, upper = at(low), at(high)
            self._add(f"inside-{percent}", ((target >= lower) & (target <= upper)).double(), observed)
            self._add(f"width-{percent}", upper - lower, observed)

    def _add(self, name: str, value: Tensor, where: Tensor | None = None, series: Tensor | None = None) -> None:
        if where is not None:
            # chosen, not multiplied by the mask: a NaN at a missing target would survive a product with zero
            value = torch.where(where, value, 0.0)
        self.sums[name] += value.sum(0)
        if name in self.series_sums and series is not None:
            self.series_sums[name].index_add_(0, series.to(value.device), value.sum(1))

    def _to(self, device: torch.device) -> None:
        if self.sums["count"].device != device:
            self.sums = {name: value.to(device) for name, value in self.sums.items()}
            self.series_sums = {name: value.to(device) for name, value in self.series_sums.items()}
            self.zero = self.zero.to(device)
            if self.season_scale is not None:
                self.season_scale = self.season_scale.to(device)

    def flat(self) -> Tensor:
        """All sums and counts as one float64 vector: adding those of two objects adds what they have seen."""
        parts = [*self.sums.values(), *self.series_sums.values()]
        return torch.cat([part.reshape(-1) for part in parts])

    def reduce(self, add_over_processes: Callable[[Tensor], Tensor]) -> None:
        """Replace the sums by those over processes, e.g. `lambda t: strategy.reduce(t, reduce_op="sum")`."""
        self._load(add_over_processes(self.flat()))

    def merge(self, other: MetricSums) -> None:
        """Add what another object of the same configuration has seen."""
        if list(self.sums) != list(other.sums) or self.flat().shape != other.flat().shape:
            raise ValueError("only MetricSums made with the same arguments can be merged")
        self._load(self.flat() + other.flat().to(self.sums["count"].device))

    def _load(self, flat: Tensor) -> None:
        position = 0
        for table in (self.sums, self.series_sums):
            for name, value in table.items():
                table[name] = flat[position : position + value.numel()].reshape(value.shape).clone()
                position += value.numel()

    def compute(self, *, series: bool = True) -> dict[str, Any]:
        """The metrics as plain numbers; NaN where no target was observed.

        {"overall": {metric: number}, "horizon": {metric: [H numbers]}, "channel": {metric: [C numbers]}} and,
        with `num_series`, "series": {metric: [N numbers]}, {"count": ..., "channels": names}.
        """
        sums = {name: value.cpu() for name, value in self.sums.items()}
        groups = {
            "overall": {name: value.sum() for name, value in sums.items()},
            "horizon": {name: value.sum(1) for name, value in sums.items()},
            "channel": {name: value.sum(0) for name, value in sums.items()},
        }
        if self.num_series and series:
            groups["series"] = {name: value.cpu().sum(1) for name, value in self.series_sums.items()}
        result: dict[str, Any] = {group: self._metrics(values) for group, values in groups.items()}
        return {**result, "channels": self.channels}

    def _metrics(self, sums: dict[str, Tensor]) -> dict[str, Any]:
        count = sums["count"]
        metrics = {"mse": sums["squared"] / count, "mae": sums["absolute"] / count}
        metrics["rmse"] = metrics["mse"].sqrt()
        if "percentage" in sums:
            metrics["mape"] = sums["percentage"] / sums["percentage_count"]
            metrics["mape_skipped"] = count - sums["percentage_count"]
            metrics["smape"] = sums["symmetric"] / count
        if "scaled" in sums:
            metrics["mase"] = sums["scaled"] / sums["scaled_count"]
            metrics["mase_skipped"] = count - sums["scaled_count"]
        if any(name.startswith("pinball") for name in sums):
            losses = torch.stack([2 * sums[f"pinball-{level}"] for level in self.score_levels])
            metrics["wql"] = (losses / sums["size"]).mean(0)
            metrics["crps"] = losses.mean(0) / count
        if "crps" in sums:
            metrics["crps"] = sums["crps"] / count
        for percent in self.intervals:
            if f"inside-{percent}" in sums:
                metrics[f"coverage-{percent}"] = sums[f"inside-{percent}"] / count
                metrics[f"width-{percent}"] = sums[f"width-{percent}"] / count
        metrics["count"] = count
        whole = {"count", "mape_skipped", "mase_skipped"}
        return {name: _plain(value, int if name in whole else float) for name, value in metrics.items()}


def _plain(value: Tensor, kind: type) -> Any:
    numbers = value.tolist()
    if isinstance(numbers, list):
        return [kind(number) for number in numbers]
    return kind(numbers)


def evaluate(
    point: Tensor,
    target: Tensor,
    observed: Tensor | None = None,
    *,
    quantiles: Tensor | None = None,
    levels: Sequence[float] = (),
    season_scale: Tensor | None = None,
    crps: Tensor | None = None,
) -> dict[str, float]:
    """The overall metrics of forecasts (B, H, C) in one call; arguments as for `MetricSums`.

    season_scale: (C,), the same for every window.
    """
    sums = MetricSums(
        point.shape[1], point.shape[2], levels=levels, season_scale=season_scale, exact_crps=crps is not None
    )
    sums.update(point, target, observed, quantiles=quantiles, crps=crps)
    return sums.compute()["overall"]


def is_better(metric: str, value: float, than: float) -> bool:
    """Whether an error is smaller; a NaN is never better."""
    if metric.startswith("coverage"):
        nominal = int(metric.partition("-")[2]) / 100
        value, than = abs(value - nominal), abs(than - nominal)
    return not math.isnan(value) and (math.isnan(than) or value < than)
