"""From probabilities in frames to spans: threshold, median filter, gaps, least duration; whole or as they come."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ...errors import UserError, check_whole


class Span(NamedTuple):
    """start, end: seconds. label: number of the class. score: mean probability of the tokens in it."""

    start: float
    end: float
    label: int
    score: float


class EventDecoder:
    """Spans of each class from probabilities that come token by token, the same however they are cut.

    Token i stands for the `step` seconds around its centre first + i step, not below 0. Four steps for each class:
    1. a running median over `median` tokens, at the ends over the tokens that are there (even counts: the mean of the
    middle two); 2. a run begins with a token whose value is at least `threshold` and goes on while it is at least `low`
    (hysteresis; backwards too: the tokens before it that are at least `low` belong to it), None: `threshold`; 3. runs
    whose gap is at most `max_gap` seconds become one; 4. what is shorter than `min_duration` seconds is dropped.
    threshold, low: numbers, or one for each class. Raises UserError for values outside these.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        step: float,
        first: float = 0.0,
        threshold: float | Sequence[float] = 0.5,
        low: float | Sequence[float] | None = None,
        median: int = 1,
        max_gap: float = 0.0,
        min_duration: float = 0.0,
    ) -> None:
        check_whole("num_classes", num_classes, 1)
        check_whole("median", median, 1)
        if median % 2 == 0:
            raise UserError(f"median={median} must be odd, so that it has a middle; {median + 1} is")
        if not 0 < step < math.inf:
            raise UserError(f"step={step!r} must be above 0, in seconds")
        for name, value in (("max_gap", max_gap), ("min_duration", min_duration)):
            if not 0 <= value < math.inf:
                raise UserError(f"{name}={value!r} must be at least 0, in seconds")
        self.threshold = _per_class("threshold", threshold, num_classes)
        self.low = self.threshold if low is None else _per_class("low", low, num_classes)
        if (self.low > self.threshold).any():
            raise UserError(f"low={low!r} must not be above threshold={threshold!r}")
        self.num_classes, self.step, self.first, self.median = num_classes, step, first, median
        # a hair more and less, so that a gap and a length of just so many tokens are what the seconds say
        self._gap = math.floor(max_gap / step + 1e-6)
        self._least = math.ceil(min_duration / step - 1e-6)
        self._runs = [_Runs(self._gap) for _ in range(num_classes)]
        self._raw = np.empty((0, num_classes))  # tokens that a median still reads
        self._seen, self._smoothed = 0, 0

    def push(self, probabilities: np.ndarray) -> list[Span]:
        """Take the next tokens (L, C); returns the spans that are finished with them, by their end."""
        if probabilities.ndim != 2 or probabilities.shape[1] != self.num_classes:
            raise UserError(f"probabilities have the shape {probabilities.shape}, expected (L, {self.num_classes})")
        self._raw = np.concatenate((self._raw, probabilities.astype(np.float64)))
        self._seen += len(probabilities)
        return self._advance(self._seen - self.median // 2)

    def finish(self) -> list[Span]:
        """The spans that are open at the end; the decoder may be used again then, from time 0."""
        spans = self._advance(self._seen)
        for label, runs in enumerate(self._runs):
            spans += self._spans(label, runs.finish())
        self._runs = [_Runs(self._gap) for _ in range(self.num_classes)]
        self._raw, self._seen, self._smoothed = self._raw[:0], 0, 0
        return sorted(spans, key=lambda span: (span.end, span.start, span.label))

    def _advance(self, until: int) -> list[Span]:
        """Smooth the tokens before `until` and let the runs have them."""
        if until <= self._smoothed:
            return []
        half, kept = self.median // 2, self._seen - len(self._raw)
        smooth = _running_median(self._raw, self._smoothed - kept, until - kept, half)
        spans: list[Span] = []
        for label, runs in enumerate(self._runs):
            found = runs.push(smooth[:, label], self._smoothed, self.threshold[label], self.low[label])
            spans += self._spans(label, found)
        self._smoothed = until
        self._raw = self._raw[max(until - half - kept, 0) :]
        return sorted(spans, key=lambda span: (span.end, span.start, span.label))

    def _spans(self, label: int, runs: list[_Run]) -> list[Span]:
        kept = [run for run in runs if run.stop - run.start >= self._least]
        return [
            Span(self._edge(run.start), self._edge(run.stop), label, run.total / (run.stop - run.start)) for run in kept
        ]

    def _edge(self, token: int) -> float:
        return max(self.first + (token - 0.5) * self.step, 0.0)


def decode_events(probabilities: np.ndarray, *, step: float, first: float = 0.0, **options: object) -> list[Span]:
    """The spans of probabilities (L, C), by start; options: of `EventDecoder`."""
    decoder = EventDecoder(probabilities.shape[1], step=step, first=first, **options)  # type: ignore[arg-type]
    return sorted(decoder.push(probabilities) + decoder.finish())


class _Run(NamedTuple):
    """Tokens start .. stop - 1. total: sum of their values. strong: whether one reached the threshold."""

    start: int
    stop: int
    total: float
    strong: bool


class _Runs:
    """Runs of one class as tokens come: of values from `low` on with one from `threshold` on, joined over gaps."""

    def __init__(self, gap: int) -> None:
        self.gap = gap
        self._open: _Run | None = None  # a run that the next token may continue
        self._closed: _Run | None = None  # a strong one before it, which may be joined with what comes
        self._between = 0.0  # sum of the values since the end of the closed one

    def push(self, values: np.ndarray, at: int, threshold: float, low: float) -> list[_Run]:
        found: list[_Run] = []
        for token, value in enumerate(values.tolist(), at):
            if value >= low:
                run = self._open or _Run(token, token, 0.0, False)
                self._open = _Run(run.start, token + 1, run.total + value, run.strong or value >= threshold)
                continue
            self._close()
            if self._closed is not None:
                self._between += value
                if token + 1 - self._closed.stop > self.gap:
                    found.append(self._closed)
                    self._closed = None
        return found

    def finish(self) -> list[_Run]:
        self._close()
        found = [] if self._closed is None else [self._closed]
        self._closed = None
        return found

    def _close(self) -> None:
        """The open run is over: it joins the closed one, takes its place, or if it is weak counts as a gap."""
        run, self._open = self._open, None
        if run is None:
            return
        before = self._closed
        if not run.strong:
            self._between += run.total
        elif before is not None and run.start - before.stop <= self.gap:
            self._closed = _Run(before.start, run.stop, before.total + self._between + run.total, True)
            self._between = 0.0
        else:
            self._closed, self._between = run, 0.0


def _running_median(values: np.ndarray, begin: int, end: int, half: int) -> np.ndarray:
    """Medians (end - begin, C) over `half` tokens to each side, fewer at the ends of the values (L, C)."""
    if not half:
        return values[begin:end]
    smooth = np.empty((end - begin, values.shape[1]))
    whole = min(max(begin, half), end), max(min(end, len(values) - half), min(max(begin, half), end))
    for place in (*range(begin, whole[0]), *range(whole[1], end)):
        smooth[place - begin] = np.median(values[max(place - half, 0) : place + half + 1], axis=0)
    if whole[1] > whole[0]:
        windows = np.lib.stride_tricks.sliding_window_view(values, 2 * half + 1, axis=0)
        smooth[whole[0] - begin : whole[1] - begin] = np.median(windows[whole[0] - half : whole[1] - half], axis=-1)
    return smooth


def _per_class(name: str, value: float | Sequence[float], number: int) -> np.ndarray:
    found = np.asarray(value, dtype=np.float64)
    if found.shape not in ((), (number,)) or not np.isfinite(found).all():
        raise UserError(f"{name}={value!r} must be a number, or one for each of the {number} classes")
    return np.broadcast_to(found, (number,))
