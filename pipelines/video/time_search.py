"""Best-first search in time: look at a window coarsely, spot sub-windows, verify them, go on with the surest."""

from __future__ import annotations

import heapq
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from ..errors import UserError, check_whole


class Window(NamedTuple):
    """start, end: seconds."""

    start: float
    end: float

    @property
    def seconds(self) -> float:
        return self.end - self.start


class Spot(NamedTuple):
    """A window and the confidence, in 0 .. 1, that it has what is looked for. depth: looks above it."""

    window: Window
    confidence: float
    depth: int


class Look(NamedTuple):
    """One window that was taken from the heap. frames: the times that were looked at, to locate and to verify. spotted:
    its sub-windows, verified. pushed: what it added to the heap, its parts where nothing was spotted."""

    window: Window
    confidence: float
    depth: int
    frames: np.ndarray
    spotted: tuple[Spot, ...]
    pushed: tuple[Spot, ...]


class Trace(NamedTuple):
    """looks: in their order. evidence: spots of at least tau, as they came. calls: of locate and reflect. frames: how
    many different ones were looked at. stopped: "sure", "empty", "calls" or "frames"."""

    looks: tuple[Look, ...]
    evidence: tuple[Spot, ...]
    calls: int
    frames: int
    stopped: str


Locate = Callable[[Window, np.ndarray], Sequence[tuple[float, float]]]
Reflect = Callable[[Window, np.ndarray], float]
Grid = Callable[[Window, int], np.ndarray]


def middles(window: Window, number: int) -> np.ndarray:
    """float64 (number,): the middles of `number` equal parts of the window, in seconds."""
    return window.start + (np.arange(number) + 0.5) * (window.end - window.start) / number


def search_time(
    window: tuple[float, float],
    locate: Locate,
    reflect: Reflect,
    *,
    frames: int = 32,
    root_frames: int | None = None,
    reflect_frames: int = 8,
    max_calls: int = 64,
    max_frames: int | None = None,
    tau: float = 0.5,
    tau_stop: float | None = 0.9,
    parts: int = 4,
    part_share: float = 0.5,
    max_depth: int = 3,
    min_seconds: float = 1.0,
    merge_iou: float = 0.5,
    grid: Grid = middles,
) -> Trace:
    """TimeSearch (arXiv:2504.01407), a reconstruction from its description: Spotlight locates, Reflection verifies.

    A heap starts with the whole window, confidence 1. Until a budget is spent, the heap is empty or a spot is as sure
    as tau_stop: take the window of the highest confidence, of equal ones the earlier start, then the shorter; look at
    `frames` frames in it; what `locate` finds is clipped to it, brought to min_seconds where shorter, and merged where
    two overlap by more than merge_iou (IoU); `reflect` gives each a confidence; from tau on it is evidence, and longer
    than min_seconds and less than max_depth deep it goes on the heap. Where nothing is found, `parts` equal parts go
    there with part_share of the window's confidence, as long as they are not shorter than min_seconds.

    locate: (window, frames (n,)) -> sub-windows [(start, end)]. reflect: (window, frames) -> confidence in 0 .. 1, for
    a model that answers yes or no P(yes) / (P(yes) + P(no)). grid: (window, number) -> at most so many frames to look
    at, any numbers, equal ones the same frame. frames, root_frames, reflect_frames: to locate in a window, in the first
    one (None: as in any), and to verify. max_calls: of both functions. max_frames: different frames, None: no limit; a
    look for which fewer are left is a coarser one, and what was looked at before costs nothing. tau_stop: None, never
    stop early.
    Raises UserError for values outside these and for confidences outside 0 .. 1.
    """
    root = Window(float(window[0]), float(window[1]))
    root_frames = frames if root_frames is None else root_frames
    counts = {"frames": frames, "root_frames": root_frames, "reflect_frames": reflect_frames, "max_calls": max_calls}
    for name, number in counts.items():
        check_whole(name, number, 1)
    check_whole("parts", parts, 2)
    check_whole("max_depth", max_depth, 0)
    if max_frames is not None:
        check_whole("max_frames", max_frames, 1)
    shares = {"tau": tau, "tau_stop": tau_stop, "part_share": part_share, "merge_iou": merge_iou}
    _check(root, {name: share for name, share in shares.items() if share is not None}, min_seconds)
    budget = _Budget(max_calls, max_frames, grid)
    heap = [_entry(Spot(root, 1.0, 0))]
    looks: list[Look] = []
    evidence: list[Spot] = []
    stopped = "empty"
    while heap:
        spot = heapq.heappop(heap)[-1]
        seen = budget.take(spot.window, frames if spot.depth else root_frames)
        if seen is None:
            stopped = budget.spent
            break
        found = merge_windows(locate(spot.window, seen), spot.window, min_seconds=min_seconds, iou=merge_iou)
        used, spotted = [seen], []
        for part in found:
            close = budget.take(part, reflect_frames)
            if close is None:
                break
            used.append(close)
            spotted.append(Spot(part, _confidence(reflect(part, close), part), spot.depth + 1))
        evidence += [inner for inner in spotted if inner.confidence >= tau]
        pushed = [inner for inner in spotted if inner.window.seconds > min_seconds and inner.depth < max_depth]
        if not found and spot.depth < max_depth and spot.window.seconds / parts >= min_seconds:
            pushed = [Spot(part, part_share * spot.confidence, spot.depth + 1) for part in split(spot.window, parts)]
        for inner in pushed:
            heapq.heappush(heap, _entry(inner))
        looks.append(Look(*spot, np.unique(np.concatenate(used)), tuple(spotted), tuple(pushed)))
        if len(spotted) < len(found):
            stopped = budget.spent
            break
        if tau_stop is not None and any(inner.confidence >= tau_stop for inner in spotted):
            stopped = "sure"
            break
    return Trace(tuple(looks), tuple(evidence), budget.calls, len(budget.seen), stopped)


def split(window: Window, parts: int) -> list[Window]:
    """The window in equal parts."""
    edges = [window.start + i * (window.end - window.start) / parts for i in range(parts)] + [window.end]
    return [Window(*pair) for pair in itertools.pairwise(edges)]


def merge_windows(
    found: Sequence[tuple[float, float]], inside: Window, *, min_seconds: float = 0.0, iou: float = 0.5
) -> list[Window]:
    """What was located, clipped to the window, at least min_seconds long where that has room for it, and two whose IoU
    is above `iou` as one, until there are none; by start. What lies outside is left out."""
    windows = []
    for start, end in found:
        start, end = max(float(start), inside.start), min(float(end), inside.end)
        if start < end:
            grow = max(min(min_seconds, inside.seconds) - (end - start), 0.0) / 2
            start, end = start - grow, end + grow
            shift = max(inside.start - start, 0.0) - max(end - inside.end, 0.0)
            windows.append(Window(max(start + shift, inside.start), min(end + shift, inside.end)))
    windows.sort()
    while True:
        pairs = [(i, j) for j in range(len(windows)) for i in range(j) if window_iou(windows[i], windows[j]) > iou]
        if not pairs:
            return windows
        first, second = pairs[0]
        one, other = windows.pop(second), windows.pop(first)
        windows = sorted([*windows, Window(min(one.start, other.start), max(one.end, other.end))])


def window_iou(one: Window, other: Window) -> float:
    """Seconds in both over seconds in either."""
    both = max(0.0, min(one.end, other.end) - max(one.start, other.start))
    either = one.seconds + other.seconds - both
    return both / either if either > 0 else 0.0


def best_evidence(evidence: Sequence[Spot], number: int) -> list[Spot]:
    """At most `number` spots that do not overlap, by start: the surest first, of equal ones the shorter, then the
    earlier, and of what overlaps one of them nothing more; so a window gives way to a surer one inside it."""
    chosen: list[Spot] = []
    for spot in sorted(evidence, key=lambda s: (-s.confidence, s.window.seconds, s.window.start)):
        if len(chosen) == number:
            break
        if all(spot.window.end <= c.window.start or c.window.end <= spot.window.start for c in chosen):
            chosen.append(spot)
    return sorted(chosen, key=lambda s: s.window)


def allot(spots: Sequence[Spot], budget: int, *, rooms: Sequence[int] | None = None) -> list[int]:
    """How many of `budget` frames each spot gets: in proportion to confidence x seconds, one each first.

    The next frame goes to the spot with the most confidence x seconds for each frame that it has (Adams' method: to
    those without any first, the weightier before), of equal ones to the earlier; so a larger budget takes no frame
    away. rooms: how many frames each has; what one has no room for goes to the others.
    """
    weights = [spot.confidence * spot.window.seconds for spot in spots]
    rooms = [budget] * len(spots) if rooms is None else rooms
    given = [0] * len(spots)
    for _ in range(budget):
        open_ = [i for i in range(len(spots)) if given[i] < rooms[i]]
        if not open_:
            break
        best = max(open_, key=lambda i: (given[i] == 0, weights[i] / max(given[i], 1), -i))
        given[best] += 1
    return given


def evidence_frames(trace: Trace, budget: int, *, number: int = 4, grid: Grid = middles) -> np.ndarray:
    """The frames to answer from, sorted: `budget` of them, shared among the `number` best spots of evidence by `allot`,
    evenly in each. Empty without evidence."""
    spots = best_evidence(trace.evidence, number)
    parts = [grid(spot.window, own) for spot, own in zip(spots, allot(spots, budget), strict=True) if own]
    return np.unique(np.concatenate(parts)) if parts else np.empty(0)


class _Budget:
    """Calls and different frames that are left."""

    def __init__(self, max_calls: int, max_frames: int | None, grid: Grid) -> None:
        self.max_calls, self.max_frames, self.grid = max_calls, max_frames, grid
        self.calls = 0
        self.seen: set[float] = set()
        self.spent = ""

    def take(self, window: Window, number: int) -> np.ndarray | None:
        """The frames to look at in a window with one call; None where a budget is spent.

        Of those that were not looked at before only as many as are left, evenly.
        """
        if self.calls >= self.max_calls:
            self.spent = "calls"
            return None
        found = self.grid(window, number)
        new = [place for place, frame in enumerate(found.tolist()) if frame not in self.seen]
        left = math.inf if self.max_frames is None else self.max_frames - len(self.seen)
        if len(new) > left:
            kept = {new[(2 * i + 1) * len(new) // (2 * int(left))] for i in range(int(left))}
            found = np.delete(found, [place for place in new if place not in kept])
            if not len(found):
                self.spent = "frames"
                return None
        self.calls += 1
        self.seen.update(found.tolist())
        return found


def _entry(spot: Spot) -> tuple[float, float, float, int, Spot]:
    return (-spot.confidence, spot.window.start, spot.window.seconds, spot.depth, spot)


def _confidence(value: float, window: Window) -> float:
    if not 0 <= value <= 1:
        raise UserError(f"reflect gave {value!r} for {window.start:g} to {window.end:g} s; confidences are in 0 .. 1")
    return float(value)


def _check(root: Window, shares: dict[str, float], min_seconds: float) -> None:
    if not (math.isfinite(root.start) and math.isfinite(root.end) and root.start < root.end):
        raise UserError(f"window=({root.start!r}, {root.end!r}) must be a start and a later end, in seconds")
    for name, value in shares.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise UserError(f"{name}={value!r} must be a number from 0 to 1")
    if isinstance(min_seconds, bool) or not isinstance(min_seconds, (int, float)) or not 0 < min_seconds < math.inf:
        raise UserError(f"min_seconds={min_seconds!r} must be a number above 0, in seconds")
