"""The forecasting LightningModule: a zoo model, its output distribution, and exact test sums beside baselines."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...blocks.layers.distributions import OutputDistribution, StudentTOutput
from ...blocks.protocol import Mixer
from ...zoo import Forecaster, list_models, model_info
from ..errors import UserError
from ..nets import create_net
from ..training import TrainingModule
from .baselines import drift, mean, naive, seasonal_naive
from .calendar import seasonality
from .data import ForecastData
from .metrics import MetricSums
from .scaling import StandardScaler
from .scores import crps_student_t, zero_threshold

# quantiles that tables and files report: the ends of the 80 % and 90 % intervals, and the deciles that CRPS averages
REPORT_LEVELS = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
INTERVAL_LEVELS = (0.05, 0.1, 0.9, 0.95)

_COVARIATES = {"past": "past_covariates", "future": "future_covariates", "static": "static_covariates"}


def model_arguments(model: dict[str, Any], task: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    """The options of the zoo model that follow from the data, checked against what the model can read."""
    info = model_info(model["name"])
    uses: frozenset[str] = getattr(info.cls, "uses", frozenset())
    for kind, key in _COVARIATES.items():
        if schema[key] and kind not in uses:
            able = [n for n in list_models(task="forecasting") if kind in getattr(model_info(n).cls, "uses", ())]
            raise UserError(
                f"model {model['name']!r} does not read {kind} covariates (data.{key}={list(schema[key])}); "
                f"models that do: {', '.join(able)}"
            )
    known = {
        "seq_len": schema["seq_len"],
        "pred_len": schema["pred_len"],
        "in_channels": len(schema["targets"]),
        "num_time_features": schema["num_time_features"],
        "num_past_covariates": len(schema["past_covariates"]),
        "num_future_covariates": len(schema["future_covariates"]),
        "num_static_covariates": len(schema["static_covariates"]),
        "season": seasonality(schema["freq"]) if seasonality(schema["freq"]) <= schema["seq_len"] else 0,
        "loss": task["loss"],
        "quantiles": list(task["quantiles"]) if task["loss"] == "quantile" else None,
    }
    accepted = inspect.signature(info.cls.__init__).parameters
    given = {k: v for k, v in model.items() if k != "name"}
    return {**{k: v for k, v in known.items() if k in accepted}, **given}


class ForecastModule(TrainingModule):
    """Trains a forecaster on scaled windows; validates and tests on every window.

    model: {"name", **options} of a zoo model. task: {"loss", "quantiles"}. schema: `ForecastData.schema()`, with the
    scaler, so that a checkpoint forecasts a new file by itself. mixer_class: the class of a user's own mixer, which a
    checkpoint names but never imports.
    """

    def __init__(
        self,
        model: dict[str, Any],
        task: dict[str, Any],
        optimizer: dict[str, Any],
        scheduler: dict[str, Any],
        schema: dict[str, Any],
        mixer_class: type[Mixer] | None = None,
    ) -> None:
        super().__init__(optimizer=optimizer, scheduler=scheduler)
        self.save_hyperparameters(
            {"model": model, "task": task, "optimizer": optimizer, "scheduler": scheduler, "schema": schema}
        )
        arguments = model_arguments(model, task, schema)
        self.net: Forecaster = create_net(model["name"], arguments, mixer_class, Forecaster, "forecaster")
        if task.get("grad_checkpointing"):
            self.net.set_grad_checkpointing(True)
        if schema.get("any_series") and self.net.reads_calendar:
            raise UserError(f"data.any_series=true needs a model that reads no calendar; {model['name']!r} does")
        self.loss_name = f"{task['loss']} loss"
        self.output: OutputDistribution = self.net.output
        self.schema = schema
        self.scaler = StandardScaler.from_dict(schema["scaler"])
        self.season = seasonality(schema["freq"])
        self.season_scale: Tensor | None = None  # (N, C), set by the task before a test; None leaves MASE out
        self.test_sums: dict[str, dict[str, MetricSums]] = {}
        self._sums: dict[str, Tensor] = {}

    def setup(self, stage: str) -> None:
        """Spare the loaders the calendar features of a model that does not read them."""
        data = getattr(self.trainer, "datamodule", None)
        if isinstance(data, ForecastData):
            data.calendar = self.net.reads_calendar

    # training -------------------------------------------------------------------------------------------------------

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        params, aux = self.net.forward_aux(batch)
        observed = batch["future_observed"]
        own = self.output.loss(params, batch["future_target"], observed)
        loss, seen, _ = self.over_ranks(own, observed.sum())
        self.check_loss(seen + sum(aux.values()), batch_idx)
        self.log_auxiliary(aux, len(batch["series"]))
        self.log(
            "train/loss",
            seen + sum(value.detach() for value in aux.values()),
            on_step=True,
            on_epoch=True,
            prog_bar=True,
            batch_size=len(batch["series"]),
        )
        return loss + sum(aux.values())

    # validation: sums and counts, so that neither the batch size nor the number of processes matters ------------------

    def on_validation_epoch_start(self) -> None:
        self._sums = {k: torch.zeros((), dtype=torch.float64) for k in ("loss", "squared", "absolute", "count")}

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        params = self.net(batch)
        target, observed = batch["future_target"], batch["future_observed"]
        count = observed.sum().double().cpu()
        error = torch.where(observed, self.output.point(params).float() - target, 0.0).double()
        loss = self.output.loss(params, target, observed)
        self._sums["loss"] += loss.double().cpu() * count
        self._sums["squared"] += error.square().sum().cpu()
        self._sums["absolute"] += error.abs().sum().cpu()
        self._sums["count"] += count

    def on_validation_epoch_end(self) -> None:
        flat = torch.stack([self._sums[k] for k in ("loss", "squared", "absolute", "count")])
        if self.trainer.world_size > 1:
            flat = self.sum_over_ranks(flat)
        loss, squared, absolute, _ = (flat / flat[3].clamp_min(1)).tolist()
        values = {"val/loss": loss, "val/mse": squared, "val/mae": absolute}
        self.log_dict(values, prog_bar=True, rank_zero_only=True)

    # test -----------------------------------------------------------------------------------------------------------

    @property
    def levels(self) -> tuple[float, ...]:
        """Quantile levels that this module's forecasts have: none for a point forecast."""
        if isinstance(self.output, StudentTOutput):
            return REPORT_LEVELS
        low, high = (self.output.levels[0], self.output.levels[-1]) if self.output.levels else (1.0, 0.0)
        return tuple(q for q in REPORT_LEVELS if low <= q <= high)

    def baselines(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Forecasts (B, H, C) of the naive methods, scaled, by the name that tables show."""
        past, observed, steps = batch["past_target"], batch["past_observed"], self.schema["pred_len"]
        found = {"naive": naive(past, observed, steps)}
        if self.season > 1:
            found[f"seasonal-naive-{self.season}"] = seasonal_naive(past, observed, steps, self.season)
        return {**found, "drift": drift(past, observed, steps), "mean": mean(past, observed, steps)}

    def forecast(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor | None]:
        """The point (B, H, C) and, where there are any, the quantiles (B, H, C, len(levels)), scaled."""
        params = self.net(batch).float()
        return self.output.point(params), self.output.quantile(params, self.levels) if self.levels else None

    def to_original(self, values: Tensor, series: Tensor) -> Tensor:
        """Scaled (B, H, C) or (B, H, C, Q) to original units, fp64 on the CPU."""
        return self.scaler.inverse(values.detach().double().cpu(), series, tuple(self.schema["targets"]))

    def on_test_epoch_start(self) -> None:
        names = [self.hparams["model"]["name"], *self._baseline_names()]
        pred_len, targets = self.schema["pred_len"], list(self.schema["targets"])
        every = np.arange(len(self.scaler.mean))
        zero = zero_threshold(*self.scaler.statistics(every, tuple(targets))).amax(0)
        self.test_sums = {}
        for i, name in enumerate(names):
            levels = self.levels if i == 0 else ()
            student = i == 0 and isinstance(self.output, StudentTOutput)
            self.test_sums[name] = {
                "scaled": MetricSums(pred_len, targets, levels=levels, exact_crps=student, percentages=False),
                "original": MetricSums(pred_len, targets, levels=levels, season_scale=self.season_scale, zero=zero),
            }

    def _baseline_names(self) -> list[str]:
        seasonal = [f"seasonal-naive-{self.season}"] if self.season > 1 else []
        return ["naive", *seasonal, "drift", "mean"]

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        params = self.net(batch).float()
        point = self.output.point(params)
        quantiles = self.output.quantile(params, self.levels) if self.levels else None
        target, observed, series = batch["future_target"], batch["future_observed"], batch["series"]
        exact = None
        if isinstance(self.output, StudentTOutput):
            df, loc, scale = params.unbind(-1)
            exact = crps_student_t(df, loc, scale, target)
        model = self.hparams["model"]["name"]
        truth = self.to_original(target, series)
        self.test_sums[model]["scaled"].update(point, target, observed, quantiles=quantiles, crps=exact)
        self.test_sums[model]["original"].update(
            self.to_original(point, series),
            truth,
            observed.cpu(),
            quantiles=None if quantiles is None else self.to_original(quantiles, series),
            series=series.cpu(),
        )
        for name, forecast in self.baselines(batch).items():
            self.test_sums[name]["scaled"].update(forecast, target, observed)
            self.test_sums[name]["original"].update(
                self.to_original(forecast, series), truth, observed.cpu(), series=series.cpu()
            )

    def on_test_epoch_end(self) -> None:
        if self.trainer.world_size > 1:
            for units in self.test_sums.values():
                for sums in units.values():
                    sums.reduce(self.sum_over_ranks)
        scaled = self.test_sums[self.hparams["model"]["name"]]["scaled"].compute()["overall"]
        self.log_dict({"test/mse": scaled["mse"], "test/mae": scaled["mae"]}, rank_zero_only=True)
