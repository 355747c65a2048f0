"""Small runs of each pipeline, killed and resumed through the real command, and what differs from one that was not."""

from __future__ import annotations

import csv
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

COMMON = (
    "trainer.accelerator=cpu",
    "trainer.precision=32-true",
    "trainer.log_every_n_steps=1",
    "callbacks.progress=plain",
    "scheduler=cosine",
)
# pipeline: words of the command; each has dropout, some have workers, validations within an epoch, sums over batches
CASES: dict[str, tuple[str, ...]] = {
    "forecasting/weather": (
        "experiment=forecasting/weather",
        *("model.dim=16", "model.depth=1", "data.steps=40", "data.batch_size=8", "trainer.max_epochs=4"),
        *("trainer.limit_val_batches=2", "trainer.limit_test_batches=2", "callbacks.checkpoint.every_n_train_steps=7"),
    ),
    "forecasting/weather, two workers": (
        "experiment=forecasting/weather",
        *("mixer=gla", "mixer.num_heads=2", "model.dim=16", "model.depth=1", "data.steps=30", "data.batch_size=8"),
        *("trainer.max_epochs=4", "data.num_workers=2", "trainer.limit_val_batches=2"),
        *("trainer.limit_test_batches=2", "callbacks.checkpoint.every_n_train_steps=10"),
    ),
    "text/stdlib_bytes": (
        "experiment=text/stdlib_bytes",
        *("data.limit=60", "data.seq_len=64", "data.batch_size=4", "data.steps=40", "trainer.max_epochs=3"),
        *("model.dim=32", "model.depth=1", "model.ngrams=[2]", "model.proj_drop=0.1"),
        *("trainer.val_check_interval=20", "trainer.limit_val_batches=3", "trainer.limit_test_batches=3"),
        *("callbacks.checkpoint.every_n_train_steps=10", "trainer.max_steps=110"),
    ),
    "documents/listops_quick": (
        "experiment=documents/listops_quick",
        *("data.settings.train=400", "data.settings.val=50", "data.settings.test=50", "data.settings.max_length=40"),
        *("data.steps=40", "data.batch_size=8", "model.dim=16", "model.depth=1", "model.proj_drop=0.1"),
        *("trainer.max_epochs=4", "trainer.accumulate_grad_batches=2", "callbacks.checkpoint.every_n_train_steps=5"),
    ),
    "audio/digits": (
        "experiment=audio/digits",
        *("data.limit=200", "data.steps=25", "data.batch_size=8", "model.dim=16", "model.depth=1"),
        *("trainer.max_epochs=3", "callbacks.checkpoint.every_n_train_steps=10", "trainer.limit_val_batches=2"),
        "trainer.limit_test_batches=2",
    ),
    "audio/find": (
        "experiment=audio/find",
        *("mixer=softmax", "mixer.num_heads=2", "+mixer.window_size=32", "model.dim=16", "model.depth=1"),
        *("data.val_recordings=1", "data.val_minutes=0.5", "data.test_minutes=0.5", "data.test_snr_db=[10.0]"),
        *("data.window=4.0", "data.steps=25", "data.batch_size=2", "trainer.max_epochs=3"),
        *("task.window=20.0", "task.window_overlap=4.0", "callbacks.checkpoint.every_n_train_steps=10"),
    ),
    "video/find": (
        "experiment=video/find",
        *("data.val_videos=1", "data.val_minutes=2.0", "data.test_videos=1", "data.test_minutes=2.0"),
        *(
            "data.window=90.0",
            "data.events_per_video=[1,1]",
            "data.batch_size=2",
            "data.steps=25",
            "trainer.max_epochs=3",
        ),
        "callbacks.checkpoint.every_n_train_steps=null",
    ),
    "audio/retrieval": (
        "experiment=audio/retrieval",
        *("data.limit=80", "data.steps=20", "data.batch_size=8", "model.dim=16", "model.depth=1", "data.join=2"),
        *("trainer.max_epochs=3", "trainer.limit_val_batches=2", "callbacks.checkpoint.every_n_train_steps=7"),
    ),
    "video/signs": (
        "experiment=video/signs",
        *("data.batch_size=8", "data.steps=12", "data.num_frames=4", "model.dim=16", "model.depth=1"),
        *("model.proj_drop=0.1", "trainer.max_epochs=3", "callbacks.checkpoint.every_n_train_steps=5"),
    ),
    "video/pretrain": (
        *("experiment=video/pretrain", "data.path=${paths.data}/videos/asl_gestures", "task.pretext=order"),
        *("model.dim=16", "model.depth=1", "data.batch_size=4", "data.num_frames=4", "data.steps=15"),
        *("trainer.max_epochs=3", "callbacks.checkpoint.every_n_train_steps=6"),
    ),
}
MACHINE = ("run.log", "environment.json", "environment.csv", "config.yaml", "tensorboard")  # not of the training


def environment(data: str | None = None) -> dict[str, str]:
    """One thread, no colours, the folder of data sets."""
    found = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    return {**found, "SEQZOO_DATA": data} if data else found


class Forked:
    """`lightning ...` in a child of this process, which has the libraries imported: what takes longest is done once."""

    def __init__(self, words: list[str], said: Path, env: dict[str, str]) -> None:
        import seqzoo.pipelines.cli
        import seqzoo.pipelines.launcher
        import seqzoo.pipelines.pictures
        import seqzoo.pipelines.run

        self.returncode: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            status = 1
            try:
                with open(said, "ab", buffering=0) as file:
                    os.dup2(file.fileno(), 1)
                    os.dup2(file.fileno(), 2)
                os.environ.update(env)
                sys.argv[1:] = words
                status = seqzoo.pipelines.cli.main(words)
                sys.stdout.flush()
            finally:
                os._exit(status)

    def poll(self) -> int | None:
        """The exit status, None while it runs."""
        if self.returncode is None:
            process, status = os.waitpid(self.pid, os.WNOHANG)
            if process:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self) -> int:
        """The exit status, once it has ended."""
        while (status := self.poll()) is None:
            time.sleep(0.05)
        return status

    def send_signal(self, signum: int) -> None:
        """Send it, unless the process has ended."""
        if self.poll() is None:
            os.kill(self.pid, signum)


Process = subprocess.Popen[bytes] | Forked


def start(
    case: str,
    runs: Path,
    *words: str,
    common: tuple[str, ...] = COMMON,
    env: dict[str, str] | None = None,
    fresh: bool = True,
) -> Process:
    """`lightning fit` of a case in a process of its own; what it says goes to <runs>/said.txt."""
    runs.mkdir(parents=True, exist_ok=True)
    line = ["fit", *CASES[case], *common, f"paths.runs={runs}", *words]
    if not fresh:
        return Forked(line, runs / "said.txt", env or environment())
    with open(runs / "said.txt", "ab") as said:
        command = [sys.executable, "-P", "-m", "seqzoo", *line]
        return subprocess.Popen(command, env=env or environment(), stdout=said, stderr=subprocess.STDOUT)


def run_folder(runs: Path) -> Path | None:
    """The newest run below a folder."""
    found = sorted(runs.glob("*/*/config.yaml"), key=lambda path: path.stat().st_mtime_ns)
    return found[-1].parent if found else None


def steps_logged(run: Path | None) -> int:
    """Steps that a run has told of in its log."""
    path = run / "logs" / "metrics.csv" if run else None
    if path is None or not path.is_file():
        return 0
    with open(path, encoding="utf-8", newline="") as file:
        return max((int(row["step"]) + 1 for row in csv.DictReader(file) if row.get("step")), default=0)


def steps_saved(run: Path | None) -> int:
    """Steps in the last checkpoint of a run."""
    path = run / "checkpoints" / "last.ckpt" if run else None
    return int(torch.load(path, weights_only=True)["global_step"]) if path and path.is_file() else 0


def kill_at(process: Process, runs: Path, step: int, delay: float) -> bool:
    """kill -9 `delay` seconds after the newest run has logged a step; False where the process was through before."""
    before = run_folder(runs)
    while process.poll() is None:
        run = run_folder(runs)
        if run != before and steps_logged(run) >= step:
            time.sleep(delay)
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
                return True
        time.sleep(0.02)
    return False


def kill_in_writing(process: Process, runs: Path, number: int) -> bool:
    """kill -9 while a checkpoint is being written, this many or later: as soon as its temporary file is seen."""
    before, seen = run_folder(runs), set()
    while process.poll() is None:
        run = run_folder(runs)
        if run != before and run is not None and (run / "checkpoints").is_dir():
            break
        time.sleep(0.02)
    while process.poll() is None:
        for entry in os.scandir(run / "checkpoints"):  # type: ignore[operator]
            if entry.name.endswith(".tmp"):
                seen.add(entry.name)
                if len(seen) >= number:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    return True
        time.sleep(0.0002)
    return False


# comparing ------------------------------------------------------------------------------------------------------------


def differences(whole: Path, other: Path) -> list[str]:
    """What is not equal, bit for bit, in two run folders: every file but those about the machine."""
    names = {path.relative_to(root).as_posix() for root in (whole, other) for path in root.rglob("*") if path.is_file()}
    found = []
    for name in sorted(names):
        if name.split("/")[0] in MACHINE:
            continue
        one, two = whole / name, other / name
        if not (one.is_file() and two.is_file()):
            found.append(f"{name}: only in one")
        elif name.endswith(".ckpt"):
            first, second = (torch.load(path, weights_only=True) for path in (one, two))
            found += [f"{name}: {place}" for place in unequal(first, second)]
        elif one.read_bytes() != two.read_bytes():
            found.append(f"{name}: other bytes")
    return found


def unequal(one: Any, two: Any, place: str = "") -> list[str]:
    """The places where two nested containers of plain values and tensors differ; paths count by their last part."""
    if isinstance(one, torch.Tensor) and isinstance(two, torch.Tensor):
        same = one.dtype == two.dtype and one.shape == two.shape and torch.equal(one.nan_to_num(), two.nan_to_num())
        return [] if same else [place]
    if isinstance(one, dict) and isinstance(two, dict):
        one, two = ({_plain(key): value for key, value in part.items()} for part in (one, two))
        places = [f"{place}/{key}" for key in one.keys() ^ two.keys()]
        return places + [
            found for key in one.keys() & two.keys() for found in unequal(one[key], two[key], f"{place}/{key}")
        ]
    if isinstance(one, (list, tuple)) and isinstance(two, (list, tuple)) and len(one) == len(two):
        return [found for i, (a, b) in enumerate(zip(one, two, strict=True)) for found in unequal(a, b, f"{place}/{i}")]
    return [] if _plain(one) == _plain(two) or (one != one and two != two) else [f"{place}: {one!r}, {two!r}"]


def _plain(value: Any) -> Any:
    if isinstance(value, str) and value.startswith("/"):
        name = Path(value).name
        return name if name.endswith(".ckpt") else "a folder"
    return value
