"""The data module of events: composed recordings, or the user's own with a table of spans; windows and wholes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...errors import UserError, check_whole, nearest
from ...labelled_data import check_labels_known
from ...loading import EvaluationLoader, IndexSampler, NumberSampler, ResumableLoader, loader_options
from ...spans import union
from ..backgrounds import Background, cut_backgrounds
from ..clips import SPLITS, Clip, assign_splits, check_overlaps
from ..composer import Composer
from ..known import digit_clips, prompts_by_kind
from ..reader import AudioReader
from ..skipping import BadFiles, checked_clips
from ..sources import folder_clips, table_clips
from .recordings import (
    MARGIN,
    ComposedRecording,
    ComposedWindows,
    EventRecording,
    FileRecording,
    FileWindows,
    RecordingSet,
)

SOURCES = ("composed", "spans")
CLIPS = ("digits", "prompts", "folder")
# Seeds of the recordings of each split, so that they have nothing in common.
_SEEDS = {"train": 0, "val": 1, "test": 2}
# Windows from which the statistics of the features are taken.
_MEASURED = 64


class AudioEventData(L.LightningDataModule):
    """Recordings with events for fit, validate and test.

    source: "composed" plants clips into backgrounds, "spans" reads a table `path` of path, start, end, label and maybe
    split and group (see `table_clips`; columns: other names for them).
    Of composed ones: clips: "digits" in the folder `path` by `protocol` of `digit_clips`, "prompts" with the kind of a
    prompt as its label, or "folder" whose sub-folders are labels. backgrounds: a folder of long recordings, cut in time
    by background_parts. snr_db: from which the SNR of each event is drawn; test_snr_db: those of the test, a condition
    each, with the same events in the same places. events_per_minute, min_gap, level_db: see `Composer`.
    train_events_per_minute: in training windows, None: the same. train_speed, train_equalizer_db: of training clips,
    for more voices and microphones.
    overlap: whether events may overlap; false with spans: overlapping ones are refused. val_recordings, val_minutes,
    test_recordings, test_minutes: composed anew for each `split_seed`, not for `seed`.
    window: seconds of a training window; each is drawn once from (seed, number). steps: batches in an epoch.
    split_ratio: of train, val and test where clips or spans have no split. seed: of the training windows.

    Raises UserError in the constructor for arguments that make no sense, in `setup` for files that do not fit them.
    """

    def __init__(
        self,
        source: str = "composed",
        path: str | Path | None = None,
        *,
        clips: str = "digits",
        protocol: str = "speakers",
        backgrounds: str | Path | None = None,
        background_parts: Sequence[float] = (0.7, 0.15, 0.15),
        columns: Mapping[str, str | None] | None = None,
        sample_rate: int = 8000,
        snr_db: float | Sequence[float] = (0.0, 20.0),
        test_snr_db: Sequence[float] = (20.0, 10.0, 0.0),
        events_per_minute: float = 12.0,
        train_events_per_minute: float | None = None,
        min_gap: float = 0.2,
        level_db: Sequence[float] = (-42.0, -30.0),
        train_speed: float | Sequence[float] = 1.0,
        train_equalizer_db: float = 0.0,
        overlap: bool = False,
        val_recordings: int = 4,
        val_minutes: float = 2.0,
        test_recordings: int = 1,
        test_minutes: float = 10.0,
        window: float = 10.0,
        batch_size: int = 16,
        steps: int = 200,
        split_ratio: Sequence[float] = (0.8, 0.1, 0.1),
        split_seed: int = 0,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, choice, known in (("source", source, SOURCES), ("clips", clips, CLIPS)):
            if choice not in known:
                raise UserError(f"data.{name}={choice!r} is not a choice.{nearest(str(choice), known)}")
        for name, value, least in (
            ("sample_rate", sample_rate, 1),
            ("val_recordings", val_recordings, 1),
            ("test_recordings", test_recordings, 1),
            ("batch_size", batch_size, 1),
            ("steps", steps, 1),
            ("num_workers", num_workers, 0),
        ):
            check_whole(f"data.{name}", value, least)
        for name, seconds in (("val_minutes", val_minutes), ("test_minutes", test_minutes), ("window", window)):
            if not 0 < seconds < float("inf"):
                raise UserError(f"data.{name}={seconds!r} must be above 0")
        if not list(test_snr_db):
            raise UserError("data.test_snr_db is empty: give the SNRs of the test in dB, such as [20, 10, 0]")
        self.source, self.path, self.clips, self.protocol = source, path, clips, protocol
        self.backgrounds, self.background_parts, self.columns = backgrounds, background_parts, columns
        self.sample_rate, self.overlap, self.window = sample_rate, overlap, float(window)
        self.test_snr_db = [float(snr) for snr in test_snr_db]
        self.composing: dict[str, Any] = {
            "snr_db": snr_db,
            "events_per_minute": events_per_minute,
            "min_gap": min_gap,
            "level_db": level_db,
        }
        self.training: dict[str, Any] = {"speed": train_speed, "equalizer_db": train_equalizer_db}
        if train_events_per_minute is not None:
            self.training["events_per_minute"] = train_events_per_minute
        self.number = {"val": val_recordings, "test": test_recordings}
        self.minutes = {"val": val_minutes, "test": test_minutes}
        self.batch_size, self.steps, self.num_workers = batch_size, steps, num_workers
        self.split_ratio, self.split_seed, self.seed = tuple(split_ratio), split_seed, seed
        self.tested = False
        self.labels: list[str] = []
        self.notes: list[str] = []
        self.bad: BadFiles | None = None
        self.composers: dict[str, Composer] = {}
        self.recordings: dict[str, list[Any]] = {}
        self._facts: dict[str, Any] = {}

    # files ------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Find the files and plan the recordings; no samples of them are kept."""
        if self.labels:
            return
        clips = self._clips() if self.source == "composed" else self._spans()
        self.bad = BadFiles(clip.name for clip in clips if clip.split == "train")
        training = checked_clips([clip for clip in clips if clip.split == "train"], self.bad)
        rest = checked_clips([clip for clip in clips if clip.split != "train"])
        self.labels = sorted({clip.label for clip in training})
        for clip in rest:
            if clip.label not in self.labels:
                raise UserError(f"no training clip has the label {clip.label!r}, but {clip.where or clip.name} has it")
        if self.source == "composed":
            self._compose([*training, *rest])
        else:
            self._record([*training, *rest])

    def _clips(self) -> list[Clip]:
        if self.clips == "prompts":
            # prompts are recorded once each: what they have in common is what kind they are
            return assign_splits(prompts_by_kind(self.path), self.split_ratio, seed=self.split_seed)
        if self.path is None:
            raise UserError(f"data.path is missing: the folder of the clips to plant, data.clips={self.clips}")
        if self.clips == "folder":
            return assign_splits(folder_clips(self.path), self.split_ratio, seed=self.split_seed)
        part = self.split_ratio[1] / (self.split_ratio[0] + self.split_ratio[1])
        return digit_clips(self.path, self.protocol, val_part=part, seed=self.split_seed)

    def _compose(self, clips: Sequence[Clip]) -> None:
        if self.backgrounds is None:
            raise UserError("data.backgrounds is missing: a folder of long recordings into which clips are planted")
        parts = cut_backgrounds(self.backgrounds, self.sample_rate, self.background_parts)
        clips = self._that_fit(clips)
        for split in SPLITS:
            self.composers[split] = self._composer(split, clips, parts[split])
        sizes = {split: composer.bank.clips for split, composer in self.composers.items()}
        seconds = {split: sum(map(len, parts[split])) / self.sample_rate for split in SPLITS}
        groups = {split: sorted({clip.group for clip in own if clip.group}) for split, own in sizes.items()}
        for split in SPLITS:
            who = f", of {', '.join(groups[split])}" if groups[split] else ""
            self.notes.append(f"{split}: {len(sizes[split]):,} clips{who}; {seconds[split]:.0f} s of background")
        self.recordings = {"val": list(self._planned("val")), "test": list(self._planned("test"))}
        shares = self.composers["train"].active_share()
        per_second, trained = self.composing["events_per_minute"] / 60, self.composers["train"].rate / 60
        self._facts = {
            "active": [shares[label] for label in self.labels],
            "per_second": [per_second / len(self.labels)] * len(self.labels),
            "event_seconds": sum(shares.values()) / trained if trained else 0.0,
        }

    def _that_fit(self, clips: Sequence[Clip]) -> list[Clip]:
        """Without the training clips that are longer than a window at their slowest; how many, in a note."""
        slow = min(self.training["speed"]) if isinstance(self.training["speed"], Sequence) else self.training["speed"]
        most = (self.window + 2 * MARGIN) * slow
        kept = [clip for clip in clips if clip.split != "train" or _seconds(clip) <= most]
        if len(kept) < len(clips):
            self.notes.append(
                f"train: {len(clips) - len(kept):,} clips are left out, longer than {most:g} seconds, which fit into "
                f"data.window={self.window:g}"
            )
        return kept

    def _composer(self, split: str, clips: Sequence[Clip], backgrounds: Sequence[Background]) -> Composer:
        own = [clip for clip in clips if clip.split == split]
        if not own:
            raise UserError(f"data.path={self.path}: no clip for {split}, data.split_ratio={list(self.split_ratio)}")
        return Composer(
            own,
            backgrounds,
            sample_rate=self.sample_rate,
            overlap=self.overlap,
            bad=self.bad if split == "train" else None,
            **{**self.composing, **(self.training if split == "train" else {})},
        )

    def _planned(self, split: str) -> Iterator[ComposedRecording]:
        conditions = self.test_snr_db if split == "test" else [None]
        for snr in conditions:
            for number in range(self.number[split]):
                plan = self.composers[split].plan(
                    60 * self.minutes[split],
                    [self.split_seed, _SEEDS[split], number],
                    name=f"{split} {number + 1}" + ("" if snr is None else f", {snr:g} dB"),
                    snr_db=snr,
                )
                yield ComposedRecording(plan, self.labels, "" if snr is None else f"{snr:g} dB")

    def _spans(self) -> list[Clip]:
        if self.path is None:
            raise UserError("data.path is missing: a table with the columns path, start, end and label")
        clips = table_clips(self.path, self.columns)
        if not self.overlap:
            check_overlaps(clips)
        return assign_splits(clips, self.split_ratio, seed=self.split_seed)

    def _record(self, clips: Sequence[Clip]) -> None:
        by_file: dict[tuple[str, str], list[Clip]] = {}
        for clip in clips:
            by_file.setdefault((clip.split, clip.name), []).append(clip)
        self.recordings = {split: [] for split in SPLITS}
        for (split, _), spans in by_file.items():
            self.recordings[split].append(FileRecording(spans[0].path, self.sample_rate, spans, self.labels))
        total = sum(recording.seconds for recording in self.recordings["train"])
        events = [event for recording in self.recordings["train"] for event in recording.truth]
        active = np.zeros(len(self.labels))
        for recording in self.recordings["train"]:
            for label in range(len(self.labels)):
                own = [(start, end) for start, end, number in recording.truth if number == label]
                active[label] += sum(end - start for start, end in union(own))
        counts = np.bincount([label for _, _, label in events], minlength=len(self.labels))
        self._facts = {
            "active": (active / total).tolist(),
            "per_second": (counts / total).tolist(),
            "event_seconds": float(np.mean([end - start for start, end, _ in events])),
        }
        for split in SPLITS:
            here = self.recordings[split]
            found = sum(len(recording.truth) for recording in here)
            minutes = sum(recording.seconds for recording in here) / 60
            self.notes.append(f"{split}: {found:,} events in {len(here):,} recordings of {minutes:.1f} minutes")
            if not here and (split != "test" or self.tested):
                raise UserError(
                    f"data.path={self.path}: no span for {split}, data.split_ratio={list(self.split_ratio)}"
                )

    # what is known of them --------------------------------------------------------------------------------------------

    def schema(self) -> dict[str, Any]:
        """What a model needs to know of its data, and a later process to find events: plain values only.

        active: the share of the training time in which each label sounds. per_second: its events. event_seconds: mean
        length of an event. conditions: of the test.
        """
        conditions = [f"{snr:g} dB" for snr in self.test_snr_db] if self.source == "composed" else [""]
        return {
            "source": self.source,
            "title": self._title(),
            "labels": list(self.labels),
            "sample_rate": self.sample_rate,
            "window": self.window,
            "overlap": self.overlap,
            "conditions": list(dict.fromkeys(conditions)),
            **self._facts,
        }

    def use_labels(self, labels: Sequence[str]) -> None:
        """Number the labels as a trained model does. Raises UserError for one that it does not know."""
        check_labels_known(self.labels, labels, self.path)
        place = [labels.index(label) for label in self.labels]
        for recordings in self.recordings.values():
            for recording in recordings:
                recording.truth = [(start, end, place[label]) for start, end, label in recording.truth]
        for key in ("active", "per_second"):
            values = dict(zip(place, self._facts[key], strict=True))
            self._facts[key] = [values.get(number, 0.0) for number in range(len(labels))]
        self.labels = list(labels)

    def measured(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Training windows in batches, samples (B, T) and lengths (B,), for the statistics of features."""
        windows = self._windows()
        for first in range(0, _MEASURED, self.batch_size):
            # numbers that training does not reach
            batch = windows[np.arange(first, first + self.batch_size) + 2**62]
            yield batch["samples"], batch["lengths"]

    def _title(self) -> str:
        if self.source == "spans":
            return Path(str(self.path)).name
        return f"{self.clips} in {Path(str(self.backgrounds)).name}"

    # loaders ----------------------------------------------------------------------------------------------------------

    def _windows(self) -> Dataset[Any]:
        if self.source == "composed":
            return ComposedWindows(self.composers["train"], self.labels, seconds=self.window, seed=self.seed)
        return FileWindows(self.recordings["train"], seconds=self.window, seed=self.seed, bad=self.bad)

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = NumberSampler(self.batch_size, steps=self.steps)
        return ResumableLoader(self._windows(), sampler=sampler, **loader_options(self.num_workers))

    def val_dataloader(self) -> DataLoader[Any]:
        return self.evaluation(self.recordings["val"])

    def test_dataloader(self) -> DataLoader[Any]:
        return self.evaluation(self.recordings["test"])

    def evaluation(self, recordings: Sequence[EventRecording]) -> DataLoader[Any]:
        """Every recording once, whole: its samples are read by what evaluates it."""
        sampler = IndexSampler(len(recordings), 1)
        return EvaluationLoader(RecordingSet(recordings), sampler=sampler, **{**loader_options(0), "pin_memory": False})


def _seconds(clip: Clip) -> float:
    if clip.end is not None:
        return clip.end - clip.start
    with AudioReader(clip.path) as reader:
        return reader.info.duration - clip.start
