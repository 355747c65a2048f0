"""Sums of a classifier's answers: loss, accuracy, macro-F1 and the confusion matrix, exact whatever the batches."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


class ConfusionSums:
    """Counts by (true label, answer) and the sum of losses, in float64 on the CPU: exact up to 2^53 items."""

    def __init__(self, num_classes: int) -> None:
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.float64)
        self.nats = torch.zeros(1, dtype=torch.float64)

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """logits: (B, C). labels: int64 (B,)."""
        logits, labels = logits.detach().double().cpu(), labels.cpu()
        self.nats += F.cross_entropy(logits, labels, reduction="sum")
        classes = len(self.counts)
        self.counts += torch.bincount(labels * classes + logits.argmax(1), minlength=classes**2).view_as(self.counts)

    @property
    def flat(self) -> Tensor:
        return torch.cat((self.nats, self.counts.flatten()))

    @flat.setter
    def flat(self, values: Tensor) -> None:
        self.nats, self.counts = values[:1].clone(), values[1:].view_as(self.counts).clone()

    def compute(self) -> dict[str, Any]:
        """loss (nats per item), accuracy, macro_f1, items, confusion (C, C) as whole numbers."""
        return scores(self.counts.numpy(), float(self.nats))


def scores(counts: np.ndarray, nats: float) -> dict[str, Any]:
    """Scores of a confusion matrix, rows true and columns answered.

    accuracy = trace / sum. macro_f1: the mean over the classes that are there, of truth or answer, of
    2 tp / (2 tp + fp + fn).
    """
    total = counts.sum()
    if not total:
        return {"loss": math.nan, "accuracy": math.nan, "macro_f1": math.nan, "items": 0, "confusion": []}
    right, both = np.diag(counts), counts.sum(0) + counts.sum(1)
    there = both > 0
    return {
        "loss": nats / float(total),
        "accuracy": float(right.sum() / total),
        "macro_f1": float((2 * right[there] / both[there]).mean()),
        "items": int(total),
        "confusion": counts.astype(int).tolist(),
    }


def baselines(train: np.ndarray, test: np.ndarray, labels: list[str]) -> list[dict[str, Any]]:
    """What no model needs to learn, as rows of the results table: always the most frequent label of the training
    items (its loss: that of their frequencies), and a fair guess.

    train, test: int64 (C,), items of each label.
    """
    most = int(train.argmax())
    answered = np.zeros((len(test), len(test)))
    answered[:, most] = test
    # add-one, so that a label which no training item has costs something finite
    frequencies = (train + 1) / (train + 1).sum()
    found = scores(answered, float(-(test * np.log(frequencies)).sum()))
    classes = len(labels)
    return [
        {"method": f"majority: always {labels[most]!r}", **{k: found[k] for k in ("accuracy", "macro_f1", "loss")}},
        {"method": "chance: a fair guess", "accuracy": 1 / classes, "macro_f1": None, "loss": math.log(classes)},
    ]
