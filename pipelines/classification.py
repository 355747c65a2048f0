"""What tasks with one label for each item have in common: the module's evaluation, and the report."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ..blocks.sequence_model import SequenceOutput
from ..zoo._audio import AudioOutput
from .class_scores import ConfusionSums, baselines
from .results import print_table, write_csv, write_metrics
from .training import TrainingModule

Batch = dict[str, Tensor]
SCORES = ("accuracy", "macro_f1", "loss")


class ClassificationModule(TrainingModule):
    """Loss, accuracy and macro-F1, exact over items, batches and processes.

    A subclass defines `answer(batch)`, the model's output with logits (B, C) in y, and where training differs
    `training_output(batch)`, the same with targets (B, C) or labels (B,). item: the key of the items' numbers in a
    batch. The schema has the labels.
    """

    item = "item"

    def answer(self, batch: Batch) -> SequenceOutput | AudioOutput:
        raise NotImplementedError(f"{type(self).__name__} must define answer")

    def training_output(self, batch: Batch) -> tuple[SequenceOutput | AudioOutput, Tensor]:
        """What the model makes of a training batch, and what it should."""
        return self.answer(batch), batch["labels"]

    def new_sums(self) -> ConfusionSums:
        return ConfusionSums(len(self.schema["labels"]))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        out, targets = self.training_output(batch)
        number = len(batch["labels"])
        loss, seen, _ = self.over_ranks(F.cross_entropy(out.y.float(), targets), number)
        self.check_loss(seen + sum(out.aux.values()), batch_idx)
        total = loss + sum(out.aux.values())
        self.log_auxiliary(out.aux, number)
        right = (out.y.detach().argmax(1) == batch["labels"]).float().mean()
        self.log("train/loss", seen, on_step=True, on_epoch=True, prog_bar=True, batch_size=number)
        self.log("train/accuracy", right, on_step=False, on_epoch=True, batch_size=number)
        return total

    def on_validation_epoch_start(self) -> None:
        self._sums = self.new_sums()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._sums.update(self.answer(batch).y, batch["labels"])

    def on_validation_epoch_end(self) -> None:
        found = self._compute(self._sums)
        self.log_dict({f"val/{key}": found[key] for key in SCORES}, prog_bar=True, rank_zero_only=True)

    def on_test_epoch_start(self) -> None:
        self.test_sums = self.new_sums()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.test_sums.update(self.answer(batch).y, batch["labels"])

    def on_test_epoch_end(self) -> None:
        found = self._compute(self.test_sums)
        self.log_dict({f"test/{key}": found[key] for key in SCORES}, rank_zero_only=True)

    def predict_step(self, batch: Batch, batch_idx: int) -> tuple[Tensor, Tensor]:
        """Numbers of the items, and their probabilities, float64 (B, C)."""
        return batch[self.item].cpu(), torch.softmax(self.answer(batch).y.double(), 1).cpu()

    def _compute(self, sums: ConfusionSums) -> dict[str, Any]:
        if self.trainer.world_size > 1:
            sums.flat = self.sum_over_ranks(sums.flat)
        return sums.compute()


def report_classes(
    module: ClassificationModule, counts: np.ndarray, method: str, title: str, run_dir: Path, *, items: str
) -> dict[str, Any]:
    """Print and write accuracy beside the majority label and chance, and the confusion matrix.

    counts: int64 (C,), test items of each label. items: what they are called, "documents".
    """
    from .pictures import plot_confusion

    found, labels = module.test_sums.compute(), module.schema["labels"]
    train = module.schema["train_counts"]
    rows = [{"method": method, **{key: found[key] for key in SCORES}}]
    rows += baselines(np.array(train), counts, labels)
    print_table(rows, title=f"test: {title}, {found['items']:,} {items}, {len(labels)} classes")
    write_csv(run_dir / "test.csv", rows)
    confusion = [
        {"label": label, **dict(zip(labels, line, strict=True))}
        for label, line in zip(labels, found["confusion"], strict=True)
    ]
    write_csv(run_dir / "confusion.csv", confusion)
    plot_confusion(
        np.array(found["confusion"]),
        labels,
        run_dir / "confusion.png",
        title=f"{title}: {found['accuracy']:.1%} right, majority {rows[1]['accuracy']:.1%}",
        items=items,
    )
    scores = {**{key: found[key] for key in SCORES}, items: found["items"]}
    record = {
        "title": title,
        "test": scores,
        "majority": rows[1]["accuracy"],
        "chance": rows[2]["accuracy"],
        f"train_{items}": sum(train),
        "parameters": sum(p.numel() for p in module.net.parameters()),
    }
    write_metrics(run_dir, record, "scores")
    print(f"tables and pictures in {run_dir}", flush=True)
    values = {f"test/{key}": value for key, value in scores.items()}
    return {**values, "test/majority": rows[1]["accuracy"], "test/chance": rows[2]["accuracy"]}


def report_labels(rows: Sequence[dict[str, Any]], labels: Sequence[str], output: Path, *, items: str) -> dict[str, Any]:
    """Write the answers of `predict` and print how many items got each label; accuracy where labels are given."""
    write_csv(output, rows)
    counts = Counter(row["label"] for row in rows)
    print_table([{"label": label, items: counts[label]} for label in labels], title="predicted")
    print(f"{len(rows):,} {items} in {output}", flush=True)
    known = [row for row in rows if row.get("given") is not None]
    found: dict[str, Any] = {items: len(rows)}
    if known:
        found["accuracy"] = sum(row["label"] == row["given"] for row in known) / len(known)
        print(f"{found['accuracy']:.1%} of the {len(known):,} labels that the {items} have", flush=True)
    return found


def answered(
    found: Sequence[tuple[Tensor, Tensor]],
    names: Sequence[str],
    given: Sequence[str | None],
    labels: Sequence[str],
    *,
    item: str,
) -> list[dict[str, Any]]:
    """One record per item, in order: its name, label, the label's probability, and the label that the data give.

    found: what `predict_step` returned.
    """
    numbers = np.concatenate([number.numpy() for number, _ in found])
    chances = np.concatenate([chance.numpy() for _, chance in found])[np.argsort(numbers, kind="stable")]
    known, rows = any(label is not None for label in given), []
    for name, chance, label in zip(names, chances, given, strict=True):
        best = int(chance.argmax())
        record = {item: name, "label": labels[best], "probability": float(chance[best])}
        rows.append({**record, "given": label} if known else record)
    return rows


def check_output(path: str | Path) -> Path:
    """The path, or UserError before any work is done if no table could be written there."""
    from .errors import UserError

    path = Path(path)
    if path.is_dir() or path.suffix.lower() != ".csv":
        raise UserError(f"cannot write predictions to {path}: give the name of a .csv file")
    return path
