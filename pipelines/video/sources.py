"""Labelled spans of videos from folders, from tables, and from the files of data sets for temporal grounding."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError, nearest
from ..labelled_files import FileKind, file_or_folder, files_in, folder_files, named_files, table_files
from ..labelled_tables import table_rows
from .clips import VideoClip
from .faults import missing_error

SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi", ".m4v", ".mpg", ".mpeg", ".ts", ".ogv", ".flv", ".wmv", ".gif")
KIND = FileKind(
    "video",
    SUFFIXES,
    missing_error,
    {"path": ("path", "file", "filename", "video"), "label": ("label", "text", "query", "caption", "class")},
)
FORMATS = ("table", "charades_sta", "activitynet", "lvbench")
MISSING = ("error", "skip")
_CHARADES = re.compile(r"(\S+)\s+(\S+)\s+(\S+?)\s*##(.*)")
# A moment without an end is a span of so many seconds.
_MOMENT = 1.0


def video_files(root: Path) -> list[Path]:
    """The videos of a folder at any depth, in order; hidden ones and other kinds are left out."""
    return files_in(root, KIND)


def videos_in(path: str | Path) -> list[Path]:
    """A video, or all videos of a folder. Raises UserError for neither, and for a folder without any."""
    return file_or_folder(path, KIND)


def folder_clips(path: str | Path) -> list[VideoClip]:
    """The files of a folder whose sub-folders are labels, or whose train, val and test hold such folders:
    `folder_files`."""
    return [VideoClip(*found) for found in folder_files(path, KIND)]


def named_clips(path: str | Path, pattern: str = "{label}") -> list[VideoClip]:
    """The files of a folder, with labels from their names without suffix, "{label}_{speaker}_{take}": `named_files`."""
    return [VideoClip(*found) for found in named_files(path, pattern, KIND)]


def table_clips(path: str | Path, columns: Mapping[str, str | None] | None = None) -> list[VideoClip]:
    """The rows of a CSV, TSV or JSONL table: path and label (or text, query, caption), and where there are such columns
    start and end in seconds, group and split: `table_files`."""
    return [VideoClip(*found) for found in table_files(path, KIND, columns)]


def span_clips(
    path: str | Path,
    format: str = "table",
    *,
    videos: str | Path | None = None,
    columns: Mapping[str, str | None] | None = None,
    missing: str = "error",
) -> list[VideoClip]:
    """The spans of a file in one of FORMATS. videos, missing: see `charades_clips`. Raises UserError for other values,
    and as the readers do."""
    if format not in FORMATS:
        raise UserError(f"format={format!r} is not a choice.{nearest(format, FORMATS)}")
    if format == "table":
        return table_clips(path, columns)
    if videos is None:
        raise UserError(f"the format {format} names videos by their ids: give the folder of their files, data.videos")
    reader = {"charades_sta": charades_clips, "activitynet": activitynet_clips, "lvbench": lvbench_clips}[format]
    return reader(path, videos, missing=missing)


# data sets ------------------------------------------------------------------------------------------------------------


def charades_clips(path: str | Path, videos: str | Path, *, missing: str = "error") -> list[VideoClip]:
    """Charades-STA (arXiv:1705.02101), a line for each sentence: `3MSZA 24.3 30.4##a person turns the light on.`

    videos: the folder in which an id is the name of a file with any usual suffix. missing: what to do with an id
    without a file: "error" or "skip". The split is that of the file's name, train or test, where it says one.
    Raises UserError naming file and line: a line of another form, an end that is not after its start, an empty
    sentence, a missing video.
    """
    file = _file(path)
    ids, split = _Ids(videos, missing), _split_of(file)
    found: list[VideoClip] = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        where = f"{file}, line {number}"
        if not line.strip():
            continue
        match = _CHARADES.fullmatch(line.strip())
        if match is None:
            raise UserError(f"{where}: {line[:60]!r} is not of the form 'ID START END##SENTENCE'")
        key, start, end, text = match.groups()
        found += _clips(ids.find(key, where), [(start, end)], text, key, split, where)
    return ids.finish(found, file)


def activitynet_clips(path: str | Path, videos: str | Path, *, missing: str = "error") -> list[VideoClip]:
    """ActivityNet Captions (arXiv:1705.00754), JSON: {"v_ID": {"duration": 82.7, "timestamps": [[0.8, 19.9], ...],
    "sentences": ["...", ...]}, ...}.

    videos, missing: as in `charades_clips`; an end after the duration becomes the duration. Raises UserError naming
    file and id.
    """
    file = _file(path)
    try:
        records = json.loads(file.read_text(encoding="utf-8-sig"))
    except (ValueError, RecursionError) as error:  # also of a number with too many digits
        raise UserError(f"{file} is not JSON: {error}") from None
    if not isinstance(records, dict):
        raise UserError(f"{file} holds a {type(records).__name__}, expected an object of videos by id")
    ids, split = _Ids(videos, missing), _split_of(file)
    found: list[VideoClip] = []
    for key, record in records.items():
        where = f"{file}, {key}"
        spans, texts = (_field(record, name, list, where) for name in ("timestamps", "sentences"))
        if len(spans) != len(texts):
            raise UserError(f"{where}: {len(spans)} timestamps, but {len(texts)} sentences")
        duration = _seconds(record.get("duration", math.inf), where)
        own = ids.find(key, where)
        for span, text in zip(spans, texts, strict=True):
            if not isinstance(span, list) or len(span) != 2:
                raise UserError(f"{where}: the timestamp {span!r} is not [start, end]")
            # rounding has moved some ends behind the video's and turned some spans around
            start, end = sorted(min(_seconds(value, where), duration) for value in span)
            found += _clips(own, [(start, end)], str(text), key, split, where)
    return ids.finish(found, file)


def lvbench_clips(path: str | Path, videos: str | Path, *, missing: str = "error") -> list[VideoClip]:
    """LVBench (arXiv:2406.08035), a JSON object in each line: {"key": ID, "video_info": {...}, "qa": [{"question":
    "...\\n(A) ...", "time_reference": "00:15-00:19", ...}, ...]}. The text is the question without its choices.

    videos, missing: as in `charades_clips`. A time reference may list several spans, or a moment: one second then; a
    question without one is left out. Raises UserError naming file and line.
    """
    file = _file(path)
    ids = _Ids(videos, missing)
    found: list[VideoClip] = []
    for number, record in table_rows(file):
        where = f"{file}, line {number}"
        key = _field(record, "key", str, where)
        own = ids.find(key, where)
        for question in _field(record, "qa", list, where):
            text = _field(question, "question", str, where).split("\n(A)")[0]
            reference = str(question.get("time_reference") or "").strip()
            if reference:
                found += _clips(own, list(_references(reference, where)), text, key, "", where)
    return ids.finish(found, file)


def clock_seconds(text: str) -> float:
    """Seconds of "MM:SS", "HH:MM:SS" or "SS", each with decimals where wanted. Raises ValueError for anything else."""
    parts = text.strip().split(":")
    if not 1 <= len(parts) <= 3 or not all(re.fullmatch(r"\d+(\.\d+)?", part) for part in parts):
        raise ValueError(f"{text!r} is no time such as 01:23")
    value = 0.0
    for part in parts:
        value = 60 * value + float(part)
    return value


class _Ids:
    """Files by their names without suffix."""

    def __init__(self, videos: str | Path, missing: str) -> None:
        if missing not in MISSING:
            raise UserError(f"missing={missing!r} is not a choice.{nearest(missing, MISSING)}")
        self.root, self.missing = Path(videos).expanduser(), missing
        if not self.root.is_dir():
            raise UserError(f"no such folder of videos: {self.root}")
        self.files = {file.stem: file for file in video_files(self.root)}
        if not self.files:
            raise UserError(f"{self.root} has no video ({', '.join(SUFFIXES)})")
        self.skipped: set[str] = set()

    def find(self, key: str, where: str) -> Path | None:
        # ActivityNet's ids begin with v_, the names of its files need not
        file = self.files.get(key) or self.files.get(key.removeprefix("v_"))
        if file is None:
            if self.missing == "error":
                raise UserError(
                    f"{where}: {self.root} has no video named {key!r}; missing=skip leaves such out."
                    f"{nearest(key, self.files) if len(self.files) <= 1000 else ''}"
                )
            self.skipped.add(key)
        return file

    def finish(self, found: list[VideoClip], file: Path) -> list[VideoClip]:
        if self.skipped:
            print(f"{file}: {len(self.skipped):,} videos are not in {self.root} and left out", flush=True)
        if not found:
            raise UserError(f"{file} has no span of a video in {self.root}")
        return found


def _clips(
    file: Path | None, spans: list[tuple[Any, Any]], text: str, key: str, split: str, where: str
) -> Iterator[VideoClip]:
    text = " ".join(text.split())
    if not text:
        raise UserError(f"{where}: the text is empty")
    for begin, stop in spans:
        start, end = _seconds(begin, where), _seconds(stop, where)
        if end <= start:
            raise UserError(f"{where}: the span ends at {end:g}, not after its start {start:g}")
        if file is not None:
            yield VideoClip(file, start, end, text, key, split, where)


def _seconds(value: Any, where: str) -> float:
    try:
        seconds = float(value)
    except (TypeError, ValueError):
        seconds = math.nan
    if math.isnan(seconds) or seconds < 0:
        raise UserError(f"{where}: {value!r} is no time in seconds")
    return seconds


def _references(text: str, where: str) -> Iterator[tuple[float, float]]:
    for part in re.split(r"[,;]", text):
        if not part.strip():
            continue
        try:
            times = [clock_seconds(time) for time in part.split("-")]
        except ValueError as error:
            raise UserError(f"{where}: time_reference is {text!r}: {error}") from None
        if len(times) > 2:
            raise UserError(f"{where}: time_reference is {text!r}, expected MM:SS-MM:SS")
        start, end = times[0], times[-1]
        yield start, start + _MOMENT if end == start else end


def _field(record: Any, name: str, kind: type, where: str) -> Any:
    if not isinstance(record, dict):
        raise UserError(f"{where}: a {type(record).__name__}, expected an object")
    if not isinstance(record.get(name), kind):
        raise UserError(f"{where}: {name!r} is {record.get(name)!r}, expected a {kind.__name__}")
    return record[name]


def _file(path: str | Path) -> Path:
    file = Path(path).expanduser()
    if not file.is_file():
        raise missing_error(file)
    return file


def _split_of(file: Path) -> str:
    """Of the file's name: charades_sta_train.txt, val_1.json."""
    words = re.split(r"[^a-z]+", file.stem.lower())
    return next((split for split in ("train", "val", "test") if split in words), "")
