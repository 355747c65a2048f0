"""Several processes: the real command by one and by two, and what it is made of."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_module

from seqzoo.pipelines import loading
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.loading import BucketSampler, EvaluationLoader, IndexSampler, NumberSampler, loader_options
from seqzoo.pipelines.ranks import RankedModule
from seqzoo.pipelines.sharding import ShardedStrategy, check_shardable, create_strategy
from seqzoo.pipelines.text.masking import mask_tokens
from seqzoo.zoo import create_model

REPO = Path(__file__).parents[2]
QUICK = ["text", "documents", "audio_events", "audio_retrieval"]
NEEDED = {"audio": "soundfile", "video": "av"}


def installed(case: str) -> bool:
    import importlib.util

    return all(importlib.util.find_spec(module) for kind, module in NEEDED.items() if case.startswith(kind))


def check(cases: list[str], strategies: list[str], folder: Path) -> None:
    """benchmarks/ranks.py on these cases: one import, then a process and a pair of processes for all of them."""
    env = {k: v for k, v in os.environ.items() if k != "PYTHONSAFEPATH"}  # the script stands beside its cases
    words = ["--steps", "3", "--folder", str(folder), "--strategies", *strategies]
    script = [sys.executable, str(REPO / "benchmarks" / "ranks.py"), *words, "--cases", *cases]
    done = subprocess.run(script, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    rows = json.loads((folder / "ranks.json").read_text())["rows"]
    wanted = {(c, s) for c in cases for s in strategies if s != "context_parallel" or "whole rows" in c}
    assert {(row["pipeline"], row["strategy"]) for row in rows} == wanted
    for row in rows:
        if "refused" in row:
            assert row["strategy"] == "fsdp" and "use trainer=ddp" in row["refused"]
            assert row["pipeline"] in ("audio_retrieval", "video_pretrain: lsmcl")
            continue
        assert row["difference"] < 1e-5, row
        if "figures" in row:
            least = 2 if row["pipeline"].startswith("text: masked") else 3  # of masked tokens there are two
            assert row["figures"] >= least and row["figures differ by"] < 1e-9, row
        if "answers" in row:
            assert row["answers"] > 10 and row["answers equal"], row
    assert len((folder / "ranks.md").read_text().splitlines()) == 6 + len(rows)


def test_two_processes_are_one(tmp_path: Path) -> None:
    cases = [case for case in QUICK if installed(case)]
    check([*cases, "text: whole rows"], ["ddp", "context_parallel"], tmp_path)


@pytest.mark.slow
def test_two_processes_are_one_in_every_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    from _rank_cases import CASES

    check([case.name for case in CASES if installed(case.name)], ["ddp", "fsdp", "context_parallel"], tmp_path)


# which rows -----------------------------------------------------------------------------------------------------------


def rows_of(build: Any, world: int) -> list[list[int]]:
    """The rows of each step of all processes together, over two epochs."""
    steps: list[list[list[int]]] = []
    for rank in range(world):
        with mock.patch.object(loading, "_process", return_value=(rank, world)):
            sampler = build()
            found = []
            for epoch in range(2):
                sampler.set_epoch(epoch)
                batches = [batch.tolist() for batch in sampler]
                assert len(batches) == len(sampler)
                found += batches
            steps.append(found)
    return [[row for part in parts for row in part] for parts in zip(*steps, strict=True)]


def test_the_steps_of_two_processes_are_those_of_one() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 48)
    builds: list[Any] = [
        lambda size: IndexSampler(48, size, shuffle=True, seed=2),
        lambda size: BucketSampler(lengths, size, seed=2),
        lambda size: NumberSampler(size, size=37),
        lambda size: NumberSampler(size, steps=3),
    ]
    for build in builds:
        one = rows_of(lambda build=build: build(8), 1)
        assert rows_of(lambda build=build: build(4), 2) == one
        assert rows_of(lambda build=build: build(2), 4) == one
    assert len(rows_of(lambda: NumberSampler(8, size=37), 1)) == 2 * 5  # five batches have 37 numbers
    with pytest.raises(ValueError, match="give one of them"):
        NumberSampler(4)


def test_a_process_without_a_batch_takes_part() -> None:
    """Lightning refuses a loader of length 0, and leaves out the end of an evaluation without batches."""
    lengths, seen = [], []
    for rank in range(3):
        with mock.patch.object(loading, "_process", return_value=(rank, 3)):
            loader = EvaluationLoader(np.arange(4), sampler=IndexSampler(4, 2), **loader_options(0))  # type: ignore[arg-type]
            lengths.append(len(loader))
            seen.append([batch.tolist() for batch in loader])
    assert lengths == [1, 1, 1] and seen == [[[0, 1]], [[2, 3]], []]


def test_masked_tokens_follow_from_their_place_and_the_step() -> None:
    tokens = torch.arange(40).view(4, 10)
    place = tokens + 1000
    options: dict[str, Any] = {"share": 0.5, "mask_token": 99, "vocab_size": 99}
    whole = mask_tokens(tokens, place=place, draw=7, **options)
    halves = [mask_tokens(tokens[i : i + 2], place=place[i : i + 2], draw=7, **options) for i in (0, 2)]
    for got, parts in zip(whole, zip(*halves, strict=True), strict=True):
        assert torch.equal(got, torch.cat(parts))
    other = mask_tokens(tokens, place=place, draw=8, **options)
    assert not torch.equal(whole[1], other[1])
    shares = torch.stack([(mask_tokens(tokens, place=place, draw=d, **options)[1] >= 0) for d in range(400)]).float()
    assert (shares.mean(0) - 0.5).abs().max() < 0.11  # every token in about half of the draws


# going on -------------------------------------------------------------------------------------------------------------


def started(saved: dict[str, Any] | None, *, ranks: int, rows: int) -> None:
    module = RankedModule()
    sampler = IndexSampler(100, rows, shuffle=True)
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        train_dataloader=SimpleNamespace(sampler=sampler), global_rank=0, world_size=ranks
    )
    with (
        mock.patch("seqzoo.pipelines.ranks.num_ranks", return_value=ranks),
        mock.patch("seqzoo.pipelines.loading._process", return_value=(0, ranks)),
    ):
        module.start_ranks(saved)


def test_another_number_of_processes_goes_on_with_the_same_steps_alone() -> None:
    saved = {"number": 2, "rows": 16}
    started(saved, ranks=2, rows=3)  # the same number: what the position means is not for this to say
    started(saved, ranks=1, rows=16)
    started(saved, ranks=4, rows=4)
    started(None, ranks=2, rows=4)  # a checkpoint of before
    with pytest.raises(
        UserError, match=r"of 2 process\(es\) with 16 rows a step, here are 4 with 32.*batch_size=4 goes"
    ):
        started(saved, ranks=4, rows=8)
    with pytest.raises(UserError, match=r"trainer\.devices=2 goes on"):
        started(saved, ranks=3, rows=16)


def test_each_process_has_its_random_state_again() -> None:
    states = []
    for seed in (3, 4):
        torch.manual_seed(seed)
        states.append({"cpu": torch.get_rng_state(), "cuda": None})
    saved = {"number": 2, "rows": 16, "generators": states}
    for rank in range(2):
        module = RankedModule()
        module._trainer = SimpleNamespace(  # type: ignore[assignment]
            train_dataloader=None, global_rank=rank, world_size=2
        )
        with (
            mock.patch("seqzoo.pipelines.ranks.num_ranks", return_value=2),
            mock.patch.object(RankedModule, "global_rank", rank),
        ):
            module.start_ranks(saved)
        drawn = torch.rand(3)
        torch.manual_seed(3 + rank)
        assert torch.equal(drawn, torch.rand(3))


# configs and scripts --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "strategy"), [(name, name) for name in ("ddp", "fsdp", "context_parallel")])
def test_configs_of_several_devices_are_the_default_but_for_them(name: str, strategy: str) -> None:
    own, default = (yaml.safe_load((REPO / "conf" / "trainer" / f"{f}.yaml").read_text()) for f in (name, "default"))
    assert {key for key in own if own[key] != default.get(key, False)} == {"devices", "strategy"}
    assert own["strategy"] == strategy and own["devices"] == "auto" and set(default) <= set(own)
    assert isinstance(create_strategy(strategy), ShardedStrategy) == (name == "fsdp")


def test_what_cannot_be_shared_out_is_said() -> None:
    options: dict[str, Any] = {"encoder": {"name": "features", "dim": 8}, "dim": 8, "num_stages": 1}
    check_shardable(create_model("selective_s4_tiny", **options, keep_ratio=1.0))
    with pytest.raises(UserError, match=r"cannot share out SelectiveS4.*use trainer=ddp"):
        check_shardable(create_model("selective_s4_tiny", **options))
    scale = torch.nn.Module()
    scale.register_parameter("logit_scale", torch.nn.Parameter(torch.tensor(1.0)))
    with pytest.raises(UserError, match=r"cannot share out logit_scale.*use trainer=ddp"):
        check_shardable(scale)


@pytest.mark.parametrize("script", ["multi_gpu.sh", "slurm.sh"])
def test_scripts_call_the_command(script: str, tmp_path: Path) -> None:
    """With a recorder in place of `srun` and `lightning`: their words compose."""
    for name in ("lightning", "srun"):
        recorder = tmp_path / name
        recorder.write_text(f'#!/bin/sh\necho {name} "$@"\n')
        recorder.chmod(0o755)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_NUM_NODES": "3"}
    words = ["experiment=forecasting/weather", "data.batch_size=16"]
    for trainer in (None, "fsdp"):
        given = env if trainer is None else {**env, "TRAINER": trainer}
        done = subprocess.run(
            [REPO / "examples" / script, *words], env=given, capture_output=True, text=True, check=True
        )
        found = shlex.split(done.stdout)
        found = found[1:] if found[0] == "srun" else found
        assert found[:2] == ["lightning", "fit"] and ("srun" in done.stdout) == (script == "slurm.sh")
        with initialize_config_module("seqzoo.conf", version_base="1.3"):
            cfg = compose("config", overrides=found[2:])
        assert cfg["trainer"]["strategy"] == (trainer or "ddp") and cfg["data"]["batch_size"] == 16
        assert (cfg["trainer"]["devices"], cfg["trainer"]["num_nodes"]) == (
            (2, 3) if "slurm" in script else ("auto", 1)
        )
