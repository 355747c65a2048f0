"""The data module of documents: labelled files or a task of Long Range Arena in, padded batches out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader

from ..errors import UserError, check_whole, nearest
from ..labelled_data import check_labels_known
from ..loading import BucketSampler, EvaluationLoader, IndexSampler, ResumableLoader, loader_options
from ..text.tokenizer import Tokenizer, create_tokenizer
from .arena import SOURCES, check_settings, load_arena
from .labelled import LABELLED, load_labelled
from .sets import DocumentBatches, LabelledSet, from_split

STAGES = ("train", "val", "test")


class DocumentData(L.LightningDataModule):
    """Documents with labels, for fit, validate, test and predict.

    source: "labelled", the user's own files at `path`, or a task of Long Range Arena (`SOURCES`) with its `settings`.
    text_column, file_column, label_column, split_column: of a table, see `load_labelled`. split_ratio: parts of train,
    val and test where the files do not say, by document and label. tokenizer: "bytes" or a tokenizers JSON file.
    max_len: tokens of a document; what lies behind is left out. limit: train on the first so many. bucket: batches of
    similar lengths. steps: training batches in an epoch (default: all documents once). batch_size, eval_batch_size:
    documents. split_seed: of the splits and of generated documents. seed: of the shuffling.

    `tested` (False: a fit needs no test documents) may be set before `setup`. Raises UserError in the constructor for
    arguments that make no sense, in `setup` for files that do not fit them.
    """

    def __init__(
        self,
        source: str = LABELLED,
        path: str | Path | None = None,
        *,
        settings: Mapping[str, Any] | None = None,
        text_column: str | None = None,
        file_column: str | None = None,
        label_column: str | None = None,
        split_column: str | None = None,
        split_ratio: Sequence[float] = (0.8, 0.1, 0.1),
        split_seed: int = 0,
        tokenizer: str | Path = "bytes",
        max_len: int | None = None,
        limit: int | None = None,
        bucket: bool = True,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        steps: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("max_len", 1 if max_len is None else max_len, 1),
            ("limit", 1 if limit is None else limit, 1),
            ("steps", 1 if steps is None else steps, 1),
            ("num_workers", num_workers, 0),
        ):
            check_whole(f"data.{name}", value, least)
        if len(split_ratio) != 3 or min(split_ratio) < 0 or not split_ratio[0] > 0:
            raise UserError(f"data.split_ratio={list(split_ratio)} must be three parts: train (above 0), val, test")
        self.settings = dict(settings or {})
        if source == LABELLED:
            if self.settings:
                raise UserError("data.settings is for the tasks of Long Range Arena, not for data.source=labelled")
        elif source not in SOURCES:
            raise UserError(f"data.source={source!r} is not a choice.{nearest(source, [LABELLED, *SOURCES])}")
        else:
            check_settings(source, self.settings)
        self.source, self.path, self.cache_dir = source, None if path is None else str(path), cache_dir
        self.columns = {"text": text_column, "file": file_column, "label": label_column, "split": split_column}
        self.split_ratio, self.split_seed = tuple(split_ratio), split_seed
        self.tokenizer_choice, self.max_len, self.limit = str(tokenizer), max_len, limit
        self.bucket, self.batch_size, self.eval_batch_size = bucket, batch_size, eval_batch_size
        self.steps, self.num_workers, self.seed = steps, num_workers, seed
        self.tested = False
        self.labels: list[str] = []
        self.sets: dict[str, LabelledSet] = {}
        self.notes: list[str] = []
        self._values = (0.5, 0.5)
        self._title = ""
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = create_tokenizer(self.tokenizer_choice)
        return self._tokenizer

    @property
    def vocab_size(self) -> int:
        return self._vocab_size if self.source != LABELLED else self.tokenizer.vocab_size

    def load(self) -> None:
        """Read or generate the documents, once."""
        if self.sets:
            return
        if self.source == LABELLED:
            if self.path is None:
                raise UserError("data.path is missing: a folder whose sub-folders are labels, or a CSV or JSONL table")
            found = load_labelled(
                self.path,
                self.tokenizer,
                columns=self.columns,
                split_ratio=self.split_ratio,
                seed=self.split_seed,
                cache_dir=self.cache_dir,
            )
            self.labels, sets, self._title, self.notes = found.labels, found.sets, found.title, list(found.notes)
        else:
            arena = load_arena(self.source, self.path, self.settings, seed=self.split_seed, cache_dir=self.cache_dir)
            self.labels, self._title, self._values = arena.labels, arena.title, (arena.mean, arena.std)
            self._vocab_size = arena.splits["train"].vocab_size
            sets = {name: from_split(split) for name, split in arena.splits.items()}
        if self.limit is not None:
            sets["train"] = sets["train"].select(np.arange(min(self.limit, len(sets["train"]))))
        for name, documents in sets.items():
            self.sets[name], longer, lost = documents.cut(self.max_len)
            if longer:
                share = lost / documents.length.sum()
                self.notes.append(
                    f"{name}: {longer:,} of {documents.length.size:,} documents are longer than data.max_len="
                    f"{self.max_len} and are cut, {share:.1%} of all tokens"
                )

    def prepare_data(self) -> None:
        """Fill the cache once, before several processes read it."""
        self.load()

    def setup(self, stage: str | None = None) -> None:
        """Read the documents and see that the stage has some of at least two labels."""
        self.load()
        stages = {"validate": ("val",), "test": ("test",)}
        for needed in stages.get(stage or "fit", ("train", "val", "test") if self.tested else ("train", "val")):
            if not len(self.sets.get(needed, ())):
                hint = "; test_after_fit=false trains without" if needed == "test" and stage == "fit" else ""
                raise UserError(
                    f"data.path={self.path}: no document for {needed}, data.split_ratio={list(self.split_ratio)}{hint}"
                )
        if stage in (None, "fit"):
            there = np.flatnonzero(self.sets["train"].counts(len(self.labels)))
            if len(there) < 2:
                raise UserError(
                    f"the training documents have one label only, {self.labels[int(there[0])]!r}: "
                    "nothing can be told apart; give documents of at least two"
                )

    def schema(self) -> dict[str, Any]:
        """What a model needs to know of its data, and a later process to classify: plain values only."""
        own = self.source == LABELLED
        return {
            "source": self.source,
            "title": self._title,
            "labels": list(self.labels),
            "train_counts": self.sets["train"].counts(len(self.labels)).tolist() if "train" in self.sets else [],
            "towers": next(iter(self.sets.values())).towers,
            "tokenizer": self.tokenizer_choice if own else self.source,
            "tokenizer_key": self.tokenizer.key if own else self.source,
            "vocab_size": self.vocab_size,
            "max_len": self.max_len,
            "longest": max(int(documents.length.max(initial=1)) for documents in self.sets.values()),
            "value_mean": self._values[0],
            "value_std": self._values[1],
        }

    def use_labels(self, labels: Sequence[str]) -> None:
        """Number the labels as a trained model does. Raises UserError for one that it does not know."""
        check_labels_known(self.labels, labels, self.path)
        places = np.array([labels.index(label) for label in self.labels], dtype=np.int64)
        for name, documents in self.sets.items():
            known = documents.labels >= 0
            numbers = np.where(known, places[documents.labels * known], -1)
            self.sets[name] = replace(documents, labels=numbers)
        self.labels = list(labels)

    # loaders ----------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        documents = self.sets["train"]
        lengths = documents.length.max(1)
        sampler = (
            BucketSampler(lengths, self.batch_size, seed=self.seed, steps=self.steps)
            if self.bucket and lengths.min() < lengths.max()
            else IndexSampler(len(documents), self.batch_size, shuffle=True, seed=self.seed, steps=self.steps)
        )
        return ResumableLoader(DocumentBatches(documents), sampler=sampler, **loader_options(self.num_workers))

    def val_dataloader(self) -> DataLoader[Any]:
        return self.evaluation(self.sets["val"])

    def test_dataloader(self) -> DataLoader[Any]:
        return self.evaluation(self.sets["test"])

    def evaluation(self, documents: LabelledSet) -> DataLoader[Any]:
        """Every document once, sorted by length."""
        batches = DocumentBatches(documents, by_length=True)
        sampler = IndexSampler(len(documents), self.eval_batch_size)
        return EvaluationLoader(batches, sampler=sampler, **loader_options(self.num_workers))
