"""Resumed runs equal those that never stopped, bit for bit and file for file; signals save and say how to go on.

A kill -9 leaves the files as they are at that moment: a run that is watched copies its folder at chosen moments, and
each copy is gone on with. `test_soak.py` kills for real.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from lightning.pytorch.callbacks import Callback

from seqzoo.pipelines import checkpoints, stopping
from seqzoo.pipelines import run as running
from seqzoo.pipelines.checkpoints import load_checkpoint
from seqzoo.pipelines.cli import main
from seqzoo.pipelines.loading import IndexSampler, ResumableLoader, loader_options

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
COMMON = [
    "trainer.accelerator=cpu",
    "trainer.log_every_n_steps=2",
    "logger.tensorboard=false",
    "callbacks.progress=plain",
]
WAVES = [
    *("data=csv", "model=patch_tiny", "mixer=linear", "mixer.num_heads=2", "model.dim=16", "model.depth=1"),
    *("model.proj_drop=0.2", "data.seq_len=24", "data.pred_len=6", "data.batch_size=16", "data.steps=6"),
    *("trainer.max_epochs=3", "callbacks.checkpoint.every_n_train_steps=4", "test_after_fit=false", *COMMON),
]


@pytest.fixture(scope="module")
def differences() -> Any:
    """What is unequal in two run folders; of the soak, which stands among the benchmarks."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(BENCHMARKS))
        import _soak

        yield _soak.differences
        sys.modules.pop("_soak", None)


@pytest.fixture(scope="module")
def waves(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two daily waves of an hourly table with noise."""
    path = tmp_path_factory.mktemp("table") / "waves.csv"
    random, hours = np.random.default_rng(0), np.arange(400)
    day = np.sin(hours / 24 * 2 * np.pi)
    columns = {"up": 10 + 3 * day + random.normal(0, 0.3, 400), "down": 100 - 20 * day + random.normal(0, 2, 400)}
    pd.DataFrame({"date": pd.date_range("2024-01-01", periods=400, freq="h"), **columns}).to_csv(path, index=False)
    return path


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path_factory.getbasetemp() / "resume-cache"))
    for name in ("SEQZOO_RUN_DIR", "HYDRA_FULL_ERROR", "RANK", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)


class At(Callback):
    """Does something at moments of a training: of a step, before the validation batch after it, or in the test."""

    def __init__(self, action: Callable[[str], None]) -> None:
        self.action = action

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        torch.rand(()), np.random.rand()  # a global generator that someone's callback uses
        self.action(f"step {trainer.global_step}")

    def on_validation_batch_start(self, trainer: Any, *given: Any) -> None:
        self.action(f"validation {trainer.global_step}")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.action("end")

    def on_test_batch_start(self, *given: Any) -> None:
        self.action("test")


def fit(folder: Path, *words: str, action: Callable[[str], None] = lambda moment: None) -> int:
    """`lightning fit` in this process, with something done at its moments."""
    callbacks = running._callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_callbacks", lambda *given, **options: [At(action), *callbacks(*given, **options)])
        return main(["fit", *words, f"hydra.run.dir={folder}"])


class Watch:
    """Copies a run's folder at moments, as a kill -9 would leave it; "write 3" is half-way in the third checkpoint."""

    def __init__(self, folder: Path, moments: list[str], patch: pytest.MonkeyPatch) -> None:
        self.folder, self.moments, self.copies = folder, moments, {}  # type: ignore[var-annotated]
        self.writes = 0
        watch = self

        class Halting:
            def __init__(self, file: Any) -> None:
                self.file, self.halted = file, False

            def __enter__(self) -> Halting:
                return self

            def __exit__(self, *error: Any) -> None:
                self.file.close()

            def write(self, data: Any) -> int:
                if self.halted:
                    return int(self.file.write(data))
                self.halted = True
                done = int(self.file.write(data[: len(data) // 2]))
                watch.writes += 1
                watch(f"write {watch.writes}")
                return done

        patch.setattr(checkpoints, "open", lambda *a, **k: Halting(open(*a, **k)), raising=False)  # noqa: SIM115

    def __call__(self, moment: str) -> None:
        if moment in self.moments and moment not in self.copies:
            self.copies[moment] = shutil.copytree(self.folder, self.folder.with_name(moment.replace(" ", "")))


def watched(folder: Path, words: list[str], moments: list[str]) -> dict[str, Path]:
    """A run that nothing stops; the copies of its folder by moment."""
    with pytest.MonkeyPatch.context() as patch:
        watch = Watch(folder, moments, patch)
        assert fit(folder, *words, action=watch) == 0
    assert list(watch.copies) == moments
    return watch.copies


@pytest.fixture(scope="module")
def kills(waves: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Killed within an epoch, half-way in the writing of a checkpoint, in the last step, and at the end of all."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    return watched(folder, [*WAVES, f"data.path={waves}"], ["step 5", "write 7", "step 17", "end"])


@pytest.fixture(scope="module")
def whole(kills: dict[str, Path]) -> Path:
    """The run of which they are copies."""
    return kills["end"].with_name("run")


@pytest.mark.parametrize("moment", ["step 5", "write 7", "step 17", "end"])
def test_a_killed_run_goes_on_to_the_same_bits(
    moment: str, kills: dict[str, Path], whole: Path, waves: Path, tmp_path: Path, differences: Any
) -> None:
    copy = kills[moment]
    assert bool(list((copy / "checkpoints").glob(".*.tmp"))) == moment.startswith("write")
    words = [*WAVES, f"data.path={waves}", f"ckpt_path={copy}/checkpoints/last.ckpt"]
    assert fit(tmp_path / "rest", *words) == 0
    assert differences(whole, tmp_path / "rest") == []


LETTERS = [
    *("data=labelled", "model=classifier_tiny", "mixer=softmax", "mixer.num_heads=2", "model.dim=16", "model.depth=1"),
    *("model.proj_drop=0.2", "data.batch_size=4", "data.steps=8", "trainer.accumulate_grad_batches=2"),
    *("trainer.max_epochs=2", "callbacks.checkpoint.every_n_train_steps=3", "task=documents", *COMMON),
]
NUMBERS = [
    *("task=text", "data=text", "model=language_tiny", "mixer=gla", "mixer.num_heads=2"),
    *("model.dim=16", "model.depth=1", "model.proj_drop=0.2", "data.seq_len=32"),
    *("data.batch_size=4", "data.steps=8", "data.split_ratio=[0.6,0.2,0.2]", "trainer.val_check_interval=4"),
    *("trainer.max_epochs=2", "callbacks.checkpoint.every_n_train_steps=3", "test_after_fit=false", *COMMON),
]


@pytest.mark.parametrize("task", ["documents", "text"])
def test_other_pipelines(task: str, tmp_path: Path, differences: Any) -> None:
    """Steps of two batches; several validations in an epoch."""
    random = np.random.default_rng(0)
    data = tmp_path / "data"
    for label in ("vowels", "other"):
        (data / label).mkdir(parents=True)
        letters = np.array(list("aeiou" if label == "vowels" else "bcdfg"))
        for i in range(20):
            (data / label / f"{i}.txt").write_text("".join(random.choice(letters, 5 + 3 * i)))
    # in the documents a step is two batches
    words, moments = (LETTERS, ["step 4", "write 4"]) if task == "documents" else (NUMBERS, ["step 5", "write 6"])
    copies = watched(tmp_path / "whole", [*words, f"data.path={data}"], moments)
    for moment, copy in copies.items():
        rest = tmp_path / f"rest {moment}"
        assert fit(rest, *words, f"data.path={data}", f"ckpt_path={copy}/checkpoints/last.ckpt") == 0
        assert differences(tmp_path / "whole", rest) == [], moment


def test_a_finished_run_that_goes_on_has_all_files_too(
    whole: Path, waves: Path, tmp_path: Path, differences: Any
) -> None:
    """As after a kill between the last checkpoint and the report."""
    last = f"ckpt_path={whole}/checkpoints/last.ckpt"
    assert fit(tmp_path / "again", *WAVES, f"data.path={waves}", last) == 0
    assert differences(whole, tmp_path / "again") == []


# Signals ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def heard() -> Iterator[None]:
    """Signals as a terminal leaves them: `nohup` and a shell's background ignore some, and a run then does too."""
    wanted = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


class Send:
    """Sends signals to this process at moments: {"step 5": [SIGTERM]}."""

    def __init__(self, **signals: list[int]) -> None:
        self.signals = {moment.replace("_", " "): numbers for moment, numbers in signals.items()}

    def __call__(self, moment: str) -> None:
        for number in self.signals.pop(moment, []):
            os.kill(os.getpid(), number)


def steps(folder: Path) -> int:
    return int(load_checkpoint(folder / "checkpoints" / "last.ckpt")["global_step"])


@pytest.mark.parametrize(
    ("signum", "moment", "status", "word", "saved"),
    [
        (signal.SIGINT, "step 5", 130, "interrupted", 6),
        (signal.SIGTERM, "validation 12", 143, "stopped by SIGTERM", 12),
        (signal.SIGHUP, "step 17", 129, "stopped by SIGHUP", 18),
    ],
)
@pytest.mark.usefixtures("heard")
def test_a_signal_ends_the_batch_saves_and_says_how_to_go_on(
    signum: int, moment: str, status: int, word: str, saved: int, whole: Path, waves: Path, tmp_path: Path,
    differences: Any, capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    words = [*WAVES, f"data.path={waves}"]
    before = [signal.getsignal(number) for number in stopping.SIGNALS]
    assert fit(tmp_path / "part", *words, action=Send(**{moment.replace(" ", "_"): [signum]})) == status
    assert [signal.getsignal(number) for number in stopping.SIGNALS] == before
    err = capfd.readouterr().err
    path = tmp_path / "part" / "checkpoints" / "last.ckpt"
    assert f"{signal.Signals(signum).name}: saving after this batch" in err
    assert f"{word}; the last checkpoint: ckpt_path={path} goes on from it\n" in err and "Traceback" not in err
    assert steps(tmp_path / "part") == saved
    assert fit(tmp_path / "rest", *words, f"ckpt_path={path}") == 0
    assert differences(whole, tmp_path / "rest") == []


@pytest.mark.usefixtures("heard")
def test_a_second_signal_ends_at_once_and_loses_no_file(
    waves: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*WAVES, f"data.path={waves}"]
    assert fit(tmp_path / "a", *words, action=Send(step_6=[signal.SIGTERM, signal.SIGTERM])) == 143
    assert steps(tmp_path / "a") == 6  # of the beginning of the epoch
    assert "goes on from it" in capfd.readouterr().err


@pytest.mark.usefixtures("heard")
def test_signals_wait_for_a_checkpoint_that_is_being_written(
    waves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    send = Send(write_2=[signal.SIGINT, signal.SIGTERM, signal.SIGTERM])
    with monkeypatch.context() as patch:
        watch = Watch(tmp_path / "a", [], patch)
        watch.__class__ = type("Sending", (Watch,), {"__call__": lambda self, moment: send(moment)})
        assert fit(tmp_path / "a", *WAVES, f"data.path={waves}") == 143
    err = capfd.readouterr().err
    assert err.count("a checkpoint is being written, one moment") == 3
    assert steps(tmp_path / "a") in (4, 6) and not list((tmp_path / "a" / "checkpoints").glob(".*"))


def test_a_signal_outside_of_a_training_ends_at_once(
    waves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = [*WAVES, f"data.path={waves}", "test_after_fit=true", "trainer.max_epochs=1"]
    assert fit(tmp_path / "a", *words, action=Send(test=[signal.SIGTERM])) == 143
    assert steps(tmp_path / "a") == 6 and "stopped by SIGTERM; the last" in capfd.readouterr().err

    def build(cfg: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("seqzoo.pipelines.forecasting.task.build_data", build)
    assert fit(tmp_path / "b", *words) == 143
    assert capfd.readouterr().err.endswith("stopped by SIGTERM before the first checkpoint\n")


def test_a_loader_without_a_place_stops_too(waves: Path, tmp_path: Path) -> None:
    words = [*WAVES, f"data.path={waves}", "trainer.overfit_batches=2", "callbacks.early_stopping=null"]
    assert fit(tmp_path / "a", *words, action=Send(step_3=[signal.SIGTERM])) == 143
    assert steps(tmp_path / "a") == 4


def test_what_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stopping.handled():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            os.kill(os.getpid(), signal.SIGHUP)
            with pytest.raises(stopping.Stopped, match="SIGTERM"):
                os.kill(os.getpid(), signal.SIGTERM)
            assert stopping.asked() == signal.SIGTERM
        assert stopping.asked() is None
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_full_disk_when_stopping_keeps_the_checkpoint_before_and_says_so(
    waves: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: Any
) -> None:
    def action(moment: str) -> None:
        if moment == "step 9":
            monkeypatch.setattr(checkpoints.AtomicCheckpointIO, "save_checkpoint", full)
            os.kill(os.getpid(), signal.SIGTERM)

    def full(self: Any, checkpoint: Any, path: Any, storage_options: Any = None) -> None:
        raise checkpoints.CheckpointError(f"disk full: checkpoint {path} needs 1 MB")

    with caplog.at_level(logging.ERROR, "seqzoo"):
        assert fit(tmp_path / "a", *WAVES, f"data.path={waves}", action=action) == 143
    assert steps(tmp_path / "a") == 8
    err = capfd.readouterr().err
    assert err.count("disk full") == 1 and "goes on from it" in err


def test_a_full_disk_does_not_end_the_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    """Rows that the disk did not take come with the next one that it takes."""
    import errno

    from seqzoo.pipelines import history

    log = history.MetricsLog(tmp_path)
    log.log_metrics({"loss": 1.5}, step=0)

    def full(*given: Any, **options: Any) -> Any:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch, caplog.at_level(logging.ERROR, "seqzoo"):
        patch.setattr(history, "open", full, raising=False)
        log.log_metrics({"loss": 2.5}, step=1)
        log.log_metrics({"loss": 3.5}, step=2)
    assert len(caplog.records) == 1 and "No space left" in caplog.text
    log.log_metrics({"val": 4.0}, step=3)
    assert log.path.read_text().split() == ["loss,step,val", "1.5,0,", "2.5,1,", "3.5,2,", ",3,4.0"]
    assert log.sync() == 4


# Going on -------------------------------------------------------------------------------------------------------------


def test_the_best_checkpoint_comes_along(whole: Path, waves: Path, tmp_path: Path) -> None:
    """A later epoch that is worse than the best before the stop does not become the best."""
    words = [*WAVES, f"data.path={waves}"]
    copy = shutil.copytree(whole, tmp_path / "copy")
    saved = torch.load(copy / "checkpoints" / "last.ckpt", weights_only=True)
    best = next(value for key, value in saved["callbacks"].items() if "val/loss" in key and "best_k_models" in value)
    best["best_k_models"] = {path: torch.tensor(-1.0) for path in best["best_k_models"]}
    torch.save(saved, copy / "checkpoints" / "last.ckpt")
    assert fit(tmp_path / "on", *words, "trainer.max_epochs=4", f"ckpt_path={copy}/checkpoints/last.ckpt") == 0
    kept, before = (load_checkpoint(folder / "checkpoints" / "best.ckpt") for folder in (tmp_path / "on", copy))
    assert kept["global_step"] == before["global_step"] and steps(tmp_path / "on") == 24
    assert not list((tmp_path / "on" / "checkpoints").glob(".*"))


def test_in_the_same_folder_and_longer_than_planned(waves: Path, tmp_path: Path, differences: Any) -> None:
    """A run of one epoch, gone on with in its own folder to two, is one of two where the rate stays."""
    words = [*WAVES, f"data.path={waves}", "scheduler=none"]
    folder = tmp_path / "a"
    assert fit(folder, *words, "trainer.max_epochs=1") == 0
    (folder / "checkpoints" / ".last.ckpt-left.tmp").write_text("half a file")
    assert fit(folder, *words, "trainer.max_epochs=2", f"ckpt_path={folder}/checkpoints/last.ckpt") == 0
    assert fit(tmp_path / "b", *words, "trainer.max_epochs=2") == 0
    assert differences(tmp_path / "b", folder) == []


def test_a_log_that_is_not_of_the_checkpoint_begins_anew(whole: Path, waves: Path, tmp_path: Path, capfd: Any) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy")
    lines = (copy / "logs" / "metrics.csv").read_text().splitlines()
    (copy / "logs" / "metrics.csv").write_text("\n".join(lines[:3]) + "\n")
    words = [*WAVES, f"data.path={waves}", "trainer.max_epochs=4", f"ckpt_path={copy}/checkpoints/last.ckpt"]
    assert fit(tmp_path / "on", *words) == 0
    assert "has 2 rows, its checkpoint 24: the log begins anew" in capfd.readouterr().err
    rows = pd.read_csv(tmp_path / "on" / "logs" / "metrics.csv")
    assert rows["step"].min() == 19 and rows["step"].max() == 23


# Workers ------------------------------------------------------------------------------------------------------------


class Rows(torch.utils.data.Dataset):  # type: ignore[type-arg]
    """The numbers themselves; number 13 ends the process that reads it, `deaths` times."""

    def __init__(self, folder: Path, deaths: int) -> None:
        self.folder, self.deaths = folder, deaths

    def __getitem__(self, numbers: np.ndarray) -> dict[str, Any]:
        if 13 in numbers and len(list(self.folder.iterdir())) < self.deaths:
            (self.folder / str(os.getpid())).touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return {"x": torch.from_numpy(numbers)}


def rows(folder: Path, deaths: int, workers: int) -> ResumableLoader:
    folder.mkdir(exist_ok=True)
    sampler = IndexSampler(20, 2, shuffle=True)
    return ResumableLoader(Rows(folder, deaths), sampler=sampler, **loader_options(workers))


@pytest.mark.skipif(sys.platform == "win32", reason="kills a process")
def test_dead_workers_are_started_again_at_the_same_batch(
    tmp_path: Path, caplog: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    expected = [batch["x"].tolist() for batch in rows(tmp_path, 0, 0)]
    child = signal.getsignal(signal.SIGCHLD)
    with caplog.at_level(logging.WARNING, "seqzoo"):
        found = list(rows(tmp_path / "one", 1, 1))
    assert [batch["x"].tolist() for batch in found] == expected
    assert len(list((tmp_path / "one").iterdir())) == 1 and signal.getsignal(signal.SIGCHLD) is child
    assert caplog.text.count("a data worker died") == 1
    with pytest.raises((RuntimeError, ConnectionError, EOFError)):
        list(rows(tmp_path / "always", 99, 1))
    assert len(list((tmp_path / "always").iterdir())) >= 4  # what came before the death counts anew
