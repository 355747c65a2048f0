"""Properties of what is cut, planted, chosen and found in sound and video: times, spans, matchings, splits, windows."""

from __future__ import annotations

import itertools
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st

from examples import examples
from seqzoo.pipelines.audio.events.decoding import EventDecoder, decode_events
from seqzoo.pipelines.audio.events.recordings import FileWindows
from seqzoo.pipelines.audio.events.scores import EventSums, match_events, segment_activity
from seqzoo.pipelines.audio.markers import decode_text, decode_time, encode_ranges, encode_time, find_ranges
from seqzoo.pipelines.audio.streaming import FileSource, stream
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.labelled_clips import assign_splits, shared_between
from seqzoo.pipelines.spans import span_iou, total, union
from seqzoo.pipelines.video import composer as video_composer
from seqzoo.pipelines.video.classify.protocol import Sampling, leave_out
from seqzoo.pipelines.video.clips import VideoClip, cut_clips
from seqzoo.pipelines.video.grounding.videos import ComposedWindows
from seqzoo.pipelines.video.samplers import create_sampler, list_samplers
from seqzoo.pipelines.video.samplers.dpp import greedy_map, relevance_of
from seqzoo.pipelines.video.samplers.tass import select_tass
from seqzoo.pipelines.video.spans import chosen_spans, frame_cells, score_spans
from seqzoo.pipelines.video.time_search import Spot, Window, allot, best_evidence, merge_windows, split, window_iou

WHOLE = st.integers(0, 24)
SPANS = st.lists(st.tuples(WHOLE, WHOLE).map(lambda pair: (float(min(pair)), float(max(pair)))), max_size=8)
REAL = st.lists(
    st.tuples(st.floats(0, 100), st.floats(0, 30)).map(lambda pair: (pair[0], pair[0] + pair[1])), max_size=8
)
RANDOM = st.randoms(use_true_random=False)


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


# samplers -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list_samplers())
@examples(15)
@given(
    number=st.integers(1, 12),
    budget=st.integers(1, 30),
    level=st.sampled_from([0.0, 0.1, -3.0]),
    wrong=st.integers(0, 11),
)
def test_scores_that_are_equal_or_none(name: str, number: int, budget: int, level: float, wrong: int) -> None:
    choose, times = create_sampler(name), np.arange(number) / 2
    scores, features = np.full(number, level), np.random.default_rng(number).standard_normal((number, 20))
    found = choose(times, scores, features, budget)
    few = number // 2 + number % 2 if name == "fps" else number  # one a second of two
    assert len(found.indices) == min(budget, few)
    lazy = choose(times, lambda places: scores[places], lambda places: features[places], budget)
    assert np.array_equal(lazy.order, found.order) and lazy.scored == found.scored
    if name not in ("uniform", "fps"):
        scores[wrong % number] = np.nan
        if not (name == "dpp" and budget >= number):  # all are taken without a look
            with pytest.raises(UserError, match="not finite"):
                choose(times, scores, features, budget)
    for empty in (np.zeros(0), np.zeros((2, 2))):
        with pytest.raises(UserError, match="at least one frame"):
            choose(empty, scores, features, budget)


@examples(40)
@given(number=st.integers(1, 12), dim=st.integers(1, 6), copies=st.integers(0, 6), seed=st.integers(0, 99))
def test_a_larger_budget_of_dpp_goes_on_where_the_smaller_ended(number: int, dim: int, copies: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.standard_normal((number, dim))
    features = np.concatenate((features, features[rng.integers(0, number, copies)]))
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    relevance = relevance_of(rng.random(len(features)), floor=0.1)
    orders = [greedy_map(relevance, features, budget).tolist() for budget in range(len(features) + 2)]
    for small, large in itertools.pairwise(orders):
        assert large[: len(small)] == small and len(large) <= len(small) + 1
    last = orders[-1]
    assert len(set(last)) == len(last) <= min(dim, number)  # repeats and what the others span are not chosen
    kernel = relevance[:, None] * (features @ features.T) * relevance
    for step, best in enumerate(last[:3]):  # each step by its definition
        gains = [np.linalg.det(kernel[np.ix_([*last[:step], i], [*last[:step], i])]) for i in range(len(features))]
        assert gains[best] >= max(gains) * (1 - 1e-6)


@examples(40)
@given(
    scores=st.lists(st.integers(0, 50), min_size=1, max_size=30), budget=st.integers(1, 12),
    scale=st.sampled_from([0.25, 2.0, 1024.0]), shift=st.integers(-64, 64),
)  # fmt: skip
def test_date_looks_at_the_order_of_scores_and_seconds_alone(
    scores: list[int], budget: int, scale: float, shift: int
) -> None:
    times, values = np.arange(len(scores)) / 2, np.array(scores, dtype=float)
    found = select_tass(times, values, budget)
    moved = select_tass(times + shift, (values + shift) * scale, budget)
    assert moved.order.tolist() == found.order.tolist() and moved.gap == found.gap
    everything = select_tass(times, values, len(scores), threshold="none", cap=1.0)
    assert sorted(everything.order.tolist()) == list(range(len(scores)))


@examples(60)
@given(
    number=st.none() | st.integers(1, 40), fps=st.sampled_from([0.5, 2.0, 25.0]), most=st.integers(1, 50),
    start=st.floats(0, 1e4), length=st.floats(0.01, 600), seed=st.none() | st.integers(0, 9),
)  # fmt: skip
def test_a_clip_is_looked_at_in_equal_parts(
    number: int | None, fps: float, most: int, start: float, length: float, seed: int | None
) -> None:
    drawn = None if seed is None else np.random.default_rng(seed)
    times = Sampling(number, None if number else fps, most).times(start, start + length, drawn)
    count = len(times)
    assert count == (number or min(max(round((start + length - start) * fps), 1), most))
    step, hair = length / count, 1e-9 * (start + length)
    places = start + np.arange(count) * step
    assert (places - hair <= times).all() and (times <= places + step + hair).all()
    if seed is None:
        np.testing.assert_allclose(times, places + step / 2, rtol=0, atol=hair)


# cuts and splits ------------------------------------------------------------------------------------------------------


@examples(60)
@given(
    start=st.floats(0, 100), length=st.floats(0.5, 500),
    parts=st.sampled_from([(0.7, 0.15, 0.15), (0.5, 0.5, 0.0), (0, 0, 1)]),
    gap=st.sampled_from([0.0, 0.1, 2.0]),
)  # fmt: skip
def test_a_clip_that_is_cut_in_time_is_in_one_split_at_a_time(
    start: float, length: float, parts: tuple[float, ...], gap: float
) -> None:
    clip = VideoClip(Path("a.mp4"), start, start + length, "x")
    cut = cut_clips([clip], parts, gap=gap)
    wanted = [split for split, part in zip(("train", "val", "test"), parts, strict=True) if part > 0]
    assert cut[0].start == clip.start and cut[-1].end == clip.end
    if len(cut) == 1 and len(wanted) > 1:
        assert length <= gap * (len(wanted) - 1) * (1 + 1e-9) and cut[0].split == "train"
        return
    assert [part.split for part in cut] == wanted
    assert all(part.start < part.end for part in cut)
    assert all(b.start == a.end + gap for a, b in itertools.pairwise(cut))


@examples(60)
@given(
    held_out=st.integers(1, 3), times=st.integers(3, 6), length=st.floats(10, 500), gap=st.sampled_from([0.0, 0.2]),
)  # fmt: skip
def test_every_piece_is_tested_in_one_fold(held_out: int, times: int, length: float, gap: float) -> None:
    clip, parts = VideoClip(Path("a.mp4"), 3.0, 3.0 + length, "x"), held_out * times
    tested = []
    for fold in range(times):
        cut = leave_out([clip], parts=parts, held_out=held_out, fold=fold, gap=gap)
        splits = [piece.split for piece in cut]
        assert len(cut) == parts and splits.count("test") == held_out and splits.count("val") == 1
        assert all(a.end <= b.start + 1e-9 for a, b in itertools.pairwise(cut))
        for a, b in itertools.pairwise(cut):
            assert a.split == b.split or b.start - a.end >= gap - 1e-9
        tested += [place for place, split in enumerate(splits) if split == "test"]
    assert sorted(tested) == list(range(parts))


@examples(40)
@given(
    rows=st.lists(
        st.tuples(st.integers(0, 9), st.integers(0, 2), st.none() | st.sampled_from("pqrs")), min_size=1, max_size=25
    ),
    ratio=st.sampled_from([(0.8, 0.1, 0.1), (0.4, 0.3, 0.3), (0.7, 0.3, 0.0)]), seed=st.integers(0, 5),
    every=st.booleans(),
)  # fmt: skip
def test_splits_share_no_file_and_no_group(
    rows: list[tuple[int, int, str | None]], ratio: tuple[float, ...], seed: int, every: bool
) -> None:
    clips = [
        VideoClip(Path(f"/d/{file}.mp4"), float(place), place + 1.0, f"l{label}", group)
        for place, (file, label, group) in enumerate(rows)
    ]
    try:
        found = assign_splits(clips, ratio, seed=seed, every_label=every)
    except UserError as error:
        assert "needs" in str(error) or "no training clip has the label" in str(error)
        return
    assert [clip._replace(split="") for clip in found] == clips and shared_between(found) == []
    for keys in ([clip.name for clip in found], [clip.group for clip in found]):
        for key in {key for key in keys if key is not None}:
            assert len({clip.split for own, clip in zip(keys, found, strict=True) if own == key}) == 1
    assert {clip.split for clip in found} == {
        s for s, part in zip(("train", "val", "test"), ratio, strict=True) if part
    }
    elsewhere = [clip._replace(path=Path("/other/place") / clip.path.name) for clip in clips]
    assert [clip.split for clip in assign_splits(elsewhere, ratio, seed=seed, every_label=every)] == [
        clip.split for clip in found
    ]
    order = random.Random(seed).sample(range(len(clips)), len(clips))
    again = assign_splits([clips[i] for i in order], ratio, seed=seed, every_label=every)
    assert [clip.split for clip in again] == [found[i].split for i in order]


# markers of time ------------------------------------------------------------------------------------------------------


@examples(60)
@given(
    pairs=st.lists(st.tuples(st.integers(0, 9999), st.integers(0, 9999)), max_size=4),
    words=st.text("ab -.,:\n", max_size=6),
)
def test_times_in_markers_there_and_back(pairs: list[tuple[int, int]], words: str) -> None:
    ordered = [(min(pair) / 10, max(pair) / 10) for pair in pairs]
    assert all(decode_time(encode_time(start)) == start for start, _ in ordered)
    text = "; ".join(f"{start} - {end} s" for start, end in ordered)
    coded = encode_ranges(text)
    assert find_ranges(coded) == ordered and decode_text(coded) == text
    assert encode_ranges(coded) == coded and decode_text(encode_ranges(words)) == words


# audio in pieces ------------------------------------------------------------------------------------------------------


class Frames:
    """A front end whose frames are sums of whole numbers: exact, however they are cut."""

    def __init__(self, hop: int, length: int) -> None:
        self.hop_length, self.frame_length, self.sample_rate = hop, length, 1

    def num_frames(self, samples: int) -> int:
        return max((samples - self.frame_length + self.hop_length - 1) // self.hop_length + 1, 1) if samples > 0 else 0


class Encoder:
    """Tokens that are a frame's sum with those of `reach` frames to either side, and the place of the frame."""

    streaming, sample_rate = False, 1
    proj = SimpleNamespace(weight=torch.zeros(1))

    def __init__(self, front: Frames, reach: int) -> None:
        self.front_end, self.reach = front, reach

    def features(self, batch: torch.Tensor, lengths: torch.Tensor | None = None) -> Any:
        front = self.front_end
        ends = [batch.shape[1]] * len(batch) if lengths is None else lengths.tolist()
        numbers = [front.num_frames(end) for end in ends]
        found = torch.zeros(len(batch), max(numbers), dtype=torch.float64)
        for row, number in enumerate(numbers):
            for frame in range(number):
                first = frame * front.hop_length
                found[row, frame] = batch[row, first : min(first + front.frame_length, ends[row])].double().sum()
        return SimpleNamespace(features=found, lengths=torch.tensor(numbers))

    def encode(self, features: torch.Tensor, lengths: torch.Tensor, *, start: torch.Tensor) -> Any:
        near = torch.nn.functional.pad(features, (self.reach, self.reach)).unfold(1, 2 * self.reach + 1, 1).sum(-1)
        place = start.view(-1, 1) + torch.arange(features.shape[1])
        return SimpleNamespace(y=torch.stack((near, place.double()), -1))


@examples(40)
@given(
    frames=st.integers(1, 90), hop=st.integers(1, 7), length=st.integers(1, 9), piece=st.integers(1, 60),
    reach=st.integers(0, 3), more=st.integers(0, 2), batch=st.integers(1, 4),
)  # fmt: skip
def test_windows_of_a_recording_are_put_together_without_a_seam(
    frames: int, hop: int, length: int, piece: int, reach: int, more: int, batch: int
) -> None:
    assume(length >= hop)  # as in a front end: no sample is left out
    samples = np.arange(1, frames + 1, dtype=np.float32)
    front = Frames(hop, length)
    encoder = Encoder(front, reach)
    asked = []

    def read(start: int, stop: int) -> np.ndarray:
        asked.append((start, stop))
        assert 0 <= start < stop <= frames
        return samples[start:stop]

    source = SimpleNamespace(name="a", frames=frames, sample_rate=1, samples=read)
    pieces = list(
        stream(
            encoder, lambda y: y, source, piece_seconds=piece, context_seconds=(reach + more) * hop, batch_size=batch
        )
    )
    whole = encoder.features(torch.from_numpy(samples)[None])
    expected = encoder.encode(whole.features, whole.lengths, start=torch.zeros(1)).y[0]
    assert [found.first for found in pieces] == list(np.cumsum([0, *[len(found.values) for found in pieces[:-1]]]))
    assert torch.equal(torch.cat([found.values for found in pieces]), expected)
    tokens = max(round(piece / hop), 1)
    assert all(stop - start <= (tokens + 2 * (reach + more)) * hop + length for start, stop in asked)


@examples(60)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=12), draw=RANDOM)
def test_a_file_is_read_forwards_in_any_steps(sizes: list[int], draw: random.Random) -> None:
    samples = np.arange(sum(sizes), dtype=np.float32)
    ends = np.cumsum([0, *sizes])
    blocks = [samples[a:b] for a, b in itertools.pairwise(ends)]
    source = FileSource(SimpleNamespace(name="a", frames=len(samples), rate=1, blocks=lambda seconds: iter(blocks)))
    start = 0
    for _ in range(12):
        start = draw.randint(start, len(samples) - 1)
        stop = draw.randint(start + 1, len(samples))
        np.testing.assert_array_equal(source.samples(start, stop), samples[start:stop])


@examples(40)
@given(
    lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4), window=st.integers(1, 30),
    numbers=st.integers(0, 2**40), draw=RANDOM,
)  # fmt: skip
def test_training_windows_lie_in_their_recording_and_have_its_events(
    lengths: list[int], window: int, numbers: int, draw: random.Random
) -> None:
    recordings = []
    for place, frames in enumerate(lengths):
        truth = []
        for _ in range(draw.randint(0, 3)):
            begin = draw.randint(0, frames - 1)
            truth.append((float(begin), float(draw.randint(begin + 1, frames)), place))
        data = np.arange(frames, dtype=np.float32) + 100 * place
        recordings.append(
            SimpleNamespace(
                name=str(place),
                frames=frames,
                sample_rate=1,
                seconds=float(frames),
                truth=sorted(truth),
                samples=lambda start, stop, data=data: data[start:stop],
            )
        )
    windows = FileWindows(recordings, seconds=float(window), seed=1)
    batch = windows[np.arange(numbers, numbers + 4)]
    again = windows[np.arange(numbers + 1, numbers + 3)]
    assert torch.equal(batch["samples"][1:3], again["samples"])
    for row in range(4):
        recording, start = recordings[int(batch["recording"][row])], int(batch["start"][row])
        length = int(batch["lengths"][row])
        assert length == min(window, recording.frames) and 0 <= start <= recording.frames - length
        expected = np.zeros(window, np.float32)
        expected[:length] = recording.samples(start, start + length)
        np.testing.assert_array_equal(batch["samples"][row], expected)
        inside = [
            (max(a - start, 0.0), min(b - start, float(length)))
            for a, b, _ in recording.truth
            if a < start + length and b > start
        ]
        real = batch["classes"][row] >= 0
        assert list(map(tuple, batch["spans"][row][real].tolist())) == inside


# composed videos ------------------------------------------------------------------------------------------------------


class Reader:
    """A video that nobody decodes."""

    def __init__(self, name: str, steps: list[float]) -> None:
        self.name, self.path, self.size, self.key = name, Path(name), (2, 2), name
        edges = np.concatenate(([0.0], np.cumsum(steps)))
        self.times, self.duration = edges[:-1], float(edges[-1])

    def __len__(self) -> int:
        return len(self.times)

    def identities(self, indices: list[int]) -> list[tuple[str, int]]:
        return [(self.key, int(i)) for i in indices]

    def close(self) -> None:
        pass


@examples(30)
@given(
    steps=st.tuples(*[st.sampled_from([0.04, 0.1, 1 / 3, 0.5])] * 3), slack=st.sampled_from([1e-6, 0.1, 1.0, 20.0]),
    number=st.integers(1, 6), min_gap=st.sampled_from([0.0, 0.37, 2.0]),
    event_seconds=st.none() | st.sampled_from([0.7, (0.5, 3.0)]), speed=st.sampled_from([1.0, (0.5, 2.0)]),
    flip=st.booleans(), seed=st.integers(0, 10**6),
)  # fmt: skip
@example(
    steps=(1 / 3,) * 3, slack=1e-6, number=6, min_gap=0.37, event_seconds=None, speed=1.0, flip=False, seed=0
)  # it was five frames longer than asked
def test_composed_videos_are_as_long_as_asked_and_show_their_events(
    steps: tuple[float, ...], slack: float, number: int, min_gap: float, event_seconds: Any, speed: Any, flip: bool,
    seed: int,
) -> None:  # fmt: skip
    readers = {name: Reader(name, [step] * count) for name, step, count in zip("abc", steps, (40, 25, 31), strict=True)}
    half, whole = readers["a"].times[20], 20
    clips = [
        VideoClip(Path("a"), 0.0, half, "bird"),
        VideoClip(Path("a"), half, None, "sky", shows=("cat",)),
        VideoClip(Path("b"), 0.0, readers["b"].times[10], "cat"),
        VideoClip(Path("c"), 0.0, None, "grass"),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_composer, "open_video", lambda path, **options: readers[str(path)])
        composer = video_composer.Composer(
            clips[:3:2], clips, size=(2, 2), min_gap=min_gap, event_seconds=event_seconds, speed=speed, flip=flip
        )
    roomy = composer.plan(200.0, seed, number=number)
    needed = sum(event.end - event.start for event in roomy.events) + number * min_gap
    frame = max(steps) / (speed[0] if isinstance(speed, tuple) else speed)
    for video, seconds in ((roomy, 200.0), (composer.plan(needed + slack, seed, number=number), needed + slack)):
        assert seconds - 1e-3 <= video.duration < seconds + frame + 1e-3
        assert len(video.events) == number
        least = min_gap if seconds - needed > (number + 1) * frame else max(min_gap - frame, 0.0)
        edges = [0.0, *itertools.chain.from_iterable((e.start, e.end) for e in video.events)]
        assert all(b - a >= least - 1e-6 for a, b in zip(edges[::2], edges[1::2], strict=False))
        identities = [(key.split()[0], own) for key, own in video.identities(np.arange(len(video)))]
        planted = set()
        for event in video.events:
            name, own = {"bird": ("a", range(whole)), "cat": ("b", range(10))}[event.label]
            places = range(event.first, event.stop)
            assert all(identities[place][0] == name and identities[place][1] in own for place in places)
            assert (video.times[event.first], event.label) == (pytest.approx(event.start), event.label)
            planted |= set(places)
            if event_seconds is not None:
                low, high = event_seconds if isinstance(event_seconds, tuple) else (event_seconds,) * 2
                assert low - frame - 1e-3 <= event.end - event.start <= high + 2 * frame + 1e-3
        beside = {identities[place] for place in range(len(video)) if place not in planted}
        labels = {event.label for event in video.events}
        assert not beside & {("a", i) for i in range(whole) if "bird" in labels}
        assert not beside & {("b", i) for i in range(10) if "cat" in labels}
        assert not beside & {("a", i) for i in range(whole, 40) if "cat" in labels}  # which the sky shows
        assert (np.diff(video.times) > 0).all() and video.times[0] == 0 and video.times[-1] < video.duration
        assert video.index_at(video.times).tolist() == list(range(len(video)))
        with pytest.raises(UserError, match="do not fit"):
            composer.plan(needed * 0.9 - 0.01, seed, number=number) if needed > 1 else composer.plan(0.1, 0, number=50)


@examples(15)
@given(
    kinds=st.integers(1, 3), negatives=st.sampled_from([0.0, 0.5, 0.99]), seed=st.integers(0, 10**6),
    fps=st.sampled_from([1.0, 2.0, 10.0]), seconds=st.sampled_from([8.0, 20.0]),
)  # fmt: skip
@example(kinds=1, negatives=0.99, seed=0, fps=2.0, seconds=8.0)  # of one label, no window could be without it
def test_windows_to_train_on_show_their_query_where_they_say(
    kinds: int, negatives: float, seed: int, fps: float, seconds: float
) -> None:
    readers = {name: Reader(name, [0.1] * 40) for name in "abcg"}
    clips = [VideoClip(Path(name), 0.0, None, f"label {name}") for name in "abc"[:kinds]]
    footage = [VideoClip(Path("g"), 0.0, None, "grass")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(video_composer, "open_video", lambda path, **options: readers[str(path)])
        composer = video_composer.Composer(
            clips, footage, min_gap=0.5, events_per_video=(0, 1), event_seconds=(1.0, 3.0)
        )
    # a frame's vector says which clip it is of
    bank = SimpleNamespace(
        at=lambda video, indices: np.array(
            [[float(key.split()[0] == name) for name in "abcg"] for key, _ in video.identities(indices)], np.float32
        )
    )
    queries = {clip.label: np.full(1, place, np.float32) for place, clip in enumerate(clips)}
    windows = ComposedWindows(composer, bank, queries, seconds=seconds, fps=fps, negatives=negatives, seed=seed)
    batch, later = windows[np.arange(6)], windows[np.arange(3, 6)]
    for key in ("query", "inside"):
        width = later[key].shape[1]
        assert torch.equal(batch[key][3:, :width], later[key])  # whatever else is in the batch
    for row in range(6):
        real = batch["mask"][row]
        shown = batch["features"][row, real, int(batch["query"][row, 0])]
        assert torch.equal(shown, batch["inside"][row, real])
        assert not batch["inside"][row, ~real].any() and (batch["times"][row, real].diff() > 0).all()
        first, last = batch["edges"][row, real].unbind(-1)
        assert not batch["edges"][row, ~real].any()
        change = torch.nn.functional.pad(shown, (1, 1)).diff()
        assert torch.equal(first > 0, change[:-1] > 0) and torch.equal(last > 0, change[1:] < 0)
        assert first.sum() == last.sum() == pytest.approx(float(shown.any()))


# composed recordings --------------------------------------------------------------------------------------------------

RATE = 1000


@pytest.fixture(scope="module")
def sounds(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Any], list[Any]]:
    """Clips of two labels and backgrounds, one of them with silence in it."""
    soundfile = pytest.importorskip("soundfile", reason="needs seqzoo[audio]")
    from seqzoo.pipelines.audio.backgrounds import Background
    from seqzoo.pipelines.audio.clips import Clip

    folder, rng = tmp_path_factory.mktemp("sounds"), np.random.default_rng(0)
    clips, backgrounds = [], []
    for number, (label, length) in enumerate([("x", 150), ("x", 400), ("y", 60), ("y", 900)]):
        soundfile.write(folder / f"{number}.wav", 0.5 * rng.standard_normal(length).clip(-1, 1), RATE, subtype="FLOAT")
        clips.append(Clip(folder / f"{number}.wav", 0.0, None, label))
    for name, length, quiet in (("a", 9000, 0), ("b", 4000, 2500)):
        noise = 0.2 * rng.standard_normal(length)
        noise[:quiet] = 0
        soundfile.write(folder / f"{name}.wav", noise, RATE, subtype="FLOAT")
        backgrounds.append(Background(folder / f"{name}.wav", RATE))
    return clips, backgrounds


@examples(25)
@given(
    seconds=st.floats(1.0, 12.0), per_minute=st.sampled_from([0.0, 10.0, 60.0, 300.0]), overlap=st.booleans(),
    min_gap=st.sampled_from([0.0, 0.1]), snr_db=st.sampled_from([0.0, 45.0, (-10.0, 30.0)]),
    speed=st.sampled_from([1.0, (0.7, 1.4)]), crossfade=st.sampled_from([0.001, 0.3]),
    seed=st.integers(0, 10**6), draw=RANDOM,
)  # fmt: skip
def test_composed_recordings_are_what_was_mixed(
    seconds: float, per_minute: float, overlap: bool, min_gap: float, snr_db: Any, speed: Any, crossfade: float,
    seed: int, draw: random.Random, sounds: tuple[list[Any], list[Any]],
) -> None:  # fmt: skip
    from seqzoo.pipelines.audio.composer import PEAK, SILENCE, Composer

    composer = Composer(
        *sounds, sample_rate=RATE, snr_db=snr_db, events_per_minute=per_minute, overlap=overlap, min_gap=min_gap,
        speed=speed, crossfade=crossfade, piece_seconds=(0.5, 3.0),
    )  # fmt: skip
    try:
        plan = composer.plan(seconds, [seed])
    except UserError as error:
        assert "do not fit" in str(error) or "more than the recording" in str(error)
        return
    frames, gap = plan.frames, round(min_gap * RATE)
    assert frames == round(seconds * RATE)
    # pieces follow each other over all of it
    assert plan.pieces[0].start == 0 and plan.pieces[-1].stop - composer.fade >= frames
    for before, after in itertools.pairwise(plan.pieces):
        assert after.start == before.stop - composer.fade
    for piece in plan.pieces:
        assert piece.offset >= 0 and piece.offset + piece.stop - piece.start <= len(plan.backgrounds[piece.source])
    # events are in it, in order, and apart
    assert all(0 <= event.start < event.stop <= frames for event in plan.events)
    assert [event.start for event in plan.events] == sorted(event.start for event in plan.events)
    for label in "xy" if overlap else ("",):
        own = [event for event in plan.events if label in ("", event.label)]
        assert all(b.start - a.stop >= gap for a, b in itertools.pairwise(own))
    assert plan.truth() == [(event.start / RATE, event.stop / RATE, event.label) for event in plan.events]
    # the samples are the mixture, each event as loud as is said
    behind = plan.background(0, frames)
    mixed = behind.astype(np.float64)
    low, high = snr_db if isinstance(snr_db, tuple) else (snr_db, snr_db)
    for event in plan.events:
        sound = event.planted.sound(plan.bank).astype(np.float64) * event.gain
        assert len(sound) == event.stop - event.start and plan.bank.clips[event.planted.clip].label == event.label
        mixed[event.start : event.stop] += sound
        noise = max((behind[event.start : event.stop].astype(np.float64) ** 2).sum(), SILENCE * len(sound))
        assert low <= event.snr_db <= high
        assert 10 * np.log10((sound**2).sum() / noise) == pytest.approx(event.snr_db, abs=1e-3)
    samples = plan.samples()
    np.testing.assert_allclose(samples, mixed * plan.gain, rtol=0, atol=1e-5)
    assert np.abs(samples).max() <= PEAK + 1e-5 and 0 < plan.gain <= 1
    for _ in range(3):
        start = draw.randint(0, frames - 1)
        stop = draw.randint(start + 1, frames)
        np.testing.assert_array_equal(plan.samples(start, stop), samples[start:stop])
