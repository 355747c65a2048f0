"""Properties of windows of series: what stands in them, which rows a split may see, calendars, scaling, cut-offs."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from examples import examples
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.forecasting.backtest import backtest_ranges, rolling_origins
from seqzoo.pipelines.forecasting.calendar import Calendar, calendar_features, future_times, same_frequency
from seqzoo.pipelines.forecasting.frequency import DAY, infer_frequency, parse_frequency
from seqzoo.pipelines.forecasting.scaling import StandardScaler
from seqzoo.pipelines.forecasting.separate import separate_columns
from seqzoo.pipelines.forecasting.splits import predict_ranges, split_ranges
from seqzoo.pipelines.forecasting.tables import SeriesTable
from seqzoo.pipelines.forecasting.windows import WindowDataset

HOUR = 3600 * 1_000_000_000
LENGTHS = st.lists(st.integers(1, 40), min_size=1, max_size=5)
SIZES = st.integers(1, 9)
STEPS = ["s", "15min", "h", "3h", "D", "2D", "B", "W-SUN", "2W-WED", "MS", "ME", "2MS", "QS-FEB", "QE-DEC", "YS-JAN"]


def table_of(
    values: np.ndarray,
    lengths: list[int],
    *,
    past: int = 0,
    future: int = 0,
    history: list[int] | None = None,
    source: str = "memory",
    folder: str = "memory",
) -> SeriesTable:
    """A table of hourly series in memory; its last columns are covariates."""
    columns = values.shape[1]
    names = tuple(f"c{i}" for i in range(columns))
    targets = columns - past - future
    return SeriesTable(
        unique_ids=[f"s{i}" for i in range(len(lengths))],
        offsets=np.concatenate([[0], np.cumsum(lengths)]),
        values=np.ascontiguousarray(values, dtype=np.float32),
        times=np.concatenate([np.arange(n) for n in lengths]) * HOUR + 40 * 365 * DAY,
        static=np.zeros((len(lengths), 0), np.float32),
        history=np.array(lengths if history is None else history),
        targets=names[:targets],
        past_covariates=names[targets : targets + past],
        future_covariates=names[targets + past :],
        static_names=(),
        freq="h",
        source=source,
        time_column="date",
        id_column="unique_id",
        has_missing=bool(np.isnan(values).any()),
        folder=Path(folder),
    )


def numbered(rows: int, columns: int) -> np.ndarray:
    """Each cell another whole number, exact in float32."""
    return np.arange(1, rows * columns + 1, dtype=np.float32).reshape(rows, columns)


def unscaled(table: SeriesTable) -> StandardScaler:
    width = len(table.column_names)
    nothing = np.zeros(0)
    return StandardScaler(
        "global", table.column_names, (), np.zeros((1, width)), np.ones((1, width)), nothing, nothing + 1
    )


def whole(table: SeriesTable) -> np.ndarray:
    return np.stack([np.zeros_like(table.history), table.history], axis=1)


def windows_of(table: SeriesTable, ranges: np.ndarray, seq_len: int, pred_len: int, **options: object) -> WindowDataset:
    scaler = unscaled(table)
    return WindowDataset(table, seq_len=seq_len, pred_len=pred_len, ranges=ranges, scaler=scaler, **options)


# windows --------------------------------------------------------------------------------------------------------------


@examples(50)
@given(
    lengths=LENGTHS, seq_len=SIZES, pred_len=SIZES, stride=st.integers(1, 5), kinds=st.tuples(*[st.integers(0, 2)] * 2),
    missing=st.booleans(), draw=st.randoms(use_true_random=False),
)  # fmt: skip
def test_a_window_is_rows_of_one_series_and_its_target_follows_them(
    lengths: list[int],
    seq_len: int,
    pred_len: int,
    stride: int,
    kinds: tuple[int, int],
    missing: bool,
    draw: random.Random,
) -> None:
    past, future = kinds
    values = numbered(sum(lengths), 2 + past + future)
    if missing:
        values[np.random.default_rng(draw.getrandbits(32)).random(values.shape) < 0.3] = np.nan
    table = table_of(values, lengths, past=past, future=future)
    bounds = [sorted(draw.randint(0, n) for _ in range(2)) for n in lengths]
    found = windows_of(table, np.array(bounds), seq_len, pred_len, stride=stride)
    starts = [
        (series, start)
        for series, (begin, end) in enumerate(bounds)
        for start in range(begin, end - seq_len - pred_len + 1, stride)
    ]
    assert len(found) == len(starts)
    if not starts:
        return
    order = draw.sample(range(len(starts)), len(starts))
    batch = found[order]
    times = table.times
    for row, number in enumerate(order):
        series, start = starts[number]
        first = table.offsets[series] + start
        middle, last = first + seq_len, first + seq_len + pred_len
        assert batch["series"][row] == series and batch["origin"][row] == start + seq_len
        for name, expected in (
            ("past_target", values[first:middle, :2]),
            ("future_target", values[middle:last, :2]),
            ("past_covariates", values[first:middle, 2 : 2 + past]),
            ("future_covariates", values[first:last, 2 + past :]),
        ):
            np.testing.assert_array_equal(batch[name][row], np.nan_to_num(expected), name)
        np.testing.assert_array_equal(batch["past_observed"][row], ~np.isnan(values[first:middle, :2]))
        np.testing.assert_array_equal(batch["future_observed"][row], ~np.isnan(values[middle:last, :2]))
        np.testing.assert_array_equal(batch["past_time"][row], calendar_features(times[first:middle], "h"))
        np.testing.assert_array_equal(batch["future_time"][row], calendar_features(times[middle:last], "h"))


@examples(30)
@given(lengths=LENGTHS, seq_len=SIZES, pred_len=SIZES, ahead=st.booleans(), draw=st.randoms(use_true_random=False))
def test_a_forecast_starts_after_the_last_known_row(
    lengths: list[int], seq_len: int, pred_len: int, ahead: bool, draw: random.Random
) -> None:
    known = [draw.randint(0, n) for n in lengths]
    lengths = [history + pred_len for history in known] if ahead else lengths
    table = table_of(numbered(sum(lengths), 2), lengths, future=int(ahead), history=known if ahead else lengths)
    short = table.history < seq_len
    assume(not short.all())
    ranges = predict_ranges(table, seq_len=seq_len, short_series="skip")
    found = windows_of(table, ranges, seq_len, pred_len, future=False)
    assert len(found) == int((~short).sum())
    batch = found[np.arange(len(found))]
    assert "future_target" not in batch and batch["series"].tolist() == np.flatnonzero(~short).tolist()
    for row, series in enumerate(batch["series"].tolist()):
        end = int(table.offsets[series] + table.history[series])
        assert batch["origin"][row] == table.history[series]
        np.testing.assert_array_equal(batch["past_target"][row], table.values[end - seq_len : end, : 2 - ahead])
        if ahead:
            expected = table.values[end - seq_len : end + pred_len, 1:]
            np.testing.assert_array_equal(batch["future_covariates"][row], expected)
        after = future_times(int(table.times[end - 1]), "h", pred_len)
        np.testing.assert_array_equal(batch["future_time"][row], calendar_features(after, "h"))


# splits ---------------------------------------------------------------------------------------------------------------


@examples(60)
@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=4), seq_len=SIZES, pred_len=SIZES,
    ratio=st.sampled_from([(0.7, 0.1, 0.2), (0.5, 0.0, 0.5), (0.8, 0.2, 0.0), (1, 0, 0), (0.4, 0.3, 0.3)]),
)  # fmt: skip
def test_splits_ask_for_no_row_twice_and_train_on_none_that_is_asked_for(
    lengths: list[int], seq_len: int, pred_len: int, ratio: tuple[float, ...]
) -> None:
    table = table_of(numbered(sum(lengths), 1), lengths)
    try:
        ranges = split_ranges(table, seq_len=seq_len, pred_len=pred_len, ratio=ratio, short_series="skip")
    except UserError as error:
        assert "too short" in str(error)
        return
    asked: dict[str, list[np.ndarray]] = {}
    for stage, rows in ranges.items():
        found = windows_of(table, rows, seq_len, pred_len)
        asked[stage] = [np.zeros(0)] * len(lengths)
        if not len(found):
            continue
        batch = found[np.arange(len(found))]
        for series in range(len(lengths)):
            own = batch["series"] == series
            asked[stage][series] = np.unique(batch["future_target"][own])
            if stage == "train":
                trained = np.unique(torch.cat((batch["past_target"], batch["future_target"]), 1)[own])
                asked["seen"] = [*asked.get("seen", []), trained]
    for series, rows in enumerate(lengths):
        train, val, test = (asked[stage][series] for stage in ("train", "val", "test"))
        assert len(np.unique(np.concatenate([train, val, test]))) == len(train) + len(val) + len(test)
        for earlier, later in itertools.combinations([np.asarray(asked["seen"][series]), val, test], 2):
            assert not len(earlier) or not len(later) or earlier.max() < later.min()
        # each part that has its context before it is asked for as a whole
        sizes = int(rows * ratio[0]), int(rows * ratio[2])
        if len(test) and len(train):
            assert len(test) == (sizes[1] if ratio[1] else rows - sizes[0]) and test.max() == table.offsets[series + 1]
        if len(val) and len(train):
            assert len(val) == rows - sum(sizes)


@examples(30)
@given(
    lengths=LENGTHS, scope=st.sampled_from(["series", "global"]), size=st.sampled_from([1e-36, 1e-6, 1.0, 1e9, 1e30]),
    draw=st.randoms(use_true_random=False),
)  # fmt: skip
@example(lengths=[2], scope="series", size=1e-39, draw=random.Random(0))  # its 1 / std is infinite in float32
def test_scaling_looks_at_the_training_rows_alone_and_goes_back(
    lengths: list[int], scope: str, size: float, draw: random.Random
) -> None:
    noise = np.random.default_rng(draw.getrandbits(32))
    values = (noise.normal(3, 1, (sum(lengths), 3)) * size).astype(np.float32)
    values[:, 2] = np.float32(0.1) * size  # without spread
    values[noise.random(values.shape) < 0.2] = np.nan
    values[0] = size
    table = table_of(values, lengths)
    ranges = np.array([[0, draw.randint(i == 0, n)] for i, n in enumerate(lengths)])
    made = StandardScaler.fit(table, ranges, scope)
    other = values.copy()
    for (_, end), first, last in zip(ranges, table.offsets[:-1], table.offsets[1:], strict=True):
        other[first + end : last] = noise.normal(0, 1e3, other[first + end : last].shape)
    again = StandardScaler.fit(table_of(other, lengths), ranges, scope)
    for name in ("mean", "std"):
        np.testing.assert_array_equal(getattr(made, name), getattr(again, name))
    loaded = StandardScaler.from_dict(json.loads(json.dumps(made.to_dict())))
    assert loaded.to_dict() == made.to_dict() and (loaded.std > 0).all()
    series = np.repeat(np.arange(len(lengths)), lengths)
    wide = values.astype(np.float64)[:, None]
    near = {"rtol": 1e-9, "atol": 1e-9 * size}
    np.testing.assert_allclose(made.inverse(made.transform(wide, series), series), wide, **near)
    there = torch.from_numpy(wide)
    np.testing.assert_allclose(loaded.inverse(made.transform(there, series), torch.from_numpy(series)), wide, **near)
    found = WindowDataset(table, seq_len=1, pred_len=1, ranges=whole(table), scaler=made)
    if len(found):
        batch = found[np.arange(len(found))]
        assert batch["past_target"].isfinite().all() and batch["future_target"].isfinite().all()


# calendars ------------------------------------------------------------------------------------------------------------


@examples(40)
@given(freq=st.sampled_from(STEPS), start=st.integers(-8000, 20000), parts=st.tuples(st.integers(1, 30), SIZES))
def test_times_after_times_and_gaps_between_them(freq: str, start: int, parts: tuple[int, int]) -> None:
    frequency = parse_frequency(freq)
    first = pd.date_range(pd.Timestamp(start * DAY), periods=1, freq=frequency.offset).as_unit("ns").asi8[0]
    before, more = parts
    times = future_times(int(first), freq, before + more)
    expected = pd.date_range(pd.Timestamp(first), periods=before + more + 1, freq=frequency.offset).as_unit("ns").asi8
    np.testing.assert_array_equal(times, expected[1:])
    np.testing.assert_array_equal(future_times(int(times[before - 1]), freq, more), times[before:])
    assert (frequency.missing_between(times[:-1], times[1:]) == 0).all()
    assert frequency.missing_between(np.array([first]), times[-1:]).tolist() == [before + more - 1]
    assert frequency.missing_between(np.array([first]), times[-1:] + 1).tolist() == [-1] or frequency.months


@examples(40)
@given(freq=st.sampled_from(STEPS), start=st.integers(-8000, 20000), draw=st.randoms(use_true_random=False))
def test_a_step_is_found_in_times_with_gaps(freq: str, start: int, draw: random.Random) -> None:
    frequency = parse_frequency(freq)
    times = pd.date_range(pd.Timestamp(start * DAY), periods=60, freq=frequency.offset).as_unit("ns").asi8
    gone = set(draw.sample(range(1, 59), 6))
    left = times[[i for i in range(60) if i not in gone]]
    cut = draw.randint(10, 40)
    offsets = np.array([0, cut, len(left)])
    found = infer_frequency(left, offsets)
    assert same_frequency(found.alias, freq)
    assert all(found.offset.is_on_offset(pd.Timestamp(time)) for time in left)  # its anchor, too


@examples(30)
@given(freq=st.sampled_from(STEPS), times=st.lists(st.integers(-8000 * 86400, 20000 * 86400), min_size=1, max_size=20))
def test_calendar_features_are_those_of_each_time_alone(freq: str, times: list[int]) -> None:
    moments = np.array(times, dtype=np.int64) * 1_000_000_000
    features = calendar_features(moments, freq)
    assert features.dtype == np.float32 and (np.abs(features) <= 0.5).all()
    wider = Calendar(freq, int(moments.min()) - 400 * DAY, int(moments.max()) + 400 * DAY)
    np.testing.assert_array_equal(wider(moments), features)
    stamp = pd.Timestamp(int(moments[0]))
    expected = {
        "second": stamp.second / 59, "minute": stamp.minute / 59, "hour": stamp.hour / 23,
        "month": (stamp.month - 1) / 11,
        "dayofweek": stamp.weekday() / 6, "day": (stamp.day - 1) / 30, "dayofyear": (stamp.day_of_year - 1) / 365,
        "week": (stamp.isocalendar()[1] - 1) / 52,
    }  # fmt: skip
    np.testing.assert_allclose(features[0], [expected[name] - 0.5 for name in wider.fields], atol=1e-7)


# cut-offs -------------------------------------------------------------------------------------------------------------


@examples(60)
@given(lengths=LENGTHS, seq_len=SIZES, pred_len=SIZES, step=st.integers(1, 12), number=st.none() | st.integers(1, 6))
def test_cut_offs_of_a_backtest(lengths: list[int], seq_len: int, pred_len: int, step: int, number: int | None) -> None:
    expected = []
    for series, length in enumerate(lengths):
        rows = [
            r
            for r in range(length + 1)
            if r >= seq_len and r + pred_len <= length and not (length - pred_len - r) % step
        ]
        kept = rows[-number:] if number else rows
        assert rolling_origins(length, seq_len, pred_len, step, number).tolist() == kept
        expected += [(series, row) for row in kept]
    table = table_of(numbered(sum(lengths), 1), lengths)
    ranges = backtest_ranges(lengths, seq_len, pred_len, step, number)
    found = windows_of(table, ranges, seq_len, pred_len, stride=step)
    assert len(found) == len(expected)
    if expected:
        batch = found[np.arange(len(found))]
        assert list(zip(batch["series"].tolist(), batch["origin"].tolist(), strict=True)) == expected


# columns as series ----------------------------------------------------------------------------------------------------


@examples(8)
@given(lengths=LENGTHS, number=st.integers(1, 3), seq_len=SIZES, pred_len=SIZES)
def test_columns_as_series_have_the_windows_of_the_columns(
    lengths: list[int], number: int, seq_len: int, pred_len: int, tmp_path: Path
) -> None:
    source = tmp_path / "a.csv"
    source.touch()
    name = f"{lengths} {number}"
    table = table_of(numbered(sum(lengths), number), lengths, source=str(source), folder=name)
    alone = separate_columns(table, tmp_path / "cache")
    assert alone.num_series == number * len(lengths) and len(set(alone.unique_ids)) == alone.num_series
    together, apart = (windows_of(t, whole(t), seq_len, pred_len) for t in (table, alone))
    assert len(apart) == number * len(together)
    if not len(together):
        return
    batch, single = together[np.arange(len(together))], apart[np.arange(len(apart))]
    series, channel = single["series"] // number, single["series"] % number
    for row in range(len(apart)):
        same = (batch["series"] == series[row]) & (batch["origin"] == single["origin"][row])
        for key in ("past_target", "future_target"):
            np.testing.assert_array_equal(single[key][row, :, 0], batch[key][same][0, :, channel[row]])
        np.testing.assert_array_equal(single["future_time"][row], batch["future_time"][same][0])
