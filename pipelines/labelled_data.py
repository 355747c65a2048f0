"""What the data of clips with labels have in common, whatever a clip is: sets by stage, numbers of labels, checks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import lightning as L
import numpy as np

from .errors import UserError, nearest
from .labelled_clips import SPLITS


class Labelled(Protocol):
    """A clip: its label, and its file by name."""

    @property
    def label(self) -> str: ...
    @property
    def name(self) -> str: ...


ClipT = TypeVar("ClipT", bound=Labelled)


def check_labels_known(labels: Sequence[str], known: Sequence[str], path: str | Path | None) -> None:
    """Raise UserError for a label of the data that a trained model does not know."""
    for label in labels:
        if label not in known:
            raise UserError(
                f"data.path={path} has the label {label!r}, which the model does not know.{nearest(label, known)}"
            )


class LabelledClipData(L.LightningDataModule, Generic[ClipT]):
    """A data module of labelled clips. sets: of each stage, filled by `load`. labels: those of the training clips.
    tested: whether a fit needs test clips. notes: what is to be said of the data."""

    path: str | None
    split_ratio: Sequence[float]

    def __init__(self) -> None:
        super().__init__()
        self.tested = False
        self.labels: list[str] = []
        self.sets: dict[str, list[ClipT]] = {}
        self.notes: list[str] = []

    def load(self) -> None:
        """Find the clips and fill `sets` and `labels`, once."""
        raise NotImplementedError(f"{type(self).__name__} must define load")

    def prepare_data(self) -> None:
        self.load()

    def setup(self, stage: str | None = None) -> None:
        """Find the clips and see that the stage has some, training of at least two labels."""
        self.load()
        stages = {"validate": ("val",), "test": ("test",)}
        for needed in stages.get(stage or "fit", SPLITS if self.tested else SPLITS[:2]):
            if not self.sets[needed]:
                hint = "; test_after_fit=false trains without" if needed == "test" and stage == "fit" else ""
                raise UserError(
                    f"data.path={self.path}: no clip for {needed}, data.split_ratio={list(self.split_ratio)}{hint}"
                )
        if stage in (None, "fit") and len({clip.label for clip in self.sets["train"]}) < 2:
            raise UserError(
                f"the training clips have one label only, {self.labels[0]!r}: nothing can be told apart; "
                "give clips of at least two"
            )

    def counts(self, stage: str) -> np.ndarray:
        """int64 (C,): clips of each label."""
        places = [self.labels.index(clip.label) for clip in self.sets[stage]]
        return np.bincount(np.array(places, dtype=np.int64), minlength=len(self.labels))

    def use_labels(self, labels: Sequence[str]) -> None:
        """Number the labels as a trained model does. Raises UserError for one that it does not know."""
        check_labels_known(self.labels, labels, self.path)
        self.labels = list(labels)

    def val_dataloader(self) -> Any:
        return self.evaluation(self.sets["val"])

    def test_dataloader(self) -> Any:
        return self.evaluation(self.sets["test"])

    def evaluation(self, clips: Sequence[ClipT]) -> Any:
        """A loader of every clip once, in order."""
        raise NotImplementedError(f"{type(self).__name__} must define evaluation")


def labels_of(train: Sequence[Labelled], others: Sequence[Labelled]) -> list[str]:
    """The labels of the training clips, sorted. Raises UserError for another clip's that is not among them."""
    labels = sorted({clip.label for clip in train})
    for clip in others:
        if clip.label not in labels:
            raise UserError(f"no training clip that can be read has the label {clip.label!r}, {clip.name} has it")
    return labels


def limited(clips: Sequence[ClipT], limit: int | None, seed: int) -> list[ClipT]:
    """So many clips in their order, drawn from the seed so that there are some of all labels; None: all."""
    if limit is None:
        return list(clips)
    order = np.random.default_rng(seed).permutation(len(clips))
    return [clips[row] for row in sorted(order[:limit].tolist())]
