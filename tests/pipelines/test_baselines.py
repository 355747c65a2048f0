"""The naive forecasts against loops over single series, with missing values."""

import math

import numpy as np
import pytest
import torch

from seqzoo.pipelines.forecasting.baselines import (
    BASELINES,
    create_baselines,
    drift,
    mean,
    naive,
    seasonal_naive,
)


def one_channel(values):
    """(1, L, 1) and its mask; None is missing, with a number under it that must not be used."""
    known = torch.tensor([[[v is not None] for v in values]])
    return torch.tensor([[[1e6 if v is None else float(v)] for v in values]]), known


def forecast(function, values, *args):
    return function(*one_channel(values), *args)[0, :, 0].tolist()


def test_naive_repeats_the_last_observed_value():
    assert forecast(naive, [1, 2, 3], 2) == [3, 3]
    assert forecast(naive, [1, 2, None, None], 2) == [2, 2]
    assert forecast(naive, [5, None, None], 1) == [5]


def test_mean_is_over_observed_values():
    assert forecast(mean, [1, None, 5], 2) == [3, 3]


def test_drift_continues_the_line_through_the_ends():
    assert forecast(drift, [1, 9, 0, 4], 3) == [5, 6, 7]
    # observed at times 1 and 3 of 0 ... 5: slope 2; forecasts are for times 6 and 7
    assert forecast(drift, [None, 2, None, 6, None, None], 2) == [12, 14]
    assert forecast(drift, [None, 7, None], 2) == [7, 7]


def test_seasonal_naive_takes_the_same_phase():
    assert forecast(seasonal_naive, [1, 2, 3, 4, 5, 6], 4, 3) == [4, 5, 6, 4]
    # a window that is no multiple of the season
    assert forecast(seasonal_naive, [9, 1, 2, 3, 4, 5, 6], 4, 3) == [4, 5, 6, 4]
    # one season further back where the last is missing
    assert forecast(seasonal_naive, [1, 2, 3, 4, None, 6], 3, 3) == [4, 2, 6]
    # a phase that was never observed, and a window shorter than the season: the last value
    assert forecast(seasonal_naive, [1, None, 3, 4, None, 6], 3, 3) == [4, 6, 6]
    assert forecast(seasonal_naive, [1, 2, 3], 6, 5) == [3, 3, 1, 2, 3, 3]


def test_nothing_observed_gives_zero_everywhere_and_never_nan():
    past, known = torch.full((2, 4, 1), math.nan), torch.zeros(2, 4, 1, dtype=torch.bool)
    for name, function in create_baselines(2).items():
        assert torch.equal(function(past, known, 3), torch.zeros(2, 3, 1)), name
    past[1, 2, 0], known[1, 2, 0] = 5.0, True
    for name, function in create_baselines(2).items():
        result = function(past, known, 3)
        assert torch.equal(result[0], torch.zeros(3, 1)) and torch.equal(result[1], torch.full((3, 1), 5.0)), name


@pytest.mark.parametrize("season", [1, 4, 24])
@pytest.mark.parametrize("length", [1, 7, 24, 30])
def test_batches_equal_a_loop_over_series(season, length):
    rng = np.random.default_rng(length)
    past = rng.normal(size=(3, length, 2))
    known = rng.random(past.shape) < 0.5
    steps = 9
    results = {n: f(torch.tensor(past), torch.tensor(known), steps) for n, f in create_baselines(season).items()}
    for b in range(3):
        for c in range(2):
            seen = [(t, past[b, t, c]) for t in range(length) if known[b, t, c]]
            for h in range(steps):
                now = length + h
                expected = {"naive": 0.0, "drift": 0.0, "mean": 0.0, f"seasonal-naive-{season}": 0.0}
                if seen:
                    (t0, first), (t1, last) = seen[0], seen[-1]
                    expected["naive"] = last
                    expected["mean"] = sum(v for _, v in seen) / len(seen)
                    expected["drift"] = last + ((last - first) / (t1 - t0) if t1 > t0 else 0.0) * (now - t1)
                    same = [v for t, v in seen if (now - t) % season == 0]
                    expected[f"seasonal-naive-{season}"] = same[-1] if same else last
                for name, result in results.items():
                    assert float(result[b, h, c]) == pytest.approx(expected[name], abs=1e-12), name


def test_names():
    assert list(BASELINES) == ["naive", "seasonal_naive", "drift", "mean"]
    assert list(create_baselines(24)) == ["naive", "seasonal-naive-24", "drift", "mean"]
    assert list(create_baselines(1)) == ["naive", "drift", "mean"]


def test_wrong_arguments_are_named():
    past, known = one_channel([1, 2])
    with pytest.raises(ValueError, match="pred_len=0"):
        naive(past, known, 0)
    with pytest.raises(ValueError, match="season=0"):
        seasonal_naive(past, known, 1, 0)
    with pytest.raises(ValueError, match="observed bool"):
        mean(past, known.float(), 1)
