"""The forecast table: column names, order, units and files."""

import gzip

import numpy as np
import pandas as pd
import pytest

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.forecasting.predict import check_output_path, forecast_frame, write_frame

STEPS = 3


def parts(number=2, width=1):
    point = np.arange(number * STEPS * width, dtype=np.float32).reshape(number, STEPS, width)
    quantiles = {q: point + np.float32(10 * (q - 0.5)) for q in (0.05, 0.1, 0.5, 0.9, 0.95)}
    start = np.datetime64("2024-02-28T23:00", "ns").astype(np.int64)
    times = start + np.arange(STEPS) * 3600 * 10**9 + np.arange(number)[:, None] * 10**9
    return point, quantiles, times


def test_one_target_has_exactly_the_promised_columns():
    point, quantiles, times = parts()
    frame = forecast_frame(["b", "a"], times, point, ["y"], quantiles)
    assert list(frame.columns) == ["unique_id", "ds", "y", "lo-80", "hi-80", "lo-90", "hi-90"]
    assert list(frame["unique_id"]) == ["b"] * 3 + ["a"] * 3  # the order given, not sorted
    assert frame["ds"].iloc[1] == pd.Timestamp("2024-02-29 00:00") and frame["ds"].dtype == "datetime64[ns]"
    assert frame["ds"].iloc[3] == pd.Timestamp("2024-02-28 23:00:01")
    np.testing.assert_array_equal(frame["y"], np.arange(6))
    np.testing.assert_allclose(frame["lo-80"], np.arange(6) - 4)
    np.testing.assert_allclose(frame["hi-80"], np.arange(6) + 4)
    np.testing.assert_allclose(frame["lo-90"], np.arange(6) - 4.5)
    np.testing.assert_allclose(frame["hi-90"], np.arange(6) + 4.5)


def test_several_targets_have_their_own_intervals():
    point, quantiles, times = parts(width=2)
    frame = forecast_frame(["a", "b"], times, point, ["load", "temp"], quantiles)
    bounds = [f"{{}}-{side}-{p}" for p in (80, 90) for side in ("lo", "hi")]
    expected = [c for t in ("load", "temp") for c in (t, *(b.format(t) for b in bounds))]
    assert list(frame.columns) == ["unique_id", "ds", *expected]
    np.testing.assert_array_equal(frame["temp"], point[:, :, 1].ravel())
    np.testing.assert_allclose(frame["temp-hi-90"], point[:, :, 1].ravel() + 4.5)


def test_point_model_has_no_interval_columns():
    point, quantiles, times = parts()
    assert list(forecast_frame(["a", "b"], times, point, ["y"]).columns) == ["unique_id", "ds", "y"]
    some = {q: quantiles[q] for q in (0.1, 0.9)}
    assert list(forecast_frame(["a", "b"], times, point, ["y"], some).columns)[2:] == ["y", "lo-80", "hi-80"]


def test_datetime_times_and_no_series_at_all():
    point, _, times = parts()
    frame = forecast_frame(["a", "b"], times.astype("datetime64[ns]"), point, ["y"])
    assert frame["ds"].iloc[0] == pd.Timestamp("2024-02-28 23:00")
    assert len(forecast_frame([], times[:0], point[:0], ["y"])) == 0


def test_wrong_shapes_and_clashing_names_are_refused():
    point, quantiles, times = parts()
    with pytest.raises(ValueError, match="point has shape"):
        forecast_frame(["a"], times, point, ["y"])
    with pytest.raises(ValueError, match="future_times"):
        forecast_frame(["a", "b"], times[:, :1], point, ["y"])
    with pytest.raises(ValueError, match=r"quantile 0\.1"):
        forecast_frame(["a", "b"], times, point, ["y"], {0.1: point[:1]})
    for name in ("ds", "unique_id"):
        with pytest.raises(UserError, match=f"'{name}' a second time"):
            forecast_frame(["a", "b"], times, point, [name], quantiles)


@pytest.mark.parametrize("name", ["f.csv", "f.csv.gz", "f.parquet", "new/folder/F.CSV"])
def test_written_table_reads_back_equal(tmp_path, name):
    point, quantiles, times = parts()
    frame = forecast_frame(["a", "b"], times, point, ["y"], quantiles)
    path = write_frame(frame, tmp_path / name)
    if name.endswith("parquet"):
        back = pd.read_parquet(path)
    else:
        if name.endswith("gz"):
            gzip.decompress(path.read_bytes())
        compression = "gzip" if name.endswith("gz") else None
        back = pd.read_csv(path, parse_dates=["ds"], compression=compression)
    assert list(back.columns) == list(frame.columns) and (back["ds"] == frame["ds"]).all()
    np.testing.assert_allclose(back["lo-80"], frame["lo-80"], rtol=1e-6)
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_output_path_is_checked_before_the_work(tmp_path):
    with pytest.raises(UserError, match=r"must end in \.csv"):
        check_output_path(tmp_path / "f.xlsx")
    with pytest.raises(UserError, match=r"must end in \.csv"):
        check_output_path(tmp_path / "f.parquet.gz")
    with pytest.raises(UserError, match="is a folder"):
        check_output_path(tmp_path)
