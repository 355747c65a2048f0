"""Sets of time spans, in seconds: their union and how well two of them agree."""

from __future__ import annotations

from collections.abc import Sequence

Spans = Sequence[tuple[float, float]]


def union(spans: Spans) -> list[tuple[float, float]]:
    """The spans as disjoint ones, in order."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], end)
        else:
            joined.append((start, end))
    return joined


def span_iou(truth: Spans, found: Spans) -> float:
    """Seconds in both unions over seconds in either; 0 where there are none."""
    one, other = union(truth), union(found)
    both, i, j = 0.0, 0, 0
    while i < len(one) and j < len(other):
        both += max(0.0, min(one[i][1], other[j][1]) - max(one[i][0], other[j][0]))
        if one[i][1] < other[j][1]:
            i += 1
        else:
            j += 1
    either = total(one) + total(other) - both
    return both / either if either > 0 else 0.0


def total(spans: Spans) -> float:
    """The sum of the spans' lengths."""
    return sum(end - start for start, end in spans)
