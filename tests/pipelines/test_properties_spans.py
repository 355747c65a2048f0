"""Properties of spans of time: how they overlap, are made of scores, and are matched."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from examples import examples
from seqzoo.pipelines.audio.events.decoding import EventDecoder, decode_events
from seqzoo.pipelines.audio.events.scores import EventSums, match_events, segment_activity
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.spans import span_iou, total, union
from seqzoo.pipelines.video.spans import chosen_spans, frame_cells, score_spans
from seqzoo.pipelines.video.time_search import Spot, Window, allot, best_evidence, merge_windows, split, window_iou

WHOLE = st.integers(0, 24)
SPANS = st.lists(st.tuples(WHOLE, WHOLE).map(lambda pair: (float(min(pair)), float(max(pair)))), max_size=8)
REAL = st.lists(
    st.tuples(st.floats(0, 100), st.floats(0, 30)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=8
)


# spans ----------------------------------------------------------------------------------------------------------------


@examples(40)
@given(one=SPANS, other=SPANS)
def test_iou_of_whole_seconds_is_counted(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> None:
    def cells(spans: list[tuple[float, float]]) -> set[int]:
        return {second for start, end in spans for second in range(int(start), int(end))}

    both, either = len(cells(one) & cells(other)), len(cells(one) | cells(other))
    assert span_iou(one, other) == (both / either if either else 0.0)
    joined = union(one)
    assert union(joined) == joined and total(joined) == len(cells(one))
    assert all(a[1] < b[0] for a, b in itertools.pairwise(joined))


@examples(40)
@given(one=REAL, other=REAL)
def test_iou_is_symmetric_and_bounded(one: list[tuple[float, float]], other: list[tuple[float, float]]) -> None:
    iou = span_iou(one, other)
    assert 0 <= iou <= 1 and span_iou(other, one) == iou
    assert span_iou(one, one) == float(total(union(one)) > 0)
    assert span_iou(one[::-1] + one, other) == iou
    for a, b in itertools.product(map(Window._make, one), map(Window._make, other)):
        assert 0 <= window_iou(a, b) == window_iou(b, a) <= 1


@examples(60)
@given(
    found=REAL, inside=st.tuples(st.floats(0, 60), st.floats(0.5, 60)), least=st.sampled_from([0.0, 0.25, 4.0]),
    iou=st.sampled_from([0.0, 0.3, 0.5, 1.0]),
)  # fmt: skip
def test_merged_windows_are_merged(
    found: list[tuple[float, float]], inside: tuple[float, float], least: float, iou: float
) -> None:
    frame = Window(inside[0], inside[0] + inside[1])
    merged = merge_windows(found, frame, min_seconds=least, iou=iou)
    assert merged == sorted(merged)
    for window in merged:
        assert frame.start <= window.start <= window.end <= frame.end
        assert window.seconds >= min(least, frame.seconds) - 1e-9
    assert all(window_iou(a, b) <= iou for a, b in itertools.combinations(merged, 2))
    np.testing.assert_allclose(merge_windows(merged, frame, min_seconds=least, iou=iou), merged, rtol=0, atol=1e-9)
    # what was found inside is covered
    for start, end in found:
        start, end = max(start, frame.start), min(end, frame.end)
        assert start >= end or any(w.start <= start + 1e-9 and end <= w.end + 1e-9 for w in merged)


@examples(60)
@given(
    spans=REAL, sure=st.lists(st.sampled_from([0.0, 0.3, 0.5, 0.5, 1.0]), min_size=8, max_size=8),
    number=st.integers(0, 9), budget=st.integers(0, 30), rooms=st.lists(st.integers(0, 9), min_size=8, max_size=8),
)  # fmt: skip
def test_the_best_evidence_does_not_overlap_and_shares_the_frames(
    spans: list[tuple[float, float]], sure: list[float], number: int, budget: int, rooms: list[int]
) -> None:
    spots = [Spot(Window(*span), confidence, 1) for span, confidence in zip(spans, sure, strict=False)]
    best = best_evidence(spots, number)
    assert len(best) <= number and all(spot in spots for spot in best)
    assert all(a.window.end <= b.window.start for a, b in itertools.pairwise(best))
    assert best_evidence(best, number) == best and best_evidence(spots[::-1], number) == best
    if number and spots:
        assert max(spot.confidence for spot in best) == max(spot.confidence for spot in spots)
    if len(best) < number:  # whatever was left out gives way to a surer one, or an equal one that is shorter or earlier
        for spot in spots:
            rivals = [c for c in best if spot.window.start < c.window.end and c.window.start < spot.window.end]
            assert (
                spot in best
                or not spot.window.seconds
                or any(
                    (-c.confidence, c.window.seconds, c.window.start)
                    <= (-spot.confidence, spot.window.seconds, spot.window.start)
                    for c in rivals
                )
            )
    rooms = rooms[: len(best)]
    given_ = allot(best, budget, rooms=rooms)
    assert sum(given_) == min(budget, sum(rooms)) and all(a <= b for a, b in zip(given_, rooms, strict=True))


@examples(40)
@given(start=st.floats(0, 1e4), length=st.floats(0.1, 1e4), parts=st.integers(1, 9))
def test_equal_parts_of_a_window(start: float, length: float, parts: int) -> None:
    window = Window(start, start + length)
    found = split(window, parts)
    assert len(found) == parts and found[0].start == window.start and found[-1].end == window.end
    assert all(a.end == b.start for a, b in itertools.pairwise(found))
    np.testing.assert_allclose([part.seconds for part in found], window.seconds / parts, atol=1e-9 * (start + length))


# from scores to spans -------------------------------------------------------------------------------------------------

SCORES = st.lists(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.5, 0.7, 1.0]), min_size=1, max_size=40)


@examples(60)
@given(
    scores=SCORES, median=st.sampled_from([1, 3, 5]), low=st.sampled_from([0.3, 0.5]),
    gap=st.integers(0, 4), least=st.integers(0, 4), cuts=st.sets(st.integers(1, 39)),
)  # fmt: skip
def test_events_do_not_depend_on_pieces_and_are_found_again(
    scores: list[float], median: int, low: float, gap: int, least: int, cuts: set[int]
) -> None:
    values = np.stack([scores, scores[::-1]], axis=1)
    options = {
        "step": 0.5,
        "first": 0.25,
        "low": low,
        "median": median,
        "max_gap": 0.5 * gap,
        "min_duration": 0.5 * least,
    }
    spans = decode_events(values, **options)
    decoder, pieces = EventDecoder(2, **options), []
    ends = sorted({0, len(values), *(cut for cut in cuts if cut < len(values))})
    for begin, end in itertools.pairwise(ends):
        pieces += decoder.push(values[begin:end])
    assert sorted(pieces + decoder.finish()) == spans
    again = np.zeros_like(values)
    for label in range(2):
        own = [span for span in spans if span.label == label]
        assert all(b.start - a.end > 0.5 * gap for a, b in itertools.pairwise(own))
        for span in own:
            assert 0 <= span.start < span.end <= 0.5 * len(values) and span.end - span.start >= 0.5 * least
            again[int(2 * span.start) : int(2 * span.end), label] = 1
    repeated = decode_events(again, **{**options, "median": 1})
    assert [span[:3] for span in repeated] == [span[:3] for span in spans]
    both = np.concatenate((values, values), axis=1)
    assert [s[:2] for s in decode_events(both, **options) if s.label == 2] == [s[:2] for s in spans if s.label == 0]


@examples(60)
@given(
    scores=SCORES,
    steps=st.lists(st.sampled_from([0.0, 0.5, 1.0, 7.0]), min_size=40, max_size=40),
    gap=st.sampled_from([0.0, 1.0, 5.0]),
)
def test_spans_of_a_video_are_apart_and_within_it(scores: list[float], steps: list[float], gap: float) -> None:
    times = np.cumsum(steps)[: len(scores)]
    end = float(times[-1]) + 1
    for spans in (
        score_spans(times, np.array(scores), max_gap=gap, start=0.0, end=end),
        chosen_spans(times, np.array(scores), start=0.0, end=end),
    ):
        assert all(0 <= span.start <= span.end <= end for span in spans)
        assert all(min(scores) - 1e-9 <= span.score <= max(scores) + 1e-9 for span in spans)
        assert all(a.end <= b.start for a, b in itertools.pairwise(spans))
    # frames below the level count for no span, even where their cells are within one
    chosen = chosen_spans(times, np.array(scores), start=0.0, end=end)
    assert all(span.score >= 0.75 * max(scores) - 1e-9 for span in chosen) and bool(chosen) == (max(scores) > 0)
    if len(set(scores)) == 1:  # nothing stands out
        assert score_spans(times, np.array(scores)) == []
    cells = frame_cells(times, start=0.0, end=end, reach=1.0)
    assert (cells[:, 0] <= times).all() and (times <= cells[:, 1]).all() and (np.abs(cells - times[:, None]) <= 1).all()
    for wrong in (np.nan, np.inf):
        with pytest.raises(UserError, match="finite"):
            score_spans(times, np.array([*scores[1:], wrong]))


# matching -------------------------------------------------------------------------------------------------------------


@examples(40)
@given(truth=REAL, found=REAL, offset=st.booleans(), collar=st.sampled_from([0.2, 1.0, 10.0]))
def test_matching_is_that_of_scipy(
    truth: list[tuple[float, float]], found: list[tuple[float, float]], offset: bool, collar: float
) -> None:
    graph = pytest.importorskip("scipy.sparse.csgraph")
    sparse = pytest.importorskip("scipy.sparse")
    agree = np.array(
        [
            [
                abs(a - c) <= collar + 1e-9 and (not offset or abs(b - d) <= max(collar, 0.5 * (b - a)) + 1e-9)
                for c, d in found
            ]
            for a, b in truth
        ],
        dtype=bool,
    ).reshape(len(truth), len(found))
    expected = int((graph.maximum_bipartite_matching(sparse.csr_matrix(agree)) >= 0).sum()) if agree.size else 0
    assert match_events(truth, found, collar=collar, offset=offset) == expected
    if not offset:
        assert match_events(found, truth, collar=collar, offset=False) == expected
    sums = EventSums(1)
    sums.update([(*span, 0) for span in truth], [(*span, 0) for span in found], 140.0)
    scores = sums.compute()
    for name in ("event_f1", "event_f1_any", "precision", "recall", "segment_f1", "miou", "recall_at_0.5"):
        # NaN where nothing can be counted: no span, or none that is longer than a rounding error
        countable = total(union(truth)) > 1e-6 and total(union(found)) > 1e-6
        assert 0 <= scores[name] <= 1 or (math.isnan(scores[name]) and not countable)


@pytest.mark.parametrize("number", [10, 3000])
def test_matching_of_dense_events_is_not_deeper_than_python_goes(number: int) -> None:
    """Each event has two that agree with it, so that a path goes through all of them."""
    truth = [(0.3 * i, 0.3 * i + 0.2) for i in range(number)]
    found = [(0.3 * i + 0.15, 0.3 * i + 0.3) for i in range(number)]
    assert match_events(truth, found) == number
    assert match_events(truth[::-1], found) == number  # the last one to be matched moves all the others
    assert match_events(truth, found[:-1]) == match_events(truth[::-1], found[:-1]) == number - 1


@examples(40)
@given(spans=SPANS, seconds=st.integers(24, 40), segment=st.sampled_from([1.0, 2.0, 0.5]))
def test_segments_are_those_that_a_span_touches(spans: list[tuple[float, float]], seconds: int, segment: float) -> None:
    spans = [span for span in spans if span[0] < span[1]]  # as tables have them
    active = segment_activity(spans, float(seconds), segment=segment)
    places = [(i * segment, (i + 1) * segment) for i in range(len(active))]
    assert len(active) == -(-seconds // segment)
    assert active.tolist() == [any(a < end and start < b for start, end in spans) for a, b in places]
