"""Checkpoints that a kill, a full disk or a damaged file cannot turn into a loss.

Lightning's own writer puts the temporary file into the system's temporary folder, and moving it from there to
another disk is a copy, which can end half-way. Here it stands beside its target, is synced, and renamed.
"""

from __future__ import annotations

import copy
import io
import logging
import os
import shutil
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from . import stopping
from .atomic import TEMPORARY_SUFFIX, atomic_path, is_full_disk
from .errors import UserError

log = logging.getLogger("seqzoo")


class CheckpointError(UserError):
    """A checkpoint that could not be written or read; the message says which, why and what to do."""


def _is_remote(path: Any) -> bool:
    return "://" in str(path)


def _bytes(number: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "bytes" else f"{number:.1f} {unit}"
        number = number / 1000  # type: ignore[assignment]
    return f"{number:.1f} GB"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Lightning's checkpoint plugin, writing all or nothing and reading only what is whole.

    `Trainer(plugins=[AtomicCheckpointIO()])`. A path with a scheme (s3://...) goes to Lightning's writer.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        """Write; on failure raise CheckpointError and leave an earlier file of that name as it was."""
        if _is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Serialised in memory first: the size is known before the disk is asked, and torch's writer turns an
        # error of the disk into one about its own positions.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        data = buffer.getbuffer()
        try:
            with (
                stopping.saving(),
                atomic_path(path) as temporary,
                open(temporary, "wb", buffering=0) as file,
            ):
                view = memoryview(data)
                while view:
                    view = view[file.write(view) :]
        except OSError as error:
            raise CheckpointError(_cannot_write(Path(path), len(data), error)) from error

    def load_checkpoint(
        self,
        path: Any,
        map_location: Any | None = lambda storage, loc: storage,
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Read with `weights_only=True` unless the caller says False, once the file is known to be whole."""
        return load_checkpoint(path, map_location=map_location, weights_only=weights_only is not False)


def _cannot_write(path: Path, needed: int, error: OSError) -> str:
    kept = f"; the earlier {path.name} is kept" if path.exists() else ""
    if is_full_disk(error):
        free = _free_bytes(path.parent)
        return (
            f"disk full: checkpoint {path} needs {_bytes(needed)}, "
            f"{'unknown' if free is None else _bytes(free)} are free{kept}. "
            "Free some space, or choose another disk with paths.runs=/other/disk/runs"
        )
    return f"cannot write checkpoint {path}: {error.strerror or error}{kept}"


def _free_bytes(folder: Path) -> int | None:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return None


def load_checkpoint(
    path: str | Path, *, map_location: Any = "cpu", weights_only: bool = True, require: tuple[str, ...] = ()
) -> dict[str, Any]:
    """Read a checkpoint file: plain containers and tensors, never code.

    The check sums that torch stores (and does not itself compare) are compared first, so a damaged or
    truncated file is refused whole. require: keys that must be in it. Raises CheckpointError naming the file.
    """
    if _is_remote(path):
        return TorchCheckpointIO().load_checkpoint(path, map_location, weights_only)
    path = Path(path)
    if path.is_dir():
        found = sorted(p.name for p in path.rglob("*.ckpt"))[:5]
        hint = f"; it holds {', '.join(found)}" if found else ""
        raise CheckpointError(f"checkpoint {path} is a folder, not a file{hint}")
    if not path.exists():
        raise CheckpointError(_no_such_checkpoint(path))
    size = path.stat().st_size
    try:
        with zipfile.ZipFile(path) as archive:
            if sum(part.file_size for part in archive.infolist()) > size:  # torch stores its parts as they are
                raise zipfile.BadZipFile("its parts would unpack to more than the file has")
            damaged = archive.testzip()
    except (zipfile.BadZipFile, EOFError, OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint {path} is truncated or not a checkpoint ({size} bytes)") from error
    if damaged is not None:
        raise CheckpointError(f"checkpoint {path} is damaged: the check sum of {damaged} is wrong ({size} bytes)")
    try:
        content = torch.load(path, map_location=map_location, weights_only=weights_only)
    except Exception as error:  # torch raises a dozen kinds here; all mean that this file is not ours
        raise CheckpointError(
            f"checkpoint {path} is not a seqzoo checkpoint: it holds more than tensors and plain values, "
            f"or no pickle at all ({_first_sentence(error)})"
        ) from error
    missing = [key for key in ("state_dict", *require) if not isinstance(content, dict) or key not in content]
    if missing:
        holds = sorted(map(str, content))[:6] if isinstance(content, dict) else [type(content).__name__]
        raise CheckpointError(
            f"checkpoint {path} is not a seqzoo checkpoint: no {', '.join(map(repr, missing))} in it, "
            f"but {', '.join(holds) or 'nothing'}"
        )
    return content


def saved_parameters(checkpoint: dict[str, Any], task: str, path: Path) -> dict[str, Any]:
    """What the module of a checkpoint was built with: model, task, optimizer, scheduler, schema.

    Raises UserError, naming the task, when it is not one of this task.
    """
    saved: Any = checkpoint.get("hyper_parameters")
    wanted = ("model", "task", "optimizer", "scheduler", "schema")
    plain = isinstance(saved, dict) and all(isinstance(saved.get(key, {}), dict) for key in ("model", "task", "schema"))
    missing = sorted(set(wanted) - set(saved if plain else ()))
    if missing:
        raise UserError(f"{path} is no {task} checkpoint of seqzoo: it lacks {', '.join(missing)}")
    found = saved["task"].get("name", task)
    if found != task:
        raise UserError(f"{path} is a checkpoint of task={found}, not {task}: give its experiment, or task={found}")
    return {key: saved[key] for key in wanted}


def check_same_run(
    checkpoint: dict[str, Any],
    own: Mapping[str, Any],
    path: Path,
    sections: Sequence[str] = ("model", "task", "schema"),
) -> None:
    """Raise UserError naming what differs when a checkpoint is of another model, task or data than `own`, the
    hyper-parameters of the module that would go on from it."""
    saved = checkpoint.get("hyper_parameters", {})
    for key in sections:
        there, here = saved.get(key, {}), own[key]
        changed = sorted(k for k in {*there, *here} if there.get(k) != here.get(k))
        if changed:
            section = "data" if key == "schema" else key
            detail = ", ".join(f"{section}.{k}={here.get(k)!r} here, {there.get(k)!r} there" for k in changed)
            raise UserError(f"{path} is of another run, it cannot be resumed: {detail}")


def _no_such_checkpoint(path: Path) -> str:
    folder = path.parent
    near = sorted(p.name for p in folder.glob("*.ckpt"))[:5] if folder.is_dir() else []
    return f"no such checkpoint: {path}" + (f"; {folder} holds {', '.join(near)}" if near else "")


def _first_sentence(error: Exception) -> str:
    text = " ".join(str(error).split())
    return (text.split(". ")[0] or type(error).__name__)[:160]


class SafeModelCheckpoint(ModelCheckpoint):
    """ModelCheckpoint that survives a checkpoint which cannot be written.

    Training goes on: the error is logged in one line, the earlier best and last files stay (their successor
    did not come into being), and the next occasion tries again. After training, `failure` holds the last
    message if the last attempt failed, None otherwise; what is in memory is still whole, so test and report
    can run. Also removes what a killed process left half-written in its folder.
    """

    _BOOKS = (
        "best_k_models",
        "kth_best_model_path",
        "kth_value",
        "best_model_path",
        "best_model_score",
        "current_score",
        "last_model_path",
        "_last_global_step_saved",
        "_last_checkpoint_saved",
    )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.failure: str | None = None
        self._resumed_from: Path | None = None
        self._writes = True

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.ckpt_path and not _is_remote(trainer.ckpt_path):
            self._resumed_from = Path(trainer.ckpt_path).absolute().parent
        self._writes = trainer.is_global_zero

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the books of the run that is gone on with; its best files come along, into the folder of this one."""
        if self.monitor is None or self._resumed_from is None or not self.dirpath:
            return
        kept = {}
        for old, score in state_dict["best_k_models"].items():
            source, target = self._resumed_from / Path(old).name, Path(self.dirpath) / Path(old).name
            if source.is_file():
                kept[str(target)] = score
                if self._writes and source.resolve() != target.resolve():
                    with atomic_path(target) as temporary:
                        shutil.copyfile(source, temporary)
        worst, best = (max, min) if self.mode == "min" else (min, max)
        self.best_k_models = kept
        if kept:
            self.best_model_path = best(kept, key=kept.get)  # type: ignore[arg-type]
            self.best_model_score = kept[self.best_model_path]
            self.current_score = state_dict.get("current_score")
            if len(kept) == self.save_top_k:
                self.kth_best_model_path = worst(kept, key=kept.get)  # type: ignore[arg-type]
                self.kth_value = kept[self.kth_best_model_path]

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit" and trainer.is_global_zero and self.dirpath and not _is_remote(self.dirpath):
            remove_leftovers(self.dirpath)

    def _save_checkpoint(self, trainer: Any, filepath: str) -> None:
        error: CheckpointError | None = None
        try:
            super()._save_checkpoint(trainer, filepath)
        except CheckpointError as caught:
            error = caught
            # The other processes wait at the barrier that follows the writing.
            trainer.strategy.barrier("Trainer.save_checkpoint")
        # Only process 0 writes, but all must keep the same books.
        message = trainer.strategy.broadcast(None if error is None else str(error))
        if message is not None:
            raise CheckpointError(message) from error
        self.failure = None

    def _save_topk_checkpoint(self, trainer: Any, monitor_candidates: dict[str, torch.Tensor]) -> None:
        self._attempt(super()._save_topk_checkpoint, trainer, monitor_candidates)

    def _save_last_checkpoint(self, trainer: Any, monitor_candidates: dict[str, torch.Tensor]) -> None:
        self._attempt(super()._save_last_checkpoint, trainer, monitor_candidates)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        try:
            super().on_exception(trainer, pl_module, exception)
        except CheckpointError as error:
            # what stopped the training must not be hidden by this
            self._failed(trainer, error)

    def _failed(self, trainer: Any, error: CheckpointError, then: str = "") -> None:
        self.failure = str(error)
        if trainer.is_global_zero:
            log.error("%s%s", error, then)

    def _attempt(self, save: Any, trainer: Any, monitor_candidates: dict[str, torch.Tensor]) -> None:
        # Lightning writes the new file into its books before it is on the disk; a failure must take that
        # back, or the next success would delete a file that is still the best.
        books = {name: copy.copy(getattr(self, name)) for name in self._BOOKS}
        try:
            save(trainer, monitor_candidates)
        except CheckpointError as error:
            for name, value in books.items():
                setattr(self, name, value)
            self._failed(trainer, error, then=". Training goes on without this checkpoint")


def remove_leftovers(folder: str | Path) -> list[Path]:
    """Delete the temporary files that a killed process left in a checkpoint folder; returns them."""
    removed = []
    for path in Path(folder).glob(f".*.ckpt-*{TEMPORARY_SUFFIX}"):
        if path.is_file() and os.access(path, os.W_OK):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed
