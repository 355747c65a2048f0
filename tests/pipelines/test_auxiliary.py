"""Auxiliary losses of mixers in training: they enter the loss, are logged, and running statistics resume exactly."""

from __future__ import annotations

from pathlib import Path

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch

from seqzoo.pipelines.forecasting.data import ForecastData
from seqzoo.pipelines.forecasting.module import ForecastModule


@pytest.fixture
def data(tmp_path: Path) -> ForecastData:
    hours = np.arange(120)
    values = np.sin(hours / 4) + np.random.default_rng(0).normal(0, 0.1, 120)
    path = tmp_path / "waves.csv"
    pd.DataFrame({"date": pd.date_range("2024-01-01", periods=120, freq="h"), "y": values}).to_csv(path, index=False)
    return ForecastData(path, seq_len=24, pred_len=4, batch_size=8, steps=4, num_workers=0)


def build(data: ForecastData, weight: float) -> ForecastModule:
    torch.manual_seed(0)
    mixer = {
        "name": "long_vq",
        "commitment_weight": weight,
        "codebook_size": 6,
        "chunk_size": 2,
        "threshold_ema_dead_code": 0.5,
    }
    return ForecastModule(
        {"name": "patch_tiny", "mixer": mixer, "patch_len": 4, "stride": 2, "proj_drop": 0.0},
        {"loss": "mse", "quantiles": None},
        {"name": "adam", "lr": 1e-2, "weight_decay": 0.0, "betas": [0.9, 0.999]},
        {"name": "none"},
        data.schema(),
    )


def trainer(folder: Path, epochs: int) -> L.Trainer:
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        default_root_dir=folder,
    )


def test_the_commitment_loss_enters_the_loss_and_is_logged(data: ForecastData) -> None:
    batch = next(iter(data.train_dataloader()))
    found = {}
    for weight in (0.0, 0.3):
        module = build(data, weight).train()
        logged: dict[str, torch.Tensor] = {}
        module.log = lambda name, value, logged=logged, **_: logged.update({name: value})  # type: ignore[assignment]
        found[weight] = module.training_step(batch, 0), logged
        module.on_train_epoch_end()
    (plain, none), (loss, logged) = found[0.0], found[0.3]
    assert none["train/commitment"] == 0 and logged["train/commitment"] > 1e-3
    torch.testing.assert_close(loss - plain, logged["train/commitment"], atol=1e-5, rtol=0)
    assert logged["train/loss"] == loss and 1 < logged["train/codebook_perplexity"] <= 6


def test_validation_and_test_leave_the_codebook_and_report_the_task_alone(data: ForecastData, tmp_path: Path) -> None:
    module = build(data, 1e3)
    run = trainer(tmp_path, 1)
    run.fit(module, data)
    assert {"train/commitment", "train/codebook_perplexity"} <= set(run.callback_metrics)
    assert run.callback_metrics["val/loss"] < 20 < run.callback_metrics["train/commitment"]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    run.validate(module, data, verbose=False)
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_a_resumed_run_has_the_codebook_of_one_that_never_stopped(data: ForecastData, tmp_path: Path) -> None:
    whole, first, second = build(data, 1e-4), build(data, 1e-4), build(data, 1e-4)
    trainer(tmp_path, 3).fit(whole, data)
    start = trainer(tmp_path, 1)
    start.fit(first, data)
    start.save_checkpoint(tmp_path / "part.ckpt")
    trainer(tmp_path, 3).fit(second, data, ckpt_path=tmp_path / "part.ckpt", weights_only=True)
    names = [name for name in whole.state_dict() if "quantizer" in name]
    assert len(names) == 3 and whole.state_dict()[names[-1]] == 12  # sum, count, updates
    for name, value in whole.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name
