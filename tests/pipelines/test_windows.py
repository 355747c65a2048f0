"""Windows: every one exactly once, right to the row and the hour, whatever the order, batch and process."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, RandomSampler

from seqzoo.pipelines import loading
from seqzoo.pipelines.forecasting import tables
from seqzoo.pipelines.forecasting.calendar import calendar_features
from seqzoo.pipelines.forecasting.scaling import StandardScaler
from seqzoo.pipelines.forecasting.splits import predict_ranges
from seqzoo.pipelines.forecasting.tables import SeriesTable, load_table
from seqzoo.pipelines.forecasting.windows import WindowDataset
from seqzoo.pipelines.loading import IndexSampler, ResumableLoader, identity

L, H = 7, 3
LENGTHS = {"p": 40, "q": 10, "r": 9, "s": 25}  # r is one row too short for a window


@pytest.fixture(scope="module")
def frame() -> pd.DataFrame:
    """Values that name their series and row: 1000 * series + row, with signs and offsets by column."""
    parts = []
    for i, (name, rows) in enumerate(LENGTHS.items()):
        row = np.arange(rows, dtype=float)
        part = pd.DataFrame({"unique_id": name, "ds": pd.date_range(f"2024-01-{10 + i}", periods=rows, freq="h")})
        part["y"], part["y2"] = 1000 * i + row, -(1000 * i + row)
        part["past"], part["known"], part["size"] = row * 2, row * 3 + 1, i * 1.5
        parts.append(part)
    frame = pd.concat(parts, ignore_index=True)
    frame.loc[[3, 12, 60], "y"] = np.nan
    frame.loc[[3, 55], "past"] = np.nan
    return frame


@pytest.fixture(scope="module")
def table(frame: pd.DataFrame, tmp_path_factory: pytest.TempPathFactory) -> SeriesTable:
    folder = tmp_path_factory.mktemp("windows")
    frame.to_csv(folder / "t.csv", index=False)
    return load_table(
        folder / "t.csv",
        targets=["y", "y2"],
        past_covariates=["past"],
        future_covariates=["known"],
        static_covariates=["size"],
        cache_dir=folder,
    )


def whole(table: SeriesTable) -> np.ndarray:
    return np.stack([np.zeros_like(table.lengths), table.lengths], axis=1)


def dataset(table: SeriesTable, scope: str = "series", **options: object) -> WindowDataset:
    scaler = StandardScaler.fit(table, whole(table), scope)
    options = {"ranges": whole(table), **options}
    return WindowDataset(table, seq_len=L, pred_len=H, scaler=scaler, **options)


@pytest.mark.parametrize("scope", ["series", "global"])
def test_every_window_is_right_to_the_row(table: SeriesTable, frame: pd.DataFrame, scope: str) -> None:
    windows = dataset(table, scope)
    assert len(windows) == 31 + 1 + 0 + 16
    number = 0
    for i, (name, group) in enumerate(frame.groupby("unique_id", sort=False)):
        values = group[["y", "y2", "past", "known"]].to_numpy()
        times = group["ds"].astype("datetime64[ns]").astype(np.int64).to_numpy()
        for start in range(len(values) - L - H + 1):
            item = {key: value[0].numpy() for key, value in windows[number].items()}
            number += 1
            mid, end = start + L, start + L + H
            assert item["series"] == i and item["origin"] == mid, name
            mean, std = windows.scaler.statistics(np.array([i]), table.column_names)
            scaled = np.nan_to_num((values - mean[0]) / std[0])
            np.testing.assert_allclose(item["past_target"], scaled[start:mid, :2], atol=5e-5)
            np.testing.assert_allclose(item["future_target"], scaled[mid:end, :2], atol=5e-5)
            np.testing.assert_allclose(item["past_covariates"], scaled[start:mid, 2:3], atol=5e-5)
            np.testing.assert_allclose(item["future_covariates"], scaled[start:end, 3:], atol=5e-5)
            np.testing.assert_array_equal(item["past_observed"], ~np.isnan(values[start:mid, :2]))
            np.testing.assert_array_equal(item["future_observed"], ~np.isnan(values[mid:end, :2]))
            np.testing.assert_array_equal(item["past_time"], calendar_features(times[start:mid], "h"))
            np.testing.assert_array_equal(item["future_time"], calendar_features(times[mid:end], "h"))
            assert windows.origin_times(np.array([i]), np.array([mid])) == times[mid - 1]
    assert number == len(windows)
    sizes = np.array([0, 1.5, 3, 4.5])
    expected = (sizes - sizes.mean()) / sizes.std()
    np.testing.assert_allclose(windows[31]["static_covariates"][0], expected[1:2], atol=1e-6)


def test_batches_equal_single_windows_in_any_order(table: SeriesTable) -> None:
    windows = dataset(table)
    order = np.random.default_rng(0).permutation(len(windows))
    batch = windows.__getitems__(order.tolist())
    for position, number in enumerate(order):
        for key, value in windows[int(number)].items():
            torch.testing.assert_close(batch[key][position], value[0], rtol=0, atol=0)
    with pytest.raises(IndexError):
        windows[len(windows)]
    with pytest.raises(IndexError):
        windows[-1]


def test_a_series_alone_has_the_windows_that_it_has_among_others(
    table: SeriesTable, frame: pd.DataFrame, tmp_path: Path
) -> None:
    name = list(LENGTHS)[3]
    frame[frame["unique_id"] == name].to_csv(tmp_path / "one.csv", index=False)
    alone = load_table(
        tmp_path / "one.csv",
        targets=["y", "y2"],
        past_covariates=["past"],
        future_covariates=["known"],
        static_covariates=["size"],
        cache_dir=tmp_path,
    )
    assert alone.num_series == 1
    ranges = whole(table) + np.array([[1, 0]])
    one, every = dataset(alone, ranges=ranges[3:], stride=2), dataset(table, ranges=ranges, stride=2)
    before = int(np.flatnonzero(every.locate(np.arange(len(every)))[0] == 3)[0])
    order = np.random.default_rng(0).permutation(len(one))
    batch, expected = one[order], every[order + before]
    for key in set(batch) - {"series", "static_covariates"}:
        torch.testing.assert_close(batch[key], expected[key], rtol=0, atol=0)
    for index in (-1, len(one)):
        with pytest.raises(IndexError, match=f"{index}.*of {len(one)}"):
            one[[0, index]]
        with pytest.raises(IndexError):
            every[[0, index if index < 0 else len(every)]]


def test_shapes_and_dtypes(table: SeriesTable) -> None:
    batch = dataset(table)[[0, 5, 31]]
    shapes = {
        "past_target": (3, L, 2), "past_observed": (3, L, 2), "past_time": (3, L, 4), "future_time": (3, H, 4),
        "past_covariates": (3, L, 1), "future_covariates": (3, L + H, 1), "static_covariates": (3, 1),
        "future_target": (3, H, 2), "future_observed": (3, H, 2), "series": (3,), "origin": (3,),
    }  # fmt: skip
    assert {key: tuple(value.shape) for key, value in batch.items()} == shapes
    kinds = {"past_observed": torch.bool, "future_observed": torch.bool, "series": torch.int64, "origin": torch.int64}
    assert {key: value.dtype for key, value in batch.items()} == {k: kinds.get(k, torch.float32) for k in shapes}


@pytest.mark.parametrize("future", [True, False])
def test_the_calendar_can_be_left_out(table: SeriesTable, future: bool) -> None:
    ranges = whole(table) if future else np.stack([np.zeros_like(table.lengths) + 1, table.lengths - H], axis=1)
    ranges[:, 0] = np.minimum(ranges[:, 0], ranges[:, 1])
    full, without = (dataset(table, ranges=ranges, future=future, calendar=c)[0] for c in (True, False))
    assert without.keys() == full.keys()
    for key, value in full.items():
        if key in ("past_time", "future_time"):
            assert value.shape[2] > 0 and without[key].shape == (*value.shape[:2], 0)
        else:
            torch.testing.assert_close(without[key], value, rtol=0, atol=0)


def test_ranges_and_stride(table: SeriesTable) -> None:
    ranges = np.array([[5, 30], [0, 0], [0, 9], [4, 14]])
    windows = dataset(table, ranges=ranges, stride=4)
    origins = [(int(b["series"]), int(b["origin"])) for b in (windows[i] for i in range(len(windows)))]
    assert origins == [(0, 12), (0, 16), (0, 20), (0, 24), (3, 11)]


def test_time_features_are_the_same_when_they_do_not_fit_in_memory(table: SeriesTable) -> None:
    expected = dataset(table)[np.arange(48)]
    with mock.patch.object(tables, "_MAX_FEATURES", 0):
        fresh = SeriesTable.open(table.folder)
        assert fresh.time_features is None
        got = dataset(fresh)[np.arange(48)]
    for key in ("past_time", "future_time"):
        torch.testing.assert_close(got[key], expected[key], rtol=0, atol=0)


def test_prediction_windows_end_with_the_history_and_know_the_covariates_ahead(
    frame: pd.DataFrame, tmp_path: Path
) -> None:
    frame = frame.copy()
    for name, rows in LENGTHS.items():
        index = frame.index[frame["unique_id"] == name]
        frame.loc[index[rows - H - (2 if name == "p" else 0) :], ["y", "y2"]] = np.nan
    frame.loc[frame["unique_id"] == "r", "y2"] = -1.0  # r has no future rows: no forecast for it
    frame.to_csv(tmp_path / "t.csv", index=False)
    table = load_table(
        tmp_path / "t.csv", targets=["y", "y2"], future_covariates=["known"], cache_dir=tmp_path / "cache"
    )
    assert table.history.tolist() == [35, 7, 9, 22]
    ranges = predict_ranges(table, seq_len=L)
    ranges[2] = 0
    windows = dataset(table, ranges=ranges, future=False)
    batch = windows[np.arange(3)]
    assert "future_target" not in batch and "future_observed" not in batch
    assert batch["series"].tolist() == [0, 1, 3] and batch["origin"].tolist() == [35, 7, 22]
    for i, (series, origin) in enumerate(zip([0, 1, 3], [35, 7, 22], strict=True)):
        rows = slice(table.offsets[series] + origin, table.offsets[series] + origin + H)
        np.testing.assert_array_equal(batch["future_time"][i], calendar_features(table.times[rows], "h"))
        known = windows.scaler.inverse(batch["future_covariates"][i : i + 1], [series], ("known",))[0, :, 0]
        np.testing.assert_allclose(known, np.arange(origin - L, origin + H) * 3 + 1, atol=1e-3)


def test_bad_arguments(table: SeriesTable) -> None:
    scaler = StandardScaler.fit(table, whole(table))
    for options in ({"seq_len": 0}, {"pred_len": 0}, {"stride": 0}, {"ranges": np.zeros((1, 2))}):
        with pytest.raises(ValueError, match=next(iter(options))):
            WindowDataset(table, **{"seq_len": 3, "pred_len": 2, "ranges": whole(table), "scaler": scaler, **options})


# ------------------------------------------------------------------------------------------------ which batch


@pytest.mark.parametrize("batch_size", [1, 7, 64])
@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_gives_every_window_once(table: SeriesTable, batch_size: int, workers: int) -> None:
    windows = dataset(table)
    loader = DataLoader(
        windows,
        sampler=IndexSampler(len(windows), batch_size),
        batch_size=None,
        collate_fn=identity,
        num_workers=workers,
    )
    batches = list(loader)
    assert len(batches) == len(loader) == -(-48 // batch_size)
    every = windows[np.arange(48)]
    for key, value in every.items():
        torch.testing.assert_close(torch.cat([batch[key] for batch in batches]), value, rtol=0, atol=0)


def test_torch_samplers_work_too(table: SeriesTable) -> None:
    windows = dataset(table)
    seen = []
    for options in (
        {"batch_size": 5, "shuffle": True},
        {"batch_sampler": BatchSampler(RandomSampler(range(48)), 5, drop_last=False)},
        {"batch_sampler": IndexSampler(48, 5, shuffle=True)},
    ):
        batches = list(DataLoader(windows, collate_fn=identity, **options))
        seen.append(torch.cat([1000 * batch["series"] + batch["origin"] for batch in batches]).sort().values)
        assert len(batches[0]["series"]) == 5
    assert torch.equal(seen[0], seen[1]) and torch.equal(seen[0], seen[2]) and len(seen[0].unique()) == 48


def test_shuffling_is_a_permutation_that_depends_on_seed_and_epoch() -> None:
    def epoch(number: int, seed: int = 3, **options: int) -> np.ndarray:
        sampler = IndexSampler(50, 8, shuffle=True, seed=seed, **options)
        sampler.set_epoch(number)
        batches = list(sampler)
        assert len(batches) == len(sampler) and all(batch.dtype == np.int64 for batch in batches)
        return np.concatenate(batches)

    assert sorted(epoch(0)) == sorted(epoch(1)) == list(range(50))
    assert np.array_equal(epoch(1), epoch(1)) and not np.array_equal(epoch(0), epoch(1))
    assert not np.array_equal(epoch(0), epoch(0, seed=4)) and not np.array_equal(epoch(0), np.arange(50))
    # With `steps` the same stream is cut elsewhere: seven batches make a permutation.
    stream = np.concatenate([epoch(i, steps=3) for i in range(7)])
    np.testing.assert_array_equal(stream, np.concatenate([epoch(i) for i in range(3)]))


@pytest.mark.parametrize("size", [50, 48, 3])
def test_several_processes_share_the_windows(size: int) -> None:
    def of(rank: int, shuffle: bool) -> list[np.ndarray]:
        with mock.patch.object(loading, "_process", return_value=(rank, 3)):
            sampler = IndexSampler(size, 8, shuffle=shuffle)
            batches = list(sampler)
            assert len(batches) == len(sampler)
        return batches

    evaluated = np.concatenate([np.concatenate(of(rank, False) or [np.zeros(0, int)]) for rank in range(3)])
    assert sorted(evaluated.tolist()) == list(range(size))
    trained = [of(rank, True) for rank in range(3)]
    assert len({len(batches) for batches in trained}) == 1  # or the gradients' exchange would wait for ever
    seen = np.concatenate([np.concatenate(batches) for batches in trained])
    assert set(seen.tolist()) == set(range(size))


def test_the_loader_continues_where_it_was_saved(table: SeriesTable) -> None:
    windows = dataset(table)

    def loader(**options: int) -> ResumableLoader:
        sampler = IndexSampler(len(windows), 5, shuffle=True, seed=1)
        return ResumableLoader(windows, sampler=sampler, batch_size=None, collate_fn=identity, **options)

    full = loader()
    full.sampler.set_epoch(2)
    expected = [batch["origin"] for batch in full]
    for workers in (0, 2):
        first = loader(num_workers=workers)
        first.sampler.set_epoch(2)
        begun = iter(first)
        for _ in range(4):
            next(begun)
        state = first.state_dict()
        assert state == {"epoch": 2, "taken": 4}
        second = loader(num_workers=workers)
        second.load_state_dict(state)
        second.sampler.set_epoch(2)  # as the trainer does
        rest = [batch["origin"] for batch in second]
        assert len(rest) == 6 and all(torch.equal(a, b) for a, b in zip(rest, expected[4:], strict=True))
        assert len(list(second)) == 10  # the position is used once
    with torch.random.fork_rng():
        drawn = []
        for workers in (0, 2):
            torch.manual_seed(3)
            list(loader(num_workers=workers))
            drawn.append(torch.rand(()).item())
    assert drawn[0] == drawn[1]  # what dropout draws does not depend on how batches are made
    second.load_state_dict({"epoch": 2, "taken": 10})
    assert len(list(second)) == 10
