"""The data module of labelled videos: files in, padded batches of frames or of their vectors out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ...errors import UserError, check_whole, nearest
from ...labelled_data import LabelledClipData, labels_of, limited
from ...labelled_tables import TABLES
from ...loading import EvaluationLoader, IndexSampler, NumberSampler, ResumableLoader, loader_options
from ..cache import FeatureCache
from ..clips import SPLITS, VideoClip, assign_splits, shared_between
from ..faults import VideoError
from ..scoring.image_encoder import OUTPUTS, load_image_encoder
from ..skipping import BadFiles, checked_clips
from ..sources import folder_clips, named_clips, table_clips
from .looking import Looked, Looking, Pictures, Vectors
from .protocol import Sampling, leave_out


class VideoBatches(Dataset[Any]):
    """Batches of clips, padded behind the end.

    frames: uint8 (B, T, H, W, 3) or float32 (B, T, ..., D). mask: bool (B, T), True = real. times: float64 (B, T),
    seconds from the start of the clip. labels: int64 (B,), -1 where there is none. clip: int64 (B,), their numbers.
    Indexed by an array: of numbers of clips, every frame in the middle of its part; with a seed by numbers that never
    come again, of which the n-th stands for clip permutation(n // N)[n % N] as drawn from (seed, n). bad: what cannot
    be read is counted there and another clip taken in its place; None: it is an error.
    """

    def __init__(
        self,
        clips: Sequence[VideoClip],
        labels: Sequence[str],
        looking: Looking,
        sampling: Sampling,
        *,
        seed: int | None = None,
        bad: BadFiles | None = None,
    ) -> None:
        self.clips, self.looking, self.sampling, self.seed, self.bad = list(clips), looking, sampling, seed, bad
        number = {label: place for place, label in enumerate(labels)}
        self.labels = np.array([number.get(clip.label, -1) for clip in self.clips], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.clips)

    def __getitem__(self, index: np.ndarray) -> dict[str, Tensor]:
        found = [self._look(int(number)) for number in index]
        rows = np.array([row for row, _ in found], dtype=np.int64)
        return {
            **padded([looked for _, looked in found]),
            "labels": torch.from_numpy(self.labels[rows]),
            "clip": torch.from_numpy(rows),
        }

    def _look(self, number: int) -> tuple[int, Looked]:
        if self.seed is None:
            return number, self._at(number, None)
        random = np.random.default_rng([self.seed, number])
        cycle, place = divmod(number, len(self.clips))
        row = int(np.random.default_rng([self.seed, cycle, 1]).permutation(len(self.clips))[place])
        for other in (*range(row, len(self.clips)), *range(row)):
            try:
                return other, self._at(other, random)
            except VideoError as error:
                if self.bad is None:
                    raise
                self.bad.skip(self.clips[other].name, error)
        raise UserError("no training clip can be read")

    def _at(self, row: int, random: np.random.Generator | None) -> Looked:
        clip = self.clips[row]
        return self.looking.look(clip, self.sampling.times(clip.start, float(clip.end or 0.0), random), random)


def padded(found: Sequence[Looked]) -> dict[str, Tensor]:
    """frames, mask and times of several clips in one batch."""
    most = max(len(looked.times) for looked in found)
    frames = np.zeros((len(found), most, *found[0].frames.shape[1:]), found[0].frames.dtype)
    mask, times = np.zeros((len(found), most), bool), np.zeros((len(found), most))
    for row, looked in enumerate(found):
        number = len(looked.times)
        frames[row, :number], mask[row, :number], times[row, :number] = looked.frames, True, looked.times
    return {"frames": torch.from_numpy(frames), "mask": torch.from_numpy(mask), "times": torch.from_numpy(times)}


class VideoClipData(LabelledClipData[VideoClip]):
    """Labelled videos, or spans of them, for fit, validate, test and predict.

    path: a folder whose sub-folders are labels, a folder with a `pattern` of its file names ("{label}_{group}"), or a
    CSV, TSV or JSONL table with columns path, label and maybe start, end, group, split; `columns` gives others.
    split_ratio: parts of train, val and test where the files do not say, by file and group; split_seed of it.
    leave_out: above 0, each clip is cut in leave_parts pieces of which so many are tested, see `leave_out`, with its
    fold and gap; it takes the place of split_ratio.

    features: an encoder whose vectors the model reads, "packaged" or a name of timm with `weights` and `output`, see
    `load_image_encoder`; rate: frames a second that it looks at. None: the model reads pictures of size x size pixels.
    num_frames: of every clip, or fps with at most max_frames. jitter: training looks at other frames each time. crop
    (of pictures) and flip: what else training changes. backend: of `open_video`. cache_dir, cache_gb: of the vectors.
    limit: train on so many clips, seeded. steps: training batches in an epoch (default: all clips once). seed: of the
    order and of what is random in training.

    `tested` (False: a fit needs no test clips) may be set before `setup`. Raises UserError in the constructor for
    arguments that make no sense, in `setup` for files that do not fit them.
    """

    def __init__(
        self,
        path: str | Path | None = None,
        *,
        pattern: str | None = None,
        columns: Mapping[str, str | None] | None = None,
        split_ratio: Sequence[float] = (0.8, 0.1, 0.1),
        split_seed: int = 0,
        leave_out: int = 0,
        leave_parts: int = 6,
        fold: int = 0,
        gap: float = 0.0,
        features: str | None = "packaged",
        weights: str | None = None,
        output: str = "pooled",
        rate: float = 8.0,
        size: int = 112,
        num_frames: int | None = 32,
        fps: float | None = None,
        max_frames: int = 256,
        jitter: bool = True,
        crop: bool = True,
        flip: bool = False,
        backend: str = "auto",
        cache_dir: str | Path | None = None,
        cache_gb: float = 4.0,
        limit: int | None = None,
        batch_size: int = 16,
        eval_batch_size: int = 16,
        steps: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_frames", 1 if num_frames is None else num_frames, 1),
            ("max_frames", max_frames, 1),
            ("size", size, 8),
            ("leave_out", leave_out, 0),
            ("leave_parts", leave_parts, 1),
            ("fold", fold, 0),
            ("limit", 1 if limit is None else limit, 1),
            ("batch_size", batch_size, 1),
            ("eval_batch_size", eval_batch_size, 1),
            ("steps", 1 if steps is None else steps, 1),
            ("num_workers", num_workers, 0),
        ):
            check_whole(f"data.{name}", value, least)
        for name, number in (("rate", rate), ("fps", 1.0 if fps is None else fps)):
            if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number < 1e4:
                raise UserError(f"data.{name}={number!r} must be a number above 0: frames in a second")
        if (num_frames is None) == (fps is None):
            raise UserError(f"data.num_frames={num_frames} and data.fps={fps}: give one of them, null for the other")
        if output not in OUTPUTS[:2]:
            raise UserError(f"data.output={output!r} is not a choice.{nearest(str(output), OUTPUTS[:2])}")
        if len(split_ratio) != 3 or min(split_ratio) < 0 or not split_ratio[0] > 0:
            raise UserError(f"data.split_ratio={list(split_ratio)} must be three parts: train (above 0), val, test")
        for name, amount in (("gap", gap), ("cache_gb", cache_gb)):
            if isinstance(amount, bool) or not isinstance(amount, (int, float)) or not 0 <= amount < 1e6:
                raise UserError(f"data.{name}={amount!r} must be a number of at least 0")
        self.path = None if path is None else str(path)
        self.pattern, self.columns = pattern, dict(columns or {})
        self.split_ratio, self.split_seed = tuple(split_ratio), split_seed
        self.leaving = {"held_out": leave_out, "parts": leave_parts, "fold": fold, "gap": gap}
        self.features, self.weights, self.output, self.rate = features, weights, output, float(rate)
        self.size, self.crop, self.flip, self.backend = size, crop, flip, backend
        self.sampling, self.jitter = Sampling(num_frames, None if fps is None else float(fps), max_frames), jitter
        self.cache = FeatureCache(cache_dir, int(cache_gb * 2**30)) if cache_gb else None
        self.limit, self.batch_size, self.eval_batch_size = limit, batch_size, eval_batch_size
        self.steps, self.num_workers, self.seed = steps, num_workers, seed
        self.bad: BadFiles | None = None
        self._looking: Looking | None = None

    @property
    def looking(self) -> Looking:
        """What shows clips; the encoder is loaded when it is asked for."""
        if self._looking is None:
            if self.features is None:
                self._looking = Pictures(self.size, crop=self.crop, flip=self.flip, backend=self.backend)
            else:
                encoder = load_image_encoder(self.features, self.weights, output=self.output)  # type: ignore[arg-type]
                self._looking = Vectors(encoder, rate=self.rate, flip=self.flip, backend=self.backend, cache=self.cache)
        return self._looking

    def load(self) -> None:
        """Find the clips, split them, open their files, and make the vectors of their frames, once. A bad file of
        training is left out and counted; one that is evaluated is an error."""
        if self.sets:
            return
        if self.path is None:
            raise UserError(
                "data.path is missing: a folder whose sub-folders are labels, a CSV or JSONL table, or a folder with "
                "data.pattern, such as {label}"
            )
        found = own_clips(self.path, self.pattern, self.columns)
        if self.leaving["held_out"]:
            whole = checked_clips(found, backend=self.backend)
            found = leave_out(whole, **self.leaving)  # type: ignore[arg-type]
        else:
            found = assign_splits(found, self.split_ratio, seed=self.split_seed)
            self.notes = shared_between(found)
        sets = {stage: [clip for clip in found if clip.split == stage] for stage in SPLITS}
        self.bad = BadFiles(clip.name for clip in sets["train"])
        sets["train"] = checked_clips(sets["train"], self.bad, backend=self.backend)
        for stage in SPLITS[1:]:
            sets[stage] = checked_clips(sets[stage], backend=self.backend)
        sets["train"] = limited(sets["train"], self.limit, self.split_seed)
        if isinstance(self.looking, Vectors):
            sets["train"] = self.looking.fill(sets["train"], training=True, bad=self.bad)
            for stage in SPLITS[1:]:
                sets[stage] = self.looking.fill(sets[stage], training=False)
        self.labels = labels_of(sets["train"], sets["val"] + sets["test"])
        self.sets = sets

    def schema(self) -> dict[str, Any]:
        """What a model needs to know of its data, and a later process to classify: plain values only."""
        looking = self.looking
        vectors = isinstance(looking, Vectors)
        return {
            "title": Path(str(self.path)).name,
            "labels": list(self.labels),
            "train_counts": self.counts("train").tolist(),
            "sampling": list(self.sampling),
            "features": self.features,
            "output": self.output if vectors else None,
            "dim": looking.dim if isinstance(looking, Vectors) else None,
            "encoder_key": looking.key if isinstance(looking, Vectors) else None,
            "rate": self.rate if vectors else None,
            "size": None if vectors else self.size,
        }

    # loaders ----------------------------------------------------------------------------------------------------------

    def train_dataloader(self) -> DataLoader[Any]:
        clips = self.sets["train"]
        sampling = self.sampling if self.jitter else _Middles(*self.sampling)
        batches = VideoBatches(clips, self.labels, self.looking, sampling, seed=self.seed, bad=self.bad)
        sampler = NumberSampler(self.batch_size, steps=self.steps, size=None if self.steps else len(clips))
        return ResumableLoader(batches, sampler=sampler, **loader_options(self.num_workers))

    def evaluation(self, clips: Sequence[VideoClip]) -> DataLoader[Any]:
        """Every clip once, in order."""
        sampler = IndexSampler(len(clips), self.eval_batch_size)
        batches = VideoBatches(clips, self.labels, self.looking, self.sampling)
        return EvaluationLoader(batches, sampler=sampler, **loader_options(self.num_workers))


class _Middles(Sampling):
    """The middle of each part, in training too."""

    def times(self, start: float, end: float, random: np.random.Generator | None = None) -> np.ndarray:
        return super().times(start, end, None)


def own_clips(path: str | Path, pattern: str | None, columns: Mapping[str, str | None]) -> list[VideoClip]:
    """The clips of a user's files: a table, a folder with a pattern of names, or a folder of labels."""
    file = Path(path).expanduser()
    if pattern is not None:
        return named_clips(file, pattern)
    if file.suffix.lower() in TABLES or file.is_file():
        return table_clips(file, columns)
    return folder_clips(file)
