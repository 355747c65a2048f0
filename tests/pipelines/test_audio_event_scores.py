"""Spans from probabilities, whole and in pieces; event, segment and grounding scores by hand and by brute force."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from seqzoo.pipelines.audio.events.baseline import (
    chance_spans,
    energy_spans,
    frame_levels,
    over_background,
)
from seqzoo.pipelines.audio.events.decoding import EventDecoder, Span, decode_events
from seqzoo.pipelines.audio.events.scores import EventSums, match_events, segment_activity
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.spans import span_iou, union


def spans_of(values: list[float], **options: Any) -> list[tuple[float, float]]:
    """Tokens of one class, a second each, the first one from 0 to 1."""
    found = decode_events(np.array(values)[:, None], step=1.0, first=0.5, **options)
    return [(span.start, span.end) for span in found]


# decoding -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "options", "expected"),
    [
        ([0, 0.5, 0.6, 0.4, 0.9], {}, [(1, 3), (4, 5)]),
        ([0.5], {}, [(0, 1)]),
        ([0.1, 0.2], {}, []),
        ([0.5, 0.5], {"threshold": 0.51}, []),
        # hysteresis: weak tokens on both sides belong to a strong one, alone they are nothing
        ([0.3, 0.9, 0.3, 0.2, 0.3, 0.3], {"low": 0.3}, [(0, 3)]),
        ([0.3, 0.3, 0.9, 0.1, 0.9, 0.3], {"low": 0.3}, [(0, 3), (4, 6)]),
        # gaps of one and two
        ([0.9, 0, 0.9, 0, 0, 0.9], {"max_gap": 1.0}, [(0, 3), (5, 6)]),
        ([0.9, 0, 0.9, 0, 0, 0.9], {"max_gap": 2.0}, [(0, 6)]),
        ([0.9, 0, 0.9, 0, 0, 0.9], {"max_gap": 1.9}, [(0, 3), (5, 6)]),
        # a weak run is a part of the gap
        ([0.9, 0, 0.4, 0, 0.9], {"low": 0.3, "max_gap": 3.0}, [(0, 5)]),
        ([0.9, 0, 0.4, 0, 0.9], {"low": 0.3, "max_gap": 2.0}, [(0, 1), (4, 5)]),
        ([0.9, 0, 0.4], {"low": 0.3, "max_gap": 3.0}, [(0, 1)]),
        # shortest span, after gaps are closed
        ([0.9, 0, 0.9, 0.9], {"min_duration": 2.0}, [(2, 4)]),
        ([0.9, 0, 0.9], {"min_duration": 3.0, "max_gap": 1.0}, [(0, 3)]),
        ([0.9, 0, 0.9], {"min_duration": 1.1}, []),
        # running median of three; at the ends of two, whose median is their mean
        ([0, 0.9, 0, 0.9, 0.9, 0, 0.9], {"median": 3}, [(2, 6)]),
        ([0.9, 0.2, 0, 0], {"median": 3}, [(0, 1)]),
        ([0, 0, 0, 0.9, 0.9, 0.9, 0, 0, 0], {"median": 5}, [(3, 6)]),
        ([0, 0, 0, 0.9, 0.9, 0, 0, 0], {"median": 5}, []),
    ],
)
def test_spans_by_hand(values: list[float], options: dict[str, Any], expected: list[tuple[float, float]]) -> None:
    assert spans_of(values, **options) == expected


def test_places_classes_and_scores() -> None:
    values = np.zeros((6, 2))
    values[1:5, 1], values[0, 0] = (0.6, 0.8, 0.1, 0.7), 1.0
    found = decode_events(values, step=0.04, first=0.03, max_gap=0.04, threshold=[0.9, 0.5])
    # the first token begins before the recording does; the closed gap counts into the mean
    assert found == [Span(0.03 - 0.02, 0.03 + 0.02, 0, 1.0), Span(0.05, 0.21, 1, pytest.approx(2.2 / 4))]
    assert decode_events(values, step=0.04, first=0.0)[0].start == 0.0


@pytest.mark.parametrize("seed", range(12))
def test_pieces_give_the_spans_of_the_whole(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # runs, not single tokens
    values = np.repeat(rng.random((60, 3)), rng.integers(1, 6, 60), axis=0) + 0.1 * rng.standard_normal((1, 3))
    options: dict[str, Any] = {
        "step": 0.02,
        "first": 0.01,
        "threshold": (0.5, 0.6, 0.7),
        "low": 0.4,
        "median": int(rng.choice([1, 3, 7, 11])),
        "max_gap": 0.02 * int(rng.integers(0, 5)),
        "min_duration": 0.02 * int(rng.integers(0, 4)),
    }
    whole = decode_events(values, **options)
    assert len(whole) > 5
    for size in (1, 2, 5, 64, 1000):
        decoder = EventDecoder(3, **options)
        found = [span for i in range(0, len(values), size) for span in decoder.push(values[i : i + size])]
        early = len(found)
        found += decoder.finish()
        assert sorted(found) == whole
        if size < 10:
            assert early > 0  # spans come when they are over, not at the end
    assert sorted(decoder.push(values) + decoder.finish()) == whole  # a decoder begins anew after its end


def test_a_span_comes_as_soon_as_nothing_can_change_it() -> None:
    decoder = EventDecoder(1, step=1.0, first=0.5, max_gap=2.0, median=3)
    came = [len(decoder.push(np.array([[value]]))) for value in (0, 0.9, 0.9, 0.9, 0, 0, 0, 0, 0)]
    # tokens 1 to 3; token 6 is the third of the gap, and its median needs token 7
    assert came == [0, 0, 0, 0, 0, 0, 0, 1, 0]


@pytest.mark.parametrize("seed", range(6))
def test_decoding_against_the_four_steps_one_by_one(seed: int) -> None:
    """Each step over the whole sequence, as the docstring says it."""
    rng = np.random.default_rng(seed)
    values = np.repeat(rng.random(80), rng.integers(1, 5, 80))
    half, high, low, gap, least = 2, 0.6, 0.35, 3, 4
    smooth = [float(np.median(values[max(i - half, 0) : i + half + 1])) for i in range(len(values))]
    runs: list[list[int]] = []
    for i, value in enumerate(smooth):
        if value >= low:
            if runs and runs[-1][1] == i:
                runs[-1][1] = i + 1
            else:
                runs.append([i, i + 1])
    strong = [run for run in runs if max(smooth[run[0] : run[1]]) >= high]
    joined: list[list[int]] = []
    for run in strong:
        if joined and run[0] - joined[-1][1] <= gap:
            joined[-1][1] = run[1]
        else:
            joined.append(list(run))
    expected = [(float(a), float(b)) for a, b in joined if b - a >= least]
    assert spans_of(values.tolist(), threshold=high, low=low, median=5, max_gap=3.0, min_duration=4.0) == expected
    assert len(expected) > 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"median": 4}, "median=4 must be odd, so that it has a middle; 5 is"),
        ({"low": 0.6}, "low=0.6 must not be above threshold=0.5"),
        ({"threshold": [0.5, 0.5, 0.5]}, "must be a number, or one for each of the 2 classes"),
        ({"step": 0.0}, "step=0.0 must be above 0"),
        ({"max_gap": -1.0}, "max_gap=-1.0 must be at least 0"),
        ({"min_duration": math.nan}, "min_duration=nan must be at least 0"),
    ],
)
def test_decoders_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        EventDecoder(2, **{"step": 0.1, **options})
    with pytest.raises(UserError, match=r"shape \(3, 1\), expected \(L, 2\)"):
        EventDecoder(2, step=0.1).push(np.zeros((3, 1)))


# matching -------------------------------------------------------------------------------------------------------------


def best_matching(truth: list[tuple[float, float]], found: list[tuple[float, float]], collar: float = 0.2) -> int:
    """All ways to give true spans different found ones."""

    def agree(one: tuple[float, float], other: tuple[float, float]) -> bool:
        return abs(one[0] - other[0]) <= collar and abs(one[1] - other[1]) <= max(collar, 0.5 * (one[1] - one[0]))

    padded = [*range(len(found)), *([None] * len(truth))]
    return max(
        sum(place is not None and agree(span, found[place]) for span, place in zip(truth, way, strict=True))
        for way in itertools.permutations(padded, len(truth))
    )


def test_matching_is_optimal() -> None:
    rng, beside = np.random.default_rng(0), 0
    for _ in range(60):
        starts = rng.uniform(0, 1, 4)
        truth = [(float(a), float(a + rng.uniform(0.1, 1))) for a in starts]
        found = [(a + float(rng.uniform(-0.25, 0.25)), b + float(rng.uniform(-0.4, 0.4))) for a, b in truth[:3]]
        expected = best_matching(truth, found)
        assert match_events(truth, found) == expected
        beside += expected < 3
    assert 0 < beside < 60


def test_greedy_matching_would_find_fewer() -> None:
    # the first true span agrees with both found ones, the second with the first found one alone
    truth, found = [(0.2, 1.0), (0.0, 1.0)], [(0.1, 1.0), (0.35, 1.0)]
    assert match_events(truth, found) == 2


@pytest.mark.parametrize(
    ("span", "hit"),
    [
        ((1.2, 2.0), True),
        ((1.21, 2.0), False),
        ((0.8, 2.0), True),
        ((1.0, 2.5), True),  # half of its length
        ((1.0, 2.51), False),
        ((1.0, 1.49), False),
    ],
)
def test_collars(span: tuple[float, float], hit: bool) -> None:
    assert match_events([(1.0, 2.0)], [span]) == hit


def test_a_short_span_has_the_collar_at_its_end() -> None:
    assert match_events([(1.0, 1.1)], [(1.0, 1.3)]) == 1
    assert match_events([(1.0, 1.1)], [(1.0, 1.31)]) == 0
    assert match_events([(1.0, 1.1)], [(1.0, 5.0)], offset=False) == 1


# unions, segments, grounding ------------------------------------------------------------------------------------------


def test_union_and_iou_by_hand() -> None:
    assert union([(3, 4), (0, 1), (0.5, 2), (4, 5), (6, 7), (6.1, 6.2)]) == [(0, 2), (3, 5), (6, 7)]
    # both: 1 to 2 and 3.5 to 4; either: 0 to 5
    assert span_iou([(0, 2), (3, 4)], [(1, 3), (3.5, 5)]) == pytest.approx(1.5 / 5)
    assert span_iou([(0, 1)], [(2, 3)]) == 0
    assert span_iou([(0, 1)], []) == 0 and span_iou([], []) == 0
    assert span_iou([(0, 1), (0.5, 2)], [(0, 2)]) == 1


def test_iou_against_a_fine_grid() -> None:
    rng = np.random.default_rng(1)
    for _ in range(20):
        one, other = (
            [(float(a), float(a + w)) for a, w in zip(rng.integers(0, 90, 5), rng.integers(1, 12, 5), strict=True)]
            for _ in range(2)
        )
        cells = [np.zeros(110, dtype=bool), np.zeros(110, dtype=bool)]
        for cell, spans in zip(cells, (one, other), strict=True):
            for a, b in spans:
                cell[int(a) : int(b)] = True
        assert span_iou(one, other) == pytest.approx((cells[0] & cells[1]).sum() / (cells[0] | cells[1]).sum())


def test_segments() -> None:
    assert segment_activity([(0.5, 1.0), (2.9, 4.1)], 5.5).tolist() == [True, False, True, True, True, False]
    assert segment_activity([], 2.0).tolist() == [False, False]


def test_scores_by_hand() -> None:
    sums = EventSums(3)
    # class 0: one of two found; class 1: one false alarm; class 2: none there, one found
    truth = [(0.0, 1.0, 0), (3.0, 4.0, 0), (5.0, 6.0, 1)]
    found = [(0.1, 1.0, 0), (5.0, 6.0, 2), (8.0, 9.0, 1)]
    sums.update(truth, found, 10.0)
    sums.update([(1.0, 2.0, 1)], [(1.0, 2.0, 1)], 2.5)
    scores = sums.compute()
    # pairs 1 + 1 of 4 true and 4 found
    assert scores["event_f1"] == 0.5 and scores["precision"] == 0.5 and scores["recall"] == 0.5
    each = [row["event_f1"] for row in scores["per_class"]]
    assert each == [pytest.approx(2 / 3), 0.5, 0.0]
    assert scores["event_f1_macro"] == pytest.approx((2 / 3 + 1 / 2) / 2)
    assert scores["event_f1_any"] == pytest.approx(2 * 3 / 8)  # (5, 6) counts whatever it is called
    # segments: class 0 {0, 3} and {0}: right 1, missed 1; class 1 {5} and {8}, {1} and {1}; class 2 none and {5}
    assert scores["segment_f1"] == pytest.approx(2 * 2 / (2 * 2 + 2 + 2))
    # queries: 0.9 / 2 of class 0, 0 of class 1, 1 of class 1 in the second
    assert scores["miou"] == pytest.approx((0.45 + 0 + 1) / 3)
    assert [scores[f"recall_at_{x}"] for x in (0.3, 0.5, 0.7)] == [pytest.approx(2 / 3), 1 / 3, 1 / 3]
    assert scores["miou_any"] == pytest.approx((1.9 / 4 + 1) / 2)
    assert (scores["events"], scores["found"], scores["seconds"]) == (4, 4, 12.5)
    assert [row["events"] for row in scores["per_class"]] == [2, 2, 0]


def test_sums_over_processes_are_those_of_one() -> None:
    rng = np.random.default_rng(2)

    def spans() -> list[tuple[float, float, int]]:
        return [
            (float(a), float(a) + 0.5, int(c)) for a, c in zip(rng.uniform(0, 9, 8), rng.integers(0, 3, 8), strict=True)
        ]

    recordings = [(spans(), spans()) for _ in range(6)]
    whole, parts = EventSums(3), [EventSums(3), EventSums(3)]
    for number, (truth, found) in enumerate(recordings):
        whole.update(truth, found, 10.0)
        parts[number % 2].update(truth, found, 10.0)
    joined = EventSums(3)
    joined.flat = parts[0].flat + parts[1].flat
    assert torch.allclose(joined.flat, whole.flat, rtol=0, atol=1e-12)
    assert joined.compute()["event_f1"] == whole.compute()["event_f1"]
    assert joined.by_class.shape == (3, 6)


def test_nothing_there_is_no_score() -> None:
    sums = EventSums(2)
    sums.update([], [], 3.0)
    scores = sums.compute()
    assert all(math.isnan(scores[key]) for key in ("event_f1", "event_f1_macro", "miou", "segment_f1", "precision"))
    sums.update([], [(0.0, 1.0, 1)], 3.0)
    assert sums.compute()["event_f1"] == 0.0 and math.isnan(sums.compute()["event_f1_macro"])


# baselines ------------------------------------------------------------------------------------------------------------


def test_the_energy_detector_finds_what_is_louder() -> None:
    rate, rng = 8000, np.random.default_rng(0)
    samples = 0.01 * rng.standard_normal(20 * rate)
    events = [(2.0, 2.5), (7.0, 7.4), (12.0, 13.0)]
    for start, end in events:
        samples[round(start * rate) : round(end * rate)] *= 4  # 12 dB
    samples[16 * rate :] *= 10  # a louder background is no event, but for its beginning
    samples[round(17.5 * rate) : 18 * rate] *= 4
    excess = over_background(frame_levels(lambda a, b: samples[a:b], len(samples), rate))
    found = energy_spans(excess, rate, margin_db=6.0, label=1)
    assert all(span.label == 1 for span in found)
    expected = [*events, (17.5, 18.0)]
    near = [span for span in found if not 13.1 < span.start < 17.4]
    assert len(near) == 4
    for span, (start, end) in zip(near, expected, strict=True):
        assert (span.start, span.end) == (pytest.approx(start, abs=0.021), pytest.approx(end, abs=0.021))


def test_levels_are_read_in_pieces() -> None:
    rng, asked = np.random.default_rng(1), []
    samples = rng.standard_normal(70 * 8000 + 77)

    def read(start: int, stop: int) -> np.ndarray:
        asked.append(stop - start)
        return samples[start:stop]

    levels = frame_levels(read, len(samples), 8000)
    frames = samples[: 3500 * 160].reshape(-1, 160)
    np.testing.assert_allclose(levels, 10 * np.log10((frames**2).mean(1) + 1e-9), rtol=1e-12)
    assert max(asked) <= 30 * 8000 and sum(asked) == 3500 * 160
    assert len(frame_levels(read, 100, 8000)) == 0


def test_chance_has_the_numbers_of_training() -> None:
    found = chance_spans(100.0, per_second=[0.1, 0.02], length=0.5, rng=np.random.default_rng(0))
    assert [sum(label == own for _, _, label in found) for own in (0, 1)] == [10, 2]
    assert all(start >= 0 and end <= 100 and end - start == pytest.approx(0.5) for start, end, _ in found)
