"""The data module of recordings with texts: files in, padded batches of samples and text vectors out."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from ...errors import UserError, check_whole, nearest
from ...loading import BucketSampler, EvaluationLoader, IndexSampler, ResumableLoader, loader_options
from ...text_vectors import TextVectors, encode_texts, pad_tokens
from ..classify.data import ClipBatches, durations
from ..clips import SPLITS, Clip, assign_splits, shared_between
from ..faults import LEAST_RATE
from ..hub import hub_clips
from ..known import prompt_clips, prompt_text
from ..skipping import BadFiles, checked_clips
from ..sources import table_clips

SOURCES = ("pairs", "prompts", "hub")
# Recordings from which the statistics of the features are taken.
_MEASURED = 512


class PairBatches(ClipBatches):
    """Indexed by an array of numbers: a batch of recordings with their texts.

    samples: float32 (B, T), 0 behind the end; lengths: int64 (B,). text: float32 (B, D). tokens: (B, m, D) and
    token_mask: bool (B, m), the states of words, where `words` asks for them. group: int64 (B,), the same for what has
    equal texts or is the same recording. clip: int64 (B,), the numbers of the recordings.
    join: a batch has up to so many recordings one after the other in each row, as many in all its rows (the others of
    the set are drawn from the seed and the numbers), as long as they are within max_seconds; the text of such a row is
    the mean of their vectors, and its words are those of all.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        vectors: TextVectors,
        *,
        sample_rate: int,
        max_seconds: float | None = None,
        bad: BadFiles | None = None,
        words: bool = True,
        join: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(clips, [], sample_rate=sample_rate, bad=bad)
        self.most = math.inf if max_seconds is None else max_seconds * sample_rate
        self.vectors, self.words, self.join, self.seed = vectors, words, join, seed
        self.groups = match_groups(self.clips)

    def __getitem__(self, index: np.ndarray) -> dict[str, Tensor]:
        rows = self._rows(np.asarray(index))
        read = [self._joined(row) for row in rows]
        parts, samples = [part for part, _ in read], [sound for _, sound in read]
        lengths = [len(sound) for sound in samples]
        padded = np.zeros((len(samples), max(lengths)), dtype=np.float32)
        for line, sound in zip(padded, samples, strict=True):
            line[: len(sound)] = sound
        batch = {
            "samples": torch.from_numpy(padded),
            "lengths": torch.tensor(lengths),
            "text": torch.stack([_unit(self.vectors.vectors[part].mean(0)) for part in parts]),
            "group": torch.tensor([self._group(part) for part in parts]),
            "clip": torch.tensor([part[0] for part in parts]),
        }
        if self.words:
            words = [torch.cat([self.vectors.tokens[row] for row in part]) for part in parts]
            batch["tokens"], batch["token_mask"] = pad_tokens(words)
        return batch

    def _group(self, part: list[int]) -> int:
        """The number of a row: of its recording in the set, or one above those that follows from the several it has, so
        that equal ones of several processes have the same."""
        groups = sorted(self.groups[part].tolist())
        if len(groups) == 1:
            return groups[0]
        digest = hashlib.blake2b(repr(groups).encode(), digest_size=7).digest()
        return len(self) + int.from_bytes(digest, "little")

    def _rows(self, index: np.ndarray) -> list[list[int]]:
        """The recordings of each row: its own first."""
        if self.join == 1:
            return [[int(row)] for row in index]
        random = np.random.default_rng([self.seed, *index.tolist()])
        others, last = random.integers(self.join), len(self) - 1
        return [[int(row), *((row + 1 + random.integers(last, size=others)) % len(self)).tolist()] for row in index]

    def _joined(self, row: Sequence[int]) -> tuple[list[int], np.ndarray]:
        """The recordings that are within max_seconds together, at least the first, and their samples."""
        parts: list[int] = []
        sounds: list[np.ndarray] = []
        total = 0
        for number in row:
            place, sound = self._read(number)
            if parts and total + len(sound) > self.most:
                continue
            parts.append(place)
            sounds.append(sound)
            total += len(sound)
        return parts, np.concatenate(sounds)


class AudioPairData(L.LightningDataModule):
    """Recordings with texts, for fit, validate, test and predict.

    source: "pairs", the CSV, TSV or JSONL table `path`, with recordings (path_column, relative to it), texts
    (text_column), where wanted spans (start, end) and split_column; "hub", the Hugging Face dataset `path` and its
    `hub_split`; "prompts", those that Debian packages, or their folder `path`, with the words of their names as texts.
    split_ratio: parts of train, val and test where the files do not say; what shares a file, a group (speaker) or a
    text goes together. text_encoder: a folder with a BERT model, None for MiniLM (`text_vectors`). sample_rate: Hz that
    everything is resampled to. max_seconds: of a recording, what lies behind is left out; None: all. join: training
    rows of up to so many recordings one after the other, with their texts, within max_seconds. limit: train on the
    first so many. bucket: batches of similar lengths. steps: training batches in an epoch (default: all recordings
    once). batch_size, eval_batch_size: recordings. split_seed: of the splits. seed: of the shuffling.

    `tested` (False: a fit needs no test pairs) and `words` (False: no states of words) may be set before `setup`.
    Raises UserError in the constructor for arguments that make no sense, in `setup` for files that do not fit them.
    """

    def __init__(
        self,
        source: str = "pairs",
        path: str | Path | None = None,
        *,
        path_column: str | None = None,
        text_column: str | None = None,
        split_column: str | None = None,
        hub_split: str = "train",
        split_ratio: Sequence[float] = (0.8, 0.1, 0.1),
        split_seed: int = 0,
        text_encoder: str | Path | None = None,
        sample_rate: int = 16000,
        max_seconds: float | None = None,
        join: int = 1,
        limit: int | None = None,
        bucket: bool = True,
        batch_size: int = 32,
        eval_batch_size: int = 32,
        steps: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 2),
            ("eval_batch_size", eval_batch_size, 1),
            ("join", join, 1),
            ("limit", 2 if limit is None else limit, 2),
            ("steps", 1 if steps is None else steps, 1),
            ("num_workers", num_workers, 0),
            ("sample_rate", sample_rate, LEAST_RATE),
        ):
            check_whole(f"data.{name}", value, least)
        if source not in SOURCES:
            raise UserError(f"data.source={source!r} is not a choice.{nearest(source, SOURCES)}")
        if len(split_ratio) != 3 or min(split_ratio) < 0 or not split_ratio[0] > 0:
            raise UserError(f"data.split_ratio={list(split_ratio)} must be three parts: train (above 0), val, test")
        if max_seconds is not None and not max_seconds > 0:
            raise UserError(f"data.max_seconds={max_seconds} must be above 0, or null for all of a recording")
        self.source, self.path, self.hub_split = source, None if path is None else str(path), hub_split
        self.path_column, self.text_column, self.split_column = path_column, text_column or "text", split_column
        self.split_ratio, self.split_seed = tuple(split_ratio), split_seed
        self.text_encoder = None if text_encoder is None else str(text_encoder)
        self.sample_rate, self.max_seconds, self.join, self.limit = sample_rate, max_seconds, join, limit
        self.bucket, self.batch_size, self.eval_batch_size = bucket, batch_size, eval_batch_size
        self.steps, self.num_workers, self.seed = steps, num_workers, seed
        self.tested, self.words = False, True
        self.sets: dict[str, list[Clip]] = {}
        self.notes: list[str] = []
        self.bad: BadFiles | None = None
        self._vectors: dict[str, TextVectors] = {}

    def load(self) -> None:
        """Find the pairs, split them and read the headers of their files, once. A bad file of training is left out and
        counted; one that is evaluated is an error. A clip's label is its text."""
        if self.sets:
            return
        found = self.pairs()
        groups = _components(found, lambda clip: clip.group)
        # one label for all: texts are no classes, each part has its own
        bare = [clip._replace(label="", group=group) for clip, group in zip(found, groups, strict=True)]
        texts = {(clip.name, clip.start, clip.where): clip.label for clip in found}
        # a table for a test alone is taken as it is
        given = {clip.split for clip in bare}
        alone = "" not in given and "train" not in given
        split = bare if alone else assign_splits(bare, self.split_ratio, seed=self.split_seed)
        self.notes = shared_between(split)
        split = [clip._replace(label=texts[clip.name, clip.start, clip.where]) for clip in split]
        sets = {stage: [clip for clip in split if clip.split == stage] for stage in SPLITS}
        self.bad = BadFiles(clip.name for clip in sets["train"])
        sets["train"] = self._cut(checked_clips(sets["train"], self.bad)[: self.limit])
        for stage in SPLITS[1:]:
            clips = checked_clips(sets[stage])
            order = np.argsort(durations(clips), kind="stable")
            sets[stage] = self._cut([clips[place] for place in order])
        self.sets = sets

    def prepare_data(self) -> None:
        self.load()

    def setup(self, stage: str | None = None) -> None:
        """Find the pairs and see that the stage has at least two texts."""
        self.load()
        stages = {"validate": ("val",), "test": ("test",)}
        for needed in stages.get(stage or "fit", SPLITS if self.tested else SPLITS[:2]):
            texts = {clip.label for clip in self.sets[needed]}
            if len(texts) < 2:
                hint = "; test_after_fit=false trains without" if needed == "test" and stage == "fit" else ""
                raise UserError(
                    f"data.path={self.path}: {len(texts)} text(s) for {needed}, two are needed, "
                    f"data.split_ratio={list(self.split_ratio)}{hint}"
                )

    def schema(self) -> dict[str, Any]:
        """What a model needs to know of its data, and a later process to search: plain values only."""
        return {
            "source": self.source,
            "title": "telephone prompts" if self.source == "prompts" else Path(str(self.path)).name,
            "train_pairs": len(self.sets["train"]),
            "text_dim": self.vectors("train").vectors.shape[1],
            "sample_rate": self.sample_rate,
            "max_seconds": self.max_seconds,
        }

    def vectors(self, stage: str) -> TextVectors:
        """Of the texts of the clips of a stage, in their order; encoded once."""
        if stage not in self._vectors:
            texts = [clip.label for clip in self.sets[stage]]
            unique = list(dict.fromkeys(texts))
            found, place = encode_texts(unique, path=self.text_encoder), {text: i for i, text in enumerate(unique)}
            rows = [place[text] for text in texts]
            self._vectors[stage] = TextVectors(found.vectors[rows], [found.tokens[row] for row in rows])
        return self._vectors[stage]

    def measured(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Samples (B, T) and lengths (B,) of some training recordings, for the statistics of features."""
        batches = self.batches("train", self.bad)
        chosen = np.random.default_rng(0).permutation(len(batches))[:_MEASURED]
        for first in range(0, len(chosen), self.batch_size):
            batch = batches[chosen[first : first + self.batch_size]]
            yield batch["samples"], batch["lengths"]

    # loaders ----------------------------------------------------------------------------------------------------------

    def batches(self, stage: str, bad: BadFiles | None = None, join: int = 1) -> PairBatches:
        """The dataset of a stage."""
        return PairBatches(
            self.sets[stage],
            self.vectors(stage),
            sample_rate=self.sample_rate,
            max_seconds=self.max_seconds,
            bad=bad,
            words=self.words,
            join=join,
            seed=self.seed,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        clips = self.sets["train"]
        sampler = (
            BucketSampler(durations(clips), self.batch_size, seed=self.seed, steps=self.steps)
            if self.bucket
            else IndexSampler(len(clips), self.batch_size, shuffle=True, seed=self.seed, steps=self.steps)
        )
        batches = self.batches("train", self.bad, self.join)
        return ResumableLoader(batches, sampler=sampler, **loader_options(self.num_workers))

    def val_dataloader(self) -> DataLoader[Any]:
        return self.evaluation("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self.evaluation("test")

    def evaluation(self, stage: str) -> DataLoader[Any]:
        """Every pair once, from the shortest recording to the longest."""
        sampler = IndexSampler(len(self.sets[stage]), self.eval_batch_size)
        return EvaluationLoader(self.batches(stage), sampler=sampler, **loader_options(self.num_workers))

    def _cut(self, clips: Sequence[Clip]) -> list[Clip]:
        """The first max_seconds of each."""
        if self.max_seconds is None:
            return list(clips)
        longer = durations(clips) > self.max_seconds
        return [
            clip._replace(end=clip.start + self.max_seconds) if cut else clip
            for clip, cut in zip(clips, longer, strict=True)
        ]

    # pairs ------------------------------------------------------------------------------------------------------------

    def pairs(self) -> list[Clip]:
        """The recordings, their texts as labels."""
        if self.source == "prompts":
            return [clip._replace(label=prompt_text(clip.label)) for clip in prompt_clips(self.path)]
        if self.path is None:
            raise UserError("data.path is missing: a CSV, TSV or JSONL table of recordings (path) and texts (text)")
        if self.source == "hub":
            return hub_clips(
                self.path, split=self.hub_split, audio_column=self.path_column, label_column=self.text_column
            )
        columns = {"path": self.path_column, "label": self.text_column, "split": self.split_column}
        return table_clips(self.path, columns)


def match_groups(clips: Sequence[Clip]) -> np.ndarray:
    """int64 (N,): the same number for two clips that a chain of equal texts and equal recordings connects; such answer
    each other."""
    names = _components(clips, lambda clip: str((clip.name, clip.start, clip.end)))
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names], dtype=np.int64)


def _components(clips: Sequence[Clip], key: Callable[[Clip], str | None]) -> list[str]:
    """A name for each clip, the same for two that a chain of equal texts and equal keys connects."""
    above: dict[str, str] = {}

    def top(node: str) -> str:
        while above.setdefault(node, node) != node:
            above[node] = above[above[node]]
            node = above[node]
        return node

    def text(clip: Clip) -> str:
        return "text " + " ".join(clip.label.casefold().split())

    for clip in clips:
        if (other := key(clip)) is not None:
            first, second = sorted((top(text(clip)), top(f"key {other}")))
            above[second] = first
    return [top(text(clip)) for clip in clips]


def _unit(vector: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vector, dim=0)
