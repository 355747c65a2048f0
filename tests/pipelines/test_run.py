"""The command end to end on a small table: fit, test, predict in new processes, resume, bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.run import execute

SMALL = [
    "data=csv",
    "model=patch_tiny",
    "mixer=linear",
    "data.seq_len=24",
    "data.pred_len=6",
    "data.batch_size=16",
    "trainer.max_epochs=2",
    "trainer.limit_train_batches=6",
    "trainer.accelerator=cpu",
    "logger.tensorboard=false",
    "callbacks.progress=none",
]


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """Two daily waves of an hourly table with noise."""
    path = tmp_path_factory.mktemp("table") / "waves.csv"
    rng = np.random.default_rng(0)
    hours = np.arange(400)
    frame = pd.DataFrame(
        {
            "date": pd.date_range("2024-01-01", periods=400, freq="h"),
            "up": 10 + 3 * np.sin(hours / 24 * 2 * np.pi) + rng.normal(0, 0.3, 400),
            "down": 100 - 20 * np.sin(hours / 24 * 2 * np.pi) + rng.normal(0, 2, 400),
        }
    )
    frame.to_csv(path, index=False)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "cache"))


def run(command, run_dir, *overrides):
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        cfg = compose("config", overrides=[*SMALL, f"paths.runs={run_dir.parent}", *overrides])
    return execute(command, OmegaConf.to_container(cfg, resolve=True), run_dir)


def save_config(run_dir):
    (run_dir / "config.yaml").write_text("name: forecasting\n")


@pytest.fixture(scope="module")
def fitted(table, tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    metrics = run("fit", run_dir, f"data.path={table}")
    save_config(run_dir)
    return run_dir, metrics


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_gradients_are_clipped_in_bf16(table, tmp_path, algorithm):
    """Lightning refuses this for fused optimizers, though bf16 has no scaler that could stand in the way."""
    clip = ["trainer.precision=bf16-mixed", "trainer.gradient_clip_val=1.0e-9", "test_after_fit=false"]
    clip += [f"+trainer.gradient_clip_algorithm={algorithm}"] if algorithm == "value" else []
    options = ["optimizer=sgd", "optimizer.nesterov=false", "scheduler=none", "trainer.max_epochs=1"]
    still = run("fit", tmp_path / "still", f"data.path={table}", *options, "optimizer.lr=1.0e-12", *clip)
    clipped = run("fit", tmp_path / "clipped", f"data.path={table}", *options, "optimizer.lr=1", *clip)
    assert clipped["val/loss"] == pytest.approx(still["val/loss"], rel=1e-4)


def test_fit_leaves_everything_in_the_run_folder(fitted):
    run_dir, metrics = fitted
    names = {p.relative_to(run_dir).as_posix() for p in run_dir.rglob("*") if p.is_file()}
    assert {
        "checkpoints/best.ckpt",
        "checkpoints/last.ckpt",
        "logs/metrics.csv",
        "metrics.json",
        "environment.json",
        "model/model.safetensors",
        "model/config.json",
        "test.json",
        "test_by_channel.csv",
        "test_by_horizon.csv",
    } <= names
    assert not [n for n in names if "tmp" in n]
    saved = json.loads((run_dir / "metrics.json").read_text())
    assert saved["test/mse"] == pytest.approx(metrics["test/mse"])
    assert saved["objective"] == pytest.approx(metrics["val/loss"])
    assert list(metrics["test"]) == ["patch_tiny", "naive", "seasonal-naive-24", "drift", "mean"]


def test_pictures_are_drawn(fitted):
    pytest.importorskip("matplotlib")
    run_dir, _ = fitted
    for name in ("forecast.png", "horizon.png", "loss.png"):
        assert (run_dir / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


@pytest.mark.parametrize("command", ["fit", "test", "predict"])
def test_no_dropout_where_a_report_runs_the_model(command, fitted, table, tmp_path, monkeypatch):
    """Lightning gives a module back as it was before its loop: in training."""
    from seqzoo.pipelines.forecasting import task

    modes = []
    name = "predict" if command == "predict" else "report"
    monkeypatch.setattr(task, name, lambda trainer, module, *given: modes.append(module.training) or {})
    options = ["trainer.max_steps=1"] if command == "fit" else [f"ckpt_path={fitted[0]}/checkpoints/last.ckpt"]
    run(command, tmp_path / "run", f"data.path={table}", *options)
    assert modes == [False]


def test_the_test_command_gives_the_same_scores(fitted, table, tmp_path):
    run_dir, metrics = fitted
    for batch_size in (1, 7, 64):
        again = run(
            "test",
            tmp_path / f"t{batch_size}",
            f"data.path={table}",
            f"ckpt_path={run_dir}/checkpoints/best.ckpt",
            f"data.eval_batch_size={batch_size}",
        )
        for unit in ("scaled", "original"):
            for method in metrics["test"]:
                assert again["test"][method][unit]["overall"] == pytest.approx(
                    metrics["test"][method][unit]["overall"], rel=1e-5, nan_ok=True
                )


def test_exported_model_forecasts_as_the_checkpoint(fitted, table):
    from seqzoo.pipelines.forecasting.data import ForecastData
    from seqzoo.zoo import load_model, read_config

    run_dir, _ = fitted
    schema = read_config(run_dir / "model")["preprocessing"]
    data = ForecastData.for_prediction(table, schema)
    batch = data.dataset("predict")[0]
    weights = torch.load(run_dir / "checkpoints/best.ckpt", weights_only=True)["state_dict"]
    model = load_model(run_dir / "model")
    with torch.no_grad():
        exported = model(batch)
        model.load_state_dict({k.removeprefix("net."): v for k, v in weights.items()})
        assert torch.equal(model(batch), exported)


def test_predict_in_a_new_process(fitted, table, tmp_path):
    run_dir, _ = fitted
    env = {**os.environ, "SEQZOO_CACHE": str(tmp_path / "cache")}
    checkpoint = run_dir / "checkpoints" / "best.ckpt"
    command = [
        sys.executable,
        "-P",
        "-m",
        "seqzoo",
        "predict",
        "data=csv",
        f"data.path={table}",
        f"ckpt_path={checkpoint}",
    ]
    command += ["task.backtest_windows=3", f"hydra.run.dir={tmp_path / 'out'}"]
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    frame = pd.read_csv(tmp_path / "out" / "forecast.csv", parse_dates=["ds"])
    columns = [f"{c}{s}" for c in ("up", "down") for s in ("", "-lo-80", "-hi-80", "-lo-90", "-hi-90")]
    assert list(frame.columns) == ["unique_id", "ds", *columns]
    assert list(frame["ds"]) == list(pd.date_range("2024-01-17 16:00", periods=6, freq="h"))
    assert frame["down"].between(50, 150).all()  # original units
    assert (frame["up-lo-90"] <= frame["up-lo-80"]).all() and (frame["up-lo-80"] <= frame["up"]).all()
    backtest = pd.read_csv(tmp_path / "out" / "backtest.csv")
    assert len(backtest) == 3 * 6 * 2 and backtest["y"].notna().all()


def test_predict_takes_the_best_of_the_newest_run_of_its_name(fitted, table, capsys):
    run_dir, _ = fitted
    run("predict", run_dir.parent / "out", f"data.path={table}")
    best = run_dir / "checkpoints" / "best.ckpt"
    assert f"checkpoint: {best}, the best of the newest run named 'forecasting'" in capsys.readouterr().out
    with pytest.raises(UserError, match="there is no run named 'sales' under"):
        run("predict", run_dir.parent / "out", f"data.path={table}", "name=sales")
    with pytest.raises(UserError, match="test needs a checkpoint"):
        run("test", run_dir.parent / "out", f"data.path={table}")


def test_resume_equals_one_run(table, tmp_path):
    whole = run("fit", tmp_path / "whole", f"data.path={table}", "test_after_fit=false", "trainer.max_epochs=4")

    class Stop(Exception):
        pass

    from seqzoo.pipelines.forecasting.module import ForecastModule

    end = ForecastModule.on_train_epoch_start

    def crash(self):
        if self.current_epoch == 2:
            raise Stop
        return end(self)

    ForecastModule.on_train_epoch_start = crash
    try:
        with pytest.raises(Stop):
            run("fit", tmp_path / "part", f"data.path={table}", "test_after_fit=false", "trainer.max_epochs=4")
    finally:
        ForecastModule.on_train_epoch_start = end
    save_config(tmp_path / "part")
    (tmp_path / "whole" / "checkpoints" / "last.ckpt").rename(tmp_path / "whole.ckpt")
    resumed = run(
        "fit", tmp_path / "rest", f"data.path={table}", "test_after_fit=false", "trainer.max_epochs=4", "ckpt_path=last"
    )
    assert resumed["val/loss"] == whole["val/loss"]
    a, b = (
        torch.load(p, weights_only=True) for p in (tmp_path / "whole.ckpt", tmp_path / "rest/checkpoints/last.ckpt")
    )
    for key, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][key]), key


def test_a_point_loss_has_no_intervals(table, tmp_path):
    metrics = run(
        "fit", tmp_path / "mse", f"data.path={table}", "task.loss=mse", "model=dlinear", "trainer.max_epochs=1"
    )
    assert "crps" not in metrics["test"]["dlinear"]["scaled"]["overall"]
    checkpoint = tmp_path / "mse" / "checkpoints" / "best.ckpt"
    run("predict", tmp_path / "p", f"data.path={table}", f"ckpt_path={checkpoint}")
    assert list(pd.read_csv(tmp_path / "p" / "forecast.csv").columns) == ["unique_id", "ds", "up", "down"]


def test_student_t_has_exact_crps(table, tmp_path):
    metrics = run(
        "fit", tmp_path / "t", f"data.path={table}", "task.loss=student_t", "trainer.max_epochs=1", "data.targets=[up]"
    )
    scores = metrics["test"]["patch_tiny"]["scaled"]["overall"]
    assert scores["crps"] > 0 and 0 <= scores["coverage-80"] <= scores["coverage-90"] <= 1
    checkpoint = tmp_path / "t" / "checkpoints" / "best.ckpt"
    run("predict", tmp_path / "p", f"data.path={table}", f"ckpt_path={checkpoint}")
    columns = ["unique_id", "ds", "up", "lo-80", "hi-80", "lo-90", "hi-90"]
    assert list(pd.read_csv(tmp_path / "p" / "forecast.csv").columns) == columns


@pytest.mark.parametrize(
    ("command", "overrides", "message"),
    [
        ("fit", ["data.path=nowhere.csv"], "nowhere.csv"),
        ("fit", ["data.path={table}", "data.targets=[upp]"], "up"),
        ("fit", ["data.path={table}", "data.seq_len=500"], "seq_len"),
        ("fit", ["data.path={table}", "data.pred_len=0"], "pred_len"),
        (
            "fit",
            ["data.path={table}", "model=dlinear", "data.targets=[up]", "data.past_covariates=[down]"],
            "patch_small",
        ),
        ("fit", ["data.path={table}", "ckpt_path=no.ckpt"], "no checkpoint at no.ckpt"),
        ("fit", ["data.path={table}", "ckpt_path=last"], "no finished or interrupted run named"),
        ("test", ["data.path={table}"], "ckpt_path"),
        ("fit", ["data.path={table}", "model.patch_len=99"], "patch_len=99"),
        ("fit", ["data.path={table}", "task.quantiles=[0.1,0.9]"], "must contain 0.5"),
    ],
)
def test_bad_input_is_named_before_training(command, overrides, message, table, tmp_path):
    with pytest.raises(UserError, match=message.replace(".", r"\.")):
        run(command, tmp_path / "runs" / "bad", *[o.format(table=table) for o in overrides])


def test_a_checkpoint_of_another_model_or_data_is_refused(fitted, table, tmp_path):
    run_dir, _ = fitted
    checkpoint = f"ckpt_path={run_dir}/checkpoints/last.ckpt"
    with pytest.raises(UserError, match=r"another run.*dim=16 here, 32 there"):
        run("fit", tmp_path / "a", f"data.path={table}", "model.dim=16", checkpoint)
    with pytest.raises(UserError, match=r"data\.pred_len=6, here it is 12"):
        run("test", tmp_path / "b", f"data.path={table}", "data.pred_len=12", checkpoint)


def test_a_truncated_checkpoint_is_refused(fitted, table, tmp_path):
    run_dir, _ = fitted
    broken = tmp_path / "broken.ckpt"
    broken.write_bytes((run_dir / "checkpoints/last.ckpt").read_bytes()[:5000])
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        run("predict", tmp_path / "p", f"data.path={table}", f"ckpt_path={broken}")


def test_a_full_disk_keeps_the_earlier_checkpoint_and_ends_the_run(table, tmp_path, monkeypatch, caplog):
    import errno

    from seqzoo.pipelines import checkpoints

    real, calls = checkpoints.atomic_path, []

    def full(path):
        calls.append(path)
        if len(calls) > 2:  # the first epoch's best and last were written
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path)

    monkeypatch.setattr(checkpoints, "atomic_path", full)
    with pytest.raises(RuntimeError, match=r"report is written, but the newest checkpoint is not: disk full"):
        run("fit", tmp_path / "full", f"data.path={table}")
    assert "disk full" in caplog.text and len(calls) > 2
    assert torch.load(tmp_path / "full/checkpoints/last.ckpt", weights_only=True)["epoch"] == 0
    assert "test/mse" in json.loads((tmp_path / "full/metrics.json").read_text())


def test_nan_loss_names_the_step(table, tmp_path):
    with pytest.raises(RuntimeError, match=r"the loss is .* at step .*optimizer\.lr"):
        run(
            "fit",
            tmp_path / "nan",
            f"data.path={table}",
            "optimizer.lr=1e30",
            "trainer.gradient_clip_val=null",
            "task.loss=mse",
        )


def test_files_are_only_written_in_the_run_folder(table, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = set(Path(tmp_path).iterdir())
    run("fit", tmp_path / "inner" / "run", f"data.path={table}", "trainer.max_epochs=1")
    assert set(Path(tmp_path).iterdir()) - before <= {tmp_path / "inner", tmp_path / "cache"}


def test_a_task_that_trains_nothing_only_predicts(tmp_path, monkeypatch):
    from types import SimpleNamespace

    from seqzoo.pipelines import run as runs
    from seqzoo.pipelines import validate

    class Data:
        def __init__(self, path=None):
            self.path = path

    asked = []
    task = SimpleNamespace(
        Data=Data, NEEDS_CHECKPOINT=False, predict=lambda *given: asked.append(given) or {"found": 1.0}
    )
    for module in (validate, runs):
        monkeypatch.setattr(module, "task_package", lambda name: task)
    cfg = {"task": {"name": "forecasting"}, "data": {"path": "a.mp4"}, "trainer": {}, "seed": 0}
    assert execute("predict", cfg, tmp_path)["found"] == 1.0
    assert asked == [(None, None, cfg, tmp_path)]
    for command in ("fit", "validate", "test"):
        with pytest.raises(UserError, match=rf"{command}: the task 'forecasting' trains nothing.*lightning predict"):
            execute(command, cfg, tmp_path)
