"""Predicting from a saved model gives what its checkpoint gives; what is no saved model of the task is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.reports import export
from seqzoo.pipelines.run import execute
from seqzoo.pipelines.saved import saved_checkpoint
from seqzoo.zoo import create_model, save_model

FAST = ["trainer.accelerator=cpu", "trainer.max_epochs=1", "logger.tensorboard=false", "callbacks.progress=none"]


def run(command: str, run_dir: Path, *overrides: str) -> dict[str, Any]:
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        cfg = compose("config", overrides=[*FAST, f"paths.runs={run_dir.parent}", *overrides])
    return execute(command, OmegaConf.to_container(cfg, resolve=True), run_dir)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "cache"))


def test_forecasts_are_those_of_the_checkpoint(tmp_path: Path) -> None:
    times = pd.date_range("2024-01-01", periods=200, freq="h")
    pd.DataFrame({"date": times, "load": torch.arange(200).sin().numpy() + 5}).to_csv(tmp_path / "a.csv", index=False)
    # a loss that is not the default's: it comes with the model
    data = ["data=csv", f"data.path={tmp_path / 'a.csv'}", "data.seq_len=24", "data.pred_len=6", "model=patch_tiny"]
    run("fit", tmp_path / "fit", *data, "task.loss=student_t", "trainer.limit_train_batches=3", "test_after_fit=false")
    run("predict", tmp_path / "one", *data, f"ckpt_path={tmp_path / 'fit/checkpoints/best.ckpt'}")
    run("predict", tmp_path / "two", *data, f"+model.pretrained={tmp_path / 'fit/model'}")
    one, two = (pd.read_csv(tmp_path / name / "forecast.csv") for name in ("one", "two"))
    assert "hi-90" in two.columns
    pd.testing.assert_frame_equal(one, two)


def test_a_tokenizer_and_a_prompt(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten\n" * 200)
    text = ["task=text", "data=text", f"data.path={tmp_path / 'a.txt'}", "data.seq_len=32", "data.batch_size=4"]
    text += ["model=gla_tiny", "optimizer=adamw", "scheduler=none"]
    run("fit", tmp_path / "fit", *text, "trainer.limit_train_batches=3", "test_after_fit=false")
    asked = [*text, "task.prompt=one two", "task.max_new_tokens=12", "task.temperature=0"]
    one = run("predict", tmp_path / "one", *asked, f"ckpt_path={tmp_path / 'fit/checkpoints/best.ckpt'}")
    two = run("predict", tmp_path / "two", *asked, f"+model.pretrained={tmp_path / 'fit/model'}")
    names = {p.name for p in (tmp_path / "one").iterdir() if p.suffix in (".txt", ".jsonl", ".csv")}
    assert names and one.keys() == two.keys()
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_a_tokenizer_file_lies_beside_the_model_under_another_name(tmp_path: Path) -> None:
    from seqzoo.pipelines.text.tokenizer import train_bpe

    pytest.importorskip("tokenizers", reason="needs seqzoo[text]")
    (tmp_path / "a.txt").write_text("one two three four five six seven eight nine ten\n" * 200)
    train_bpe([(tmp_path / "a.txt").read_bytes()], tmp_path / "mine.json", vocab_size=300)
    text = ["task=text", "data=text", f"data.path={tmp_path / 'a.txt'}", f"data.tokenizer={tmp_path / 'mine.json'}"]
    text += ["data.seq_len=32", "data.batch_size=4", "model=gla_tiny", "optimizer=adamw", "scheduler=none"]
    run("fit", tmp_path / "fit", *text, "trainer.limit_train_batches=2", "test_after_fit=false")
    (tmp_path / "mine.json").unlink()
    asked = ["task=text", "data=text", f"data.path={tmp_path / 'a.txt'}", "model=gla_tiny", "task.prompt=one two"]
    run("predict", tmp_path / "out", *asked, "task.max_new_tokens=3", f"+model.pretrained={tmp_path / 'fit/model'}")
    assert (tmp_path / "out" / "generated.jsonl").is_file()


def test_what_validation_chose_is_saved(tmp_path: Path) -> None:
    """The threshold of events is a buffer of the module, not of the net."""
    events = pytest.importorskip("seqzoo.pipelines.audio.events.module", reason="needs seqzoo[audio]")
    schema = {"labels": ["a", "b"], "sample_rate": 4000, "window": 3.0, "active": [0.1, 0.1], "conditions": [""]}
    model = {
        "name": "audio_detector_tiny",
        "mixer": "softmax",
        "dim": 16,
        "front_end": {"name": "log_mel", "num_mels": 16},
    }
    task = {"name": "audio_events", "threshold": None}
    module = events.AudioEventModule(model, task, {"name": "adamw", "lr": 1e-3}, {"name": "none"}, schema)
    module.threshold.fill_(1 / 3)
    export(module, tmp_path)
    found = saved_checkpoint(str(tmp_path / "model"), {"name": "audio_events"})
    assert found["hyper_parameters"]["task"] == task and found["hyper_parameters"]["schema"] == schema
    again = events.AudioEventModule(**found["hyper_parameters"])
    again.load_state_dict(found["state_dict"])
    assert float(again.threshold) == 1 / 3
    for name, value in module.state_dict().items():
        torch.testing.assert_close(again.state_dict()[name], value, rtol=0, atol=0)


def test_what_cannot_answer_is_named(tmp_path: Path) -> None:
    save_model(create_model("gla_tiny", vocab_size=8, dim=16, depth=1), tmp_path / "bare")
    with pytest.raises(UserError, match=r"was saved without what its data look like"):
        saved_checkpoint(str(tmp_path / "bare"), {"name": "text"})
    save_model(create_model("gla_tiny", dim=16, depth=1), tmp_path / "text", preprocessing={"tokenizer": "bytes"})
    with pytest.raises(UserError, match=r"is a model for the task 'text', not 'forecasting': give task=text"):
        saved_checkpoint(str(tmp_path / "text"), {"name": "forecasting"})
    with pytest.raises(UserError, match=r"model\.pretrained=gla_tiny\.nothing: .*no weights"):
        saved_checkpoint("gla_tiny.nothing", {"name": "text"})


def test_the_default_model_of_the_config_does_not_matter(tmp_path: Path) -> None:
    """`predict task=text model.pretrained=NAME`: the default model is a forecaster."""
    net = create_model("gla_tiny", dim=16, depth=1)
    schema = {"tokenizer": "bytes", "tokenizer_key": "bytes", "vocab_size": 256, "separator": 0, "seq_len": 16}
    save_model(net, tmp_path / "run" / "model", preprocessing={**schema, "corpus": "some"})
    asked = ["task=text", "data=stdlib", "task.prompt=a", "task.max_new_tokens=2"]
    run("predict", tmp_path / "out", *asked, f"+model.pretrained={tmp_path / 'run'}")
    assert (tmp_path / "out" / "generated.jsonl").is_file()
    with pytest.raises(UserError, match=r"model\.pretrained=nothing: .*no such folder"):
        run("predict", tmp_path / "out", *asked, "+model.pretrained=nothing")
