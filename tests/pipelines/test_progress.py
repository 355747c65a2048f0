"""Progress lines for logs and the bar for terminals."""

import io
import re
import sys
from types import SimpleNamespace

import lightning as L
import pytest
import torch
from toy_training import Tiny, loader

from seqzoo.pipelines.progress import (
    PlainProgress,
    Rate,
    RichProgress,
    batch_size_of,
    peak_memory,
    progress_callback,
)


def trainer(tmp_path, *callbacks, epochs=2, **options):
    return L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        devices=1,
        logger=False,
        default_root_dir=tmp_path,
        enable_model_summary=False,
        enable_checkpointing=False,
        callbacks=list(callbacks),
        **options,
    )


def test_plain_lines_have_no_carriage_return_and_name_every_stage(tmp_path):
    out = io.StringIO()
    run = trainer(tmp_path, PlainProgress(seconds=1e9, file=out))
    model = Tiny()
    run.fit(model, loader(), loader(2))
    run.validate(model, loader(2), verbose=False)
    run.test(model, loader(3), verbose=False)
    run.predict(model, loader(5), return_predictions=False)
    text = out.getvalue()
    assert "\r" not in text and "\x1b" not in text
    lines = text.splitlines()
    assert [line.split(" batches")[0] for line in lines] == [
        "validation:  2/2",
        "epoch 1/2:  23/23",
        "validation:  2/2",
        "epoch 2/2:  23/23",
        "validation:  2/2",
        "test:  3/3",
        "predict:  5/5",
    ]
    epoch = lines[3]
    assert re.search(r"in \d+\.\d s", epoch) and "samples/s" in epoch and re.search(r"\d (MB|GB)", epoch)
    # the epoch's mean of 23 falling steps, not the last step
    steps = [4 * 3 * (1 - 0.04 * k) for k in range(23, 46)]
    assert f"train/loss {sum(steps) / 23:.4g}" in epoch
    assert "val/loss 9" in epoch and "train/loss" in epoch and "train/loss_epoch" not in epoch


def test_plain_lines_come_every_so_many_seconds_within_a_stage(tmp_path, monkeypatch):
    now = [0.0]

    def tick():
        now[0] += 0.25
        return now[0]

    monkeypatch.setattr("seqzoo.pipelines.progress.time.monotonic", tick)
    out = io.StringIO()
    trainer(tmp_path, PlainProgress(seconds=5, file=out), epochs=1).fit(Tiny(), loader(60))
    lines = out.getvalue().splitlines()
    assert 4 <= len(lines) <= 12 and "after" in lines[0] and lines[-1].startswith("epoch 1/1:  60/60 batches  in")


def test_rich_bar_redraws_rarely_and_ends_clean(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    out = Terminal()
    bar = RichProgress(every=10, file=out)
    updates = []
    original = bar._update
    monkeypatch.setattr(bar, "_update", lambda done, total: (updates.append(done), original(done, total)))
    run = trainer(tmp_path, bar, epochs=1)
    run.fit(Tiny(), loader(23), loader(2))
    assert updates == [10, 20, 23, 2] or updates == [10, 20, 2, 23] or updates == [10, 20, 23, 2, 2]
    text = out.getvalue()
    assert "epoch 1/1" in text and "23/23" in text and "samples/s" in text and "val/loss 10" in text
    assert bar._progress is None and text.count("\x1b[?25h") >= 1  # the cursor is shown again


def test_rich_bar_stops_when_training_fails(tmp_path):
    class Failing(Tiny):
        def training_step(self, batch, batch_idx):
            raise RuntimeError("boom")

    bar = RichProgress(file=io.StringIO())
    with pytest.raises(RuntimeError, match="boom"):
        trainer(tmp_path, bar, epochs=1).fit(Failing(), loader(2))
    assert bar._progress is None and bar._tasks == []


def test_kinds(monkeypatch):
    assert isinstance(progress_callback("rich"), RichProgress)
    assert isinstance(progress_callback("plain"), PlainProgress)
    assert progress_callback("none") is None
    assert isinstance(progress_callback(), PlainProgress)  # under a test runner there is no terminal
    monkeypatch.setattr(sys, "stdout", type("T", (io.StringIO,), {"isatty": lambda self: True})())
    assert isinstance(progress_callback(), RichProgress)
    with pytest.raises(ValueError, match="progress='bar' is unknown; choose from auto"):
        progress_callback("bar")


def test_rate_over_a_window(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("seqzoo.pipelines.progress.time.monotonic", lambda: now[0])
    rate = Rate(window=10)
    rate.reset()
    assert str(rate) == ""
    for _ in range(30):
        now[0] += 1
        rate.add(64)
    assert rate() == pytest.approx(64) and str(rate) == "64 samples/s"
    now[0] += 1000  # a validation in between
    rate.skip(1000)
    assert rate() == pytest.approx(64)
    for _ in range(15):  # the old speed is forgotten
        now[0] += 1
        rate.add(128)
    assert rate() == pytest.approx(128)


def test_validation_within_an_epoch_does_not_slow_the_rate_of_the_epoch(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("seqzoo.pipelines.progress.time.monotonic", lambda: now[0])
    bar = PlainProgress(file=io.StringIO())
    bar.disable()  # only the rates are of interest
    bar._trainer = SimpleNamespace(world_size=2)
    batch = torch.zeros(8, 1)

    def steps(seconds, number=5):
        for _ in range(number):
            now[0] += seconds
            bar._step(batch, 1, 10)

    bar._start("epoch", 10)
    steps(1)
    bar._start("validation", 10)
    steps(1.25)
    assert bar.rate() == pytest.approx(16 / 1.25)
    bar._stop()
    steps(1, number=1)  # the marks from before the validation still lie within the window
    assert bar.rate() == pytest.approx(16)
    bar._stop()


def test_batch_size_and_memory():
    assert batch_size_of({"a": None, "x": torch.zeros(5, 2)}) == 5
    assert batch_size_of({"start": torch.zeros(9), "tokens": torch.zeros(1, 40)}) == 40
    assert batch_size_of([torch.zeros(3), torch.zeros(4)]) == 3
    assert batch_size_of("x") == 0 and batch_size_of(torch.tensor(1)) == 0
    assert re.fullmatch(r"\d+ MB|\d+\.\d GB", peak_memory().split(" + ")[0])
