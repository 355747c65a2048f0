"""The data module of labelled clips: files in, padded batches of samples out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...errors import UserError, check_whole, nearest
from ...labelled_data import LabelledClipData, labels_of, limited
from ...labelled_tables import TABLES
from ...loading import BucketSampler, EvaluationLoader, IndexSampler, ResumableLoader, loader_options
from ..clips import SPLITS, Clip, assign_splits, read_clip, shared_between
from ..faults import LEAST_RATE
from ..hub import hub_clips
from ..known import digit_clips, prompts_by_kind
from ..reader import AudioReader
from ..skipping import BadFiles, checked_clips, read_or_skip
from ..sources import folder_clips, named_clips, table_clips

SOURCES = ("files", "digits", "prompts", "hub")
# Clips from which the statistics of the features are taken.
_MEASURED = 512


class ClipBatches(Dataset[Any]):
    """Indexed by an array of numbers: a batch of clips, padded on the right to the longest.

    samples: float32 (B, T), one channel, 0 behind the end. lengths: int64 (B,). labels: int64 (B,), -1 where there is
    none. clip: int64 (B,), their numbers. bad: what cannot be read is counted there and the next clip that can be taken
    in its place; None: it is an error.
    """

    def __init__(
        self, clips: Sequence[Clip], labels: Sequence[str], *, sample_rate: int, bad: BadFiles | None = None
    ) -> None:
        self.clips, self.sample_rate, self.bad = list(clips), sample_rate, bad
        number = {label: place for place, label in enumerate(labels)}
        self.labels = np.array([number.get(clip.label, -1) for clip in self.clips], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: np.ndarray) -> dict[str, Tensor]:
        found = [self._read(int(row)) for row in index]
        lengths = [len(samples) for _, samples in found]
        batch = np.zeros((len(found), max(lengths)), dtype=np.float32)
        for line, (_, samples) in zip(batch, found, strict=True):
            line[: len(samples)] = samples
        rows = np.array([row for row, _ in found], dtype=np.int64)
        return {
            "samples": torch.from_numpy(batch),
            "lengths": torch.tensor(lengths),
            "labels": torch.from_numpy(self.labels[rows]),
            "clip": torch.from_numpy(rows),
        }

    def _read(self, row: int) -> tuple[int, np.ndarray]:
        for place in (*range(row, len(self.clips)), *range(row)):
            clip = self.clips[place]
            if self.bad is None:
                return place, read_clip(clip, sample_rate=self.sample_rate)
            samples = read_or_skip(clip, self.bad, sample_rate=self.sample_rate)
            if samples is not None:
                return place, samples
        raise UserError("no training clip can be read")


class AudioClipData(LabelledClipData[Clip]):
    """Labelled clips, for fit, validate, test and predict.

    source: "files", the user's own at `path`: a folder whose sub-folders are labels, a folder with a `pattern` of its
    file names ("{label}_{speaker}_{take}"), or a CSV, TSV or JSONL table; "digits", the Free Spoken Digit Dataset in
    the folder `path` with its `protocol`, "official" or "speakers"; "prompts", those that Debian packages (or the
    folder `path`) by their kind; "hub", the Hugging Face dataset `path` and its `hub_split`. path_column, label_column,
    start_column, end_column, group_column, split_column: of a table, None for the usual names. split_ratio: parts of
    train, val and test where the files do not say; what shares a file or a group (a speaker) goes together.
    sample_rate: Hz that everything is resampled to. max_seconds: of a clip, what lies behind is left out; None: all.
    limit: train on so many, seeded. bucket: batches of similar lengths. steps: training batches in an epoch (default:
    all clips once). batch_size, eval_batch_size: clips. split_seed: of the splits. seed: of the shuffling.

    `tested` (False: a fit needs no test clips) may be set before `setup`. Raises UserError in the constructor for
    arguments that make no sense, in `setup` for files that do not fit them.
    """

    def __init__(
        self,
        source: str = "files",
        path: str | Path | None = None,
        *,
        pattern: str | None = None,
        protocol: str = "official",
        hub_split: str = "train",
        path_column: str | None = None,
        label_column: str | None = None,
        start_column: str | None = None,
        end_column: str | None = None,
        group_column: str | None = None,
        split_column: str | None = None,
        split_ratio: Sequence[float] = (0.8, 0.1, 0.1),
        split_seed: int = 0,
        sample_rate: int = 16000,
        max_seconds: float | None = None,
        limit: int | None = None,
        bucket: bool = True,
        batch_size: int = 32,
        eval_batch_size: int = 64,
        steps: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("limit", 1 if limit is None else limit, 1),
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
            raise UserError(f"data.max_seconds={max_seconds} must be above 0, or null for all of a clip")
        self.source, self.path = source, None if path is None else str(path)
        self.pattern, self.protocol, self.hub_split = pattern, protocol, hub_split
        self.columns = {"path": path_column, "label": label_column, "start": start_column, "end": end_column}
        self.columns |= {"group": group_column, "split": split_column}
        self.split_ratio, self.split_seed = tuple(split_ratio), split_seed
        self.sample_rate, self.max_seconds, self.limit = sample_rate, max_seconds, limit
        self.bucket, self.batch_size, self.eval_batch_size = bucket, batch_size, eval_batch_size
        self.steps, self.num_workers, self.seed = steps, num_workers, seed
        self.bad: BadFiles | None = None

    def load(self) -> None:
        """Find the clips, split them and read the headers of their files, once. A bad file of training is left out and
        counted; one that is evaluated is an error."""
        if self.sets:
            return
        found = self._clips()
        if self.source != "digits":
            found = assign_splits(found, self.split_ratio, seed=self.split_seed)
        self.notes = shared_between(found) if self.source == "files" else []
        sets = {stage: [clip for clip in found if clip.split == stage] for stage in SPLITS}
        self.bad = BadFiles(clip.name for clip in sets["train"])
        sets["train"] = checked_clips(sets["train"], self.bad)
        for stage in SPLITS[1:]:
            sets[stage] = checked_clips(sets[stage])
        self.labels = labels_of(sets["train"], sets["val"] + sets["test"])
        sets["train"] = limited(sets["train"], self.limit, self.split_seed)
        for stage, clips in sets.items():
            self.sets[stage], longer = cut(clips, self.max_seconds)
            if longer:
                self.notes.append(
                    f"{stage}: {longer:,} of {len(clips):,} clips are longer than data.max_seconds="
                    f"{self.max_seconds:g} and are cut"
                )

    def schema(self) -> dict[str, Any]:
        """What a model needs to know of its data, and a later process to classify: plain values only."""
        return {
            "source": self.source,
            "title": self._title(),
            "labels": list(self.labels),
            "train_counts": self.counts("train").tolist(),
            "sample_rate": self.sample_rate,
            "max_seconds": self.max_seconds,
        }

    def measured(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Samples (B, T) and lengths (B,) of some training clips, for the statistics of features."""
        batches = self.batches(self.sets["train"], self.bad)
        chosen = np.random.default_rng(0).permutation(len(batches))[:_MEASURED]
        for first in range(0, len(chosen), self.batch_size):
            batch = batches[chosen[first : first + self.batch_size]]
            yield batch["samples"], batch["lengths"]

    # loaders ----------------------------------------------------------------------------------------------------------

    def batches(self, clips: Sequence[Clip], bad: BadFiles | None = None) -> ClipBatches:
        """The dataset of clips."""
        return ClipBatches(clips, self.labels, sample_rate=self.sample_rate, bad=bad)

    def train_dataloader(self) -> DataLoader[Any]:
        clips = self.sets["train"]
        seconds = durations(clips)
        sampler = (
            BucketSampler(seconds, self.batch_size, seed=self.seed, steps=self.steps)
            if self.bucket
            else IndexSampler(len(clips), self.batch_size, shuffle=True, seed=self.seed, steps=self.steps)
        )
        return ResumableLoader(self.batches(clips, self.bad), sampler=sampler, **loader_options(self.num_workers))

    def evaluation(self, clips: Sequence[Clip]) -> DataLoader[Any]:
        """Every clip once, in order."""
        sampler = IndexSampler(len(clips), self.eval_batch_size)
        return EvaluationLoader(self.batches(clips), sampler=sampler, **loader_options(self.num_workers))

    # clips ------------------------------------------------------------------------------------------------------------

    def _clips(self) -> list[Clip]:
        if self.source == "prompts":
            return prompts_by_kind(self.path)
        if self.path is None:
            raise UserError(
                "data.path is missing: a folder whose sub-folders are labels, a CSV or JSONL table, or a folder with "
                "data.pattern, such as {label}_{speaker}_{take}"
            )
        if self.source == "digits":
            part = self.split_ratio[1] / max(self.split_ratio[0] + self.split_ratio[1], 1e-9)
            return digit_clips(self.path, self.protocol, val_part=part, seed=self.split_seed)
        if self.source == "hub":
            return hub_clips(
                self.path,
                split=self.hub_split,
                audio_column=self.columns["path"],
                label_column=self.columns["label"],
                group_column=self.columns["group"],
            )
        return own_clips(self.path, self.pattern, self.columns)

    def _title(self) -> str:
        if self.source == "digits":
            return f"spoken digits, {self.protocol} split"
        if self.source == "prompts":
            return "telephone prompts"
        return Path(str(self.path)).name


def own_clips(path: str | Path, pattern: str | None, columns: Mapping[str, str | None]) -> list[Clip]:
    """The clips of a user's files: a table, a folder with a pattern of names, or a folder of labels."""
    file = Path(path).expanduser()
    if pattern is not None:
        return named_clips(file, pattern)
    if file.suffix.lower() in TABLES or file.is_file():
        return table_clips(file, columns)
    return folder_clips(file)


def cut(clips: Sequence[Clip], max_seconds: float | None) -> tuple[list[Clip], int]:
    """At most the first max_seconds of each clip, and how many were longer."""
    if max_seconds is None:
        return list(clips), 0
    longer = durations(clips) > max_seconds
    shorter = [
        clip._replace(end=clip.start + max_seconds) if long else clip for clip, long in zip(clips, longer, strict=True)
    ]
    return shorter, int(longer.sum())


def durations(clips: Sequence[Clip]) -> np.ndarray:
    """Seconds of each clip, float64."""
    found: dict[str, float] = {}
    for clip in clips:
        if clip.end is None and clip.name not in found:
            with AudioReader(clip.path) as reader:
                found[clip.name] = reader.info.duration
    return np.array([(found[clip.name] if clip.end is None else clip.end) - clip.start for clip in clips])
