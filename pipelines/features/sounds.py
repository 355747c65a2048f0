"""Recordings as rows: files, or the spans of a table, in windows of seconds."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch

from ...zoo.audio_text import AudioTextModel
from ..audio.classify.data import AudioClipData, own_clips
from ..audio.clips import Clip
from ..audio.events.data import AudioEventData
from ..audio.faults import AudioError
from ..audio.reader import AudioReader
from ..audio.retrieval.data import AudioPairData
from ..audio.skipping import checked_clips
from ..audio.sources import recordings_in
from ..audio.streaming import FileSource
from ..errors import UserError
from ..labelled_tables import TABLES
from .reading import Rows, check_window, data_options, groups, windows
from .trained import Trained

_DATA: dict[str, type] = {
    "audio_classify": AudioClipData,
    "audio_events": AudioEventData,
    "audio_retrieval": AudioPairData,
}


class _Window(NamedTuple):
    clip: Clip
    start: int  # samples from the start of the file
    samples: np.ndarray


class SoundReader:
    """Recordings of any length for a model of audio, read forwards; one batch of windows is in memory.

    The window is that of the training: the longest clip, or the window of a detector; of a model of recordings and
    texts that hears clips apart, one clip. Start, end and the times of tokens, their centres, are seconds of the file.
    A file that turns out to be damaged is named and left, the others are read. Raises UserError for no recordings.
    """

    def __init__(self, trained: Trained, cfg: dict[str, Any]) -> None:
        net: Any = trained.net
        data = data_options(cfg, trained, _DATA[trained.task])
        if data.get("path") is None:
            raise UserError("data.path is missing: a recording, a folder of recordings, or a CSV or JSONL table")
        self.clips = checked_clips(_clips(data))
        self.encoder = net.encoder
        self.rate = int(self.encoder.sample_rate)
        window, stride = check_window(cfg["task"], whole=False, what="seconds")
        window = window or trained.schema.get("window") or trained.schema.get("max_seconds")
        if isinstance(net, AudioTextModel) and net.context == "clip":
            if cfg["task"].get("window") not in (None, net.clip_seconds):
                own = f"{trained.model} hears clips of {net.clip_seconds:g} seconds"
                raise UserError(f"task.window={window:g}: {own}, leave it null")
            window = net.clip_seconds
        least = self.encoder.front_end.hop_length / self.rate
        for key, value in (("window", window), ("stride", stride)):
            if value is not None and value < least:
                raise UserError(f"task.{key}={value:g} is less than one token, {least:g} seconds")
        self.window = None if window is None else round(window * self.rate)
        self.stride = None if stride is None else round(stride * self.rate)
        self.columns = {"name": pa.string(), "label": pa.string(), "start": pa.float64(), "end": pa.float64()}
        self.time, self.unit = pa.float64(), "seconds"
        self.failed: list[str] = []

    def _windows(self) -> Iterator[_Window]:
        for _, own in itertools.groupby(sorted(self.clips, key=lambda c: (c.name, c.start)), key=lambda c: c.name):
            clips = list(own)
            reader: AudioReader | None = None
            try:
                reader = AudioReader(clips[0].path, sample_rate=self.rate)
                for clip in clips:
                    yield from self._of(clip, reader)
            except AudioError as error:  # damaged behind its header
                print(f"skipped: {error}", file=sys.stderr, flush=True)
                self.failed.append(str(error))
            finally:
                if reader is not None:
                    reader.close()

    def _of(self, clip: Clip, reader: AudioReader) -> Iterator[_Window]:
        first = round(clip.start * self.rate)
        last = reader.frames if clip.end is None else min(round(clip.end * self.rate), reader.frames)
        source = FileSource(reader) if first == 0 else None
        for start, stop in windows(last - first, self.window, self.stride):
            begin, end = first + start, first + stop
            samples = source.samples(begin, end) if source else reader.read(begin, end, unit="frames")
            yield _Window(clip, begin, np.array(samples, dtype=np.float32))

    def batches(self, size: int) -> Iterator[Rows]:
        for group in groups(self._windows(), size):
            yield self._batch(group)

    def _batch(self, group: list[_Window]) -> Rows:
        lengths = np.array([len(w.samples) for w in group])
        samples: np.ndarray = np.zeros((len(group), int(lengths.max())), dtype=np.float32)
        for row, w in enumerate(group):
            samples[row, : len(w.samples)] = w.samples
        ids = [
            {
                "name": w.clip.name,
                "label": w.clip.label or None,
                "start": w.start / self.rate,
                "end": (w.start + len(w.samples)) / self.rate,
            }
            for w in group
        ]

        def of_tokens(length: int) -> list[np.ndarray]:
            if self.encoder.token_merging is not None:  # what is merged has no time
                return [np.full(length, np.nan)] * len(group)
            centres = np.asarray(self.encoder.front_end.times(length), dtype=np.float64)
            return [w.start / self.rate + centres for w in group]

        return Rows(ids, (torch.from_numpy(samples), torch.from_numpy(lengths)), {}, of_tokens)


def _clips(data: dict[str, Any]) -> list[Clip]:
    """The spans of a table, the files of a pattern of names, or whole recordings."""
    path, pattern = Path(str(data["path"])).expanduser(), data.get("pattern")
    if pattern is not None or path.suffix.lower() in TABLES:
        keys = ("path", "label", "start", "end", "group", "split")
        columns = {key: data.get(f"{key}_column") for key in keys} | dict(data.get("columns") or {})
        return own_clips(path, pattern, columns)
    return [Clip(file, 0.0, None, "") for file in recordings_in(path)]
