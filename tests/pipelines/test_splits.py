"""Splits: the ETT protocol on the real file, shares, short series; scaling by the training rows."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.forecasting.data import ForecastData
from seqzoo.pipelines.forecasting.scaling import StandardScaler
from seqzoo.pipelines.forecasting.splits import predict_ranges, ratio_sizes, split_ranges
from seqzoo.pipelines.forecasting.tables import SeriesTable, load_table

ETTH1_SHA256 = "f18de3ad269cef59bb07b5438d79bb3042d3be49bdeecf01c1cd6d29695ee066"


def make(folder: Path, lengths: dict[str, int], freq: str = "h", columns: int = 1) -> SeriesTable:
    generator = np.random.default_rng(1)
    parts = []
    for i, (name, rows) in enumerate(lengths.items()):
        values = generator.normal(size=(rows, columns)) * (i + 1) + 10 * i
        part = pd.DataFrame(values, columns=[f"y{c}" for c in range(columns)])
        part.insert(0, "ds", pd.date_range("2024-01-01", periods=rows, freq=freq))
        parts.append(part.assign(unique_id=name))
    pd.concat(parts).to_csv(folder / "t.csv", index=False)
    targets = [f"y{c}" for c in range(columns)]
    return load_table(folder / "t.csv", targets=targets, cache_dir=folder / "cache", freq=freq)


@pytest.mark.parametrize(("pred_len", "train", "test"), [(24, 8521, 2857), (96, 8449, 2785)])
def test_ett_protocol_on_the_real_file(shared_data: Path, tmp_path: Path, pred_len: int, train: int, test: int) -> None:
    path = shared_data / "ett" / "ETTh1.csv"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == ETTH1_SHA256
    data = ForecastData(path, split="ett_hour", seq_len=96, pred_len=pred_len, cache_dir=tmp_path)
    assert [len(data.dataset(stage)) for stage in ("train", "val", "test")] == [train, test, test]
    assert data.ranges["train"].tolist() == [[0, 8640]]
    assert data.ranges["val"].tolist() == [[8640 - 96, 11520]] and data.ranges["test"].tolist() == [[11520 - 96, 14400]]
    frame = pd.read_csv(path)
    assert data.table.targets == tuple(frame.columns[1:]) and data.table.freq == "h"
    rows = frame.iloc[:8640, 1:].to_numpy()
    np.testing.assert_allclose(data.scaler.mean[0], rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(data.scaler.std[0], rows.std(0), rtol=1e-6)  # numpy's is the population's
    # The first test window, by hand.
    values = (frame.iloc[:, 1:].to_numpy() - rows.mean(0)) / rows.std(0)
    first = data.dataset("test")[0]
    np.testing.assert_allclose(first["past_target"][0], values[11520 - 96 : 11520], atol=2e-5)
    np.testing.assert_allclose(first["future_target"][0], values[11520 : 11520 + pred_len], atol=2e-5)
    last = data.dataset("test")[test - 1]
    np.testing.assert_allclose(last["future_target"][0], values[14400 - pred_len : 14400], atol=2e-5)


def test_ett_minutes_on_the_real_file(shared_data: Path, tmp_path: Path) -> None:
    path = shared_data / "ett" / "ETTm1.csv.gz"
    data = ForecastData(path, split="ett_minute", seq_len=96, pred_len=24, cache_dir=tmp_path)
    assert [len(data.dataset(stage)) for stage in ("train", "test")] == [34560 - 96 - 24 + 1, 11520 - 24 + 1]
    with pytest.raises(UserError, match=r"ett_hour is for steps of h; .* has 15min"):
        ForecastData(path, split="ett_hour", cache_dir=tmp_path).setup()


def test_ratio_cuts_by_time_and_keeps_context_only_before_a_block(tmp_path: Path) -> None:
    table = make(tmp_path, {"p": 200, "q": 333})
    ranges = split_ranges(table, seq_len=20, pred_len=5, ratio=(0.7, 0.1, 0.2))
    assert ranges["train"].tolist() == [[0, 140], [0, 233]]
    assert ranges["val"].tolist() == [[120, 160], [213, 267]]
    assert ranges["test"].tolist() == [[140, 200], [247, 333]]
    without = split_ranges(table, seq_len=20, pred_len=5, ratio=(0.8, 0, 0.2))
    assert without["val"].tolist() == [[0, 0], [0, 0]] and without["test"].tolist() == [[140, 200], [246, 333]]


@pytest.mark.parametrize("ratio", [(0.7, 0.1, 0.2), (0.5, 0.25, 0.25), (0.9, 0.1, 0), (0.8, 0, 0.2), (1, 0, 0)])
def test_ratio_parts_sum_to_the_whole(ratio: tuple[float, float, float]) -> None:
    for rows in (1, 10, 97, 1000, 8760):
        sizes = ratio_sizes(rows, ratio)
        assert sum(sizes) == rows and min(sizes) >= 0
        assert all(size == 0 for size, share in zip(sizes, ratio, strict=True) if share == 0)


@pytest.mark.parametrize(
    "ratio", [(0.7, 0.2), (0.7, 0.2, 0.2), (0, 0.5, 0.5), (1.2, -0.1, -0.1), ("a", 0, 0), (70, 10, 20)]
)
def test_bad_ratios(tmp_path: Path, ratio: tuple) -> None:
    with pytest.raises(UserError, match="must be three shares"):
        split_ranges(make(tmp_path, {"p": 200}), seq_len=20, pred_len=5, ratio=ratio)


def test_short_series_are_named_or_skipped(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = make(tmp_path, {"long": 200, "tiny": 30})
    with pytest.raises(
        UserError, match=r"series 'tiny' of .* has 30 rows, too few for the train part: it needs 37 rows "
    ):
        split_ranges(table, seq_len=20, pred_len=5, ratio=(0.7, 0.1, 0.2))
    with pytest.raises(UserError, match=r"data\.short_series=skip"):
        split_ranges(table, seq_len=20, pred_len=5)
    ranges = split_ranges(table, seq_len=20, pred_len=5, short_series="skip")
    assert ranges["train"].tolist() == [[0, 140], [0, 0]] and ranges["test"][0].tolist() == [140, 200]
    assert "1 of 2 series are too short for the train part" in caplog.text
    with pytest.raises(UserError, match="all 2 series"):
        split_ranges(table, seq_len=500, pred_len=5, short_series="skip")


def test_the_length_that_a_message_asks_for_is_enough_and_one_less_is_not(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    for seq_len, pred_len in ((20, 5), (7, 30)):
        table = make(tmp_path, {"p": 25})
        with pytest.raises(UserError) as caught:
            split_ranges(table, seq_len=seq_len, pred_len=pred_len)
        needed = int(str(caught.value).split("it needs ")[1].split()[0])
        split_ranges(make(tmp_path / "a", {"p": needed}), seq_len=seq_len, pred_len=pred_len)
        with pytest.raises(UserError):
            split_ranges(make(tmp_path / "b", {"p": needed - 1}), seq_len=seq_len, pred_len=pred_len)


def test_prediction_takes_the_last_rows_of_each_series(tmp_path: Path) -> None:
    table = make(tmp_path, {"p": 200, "q": 15})
    assert predict_ranges(table, seq_len=15).tolist() == [[185, 200], [0, 15]]
    with pytest.raises(UserError, match=r"series 'q' of .* has 15 rows of history, a forecast needs 16"):
        predict_ranges(table, seq_len=16)
    assert predict_ranges(table, seq_len=16, short_series="skip").tolist() == [[184, 200], [0, 0]]


# ---------------------------------------------------------------------------------------------------- scaling


def test_scaling_uses_the_training_rows_only_and_leaves_missing_values_out(tmp_path: Path) -> None:
    frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=100, freq="h"), "a": np.arange(100.0), "b": 3.0})
    frame.loc[5:9, "a"] = np.nan
    frame.loc[80:, "a"] = 1e6
    frame.to_csv(tmp_path / "t.csv", index=False)
    table = load_table(tmp_path / "t.csv", cache_dir=tmp_path)
    scaler = StandardScaler.fit(table, np.array([[0, 80]]))
    expected = frame["a"][:80].dropna()
    np.testing.assert_allclose(scaler.mean[0], [expected.mean(), 3.0])
    np.testing.assert_allclose(scaler.std[0], [expected.std(ddof=0), 1.0])  # a constant column keeps its unit


def test_scope_series_and_global(tmp_path: Path) -> None:
    table = make(tmp_path, {"p": 100, "q": 60, "r": 40}, columns=2)
    ranges = np.array([[0, 80], [10, 60], [0, 0]])
    own = StandardScaler.fit(table, ranges, "series")
    both = StandardScaler.fit(table, ranges, "global")
    p, q = table.values[:80].astype(float), table.values[110:160].astype(float)
    np.testing.assert_allclose(own.mean[:2], [p.mean(0), q.mean(0)])
    np.testing.assert_allclose(own.std[:2], [p.std(0), q.std(0)])
    pooled = np.concatenate([p, q])
    np.testing.assert_allclose(both.mean, [pooled.mean(0)])
    np.testing.assert_allclose(both.std, [pooled.std(0)])
    np.testing.assert_allclose([own.mean[2], own.std[2]], [pooled.mean(0), pooled.std(0)])  # nothing to fit r on
    with pytest.raises(UserError, match="Did you mean global"):
        StandardScaler.fit(table, ranges, "globl")


@pytest.mark.parametrize("scope", ["series", "global"])
def test_inverse_is_exact_for_arrays_and_tensors_with_and_without_levels(tmp_path: Path, scope: str) -> None:
    table = make(tmp_path, {"p": 100, "q": 60}, columns=3)
    scaler = StandardScaler.fit(table, np.array([[0, 100], [0, 60]]), scope)
    scaler = StandardScaler.from_dict(scaler.to_dict())
    series = np.array([1, 0, 1, 1])
    x = np.random.default_rng(0).normal(size=(4, 7, 2)) * 50
    columns = ("y2", "y0")
    z = scaler.transform(x, series, columns)
    assert np.abs(z - x).max() > 1
    np.testing.assert_allclose(scaler.inverse(z, series, columns), x, rtol=1e-12)
    levels = torch.from_numpy(np.stack([z, z + 1], axis=-1))
    back = scaler.inverse(levels, torch.from_numpy(series), columns)
    torch.testing.assert_close(back[..., 0], torch.from_numpy(x))
    std = np.broadcast_to(scaler.statistics(series, columns)[1][:, None], x.shape)
    torch.testing.assert_close(back[..., 1] - back[..., 0], torch.from_numpy(std.copy()))


def test_a_scaler_follows_the_series_of_another_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = make(tmp_path, {"p": 100, "q": 60})
    scaler = StandardScaler.fit(table, np.array([[0, 100], [0, 60]]))
    (tmp_path / "new").mkdir()
    other = make(tmp_path / "new", {"q": 30, "new": 40, "p": 30})
    moved = scaler.for_table(other)
    np.testing.assert_array_equal(moved.mean[[0, 2]], scaler.mean[[1, 0]])
    np.testing.assert_allclose(moved.mean[1], other.values[30:70].astype(float).mean(0))
    assert "1 series not seen in training" in caplog.text and "'new'" in caplog.text
    (tmp_path / "one").mkdir(), (tmp_path / "two").mkdir()
    single = make(tmp_path / "one", {"a": 50})
    fitted = StandardScaler.fit(single, np.array([[0, 50]]))
    np.testing.assert_array_equal(fitted.for_table(make(tmp_path / "two", {"b": 20})).mean, fitted.mean)


def test_a_target_that_is_missing_in_training_is_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame({"date": pd.date_range("2024-01-01", periods=100, freq="h"), "a": 1.0, "b": 2.0})
    frame.loc[:79, "b"] = np.nan
    frame.to_csv(tmp_path / "t.csv", index=False)
    table = load_table(tmp_path / "t.csv", cache_dir=tmp_path)
    with pytest.raises(UserError, match=r"target 'b' .* has no value in the training rows"):
        StandardScaler.fit(table, np.array([[0, 80]]))
