"""Failures of a run: a loss that is not finite, no memory left, a loader's process that dies or hangs."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from seqzoo.blocks.backbone import Backbone
from seqzoo.pipelines import stopping
from seqzoo.pipelines.checkpoints import AtomicCheckpointIO, load_checkpoint
from seqzoo.pipelines.failures import workers
from seqzoo.pipelines.failures.explain import explained
from seqzoo.pipelines.failures.memory import OutOfMemory, explain_memory, is_out_of_memory, memory_errors, saved_bytes
from seqzoo.pipelines.failures.nonfinite import NonFiniteError
from seqzoo.pipelines.failures.steps import Step, run_again, shapes
from seqzoo.pipelines.failures.workers import WorkerError
from seqzoo.pipelines.last_checkpoint import LastCheckpoint
from seqzoo.pipelines.loading import IndexSampler, ResumableLoader, loader_options, set_worker_timeout
from seqzoo.pipelines.training import TrainingModule, _clip_by_norm


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(3, 8)
        self.backbone = Backbone(8, 2, mixer={"name": "linear", "num_heads": 2})
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(self.embed(x)).y)


class Toy(TrainingModule):
    """Learns the sum of three channels; `clip` says which row of the data is which."""

    def __init__(self, lr: float = 0.01) -> None:
        super().__init__(optimizer={"name": "sgd", "lr": lr}, scheduler={"name": "none"})
        self.net = Net()
        self.draws: list[float] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        self.draws.append(float(torch.rand(())))
        loss = (self.net(batch["x"]).squeeze(-1) - batch["y"]).square().mean()
        self.check_loss(loss, batch_idx)
        self.log("train/loss", loss.detach())
        return loss


class Rows(Dataset):  # type: ignore[type-arg]
    def __init__(self, x: Tensor) -> None:
        self.x = x

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, numbers: np.ndarray) -> dict[str, Tensor]:
        x = self.x[numbers]
        return {"x": x, "y": x.sum(-1), "clip": torch.from_numpy(np.asarray(numbers))}


def fit(module: Toy, x: Tensor | None = None, dataset: Any = None, num_workers: int = 0, **options: Any) -> L.Trainer:
    x = torch.randn(32, 6, 3) if x is None else x
    dataset = Rows(x) if dataset is None else dataset
    sampler = IndexSampler(len(dataset), 4, shuffle=True)
    data = ResumableLoader(dataset, sampler=sampler, **loader_options(num_workers))
    options = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **options}
    trainer = L.Trainer(
        accelerator="cpu", enable_progress_bar=False, enable_model_summary=False, barebones=False, **options
    )
    trainer.fit(module, data)
    return trainer


# Not finite -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_parameter_that_is_not_finite(precision: Any, checkpointing: bool) -> None:
    module = Toy()
    module.net.backbone.set_grad_checkpointing(checkpointing)
    part = module.net.backbone.blocks[1].ffn
    name, parameter = next((n, p) for n, p in part.named_parameters() if p.dim() == 2)
    parameter.data[0, 0] = float("inf")
    before = sum(1 for _ in module.net.modules() if _._forward_hooks or _._forward_pre_hooks)
    with pytest.raises(NonFiniteError) as caught:
        fit(module, precision=precision)
    text = str(caught.value)
    layer, _, own = name.rpartition(".")
    where = f"backbone.blocks.1.ffn.{layer}".rstrip(".")
    assert f"the first module whose output is not finite is {where} (" in text
    assert f"its parameter {own} has 1 of {parameter.numel():,} values that are not" in text
    assert "at step 0 (batch 0 (clip" in text and "the weights were so before this step" in text
    assert before == sum(1 for _ in module.net.modules() if _._forward_hooks or _._forward_pre_hooks)


def test_an_input_that_is_not_finite() -> None:
    x = torch.randn(32, 6, 3)
    x[13, 2, 1] = float("nan")
    with pytest.raises(NonFiniteError) as caught:
        fit(Toy(), x)
    order = list(IndexSampler(32, 4, shuffle=True))
    batch = next(n for n, rows in enumerate(order) if 13 in rows)
    row = int(np.flatnonzero(order[batch] == 13)[0])
    assert f"at step {batch} (batch {batch} (clip {order[batch][0]}, " in str(caught.value)
    said = f"the input: x of the batch has 1 of 72 values that are not finite in row(s) {row}, batch {batch} (clip 13)"
    assert said in str(caught.value) and str(caught.value).endswith("mend the data")


def test_a_layer_that_overflows() -> None:
    module = Toy()
    module.net.head.weight.data.fill_(3e38)
    with pytest.raises(
        NonFiniteError, match=r"whose output is not finite is head \(Linear\): .* from finite parameters"
    ):
        fit(module)


class Between(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 1)
        self.scale = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) * self.scale)


def test_what_no_module_returned() -> None:
    module = Toy()
    module.net = Between()
    module.net.scale = float("inf")
    with pytest.raises(NonFiniteError) as caught:
        fit(module)
    assert "is what second (Linear) is given: 72 of 72 values, computed in the model (Between) after first" in str(
        caught.value
    )


class Steep(torch.autograd.Function):
    """The identity, whose gradient is infinite."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * float("inf")


@pytest.mark.parametrize("clip", [None, 1.0])
def test_gradients_of_the_step_before(clip: float | None) -> None:
    """Only what lies before the steep place has bad gradients, and its last part is named, clipped or not."""
    module = Toy()
    block = module.net.backbone.blocks[1]
    block.register_forward_hook(lambda part, given, out: out._replace(**{out._fields[0]: Steep.apply(out[0])}))
    with pytest.raises(NonFiniteError) as caught:
        fit(module, gradient_clip_val=clip)
    last = [name for name, _ in module.net.named_parameters() if ".blocks.1." in f".{name}"][-1]
    text = str(caught.value)
    assert "at step 1" in text and f"first, from the end of the model, that of {last}" in text
    assert "lower optimizer.lr" in text


def test_clipping_is_torchs_where_the_norm_is_finite() -> None:
    for values in ([3.0, 4.0], [0.1, 0.2]):
        ours, theirs = (nn.Parameter(torch.zeros(2)) for _ in range(2))
        ours.grad, theirs.grad = torch.tensor(values), torch.tensor(values)
        _clip_by_norm([ours], 1.0)
        nn.utils.clip_grad_norm_([theirs], 1.0)
        assert torch.equal(ours.grad, theirs.grad)
    ours.grad = torch.tensor([float("inf"), 1.0])
    _clip_by_norm([ours], 1.0)
    assert ours.grad.tolist() == [float("inf"), 1.0]


def test_a_step_is_run_again_with_its_random_numbers() -> None:
    module = Toy()
    torch.manual_seed(5)
    batch = Rows(torch.randn(4, 6, 3))[np.arange(4)]
    module.on_train_batch_start(batch, 0)
    step = module.at
    assert step is not None
    module.log = lambda *a, **k: None  # type: ignore[method-assign, assignment]
    first = module.training_step(batch, 0)
    state = torch.get_rng_state()
    again = run_again(module, step)
    assert module.draws[0] == module.draws[1] and torch.equal(first, again)
    assert torch.equal(torch.get_rng_state(), state)
    module.on_train_batch_end(None, batch, 0)
    assert module.at is None


# Memory ---------------------------------------------------------------------------------------------------------------

CFG = {
    "data": {"batch_size": 4, "eval_batch_size": 8, "seq_len": 512},
    "task": {"grad_checkpointing": False},
    "trainer": {"precision": "32-true", "accumulate_grad_batches": 1},
    "model": {"mixer": {"name": "softmax"}},
    "optimizer": {"name": "adamw"},
}


def test_out_of_memory_in_training(tmp_path: Path) -> None:
    module = Toy()
    calls = []

    def full(part: nn.Module, given: Any, out: Tensor) -> None:
        calls.append(len(given[0]))
        if len(given[0]) == 4 and len(calls) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB. GPU 0 has a total")

    module.net.head.register_forward_hook(full)
    with pytest.raises(OutOfMemory) as caught, explained(CFG, tmp_path):
        fit(module)
    text = str(caught.value)
    assert "(asked for 20.00 GiB more) in training batch of x (4, 6, 3), y (4, 6)" in text
    weights = 4 * sum(p.numel() for p in module.parameters())
    assert f"parameters {weights / 1000:.3g} kB, gradients {weights / 1000:.3g} kB" in text
    found = re.search(r"activations about ([\d.]+) (\w+) \(4 rows of ([\d.]+) (\w+), measured on one\)", text)
    units = {"bytes": 1, "kB": 1e3, "MB": 1e6}
    assert found is not None and calls[-1] == 1
    whole, row = (float(found[n]) * units[found[n + 1]] for n in (1, 3))
    assert whole == pytest.approx(4 * row, rel=0.01)
    assert "(1) data.batch_size=2 with trainer.accumulate_grad_batches=2" in text
    assert "(2) task.grad_checkpointing=true" in text and "(3) trainer.precision=bf16-mixed" in text
    assert "ckpt_path" not in text


def test_ways_out_that_are_left() -> None:
    cfg = {**CFG, "data": {"batch_size": 1, "seq_len": 512}, "task": {"grad_checkpointing": True}}
    cfg["trainer"] = {"precision": "bf16-mixed"}
    step = Step("training", {"x": torch.ones(1, 3)}, 0)
    text = explain_memory(MemoryError(), None, step, cfg)
    assert "(1) a shorter data.seq_len, 256 say; (2) another mixer" in text and "(3) a smaller model" in text
    cfg["task"] = {**cfg["task"], "name": "text"}
    assert "(2) several devices that share each row: trainer=context_p" in explain_memory(
        MemoryError(), None, step, cfg
    )
    cfg["trainer"]["strategy"] = "context_parallel"
    assert "share each row" not in explain_memory(MemoryError(), None, step, cfg)
    text = explain_memory(MemoryError(), None, Step("test", {"x": torch.ones(1, 3)}, 0), CFG)
    assert "in test batch of x (1, 3)" in text and "(1) data.eval_batch_size=4; (2) trainer.precision" in text


def test_what_autograd_keeps_is_counted() -> None:
    """Of sum(V W x)^2 the input and both products are kept, once each; V is too, but is no activation."""

    class One(nn.Module):
        device = torch.device("cpu")

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(nn.Linear(16, 32, bias=False), nn.Linear(32, 8, bias=False))

        def training_step(self, batch: Tensor, index: int) -> Tensor:
            return self.layers(batch).square().sum()

    assert saved_bytes(One(), Step("training", torch.randn(5, 16), 0)) == 4 * 5 * (16 + 32 + 8)


def test_which_errors_are_of_memory() -> None:
    allocator = RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory: you tried"
    )
    for error in (MemoryError(), allocator, torch.OutOfMemoryError("x"), OSError(12, "Cannot allocate memory")):
        assert is_out_of_memory(error)
    for other in (RuntimeError("shapes differ"), ValueError("can't allocate memory"), KeyError("x")):
        assert not is_out_of_memory(other)
    with (
        pytest.raises(OutOfMemory, match=r"in a batch of ids \(2, 7\).*set_grad_checkpointing"),
        memory_errors(nn.Linear(2, 2), {"ids": torch.ones(2, 7)}),
    ):
        raise allocator
    with pytest.raises(KeyError), memory_errors(nn.Linear(2, 2), {}):
        raise KeyError("x")
    assert shapes({"a": torch.ones(2, 3), "n": torch.ones(2)}) == "a (2, 3)"


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="RLIMIT_AS is Linux's")
def test_a_real_limit() -> None:
    code = (
        "import resource, torch\n"
        "from torch import nn\n"
        "from seqzoo.pipelines.failures.memory import memory_errors\n"
        "used = int(open('/proc/self/statm').read().split()[0]) * resource.getpagesize()\n"
        "resource.setrlimit(resource.RLIMIT_AS, (used + 500_000_000,) * 2)\n"
        "x = torch.ones(8, 1000)\n"
        "with memory_errors(nn.Linear(2, 2), {'x': x}):\n"
        "    torch.ones(1_000_000_000)\n"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert "OutOfMemory: out of memory (asked for 4000000000 bytes more) in a batch of x (8, 1000)" in last


# Workers --------------------------------------------------------------------------------------------------------------


class Files(Rows):
    """Each row has a file; reading number 13 ends or hangs the process that reads it."""

    def __init__(self, folder: Path, how: str) -> None:
        super().__init__(torch.randn(32, 6, 3))
        self.folder, self.how = folder, how
        for number in range(32):
            (folder / f"{number}.txt").write_text(str(number))

    def __getitem__(self, numbers: np.ndarray) -> dict[str, Tensor]:
        for number in numbers:
            path = self.folder / f"{number}.txt"
            if self.how == "said":
                workers.reading(path)  # a library that is no Python opens it
            else:
                path.read_text()
            if number == 13:
                if self.how == "exit":
                    os._exit(3)
                if self.how == "hang":
                    time.sleep(1000)
                os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(numbers)


@pytest.fixture
def timeout() -> Any:
    yield set_worker_timeout
    set_worker_timeout(None)


@pytest.mark.skipif(not hasattr(os, "waitid"), reason="needs os.waitid")
@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("kill", "was killed by SIGKILL, as the system does when memory runs out while it was reading {file}"),
        ("said", "was killed by SIGKILL, as the system does when memory runs out while it was reading {file}"),
        ("exit", "ended with exit status 3 while it was reading {file}"),
        ("hang", "gave no batch for 6 seconds while it was reading {file}; worker_timeout="),
    ],
)
def test_a_worker_is_named_with_its_file(how: str, said: str, tmp_path: Path, timeout: Any) -> None:
    timeout(6)
    (tmp_path / "files").mkdir()
    dataset = Files(tmp_path / "files", how)
    module, callback = Toy(), LastCheckpoint(tmp_path / "checkpoints")
    with stopping.handled(), pytest.raises(WorkerError) as caught, explained(CFG, tmp_path):
        fit(
            module,
            dataset=dataset,
            num_workers=1,
            callbacks=[callback],
            enable_checkpointing=True,
            plugins=[AtomicCheckpointIO()],
        )
    text = str(caught.value)
    assert f"a loader's process {said.format(file=tmp_path / 'files' / '13.txt')}" in text
    assert f"ckpt_path={tmp_path / 'checkpoints' / 'last.ckpt'} goes on" in text
    # nothing that was computed is lost: all steps that were made are saved; a worker is up to two batches ahead
    order = list(IndexSampler(32, 4, shuffle=True))
    before = next(n for n, rows in enumerate(order) if 13 in rows)
    saved = load_checkpoint(tmp_path / "checkpoints" / "last.ckpt")["global_step"]
    assert saved == len(module.draws) and before - 2 <= saved <= before


def test_a_loader_without_workers_has_no_notes() -> None:
    options = loader_options(0)
    assert options["worker_init_fn"] is None and options["timeout"] == 0
    assert loader_options(2)["timeout"] == 600
    workers.reading("x")  # costs nothing and changes nothing here
    with pytest.raises(ValueError, match="worker_timeout=-1 must be at least 0"):
        set_worker_timeout(-1)
    assert list(DataLoader(Rows(torch.ones(2, 6, 3)), sampler=IndexSampler(2, 2), **options))
