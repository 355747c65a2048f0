"""A run's failures, each with what it was at and what to do, and where the training can go on from."""

from __future__ import annotations

import contextlib
import os
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..environment import RUN_DIR
from .memory import OutOfMemory, explain_memory, is_out_of_memory
from .nonfinite import NonFiniteError
from .steps import WatchedModule
from .workers import WorkerError, explain_worker, is_worker_failure


@contextlib.contextmanager
def explained(cfg: Mapping[str, Any], run_dir: Path) -> Iterator[None]:
    """Within the block: no memory left raises OutOfMemory, a loader's process that dies or hangs WorkerError; these and
    a loss that is not finite say which checkpoint goes on. cfg: the run's config. run_dir: its folder."""
    try:
        yield
    except NonFiniteError as error:
        _let_the_first_end()
        raise NonFiniteError(f"{error}{_go_on(run_dir)}") from error
    except Exception as error:
        if is_out_of_memory(error):
            module = _module(error)
            step = None if module is None else module.at
            optimizers = getattr(getattr(module, "_trainer", None), "optimizers", ())
            # what is to be measured needs the memory that the frames of the failed step still hold
            traceback.clear_frames(error.__traceback__)
            text = explain_memory(error, module, step, cfg, optimizers=optimizers)
            raise OutOfMemory(f"{text}{_go_on(run_dir)}") from error
        if is_worker_failure(error):
            raise WorkerError(f"{explain_worker(error)}{_go_on(run_dir)}") from error
        raise


def _let_the_first_end(seconds: float = 10.0) -> None:
    """In a process that Lightning started beside the first one: wait for that to end. Lightning kills it once it sees
    that another has failed, which may be before it has said why."""
    if RUN_DIR not in os.environ or os.environ.get("LOCAL_RANK", "0") == "0":
        return
    parent, until = os.getppid(), time.monotonic() + seconds
    while os.getppid() == parent and time.monotonic() < until:
        time.sleep(0.05)


def _module(error: BaseException) -> WatchedModule | None:
    """The module at work, from the frames that the error came through."""
    found = None
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in list(frame.f_locals.values()):
            if isinstance(value, WatchedModule):
                found = value
                break
    return found


def _go_on(run_dir: Path) -> str:
    last = run_dir / "checkpoints" / "last.ckpt"
    return f". ckpt_path={last} goes on from the last checkpoint" if last.is_file() else ""
