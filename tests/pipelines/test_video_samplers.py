"""Samplers against slow ones written from the papers' steps, by brute force, and the properties they promise."""

from __future__ import annotations

import bisect
import inspect
import itertools
import math
import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.video.samplers import (
    SAMPLERS,
    create_sampler,
    list_samplers,
    sample_dpp,
    sample_fps,
    sample_tass,
    sample_top_k,
    sample_uniform,
    sampler_options,
)
from seqzoo.pipelines.video.samplers.dpp import greedy_map, relevance_of
from seqzoo.pipelines.video.samplers.tass import select_tass

# few different values, so that there are ties of scores and of times
SCORES = st.lists(st.integers(0, 12).map(lambda v: v / 8), min_size=1, max_size=60)
STEPS = st.lists(st.sampled_from([0.0, 0.5, 0.5, 1.0, 7.0]), min_size=60, max_size=60)
FAST = settings(max_examples=60, deadline=None)


def inputs(number: int, seed: int = 0, dim: int = 6) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return np.arange(number) / 2, rng.random(number), rng.standard_normal((number, dim))


def sampled(name: str, times: Any, scores: Any, features: Any, budget: int, **options: Any) -> list[int]:
    return create_sampler(name, **options)(times, scores, features, budget).indices.tolist()


# all of them ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_samplers())
@given(scores=SCORES, steps=STEPS, budget=st.integers(1, 70))
@FAST
def test_frames_are_distinct_in_order_within_the_budget(
    name: str, scores: list[float], steps: list[float], budget: int
) -> None:
    times = np.cumsum(steps)[: len(scores)]
    features = np.random.default_rng(len(scores)).standard_normal((len(scores), 5))
    kept = times.copy(), np.array(scores), features.copy()
    given_ = times, np.array(scores), features
    found = create_sampler(name)(*given_, budget)
    assert found.indices.dtype == found.order.dtype == np.int64
    assert (np.diff(found.indices) > 0).all() and 1 <= len(found.indices) <= min(budget, len(scores))
    assert found.indices[0] >= 0 and found.indices[-1] < len(scores)
    assert np.array_equal(np.sort(found.order), found.indices)
    assert (np.diff(times[found.indices]) >= 0).all()
    for before, after in zip(kept, given_, strict=True):
        assert np.array_equal(before, after)  # nothing is changed in place
    again = create_sampler(name)(*given_, budget)
    assert np.array_equal(again.order, found.order)
    if name in ("uniform", "time_search"):
        assert len(found.indices) == min(budget, len(scores))


@pytest.mark.parametrize("name", list_samplers())
def test_scores_may_be_computed_when_asked_for(name: str) -> None:
    times, scores, features = inputs(200)
    asked: list[int] = []

    def lazily(indices: np.ndarray) -> np.ndarray:
        asked.extend(indices.tolist())
        return scores[indices]

    found = create_sampler(name)(times, lazily, features, 8)
    assert np.array_equal(found.order, create_sampler(name)(times, scores, features, 8).order)
    assert len(asked) == len(set(asked)) == found.scored  # none twice, and the count is right
    assert found.scored == {"uniform": 0, "fps": 0, "time_search": 50}.get(name, 200)
    assert (found.trace is not None) == (name == "time_search")


@pytest.mark.parametrize("name", list_samplers())
def test_one_frame_and_equal_times_and_scores(name: str) -> None:
    for number in (1, 2, 5):
        times, features = np.full(number, 3.0), np.ones((number, 4))
        found = create_sampler(name)(times, np.full(number, 0.1), features, 3)
        assert 1 <= len(found.indices) <= min(number, 3)


@pytest.mark.parametrize("name", list_samplers())
def test_samplers_have_one_signature_and_can_be_pickled(name: str) -> None:
    parameters = list(inspect.signature(SAMPLERS[name]).parameters.values())
    assert [p.name for p in parameters[:5]] == ["times", "scores", "features", "budget", "seed"]
    assert all(p.kind is p.KEYWORD_ONLY for p in parameters[4:])
    assert set(sampler_options(name)) == {p.name for p in parameters[5:]}
    times, scores, features = inputs(50)
    sampler = create_sampler(name, **sampler_options(name))
    copy = pickle.loads(pickle.dumps(sampler))
    assert np.array_equal(copy(times, scores, features, 7).order, sampler(times, scores, features, 7).order)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("tas", {}, r"unknown sampler 'tas'. Did you mean tass"),
        ("tass", {"gaps": 3.0}, r"the sampler 'tass' has no option 'gaps'. Did you mean gap"),
        ("top_k", {"k": 3}, r"the sampler 'top_k' has no option 'k'. It has none"),
        ("tass", {"gap": 0}, r"gap=0 must be a number above 0"),
        ("tass", {"decay": 1.0}, r"decay=1.0 must be a number above 0 and below 1"),
        ("tass", {"cap": 0.5}, r"cap=0.5 must be at least 1"),
        ("tass", {"threshold": "median"}, r"unknown threshold='median'. Did you mean mean"),
        ("fps", {"fps": -1}, r"fps=-1 must be a number above 0"),
        ("dpp", {"theta": 1.0}, r"theta=1.0 must be"),
        ("dpp", {"floor": -0.5}, r"floor=-0.5 must be"),
        ("time_search", {"max_scored": 0}, r"max_scored=0 must be a whole number of at least 1"),
        ("time_search", {"max_scored": 1.5}, r"max_scored=1.5 must be a whole number of frames or a share"),
        ("time_search", {"coarse": 2.0}, r"coarse=2.0 must be"),
        ("time_search", {"tau": 2.0}, r"tau=2.0 must be a number from 0 to 1"),
        ("time_search", {"min_seconds": 0.0}, r"min_seconds=0.0 must be a number above 0"),
        ("time_search", {"sure": math.nan}, r"sure=nan must be a number above 0"),
    ],
)
def test_wrong_names_and_options_are_found_at_once(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        create_sampler(name, **options)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"times": np.empty(0)}, r"times have the shape \(0,\); the times of at least one frame"),
        ({"times": np.array([0.0, 2.0, 1.0])}, r"times must be finite and in order"),
        ({"times": np.array([0.0, math.nan, 1.0])}, r"times must be finite and in order"),
        ({"scores": np.ones(4)}, r"scores have the shape \(4,\); \(3,\) is expected"),
        ({"scores": np.array([1.0, math.nan, 2.0])}, r"scores are not finite: nan"),
        ({"scores": lambda i: np.ones(7)}, r"scores have the shape \(7,\); \(3,\) is expected"),
        ({"features": np.ones((2, 4))}, r"features have the shape \(2, 4\); \(3, D\) is expected"),
        ({"features": np.full((3, 4), math.inf)}, r"features are not finite"),
        ({"features": None}, r"the sampler 'dpp' needs the features"),
        ({"budget": 0}, r"budget=0 must be a whole number of frames, at least 1"),
        ({"budget": 2.0}, r"budget=2.0 must be a whole number"),
        ({"budget": True}, r"budget=True must be a whole number"),
    ],
)
def test_wrong_inputs_are_named(change: dict[str, Any], said: str) -> None:
    right: dict[str, Any] = {"times": np.arange(3.0), "scores": np.arange(3.0), "features": np.eye(3), "budget": 2}
    with pytest.raises(UserError, match=said):
        sample_dpp(**{**right, **change})


def test_what_needs_a_query_says_so() -> None:
    times, _, features = inputs(9)
    for name in ("top_k", "tass", "time_search"):
        with pytest.raises(UserError, match=rf"the sampler '{name}' needs scores"):
            create_sampler(name)(times, None, features, 3)
    for name in ("uniform", "fps", "dpp"):
        assert len(create_sampler(name)(times, None, features, 3).indices) == 3


# uniform and fps ------------------------------------------------------------------------------------------------------


def test_uniform_takes_the_middles() -> None:
    assert sampled("uniform", np.arange(8.0), None, None, 4) == [1, 3, 5, 7]
    assert sampled("uniform", np.arange(9.0), None, None, 3) == [1, 4, 7]
    assert sampled("uniform", np.arange(10.0), None, None, 1) == [5]
    assert sampled("uniform", np.arange(3.0), None, None, 8) == [0, 1, 2]
    for number, budget in itertools.product(range(1, 40), range(1, 40)):
        count = min(number, budget)
        found = sampled("uniform", np.arange(float(number)), None, None, budget)
        assert found == [math.floor((i + 0.5) * number / count + 1e-9) for i in range(count)]


def test_jitter_draws_one_frame_in_each_part() -> None:
    times = np.arange(40.0)
    draws = [sample_uniform(times, None, None, 8, seed=seed, jitter=True).indices for seed in range(60)]
    assert all((found // 5).tolist() == list(range(8)) for found in draws)
    assert {int(found[0]) for found in draws} == set(range(5))
    assert np.array_equal(draws[3], sample_uniform(times, None, None, 8, seed=3, jitter=True).indices)


@given(steps=STEPS, fps=st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.0]))
@FAST
def test_fps_takes_the_frame_that_is_shown_at_each_multiple(steps: list[float], fps: float) -> None:
    times = np.cumsum(steps) + 4.0
    wanted = set()
    i = 0
    while times[0] + i / fps <= times[-1] + 1e-9:
        wanted.add(bisect.bisect_right(times.tolist(), times[0] + i / fps + 1e-9) - 1)
        i += 1
    assert sampled("fps", times, None, None, 1000, fps=fps) == sorted(wanted)
    few = sample_fps(times, None, None, 3, fps=fps).indices
    assert set(few.tolist()) <= wanted and len(few) == min(3, len(wanted))


# top-k ----------------------------------------------------------------------------------------------------------------


@given(scores=SCORES, budget=st.integers(1, 70))
@FAST
def test_top_k_by_sorting(scores: list[float], budget: int) -> None:
    order = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:budget]
    assert sample_top_k(np.arange(len(scores)), np.array(scores), None, budget).order.tolist() == order


# TASS -----------------------------------------------------------------------------------------------------------------


def slow_tass(times: list[float], scores: list[float], budget: int, gap: float = 20.0) -> tuple[list[int], float]:
    """The steps of arXiv:2509.09263 one by one; the accepted frames in order, and D of the last pass."""
    mean = math.fsum(scores) / len(scores)
    above = [i for i in range(len(scores)) if scores[i] > mean]
    count = min(len(above), 4 * budget)
    candidates = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]
    if count <= budget:
        return candidates, 0.0
    accepted: list[int] = []
    while True:
        for i in candidates:
            if i not in accepted and all(abs(times[i] - times[j]) >= gap for j in accepted):
                accepted.append(i)
            if len(accepted) == budget:
                return accepted, gap
        gap /= 2


@given(scores=SCORES, steps=STEPS, budget=st.integers(1, 20), gap=st.sampled_from([0.3, 1.0, 8.0, 20.0, 1e4]))
@FAST
def test_tass_against_its_steps(scores: list[float], steps: list[float], budget: int, gap: float) -> None:
    times = np.cumsum(steps)[: len(scores)]
    found = select_tass(times, np.array(scores), budget, gap=gap)
    order, last = slow_tass(times.tolist(), scores, budget, gap)
    assert found.order.tolist() == order
    count = min(sum(s > math.fsum(scores) / len(scores) for s in scores), 4 * budget)
    assert len(found.order) == min(count, budget)
    gaps = np.diff(np.sort(times[found.order]))
    assert (gaps >= found.gap).all()
    assert found.gap == last or (found.gap == 0 and last < 1e-100)  # halved until nothing is left, or told so at once
    sample = sample_tass(times, np.array(scores), None, budget, gap=gap)
    assert (sample.order.tolist() == order) if order else (sample.scored == len(scores))


def test_tass_by_hand() -> None:
    times = np.array([0.0, 1, 2, 30, 31, 50, 90, 91, 95, 99])
    scores = np.array([9.0, 8, 7, 6, 5, 4, 0, 0, 0, 0])
    # mean 3.9: six candidates; 0, 30 and 50 are 20 apart, 31 is not from 30
    assert select_tass(times, scores, 3).order.tolist() == [0, 3, 5]
    assert select_tass(times, scores, 3).gap == 20
    # 20, 10, 5, 2.5: none; 1.25: the frame at 2, the one at 1 is too near to 0; so is 31 to 30
    assert select_tass(times, scores, 4).order.tolist() == [0, 3, 5, 2]
    assert select_tass(times, scores, 4).gap == 1.25
    assert select_tass(times, scores, 5).order.tolist() == [0, 3, 5, 2, 1]
    assert select_tass(times, scores, 6).order.tolist() == [0, 1, 2, 3, 4, 5]  # K <= budget: all, by score
    assert sample_tass(times, scores, None, 9).indices.tolist() == [0, 1, 2, 3, 4, 5]  # and nothing is filled up
    found = sample_tass(times, scores[::-1].copy(), None, 3)
    assert found.order.tolist() == [9, 5, 4] and found.indices.tolist() == [4, 5, 9]
    assert times[found.indices].tolist() == [31, 50, 99]  # indices correspond to times


@given(scores=st.lists(st.integers(0, 10**6), min_size=8, max_size=60, unique=True), steps=STEPS)
@FAST
def test_tass_selections_are_nested_where_the_cap_does_not_bind(scores: list[int], steps: list[float]) -> None:
    times = np.cumsum(steps)[: len(scores)]
    values = np.array(scores, dtype=float)
    above = int((values > values.mean()).sum())
    budgets = [b for b in range(1, above + 3) if 4 * b >= above]
    chosen = [set(sample_tass(times, values, None, b).order.tolist()) for b in budgets]
    assert all(small <= large for small, large in itertools.pairwise(chosen))
    orders = [select_tass(times, values, b).order.tolist() for b in budgets if b < above]
    assert all(large[: len(small)] == small for small, large in itertools.pairwise(orders))


@pytest.mark.parametrize("value", [0.0, 0.1, 0.7, -3.3, 1e-9])
@pytest.mark.parametrize("number", [3, 10, 33])
def test_equal_scores_are_sampled_uniformly(value: float, number: int) -> None:
    times, scores = np.arange(number) / 2, np.full(number, value)
    assert not len(select_tass(times, scores, 4).order)
    assert sampled("tass", times, scores, None, 4) == sampled("uniform", times, None, None, 4)


def test_equal_times_terminate_and_fill_the_budget() -> None:
    scores = np.array([5.0, 4, 3, 0, 0, 0, 0, 0])
    found = select_tass(np.full(8, 2.0), scores, 2)
    assert found.order.tolist() == [0, 1] and found.gap == 0
    times = np.array([0.0, 0, 0, 1, 1, 9, 9, 9])
    found = select_tass(times, np.array([9.0, 8, 7, 6, 5, 0, 0, 0]), 4)
    assert found.order.tolist() == [0, 3, 1, 2] and found.gap == 0


def test_tass_without_a_threshold_and_with_another_cap() -> None:
    times, scores, _ = inputs(100)
    order = np.argsort(-scores, kind="stable")
    found = select_tass(times, scores, 5, threshold="none")
    assert found.candidates.tolist() == order[:20].tolist()
    assert select_tass(times, scores, 5, threshold="none", cap=8).candidates.tolist() == order[:40].tolist()
    assert select_tass(times, scores, 5, threshold="none", cap=1).order.tolist() == order[:5].tolist()
    equal = sample_tass(times, np.ones(100), None, 5, threshold="none")
    assert equal.order.tolist() == [0, 10, 5, 15, 18]  # 20 candidates from 0 to 9.5 s; D = 5, 2.5, 1.25


def test_tass_finds_two_peaks_where_top_k_finds_one() -> None:
    times, scores = np.arange(400) / 2, np.zeros(400)
    scores[100:120], scores[300:304] = 1.0, 0.9
    assert max(sampled("top_k", times, scores, None, 8)) < 120
    assert any(index >= 300 for index in sampled("tass", times, scores, None, 8))


# DPP ------------------------------------------------------------------------------------------------------------------


def unit(features: np.ndarray) -> np.ndarray:
    return features / np.linalg.norm(features, axis=1, keepdims=True)


def slow_greedy(kernel: np.ndarray, budget: int) -> list[int]:
    """Each step the frame that gives the largest log-determinant, all tried."""
    chosen: list[int] = []
    for _ in range(budget):
        gains = {}
        for i in set(range(len(kernel))) - set(chosen):
            own = [*chosen, i]
            sign, value = np.linalg.slogdet(kernel[np.ix_(own, own)])
            gains[i] = value if sign > 0 else -np.inf
        best = max(gains, key=lambda i: gains[i])
        if gains[best] == -np.inf:
            break
        chosen.append(best)
    return chosen


@pytest.mark.parametrize("seed", range(25))
def test_dpp_against_brute_force(seed: int) -> None:
    rng = np.random.default_rng(seed)
    number, budget = int(rng.integers(3, 11)), int(rng.integers(1, 7))
    budget = min(budget, number - 1)
    times, scores, features = np.arange(number), rng.standard_normal(number), rng.standard_normal((number, 8))
    relevance = (scores - scores.min()) / (scores.max() - scores.min())
    vectors = unit(features)
    kernel = relevance[:, None] * (vectors @ vectors.T) * relevance
    expected = slow_greedy(kernel, budget)
    found = sample_dpp(times, scores, features, budget)
    assert found.order.tolist() == expected
    assert len(expected) == budget


@pytest.mark.parametrize("theta", [0.1, 0.3, 0.9])
def test_theta_weighs_relevance(theta: float) -> None:
    _, scores, features = inputs(9, seed=3)
    relevance = np.exp(theta / (2 * (1 - theta)) * (scores - scores.min()) / (scores.max() - scores.min()))
    assert np.allclose(relevance_of(scores, theta=theta), relevance, rtol=1e-12)
    vectors = unit(features)
    expected = slow_greedy(relevance[:, None] * (vectors @ vectors.T) * relevance, 5)
    assert sample_dpp(np.arange(9.0), scores, features, 5, theta=theta).order.tolist() == expected


def test_dpp_stops_at_the_rank() -> None:
    times, scores, _ = inputs(30, seed=1)
    rng = np.random.default_rng(2)
    flat = rng.standard_normal((30, 3)) @ rng.standard_normal((3, 12))
    found = sample_dpp(times, scores, flat, 10)
    assert len(found.order) == 3
    vectors = unit(flat)[found.order]
    assert np.linalg.det(vectors @ vectors.T) > 1e-6
    # repeats of four pictures: one of each, but for those of the least relevant frame
    repeated = np.eye(4)[np.arange(30) % 4]
    assert set((sample_dpp(times, scores, repeated, 10).order % 4).tolist()) == {0, 1, 2, 3}
    assert len(sample_dpp(times, scores, np.float32(repeated), 10).order) == 4
    # what is left by rounding alone is no frame twice, and no NaN
    beyond = sample_dpp(times, scores, flat, 29, eps=1e-300).order
    assert len(beyond) > 3 and len(set(beyond.tolist())) == len(beyond)


def test_constant_scores_are_diversity_alone() -> None:
    times, _, features = inputs(12, seed=4)
    vectors = unit(features)
    expected = slow_greedy(vectors @ vectors.T, 5)
    found = sample_dpp(times, np.full(12, 0.3), features, 5).order.tolist()
    # the first is a tie of all: with each, the rest follows
    assert found[0] == 0 and np.isfinite(found).all() and len(found) == 5
    assert np.linalg.slogdet((vectors @ vectors.T)[np.ix_(found[:2], found[:2])])[1] == pytest.approx(
        max(np.log(1 - (vectors[0] @ vectors[i]) ** 2) for i in range(1, 12)), abs=1e-12
    )
    assert len(expected) == 5


def test_a_frame_without_relevance_is_not_chosen() -> None:
    times, _, features = inputs(6, dim=8)
    scores = np.array([0.5, 0.0, 0.0, 0.9, 0.0, 0.4])
    assert sorted(sample_dpp(times, scores, features, 5).order.tolist()) == [0, 3, 5]
    assert len(sample_dpp(times, scores, features, 5, floor=0.1).order) == 5
    assert sample_dpp(times, scores, features, 6).indices.tolist() == [0, 1, 2, 3, 4, 5]  # no choice: all
    features[3] = 0  # a frame without a vector is like none
    assert sorted(sample_dpp(times, scores, features, 5).order.tolist()) == [0, 5]
    assert not len(greedy_map(np.zeros(4), np.eye(4), 2))


def test_an_empty_query_is_sampled_uniformly() -> None:
    times, _, features = inputs(20)
    assert sampled("dpp", times, None, features, 5) == sampled("uniform", times, None, None, 5)


def test_dpp_is_stable_in_long_videos() -> None:
    """Thousands of nearly equal frames: no NaN, no frame twice, and the Cholesky factor is that of the kernel."""
    rng = np.random.default_rng(0)
    base = rng.standard_normal((40, 16))
    features = base[np.arange(4000) // 100] + 1e-7 * rng.standard_normal((4000, 16))
    scores = rng.random(4000)
    found = sample_dpp(np.arange(4000) / 2, scores, features, 64)
    assert 16 <= len(found.order) == len(set(found.order.tolist()))
    vectors = unit(features)[found.order[:16]]
    relevance = relevance_of(scores)[found.order[:16]]
    kernel = relevance[:, None] * (vectors @ vectors.T) * relevance
    assert np.linalg.slogdet(kernel)[0] == 1
