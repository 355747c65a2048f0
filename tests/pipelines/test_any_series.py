"""A forecaster of any single series: columns as series, files with other names and steps, its own history as scale."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.forecasting.data import ForecastData
from seqzoo.pipelines.forecasting.separate import separate_columns
from seqzoo.pipelines.forecasting.tables import load_table
from seqzoo.pipelines.run import execute

SMALL = [
    "data=csv",
    "data.any_series=true",
    "data.seq_len=24",
    "data.pred_len=6",
    "data.batch_size=16",
    "model=patch_tiny",
    "mixer=linear",
    "trainer.max_epochs=1",
    "trainer.limit_train_batches=4",
    "trainer.accelerator=cpu",
    "logger.tensorboard=false",
    "callbacks.progress=none",
]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "cache"))


def run(command: str, run_dir: Path, *overrides: str) -> dict[str, Any]:
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        cfg = compose("config", overrides=[*SMALL, f"paths.runs={run_dir.parent}", *overrides])
    return execute(command, OmegaConf.to_container(cfg, resolve=True), run_dir)


def waves(
    path: Path, freq: str = "h", rows: int = 300, names: tuple[str, ...] = ("a", "b"), scale: float = 1.0
) -> Path:
    frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=rows, freq=freq)})
    for number, name in enumerate(names):
        noise = np.random.default_rng(number).normal(0, 0.1, rows)
        frame[name] = scale * (np.sin(np.arange(rows) / 4 + number) + noise + 3 * number)
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fitted")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQZOO_CACHE", str(folder / "cache"))
        run("fit", folder / "run", f"data.path={waves(folder / 'train.csv')}")
    return folder / "run"


def test_columns_of_a_wide_file_are_series(tmp_path: Path) -> None:
    table = load_table(waves(tmp_path / "wide.csv", names=("a", "b", "c")))
    alone = separate_columns(table)
    assert alone.unique_ids == ["a", "b", "c"] and alone.targets == ("y",) and alone.freq == "h"
    assert alone.offsets.tolist() == [0, 300, 600, 900] and alone.history.tolist() == [300, 300, 300]
    for number in range(3):
        rows = slice(300 * number, 300 * (number + 1))
        np.testing.assert_array_equal(alone.values[rows, 0], table.values[:, number])
        np.testing.assert_array_equal(alone.times[rows], table.times)


def test_columns_of_a_long_file_are_series_of_each_id(tmp_path: Path) -> None:
    frame = pd.DataFrame({"ds": pd.date_range("2024-01-01", periods=4, freq="D"), "u": range(4), "v": range(10, 14)})
    other = frame.iloc[:3].assign(u=lambda x: x.u + 100, v=np.nan)
    other.loc[2, "v"] = 7
    pd.concat([frame.assign(unique_id="x"), other.assign(unique_id="z")]).to_csv(tmp_path / "long.csv", index=False)
    alone = separate_columns(load_table(tmp_path / "long.csv", targets=["u", "v"]))
    assert alone.unique_ids == ["x/u", "x/v", "z/u", "z/v"] and alone.has_missing
    assert alone.offsets.tolist() == [0, 4, 8, 11, 14]
    assert np.nan_to_num(alone.values[:, 0], nan=-1).tolist() == [
        *(0, 1, 2, 3),
        *(10, 11, 12, 13),
        *(100, 101, 102),
        *(-1, -1, 7),
    ]
    one = separate_columns(load_table(tmp_path / "long.csv", targets=["u"]))
    assert one.unique_ids == ["x", "z"]


def test_a_file_of_other_names_and_steps(fitted: Path, tmp_path: Path) -> None:
    """From the saved model alone; what it forecasts moves with the scale of the file."""
    frames = []
    for name, scale in (("one", 1.0), ("thousand", 1000.0)):
        path = waves(tmp_path / f"{name}.csv", "15min", 80, ("oil", "gas", "coal"), scale)
        given = (f"+model.pretrained={fitted / 'model'}", f"data.path={path}")
        assert run("predict", tmp_path / name, *given)["rows"] == 18
        frames.append(pd.read_csv(tmp_path / name / "forecast.csv"))
    assert frames[0].unique_id.unique().tolist() == ["oil", "gas", "coal"]
    assert frames[0].ds.iloc[0] == "2024-01-01 20:00:00" and frames[0].ds.iloc[1] == "2024-01-01 20:15:00"
    for column in ("y", "lo-80", "hi-90"):
        np.testing.assert_allclose(frames[1][column], 1000 * frames[0][column], rtol=1e-3)
    middle = frames[0].groupby("unique_id").y.mean()
    assert [round(middle[name] / 3) for name in ("oil", "gas", "coal")] == [0, 1, 2]  # each by its own history


def test_the_test_takes_other_files_too(fitted: Path, tmp_path: Path) -> None:
    given = (f"ckpt_path={fitted}/checkpoints/best.ckpt", f"data.path={waves(tmp_path / 'daily.csv', 'D', 150)}")
    scores = run("test", tmp_path / "test", *given)["test"]
    assert "seasonal-naive-7" in scores and "seasonal-naive-24" not in scores
    data = ForecastData(tmp_path / "daily.csv", any_series=True, seq_len=24, pred_len=6)
    last = data.dataset("test")
    windows = [last[i] for i in range(len(last))]
    naive = [
        np.abs(w["past_target"][0, -1].numpy() - w["future_target"][0].numpy()).mean()
        * data.scaler.std[int(w["series"][0]), 0]
        for w in windows
    ]
    assert scores["naive"]["original"]["overall"]["mae"] == pytest.approx(np.mean(naive), rel=1e-4)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.past_covariates=[b]"], "any_series=true leaves no covariates, but there is 'b'"),
        (["model.calendar=true"], "needs a model that reads no calendar; 'patch_tiny' does"),
    ],
)
def test_what_does_not_go_together_is_refused(tmp_path: Path, overrides: list[str], message: str) -> None:
    path = waves(tmp_path / "train.csv")
    with pytest.raises(UserError, match=message):
        run("fit", tmp_path / "run", f"data.path={path}", *overrides)


def test_a_test_must_say_any_series_too(fitted: Path, tmp_path: Path) -> None:
    path = waves(tmp_path / "train.csv")
    with pytest.raises(UserError, match=r"trained with data\.any_series=true, give the same"):
        run(
            "test",
            tmp_path / "run",
            f"ckpt_path={fitted}/checkpoints/best.ckpt",
            f"data.path={path}",
            "data.any_series=false",
        )
    with pytest.raises(UserError, match=r"data\.seq_len=24, here it is 30"):
        run(
            "test",
            tmp_path / "run",
            f"ckpt_path={fitted}/checkpoints/best.ckpt",
            f"data.path={path}",
            "data.seq_len=30",
        )


def test_two_series_of_one_name(tmp_path: Path) -> None:
    frame = pd.DataFrame({"ds": pd.date_range("2024-01-01", periods=40, freq="D"), "c": 1.0, "b/c": 2.0})
    pd.concat([frame.assign(unique_id=name) for name in ("a", "a/b")]).to_csv(tmp_path / "long.csv", index=False)
    with pytest.raises(UserError, match=r"two series would have the name 'a/b/c'"):
        ForecastData(tmp_path / "long.csv", targets=["c", "b/c"], any_series=True).setup()
