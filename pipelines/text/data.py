"""The text data module: documents in, rows of tokens for every stage out."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from ..atomic import atomic_write_text
from ..errors import UserError, check_whole, nearest
from ..loading import EvaluationLoader, IndexSampler, ResumableLoader, loader_options
from .compressors import TEST_MOST, TRAIN_MOST, baselines
from .corpus import SPLITS, Corpus, load_corpus
from .rows import CarriedRows, PackedRows, SlidingRows
from .sources import corpus_note
from .tokenizer import Tokenizer, create_tokenizer

PROTOCOLS = ("rows", "sliding", "carried")


class TextData(L.LightningDataModule):
    """Rows of a corpus of documents, for fit, validate and test.

    path: the sample "stdlib", a file, a folder, a pattern, or "hf:" and a dataset. tokenizer: "bytes" or a tokenizers
    JSON file. field, document_separator, hf_split, streaming, limit, cache_dir: see `load_corpus`. split_ratio: parts
    of train, val and test, by document. seq_len: tokens of a row. batch_size, eval_batch_size: rows. steps: training
    batches in an epoch (default: all rows once). whole_rows: train on pieces of seq_len tokens alone, leaving out the
    shorter ends of documents. eval_stride: tokens between two windows of the sliding protocol.
    num_workers: loader processes. seed: of the shuffling.

    `carry_state` (False), `shared` (False: processes take different training rows), `tested` (False: a fit needs no
    test documents), `wanted` (protocols by name, or "auto") and `protocols` (those that the model can have) may be set
    before the loaders are made; the task does so. Raises UserError in the constructor for arguments that make no sense,
    in `setup` for files that do not fit them.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        tokenizer: str | Path = "bytes",
        field: str = "text",
        document_separator: str | None = None,
        hf_split: str = "train",
        streaming: bool = False,
        limit: int | None = None,
        split_ratio: Sequence[float] = (0.9, 0.05, 0.05),
        seq_len: int = 512,
        batch_size: int = 16,
        eval_batch_size: int = 32,
        eval_stride: int | None = None,
        steps: int | None = None,
        whole_rows: bool = False,
        num_workers: int = 0,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("seq_len", seq_len, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("eval_stride", 1 if eval_stride is None else eval_stride, 1),
            ("steps", 1 if steps is None else steps, 1),
            ("limit", 1 if limit is None else limit, 1),
            ("num_workers", num_workers, 0),
        ):
            check_whole(f"data.{name}", value, least)
        if len(split_ratio) != 3 or min(split_ratio) < 0 or not split_ratio[0] > 0:
            raise UserError(f"data.split_ratio={list(split_ratio)} must be three parts: train (above 0), val, test")
        if eval_stride is not None and eval_stride > seq_len:
            raise UserError(f"data.eval_stride={eval_stride} must not be greater than data.seq_len={seq_len}")
        self.path, self.cache_dir = str(path), cache_dir
        self.tokenizer_choice = str(tokenizer)
        self.sources: dict[str, Any] = {
            "field": field,
            "separator": document_separator,
            "hf_split": hf_split,
            "streaming": streaming,
            "limit": limit,
            "split_ratio": list(split_ratio),
        }
        self.seq_len, self.batch_size, self.eval_batch_size = seq_len, batch_size, eval_batch_size
        self.eval_stride = eval_stride or max(seq_len // 2, 1)
        self.steps, self.num_workers, self.seed = steps, num_workers, seed
        self.whole_rows, self.shared = whole_rows, False
        self.carry_state = False
        self.wanted: Any = "auto"
        self.tested = False
        self.protocols: tuple[str, ...] = ("rows",)
        self._tokenizer: Tokenizer | None = None
        self._corpus: Corpus | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = create_tokenizer(self.tokenizer_choice)
        return self._tokenizer

    @property
    def corpus(self) -> Corpus:
        """The corpus; read the first time."""
        if self._corpus is None:
            self._corpus = load_corpus(
                self.path, self.tokenizer, workers=self.num_workers, cache_dir=self.cache_dir, **self.sources
            )
        return self._corpus

    def prepare_data(self) -> None:
        """Fill the cache once, before several processes read it."""
        _ = self.corpus

    def setup(self, stage: str | None = None) -> None:
        """Read the corpus and see that the stage has documents."""
        stages = {"validate": ("val",), "test": ("test",)}
        for needed in stages.get(stage or "fit", ("train", "val", "test") if self.tested else ("train", "val")):
            if not len(self.corpus.documents(needed)):
                number = len(self.corpus.names)
                hint = "; test_after_fit=false trains without" if needed == "test" and stage == "fit" else ""
                raise UserError(
                    f"data.path={self.path}: no document for {needed}: {number} document(s), "
                    f"data.split_ratio={self.sources['split_ratio']}{hint}"
                )
        if stage == "fit" and (self.whole_rows or self.shared):
            self._training_rows(self.dataset("train"))

    def schema(self) -> dict[str, Any]:
        """What a model needs to know of its data, and a later process to generate: plain values only."""
        return {
            "tokenizer": self.tokenizer_choice,
            "tokenizer_key": self.tokenizer.key,
            "vocab_size": self.tokenizer.vocab_size,
            "separator": self.tokenizer.separator,
            "seq_len": self.seq_len,
            "corpus": corpus_note(self.path),
        }

    def size(self, stage: str) -> tuple[int, int]:
        """Bytes and predictions of the documents of a stage; every token and the end of a document is a prediction."""
        documents = self.corpus.documents(stage)
        return int(self.corpus.sizes[documents].sum()), int((np.diff(self.corpus.bounds)[documents] - 1).sum())

    def compressors(self) -> dict[str, float]:
        """Bits per byte of general compressors on the test documents, or the first of them; kept in the cache."""
        corpus = self.corpus
        file = Path(corpus.tokens.filename).parent / "compressors.json"  # type: ignore[attr-defined]
        if file.is_file():
            return json.loads(file.read_text(encoding="utf-8"))
        found = baselines(
            corpus.excerpt("test", self.tokenizer, TEST_MOST),
            corpus.excerpt("train", self.tokenizer, TRAIN_MOST, last=True),
            test_size=self.size("test")[0],
            train_size=self.size("train")[0],
        )
        atomic_write_text(file, json.dumps(found))
        return found

    # loaders ----------------------------------------------------------------------------------------------------------

    def dataset(self, stage: str, protocol: str = "rows") -> Dataset[Any]:
        """Rows of "train", "val" or "test", read in one of PROTOCOLS."""
        if stage not in SPLITS:
            raise UserError(f"there is no stage {stage!r}.{nearest(stage, SPLITS)}")
        documents, training = self.corpus.documents(stage), stage == "train"
        if protocol == "sliding":
            return SlidingRows(self.corpus, documents, self.seq_len, self.eval_stride)
        if protocol == "carried":
            rows = self.batch_size if training else self.eval_batch_size
            return CarriedRows(self.corpus, documents, self.seq_len, rows, shuffle=training, seed=self.seed)
        return PackedRows(self.corpus, documents, self.seq_len, seed=self.seed if training else 0, fill=training)

    def train_dataloader(self) -> DataLoader[Any]:
        if self.carry_state:
            dataset = self.dataset("train", "carried")
            sampler = IndexSampler(len(dataset), 1)  # type: ignore[arg-type]
        else:
            dataset = self.dataset("train")
            sampler = IndexSampler(
                self._training_rows(dataset),
                self.batch_size,
                shuffle=True,
                seed=self.seed,
                steps=self.steps,
                shared=self.shared,
            )
        return ResumableLoader(dataset, sampler=sampler, **loader_options(self.num_workers))

    def _training_rows(self, dataset: Any) -> int:
        """How many of the rows, from the first on, are trained on. Raises UserError where there are none, and where
        rows are packed that are to be cut."""
        if self.whole_rows and not dataset.whole:
            longest = int(np.diff(self.corpus.bounds)[self.corpus.documents("train")].max()) - 1
            raise UserError(
                f"data.whole_rows=true, but no training document has data.seq_len={self.seq_len} tokens; the longest "
                f"has {longest}"
            )
        if self.shared and not self.whole_rows and len(dataset) > dataset.whole:
            raise UserError(
                f"trainer=context_parallel cuts rows of one piece, and the ends of documents are packed: give "
                f"data.whole_rows=true, which trains on the {dataset.whole} rows of data.seq_len={self.seq_len} tokens"
            )
        return dataset.whole if self.whole_rows else len(dataset)

    def val_dataloader(self) -> DataLoader[Any]:
        return self._evaluation("val", "rows")

    def test_dataloader(self) -> list[DataLoader[Any]]:
        return [self._evaluation("test", protocol) for protocol in self.protocols]

    def _evaluation(self, stage: str, protocol: str) -> DataLoader[Any]:
        dataset, together = self.dataset(stage, protocol), dist.is_available() and dist.is_initialized()
        rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
        if protocol == "carried":
            # A state goes on from step to step: the processes share the documents, each reads its own in order.
            documents = self.corpus.documents(stage)[rank::world]
            dataset = CarriedRows(self.corpus, documents, self.seq_len, self.eval_batch_size)
            sampler: IndexSampler = _EveryStep(len(dataset), 1)
        else:
            number = len(dataset)  # type: ignore[arg-type]
            sampler = IndexSampler(number, max(min(self.eval_batch_size, number // world), 1))
        if protocol == "carried" and not len(sampler):
            raise UserError(
                f"data.path={self.path}: too few documents for {stage} with {world} processes; "
                "use fewer (trainer.devices) or a larger part of data.split_ratio"
            )
        return EvaluationLoader(dataset, sampler=sampler, **loader_options(self.num_workers))


class _EveryStep(IndexSampler):
    """All steps in order, whatever the number of processes."""

    def __len__(self) -> int:
        return self.size

    def __iter__(self) -> Iterator[np.ndarray]:
        return iter(np.arange(self.size)[:, None])
