"""A loss that is not finite in one of two processes: both end, with the module, the batch and the rank."""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from seqzoo.pipelines import loading
from seqzoo.pipelines.environment import RUN_DIR
from seqzoo.pipelines.failures.explain import explained
from seqzoo.pipelines.failures.nonfinite import NonFiniteError
from seqzoo.pipelines.loading import IndexSampler

CASES = ("input", "aux", "parameter", "sums")
SCRIPT = """
import multiprocessing, os, pickle, sys

import torch
from torch import nn

from seqzoo.blocks.backbone import Backbone
from seqzoo.pipelines.failures.nonfinite import NonFiniteError

sys.path.insert(0, sys.argv[1])
from tests.pipelines.test_failures import Rows, Toy, fit

torch.set_num_threads(1)


class OfAll(Toy):
    # as the tasks have it: the loss is a mean over the rows of all processes, auxiliary losses are each one's own
    auxiliary = False

    def training_step(self, batch, batch_idx):
        own = (self.net(batch["x"]).squeeze(-1) - batch["y"]).square().mean()
        loss, seen, _ = self.over_ranks(own, len(batch["x"]))
        wrong = self.auxiliary and self.global_rank == 1 and self.global_step == 2
        aux = float("inf" if wrong else 0)
        self.check_loss(seen + aux, batch_idx)
        return loss + aux


class Normed(nn.Module):
    # each process waits in its forward pass for what the other one sums
    def __init__(self, mixer):
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 8), nn.BatchNorm1d(8)
        self.backbone = Backbone(8, 1, mixer=mixer)
        self.head = nn.Linear(8, 1)

    def forward(self, x):
        x = self.norm(self.embed(x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.backbone(x).y)


def run(case):
    torch.manual_seed(0)
    x = torch.randn(64, 6, 3)
    module = Toy() if case == "input" else OfAll()
    if case == "input":
        x[13, 2, 1] = float("nan")
    elif case == "aux":
        module.auxiliary = True
    elif case == "parameter":
        module.net.head.weight.data[0, 3] = float("inf")
    else:
        module.net = Normed({"name": "long_vq", "num_heads": 2})
        x[13, 2, 1] = float("inf")
    try:
        fit(module, x, strategy="ddp", devices=2)
    except NonFiniteError as error:
        return str(error)
    return "it ended"


def rank(number, port, pipe):
    os.environ |= {"LOCAL_RANK": str(number), "NODE_RANK": "0", "RANK": str(number), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    pipe.send([run(case) for case in sys.argv[3:]])


if __name__ == "__main__":
    context, pipes = multiprocessing.get_context("fork"), []
    for number in range(2):
        here, there = context.Pipe()
        process = context.Process(target=rank, args=(number, sys.argv[2], there), daemon=True)
        process.start()
        there.close()
        pipes.append(here)
    sys.stdout.buffer.write(pickle.dumps([pipe.recv() for pipe in pipes]))
"""


@pytest.fixture(scope="module")
def said(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """What each of the two processes says of each case; in one pair of processes, which end."""
    script = tmp_path_factory.mktemp("ranks") / "two.py"
    script.write_text(SCRIPT)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    words = [sys.executable, str(script), str(Path(__file__).parents[2]), port, *CASES]
    done = subprocess.run(words, env=env, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    first, second = pickle.loads(done.stdout)
    return {case: (first[number], second[number]) for number, case in enumerate(CASES)}


def reads(clip: int) -> tuple[int, int, list[int]]:
    """The process that reads an item of 64 in the first epoch, in which batch, and its items."""
    for rank in range(2):
        with mock.patch.object(loading, "_process", return_value=(rank, 2)):
            for number, rows in enumerate(IndexSampler(64, 4, shuffle=True)):
                if clip in rows:
                    return rank, number, rows.tolist()
    raise AssertionError


@pytest.mark.parametrize("case", ["input", "sums"])
def test_an_input_of_one_process(case: str, said: dict[str, tuple[str, str]]) -> None:
    """Also where the forward pass itself sums over the processes: the second one knows of no other cause."""
    rank, number, rows = reads(13)
    first, second = said[case]
    assert first == second
    named = f"rank {rank} of 2, batch {number} (clip {', '.join(map(str, rows))})"
    cause = f"the input: x of the batch has 1 of 72 values that are not finite in row(s) {rows.index(13)}, batch"
    assert f" at step {number} ({named}): {cause}" in first


def test_an_auxiliary_loss_of_one_process(said: dict[str, tuple[str, str]]) -> None:
    first, second = said["aux"]
    assert first == second and first.startswith("the loss is inf at step 2 (rank 1 of 2, batch 2 (clip ")
    assert "all modules give finite values" in first


def test_a_parameter_of_all(said: dict[str, tuple[str, str]]) -> None:
    first, second = said["parameter"]
    assert first == second and "(ranks 0, 1 of 2, batch 0 (clip " in first
    assert "the first module whose output is not finite is head (Linear): its parameter weight has 1 of 8" in first


def test_a_process_that_was_started_ends_after_the_one_that_started_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Lightning kills the first process where another has failed: it must have said why."""
    monkeypatch.setenv(RUN_DIR, str(tmp_path))
    for rank, asked in (("0", 0), ("1", 4)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        parents = iter((5, 5, 5, 1))
        monkeypatch.setattr(os, "getppid", lambda parents=parents: next(parents))
        with pytest.raises(NonFiniteError, match=r"^why$"), explained({}, tmp_path):
            raise NonFiniteError("why")
        assert len(list(parents)) == 4 - asked
