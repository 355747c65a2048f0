"""Time search as a sampler: what it finds with few scores, where it covers the video, and its limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqzoo.pipelines.video.samplers import (
    Scores,
    sample_time_search,
)

# few different values, so that there are ties of scores and of times
SCORES = st.lists(st.integers(0, 12).map(lambda v: v / 8), min_size=1, max_size=60)
STEPS = st.lists(st.sampled_from([0.0, 0.5, 0.5, 1.0, 7.0]), min_size=60, max_size=60)
FAST = settings(max_examples=60, deadline=None)


def inputs(number: int) -> tuple[np.ndarray, np.ndarray]:
    return np.arange(number) / 2, np.random.default_rng(0).random(number)


def peaks(number: int, places: list[int], *, width: int = 4, seed: int = 0) -> np.ndarray:
    scores = np.random.default_rng(seed).normal(0.3, 0.05, number)
    for place in places:
        scores[place : place + width] = 0.7
    return scores


@pytest.mark.parametrize("seed", range(20))
def test_time_search_finds_events_of_the_coarse_step_with_a_quarter_of_the_scores(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # five frames are wider than the step of the first look, 1 / (0.9 * 0.25) = 4.4
    places = sorted(rng.choice(np.arange(0, 3590, 40), 3, replace=False).tolist())
    found = sample_time_search(np.arange(3600) / 2, peaks(3600, places, width=5, seed=seed), None, 16)
    assert found.scored <= 900
    for place in places:
        assert any(place <= index < place + 5 for index in found.indices)
    assert found.trace is not None and found.trace.frames == found.scored
    seen = np.unique(np.concatenate([look.frames for look in found.trace.looks]))
    assert len(seen) == found.scored
    # the surest come first
    assert any(place <= found.order[0] < place + 5 for place in places)


def test_time_search_goes_on_where_the_scores_rise() -> None:
    """A slope around the event, as in most videos: a hundredth of the frames finds it."""
    times = np.arange(7200) / 2
    scores = np.exp(-np.abs(np.arange(7200) - 2222) / 60) + np.random.default_rng(0).normal(0, 0.01, 7200)
    found = sample_time_search(times, scores, None, 8, max_scored=72, coarse=0.5)
    assert found.scored <= 72 and np.abs(found.indices - 2222).min() <= 10
    assert found.trace is not None
    depths = [look.depth for look in found.trace.looks]
    lengths = [look.window.seconds for look in found.trace.looks]
    assert depths[:3] == [0, 1, 2] and lengths[0] > 5 * lengths[1] > 10 * lengths[2]


@pytest.mark.parametrize("value", [0.0, 0.25])
def test_without_a_hint_time_search_covers_the_video(value: float) -> None:
    times = np.arange(1000) / 2
    scores = np.full(1000, value)
    found = sample_time_search(times, scores, None, 10)
    assert (found.indices // 100).tolist() == list(range(10))  # one in each tenth
    assert not found.trace.evidence if found.trace else False
    # an event that the coarse grid misses is no reason to look at one place only
    scores[501] = 1.0
    found = sample_time_search(times, scores, None, 10, max_scored=40)
    assert (found.indices // 100).tolist() == list(range(10))


def test_the_highest_frame_of_a_spot_is_the_first_of_it() -> None:
    scores = np.random.default_rng(0).normal(0.3, 0.01, 1000)
    for place in (100, 403, 777):
        scores[place - 3 : place + 4] = [0.4, 0.5, 0.6, 0.9, 0.6, 0.5, 0.4]
    found = sample_time_search(np.arange(1000) / 2, scores, None, 3, max_scored=400)
    assert found.indices.tolist() == [100, 403, 777]


def test_what_covers_the_video_is_the_highest_that_was_looked_at() -> None:
    times, scores = inputs(1000)
    asked: set[int] = set()

    def lazily(indices: np.ndarray) -> np.ndarray:
        asked.update(indices.tolist())
        return scores[indices]

    found = sample_time_search(times, lazily, None, 10, spot=50.0)
    seen = [[i for i in sorted(asked) if i // 100 == part] for part in range(10)]
    assert all(len(own) > 1 for own in seen)
    assert found.indices.tolist() == [max(own, key=lambda i: scores[i]) for own in seen]


def test_constant_but_for_one_is_found() -> None:
    times, scores = np.arange(1000) / 2, np.zeros(1000)
    scores[300:306] = 1.0
    found = sample_time_search(times, scores, None, 4)
    assert any(300 <= index < 306 for index in found.indices)


@given(scores=SCORES, steps=STEPS, budget=st.integers(1, 30), most=st.integers(1, 80))
@FAST
def test_time_search_keeps_its_limit(scores: list[float], steps: list[float], budget: int, most: int) -> None:
    times = np.cumsum(steps)[: len(scores)]
    asked: set[int] = set()

    def lazily(indices: np.ndarray) -> np.ndarray:
        asked.update(indices.tolist())
        return np.array(scores)[indices]

    found = sample_time_search(times, lazily, None, budget, max_scored=most)
    assert len(asked) == found.scored <= min(most, len(scores))
    assert len(found.indices) == min(budget, len(scores))


def test_a_share_is_at_least_four_times_the_budget() -> None:
    times, scores = inputs(100)
    assert sample_time_search(times, scores, None, 16).scored == 64
    assert sample_time_search(times, scores, None, 16, max_scored=20).scored == 20
    assert sample_time_search(times, scores, None, 4).scored == 25


def test_scores_are_asked_once() -> None:
    calls: list[list[int]] = []

    def compute(indices: np.ndarray) -> np.ndarray:
        calls.append(indices.tolist())
        return indices * 2.0

    scores = Scores(compute, 5)
    assert scores.at(np.array([3, 1, 3])).tolist() == [6, 2, 6]
    assert scores.at(np.array([3, 0])).tolist() == [6, 0]
    assert np.isnan(scores.known(np.array([2, 3]))).tolist() == [True, False]
    assert scores.all().tolist() == [0, 2, 4, 6, 8] and scores.asked == 5
    assert calls == [[1, 3], [0], [2, 4]]
