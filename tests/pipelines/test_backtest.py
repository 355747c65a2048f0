"""Rolling-origin backtest: cut-offs, the tidy table, batch independence and files."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import pytest
import torch

from seqzoo.pipelines.forecasting.backtest import (
    backtest,
    backtest_frames,
    backtest_ranges,
    backtest_summary,
    rolling_origins,
    write_frames,
)
from seqzoo.pipelines.forecasting.scaling import StandardScaler
from seqzoo.pipelines.forecasting.tables import load_table
from seqzoo.pipelines.forecasting.windows import WindowDataset

SEQ, PRED = 6, 3
HOUR = 3600 * 10**9
MINUTE = 60 * 10**9


@dataclass
class Table:
    """What a backtest reads of a SeriesTable."""

    unique_ids: list
    offsets: np.ndarray
    columns: dict
    times: np.ndarray
    targets: tuple


class Windows:
    """The least of a WindowDataset: windows of stride `step` in a row range of each series."""

    def __init__(self, table, ranges, step):
        self.table, self.items, self.calls = table, [], []
        for s, (start, stop) in enumerate(ranges):
            self.items += [(s, o) for o in range(start + SEQ, stop - PRED + 1, step)]

    def __len__(self):
        return len(self.items)

    def __getitems__(self, indices):
        self.calls.append(len(indices))
        series, origin = (torch.tensor(v) for v in zip(*[self.items[i] for i in indices], strict=True))
        return {"series": series, "origin": origin}


@pytest.fixture
def table():
    lengths = [20, 5, 14]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    rng = np.random.default_rng(0)
    columns = {name: rng.normal(5, 1, offsets[-1]).astype(np.float32) for name in ("a", "b")}
    columns["a"][17] = np.nan
    times = np.concatenate([np.arange(n) * HOUR + s * MINUTE for s, n in enumerate(lengths)])
    return Table(["x", "short", "z"], offsets, columns, times, ("a", "b"))


def predictor(batch):
    """A forecast that says from where and for when it is: 100 series + origin + step / 10 + channel / 100."""
    base = 100.0 * batch["series"] + batch["origin"]
    point = base[:, None, None] + torch.arange(PRED)[None, :, None] / 10 + torch.arange(2) / 100
    return point, {q: point + (q - 0.5) for q in (0.05, 0.1, 0.9, 0.95)}


def dataset(table, step=2, num_windows=None):
    return Windows(table, backtest_ranges(np.diff(table.offsets), SEQ, PRED, step, num_windows), step)


def test_origins_end_with_the_series():
    assert rolling_origins(20, 6, 3, 2).tolist() == [7, 9, 11, 13, 15, 17]
    assert rolling_origins(20, 6, 3, 2, 3).tolist() == [13, 15, 17]
    assert rolling_origins(20, 6, 3, 50).tolist() == [17]
    assert rolling_origins(9, 6, 3).tolist() == [6]
    assert rolling_origins(8, 6, 3).tolist() == []
    assert rolling_origins(12, 6, 3).tolist() == [6, 7, 8, 9]
    for name, arguments in {
        "step": (9, 6, 3, 0),
        "pred_len": (9, 6, 0),
        "num_windows": (9, 6, 3, 1, 0),
    }.items():
        with pytest.raises(ValueError, match=f"{name}=0"):
            rolling_origins(*arguments)


@pytest.mark.parametrize("step", [1, 2, 3, 7])
@pytest.mark.parametrize("num_windows", [None, 1, 3])
def test_ranges_give_those_origins(table, step, num_windows):
    windows = dataset(table, step, num_windows)
    for s, length in enumerate(np.diff(table.offsets)):
        expected = rolling_origins(length, SEQ, PRED, step, num_windows).tolist()
        assert [o for series, o in windows.items if series == s] == expected


def test_every_row_is_the_right_series_time_target_and_truth(table):
    frame = backtest(predictor, dataset(table), batch_size=4)
    bounds = ["lo-80", "hi-80", "lo-90", "hi-90"]
    assert list(frame.columns) == ["unique_id", "cutoff", "ds", "step", "target", "y", "forecast", *bounds]
    assert len(frame) == (6 + 3) * PRED * 2
    for row in frame.to_dict("records"):
        s = table.unique_ids.index(row["unique_id"])
        origin = (row["cutoff"].value - s * MINUTE) // HOUR + 1
        h = row["step"] - 1
        assert row["ds"].value == table.times[table.offsets[s] + origin + h]
        truth = table.columns[row["target"]][table.offsets[s] + origin + h]
        np.testing.assert_equal(np.float32(row["y"]), truth)
        expected = 100 * s + origin + h / 10 + (row["target"] == "b") / 100
        assert row["forecast"] == pytest.approx(expected, abs=1e-4)
        assert row["lo-80"] == pytest.approx(expected - 0.4, abs=1e-4)
        assert row["hi-90"] == pytest.approx(expected + 0.45, abs=1e-4)
    assert set(frame["unique_id"]) == {"x", "z"}
    assert frame["y"].isna().sum() == 2  # row 17 of "a" lies in two windows
    assert isinstance(frame["unique_id"].dtype, pd.CategoricalDtype)


def test_batches_do_not_matter_and_memory_is_one_batch(table):
    whole = backtest(predictor, dataset(table), batch_size=100)
    for size in (1, 2, 5):
        windows = dataset(table)
        pd.testing.assert_frame_equal(backtest(predictor, windows, batch_size=size), whole)
        assert max(windows.calls) <= size and sum(windows.calls) == len(windows)
    windows = dataset(table)
    frames = backtest_frames(predictor, windows, batch_size=2)
    assert len(next(frames)) == 2 * PRED * 2 and windows.calls == [2]  # nothing is read ahead


def test_chosen_windows_progress_and_no_gradient(table):
    said = []

    def predict(batch):
        assert not torch.is_grad_enabled()
        return predictor(batch)[0], None

    frame = backtest(predict, dataset(table), indices=[8, 0], batch_size=1, progress=lambda *a: said.append(a))
    assert list(frame["unique_id"].iloc[[0, -1]]) == ["z", "x"] and "lo-80" not in frame
    assert [s[:2] for s in said] == [(1, 2), (2, 2)] and said[-1][2] == 0.0


def test_on_the_windows_of_a_file(tmp_path):
    """Nothing is scaled, shifted or lost on the way from a file: the row number is forecast, at its hour."""
    rows = {n: np.arange(n) for n in (20, 9, 14)}
    start = pd.Timestamp("2024-02-28")
    file = pd.concat(
        pd.DataFrame({"unique_id": f"s{n}", "ds": start + pd.to_timedelta(i, "h"), "y": 1000.0 * n + i})
        for n, i in rows.items()
    )
    file.to_csv(tmp_path / "long.csv", index=False)
    table = load_table(tmp_path / "long.csv", cache_dir=tmp_path / "cache")
    scaler = StandardScaler.fit(table, np.stack([np.zeros_like(table.lengths), table.lengths], axis=1))
    ranges = backtest_ranges(table.lengths, SEQ, PRED, step=2)
    windows = WindowDataset(table, seq_len=SEQ, pred_len=PRED, ranges=ranges, scaler=scaler, stride=2)

    def predict(batch):
        past = scaler.inverse(batch["past_target"].double().numpy(), batch["series"].numpy(), table.targets)
        return past[:, -1:] + np.arange(1, PRED + 1)[None, :, None], None

    frame = backtest(predict, windows, batch_size=3)
    assert len(frame) == PRED * sum(len(rolling_origins(n, SEQ, PRED, 2)) for n in rows)
    np.testing.assert_allclose(frame["forecast"], frame["y"], rtol=1e-6)
    hours = (frame["ds"] - start) // pd.Timedelta("1h")
    number = frame["unique_id"].astype(str).str[1:].astype(int)
    np.testing.assert_array_equal(frame["y"], 1000.0 * number + hours)
    assert ((frame["ds"] - frame["cutoff"]) // pd.Timedelta("1h") == frame["step"]).all()


def test_nothing_to_forecast_is_said(table):
    with pytest.raises(ValueError, match="shorter than seq_len"):
        backtest(predictor, Windows(table, [(0, 0)] * 3, 1))
    with pytest.raises(ValueError, match="batch_size=0"):
        backtest(predictor, dataset(table), batch_size=0)


@pytest.mark.parametrize("name", ["b.csv", "b.csv.gz", "b.parquet"])
def test_frames_are_written_one_after_another(table, tmp_path, name):
    whole = backtest(predictor, dataset(table))
    rows = write_frames(backtest_frames(predictor, dataset(table), batch_size=2), tmp_path / name)
    assert rows == len(whole)
    path = tmp_path / name
    back = pd.read_parquet(path) if name.endswith("parquet") else pd.read_csv(path, parse_dates=["cutoff", "ds"])
    assert list(back.columns) == list(whole.columns)
    assert (back["ds"] == whole["ds"]).all() and (back["unique_id"].astype(str) == whole["unique_id"].astype(str)).all()
    np.testing.assert_allclose(back["forecast"], whole["forecast"], rtol=1e-6)
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_midnight_is_written_like_any_other_time(table, tmp_path):
    """A batch of midnights only must not switch to dates: one column, one format."""
    table.times = table.times // HOUR * 24 * HOUR
    write_frames(backtest_frames(predictor, dataset(table), batch_size=2), tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text().splitlines()[1].split(",")[2].endswith(" 00:00:00")
    table.times = table.times + 250_000_000
    write_frames(backtest_frames(predictor, dataset(table), batch_size=2), tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text().splitlines()[1].split(",")[2].endswith(" 00:00:00.250000")


def test_failing_forecast_leaves_no_file(table, tmp_path):
    def frames():
        yield from backtest_frames(predictor, dataset(table), indices=[0])
        raise RuntimeError("stop")

    for name in ("b.csv", "b.parquet"):
        with pytest.raises(RuntimeError, match="stop"):
            write_frames(frames(), tmp_path / name)
    assert list(tmp_path.iterdir()) == []


def test_summary_equals_plain_numpy(table):
    frame = backtest(predictor, dataset(table))
    seen = frame.dropna(subset=["y"])
    summary = backtest_summary(frame).set_index("target")
    for target in ("a", "b"):
        part = seen[seen["target"] == target]
        error = part["forecast"].to_numpy(np.float64) - part["y"].to_numpy(np.float64)
        row = summary.loc[target]
        assert row["count"] == len(part) and row["windows"] == 9
        assert row["mae"] == pytest.approx(np.abs(error).mean())
        assert row["rmse"] == pytest.approx(np.sqrt((error**2).mean()))
        assert row["bias"] == pytest.approx(error.mean())
        size = part["y"].abs() + part["forecast"].abs()
        assert row["smape"] == pytest.approx(np.mean(2 * np.abs(error) / size), rel=1e-5)
        inside = (part["y"] >= part["lo-90"]) & (part["y"] <= part["hi-90"])
        assert row["coverage-90"] == pytest.approx(inside.mean())
    by_step = backtest_summary(frame, by=["unique_id", "step"])
    assert list(by_step.columns[:2]) == ["unique_id", "step"] and len(by_step) == 2 * PRED
    assert len(backtest_summary(frame, by=())) == 1
    assert backtest_summary(frame, by="cutoff")["count"].sum() == len(seen)
    with pytest.raises(ValueError, match="cannot summarise by 'y'"):
        backtest_summary(frame, by="y")
