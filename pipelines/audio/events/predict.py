"""What sounds when in recordings of any length: spans as a table and a timeline, read once, in constant memory."""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ...classification import check_output
from ...errors import UserError, nearest
from ...results import print_table, write_csv
from ...text_vectors import text_vectors
from ..clips import Clip
from ..faults import AudioError
from ..overview import Overview
from ..pictures import plot_recording
from ..reader import AudioReader
from ..skipping import checked_clips
from ..sources import recordings_in
from ..streaming import FileSource, stream
from .decoding import EventDecoder, Span
from .module import AudioEventModule

# Rows of the table on the terminal; the file has all.
_SHOWN = 20


def predict(trainer: Any, module: AudioEventModule, cfg: dict[str, Any], run_dir: Path) -> dict[str, Any]:
    """Find the events of the recordings of `data.path`: events.csv, and a picture of each recording.

    query asks for a label, several, or with a head of words for anything. Raises UserError, before anything is
    heard, for recordings that cannot be opened and for labels that the model does not know.
    """
    output = check_output(cfg.get("output") or run_dir / "events.csv")
    files = _files(cfg["data"].get("path"))
    names, columns = _asked(module, cfg.get("query"))
    module.to(trainer.strategy.root_device)
    rows: list[dict[str, Any]] = []
    failed: list[AudioError] = []
    heard, began = 0.0, time.perf_counter()
    for file in files:
        reader = AudioReader(file, sample_rate=module.schema["sample_rate"])
        try:
            spans, overview = listen(module, reader, names, columns)
        except AudioError as error:  # damaged behind its header: what the others hold is not lost
            print(f"skipped: {error}", file=sys.stderr, flush=True)
            failed.append(error)
            continue
        seconds = reader.frames / reader.rate
        heard += seconds
        rows += [
            {
                "recording": str(file),
                "start": round(s.start, 3),
                "end": round(s.end, 3),
                "label": names[s.label],
                "score": round(s.score, 4),
            }
            for s in sorted(spans)
        ]
        title = f"{file.name}: {len(spans):,} events in {seconds:,.1f} seconds"
        plot_recording(overview, spans, names, run_dir / f"{_unique(file, files)}.png", title=title)
    took = max(time.perf_counter() - began, 1e-9)
    write_csv(output, rows, columns=("recording", "start", "end", "label", "score"))
    shown = f", the first {_SHOWN} of {len(rows):,}" if len(rows) > _SHOWN else ""
    if rows:
        print_table(rows[:_SHOWN], title=f"found{shown}")
    times = heard / took
    print(
        f"{len(rows):,} event(s) in {heard:,.1f} seconds of {len(files) - len(failed):,} recording(s), heard in "
        f"{took:.1f} seconds ({times:.0f} times real time); table {output}, pictures in {run_dir}",
        flush=True,
    )
    if failed:
        raise UserError(f"{len(failed):,} of {len(files):,} recording(s) could not be heard to their end: {failed[0]}")
    return {"events": len(rows), "seconds": heard, "times_real_time": times}


def listen(
    module: AudioEventModule, reader: AudioReader, names: Sequence[str], columns: Sequence[int] | torch.Tensor
) -> tuple[list[Span], Overview]:
    """The spans of a recording, and what its picture shows. names: of what is asked for. columns: their numbers among
    the labels, or their vectors (N, text_dim)."""
    net, encoder, task = module.net, module.net.encoder, module.task
    front = encoder.front_end
    if isinstance(columns, torch.Tensor):
        vectors = columns.to(encoder.proj.weight.device)

        def head(y: torch.Tensor) -> torch.Tensor:
            return net.score(y, vectors)
    else:
        chosen = list(columns)

        def head(y: torch.Tensor) -> torch.Tensor:
            return net.answer(y)[..., chosen]

    step, first = front.hop_length / front.sample_rate, float(front.times(1)[0])
    decoder = EventDecoder(len(names), step=step, first=first, **module.decoder_options())
    source = FileSource(reader)
    overview = Overview(source, len(names), step=step)
    window, overlap = float(task.get("window") or module.schema["window"]), float(task.get("window_overlap", 2.0))
    spans: list[Span] = []
    progress = _Progress(reader.name, source.frames / source.sample_rate)
    pieces = stream(
        encoder,
        head,
        overview,
        piece_seconds=window - overlap,
        context_seconds=overlap / 2,
        batch_size=int(task.get("windows_at_once", 8)),
    )
    for piece in pieces:
        probabilities = piece.values.double().sigmoid().cpu().numpy()
        spans += decoder.push(probabilities)
        overview.scored(piece.first, probabilities)
        progress.at((piece.first + len(probabilities)) * step)
    spans += decoder.finish()
    progress.end()
    return spans, overview


def _asked(module: AudioEventModule, query: Any) -> tuple[list[str], list[int] | torch.Tensor]:
    """What is looked for: names, and the numbers of labels or the vectors of words."""
    labels = module.schema["labels"]
    if query is None:
        return list(labels), list(range(len(labels)))
    asked = [str(text).strip() for text in (query if isinstance(query, (list, tuple)) else [query])]
    if not asked or not all(asked):
        raise UserError("query is empty: give a label or words, or null for all labels")
    if all(text in labels for text in asked):
        return asked, [labels.index(text) for text in asked]
    if module.net.text:
        return asked, text_vectors(asked)
    unknown = next(text for text in asked if text not in labels)
    raise UserError(
        f"query={unknown!r} is no label of the model.{nearest(unknown, labels)} "
        "Words of any kind can be asked of a model trained with model.head=text"
    )


def _files(path: Any) -> list[Path]:
    """Recordings that can be opened: a file, or all of a folder."""
    if path is None:
        raise UserError("data.path is missing: a recording or a folder of recordings")
    files = recordings_in(path)
    checked_clips([Clip(file, 0.0, None, "") for file in files])
    return files


def _unique(file: Path, files: Sequence[Path]) -> str:
    """The name of a recording's picture."""
    same = [other for other in files if other.stem == file.stem]
    return file.stem if len(same) == 1 else f"{file.stem}-{same.index(file) + 1}"


class _Progress:
    """A line on a terminal that says how much of a long recording is heard; elsewhere nothing."""

    def __init__(self, name: str, seconds: float) -> None:
        self.name, self.seconds, self._shown = Path(name).name, seconds, time.monotonic()
        self._live = sys.stderr.isatty()

    def at(self, seconds: float) -> None:
        if self._live and time.monotonic() - self._shown > 0.5:
            self._shown = time.monotonic()
            share = min(seconds / self.seconds, 1.0)
            print(f"\r{self.name}: {share:4.0%} of {self.seconds:,.0f} seconds", end="", file=sys.stderr, flush=True)

    def end(self) -> None:
        if self._live:
            print("\r\033[K", end="", file=sys.stderr, flush=True)
