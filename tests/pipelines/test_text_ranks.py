"""Two processes: training rows are shared out, and the test says what one process says."""

from __future__ import annotations

import json
import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from seqzoo.pipelines.run import execute
from seqzoo.pipelines.text.data import TextData

SMALL = [
    *("task=text", "data=text", "model=language_tiny", "mixer=gla", "mixer.num_heads=2", "model.dim=16"),
    *("model.depth=1", "data.seq_len=16", "data.batch_size=4", "data.split_ratio=[0.5,0.25,0.25]"),
    *("data.eval_batch_size=3", "trainer.max_epochs=1", "trainer.accelerator=cpu", "logger.tensorboard=false"),
    *("callbacks.progress=none", "seed=1"),
]


def config(folder: Path, run_dir: Path, *overrides: str) -> dict[str, Any]:
    given = [*SMALL, f"paths.runs={run_dir.parent}", f"data.path={folder}", *overrides]
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=given), resolve=True)  # type: ignore[return-value]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of uneven lengths, an odd number of them for test."""
    root = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(3)
    for i in range(21):
        words = rng.choice(["one", "two", "three", "four"], int(rng.integers(1, 60)))
        (root / f"{i:02}.txt").write_text(" ".join(words))
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def _rank(function: Callable[[int], Any], rank: int, port: int, queue: Any) -> None:
    os.environ |= {"LOCAL_RANK": str(rank), "NODE_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ |= {"WORLD_SIZE": "2", "RANK": str(rank)}
    torch.set_num_threads(1)
    try:
        queue.put((rank, function(rank), None))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def on_two_ranks(function: Callable[[int], Any]) -> list[Any]:
    """What the function returns in each of two processes, which are told of each other as a launcher does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    processes = [context.Process(target=_rank, args=(function, r, port, queue), daemon=True) for r in range(2)]
    for process in processes:
        process.start()
    try:
        found = sorted(queue.get(timeout=120) for _ in processes)
    finally:
        for process in processes:
            process.kill()
            process.join()
    assert [error for *_, error in found] == [None, None], found
    return [value for _, value, _ in found]


def test_training_rows_are_shared_out(folder: Path) -> None:
    """Every row of an epoch on one rank alone, but for the batch that makes their numbers even."""

    def rows(rank: int) -> list[list[int]]:
        dist.init_process_group("gloo", rank=rank, world_size=2)
        data = TextData(folder, seq_len=16, batch_size=8)
        loader = data.train_dataloader()
        return [np.asarray(indices).tolist() for indices in loader.sampler]

    one, two = on_two_ranks(rows)
    data = TextData(folder, seq_len=16, batch_size=8)
    alone = [np.asarray(indices).tolist() for indices in data.train_dataloader().sampler]
    assert len(alone) % 2 == 1 and len(one) == len(two) == len(alone) // 2 + 1
    both = [batch for pair in zip(one, two, strict=True) for batch in pair]
    assert both[: len(alone)] == alone  # the one too many is the first of the next permutation
    assert sorted(i for batch in alone for i in batch) == list(range(len(data.dataset("train"))))


@pytest.fixture(scope="module")
def checkpoint(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "one"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQZOO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        execute("fit", config(folder, run_dir, "data.steps=3", "test_after_fit=false"), run_dir)
    return run_dir / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize("size", [3, 50])
def test_the_test_of_two_ranks_is_that_of_one(folder: Path, checkpoint: Path, tmp_path: Path, size: int) -> None:
    """Rows, windows and carried states; batches of odd number, and one batch for all."""
    options = [f"ckpt_path={checkpoint}", "task.test_protocols=[rows,sliding,carried]", f"data.eval_batch_size={size}"]
    alone = execute("test", config(folder, tmp_path / "a", *options), tmp_path / "a")["test"]
    cfg = config(folder, tmp_path / "b", *options, "trainer.devices=2", "trainer.strategy=ddp")
    first, second = on_two_ranks(lambda rank: execute("test", cfg, tmp_path / "b"))
    assert not second.get("test") and first["test"].keys() == alone.keys()
    for name, value in alone.items():
        assert first["test"][name] == pytest.approx(value, abs=1e-6), name
    assert json.loads((tmp_path / "b" / "metrics.json").read_text())["test"] == first["test"]
    tables = [(tmp_path / name / "test_by_position.csv").read_text().splitlines() for name in "ab"]
    one, two = ([line.split(",")[:3] + line.split(",")[4:] for line in table] for table in tables)
    assert one == two and len(one) > 9  # protocol, from, to and the tokens asked there: each once


def test_a_fit_of_two_ranks_sees_twice_the_rows(folder: Path, tmp_path: Path) -> None:
    """The step of two ranks with half the batch is that of one: their gradients are averaged."""
    options = ["data.steps=1", "test_after_fit=false"]
    one, two = tmp_path / "one", tmp_path / "two"
    execute("fit", config(folder, one, *options, "data.batch_size=8"), one)
    cfg = config(folder, two, *options, "data.batch_size=4", "trainer.devices=2", "trainer.strategy=ddp")
    on_two_ranks(lambda rank: execute("fit", cfg, two))
    single, double = (torch.load(p / "checkpoints" / "last.ckpt", weights_only=True) for p in (one, two))
    for name, value in single["state_dict"].items():
        torch.testing.assert_close(double["state_dict"][name], value, rtol=1e-4, atol=1e-5, msg=name)
