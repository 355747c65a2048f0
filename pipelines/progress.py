"""Progress of a run: a bar with rate and memory on a terminal, plain lines in a log.

Lightning's RichProgressBar stands on private parts of rich and is pinned below rich 15; this one uses rich's
public Progress only.
"""

from __future__ import annotations

import logging
import math
import sys
import time
from collections import deque
from typing import Any, Literal, TextIO

import torch
from lightning.pytorch.callbacks import ProgressBar

log = logging.getLogger("seqzoo")

Kind = Literal["auto", "rich", "plain", "none"]
KINDS = ("auto", "rich", "plain", "none")


def peak_memory() -> str:
    """Peak resident memory of this process, with that of CUDA where it is in use: "1.2 GB + 0.4 GB GPU"."""
    try:
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # kilobytes on Linux, bytes on macOS
        text = _gigabytes(peak * (1 if sys.platform == "darwin" else 1024))
    except ImportError:  # Windows
        text = ""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        text = f"{text} + {_gigabytes(torch.cuda.max_memory_allocated())} GPU".removeprefix(" + ")
    return text


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"


def batch_size_of(batch: Any) -> int:
    """What a batch holds: its tokens where it has some by that name, packed or not; else windows or sequences, the
    first dimension of its first tensor; 0 where there is none."""
    if isinstance(batch, dict) and isinstance(batch.get("tokens"), torch.Tensor):
        return batch["tokens"].numel()
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() else 0
    parts = batch.values() if isinstance(batch, dict) else batch if isinstance(batch, (list, tuple)) else ()
    return next((size for part in parts if (size := batch_size_of(part))), 0)


class Rate:
    """Samples (or tokens) a second over the last `window` seconds, without what passes between stages."""

    def __init__(self, window: float = 10.0, unit: str = "samples") -> None:
        self.window, self.unit = window, unit
        self.marks: deque[tuple[float, int]] = deque()
        self.total = 0

    def reset(self) -> None:
        self.marks.clear()
        self.marks.append((time.monotonic(), self.total))

    def skip(self, seconds: float) -> None:
        """Leave out `seconds` that have just passed with something else."""
        self.marks = deque((then + seconds, total) for then, total in self.marks)

    def add(self, samples: int) -> None:
        now = time.monotonic()
        self.total += samples
        self.marks.append((now, self.total))
        while len(self.marks) > 2 and now - self.marks[0][0] > self.window:
            self.marks.popleft()

    def __call__(self) -> float:
        """Of them a second, NaN before there are two marks."""
        if len(self.marks) < 2:
            return math.nan
        (then, before), (now, after) = self.marks[0], self.marks[-1]
        return (after - before) / (now - then) if now > then else math.nan

    def __str__(self) -> str:
        rate = self()
        return "" if math.isnan(rate) else f"{rate:,.0f} {self.unit}/s" if rate >= 10 else f"{rate:.2f} {self.unit}/s"


class SeqzooProgress(ProgressBar):
    """Common part: counts samples, knows the stage, collects what is shown. A subclass draws."""

    def __init__(self) -> None:
        super().__init__()
        self.enabled = True
        # one for each stage under way: validation runs within a training epoch
        self._rates: list[tuple[Rate, float]] = []
        self._epoch_is_over = False
        self._in_epoch = False

    @property
    def rate(self) -> Rate:
        """The rate of the stage that began last."""
        return self._rates[-1][0] if self._rates else Rate()

    def disable(self) -> None:
        self.enabled = False

    def enable(self) -> None:
        self.enabled = True

    # what a subclass draws

    def begin(self, label: str, total: float) -> None:
        """A stage (or a training epoch) of `total` batches begins; total may be infinite."""
        raise NotImplementedError

    def advance(self, done: int, total: float) -> None:
        """`done` batches of the stage are through."""
        raise NotImplementedError

    def finish(self) -> None:
        """The stage that began last is over."""
        raise NotImplementedError

    # Lightning's hooks

    def _values(self) -> str:
        """Metrics logged for the bar, "train/loss 0.312": of the step, or of the epoch once it is over."""
        values = self.get_metrics(self.trainer, self.trainer.lightning_module)
        values.pop("v_num", None)
        wanted, other = ("_epoch", "_step") if self._epoch_is_over else ("_step", "_epoch")
        shown = {}
        for name, value in values.items():
            base = name.removesuffix(wanted).removesuffix(other)
            if not name.endswith(other) or base + wanted not in values:
                shown[base] = value
        texts = (f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in sorted(shown.items()))
        return "  ".join(texts)

    def _start(self, label: str, total: float) -> None:
        rate = Rate()
        rate.reset()
        self._rates.append((rate, time.monotonic()))
        if self.enabled:
            self.begin(label, total)

    def _step(self, batch: Any, done: int, total: float) -> None:
        self.rate.unit = "tokens" if isinstance(batch, dict) and "tokens" in batch else "samples"
        sampler = getattr(getattr(self.trainer, "train_dataloader", None), "sampler", None)
        same = getattr(sampler, "shared", False) and self.trainer.training
        self.rate.add(batch_size_of(batch) * (1 if same else self.trainer.world_size))
        if self.enabled:
            self.advance(done, total)

    def _stop(self) -> None:
        if self.enabled:
            self.finish()
        if self._rates:
            _, began = self._rates.pop()
            self.rate.skip(time.monotonic() - began)

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        last = trainer.max_epochs
        label = f"epoch {trainer.current_epoch + 1}" + (f"/{last}" if last is not None and last > 0 else "")
        self._in_epoch = True
        self._start(label, self.total_train_batches)

    def _within_epoch(self, trainer: Any) -> None:
        """A run that goes on within an epoch is not told of its beginning."""
        if not self._in_epoch:
            self.on_train_epoch_start(trainer, trainer.lightning_module)

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._within_epoch(trainer)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self._step(batch, batch_idx + 1, self.total_train_batches)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._within_epoch(trainer)
        self._epoch_is_over = True
        self._stop()
        self._epoch_is_over = self._in_epoch = False

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._rates.clear()
        self._in_epoch = False

    def on_validation_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._within_epoch(trainer)
        self._evaluation_starts("validation", dataloader_idx, "total_val_batches_current_dataloader")

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if not trainer.sanity_checking:
            self._step(batch, batch_idx + 1, self.total_val_batches_current_dataloader)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._evaluation_ends()

    def on_test_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluation_starts("test", dataloader_idx, "total_test_batches_current_dataloader")

    def on_test_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._step(batch, batch_idx + 1, self.total_test_batches_current_dataloader)

    def on_test_end(self, trainer: Any, pl_module: Any) -> None:
        self._evaluation_ends()

    def on_predict_batch_start(
        self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._evaluation_starts("predict", dataloader_idx, "total_predict_batches_current_dataloader")

    def on_predict_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._step(batch, batch_idx + 1, self.total_predict_batches_current_dataloader)

    def on_predict_end(self, trainer: Any, pl_module: Any) -> None:
        self._evaluation_ends()

    def _evaluation_starts(self, label: str, dataloader_idx: int, total: str) -> None:
        if self.has_dataloader_changed(dataloader_idx) and not self.trainer.sanity_checking:
            self._start(label, getattr(self, total))

    def _evaluation_ends(self) -> None:
        # the sanity check has begun nothing
        if self._current_eval_dataloader_idx is not None and not self.trainer.sanity_checking:
            self._stop()
        self.reset_dataloader_idx_tracker()


class PlainProgress(SeqzooProgress):
    """A line at the end of each stage and every `seconds` within it, for logs, files and pipes."""

    def __init__(self, seconds: float = 30.0, file: TextIO | None = None) -> None:
        super().__init__()
        if seconds <= 0:
            raise ValueError(f"seconds={seconds} must be above 0")
        self.seconds = seconds
        self.file = file
        self._stages: list[dict[str, Any]] = []  # validation runs within a training epoch

    def begin(self, label: str, total: float) -> None:
        now = time.monotonic()
        self._stages.append({"label": label, "total": total, "done": 0, "began": now, "said": now})

    def advance(self, done: int, total: float) -> None:
        stage = self._stages[-1]
        stage["done"], stage["total"] = done, total
        if time.monotonic() - stage["said"] >= self.seconds:
            stage["said"] = time.monotonic()
            self._say(stage)

    def finish(self) -> None:
        self._say(self._stages.pop(), over=True)

    def _say(self, stage: dict[str, Any], over: bool = False) -> None:
        total = f"/{int(stage['total'])}" if math.isfinite(stage["total"]) else ""
        took = f"{time.monotonic() - stage['began']:.1f} s"
        parts = [
            f"{stage['label']}:",
            f"{stage['done']}{total} batches",
            f"{'in' if over else 'after'} {took}",
        ]
        parts += [part for part in (str(self.rate), peak_memory(), self._values()) if part]
        print("  ".join(parts), file=self.file or sys.stdout, flush=True)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._stages.clear()


class RichProgress(SeqzooProgress):
    """A live bar on a terminal, redrawn every `every` batches, but at most ten times a second."""

    def __init__(self, every: int = 10, file: TextIO | None = None) -> None:
        super().__init__()
        if every < 1:
            raise ValueError(f"every={every} must be at least 1")
        self.every = every
        self.file = file
        self._progress: Any = None
        self._tasks: list[Any] = []
        self._drawn = -math.inf

    def _make(self) -> Any:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        # The columns in the middle never wrap; the values at the end give way on a narrow terminal.
        return Progress(
            TextColumn("{task.description}", style="bold"),
            BarColumn(bar_width=24),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rate]}", style="cyan"),
            TextColumn("{task.fields[memory]}", style="magenta"),
            TextColumn("{task.fields[values]}"),
            console=Console(file=self.file or sys.stdout),
            auto_refresh=False,
        )

    def begin(self, label: str, total: float) -> None:
        if self._progress is None:
            self._progress = self._make()
            self._progress.start()
        fields = {"rate": "", "memory": peak_memory(), "values": ""}
        count = int(total) if math.isfinite(total) else None
        self._tasks.append(self._progress.add_task(label, total=count, **fields))
        self._progress.refresh()

    def advance(self, done: int, total: float) -> None:
        if done % self.every and done != total:
            return
        self._update(done, total)
        self._refresh()

    def _update(self, done: int, total: float) -> None:
        self._progress.update(
            self._tasks[-1],
            completed=done,
            total=int(total) if math.isfinite(total) else None,
            rate=str(self.rate),
            memory=peak_memory(),
            values=self._values(),
        )

    def _refresh(self) -> None:
        now = time.monotonic()
        if now - self._drawn >= 0.1:
            self._drawn = now
            self._progress.refresh()

    def finish(self) -> None:
        task = self._tasks.pop()
        if self._tasks:
            # a validation within an epoch: its values stand in the epoch's line from now on
            self._progress.remove_task(task)
            self._progress.update(self._tasks[-1], values=self._values())
        else:
            self._progress.update(task, values=self._values(), memory=peak_memory())
        self._progress.refresh()
        if not self._tasks:
            # Stopping leaves the finished bar in the scroll-back and frees the screen for tables.
            self._close()

    def _close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None
        self._tasks.clear()

    def disable(self) -> None:
        super().disable()
        self._close()

    def print(self, *args: Any, **kwargs: Any) -> None:
        if self._progress is None:
            print(*args, **kwargs)
        else:
            self._progress.console.print(*args)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._close()

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._close()


def progress_callback(kind: Kind = "auto", *, seconds: float = 30.0, every: int = 10) -> SeqzooProgress | None:
    """The callback: "rich" a bar, "plain" lines, "auto" a bar on a terminal, else lines; None for "none".

    With "none" the Trainer needs enable_progress_bar=False, or Lightning adds a bar of its own; with the
    others it must be True. seconds: least time between two plain lines of a stage. every: batches between two
    updates of the bar.
    """
    if kind not in KINDS:
        raise ValueError(f"progress={kind!r} is unknown; choose from {', '.join(KINDS)}")
    if kind == "auto":
        kind = "rich" if sys.stdout.isatty() else "plain"
    if kind == "rich":
        return RichProgress(every=every)
    return PlainProgress(seconds=seconds) if kind == "plain" else None
