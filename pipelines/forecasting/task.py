"""What the command does for forecasting: build, check, report and predict."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..checkpoints import saved_parameters
from ..errors import UserError
from ..nets import mixer_class
from ..results import print_table, write_csv, write_metrics
from .calendar import seasonality
from .data import ForecastData
from .module import ForecastModule
from .report import draw, forecast_all, forecast_batch, score_rows, season_scales, shown_steps

_LENGTHS = ("seq_len", "pred_len")
_SHAPE_KEYS = ("targets", "past_covariates", "future_covariates", "static_covariates", "freq", *_LENGTHS)


Data = ForecastData


def build_data(cfg: dict[str, Any]) -> ForecastData:
    """The data module of a config."""
    return ForecastData(**cfg["data"], seed=cfg["seed"])


def build_module(cfg: dict[str, Any], data: ForecastData) -> ForecastModule:
    """The module of a config, for the columns, frequency and scaler of the data."""
    model = dict(cfg["model"])
    return ForecastModule(
        model,
        cfg["task"],
        cfg["optimizer"],
        cfg["scheduler"],
        data.schema(),
        mixer_class=mixer_class(model, cfg),
    )


def load_module(checkpoint: dict[str, Any], path: Path, cfg: dict[str, Any]) -> ForecastModule:
    """The module that a checkpoint holds. Raises UserError when it is not one of forecasting."""
    saved = saved_parameters(checkpoint, "forecasting", path)
    module = ForecastModule(**saved, mixer_class=mixer_class(saved["model"], cfg))
    module.load_state_dict(checkpoint["state_dict"])
    return module


def check_resume(checkpoint: dict[str, Any], module: ForecastModule, path: Path) -> None:
    """Raise UserError naming what differs when a checkpoint is of another model or other data."""
    saved = checkpoint.get("hyper_parameters", {})
    own = dict(module.hparams)
    for key in ("model", "task"):
        if saved.get(key) != own[key]:
            changed = sorted(
                k for k in {*saved.get(key, {}), *own[key]} if saved.get(key, {}).get(k) != own[key].get(k)
            )
            detail = ", ".join(
                f"{key}.{k}={own[key].get(k)!r} here, {saved.get(key, {}).get(k)!r} there" for k in changed
            )
            raise UserError(f"{path} is of another run, it cannot be resumed: {detail}")
    _compare_schema(saved.get("schema", {}), own["schema"], path)


def prepare_test(module: ForecastModule, data: ForecastData) -> None:
    """Give the module what a test needs of its data: the season, the scaling and the scales of MASE."""
    module.season, module.scaler = seasonality(data.table.freq), data.scaler
    module.season_scale = season_scales(data, module.season)


def check_schema(module: ForecastModule, data: ForecastData, path: Path) -> None:
    """Raise UserError when the data's columns, frequency or lengths are not those the checkpoint was trained on; with
    `any_series` only the lengths count."""
    any_series = bool(module.schema.get("any_series"))
    if any_series != data.any_series:
        raise UserError(f"{path} was trained with data.any_series={str(any_series).lower()}, give the same")
    _compare_schema(module.schema, data.schema(), path, _LENGTHS if any_series else _SHAPE_KEYS)


def _compare_schema(
    saved: dict[str, Any], own: dict[str, Any], path: Path, keys: tuple[str, ...] = _SHAPE_KEYS
) -> None:
    for key in keys:
        if saved.get(key) != own[key]:
            raise UserError(f"{path} was trained with data.{key}={saved.get(key)!r}, here it is {own[key]!r}")


def report(
    trainer: Any, module: ForecastModule, data: ForecastData, run_dir: Path, cfg: dict[str, Any]
) -> dict[str, Any]:
    """Print and write the test scores of the model beside the naive baselines, and draw the pictures."""
    results = {name: {unit: sums.compute() for unit, sums in units.items()} for name, units in module.test_sums.items()}
    print_table(score_rows(results), title=f"test: {data.path}, {module.schema['pred_len']} steps ahead")
    channels = score_rows(results, by="channel")
    horizons = score_rows(results, by="horizon")
    print_table(channels, title="MAE by channel, original units")
    print_table(shown_steps(horizons), title="MAE by steps ahead, scaled units")
    write_csv(run_dir / "test_by_channel.csv", channels)
    write_csv(run_dir / "test_by_horizon.csv", horizons)
    model = module.hparams["model"]["name"]
    best = results[model]["scaled"]["overall"]
    metrics = {"test/mse": best["mse"], "test/mae": best["mae"], "test": results}
    write_metrics(run_dir, {"test": results}, name="test")
    draw(module, data, results, run_dir)
    print(f"tables and pictures in {run_dir}", flush=True)
    return metrics


@torch.no_grad()
def predict(trainer: Any, module: ForecastModule, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Forecast the steps after the end of each series of `data.path` and write them as a table."""
    from ..pictures import plot_forecasts
    from .predict import check_output_path, write_frame

    output = check_output_path(cfg.get("output") or run_dir / "forecast.csv")
    given = cfg["data"]
    keys = ["time_column", "id_column", "gaps", "cache_dir", "eval_batch_size"]
    if module.schema.get("any_series"):
        keys += ["targets", "freq"]
    data = ForecastData.for_prediction(given["path"], module.schema, **{k: given[k] for k in keys if k in given})
    module.season, module.scaler = seasonality(data.table.freq), data.scaler
    frame, example = forecast_all(module, data)
    write_frame(frame, output)
    plot_forecasts(
        **example,
        path=run_dir / "forecast.png",
        title=f"{module.hparams['model']['name']} on {Path(str(data.path)).stem}",
    )
    print(frame.head(6).to_string(index=False))
    print(f"{len(frame)} rows in {output}", flush=True)
    result = {"rows": len(frame)}
    if cfg["task"].get("backtest_windows"):
        result.update(_backtest(module, data, cfg["task"], run_dir))
    return result


def _backtest(module: ForecastModule, data: ForecastData, options: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Forecast the known past of `data.path` from earlier cut-offs, all in one batched pass, without refitting."""
    from .backtest import backtest, backtest_ranges, backtest_summary
    from .predict import write_frame
    from .windows import WindowDataset

    seq_len, pred_len = module.schema["seq_len"], module.schema["pred_len"]
    step = options.get("backtest_step") or pred_len
    ranges = backtest_ranges([int(n) for n in data.table.history], seq_len, pred_len, step, options["backtest_windows"])
    dataset = WindowDataset(
        data.table,
        seq_len=seq_len,
        pred_len=pred_len,
        ranges=np.array(ranges),
        scaler=data.scaler,
        stride=step,
    )
    frame = backtest(lambda batch: forecast_batch(module, batch), dataset, batch_size=data.eval_batch_size)
    write_frame(frame, run_dir / "backtest.csv")
    summary = backtest_summary(frame)
    print_table(summary.to_dict("records"), title=f"backtest: {len(dataset)} cut-offs, {step} steps apart")
    print(f"{len(frame)} rows in {run_dir / 'backtest.csv'}", flush=True)
    return {"backtest_windows": len(dataset)}
