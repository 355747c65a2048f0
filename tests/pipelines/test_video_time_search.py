"""Best-first search in time: on scripted oracles, its order, its budgets, and how frames are shared out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.video.time_search import (
    Spot,
    Trace,
    Window,
    allot,
    best_evidence,
    evidence_frames,
    merge_windows,
    middles,
    search_time,
    split,
    window_iou,
)

FAST = settings(max_examples=60, deadline=None)
HOUR = 3600.0


class Oracle:
    """Knows the events. Spotlight sees a frame's neighbourhood, so it names the stretch between the frames around an
    event; Reflection is as sure as the event fills the window."""

    def __init__(self, *events: tuple[float, float], hint: bool = True) -> None:
        self.events, self.hint = events, hint
        self.located: list[tuple[Window, np.ndarray]] = []
        self.verified: list[tuple[Window, np.ndarray]] = []

    def locate(self, window: Window, frames: np.ndarray) -> list[tuple[float, float]]:
        self.located.append((window, frames))
        edges = np.concatenate(([window.start], frames, [window.end]))
        found = []
        for start, end in self.events:
            if start < window.end and window.start < end and (self.hint or self.seen((start, end), frames)):
                found.append(
                    (edges[edges <= start].max(initial=window.start), edges[edges >= end].min(initial=window.end))
                )
        return found

    def seen(self, event: tuple[float, float], frames: np.ndarray) -> bool:
        return bool(((frames >= event[0]) & (frames < event[1])).any())

    def reflect(self, window: Window, frames: np.ndarray) -> float:
        self.verified.append((window, frames))
        inside = [max(0.0, min(b, window.end) - max(a, window.start)) for a, b in self.events]
        return min(1.0, 0.1 + sum(inside) / window.seconds) if sum(inside) else 0.0

    def search(self, seconds: float = HOUR, **options: Any) -> Trace:
        return search_time((0.0, seconds), self.locate, self.reflect, **options)


# finding --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", [0.0, 13.7, 1799.0, 1800.5, 2999.9, 3598.0])
def test_two_seconds_of_an_hour_are_found_in_a_few_calls(place: float) -> None:
    oracle = Oracle((place, place + 2))
    trace = oracle.search(frames=32, max_depth=10, tau_stop=0.6)
    assert trace.stopped == "sure" and trace.calls <= 8
    best = max(trace.evidence, key=lambda spot: spot.confidence).window
    assert best.start <= place and place + 2 <= best.end and best.seconds < 4
    assert trace.calls == len(oracle.located) + len(oracle.verified)


@pytest.mark.parametrize("frames", [4, 8, 32])
def test_calls_grow_with_the_logarithm_of_the_length(frames: int) -> None:
    calls = []
    for factor in range(8):
        seconds = HOUR * 4**factor
        trace = Oracle((0.61 * seconds, 0.61 * seconds + 2)).search(
            seconds, frames=frames, max_depth=50, tau_stop=0.6, max_calls=1000
        )
        assert trace.stopped == "sure"
        # a look narrows to two steps or three: by about frames / 2 a time, with one call to locate and one to verify
        assert trace.calls <= 2 * (math.ceil(math.log(seconds / 2) / math.log((frames + 1) / 3)) + 1)
        calls.append(trace.calls)
    assert calls[-1] <= calls[0] + 7 * 2 * math.ceil(math.log(4) / math.log((frames + 1) / 3))
    assert calls[-1] > calls[0]


def test_an_event_that_no_frame_shows_is_met_by_splitting() -> None:
    """Without a hint, parts of parts are looked at until a frame falls into the event."""
    oracle = Oracle((2000.0, 2002.0), hint=False)
    trace = oracle.search(frames=32, max_depth=3, tau_stop=0.2, max_calls=200)
    assert trace.stopped == "sure"
    assert oracle.seen((2000.0, 2002.0), np.concatenate([look.frames for look in trace.looks]))
    first = trace.looks[0]
    assert [spot.window for spot in first.pushed] == split(Window(0.0, HOUR), 4)
    assert all(spot.confidence == 0.5 and spot.depth == 1 for spot in first.pushed)
    # all parts of one depth come before those of the next, in their order
    depths = [look.depth for look in trace.looks]
    assert depths == sorted(depths)
    starts = [look.window.start for look in trace.looks if look.depth == 1]
    assert starts == [0.0, 900.0, 1800.0, 2700.0]


def test_several_events_are_all_evidence() -> None:
    events = (100.0, 104.0), (1500.0, 1502.0), (3000.0, 3010.0)
    trace = Oracle(*events).search(max_depth=8, tau_stop=None, max_calls=200)
    kept = best_evidence(trace.evidence, 4)
    assert len(kept) == 3
    for spot, (start, end) in zip(kept, events, strict=True):
        assert spot.window.start <= start and end <= spot.window.end
    assert trace.stopped == "empty"


def test_nothing_to_find_ends_with_nothing() -> None:
    trace = Oracle().search(frames=4, max_depth=2, max_calls=1000)
    assert not trace.evidence and trace.stopped == "empty"
    assert len(trace.looks) == 1 + 4 + 16 and trace.calls == 21
    assert trace.looks[-1].window == Window(3375.0, 3600.0)
    # parts below the shortest are not made
    trace = Oracle().search(40.0, frames=4, max_depth=9, min_seconds=10.0)
    assert [look.window.seconds for look in trace.looks] == [40, 10, 10, 10, 10]


# order and budgets ----------------------------------------------------------------------------------------------------


class Noise:
    """Answers of any kind, the same for the same window."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def draw(self, window: Window, kind: int) -> np.random.Generator:
        return np.random.default_rng(
            [self.seed, kind, int(window.start * 1000) + 10**7, int(window.end * 1000) + 10**7]
        )

    def locate(self, window: Window, frames: np.ndarray) -> list[tuple[float, float]]:
        rng = self.draw(window, 0)
        middles_ = rng.uniform(window.start - 5, window.end + 5, int(rng.integers(0, 4)))
        return [(m - w, m + w) for m, w in zip(middles_, rng.uniform(0, window.seconds / 3, 4), strict=False)]

    def reflect(self, window: Window, frames: np.ndarray) -> float:
        return float(self.draw(window, 1).choice([0.0, 0.2, 0.5, 0.5, 0.7, 0.95]))


@given(
    seed=st.integers(0, 10**6),
    calls=st.integers(1, 60),
    frames=st.one_of(st.none(), st.integers(1, 300)),
    per_look=st.integers(1, 20),
    tau_stop=st.sampled_from([None, 0.9]),
)
@FAST
def test_order_and_budgets(seed: int, calls: int, frames: int | None, per_look: int, tau_stop: float | None) -> None:
    noise = Noise(seed)
    asked: list[tuple[Window, np.ndarray]] = []

    def locate(window: Window, given_: np.ndarray) -> list[tuple[float, float]]:
        asked.append((window, given_))
        return noise.locate(window, given_)

    def reflect(window: Window, given_: np.ndarray) -> float:
        asked.append((window, given_))
        return noise.reflect(window, given_)

    options: dict[str, Any] = {
        "frames": per_look,
        "reflect_frames": 3,
        "max_calls": calls,
        "max_frames": frames,
        "tau_stop": tau_stop,
        "max_depth": 4,
    }
    trace = search_time((10.0, 250.0), locate, reflect, **options)
    # budgets
    seen = {frame for _, given_ in asked for frame in given_.tolist()}
    assert trace.calls == len(asked) <= calls and trace.frames == len(seen)
    assert frames is None or len(seen) <= frames
    for window, given_ in asked:
        assert len(given_) >= 1 and (given_ >= window.start).all() and (given_ < window.end).all()
    # never a less sure window before a surer one, ties by start: the heap rebuilt from the trace
    waiting = [(-1.0, 10.0, 240.0, 0)]
    for look in trace.looks:
        entry = (-look.confidence, look.window.start, look.window.seconds, look.depth)
        assert entry == min(waiting)
        waiting.remove(entry)
        waiting += [(-s.confidence, s.window.start, s.window.seconds, s.depth) for s in look.pushed]
        for spot in look.spotted:
            assert look.window.start <= spot.window.start < spot.window.end <= look.window.end
            assert spot.window.seconds >= min(1.0, look.window.seconds) - 1e-9 and spot.depth == look.depth + 1 <= 5
        for a, spot in enumerate(look.spotted):
            assert all(window_iou(spot.window, other.window) <= 0.5 for other in look.spotted[:a])
        assert all(spot.depth <= 4 for spot in look.pushed)
    if trace.stopped == "empty":
        assert not waiting
    assert list(trace.evidence) == [s for look in trace.looks for s in look.spotted if s.confidence >= 0.5]
    sure = [any(s.confidence >= 0.9 for s in look.spotted) for look in trace.looks]
    if tau_stop is not None:
        assert not any(sure[:-1]) and (not sure or sure[-1] == (trace.stopped == "sure") or trace.stopped != "empty")
    # the same again
    again = search_time((10.0, 250.0), noise.locate, noise.reflect, **options)
    assert repr(again) == repr(trace)


def test_equally_sure_windows_come_by_their_start() -> None:
    popped: list[Window] = []

    def locate(window: Window, frames: np.ndarray) -> list[tuple[float, float]]:
        popped.append(window)
        return [(700.0, 800.0), (100.0, 200.0), (400.0, 500.0)] if len(popped) == 1 else [window]

    search_time((0.0, 1000.0), locate, lambda window, frames: 0.6, max_depth=1)
    assert popped[1:] == []  # of depth 1 nothing is pushed
    popped.clear()
    search_time((0.0, 1000.0), locate, lambda window, frames: 0.6, max_depth=2)
    assert popped[1:] == [(100.0, 200.0), (400.0, 500.0), (700.0, 800.0)]


def test_frames_that_were_seen_cost_nothing() -> None:
    """Budget of frames by hand: a grid of whole seconds, of which four are left for the second window of ten."""
    looked: list[list[float]] = []

    def grid(window: Window, number: int) -> np.ndarray:
        return np.arange(math.ceil(window.start), math.ceil(window.end), dtype=float)[:number]

    def locate(window: Window, frames: np.ndarray) -> list[tuple[float, float]]:
        looked.append(frames.tolist())
        return [(2.0, 8.0)] if window.seconds > 6 else []

    def reflect(window: Window, frames: np.ndarray) -> float:
        looked.append(frames.tolist())
        return 0.5

    trace = search_time(
        (0.0, 10.0), locate, reflect, grid=grid, frames=100, root_frames=4, reflect_frames=4, max_frames=7
    )
    assert looked[0] == [0, 1, 2, 3]
    assert looked[1] == [2, 3, 4, 5]  # two of them new
    assert looked[2] == [2, 3, 4, 5, 7]  # 6 and 7 are new, one is left: the later of the two middles
    assert trace.frames == 7
    trace = search_time((0.0, 10.0), locate, reflect, grid=grid, frames=100, root_frames=4, max_frames=4)
    assert trace.frames == 4 and trace.stopped in ("empty", "frames")


def test_every_look_is_in_the_trace() -> None:
    oracle = Oracle((50.0, 60.0))
    trace = oracle.search(100.0, frames=10, reflect_frames=2, max_depth=2, tau_stop=None)
    first = trace.looks[0]
    assert first.window == Window(0.0, 100.0) and first.confidence == 1.0 and first.depth == 0
    assert first.spotted == (Spot(Window(45.0, 65.0), 0.6, 1),)
    assert first.pushed == first.spotted
    assert first.frames.tolist() == sorted({*np.arange(5.0, 100.0, 10).tolist(), 50.0, 60.0})
    assert [look.window for look in trace.looks][1] == Window(45.0, 65.0)
    assert trace.evidence[0] == first.spotted[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"window": (5.0, 5.0)}, r"window=\(5.0, 5.0\) must be a start and a later end"),
        ({"window": (0.0, math.inf)}, r"window=\(0.0, inf\) must be"),
        ({"frames": 0}, r"frames=0 must be a whole number of at least 1"),
        ({"reflect_frames": 0}, r"reflect_frames=0"),
        ({"max_calls": 0}, r"max_calls=0"),
        ({"max_frames": 0}, r"max_frames=0"),
        ({"max_depth": -1}, r"max_depth=-1"),
        ({"parts": 1}, r"parts=1 must be a whole number of at least 2"),
        ({"tau": 1.5}, r"tau=1.5 must be a number from 0 to 1"),
        ({"tau_stop": math.nan}, r"tau_stop=nan must be"),
        ({"part_share": -0.1}, r"part_share=-0.1 must be"),
        ({"min_seconds": 0}, r"min_seconds=0 must be a number above 0"),
        ({"reflect": lambda w, f: 1.2}, r"reflect gave 1.2 for 0 to 100 s; confidences are in 0 .. 1"),
        ({"reflect": lambda w, f: math.nan}, r"reflect gave nan"),
    ],
)
def test_wrong_settings_are_named(options: dict[str, Any], said: str) -> None:
    right: dict[str, Any] = {
        "window": (0.0, 100.0),
        "locate": lambda window, frames: [window],
        "reflect": lambda window, frames: 0.5,
    }
    with pytest.raises(UserError, match=said):
        search_time(**{**right, **options})


# windows --------------------------------------------------------------------------------------------------------------


def test_windows_are_clipped_lengthened_and_merged() -> None:
    inside = Window(10.0, 110.0)
    assert merge_windows([(0.0, 20.0), (100.0, 300.0)], inside) == [(10.0, 20.0), (100.0, 110.0)]
    assert merge_windows([(0.0, 9.0), (200.0, 210.0), (30.0, 30.0), (50.0, 40.0)], inside) == []
    # at least two seconds, around the middle, within the window
    assert merge_windows([(50.0, 51.0)], inside, min_seconds=2.0) == [(49.5, 51.5)]
    assert merge_windows([(10.2, 10.4)], inside, min_seconds=2.0) == [(10.0, 12.0)]
    assert merge_windows([(109.0, 111.0)], inside, min_seconds=2.0) == [(108.0, 110.0)]
    assert merge_windows([(10.5, 10.6)], Window(10.0, 11.0), min_seconds=2.0) == [(10.0, 11.0)]
    # IoU 6/14 is not above 0.5, 7/13 is; what was merged may be merged again
    assert merge_windows([(20.0, 30.0), (24.0, 34.0)], inside) == [(20.0, 30.0), (24.0, 34.0)]
    assert merge_windows([(20.0, 30.0), (23.0, 33.0)], inside) == [(20.0, 33.0)]
    assert merge_windows([(23.0, 33.0), (20.0, 30.0), (20.0, 36.0)], inside) == [(20.0, 36.0)]
    assert merge_windows([(20.0, 30.0), (25.0, 35.0)], inside, iou=0.3) == [(20.0, 35.0)]


def test_parts_and_middles() -> None:
    assert split(Window(0.0, 10.0), 4) == [(0.0, 2.5), (2.5, 5.0), (5.0, 7.5), (7.5, 10.0)]
    assert split(Window(0.1, 0.7), 3)[-1].end == 0.7
    assert middles(Window(10.0, 20.0), 5).tolist() == [11, 13, 15, 17, 19]


def test_evidence_gives_way_to_what_is_surer_inside() -> None:
    wide, narrow = Spot(Window(0.0, 100.0), 0.8, 1), Spot(Window(40.0, 50.0), 0.8, 2)
    weak, apart = Spot(Window(60.0, 70.0), 0.6, 2), Spot(Window(200.0, 210.0), 0.5, 1)
    assert best_evidence([wide, narrow, weak, apart], 4) == [narrow, weak, apart]
    assert best_evidence([wide, narrow, weak, apart], 2) == [narrow, weak]
    surer = wide._replace(confidence=0.9)
    assert best_evidence([apart, narrow, surer], 4) == [surer, apart]
    assert best_evidence([narrow, narrow._replace(window=Window(50.0, 60.0))], 4)[1].window.start == 50
    assert best_evidence([], 4) == []


def test_frames_are_shared_out_by_confidence_and_seconds() -> None:
    spots = [Spot(Window(0.0, 10.0), 0.5, 1), Spot(Window(20.0, 40.0), 0.5, 1), Spot(Window(50.0, 55.0), 1.0, 1)]
    # weights 5, 10, 5
    assert allot(spots, 4) == [1, 2, 1]
    assert allot(spots, 8) == [2, 4, 2]
    assert allot(spots, 1) == [0, 1, 0]
    assert allot(spots, 2) == [1, 1, 0]  # of equal ones the earlier
    assert allot(spots, 5) == [1, 3, 1] or allot(spots, 5) == [2, 2, 1]
    assert allot(spots, 100, rooms=[3, 5, 4]) == [3, 5, 4]
    assert allot(spots, 9, rooms=[3, 2, 9]) == [3, 2, 4]
    assert allot([], 5) == []


def test_the_frames_to_answer_from() -> None:
    evidence = (
        Spot(Window(100.0, 110.0), 0.9, 2),
        Spot(Window(0.0, 30.0), 0.6, 1),
        Spot(Window(90.0, 120.0), 0.7, 1),  # gives way to the first
        Spot(Window(200.0, 210.0), 0.5, 1),
    )
    trace = Trace((), evidence, 0, 0, "empty")
    # weights 18, 9 and 5: three, two and one
    frames = evidence_frames(trace, 6)
    assert frames.tolist() == [5.0, 15.0, 25.0, 102.5, 107.5, 205.0]
    assert evidence_frames(trace, 6, number=1).tolist() == pytest.approx([100 + 10 * (i + 0.5) / 6 for i in range(6)])
    assert not len(evidence_frames(Trace((), (), 0, 0, "empty"), 6))


@given(
    weights=st.lists(st.tuples(st.floats(0.1, 1.0), st.floats(1.0, 100.0)), min_size=1, max_size=6),
    budget=st.integers(1, 60),
)
@FAST
def test_shares_are_proportional_and_grow(weights: list[tuple[float, float]], budget: int) -> None:
    spots = [Spot(Window(0.0, seconds), confidence, 1) for confidence, seconds in weights]
    given_ = allot(spots, budget)
    assert sum(given_) == budget
    assert all(a <= b for a, b in zip(given_, allot(spots, budget + 1), strict=True))
    if budget >= len(spots):
        assert min(given_) >= 1
    values = [confidence * seconds for confidence, seconds in weights]
    for i, own in enumerate(given_):
        for j, other in enumerate(given_):
            # no frame would be better given to another: Adams' rule
            if own > 1 and other > 0:
                assert values[i] / (own - 1) >= values[j] / other - 1e-9
