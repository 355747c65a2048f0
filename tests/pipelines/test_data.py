"""The data module: the sample, the schema, prediction on new files, bad arguments, exact resume with Lightning."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.forecasting import samples
from seqzoo.pipelines.forecasting.data import ForecastData
from seqzoo.pipelines.forecasting.module import ForecastModule

FAST = {"seq_len": 24, "pred_len": 6, "batch_size": 16}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "cache"))


def write(path: Path, rows: int = 200, freq: str = "h", ids: tuple[str, ...] = (), **columns: Any) -> Path:
    index = np.arange(rows)
    frame = pd.DataFrame({"ds": pd.date_range("2024-03-01", periods=rows, freq=freq), "y": np.sin(index) + 3})
    for name, value in columns.items():
        frame[name] = value
    if ids:
        frame = pd.concat([frame.assign(unique_id=name) for name in ids])
    frame.to_csv(path, index=False)
    return path


def weather() -> ForecastData:
    pytest.importorskip("pvlib", reason="the sample lies in the pvlib wheel")
    return ForecastData("weather", **FAST)


# ----------------------------------------------------------------------------------------------------- sample


def test_weather_is_a_continuous_year_of_nine_channels() -> None:
    data = weather()
    table = data.table
    assert table.targets == tuple(samples.WEATHER_COLUMNS.values()) and len(table.targets) == 9
    assert table.num_rows == 8760 and table.freq == "h" and not table.has_missing
    ends = [str(pd.Timestamp(int(table.times[i]))) for i in (0, 23, -1)]
    assert ends == ["1990-01-01 01:00:00", "1990-01-02 00:00:00", "1991-01-01 00:00:00"]
    assert table.columns["temperature"].std() == pytest.approx(9.91, abs=0.01)
    day = table.columns["temperature"]
    assert np.abs(day[24:] - day[:-24]).mean() == pytest.approx(3.23, abs=0.01)  # the known seasonal naive error
    by_hour = table.columns["ghi"].reshape(-1, 24).mean(axis=0)  # row 0 is the hour ending at 01:00
    assert by_hour[:5].max() == 0 and 11 <= by_hour.argmax() <= 13


def test_the_sample_needs_its_package_but_never_imports_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    weather()
    program = (
        "import sys; from seqzoo.pipelines.forecasting.samples import sample_path; sample_path('weather'); "
        "print('pvlib' in sys.modules)"
    )
    environment = {**os.environ, "SEQZOO_CACHE": str(tmp_path / "other")}
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "False"
    monkeypatch.setattr(samples, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install seqzoo\[samples\]"):
        ForecastData("weather", cache_dir=tmp_path / "third").setup()
    with pytest.raises(UserError, match="no file"):
        ForecastData("wether").setup()


# ------------------------------------------------------------------------------------------------ data module


def test_loaders_of_every_stage_with_a_trainer(tmp_path: Path) -> None:
    data = ForecastData(write(tmp_path / "t.csv", ids=("a", "b")), eval_batch_size=7, **FAST)
    data.prepare_data()
    data.setup("fit")
    data.setup("test")
    module = Probe()
    trainer = quiet_trainer(tmp_path)
    trainer.fit(module, data)
    trainer.validate(module, data, verbose=False)
    assert sum(module.sizes["val"]) == len(data.dataset("val"))
    trainer.test(module, data, verbose=False)
    assert sum(module.sizes["test"]) == len(data.dataset("test")) == 2 * (40 - 6 + 1)
    outputs = trainer.predict(module, data)
    assert [int(o) for output in outputs for o in output] == [200, 200]
    assert sum(module.sizes["train"]) == len(data.dataset("train"))


@pytest.mark.parametrize(("model", "features"), [("dlinear", 0), ("informer", 4)])
def test_calendar_features_are_made_for_models_that_read_them(tmp_path: Path, model: str, features: int) -> None:
    data = ForecastData(write(tmp_path / "t.csv"), **FAST)
    options = {"dim": 8, "num_heads": 2, "label_len": 2} if model == "informer" else {}
    module = ForecastModule(
        {"name": model, **options},
        {"loss": "mse", "quantiles": None},
        {"name": "adam", "lr": 1e-3, "weight_decay": 0.0, "betas": [0.9, 0.999]},
        {"name": "none"},
        data.schema(),
    )
    seen = []
    module.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]["past_time"].shape[-1]))
    quiet_trainer(tmp_path).validate(module, data, verbose=False)
    assert set(seen) == {features}


def test_steps_and_empty_parts(tmp_path: Path) -> None:
    data = ForecastData(write(tmp_path / "t.csv"), steps=3, split_ratio=[0.8, 0, 0.2], **FAST)
    assert len(data.train_dataloader()) == 3 and data.val_dataloader() == []
    assert len(data.dataset("train", stride=10)) == 14


def test_schema_is_plain_and_survives_json(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", ids=("a", "b"), promo=1.0, size=2.0)
    data = ForecastData(path, future_covariates=["promo"], static_covariates=["size"], **FAST)
    schema = data.schema()
    assert json.loads(json.dumps(schema)) == schema
    assert schema["targets"] == ["y"] and schema["freq"] == "h" and schema["num_time_features"] == 4
    assert schema["scaler"]["unique_ids"] == ["a", "b"] and schema["time_column"] == "ds"


BAD_ARGUMENTS = [
    ({"pred_len": 0}, "data.pred_len=0 must be a whole number of at least 1"),
    ({"seq_len": 0}, "data.seq_len=0"),
    ({"seq_len": 2.5}, "data.seq_len=2.5"),
    ({"batch_size": True}, "data.batch_size"),
    ({"steps": 0}, "data.steps=0"),
    ({"num_workers": -1}, "data.num_workers=-1 must be a whole number of at least 0"),
    ({"gaps": "fil"}, "Did you mean fill?"),
    ({"split": "ett"}, "Did you mean ett_hour"),
    ({"scope": "all"}, "data.scope='all' is unknown. Known: series, global."),
    ({"short_series": "x"}, "data.short_series"),
    ({"freq": "hourly"}, "data.freq='hourly' is no time step"),
]


@pytest.mark.parametrize(("options", "expected"), BAD_ARGUMENTS)
def test_bad_arguments_are_refused_before_the_file_is_read(options: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        ForecastData("nowhere.csv", **options)
    assert expected in str(caught.value)


# ------------------------------------------------------------------------------------------------- prediction


def test_prediction_on_a_new_file_uses_the_trained_scaling(tmp_path: Path) -> None:
    schema = json.loads(json.dumps(ForecastData(write(tmp_path / "t.csv"), **FAST).schema()))
    frame = pd.read_csv(write(tmp_path / "new.csv", rows=40, extra="ignored"))
    frame["y"] += 100
    frame.loc[37:, "y"] = np.nan  # the sensor stopped: missing values, not an error
    frame.to_csv(tmp_path / "new.csv", index=False)
    data = ForecastData.for_prediction(tmp_path / "new.csv", schema)
    (batch,) = list(data.predict_dataloader())
    assert batch["origin"].tolist() == [40] and batch["past_observed"][0, :, 0].tolist() == [True] * 21 + [False] * 3
    values = data.scaler.inverse(batch["past_target"], batch["series"])[0, :21, 0]
    np.testing.assert_allclose(values, frame["y"][16:37], rtol=1e-5)
    assert data.scaler.mean[0, 0] == schema["scaler"]["mean"][0][0]
    with pytest.raises(UserError, match="for prediction only"):
        data.train_dataloader()


def test_what_a_new_file_may_lack_is_said(tmp_path: Path) -> None:
    train = ForecastData(write(tmp_path / "t.csv", promo=1.0), targets=["y"], future_covariates=["promo"], **FAST)
    schema = train.schema()

    def refused(path: Path, **options: Any) -> str:
        with pytest.raises(UserError) as caught:
            ForecastData.for_prediction(path, schema, **options).predict_dataloader()
        return str(caught.value)

    new = tmp_path / "new.csv"
    assert "has no column 'promo'" in refused(write(new, promos=1.0))
    half = refused(write(new, freq="30min", promo=1.0))
    assert "has steps of 30min, the model was trained on steps of h" in half
    assert "trained on steps of h" in refused(write(new, freq="D", promo=1.0), gaps="fill")
    assert "has 20 rows of history, a forecast needs 24" in refused(write(new, rows=20, promo=1.0))
    assert "has 0 row(s) after 2024-03-09 07:00:00, the forecast needs 6: add rows with promo known" in refused(
        write(new, promo=1.0)
    )
    ahead = pd.read_csv(new)
    ahead.loc[194:, "y"] = np.nan
    ahead.to_csv(new, index=False)
    assert ForecastData.for_prediction(new, schema).dataset("predict")[0]["origin"].item() == 194
    ahead.loc[197, "promo"] = np.nan
    ahead.to_csv(new, index=False)
    assert "'promo' is missing at 2024-03-09 05:00:00" in refused(new)
    assert "differs from 6, with which the model was trained" in refused(new, pred_len=12)


def test_a_window_without_any_value_is_refused(tmp_path: Path) -> None:
    schema = ForecastData(write(tmp_path / "t.csv"), **FAST).schema()
    path = write(tmp_path / "new.csv", rows=60)
    frame = pd.read_csv(path)
    frame.loc[36:, "y"] = np.nan
    frame.to_csv(path, index=False)
    with pytest.raises(UserError, match="no value of 'y' in its last 24 rows"):
        ForecastData.for_prediction(path, schema).predict_dataloader()


def test_rows_too_few_to_infer_a_step_from_take_the_trained_one(tmp_path: Path) -> None:
    options = {"seq_len": 5, "pred_len": 2}
    schema = ForecastData(write(tmp_path / "t.csv", freq="B"), **options).schema()
    assert schema["freq"] == "B"
    week = write(tmp_path / "week.csv", rows=5, freq="D")  # five days from a Friday
    with pytest.raises(UserError, match="has steps of D, the model was trained on steps of B"):
        ForecastData.for_prediction(week, schema).setup()
    frame = pd.read_csv(week)
    frame["ds"] = pd.date_range("2024-03-04", periods=5, freq="B")  # Monday to Friday: daily by itself
    frame.to_csv(week, index=False)
    data = ForecastData.for_prediction(week, schema)
    assert data.table.freq == "B" and len(data.dataset("predict")) == 1


# ----------------------------------------------------------------------------------------------------- resume


class Probe(L.LightningModule):
    """Records what it is given; its weights depend on the order of the batches."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(FAST["seq_len"], FAST["pred_len"])
        self.sizes: dict[str, list[int]] = {"train": [], "val": [], "test": []}
        self.origins: list[list[int]] = []

    def _error(self, batch: dict[str, torch.Tensor], stage: str) -> torch.Tensor:
        if not self.trainer.sanity_checking:
            self.sizes[stage].append(len(batch["series"]))
        forecast = self.net(batch["past_target"].transpose(1, 2)).transpose(1, 2)
        return (forecast - batch["future_target"]).square().mean()

    def training_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        self.origins.append(batch["origin"].tolist())
        return self._error(batch, "train")

    def on_train_start(self) -> None:
        self.sizes = {key: [] for key in self.sizes}

    def validation_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self._error(batch, "val")

    def on_validation_start(self) -> None:
        self.sizes["val"] = []

    def test_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> None:
        self._error(batch, "test")

    def predict_step(self, batch: dict[str, torch.Tensor], batch_idx: int) -> torch.Tensor:
        return batch["origin"]

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05)


def quiet_trainer(folder: Path, **options: Any) -> L.Trainer:
    return L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_epochs": 1, "enable_checkpointing": False, **options},
    )


@pytest.mark.parametrize("stop", [4, 7, 9])  # in the first epoch, at its end, in the second
def test_training_resumes_within_an_epoch_to_the_same_weights(tmp_path: Path, stop: int) -> None:
    path = write(tmp_path / "t.csv")

    def run(**options: Any) -> Probe:
        torch.manual_seed(0)
        module = Probe()
        checkpoint = options.pop("ckpt_path", None)
        trainer = quiet_trainer(tmp_path, max_epochs=3, limit_val_batches=0, **options)
        trainer.fit(module, ForecastData(path, seed=5, **FAST), ckpt_path=checkpoint)
        return module

    whole = run()
    assert len(whole.origins) == 21
    saver = Saver(tmp_path / "stop.ckpt", stop)
    run(callbacks=[saver])
    resumed = run(ckpt_path=tmp_path / "stop.ckpt")
    assert resumed.origins == whole.origins[stop:]
    torch.testing.assert_close(resumed.net.weight, whole.net.weight, rtol=0, atol=0)


class Saver(L.Callback):
    """Saves a checkpoint after a step and stops, as a kill right after would."""

    def __init__(self, path: Path, step: int) -> None:
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = True
