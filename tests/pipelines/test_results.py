"""Tables, metric files, atomic writes and pictures."""

import builtins
import csv
import errno
import io
import json
import logging
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from seqzoo.pipelines import pictures
from seqzoo.pipelines.atomic import atomic_path, atomic_write_text, is_full_disk
from seqzoo.pipelines.results import flatten, format_cell, format_table, print_table, write_csv, write_metrics

ROWS = [
    {"model": "patch_small", "mae": 0.31234, "windows": 1733},
    {"model": "seasonal-naive-24", "mae": 12.5, "windows": 2, "note": "[bold]x"},
]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_plain_table_is_aligned_text_without_box_drawing():
    out = io.StringIO()
    print_table(ROWS, title="Test errors", file=out)
    assert out.getvalue().splitlines() == [
        "",  # tables stand apart from the lines before
        "Test errors",
        "",
        "model                 mae  windows  note",
        "-----------------  ------  -------  -------",
        "patch_small        0.3123     1733  -",
        "seasonal-naive-24   12.50        2  [bold]x",
    ]


def test_plain_table_is_never_cut():
    wide = "x" * 500
    assert wide in format_table([{"a": wide, "b": 1.0}])
    assert format_table([], ["a", "b"]).splitlines() == ["a  b", "-  -"]
    assert format_table([{"b": 1}], ["a", "b"]).splitlines()[-1] == "-  1"


def test_terminal_gets_a_rich_table_with_every_cell_as_written(monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("TERM", "xterm")
    out = Terminal()
    print_table(ROWS, title="Test errors", file=out)
    text = out.getvalue()
    assert "━" in text and "0.3123" in text and "seasonal-naive-24" in text
    assert "[bold]x" in text  # not taken for markup


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.5000"),
        (0.012346, "0.01235"),
        (1234.5, "1234"),
        (-12.345, "-12.35"),
        (1e-5, "1e-05"),
        (123456.7, "1.23e+05"),
        (0.0, "0.0"),
        (3, "3"),
        (np.int64(4), "4"),
        (np.float32(0.25), "0.2500"),
        (True, "True"),
        (None, "-"),
        (math.nan, "-"),
        (math.inf, "inf"),
        ("a", "a"),
    ],
)
def test_cells(value, text):
    assert format_cell(value) == text


def test_metrics_are_written_as_valid_json_and_csv(tmp_path):
    metrics = {
        "test": {"mae": torch.tensor(0.5), "step": [1.0, math.nan]},
        "n": np.int64(3),
        "path": Path("a/b"),
    }
    path = write_metrics(tmp_path / "new" / "run", metrics)
    assert path.name == "metrics.json"
    text = path.read_text()
    assert json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON")) == {
        "test": {"mae": 0.5, "step": [1.0, None]},
        "n": 3,
        "path": "a/b",
    }
    lines = (tmp_path / "new" / "run" / "metrics.csv").read_text().splitlines()
    assert lines == ["name,value", "test/mae,0.5", "test/step/0,1.0", "test/step/1,", "n,3", "path,a/b"]
    assert dict(flatten({"a": [1, {"b": 2}]})) == {"a/0": 1, "a/1/b": 2}


def test_csv_keeps_every_digit(tmp_path):
    write_csv(tmp_path / "t.csv", [{"a": 1 / 3, "b": "x,y"}, {"a": None}])
    with open(tmp_path / "t.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["a"]) == 1 / 3 and rows[0]["b"] == "x,y" and rows[1] == {"a": "", "b": ""}


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "f.txt"
    atomic_write_text(path, "old")
    os.chmod(path, 0o640)

    def fail():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            assert path.read_text() == "old"
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError) as caught:
        fail()
    assert is_full_disk(caught.value) and not is_full_disk(ValueError())
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["f.txt"]
    atomic_write_text(path, "new")
    assert path.read_text() == "new" and path.stat().st_mode & 0o777 == 0o640


def test_new_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "f", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "f").stat().st_mode & 0o777 == 0o640


def test_kill_in_the_middle_leaves_the_old_file(tmp_path):
    path = tmp_path / "f.txt"
    path.write_text("old")
    code = (
        "import sys, time\nfrom seqzoo.pipelines.atomic import atomic_path\n"
        f"with atomic_path({str(path)!r}) as t:\n"
        "    t.write_text('half')\n    print('half', flush=True)\n    time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline().strip() == "half"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert path.read_text() == "old"


# pictures


def window(steps=12, length=30, channels=2):
    rng = np.random.default_rng(0)
    history, truth = rng.normal(size=(length, channels)), rng.normal(size=(steps, channels))
    times = np.datetime64("2024-01-01") + np.arange(length + steps).astype("timedelta64[h]")
    return history, truth, truth + 0.1, times[:length], times[length:]


def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


@pytest.mark.parametrize("channels", [1, 2, 4, 9, 12])
def test_forecast_picture_has_a_panel_for_each_channel(tmp_path, monkeypatch, channels):
    pytest.importorskip("matplotlib")
    figures = []
    from matplotlib.figure import Figure

    make = Figure.__init__
    monkeypatch.setattr(Figure, "__init__", lambda self, *a, **k: (make(self, *a, **k), figures.append(self))[0])
    history, truth, forecasts, before, after = window(channels=channels)
    history[3:6] = np.nan
    names = [f"c{i}" for i in range(channels)]
    path = pictures.plot_forecasts(
        history,
        truth,
        forecasts,
        tmp_path / "forecast.png",
        intervals={80: (forecasts - 1, forecasts + 1), 90: (forecasts - 2, forecasts + 2)},
        baselines={"naive": np.zeros_like(truth)},
        channels=names,
        units=["°C"] * channels,
        history_times=before,
        future_times=after,
        title="a window",
    )
    assert path == tmp_path / "forecast.png" and min(png_size(path)) > 300
    (figure,) = figures
    shown = min(channels, 9)
    assert [axes.get_title(loc="left") for axes in figure.axes] == names[:shown]
    assert {axes.get_ylabel() for axes in figure.axes} == {"°C"}
    (legend,) = figure.legends
    entries = [text.get_text() for text in legend.get_texts()]
    assert entries == ["observed", "forecast", "80 % interval", "90 % interval", "naive"]
    drawn = {tuple(np.round(line.get_ydata(), 6)) for line in figure.axes[0].get_lines()}
    assert tuple(np.round(forecasts[:, 0], 6)) in drawn
    assert not any(axes.spines[side].get_visible() for axes in figure.axes for side in ("top", "right"))


def test_forecast_picture_without_truth_intervals_or_times(tmp_path):
    pytest.importorskip("matplotlib")
    history, _, forecasts, _, _ = window(channels=1)
    assert pictures.plot_forecasts(history, None, forecasts, tmp_path / "p.png") is not None
    png_size(tmp_path / "p.png")


def test_error_by_horizon_and_loss_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    table = {"model": [0.1, 0.2, 0.3], "naive": [0.2, 0.3, math.nan]}
    png_size(pictures.plot_error_by_horizon(table, tmp_path / "h.png", step="hours ahead"))
    with pytest.raises(ValueError, match="empty"):
        pictures.plot_error_by_horizon({}, tmp_path / "h2.png")
    log = tmp_path / "metrics.csv"
    log.write_text(
        "epoch,lr,step,train/loss_epoch,train/loss_step,val/loss\n"
        "0,,9,,0.9,\n0,,19,,,0.7\n0,,19,0.8,,\n1,,39,,,0.6\n1,,39,0.5,,\n"
    )
    assert pictures.read_loss_curves(log) == {"train": ([19, 39], [0.8, 0.5]), "val": ([19, 39], [0.7, 0.6])}
    png_size(pictures.plot_loss_curves(log, tmp_path / "l.png"))


def test_loss_curves_of_a_log_without_loss(tmp_path, caplog):
    pytest.importorskip("matplotlib")
    (tmp_path / "metrics.csv").write_text("epoch,step,lr\n0,1,0.1\n")
    with caplog.at_level(logging.WARNING, "seqzoo"):
        assert pictures.plot_loss_curves(tmp_path / "metrics.csv", tmp_path / "l.png") is None
    assert "no train or val loss" in caplog.text


def test_without_matplotlib_the_run_goes_on_with_a_hint(tmp_path, monkeypatch, caplog):
    real = builtins.__import__

    def blocked(name, *args, **kwargs):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", blocked)
    history, truth, forecasts, _, _ = window()
    with caplog.at_level(logging.WARNING, "seqzoo"):
        assert pictures.plot_forecasts(history, truth, forecasts, tmp_path / "p.png") is None
        assert pictures.plot_error_by_horizon({"a": [1.0]}, tmp_path / "p.png") is None
        assert pictures.plot_loss_curves(tmp_path / "none.csv", tmp_path / "p.png") is None
    assert caplog.text.count("pip install seqzoo[plot]") == 3
    assert not (tmp_path / "p.png").exists()


def test_importing_the_pictures_does_not_import_matplotlib():
    code = "import sys, seqzoo.pipelines.pictures; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
