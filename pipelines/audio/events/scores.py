"""How well spans were found: event-based and segment-based F1, and temporal grounding; exact sums over recordings.

All as sums of counts, so that they do not depend on batches and processes, and scores come from the sums at the end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...spans import Spans, span_iou

COLLAR = 0.2  # seconds
LENGTH_SHARE = 0.5
SEGMENT = 1.0  # seconds
RECALLS = (0.3, 0.5, 0.7)


def match_events(
    truth: Spans, found: Spans, *, collar: float = COLLAR, share: float = LENGTH_SHARE, offset: bool = True
) -> int:
    """The most pairs of a true and a found span, each span in one pair at most, that agree: onsets within `collar`
    seconds, and with `offset` ends within the larger of `collar` and `share` of the true length.

    Mesaros, Heittola and Virtanen 2016, doi:10.3390/app6060162, section 5; the matching is a maximum one, by augmenting
    paths, as sed_eval's default "optimal" is. Its "greedy" one takes for each true span the first that agrees, and so
    may count fewer.
    """
    starts = np.array([start for start, _ in found])
    ends = np.array([end for _, end in found])
    agree: list[list[int]] = []
    for start, end in truth:
        # a hair, so that spans at whole hundredths agree at the collar itself
        good = np.abs(starts - start) <= collar + 1e-9
        if offset:
            good &= np.abs(ends - end) <= max(collar, share * (end - start)) + 1e-9
        agree.append(np.flatnonzero(good).tolist())
    owner, partner = [-1] * len(found), [-1] * len(truth)

    def augment(root: int) -> bool:
        came: dict[int, int] = {}  # the true span from which a found one was reached
        reached = [root]
        for span in reached:  # it grows: a path may be as long as the recording has events
            for other in agree[span]:
                if other in came:
                    continue
                came[other] = span
                if owner[other] >= 0:
                    reached.append(owner[other])
                    continue
                while other >= 0:
                    span = came[other]
                    owner[other], partner[span], other = span, other, partner[span]
                return True
        return False

    return sum(map(augment, range(len(truth))))


def segment_activity(spans: Spans, seconds: float, *, segment: float = SEGMENT) -> np.ndarray:
    """bool (S,): which segments of the recording a span overlaps, from that of its start to that of its end."""
    active = np.zeros(math.ceil(seconds / segment - 1e-9), dtype=bool)
    for start, end in spans:
        active[math.floor(start / segment + 1e-9) : math.ceil(end / segment - 1e-9)] = True
    return active


class EventSums:
    """Counts of recordings, in float64 on the CPU; `flat` adds up over processes.

    Of each class: pairs, true and found events; segments right, missed and wrong. Of all classes as one: pairs, true
    and found, recordings and the sum of their IoUs. Of queries, a label that a recording has: their number, the sum of
    IoUs, hits from 0.3, 0.5 and 0.7.
    """

    def __init__(self, num_classes: int, *, collar: float = COLLAR, share: float = LENGTH_SHARE) -> None:
        self.collar, self.share = collar, share
        self.by_class = torch.zeros(num_classes, 6, dtype=torch.float64)
        self.any_class = torch.zeros(5, dtype=torch.float64)
        self.queries = torch.zeros(2 + len(RECALLS), dtype=torch.float64)
        self.seconds = torch.zeros(1, dtype=torch.float64)

    def update(
        self, truth: Iterable[tuple[float, float, int]], found: Iterable[tuple[float, float, int]], seconds: float
    ) -> None:
        """A recording: start, end and class of its true and of the found events, and its length."""
        truth, found = list(truth), list(found)
        for label in range(len(self.by_class)):
            here = [(start, end) for start, end, own in truth if own == label]
            mine = [(start, end) for start, end, own in found if own == label]
            if not here and not mine:
                continue
            pairs = match_events(here, mine, collar=self.collar, share=self.share)
            real, guess = segment_activity(here, seconds), segment_activity(mine, seconds)
            segments = (real & guess).sum(), (real & ~guess).sum(), (~real & guess).sum()
            row = [pairs, len(here), len(mine), *map(int, segments)]
            self.by_class[label] += torch.tensor(row, dtype=torch.float64)
            if here:
                iou = span_iou(here, mine)
                hits = [float(iou >= least) for least in RECALLS]
                self.queries += torch.tensor([1.0, iou, *hits], dtype=torch.float64)
        bare = [(start, end) for start, end, _ in truth], [(start, end) for start, end, _ in found]
        pairs = match_events(*bare, collar=self.collar, share=self.share)
        counts = [pairs, len(truth), len(found), 1.0, span_iou(*bare)]
        self.any_class += torch.tensor(counts, dtype=torch.float64)
        self.seconds += seconds

    @property
    def flat(self) -> Tensor:
        return torch.cat((self.by_class.flatten(), self.any_class, self.queries, self.seconds))

    @flat.setter
    def flat(self, values: Tensor) -> None:
        sizes = [self.by_class.numel(), len(self.any_class), len(self.queries), 1]
        classes, self.any_class, self.queries, self.seconds = (part.clone() for part in values.split(sizes))
        self.by_class = classes.view_as(self.by_class)

    def compute(self) -> dict[str, Any]:
        """event_f1, event_f1_macro, precision, recall, segment_f1, segment_f1_macro, miou, recall_at_0.3/0.5/0.7;
        event_f1_any, miou_any: where labels are not looked at; per_class: rows of events, found, right and their F1.

        F1 = 2 pairs / (true + found), micro: of the sums over classes; macro: the mean over the classes that have true
        events, where DCASE's takes those with a true or a found one. NaN where there is nothing to count.
        """
        table, pairs = self.by_class.numpy(), self.by_class[:, 0].numpy()
        events, segments = table[:, 1] + table[:, 2], 2 * table[:, 3] + table[:, 4] + table[:, 5]
        there = table[:, 1] > 0
        with np.errstate(invalid="ignore", divide="ignore"):
            each, each_segment = 2 * pairs / events, 2 * table[:, 3] / segments
        count, total, *hits = self.queries.tolist()
        rows = [
            {"events": int(t), "found": int(f), "right": int(p), "event_f1": float(score), "segment_f1": float(segment)}
            for (p, t, f), score, segment in zip(table[:, :3], each, each_segment, strict=True)
        ]
        return {
            "event_f1": _ratio(2 * pairs.sum(), events.sum()),
            "event_f1_macro": float(each[there].mean()) if there.any() else math.nan,
            "precision": _ratio(pairs.sum(), table[:, 2].sum()),
            "recall": _ratio(pairs.sum(), table[:, 1].sum()),
            "event_f1_any": _ratio(2 * float(self.any_class[0]), float(self.any_class[1:3].sum())),
            "segment_f1": _ratio(2 * table[:, 3].sum(), segments.sum()),
            "segment_f1_macro": float(each_segment[there].mean()) if there.any() else math.nan,
            "miou": _ratio(total, count),
            "miou_any": _ratio(float(self.any_class[4]), float(self.any_class[3])),
            **{f"recall_at_{least}": _ratio(hit, count) for least, hit in zip(RECALLS, hits, strict=True)},
            "events": int(table[:, 1].sum()),
            "found": int(table[:, 2].sum()),
            "seconds": float(self.seconds),
            "per_class": rows,
        }


SCORES = (
    "event_f1",
    "event_f1_macro",
    "event_f1_any",
    "segment_f1",
    "miou",
    "miou_any",
    *(f"recall_at_{x}" for x in RECALLS),
)


def _ratio(part: float, whole: float) -> float:
    return float(part) / float(whole) if whole else math.nan
