"""trainer=context_parallel: which rows, which models, and what is refused before training. That two processes train as
one is in test_ranks.py."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from seqzoo.pipelines.context_parallel import ContextParallelStrategy, check_context_parallel
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.loading import IndexSampler
from seqzoo.pipelines.ranks import RankedModule
from seqzoo.pipelines.run import execute
from seqzoo.pipelines.text.data import TextData
from seqzoo.zoo import create_model

SMALL = [
    *("task=text", "data=text", "model=language_tiny", "mixer=gla", "mixer.num_heads=2", "model.dim=16"),
    *("model.depth=1", "data.seq_len=16", "data.split_ratio=[0.5,0.25,0.25]"),
]
TRAINER = [
    *("trainer=context_parallel", "trainer.devices=2", "trainer.accelerator=cpu"),
    *("logger.tensorboard=false", "callbacks.progress=none"),
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Eight documents of 40 to 47 bytes, which are pieces of 16, 16 and the rest."""
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path / "cache"))
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(8):
        (texts / f"{i}.txt").write_text(("abcdefgh" * 6)[i : i + 40 + i])
    return texts


def config(folder: Path, *overrides: str) -> dict[str, Any]:
    words = [*TRAINER, f"data.path={folder}", f"paths.runs={folder.parent}", *overrides]
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        cfg = compose("config", overrides=words)
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ([], r"give data\.whole_rows=true, which trains on the 8 rows of data\.seq_len=16 tokens"),
        (["data.whole_rows=true", "data.seq_len=64"], r"no training document has data\.seq_len=64 tokens; the longest"),
        (["data.whole_rows=true", "task.carry_state=true"], "does not go with task.carry_state=true"),
        (
            ["data.whole_rows=true", "mixer=agent", "+model.causal=false", "task.objective=masked"],
            r"cannot be split over ranks; mixers that can",
        ),
        (
            ["data.whole_rows=true", "trainer.compile=true"],
            "trainer.compile=true does not go with trainer=context_parallel",
        ),
        (["data.whole_rows=true", "trainer.precision=16-mixed"], "use bf16-mixed or 32-true"),
    ],
)
def test_what_cannot_be_cut_is_said_before_training(folder: Path, overrides: list[str], message: str) -> None:
    """By the first process, before it starts another."""
    with (
        mock.patch.object(ContextParallelStrategy, "setup_environment", side_effect=AssertionError("it trains")),
        pytest.raises(UserError, match=message),
    ):
        execute("fit", config(folder, *SMALL, *overrides), folder.parent / "run")


def test_other_pipelines_are_refused(folder: Path) -> None:
    cfg = config(folder, "task=documents", "data=labelled", "model=classifier_tiny")
    with pytest.raises(UserError, match=r"trains task=text alone, not 'documents': use trainer=ddp or trainer=fsdp"):
        execute("fit", cfg, folder.parent / "run")


def test_a_shared_sequence_is_one_of_equal_models() -> None:
    check_context_parallel(create_model("hybrid_tiny", dim=16, depth=4), {"compile": False, "precision": "bf16-mixed"})
    check_context_parallel(create_model("language_tiny", mixer="gla", dim=16, depth=1), {})


def test_whole_rows_leave_out_the_ends_of_documents(folder: Path) -> None:
    data = TextData(folder, seq_len=16, batch_size=3, split_ratio=[0.5, 0.25, 0.25], whole_rows=True)
    loader = data.train_dataloader()
    assert sorted(i for batch in loader.sampler for i in batch) == list(range(8))  # two of each of four documents
    every = list(loader)
    assert sum(len(batch["tokens"]) for batch in every) == 8
    assert all("cu_seqlens" not in batch and batch["tokens"].shape[1] == 16 for batch in every)
    assert sorted(start for batch in every for start in batch["start"].tolist()) == [0] * 4 + [16] * 4


@pytest.mark.parametrize("shared", [False, True])
def test_all_processes_take_the_same_rows_of_a_shared_step(shared: bool) -> None:
    found = []
    for rank in range(2):
        with mock.patch("seqzoo.pipelines.loading._process", return_value=(rank, 2)):
            sampler = IndexSampler(12, 3, shuffle=True, shared=shared)
            found.append([np.sort(batch).tolist() for batch in sampler])
            assert sampler.rows == (3 if shared else 6) and len(sampler) == (4 if shared else 2)
    assert (found[0] == found[1]) == shared
    assert sorted(i for batch in (found[0] if shared else found[0] + found[1]) for i in batch) == list(range(12))


def test_the_rows_of_a_step_do_not_depend_on_the_processes_that_share_them() -> None:
    """A checkpoint of two processes goes on with one and with three; of other rows the fitting number is said."""

    def started(rows: int, ranks: int) -> None:
        module = RankedModule()
        sampler = IndexSampler(40, rows, shuffle=True, shared=True)
        loader = SimpleNamespace(sampler=sampler)
        module._trainer = SimpleNamespace(train_dataloader=loader, global_rank=0, world_size=ranks)  # type: ignore[assignment]
        with mock.patch("seqzoo.pipelines.ranks.num_ranks", return_value=ranks):
            module.start_ranks({"number": 2, "rows": 4})

    started(4, 1)
    started(4, 3)
    with pytest.raises(UserError, match=r"with 4 rows a step, here are 3 with 8.*data\.batch_size=4 goes on"):
        started(8, 3)


def test_a_row_has_a_token_for_every_process() -> None:
    with mock.patch("seqzoo.pipelines.context_parallel.GroupTransport", return_value=SimpleNamespace(size=3, rank=2)):
        assert ContextParallelStrategy().sequence(7).lengths == (3, 2, 2)
        with pytest.raises(UserError, match=r"rows of 2 token\(s\) cannot be cut for 3 processes.*use fewer"):
            ContextParallelStrategy().sequence(2)


def test_gradients_are_averaged_once_a_step() -> None:
    """Of two processes one has the gradient 1 and the other 3, or none: 2, and a half of what there is."""
    module = torch.nn.Linear(1, 1, bias=False)
    strategy = ContextParallelStrategy()
    transport = SimpleNamespace(size=2, all_reduce=lambda flat: flat + 3.0)

    def closure() -> torch.Tensor:
        module.weight.grad = torch.full_like(module.weight, 1.0)
        return torch.zeros(())

    def step(self: Any, optimizer: Any, closure: Any, model: Any = None, **given: Any) -> Any:
        return closure()

    with (
        mock.patch("seqzoo.pipelines.context_parallel.GroupTransport", return_value=transport),
        mock.patch("lightning.pytorch.strategies.DDPStrategy.optimizer_step", step),
    ):
        strategy.optimizer_step(None, closure, module)
        assert module.weight.grad is not None and module.weight.grad.item() == 2.0
        strategy.optimizer_step(None, lambda: None, module)  # a batch that trains nothing
        assert module.weight.grad.item() == 2.0
