"""Calendar features against Informer's formulas through pandas, future timestamps, seasons."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.forecasting.calendar import (
    Calendar,
    calendar_features,
    calendar_fields,
    future_times,
    same_frequency,
    seasonality,
)
from seqzoo.pipelines.forecasting.frequency import parse_frequency

# The paper's code, on a DatetimeIndex.
FORMULAS = {
    "second": lambda t: t.second / 59 - 0.5,
    "minute": lambda t: t.minute / 59 - 0.5,
    "hour": lambda t: t.hour / 23 - 0.5,
    "dayofweek": lambda t: t.day_of_week / 6 - 0.5,
    "day": lambda t: (t.day - 1) / 30 - 0.5,
    "dayofyear": lambda t: (t.day_of_year - 1) / 365 - 0.5,
    "month": lambda t: (t.month - 1) / 11 - 0.5,
    "week": lambda t: (t.isocalendar().week.to_numpy(dtype=float) - 1) / 52 - 0.5,
}


@pytest.mark.parametrize(
    ("freq", "fields"),
    [
        ("h", ["hour", "dayofweek", "day", "dayofyear"]),
        ("15min", ["minute", "hour", "dayofweek", "day", "dayofyear"]),
        ("7s", ["second", "minute", "hour", "dayofweek", "day", "dayofyear"]),
        ("D", ["dayofweek", "day", "dayofyear"]),
        ("B", ["dayofweek", "day", "dayofyear"]),
        ("W-SUN", ["day", "week"]),
        ("MS", ["month"]),
        ("QE", ["month"]),
        ("YS", []),
    ],
)
def test_features_are_informers(freq: str, fields: list[str]) -> None:
    periods = 200 if freq == "YS" else 900
    times = pd.date_range("1967-11-27 21:10:33", periods=periods, freq=freq)  # before and after 1970
    features = calendar_features(times.as_unit("ns").asi8, freq)
    assert list(calendar_fields(freq)) == fields and features.shape == (len(times), len(fields))
    assert features.dtype == np.float32
    for column, name in enumerate(fields):
        np.testing.assert_allclose(features[:, column], FORMULAS[name](times), atol=1e-6, err_msg=name)
    if fields:
        assert features.min() >= -0.5 and features.max() <= 0.5


def test_features_of_any_shape_and_of_no_times() -> None:
    times = pd.date_range("2024-01-01", periods=48, freq="h").as_unit("ns").asi8
    calendar = Calendar("h", int(times[0]), int(times[-1]))
    np.testing.assert_array_equal(calendar(times.reshape(4, 12)), calendar(times).reshape(4, 12, 4))
    assert calendar_features(times[:0], "h").shape == (0, 4)


@pytest.mark.parametrize(
    "freq",
    [
        "s",
        "15min",
        "h",
        "36h",
        "D",
        "2D",
        "B",
        "W-MON",
        "MS",
        "ME",
        "2MS",
        "QS-JAN",
        "QE-DEC",
        "YS-JAN",
        "YE-DEC",
        "SME",
    ],
)
def test_future_times_are_pandas(freq: str) -> None:
    index = pd.date_range("2023-11-20 05:00", periods=30, freq=freq).as_unit("ns")
    np.testing.assert_array_equal(future_times(index.asi8[7], freq, 22), index.asi8[8:])


def test_future_times_keep_a_day_of_the_month_that_is_no_anchor() -> None:
    times = future_times(pd.Timestamp("2024-01-30 06:00").value, "MS", 3)
    assert [str(pd.Timestamp(t)) for t in times] == [
        "2024-02-29 06:00:00",
        "2024-03-30 06:00:00",
        "2024-04-30 06:00:00",
    ]


@pytest.mark.parametrize(
    ("freq", "season"),
    [
        *[("h", 24), ("15min", 96), ("min", 1440), ("s", 3600), ("6h", 4), ("D", 7), ("B", 5), ("W", 52), ("MS", 12)],
        *[("ME", 12), ("QS", 4), ("YE", 1), ("5h", 1), ("H", 24), ("M", 12), ("15T", 96)],
    ],
)
def test_seasonality(freq: str, season: int) -> None:
    assert seasonality(freq) == season


def test_same_frequency() -> None:
    assert same_frequency("h", "60min") and same_frequency("D", "24h") and same_frequency("QS-JAN", "QS-APR")
    assert same_frequency("M", "ME") and same_frequency("W-MON", "7D")
    assert not same_frequency("h", "30min") and not same_frequency("B", "D") and not same_frequency("MS", "ME")


@pytest.mark.parametrize("freq", ["hourly", "", "0h", "-1h", "13"])
def test_bad_frequencies(freq: str) -> None:
    with pytest.raises(UserError, match="no time step; use a pandas alias"):
        parse_frequency(freq)
