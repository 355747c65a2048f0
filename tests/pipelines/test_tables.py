"""Reading files: layouts, what becomes of every cell, and one clear line for each kind of bad input."""

from __future__ import annotations

import gzip
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.forecasting.tables import load_table


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def hourly(rows: int = 30, start: str = "2024-01-30 20:00") -> pd.DataFrame:
    generator = np.random.default_rng(0)
    dates = pd.date_range(start, periods=rows, freq="h")
    return pd.DataFrame({"date": dates, "a": generator.normal(size=rows), "b": np.arange(rows) / 4})


def long_form() -> pd.DataFrame:
    parts = []
    for name, rows, start in (("x", 20, "2024-01-01"), ("w", 9, "2024-02-01"), ("z", 14, "2023-12-24")):
        part = pd.DataFrame({"unique_id": name, "ds": pd.date_range(start, periods=rows, freq="D")})
        part["y"] = np.arange(rows) + {"x": 0.0, "w": 100.0, "z": 200.0}[name]
        part["size"] = {"x": 1.5, "w": 2.5, "z": 3.5}[name]
        parts.append(part)
    return pd.concat(parts, ignore_index=True)


def save(frame: pd.DataFrame | str, path: Path, **options: object) -> Path:
    if isinstance(frame, str):
        path.write_text(frame)
    elif path.suffix == ".parquet":
        frame.to_parquet(path)
    else:
        frame.to_csv(path, index=False, **options)
    return path


def refused(path: Path, **options: object) -> str:
    """The message with which a file is refused: one line."""
    with pytest.raises(UserError) as caught:
        load_table(path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---------------------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("name", ["t.csv", "t.csv.gz", "t.parquet", "t.tsv", "semicolon.csv"])
def test_wide_files_of_every_kind_hold_the_same_numbers(tmp_path: Path, name: str) -> None:
    frame = hourly()
    separator = {"t.tsv": "\t", "semicolon.csv": ";"}.get(name)
    path = save(frame, tmp_path / name, **({"sep": separator} if separator else {}))
    table = load_table(path)
    assert table.targets == ("a", "b") and table.freq == "h" and table.unique_ids == ["series"]
    np.testing.assert_array_equal(table.columns["a"], frame["a"].to_numpy(np.float32))
    np.testing.assert_array_equal(table.times, frame["date"].astype("datetime64[ns]").astype(np.int64))
    assert table.columns["b"].dtype == np.float32
    assert not table.values.flags.writeable and isinstance(table.values, np.memmap)


def test_long_equals_wide(tmp_path: Path) -> None:
    frame = hourly()
    wide = load_table(save(frame, tmp_path / "wide.csv"), targets="a")
    long = frame.rename(columns={"date": "ds", "a": "y"})[["ds", "y"]].assign(unique_id="only")
    table = load_table(save(long, tmp_path / "long.csv"))
    assert table.unique_ids == ["only"] and table.targets == ("y",)
    np.testing.assert_array_equal(table.values, wide.values)
    np.testing.assert_array_equal(table.times, wide.times)


def test_series_of_different_lengths_whose_rows_are_interleaved(tmp_path: Path) -> None:
    frame = long_form()
    ordered = load_table(save(frame, tmp_path / "ordered.csv"), static_covariates=["size"])
    assert ordered.unique_ids == ["x", "w", "z"] and ordered.offsets.tolist() == [0, 20, 29, 43]
    assert ordered.freq == "D" and ordered.static.tolist() == [[1.5], [2.5], [3.5]]
    mixed = frame.sort_values("ds", kind="stable")
    table = load_table(save(mixed, tmp_path / "mixed.parquet"), static_covariates=["size"])
    assert table.unique_ids == ["z", "x", "w"]
    for name in "xwz":
        i, j = ordered.unique_ids.index(name), table.unique_ids.index(name)
        rows = (
            slice(ordered.offsets[i], ordered.offsets[i + 1]),
            slice(table.offsets[j], table.offsets[j + 1]),
        )
        np.testing.assert_array_equal(ordered.values[rows[0]], table.values[rows[1]])
        np.testing.assert_array_equal(ordered.times[rows[0]], table.times[rows[1]])
        assert ordered.static[i] == table.static[j]


def test_roles_choose_columns_and_their_order(tmp_path: Path) -> None:
    frame = hourly().assign(promo=1.0, note="text", idle=True)
    path = save(frame, tmp_path / "t.parquet")
    table = load_table(path, targets=["b"], past_covariates=["a"], future_covariates=["promo"])
    assert table.column_names == ("b", "a", "promo")
    assert load_table(path, future_covariates=["promo"]).targets == ("a", "b", "idle")


def test_missing_cells_become_nan_and_text_for_missing_is_understood(tmp_path: Path) -> None:
    text = "date,a,b\n2024-01-01,1,NA\n2024-01-02,,2\n2024-01-03, 3 ,nan\n2024-01-04,4,null\n"
    table = load_table(save(text, tmp_path / "t.csv"))
    np.testing.assert_array_equal(table.columns["a"], np.float32([1, np.nan, 3, 4]))
    np.testing.assert_array_equal(table.columns["b"], np.float32([np.nan, 2, np.nan, np.nan]))
    assert table.has_missing and not load_table(save(hourly(), tmp_path / "u.csv")).has_missing


@pytest.mark.parametrize(
    ("form", "name"), [("%d/%m/%Y", "ds"), ("%m/%d/%Y", "Date"), ("%Y%m%d", "ds"), ("%d.%m.%Y", "when")]
)
def test_timestamps_of_other_forms(tmp_path: Path, form: str, name: str) -> None:
    dates = pd.date_range("2024-01-02", periods=40, freq="D")  # the first could be read either way
    frame = pd.DataFrame({name: dates.strftime(form), "y": np.arange(40)})
    table = load_table(save(frame, tmp_path / "t.csv"))
    np.testing.assert_array_equal(table.times, dates.as_unit("ns").asi8)


def test_zones_become_utc(tmp_path: Path) -> None:
    dates = pd.date_range("2024-03-30 22:00", periods=8, freq="h", tz="Europe/Berlin")  # over the change of clocks
    expected = dates.tz_convert("UTC").tz_localize(None).as_unit("ns").asi8
    frame = pd.DataFrame({"date": dates, "a": np.arange(8.0)})
    for name in ("t.csv", "t.parquet"):
        np.testing.assert_array_equal(load_table(save(frame, tmp_path / name)).times, expected)


@pytest.mark.parametrize(
    "freq", ["15min", "h", "D", "W-WED", "MS", "ME", "QS-JAN", "QE-DEC", "YS-JAN", "B", "36h", "2MS"]
)
def test_frequency_is_inferred(tmp_path: Path, freq: str) -> None:
    frame = pd.DataFrame({"ds": pd.date_range("2019-10-01", periods=40, freq=freq), "y": np.arange(40.0)})
    assert load_table(save(frame, tmp_path / "t.csv")).freq == freq


def test_frequency_is_inferred_beside_gaps_which_fill_inserts_as_missing(tmp_path: Path) -> None:
    frame = hourly()
    path = save(frame.drop([4, 5, 20]), tmp_path / "t.csv")
    table = load_table(path, gaps="fill")
    expected = frame["a"].to_numpy(np.float32).copy()
    expected[[4, 5, 20]] = np.nan
    np.testing.assert_array_equal(table.columns["a"], expected)
    np.testing.assert_array_equal(table.times, frame["date"].astype("datetime64[ns]").astype(np.int64))
    assert table.has_missing
    message = refused(path)
    assert "line 6" in message and "2 step(s) of h are missing after 2024-01-30 23:00:00" in message
    assert "2 gap(s) and 3 missing row(s) in all" in message and "data.gaps=fill" in message


@pytest.mark.parametrize("freq", ["D", "MS", "ME", "B"])
def test_fill_in_several_series_keeps_each_apart(tmp_path: Path, freq: str) -> None:
    parts = []
    for name, drop in (("p", [3]), ("q", []), ("r", [1, 2, 7])):
        dates = pd.date_range("2020-01-31", periods=12, freq=freq)
        part = pd.DataFrame({"unique_id": name, "ds": dates, "y": np.arange(12.0)})
        parts.append(part.drop(drop))
    table = load_table(save(pd.concat(parts), tmp_path / "t.csv"), gaps="fill", freq=freq)
    assert table.lengths.tolist() == [12, 12, 12]
    for i, drop in enumerate(([3], [], [1, 2, 7])):
        rows = slice(table.offsets[i], table.offsets[i + 1])
        expected = np.arange(12, dtype=np.float32)
        expected[drop] = np.nan
        np.testing.assert_array_equal(table.values[rows, 0], expected)
        np.testing.assert_array_equal(table.times[rows], pd.DatetimeIndex(dates).as_unit("ns").asi8)


def test_rows_after_the_last_target_are_future_only_with_known_covariates(tmp_path: Path) -> None:
    frame = hourly().assign(promo=np.arange(30.0))
    frame.loc[24:, ["a", "b"]] = np.nan
    frame.loc[3, ["a", "b"]] = np.nan  # missing in the middle is history
    path = save(frame, tmp_path / "t.csv")
    assert load_table(path, targets=["a", "b"], future_covariates=["promo"]).history.tolist() == [24]
    assert load_table(path, targets=["a", "b"]).history.tolist() == [30]


# ------------------------------------------------------------------------------------------------------ cache


def test_the_cache_is_used_again_and_not_after_a_change(tmp_path: Path, cache: Path) -> None:
    path = save(hourly(), tmp_path / "t.csv")
    first = load_table(path)
    assert load_table(path).folder == first.folder
    assert load_table(path, targets="a").folder != first.folder
    shifted = hourly()
    shifted["date"] += pd.Timedelta("1D")
    size = path.stat().st_size
    assert save(shifted, path).stat().st_size == size
    assert load_table(path).times[0] != first.times[0]
    save(hourly(31), path)
    again = load_table(path)
    assert again.folder != first.folder and again.num_rows == 31
    assert first.num_rows == 30 and np.isfinite(first.values).all()  # an open table survives
    assert cache in again.folder.parents and not list(cache.rglob(".tmp-*"))


def test_a_refused_file_leaves_nothing_in_the_cache(tmp_path: Path, cache: Path) -> None:
    refused(save("date,a\n2024-01-01,1\n2024-01-02,2\n2024-01-03,3\n2024-01-04,x\n", tmp_path / "t.csv"))
    assert [item for item in cache.rglob("*") if item.is_file()] == []


def test_a_table_sent_to_another_process_opens_its_files_instead_of_copying(tmp_path: Path) -> None:
    table = load_table(save(hourly(5000), tmp_path / "t.csv"))
    state = pickle.dumps(table)
    assert len(state) < 1000
    np.testing.assert_array_equal(pickle.loads(state).values, table.values)


# -------------------------------------------------------------------------------------------------- bad input


def test_missing_file_names_the_near_ones(tmp_path: Path) -> None:
    save(hourly(), tmp_path / "weather.csv")
    assert "Did you mean weather.csv?" in refused(tmp_path / "wether.csv")
    assert "holds weather.csv" in refused(tmp_path / "zzz.csv")
    assert "no folder" in refused(tmp_path / "no" / "zzz.csv")
    assert "is a folder" in refused(tmp_path)


NO_TABLES = [
    ("empty.csv", "", "is empty"),
    ("blank.csv", "\n\n", "is empty"),
    ("header.csv", "date,a\n", "has a header and no rows"),
    ("bare.csv", "2024-01-01,1\n2024-01-02,2\n", "first line must hold the names"),
    ("double.csv", "date,a,a\n2024-01-01,1,2\n", "several columns of the name 'a'"),
    ("ragged.csv", "date,a\n2024-01-01,1\n\n2024-01-02\n", "line 4: 1 fields where the header has 2"),
    ("notime.csv", "a,b\n1,2\n3,4\n", "no column of timestamps among a, b"),
    ("two.csv", "date,ds,a\n2024-01-01,2024-01-01,1\n", "several columns of timestamps: date, ds; choose one"),
    ("kind.xlsx", "x", "ends in '.xlsx'; known are .csv"),
    ("bad.parquet", "not parquet", "as Parquet"),
    (
        "irregular.csv",
        "date,a\n2024-01-01,1\n2024-01-02,2\n2024-01-04,3\n2024-01-07,4\n2024-01-12,5\n",
        "no regular time step",
    ),
    ("one.csv", "date,a\n2024-01-01,1\n", "data.freq"),
    ("text.csv", "date,a\n2024-01-01,x\n2024-01-02,y\n", "no numeric column"),
]


@pytest.mark.parametrize(("name", "text", "expected"), NO_TABLES)
def test_files_that_are_no_tables(tmp_path: Path, name: str, text: str, expected: str) -> None:
    assert expected in refused(save(text, tmp_path / name))


def test_an_empty_or_truncated_binary_file(tmp_path: Path) -> None:
    assert "no rows" in refused(save(hourly().iloc[:0], tmp_path / "none.parquet"))
    whole = gzip.compress(hourly(20000).to_csv(index=False).encode())
    (tmp_path / "cut.csv.gz").write_bytes(whole[: len(whole) // 2])
    assert "cannot read" in refused(tmp_path / "cut.csv.gz")
    (tmp_path / "latin.csv").write_bytes("date,größe\n".encode() + "2024-01-01,1\n2024-01-02,\xff\n".encode("latin-1"))
    assert "not UTF-8" in refused(tmp_path / "latin.csv")


def test_no_such_column_names_the_near_ones(tmp_path: Path) -> None:
    path = save(hourly().rename(columns={"a": "OT"}), tmp_path / "t.csv")
    assert "has no column 'OTT'. Did you mean OT?" in refused(path, targets=["OTT"])
    assert "has no column 'datum'. Did you mean date?" in refused(path, time_column="datum")
    assert "has no column 'q'" in refused(path, static_covariates=["q"])
    assert "two roles" in refused(path, targets=["OT"], past_covariates=["OT"])
    assert "targets is empty" in refused(path, targets=[])
    assert "Did you mean error?" in refused(path, gaps="eror")
    assert "no time step" in refused(path, freq="hourly")


@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_text_in_a_numeric_column_is_named_with_row_and_column(tmp_path: Path, suffix: str) -> None:
    frame = hourly().astype({"b": object})
    frame["b"] = frame["b"].astype(str)
    frame.loc[17, "b"] = "broken"
    message = refused(save(frame, tmp_path / f"t.{suffix}"))
    assert {"csv": "line 19", "parquet": "row 18"}[suffix] in message
    assert "column 'b'" in message and "'broken' is not a number" in message
    frame.loc[17, "b"] = "1,5"
    assert "decimals are written with a point" in refused(save(frame, tmp_path / f"u.{suffix}"))


def test_line_numbers_count_blank_lines(tmp_path: Path) -> None:
    text = "date,a\n\n2024-01-01,1\n2024-01-02,2\n\n\n2024-01-03,oops\n2024-01-04,4\n"
    assert "line 7, column 'a': 'oops'" in refused(save(text, tmp_path / "t.csv"))


def test_infinity_is_refused_and_says_where(tmp_path: Path) -> None:
    frame = hourly()
    frame.loc[3, "a"] = np.inf
    assert "line 5, column 'a': inf is infinite" in refused(save(frame, tmp_path / "t.csv"))
    frame.loc[3, "a"] = 1e39
    assert "too large for float32" in refused(save(frame, tmp_path / "t.parquet"))


def test_times_that_do_not_ascend(tmp_path: Path) -> None:
    frame = hourly()
    double = pd.concat([frame.iloc[:6], frame.iloc[5:]])
    message = refused(save(double, tmp_path / "double.csv"))
    assert "line 8: duplicate timestamp 2024-01-31 01:00:00, also on line 7" in message and "data.id_column" in message
    swapped = frame.iloc[[0, 1, 3, 2, *range(4, 30)]]
    message = refused(save(swapped, tmp_path / "swapped.csv"))
    assert "line 5: timestamps are not sorted" in message and "on line 4" in message
    long = long_form().iloc[[*range(22), 23, 22, *range(24, 43)]]
    assert "of series 'w'" in refused(save(long, tmp_path / "long.parquet"))


def test_rows_of_an_interleaved_file_are_named_as_in_the_file(tmp_path: Path) -> None:
    text = "unique_id,ds,y\np,2024-01-01,1\nq,2024-01-01,2\np,2024-01-02,3\nq,2024-01-02,4\np,2024-01-02,5\n"
    assert "line 6: duplicate timestamp 2024-01-02 00:00:00 of series 'p', also on line 4" in refused(
        save(text, tmp_path / "t.csv")
    )


def test_times_that_cannot_be_read(tmp_path: Path) -> None:
    frame = hourly().astype({"date": str})
    frame.loc[7, "date"] = "2024-13-45"
    assert "line 9, column 'date': '2024-13-45' is no timestamp" in refused(save(frame, tmp_path / "t.csv"))
    frame.loc[7, "date"] = None
    assert "line 9, column 'date'" in refused(save(frame, tmp_path / "u.csv"))
    assert "row 8, column 'date': the timestamp is missing" in refused(save(frame, tmp_path / "u.parquet"))
    numbers = pd.DataFrame({"time": [1467331200, 1467334800], "a": [1.0, 2.0]})
    assert "'1467331200' is no timestamp" in refused(save(numbers, tmp_path / "n.parquet"))


def test_off_grid_times_and_absurd_fills(tmp_path: Path) -> None:
    frame = hourly()
    frame.loc[9, "date"] += pd.Timedelta("7min")
    assert "line 11: 2024-01-31 05:07:00 is not a whole number of steps of h" in refused(
        save(frame, tmp_path / "t.csv")
    )
    far = pd.DataFrame({"date": pd.to_datetime(["2000-01-01 00:00:00", "2024-01-01 00:00:00"]), "a": [1.0, 2.0]})
    assert "data.gaps=fill would add" in refused(save(far, tmp_path / "f.csv"), gaps="fill", freq="s")


def test_targets_without_a_value_and_static_covariates_that_vary(tmp_path: Path) -> None:
    assert "target 'b' has no value" in refused(save(hourly().assign(b=np.nan), tmp_path / "t.csv"))
    frame = long_form()
    frame.loc[25, "size"] = 9.0
    message = refused(save(frame, tmp_path / "s.csv"), static_covariates=["size"])
    assert "line 27" in message and "varies within series 'w' (2.5, then 9)" in message
    frame.loc[25, "unique_id"] = None
    assert "line 27, column 'unique_id': the name of the series is missing" in refused(save(frame, tmp_path / "i.csv"))


# ----------------------------------------------------------------------------------------------------- memory

_PEAK = """
import resource, sys
import numpy as np
from seqzoo.pipelines.forecasting.data import ForecastData
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def read(path):
    data = ForecastData(path, cache_dir=sys.argv[3], batch_size=64, steps=50)
    for batch in data.train_dataloader(): pass
    return batch
read(sys.argv[1])
before = peak()
batch = read(sys.argv[2])
print(len(batch["series"]), peak() - before)
"""


def test_a_large_file_is_never_held_in_memory(tmp_path: Path) -> None:
    rows, columns = 1_000_000, 8
    generator = np.random.default_rng(0)
    small = {"date": pd.date_range("2000-01-01", periods=500, freq="min")}
    pd.DataFrame({**small, "a": np.arange(500.0)}).to_parquet(tmp_path / "small.parquet")
    schema = pa.schema([("date", pa.timestamp("ns")), *((f"c{i}", pa.float64()) for i in range(columns))])
    with pq.ParquetWriter(tmp_path / "large.parquet", schema) as writer:
        for first in range(0, rows, 50_000):
            dates = pd.date_range("2000-01-01", periods=rows, freq="min")[first : first + 50_000].as_unit("ns")
            writer.write(pa.table([dates, *generator.normal(size=(columns, 50_000))], schema=schema))
    arguments = [str(tmp_path / name) for name in ("small.parquet", "large.parquet", "cache")]
    result = subprocess.run([sys.executable, "-c", _PEAK, *arguments], capture_output=True, text=True, check=True)
    batch, growth = map(int, result.stdout.split())
    own = rows * columns * 4
    # The columns are 32 MB; as float64 with their times they are 72 MB, and as much again in pandas.
    assert batch == 64 and growth < 1.5 * own + 70e6
