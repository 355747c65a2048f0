"""Metrics against hand-computed cases, plain loops and scipy, and their independence of the batch size."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from seqzoo.pipelines.forecasting.metrics import MetricSums, evaluate, find_level, interval_levels, is_better
from seqzoo.pipelines.forecasting.scores import (
    DECILES,
    crps_quantiles,
    crps_samples,
    crps_student_t,
    pinball,
    seasonal_scale,
    symmetric_percentage_error,
    zero_threshold,
)

LEVELS = (0.05, *DECILES, 0.95)
WINDOWS, STEPS, CHANNELS, SERIES = 70, 5, 3, 4


@pytest.fixture(scope="module")
def case():
    """Windows with missing targets (NaN there), zero targets and sorted quantiles, float32 as models give."""
    rng = np.random.default_rng(3)
    target = rng.normal(2, 3, (WINDOWS, STEPS, CHANNELS)).astype(np.float32)
    target[rng.random(target.shape) < 0.1] = 0
    observed = rng.random(target.shape) < 0.8
    observed[:, 2, 1] = False  # a cell of (step, channel) that is never observed
    target[~observed] = np.nan
    quantiles = np.sort(rng.normal(2, 4, (WINDOWS, STEPS, CHANNELS, len(LEVELS))), axis=-1).astype(np.float32)
    return {
        "target": target,
        "observed": observed,
        "quantiles": quantiles,
        "point": quantiles[..., 5],
        "series": rng.integers(0, SERIES, WINDOWS),
        "scale": np.array([[1.0, 2.0, 0.5], [0.0, 1.5, np.nan], [3.0, 0.1, 1.0], [1.0, 1.0, 1.0]]),
    }


def sums_of(case, batch_size=WINDOWS, rows=slice(None), **options):
    sums = MetricSums(
        STEPS,
        ["a", "b", "c"],
        levels=LEVELS,
        season_scale=torch.tensor(case["scale"]),
        num_series=SERIES,
        **options,
    )
    index = np.arange(WINDOWS)[rows]
    for start in range(0, len(index), batch_size):
        i = index[start : start + batch_size]
        sums.update(
            torch.tensor(case["point"][i]),
            torch.tensor(case["target"][i]),
            torch.tensor(case["observed"][i]),
            quantiles=torch.tensor(case["quantiles"][i]),
            series=torch.tensor(case["series"][i]),
        )
    return sums


def by_loops(case, keep):
    """The definitions, one observed cell after another; keep(window, step, channel) selects the group."""
    errors, percents, symmetric, scaled, width, inside = [], [], [], [], {80: [], 90: []}, {80: [], 90: []}
    loss, size, crps = dict.fromkeys(DECILES, 0.0), 0.0, []
    for w in range(WINDOWS):
        for h in range(STEPS):
            for c in range(CHANNELS):
                if not case["observed"][w, h, c] or not keep(w, h, c):
                    continue
                y, f = float(case["target"][w, h, c]), float(case["point"][w, h, c])
                errors.append(y - f)
                if y != 0:
                    percents.append(abs((y - f) / y))
                symmetric.append(abs(y - f) / ((abs(y) + abs(f)) / 2))
                s = case["scale"][case["series"][w], c]
                if s > 0:
                    scaled.append(abs(y - f) / s)
                q = {level: float(v) for level, v in zip(LEVELS, case["quantiles"][w, h, c], strict=True)}
                losses = {p: (p * (y - q[p]) if y >= q[p] else (1 - p) * (q[p] - y)) for p in DECILES}
                for p in DECILES:
                    loss[p] += losses[p]
                crps.append(2 * sum(losses.values()) / 9)
                size += abs(y)
                for percent, (low, high) in {80: (0.1, 0.9), 90: (0.05, 0.95)}.items():
                    inside[percent].append(q[low] <= y <= q[high])
                    width[percent].append(q[high] - q[low])
    if not errors:
        return None
    e = np.array(errors)
    return {
        "mse": (e**2).mean(),
        "mae": np.abs(e).mean(),
        "rmse": math.sqrt((e**2).mean()),
        "mape": np.mean(percents),
        "mape_skipped": len(e) - len(percents),
        "smape": np.mean(symmetric),
        "mase": np.mean(scaled) if scaled else math.nan,
        "mase_skipped": len(e) - len(scaled),
        "wql": np.mean([2 * loss[p] / size for p in DECILES]),
        "crps": np.mean(crps),
        "coverage-80": np.mean(inside[80]),
        "coverage-90": np.mean(inside[90]),
        "width-80": np.mean(width[80]),
        "width-90": np.mean(width[90]),
        "count": len(e),
    }


def test_all_metrics_equal_the_definitions_in_every_group(case):
    result = sums_of(case, batch_size=16).compute()
    assert result["channels"] == ["a", "b", "c"]
    expected = by_loops(case, lambda w, h, c: True)
    assert set(result["overall"]) == set(expected)
    for name, value in expected.items():
        assert result["overall"][name] == pytest.approx(value, rel=1e-12), name
        for h in range(STEPS):
            assert result["horizon"][name][h] == pytest.approx(
                by_loops(case, lambda w, k, c, h=h: k == h)[name], rel=1e-12
            ), (name, h)
        for c in range(CHANNELS):
            assert result["channel"][name][c] == pytest.approx(
                by_loops(case, lambda w, h, k, c=c: k == c)[name], rel=1e-12
            ), (name, c)
    for n in range(SERIES):
        group = by_loops(case, lambda w, h, c, n=n: case["series"][w] == n)
        for name in ("mse", "mae", "rmse", "mase", "count", "mase_skipped"):
            assert result["series"][name][n] == pytest.approx(group[name], rel=1e-12), (name, n)


def flat_numbers(result):
    return np.array(
        [
            number
            for group in ("overall", "horizon", "channel", "series")
            for value in result[group].values()
            for number in np.atleast_1d(value)
        ]
    )


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_batch_size_does_not_matter(case, batch_size):
    whole = flat_numbers(sums_of(case).compute())
    np.testing.assert_allclose(flat_numbers(sums_of(case, batch_size).compute()), whole, rtol=1e-13)


def test_merging_parts_and_reducing_over_processes_give_the_whole(case):
    whole = flat_numbers(sums_of(case).compute())
    first, second = sums_of(case, rows=slice(0, 31)), sums_of(case, rows=slice(31, None))
    flats = first.flat() + second.flat()
    first.reduce(lambda t: t + second.flat())
    np.testing.assert_array_equal(first.flat(), flats)
    np.testing.assert_allclose(flat_numbers(first.compute()), whole, rtol=1e-13)
    first = sums_of(case, rows=slice(0, 31))
    first.merge(second)
    np.testing.assert_allclose(flat_numbers(first.compute()), whole, rtol=1e-13)
    # a process that got no window at all
    first.merge(sums_of(case, rows=slice(0, 0)))
    np.testing.assert_allclose(flat_numbers(first.compute()), whole, rtol=1e-13)
    with pytest.raises(ValueError, match="same arguments"):
        first.merge(MetricSums(STEPS, CHANNELS))


def test_hand_computed_case():
    point = torch.tensor([[[1.0], [2.0], [4.0]]])
    target = torch.tensor([[[2.0], [2.0], [0.0]]])
    result = evaluate(point, target, season_scale=torch.tensor([0.5]))
    assert result["mse"] == pytest.approx(17 / 3)
    assert result["mae"] == pytest.approx(5 / 3)
    assert result["rmse"] == pytest.approx(math.sqrt(17 / 3))
    assert result["mape"] == pytest.approx((0.5 + 0) / 2) and result["mape_skipped"] == 1
    assert result["smape"] == pytest.approx((2 / 3 + 0 + 2) / 3)
    assert result["mase"] == pytest.approx(10 / 3)
    assert result["count"] == 3 and isinstance(result["count"], int)
    assert "crps" not in result and "coverage-80" not in result


def test_hand_computed_quantile_case():
    # y = 3; quantiles 1, 2, 5 at 0.1, 0.5, 0.9: pinball 0.2, 0.5, 0.2
    result = evaluate(
        torch.full((1, 1, 1), 2.0),
        torch.full((1, 1, 1), 3.0),
        quantiles=torch.tensor([1.0, 2.0, 5.0]).view(1, 1, 1, 3),
        levels=(0.1, 0.5, 0.9),
    )
    assert result["crps"] == pytest.approx(2 * 0.9 / 3)
    assert result["wql"] == pytest.approx(2 * 0.9 / 3 / 3)
    assert result["coverage-80"] == 1.0 and result["width-80"] == 4.0
    assert "coverage-90" not in result


def test_missing_targets_do_not_count_whatever_stands_there():
    point = torch.zeros(1, 2, 1)
    for filler in (math.nan, math.inf, 1e30):
        result = evaluate(point, torch.tensor([[[3.0], [filler]]]), torch.tensor([[[True], [False]]]))
        assert result["mae"] == 3.0 and result["count"] == 1
    assert evaluate(point, torch.tensor([[[3.0], [math.nan]]]))["count"] == 1  # observed = finite
    nothing = evaluate(point, torch.zeros(1, 2, 1), torch.zeros(1, 2, 1, dtype=torch.bool))
    assert nothing["count"] == 0 and math.isnan(nothing["mae"])


def test_forecast_that_is_not_a_number_is_seen():
    result = evaluate(torch.tensor([[[math.nan], [1.0]]]), torch.ones(1, 2, 1))
    assert math.isnan(result["mse"]) and math.isnan(result["mape"]) and math.isnan(result["smape"])


def test_zero_after_scaling_round_trip_is_skipped_by_mape():
    mean, std = np.float32(170.3), np.float32(250.7)
    truth = np.array([0.0, 500.0], dtype=np.float32)
    back = torch.from_numpy((truth - mean) / std * std + mean).view(1, 2, 1)
    back[0, 0, 0] += 1e-5
    point = torch.tensor([10.0, 400.0]).view(1, 2, 1)
    naive = MetricSums(2, 1)
    naive.update(point, back)
    assert naive.compute()["overall"]["mape"] > 1e3
    sums = MetricSums(2, 1, zero=zero_threshold(np.array([mean]), np.array([std])))
    sums.update(point, back)
    result = sums.compute()["overall"]
    assert result["mape"] == pytest.approx(0.2, rel=1e-4) and result["mape_skipped"] == 1


def test_symmetric_percentage_error_of_two_zeros_is_zero_and_of_one_zero_two():
    errors = symmetric_percentage_error(torch.tensor([0.0, 1.0, -3.0]), torch.tensor([0.0, 0.0, 3.0]))
    assert errors.tolist() == [0.0, 2.0, 2.0]


def test_pinball_is_minimised_by_the_quantile():
    sample = torch.linspace(0, 1, 1001, dtype=torch.float64)
    for level in (0.1, 0.5, 0.9):
        losses = [pinball(torch.tensor(q), sample, level).mean() for q in np.linspace(0, 1, 201)]
        assert np.argmin(losses) / 200 == pytest.approx(level, abs=0.006)
    with pytest.raises(ValueError, match=r"level=1\.5"):
        pinball(sample, sample, 1.5)


@pytest.mark.parametrize("df", [1.5, 2.0, 2.7, 5.0, 30.0, 1000.0, 1e5])
@pytest.mark.parametrize("z", [-40.0, -3.0, -0.2, 0.0, 1e-6, 0.7, 2.0, 12.0])
def test_student_t_crps_equals_numerical_integration(df, z):
    loc, scale = 1.3, 2.5
    y = loc + scale * z

    def integrand(x):
        return (stats.t.cdf(x, df) - (x >= z)) ** 2

    # the tails are integrated in log coordinates: at df = 1.5 they reach very far
    inner = integrate.quad(integrand, -60, 60, points=[0.0, z], limit=400, epsabs=1e-12, epsrel=1e-12)[0]
    tail = integrate.quad(lambda u: stats.t.sf(math.exp(u), df) ** 2 * math.exp(u), math.log(60), 60, limit=400)[0]
    expected = scale * (inner + 2 * tail)
    got = crps_student_t(torch.tensor(df), torch.tensor(loc), torch.tensor(scale), torch.tensor(y, dtype=torch.float64))
    assert got.dtype == torch.float64
    assert float(got) == pytest.approx(expected, rel=2e-7, abs=1e-9)


def test_student_t_crps_approaches_the_normal_and_refuses_df_1():
    z = torch.linspace(-4, 4, 17, dtype=torch.float64)
    x = z.numpy()
    normal = x * (2 * stats.norm.cdf(x) - 1) + 2 * stats.norm.pdf(x) - 1 / math.sqrt(math.pi)
    one = torch.ones((), dtype=torch.float64)
    np.testing.assert_allclose(crps_student_t(1e8 * one, 0 * one, one, z), normal, atol=2e-6)
    with pytest.raises(ValueError, match="df > 1"):
        crps_student_t(one, 0 * one, one, z)


def test_sample_crps_equals_the_double_sum_and_approaches_the_exact_one():
    generator = torch.Generator().manual_seed(0)
    samples = torch.randn(4, 3, 50, generator=generator, dtype=torch.float64)
    target = torch.randn(4, 3, generator=generator, dtype=torch.float64)
    first = (samples - target[..., None]).abs().mean(-1)
    second = (samples[..., :, None] - samples[..., None, :]).abs().mean((-2, -1)) / 2
    torch.testing.assert_close(crps_samples(samples, target), first - second, rtol=1e-12, atol=1e-12)
    quantiles = torch.tensor(stats.t.ppf(np.linspace(0, 1, 20002)[1:-1], 5.0))
    exact = crps_student_t(torch.tensor(5.0), torch.tensor(0.0), torch.tensor(1.0), torch.tensor(0.8))
    assert float(crps_samples(quantiles, torch.tensor(0.8))) == pytest.approx(float(exact), rel=1e-3)
    levels = np.linspace(0, 1, 1001)[1:-1]
    approximate = crps_quantiles(torch.tensor(stats.t.ppf(levels, 5.0)), torch.tensor(0.8), tuple(levels))
    assert float(approximate) == pytest.approx(float(exact), rel=3e-3)


def test_exact_crps_replaces_the_quantile_approximation():
    sums = MetricSums(1, 1, levels=(0.5,), exact_crps=True)
    sums.update(
        torch.zeros(1, 1, 1),
        torch.ones(1, 1, 1),
        quantiles=torch.zeros(1, 1, 1, 1),
        crps=torch.full((1, 1, 1), 0.25),
    )
    assert sums.compute()["overall"]["crps"] == 0.25
    with pytest.raises(ValueError, match="crps was not given"):
        sums.update(torch.zeros(1, 1, 1), torch.ones(1, 1, 1), quantiles=torch.zeros(1, 1, 1, 1))


def test_score_levels_leave_the_interval_levels_out_unless_asked():
    assert MetricSums(1, 1, levels=LEVELS).score_levels == DECILES
    assert MetricSums(1, 1, levels=(0.05, 0.5, 0.95)).score_levels == (0.05, 0.5, 0.95)
    assert MetricSums(1, 1, levels=LEVELS, score_levels=(0.5,)).score_levels == (0.5,)
    with pytest.raises(ValueError, match=r"0\.25"):
        MetricSums(1, 1, levels=LEVELS, score_levels=(0.25,))


def test_levels_are_found_in_spite_of_rounding():
    assert interval_levels(80) == (0.1, 0.9)
    assert find_level((0.1, 0.1 + 0.2), 0.3) == 1
    assert find_level((0.1,), 0.3) is None


def test_wrong_shapes_are_named():
    sums = MetricSums(2, 1, levels=(0.5,), num_series=2)
    with pytest.raises(ValueError, match=r"expected \(B, 2, 1\)"):
        sums.update(torch.zeros(1, 3, 1), torch.zeros(1, 3, 1))
    with pytest.raises(ValueError, match="quantiles has shape None"):
        sums.update(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1))
    with pytest.raises(ValueError, match="series is needed"):
        sums.update(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), quantiles=torch.zeros(1, 2, 1, 1))
    with pytest.raises(ValueError, match="without levels"):
        MetricSums(2, 1).update(torch.zeros(1, 2, 1), torch.zeros(1, 2, 1), quantiles=torch.zeros(1, 2, 1, 1))
    with pytest.raises(ValueError, match="season_scale"):
        MetricSums(2, 3, season_scale=torch.ones(2))


def test_seasonal_scale_by_hand_with_gaps_and_in_pieces():
    values = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    assert seasonal_scale(values, 2) == pytest.approx((3 + 6 + 12) / 3)
    assert seasonal_scale(np.array([1.0, np.nan, 4.0, 8.0, 16.0]), 2) == pytest.approx((3 + 12) / 2)
    observed = np.array([True, True, True, False, True])
    assert seasonal_scale(values, 2, observed) == pytest.approx((3 + 12) / 2)
    assert math.isnan(seasonal_scale(values, 5)) and math.isnan(seasonal_scale(values[:0], 1))
    assert seasonal_scale(np.ones(9), 3) == 0.0
    long = np.arange((1 << 20) + 1000, dtype=np.float32) * 0.5  # more than one piece
    assert seasonal_scale(long, 24) == pytest.approx(12.0, rel=1e-12)
    with pytest.raises(ValueError, match="season=0"):
        seasonal_scale(values, 0)


def test_is_better_knows_errors_and_coverage():
    assert is_better("mae", 1.0, 2.0) and not is_better("mae", 2.0, 1.0)
    assert is_better("coverage-80", 0.78, 0.95) and not is_better("coverage-80", 0.95, 0.78)
    assert not is_better("mae", math.nan, 1.0) and is_better("mae", 1.0, math.nan)
