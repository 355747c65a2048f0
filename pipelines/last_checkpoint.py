"""The checkpoint from which a stopped training goes on to the same bits."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch

from . import resume, stopping
from .atomic import atomic_path
from .checkpoints import SafeModelCheckpoint
from .failures.workers import is_worker_failure
from .loading import ResumableLoader


class LastCheckpoint(SafeModelCheckpoint):
    """Saves `last.ckpt` between two batches: when an epoch begins, every `every_n_train_steps`, and after training.

    A training that goes on from it equals one that never stopped, bit for bit; see `resume`. This is also where a
    training stops that a signal has asked to (`stopping`): it saves first. Needs a `ResumableLoader`.
    """

    def __init__(self, dirpath: str | Path, every_n_train_steps: int | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            enable_version_counter=False,
            every_n_train_steps=every_n_train_steps,
            save_on_train_epoch_end=True,
        )
        self._trainer: Any = None  # of a training that has begun
        self._source: Path | None = None  # what it goes on from
        self._place = ""  # of the training, while a checkpoint is made
        self._before_validation: dict[str, Any] | None = None  # the random states, where a validation follows

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(trainer, pl_module, checkpoint)
        self._source = None if self._resumed_from is None else Path(trainer.ckpt_path)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Of a training that had ended nothing is trained: its checkpoint comes along."""
        target = Path(self.dirpath or ".") / "last.ckpt"
        if self._trainer is None and self._source is not None and self._writes and not target.exists():
            with atomic_path(target) as temporary:
                shutil.copyfile(self._source, temporary)

    def state_dict(self) -> dict[str, Any]:
        return {}  # there is one file, whatever was before

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        super().on_train_start(trainer, pl_module)
        self._trainer, self._last_global_step_saved = trainer, trainer.global_step
        loader = trainer.train_dataloader
        if isinstance(loader, ResumableLoader):
            loader.before_batch = self._between
            stopping.defer(True)

    def _between(self) -> None:
        trainer = self._trainer
        loop = trainer.fit_loop.epoch_loop
        stop = self._asked(trainer)
        every = self._every_n_train_steps
        due = loop.batch_progress.current.ready == 0 or (every and trainer.global_step % every == 0)
        if not (due or stop) or (loop.batch_progress.current.ready and loop._should_accumulate()):
            return
        if not self._should_skip_saving_checkpoint(trainer):
            self._save(trainer, "between batches")
        # a signal while it was being written counts too
        self._stop_if(self._asked(trainer))

    @staticmethod
    def _asked(trainer: Any) -> int:
        """The signal that asked one of the processes to stop, or 0."""
        asked = stopping.asked() or 0
        if trainer.world_size > 1:
            asked = int(
                trainer.strategy.reduce(torch.tensor(asked, device=trainer.strategy.root_device), reduce_op="max")
            )
        return asked

    @staticmethod
    def _stop_if(signum: int) -> None:
        if signum:
            raise stopping.Stopped(signum)

    def _save(self, trainer: Any, place: str) -> None:
        self._place = place
        try:
            self._save_topk_checkpoint(trainer, self._monitor_candidates(trainer))
        finally:
            self._place = ""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        begun = trainer.fit_loop.epoch_loop.batch_progress.current.ready > 0
        if self._place == "after training" or (self._place == "between batches" and not begun):
            checkpoint["epoch"] -= 1  # that of the last step, as in a checkpoint of the end of an epoch
        if self._place == "between batches":
            resume.between_batches(trainer, checkpoint["loops"])
        elif self._place == "within a validation":
            resume.before_validation(checkpoint)
            checkpoint["generators"] = self._before_validation
            checkpoint["log_step"] = trainer.fit_loop.epoch_loop._batches_that_stepped + 1
        elif self._place == "after training":
            resume.after_training(checkpoint["loops"], trainer.num_training_batches)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        follows = trainer.world_size == 1 and resume.validation_follows(trainer)
        self._before_validation = resume.random_state() if follows else None

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """A validation may be long: it is given up, and run again from its beginning when the training goes on. Several
        processes, which may have different numbers of batches, finish it."""
        if self._before_validation is None or trainer.sanity_checking or not stopping.asked():
            return
        if trainer.fit_loop.epoch_loop._should_accumulate() or self._should_skip_saving_checkpoint(trainer):
            return
        self._save(trainer, "within a validation")
        self._stop_if(stopping.asked() or 0)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pass

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        self._before_validation = None

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        stopping.defer(False)
        self._last_global_step_saved = -1  # an epoch is over since, or a validation
        if not self._should_skip_saving_checkpoint(trainer):
            self._save(trainer, "after training")
        self._stop_if(self._asked(trainer))

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """A signal to the whole group ends the loader's workers too, and that is an error when a batch is asked for."""
        stopping.defer(False)
        ended = stopping.asked() or is_worker_failure(exception)
        if isinstance(exception, KeyboardInterrupt) or not ended or trainer.world_size > 1:
            return
        progress = trainer.fit_loop.epoch_loop.batch_progress.current
        if (
            trainer.training
            and progress.ready == progress.completed
            and not self._should_skip_saving_checkpoint(trainer)
        ):
            self._save(trainer, "between batches")
