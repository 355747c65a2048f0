"""Spans from scores and from chosen frames; grounding, event and key-frame scores by hand and by brute force."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.video.metrics import (
    answer_span,
    event_recall,
    events_found,
    grounding_scores,
    nearest_seconds,
    temporal_scores,
)
from seqzoo.pipelines.video.spans import Levels, Span, chosen_spans, frame_cells, score_levels, score_spans

FAST = settings(max_examples=60, deadline=None)
HALF = Levels(0.5, 0.5)


def spans_of(values: list[float], **options: Any) -> list[tuple[float, float]]:
    """Frames a second apart, the first at half a second, so that frame i stands for i to i + 1."""
    times = np.arange(len(values)) + 0.5
    found = score_spans(times, np.array(values), start=0.0, end=float(len(values)), **options)
    return [(span.start, span.end) for span in found]


# cells ----------------------------------------------------------------------------------------------------------------


def test_cells_by_hand() -> None:
    assert frame_cells(np.array([1.0, 2.0, 4.0])).tolist() == [[1.0, 1.5], [1.5, 3.0], [3.0, 5.0]]
    assert frame_cells(np.array([1.0, 2.0, 4.0]), start=0.0, end=9.0).tolist() == [[0.0, 1.5], [1.5, 3.0], [3.0, 9.0]]
    reach = frame_cells(np.array([1.0, 2.0, 8.0]), start=0.0, end=9.5, reach=1.0)
    assert reach.tolist() == [[0.0, 1.5], [1.5, 3.0], [7.0, 9.0]]
    assert frame_cells(np.array([3.0])).tolist() == [[3.0, 3.0]]
    assert frame_cells(np.array([3.0]), start=0.0, end=7.0, reach=2.0).tolist() == [[1.0, 5.0]]
    assert frame_cells(np.empty(0)).shape == (0, 2)
    with pytest.raises(UserError, match="times must be finite and in order"):
        frame_cells(np.array([1.0, 0.0]))


@given(steps=st.lists(st.floats(0.01, 9.0), min_size=1, max_size=30))
@FAST
def test_cells_part_the_video(steps: list[float]) -> None:
    times = np.cumsum(steps)
    cells = frame_cells(times, start=0.0, end=float(times[-1] + 1))
    assert cells[0, 0] == 0 and cells[-1, 1] == times[-1] + 1
    assert np.array_equal(cells[1:, 0], cells[:-1, 1])
    assert ((cells[:, 0] <= times) & (times <= cells[:, 1])).all()


# spans of scores ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([0, 0.5, 0.6, 0.4, 0.9], {"max_gap": 0.0}, [(1, 3), (4, 5)]),
        ([0.5], {}, [(0, 1)]),
        ([0.1, 0.2], {}, []),
        # weak frames on both sides belong to a strong one, alone they are nothing
        ([0.3, 0.9, 0.3, 0.2, 0.3, 0.3], {"levels": Levels(0.5, 0.3)}, [(0, 3)]),
        ([0.3, 0.3, 0.9, 0.1, 0.9, 0.3], {"levels": Levels(0.5, 0.3), "max_gap": 0.5}, [(0, 3), (4, 6)]),
        # gaps of one and two seconds
        ([0.9, 0, 0.9, 0, 0, 0.9], {"max_gap": 1.0}, [(0, 3), (5, 6)]),
        ([0.9, 0, 0.9, 0, 0, 0.9], {"max_gap": 2.0}, [(0, 6)]),
        ([0.9, 0, 0.9, 0, 0, 0.9], {"max_gap": 1.9}, [(0, 3), (5, 6)]),
        # a weak run is a part of the gap
        ([0.9, 0, 0.4, 0, 0.9], {"levels": Levels(0.5, 0.3), "max_gap": 3.0}, [(0, 5)]),
        ([0.9, 0, 0.4, 0, 0.9], {"levels": Levels(0.5, 0.3), "max_gap": 2.0}, [(0, 1), (4, 5)]),
        # shortest span, after gaps are closed
        ([0.9, 0, 0.9, 0.9], {"min_seconds": 2.0, "max_gap": 0.0}, [(2, 4)]),
        ([0.9, 0, 0.9], {"min_seconds": 3.0}, [(0, 3)]),
        ([0.9, 0, 0.9], {"min_seconds": 1.1, "max_gap": 0.0}, []),
    ],
)
def test_spans_by_hand(values: list[float], options: dict[str, Any], expected: list[tuple[float, float]]) -> None:
    assert spans_of(values, **{"levels": HALF, **options}) == expected


def test_the_score_of_a_span_is_the_mean_of_its_frames() -> None:
    times, scores = np.array([0.0, 1, 2, 3, 9]), np.array([0.0, 0.6, 0.2, 0.7, 0.0])
    assert score_spans(times, scores, levels=HALF) == [Span(0.5, 6.0, pytest.approx(0.5))]
    # uneven times: a cell ends half-way to its neighbour
    assert score_spans(times, scores[::-1].copy(), levels=HALF)[0].end == 6.0


@pytest.mark.parametrize("seed", range(8))
def test_spans_against_the_steps_one_by_one(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.repeat(rng.random(50), rng.integers(1, 5, 50))
    times = np.cumsum(rng.uniform(0.2, 1.5, len(values)))
    high, low, gap, least = 0.7, 0.4, 2.0, 1.5
    middles = (times[1:] + times[:-1]) / 2
    edges = [0.0, *middles.tolist(), float(times[-1] + 1)]
    runs: list[list[int]] = []
    for i, value in enumerate(values):
        if value >= low:
            if runs and runs[-1][1] == i:
                runs[-1][1] = i + 1
            else:
                runs.append([i, i + 1])
    runs = [run for run in runs if any(values[i] >= high for i in range(*run))]
    joined: list[tuple[float, float]] = []
    for first, stop in runs:
        start, end = edges[first], edges[stop]
        if joined and start - joined[-1][1] <= gap:
            joined[-1] = joined[-1][0], end
        else:
            joined.append((start, end))
    expected = [(start, end) for start, end in joined if end - start >= least]
    found = score_spans(
        times, values, levels=Levels(high, low), max_gap=gap, min_seconds=least, start=0.0, end=float(times[-1] + 1)
    )
    assert len(expected) > 2 and [(span.start, span.end) for span in found] == expected


def test_levels_from_the_median_the_floor_and_a_threshold() -> None:
    scores = np.array([0.2] * 8 + [0.6, 0.6])
    assert score_levels(scores, high=0.5, low=0.25) == pytest.approx((0.4, 0.3))
    assert score_levels(scores, high=0.5, low=0.25, floor=0.5) == pytest.approx((0.5, 0.3))  # at least the floor
    assert score_levels(scores, floor=0.7).high == math.inf
    assert score_levels(np.full(5, 0.3)).high == math.inf  # nothing is more than anything else
    # seen most of the time: from the floor, not from the median
    most = np.array([0.8] * 8 + [0.1, 0.1])
    assert score_levels(most, high=0.5, low=0.25, floor=0.2) == pytest.approx((0.5, 0.35))
    assert score_levels(most).high == math.inf
    assert score_levels(scores, high=0.5, low=0.25, threshold=0.5) == pytest.approx((0.5, 0.35))
    noisy = np.array([0.1, 0.2, 0.3, 0.4, 0.5, 0.55])
    assert score_levels(noisy, contrast=2.0).high == math.inf and score_levels(noisy, contrast=0.5).high < 0.55


def test_levels_are_relative_to_the_scores() -> None:
    scores = np.array([0.2, 0.2, 0.3, 0.1, 0.2, 0.8, 0.2])
    assert score_levels(scores, high=0.5, low=0.25) == (pytest.approx(0.5), pytest.approx(0.35))
    other = score_levels(scores * 3 - 7, high=0.5, low=0.25)
    assert other == (pytest.approx(0.5 * 3 - 7), pytest.approx(0.35 * 3 - 7))
    # a video in which nothing stands out has no span
    assert score_levels(np.full(9, 0.4)) == (math.inf, math.inf)
    assert score_spans(np.arange(9.0), np.full(9, 0.4)) == []
    flat = np.arange(9) / 9  # its highest is 1.8 robust deviations from the median
    assert score_levels(flat, contrast=1.3).high < 1 and score_levels(flat, contrast=2.0).high == math.inf
    assert score_levels(np.empty(0)) == (math.inf, math.inf)
    assert score_spans(np.empty(0), np.empty(0)) == []
    for wrong in ({"high": 0.2, "low": 0.3}, {"high": 1.2}, {"low": -0.1}):
        with pytest.raises(UserError, match=r"must be in order, from 0 to 1"):
            score_levels(scores, **wrong)
    with pytest.raises(UserError, match=r"levels.low=0.6 must not be above levels.high=0.5"):
        score_spans(np.arange(7.0), scores, levels=Levels(0.5, 0.6))
    for bad in (np.ones(3), np.full(7, math.nan)):
        with pytest.raises(UserError, match="scores must be finite, one for each of the 7 times"):
            score_spans(np.arange(7.0), bad)


def test_a_planted_event_comes_out_whole() -> None:
    rng = np.random.default_rng(0)
    times = np.arange(3600) / 2
    scores = rng.normal(0.3, 0.04, 3600)
    scores[2000:2005] = [0.62, 0.5, 0.7, 0.66, 0.7]
    (span,) = score_spans(times, scores)
    assert (span.start, span.end) == (999.75, 1002.25)


# spans of chosen frames -----------------------------------------------------------------------------------------------


def test_chosen_frames_by_hand() -> None:
    times = np.array([10.0, 20.0, 20.5, 21.0, 40.0, 100.0])
    scores = np.array([0.1, 0.8, 0.7, 0.63, 0.61, 0.2])
    # at least 0.6: three that touch, half-way between them, a second at the ends; and one apart
    found = chosen_spans(times, scores)
    assert [(s.start, s.end) for s in found] == [(19.0, 22.0), (39.0, 41.0)]
    assert found[0].score == pytest.approx(0.71) and found[1].score == 0.61
    assert [s.end for s in chosen_spans(times, scores, share=0.85)] == [20.75]
    assert [(s.start, s.end) for s in chosen_spans(times, scores, floor=0.4, share=0.7)] == [(19.0, 20.75)]
    assert [(s.start, s.end) for s in chosen_spans(times, scores, reach=20.0)] == [(15.0, 60.0)]
    # a frame beside it that is not in it bounds the cell
    assert [(s.start, s.end) for s in chosen_spans(np.array([5.0, 5.5]), np.array([1.0, 0.0]))] == [(5.0, 5.25)]
    assert [(s.start, s.end) for s in chosen_spans(np.array([0.2, 9.8]), np.ones(2), start=0.0, end=10.0)] == [
        (0.0, 1.2),
        (8.8, 10.0),
    ]


def test_chosen_frames_without_a_good_one() -> None:
    assert chosen_spans(np.array([1.0, 2.0]), np.array([-0.1, -0.2])) == []
    assert chosen_spans(np.array([1.0, 2.0]), np.array([0.4, 0.3]), floor=0.4) == []
    assert chosen_spans(np.empty(0), np.empty(0)) == []


# metrics --------------------------------------------------------------------------------------------------------------


def test_what_an_answer_means() -> None:
    assert answer_span([3.0, 7.0, 9.0], 20.0) == (3.0, 7.0)
    assert answer_span([7.0, 3.0], 20.0) == (3.0, 7.0)
    assert answer_span([-4.0, 30.0], 20.0) == (0.0, 20.0)
    assert answer_span([5.0], 20.0) == answer_span([], 20.0) == (0.0, 20.0)


def test_grounding_by_hand() -> None:
    truths = [[(0.0, 10.0)], [(0.0, 10.0)], [(0.0, 10.0)], [(20.0, 30.0)]]
    founds = [[(0.0, 10.0)], [(5.0, 15.0)], [(0.0, 5.0)], [(0.0, 1.0)]]
    # IoU 1, 1/3, 1/2, 0
    scores = grounding_scores(truths, founds)
    assert scores["miou"] == pytest.approx((1 + 1 / 3 + 1 / 2) / 4)
    assert [scores[f"recall_at_{x}"] for x in (0.3, 0.5, 0.7)] == [0.75, 0.5, 0.25]
    assert scores["precision_at_0.5"] == 0.5  # one true and one found span each: P@0.5 is R@0.5
    # means over videos of the means over queries
    by_video = grounding_scores(truths, founds, videos=["a", "a", "a", "b"])
    assert by_video["miou"] == pytest.approx(((1 + 1 / 3 + 1 / 2) / 3 + 0) / 2)
    assert by_video["recall_at_0.5"] == pytest.approx((2 / 3 + 0) / 2)


def test_grounding_of_several_spans() -> None:
    truth, found = [(0.0, 10.0), (50.0, 60.0)], [(0.0, 9.0), (30.0, 40.0), (52.0, 53.0)]
    scores = grounding_scores([truth], [found])
    assert scores["miou"] == pytest.approx(10 / 30)
    assert [scores[f"recall_at_{x}"] for x in (0.3, 0.5, 0.7)] == [0.5, 0.5, 0.5]
    assert scores["precision_at_0.5"] == pytest.approx(1 / 3)
    nothing = grounding_scores([truth], [[]])
    assert set(nothing.values()) == {0.0}
    # a query that nothing fits
    right, wrong = grounding_scores([[]], [[]]), grounding_scores([[]], [[(0.0, 1.0)]])
    assert (right["miou"], right["precision_at_0.5"], wrong["miou"], wrong["precision_at_0.5"]) == (1, 1, 0, 0)
    assert math.isnan(right["recall_at_0.5"])
    assert grounding_scores([[], truth], [[], truth])["recall_at_0.7"] == 1
    assert all(math.isnan(value) for value in grounding_scores([], []).values())
    with pytest.raises(UserError, match="2 queries have 1 answers"):
        grounding_scores([truth, truth], [found])
    with pytest.raises(UserError, match="1 queries have 1 answers and 2 videos"):
        grounding_scores([truth], [found], videos=["a", "b"])


def test_an_event_is_found_by_a_frame_in_it() -> None:
    events = [(1.0, 2.0), (5.0, 6.0), (8.0, 9.0)]
    assert events_found([1.0, 6.0, 8.5, 8.6], events).tolist() == [True, False, True]  # its end is the next one's
    assert event_recall([1.0, 6.0, 8.5], events) == pytest.approx(2 / 3)
    assert event_recall(np.empty(0), events) == 0 and math.isnan(event_recall([1.0], []))


def test_key_frames_by_hand() -> None:
    scores = temporal_scores([0.0, 10.0, 30.0], [5.0, 16.0])
    # 0 and 10 are five seconds from 5; 16 is six from 10
    assert scores.precision == pytest.approx(2 / 3) and scores.recall == 0.5
    assert scores.f1 == pytest.approx(2 * (2 / 3) * 0.5 / (2 / 3 + 0.5))
    assert scores.from_found == pytest.approx((5 + 5 + 14) / 3) and scores.from_true == pytest.approx((5 + 6) / 2)
    assert temporal_scores([0.0, 10.0], [5.0], tolerance=4.9)[:3] == (0, 0, 0)
    for found, truth in (([], [1.0]), ([1.0], [])):
        scores = temporal_scores(found, truth)
        assert scores[:3] == (0, 0, 0) and math.isnan(scores.from_true)
    assert all(math.isnan(value) for value in temporal_scores([], []))


@given(
    found=st.lists(st.floats(0, 100), min_size=1, max_size=20),
    truth=st.lists(st.floats(0, 100), min_size=1, max_size=20),
)
@FAST
def test_key_frames_by_brute_force(found: list[float], truth: list[float]) -> None:
    distances = [[abs(a - b) for b in truth] for a in found]
    near, back = [min(row) for row in distances], [min(row[i] for row in distances) for i in range(len(truth))]
    scores = temporal_scores(found, truth)
    assert scores.precision == sum(d <= 5 for d in near) / len(found)
    assert scores.recall == sum(d <= 5 for d in back) / len(truth)
    assert nearest_seconds(np.array(found), np.array(truth)).tolist() == near
    assert scores.from_true == pytest.approx(sum(back) / len(back))
