"""Environment variables of a run: where it is, which rank this process is, and putting them back."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError

RUN_DIR = "SEQZOO_RUN_DIR"  # set for the ranks that Lightning starts beside the first one
CWD = "SEQZOO_CWD"  # where the command runs; conf/paths starts from it
RANK_VARIABLES = ("LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def external_rank() -> tuple[int, str | None]:
    """(rank, id of the job that all ranks share) under torchrun or srun; (0, None) for an ordinary start."""
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env and "RANK" in env:
        name = env["TORCHELASTIC_RUN_ID"]
        if name in ("", "none"):
            if env.get("GROUP_WORLD_SIZE", "1") != "1":
                raise UserError(
                    "several torchrun nodes need a common --rdzv-id, or hydra.run.dir=..., to share a folder"
                )
            name = f"{os.getppid()}{_started(os.getppid())}"  # the one torchrun process that started these ranks
        return int(env["RANK"]), f"torchrun-{name}"
    if "SLURM_PROCID" in env and "SLURM_STEP_ID" in env and int(env.get("SLURM_NTASKS", "1")) > 1:
        return int(env["SLURM_PROCID"]), f"slurm-{env.get('SLURM_JOB_ID', '0')}-{env['SLURM_STEP_ID']}"
    return 0, None


def _started(pid: int) -> str:
    """A process's start in clock ticks after boot, to tell it from an earlier one with the same number; ''
    off Linux.
    """
    try:
        return "-" + Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


@contextlib.contextmanager
def variable(name: str, value: str | None) -> Iterator[None]:
    """An environment variable for a while; None: unset."""
    saved = os.environ.get(name)
    try:
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
        yield
    finally:
        os.environ.pop(name, None)
        if saved is not None:
            os.environ[name] = saved


@contextlib.contextmanager
def environment_kept() -> Iterator[None]:
    """Rank variables that Lightning sets, and our own, do not outlive the command."""
    names = (*RANK_VARIABLES, "SEQZOO_ALLOW", CWD)
    saved = {name: os.environ.get(name) for name in names}
    try:
        yield
    finally:
        for name, value in saved.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
