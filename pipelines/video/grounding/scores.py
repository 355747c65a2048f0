"""How well moments were found: sums over queries, so that scores do not depend on the processes that count them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...spans import Spans, span_iou
from ..metrics import grounding_scores, temporal_scores

# Of a query; the scores are means over those that have one.
_MEANS = ("miou", "recall_at_0.3", "recall_at_0.5", "recall_at_0.7", "precision_at_0.5")
_TIMES = ("time_precision", "time_recall", "time_f1")
SCORES = (*_MEANS, "event_f1", *_TIMES)
EVENT_IOU = 0.5


class GroundingSums:
    """Sums over queries, float64 on the CPU; `flat` adds up over processes.

    miou, recall_at_x, precision_at_x: see `grounding_scores`. event_f1: of all queries together, 2 TP / (true + found),
    TP the pairs of a true and a found span with an IoU of at least 0.5. time_precision, time_recall, time_f1: of the
    frames in found spans against those in true ones, within 5 seconds (`temporal_scores`), means over queries.
    """

    def __init__(self) -> None:
        self.flat = torch.zeros(2 * len(_MEANS) + 2 * len(_TIMES) + 4, dtype=torch.float64)

    def update(self, truth: Spans, found: Spans, times: np.ndarray) -> None:
        """A query: its true spans, disjoint, what was found, and the times of the frames that were looked at."""
        values = grounding_scores([list(truth)], [list(found)])
        row = [values[name] for name in _MEANS]
        row += temporal_scores(within(times, found), within(times, truth))[:3]
        counted = [0.0 if math.isnan(value) else 1.0 for value in row]
        pairs = matches(truth, found)
        sums = [0.0 if math.isnan(value) else value for value in row]
        self.flat += torch.tensor([*sums, *counted, pairs, len(truth), len(found), 1], dtype=torch.float64)

    def compute(self) -> dict[str, float]:
        """SCORES, with the numbers of queries, of true events and of found spans."""
        number = len(_MEANS) + len(_TIMES)
        sums, counts = self.flat[:number], self.flat[number : 2 * number]
        means = dict(zip((*_MEANS, *_TIMES), (sums / counts).tolist(), strict=True))
        pairs, true, found, queries = self.flat[2 * number :].tolist()
        means["event_f1"] = 2 * pairs / (true + found) if true + found else math.nan
        return {
            **{name: means[name] for name in SCORES},
            "queries": int(queries),
            "events": int(true),
            "found": int(found),
        }


def matches(truth: Spans, found: Spans, *, least: float = EVENT_IOU) -> int:
    """Pairs of a true and a found span with an IoU of at least `least`, the best first, each span in one at most."""
    pairs = [(span_iou([a], [b]), i, j) for i, a in enumerate(truth) for j, b in enumerate(found)]
    taken_true: set[int] = set()
    taken_found: set[int] = set()
    for iou, i, j in sorted(pairs, reverse=True):
        if iou >= least and i not in taken_true and j not in taken_found:
            taken_true.add(i)
            taken_found.add(j)
    return len(taken_true)


def within(times: np.ndarray, spans: Sequence[tuple[float, float]]) -> np.ndarray:
    """The times that lie in a span, start <= t < end."""
    inside = np.zeros(len(times), bool)
    for start, end in spans:
        inside |= (times >= start) & (times < end)
    return times[inside]


def best_threshold(found: dict[float, Tensor]) -> float:
    """Of sums by threshold the one with the best mIoU, of equal ones that nearest to a half."""

    def quality(threshold: float) -> tuple[float, float]:
        sums = GroundingSums()
        sums.flat = found[threshold]
        return float(np.nan_to_num(sums.compute()["miou"])), -abs(threshold - 0.5)

    return max(found, key=quality)
