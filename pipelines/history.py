"""The log of a training, metrics.csv, that a resumed run goes on with as if it had never stopped."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import io
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from .atomic import atomic_path, atomic_write_text

log = logging.getLogger("seqzoo")

NAME = "metrics.csv"


@dataclasses.dataclass(frozen=True)
class Continued:
    """The run that a resumed one goes on with: its folder, and how far its log had come when the checkpoint was saved.

    rows: of metrics.csv. step: at which the resumed run logs first. metrics: the last of each name.
    """

    folder: Path
    rows: int
    step: int | None
    metrics: dict[str, float]

    @classmethod
    def of(cls, path: Path, checkpoint: Mapping[str, Any]) -> Continued:
        """From the file of a checkpoint and its content."""
        folder, rows = Path(path).absolute().parent.parent, int(checkpoint.get("log_rows") or 0)
        return cls(folder, rows, checkpoint.get("log_step"), dict(checkpoint.get("metrics", {})))


class MetricsLog(Logger):
    """Rows of metrics in `<run_dir>/logs/metrics.csv`, each on the disk (though not synced) as soon as it is logged.

    continued: the run that this one goes on with; its rows come first. A
    column is added when its name is logged first, and they are in order of their names; then the file is written anew,
    all or nothing. What the disk does not take is kept in memory and tried again, and said once.
    """

    def __init__(self, run_dir: str | Path, continued: Continued | None = None) -> None:
        super().__init__()
        self.path = Path(run_dir) / "logs" / NAME
        self.rows = 0
        self._continued = continued
        self._columns: list[str] = []
        self._waiting: list[dict[str, Any]] = []
        self._failed = False
        self._begun = False

    @property
    def name(self) -> str:
        return ""

    @property
    def version(self) -> str:
        return "logs"

    @property
    def save_dir(self) -> str:
        return str(self.path.parent.parent)

    @property
    def log_dir(self) -> str:
        """The folder of the file."""
        return str(self.path.parent)

    @rank_zero_only
    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """They are in the run's config.yaml."""

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a row."""
        self._begin()
        row = {key: value.item() if hasattr(value, "item") else value for key, value in metrics.items()}
        self._waiting.append({**row, "step": self.rows if step is None else step})
        self.rows += 1
        self.save()

    @rank_zero_only
    def save(self) -> None:
        """Write what waits."""
        if not self._waiting:
            return
        try:
            new = {key for row in self._waiting for key in row} - set(self._columns)
            if new:
                columns = sorted({*self._columns, *new})
                _rewrite(self.path, columns, self._waiting, begin=not self._columns)
                self._columns = columns
            else:
                with open(self.path, "ab", buffering=0) as file:
                    _append(file, _lines(self._columns, self._waiting))
            self._waiting.clear()
            self._failed = False
        except OSError as error:
            if not self._failed:
                log.error("cannot write %s: %s. Its rows are kept and tried again", self.path, error.strerror or error)
            self._failed = True

    @rank_zero_only
    def sync(self) -> int:
        """Have all rows on the disk, for a checkpoint that is about to name their number; returns it."""
        self._begin()
        self.save()
        if self.rows and not self._waiting:
            with contextlib.suppress(OSError), open(self.path, "rb") as file:
                os.fsync(file.fileno())
        return self.rows

    @rank_zero_only
    def finalize(self, status: str) -> None:
        self._begin()  # a training that had ended logs nothing more
        self.save()

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        if self._continued is not None:
            self._columns, self.rows = carry_over(self._continued, self.path.parent.parent)
        if not self.rows:
            self.path.unlink(missing_ok=True)


def _append(file: io.FileIO, data: bytes) -> None:
    """All of it or, where the disk is full half-way, nothing."""
    end = file.seek(0, os.SEEK_END)
    try:
        view = memoryview(data)
        while view:
            view = view[file.write(view) :]
    except OSError:
        os.ftruncate(file.fileno(), end)
        raise


def _lines(columns: list[str], rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, restval="").writerows(rows)
    return text.getvalue().encode()


def _rewrite(path: Path, columns: list[str], rows: list[dict[str, Any]], *, begin: bool) -> None:
    with atomic_path(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as out:
        writer = csv.DictWriter(out, columns, restval="")
        writer.writeheader()
        if not begin:
            with open(path, encoding="utf-8", newline="") as file:
                writer.writerows(csv.DictReader(file))
        writer.writerows(rows)


def carry_over(continued: Continued, run_dir: Path) -> tuple[list[str], int]:
    """Copy the log of a run, as it was when its checkpoint was saved, into the one that goes on with it.

    Returns columns and number of rows: none where there is no log, or one that cannot be that of the checkpoint.
    TensorBoard's files come too; what they hold of later steps is struck out by its `purge_step`.
    """
    table, rows = continued.folder / "logs" / NAME, continued.rows
    if not rows or not table.is_file():
        return [], 0
    with open(table, encoding="utf-8", newline="") as file:
        lines = list(csv.reader(file))
    if len(lines) <= rows:
        log.warning("%s has %d rows, its checkpoint %d: the log begins anew", table, max(len(lines) - 1, 0), rows)
        return [], 0
    lines = lines[: 1 + rows]
    # a column may have been added after the checkpoint was saved
    used = [i for i in range(len(lines[0])) if any(line[i] for line in lines[1:])]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([[line[i] for i in used] for line in lines])
    atomic_write_text(run_dir / "logs" / NAME, text.getvalue())
    if continued.folder.resolve() != run_dir.resolve():
        for events in sorted((continued.folder / "tensorboard").glob("events.out.tfevents.*")):
            (run_dir / "tensorboard").mkdir(exist_ok=True)
            shutil.copyfile(events, run_dir / "tensorboard" / events.name)
    return [lines[0][i] for i in used], rows
