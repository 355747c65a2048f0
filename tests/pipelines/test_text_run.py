"""The text pipeline through the command's own function: fit, test, predict, exact resume, bad input."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from seqzoo.blocks.sequence_model import SequenceOutput
from seqzoo.pipelines.checkpoints import load_checkpoint, saved_parameters
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.run import execute
from seqzoo.pipelines.text.probing import run_probes
from seqzoo.pipelines.text.tokenizer import ByteTokenizer
from seqzoo.zoo import load_model

KEYS = ("model", "task", "optimizer", "scheduler", "schema")
SMALL = [
    "task=text",
    "data=text",
    "model=language_tiny",
    "mixer=gla",
    "mixer.num_heads=2",
    "model.dim=16",
    "model.depth=1",
    "data.seq_len=32",
    "data.batch_size=8",
    "data.steps=30",
    "data.split_ratio=[0.6,0.2,0.2]",
    "optimizer.lr=2.0e-2",
    "trainer.log_every_n_steps=5",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "logger.tensorboard=false",
    "callbacks.progress=none",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Counting in words: a text with rules that a small model finds."""
    root = tmp_path_factory.mktemp("numbers")
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    rng = np.random.default_rng(0)
    for i in range(24):
        first = int(rng.integers(0, 10))
        lines = [" ".join(words[(first + j + k) % 10] for k in range(5)) for j in range(int(rng.integers(2, 12)))]
        (root / f"{i:02}.txt").write_text("\n".join(lines) + "\n")
    return root


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SEQZOO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


def config(folder: Path, run_dir: Path, *overrides: str) -> dict[str, Any]:
    given = [*SMALL, f"paths.runs={run_dir.parent}", f"data.path={folder}", *overrides]
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=given), resolve=True)  # type: ignore[return-value]


def run(command: str, folder: Path, run_dir: Path, *overrides: str) -> dict[str, Any]:
    return execute(command, config(folder, run_dir, *overrides), run_dir)


@pytest.fixture(scope="module")
def fitted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    os.environ["SEQZOO_CACHE"] = str(tmp_path_factory.getbasetemp() / "cache")
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    metrics = run("fit", folder, run_dir)
    (run_dir / "config.yaml").write_text("name: text\n")
    return run_dir, metrics


def test_fit_leaves_scores_beside_compressors(fitted: tuple[Path, dict[str, Any]]) -> None:
    run_dir, metrics = fitted
    names = {p.relative_to(run_dir).as_posix() for p in run_dir.rglob("*") if p.is_file()}
    assert {"checkpoints/best.ckpt", "checkpoints/last.ckpt", "model/model.safetensors", "metrics.json"} <= names
    assert {"test.csv", "test_by_position.csv", "scores.json", "loss.png", "loss_by_position.png"} <= names
    rows = metrics["test"]
    with (run_dir / "test.csv").open(encoding="utf-8", newline="") as file:
        assert [row["method"] for row in csv.DictReader(file)][-5:] == list(rows)[-5:]
    assert {"chance", "byte frequencies", "zlib-9", "LZMA", "LZMA primed with the training text"} < set(rows)
    assert 0 < metrics["test/bits_per_byte"] < rows["byte frequencies"]
    assert json.loads((run_dir / "metrics.json").read_text())["test/bits_per_byte"] == metrics["test/bits_per_byte"]


def test_the_bar_counts_tokens(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("fit", folder, tmp_path / "bar", "callbacks.progress=plain", "test_after_fit=false", "trainer.max_epochs=1")
    assert "tokens/s" in capsys.readouterr().out


@pytest.mark.parametrize("size", [1, 7])
def test_scores_do_not_depend_on_the_batch(fitted: tuple[Path, dict[str, Any]], folder: Path, size: int) -> None:
    run_dir, metrics = fitted
    path = run_dir / "checkpoints" / "best.ckpt"
    again = run("test", folder, run_dir.parent / f"test{size}", f"ckpt_path={path}", f"data.eval_batch_size={size}")
    for name, value in metrics["test"].items():
        assert again["test"][name] == pytest.approx(value, rel=1e-5), name


def test_a_long_row_and_a_carried_state_agree(fitted: tuple[Path, dict[str, Any]], folder: Path) -> None:
    """Rows as long as any document see what a carried state has seen."""
    run_dir, _ = fitted
    path = run_dir / "checkpoints" / "best.ckpt"
    options = ["task.test_protocols=[rows,carried,sliding]", f"ckpt_path={path}"]
    long = run("test", folder, run_dir.parent / "long", "data.seq_len=512", *options)
    short = run("test", folder, run_dir.parent / "short", "data.seq_len=16", *options)
    values = list(long["test"].values())[:3]
    assert max(values) - min(values) < 1e-5
    rows, carried, sliding = list(short["test"].values())[:3]
    assert carried == pytest.approx(values[0], abs=1e-5)
    assert rows > sliding  # less context, worse


def test_the_exported_model_and_prediction(
    fitted: tuple[Path, dict[str, Any]], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, _ = fitted
    net = load_model(run_dir / "model")
    saved = load_checkpoint(run_dir / "checkpoints" / "best.ckpt")["state_dict"]
    assert all(torch.equal(saved[f"net.{n}"], p) for n, p in net.state_dict().items())
    options = [f"ckpt_path={run_dir / 'checkpoints' / 'best.ckpt'}", "task.max_new_tokens=20", "task.temperature=0"]
    out = run_dir.parent / "predicted"
    run("predict", folder, out, *options, "task.prompt='one two '")
    record = json.loads((out / "generated.jsonl").read_text())
    assert record["prompt"] == "one two " and 0 < record["tokens"] <= 20
    assert f"one two {record['continuation']}" in capsys.readouterr().out
    run("predict", folder, out, *options, "task.prompt=['one two ', '']", "task.stop=['e']")
    two = [json.loads(line) for line in (out / "generated.jsonl").read_text().splitlines()]
    assert two[0]["continuation"] == record["continuation"].split("e")[0] and len(two) == 2
    assert all("e" not in r["continuation"] for r in two)


def test_probes_find_what_an_oracle_remembers(
    fitted: tuple[Path, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    """An untrained model knows nothing; one whose logits are the text itself (an oracle) is right everywhere."""
    options = ["task.probes=[passkey,mqar,variables]", "task.probe_lengths=[300,500]", "task.probe_samples=2"]
    path = fitted[0] / "checkpoints" / "best.ckpt"
    metrics = run("test", folder, tmp_path / "probed", f"ckpt_path={path}", *options)
    rows = metrics["probes"]
    assert [(r["task"], r["length"], r["depth"]) for r in rows if r["task"] == "variables"] == [
        ("variables", 300, None),
        ("variables", 500, None),
    ]
    assert [(r["length"], r["items"], r["count"]) for r in rows if r["task"] == "mqar"] == [
        (length, pairs, 10 * pairs) for length in (300, 500) for pairs in (4, 16, 64)
    ]
    texts = [r for r in rows if r["task"] != "mqar"]
    assert len(texts) == 2 * 5 + 2 and sum(r["count"] for r in texts) == 40
    assert all(r["mean"] == 0 and r["bits"] > 15 for r in texts)  # 5 digits are 16.6 bits
    assert (tmp_path / "probed" / "probes.png").is_file() and (tmp_path / "probed" / "probes.csv").is_file()

    class Oracle(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))

        def forward(self, tokens: torch.Tensor) -> SequenceOutput:
            following = torch.cat((tokens[:, 1:], torch.full_like(tokens[:, :1], ord("0"))), 1)
            return SequenceOutput(20.0 * torch.nn.functional.one_hot(following, 256).float(), None, {})

    # the last token of an answer follows no input; an oracle that always says "0" there is right for a tenth of them
    found = run_probes(Oracle(), ByteTokenizer(), ["passkey"], [300], samples=20, seed=0)
    assert 0 < sum(r["mean"] for r in found) / len(found) < 0.3


@pytest.mark.parametrize(("carry", "stop"), [("false", 5), ("false", 30), ("true", 5), ("true", 12)])
def test_a_killed_run_resumes_to_the_same_bits(folder: Path, tmp_path: Path, carry: str, stop: int) -> None:
    """Dropout and a codebook beside, so that random numbers and running statistics count too."""
    options = ["mixer=long_vq", "mixer.num_heads=1", "mixer.codebook_size=8", "mixer.chunk_size=8"]
    options += ["model.proj_drop=0.2", "callbacks.checkpoint.every_n_train_steps=1", "test_after_fit=false"]
    options += [f"task.carry_state={carry}"]
    whole = run("fit", folder, tmp_path / "whole", *options)
    part = tmp_path / "part"
    script = (
        "import sys, os, json, signal\n"
        "from lightning.pytorch.callbacks import Callback\n"
        "import seqzoo.pipelines.run as r\n"
        "class Kill(Callback):\n"
        "    def on_train_batch_start(self, trainer, module, batch, index):\n"
        f"        if trainer.global_step == {stop}: os.kill(os.getpid(), signal.SIGKILL)\n"
        "old = r._callbacks\n"
        "r._callbacks = lambda *a, **k: [*old(*a, **k), Kill()]\n"
        "r.execute('fit', json.load(open(sys.argv[1])), sys.argv[2])\n"
    )
    (tmp_path / "cfg.json").write_text(json.dumps(config(folder, part, *options)))
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    killed = subprocess.run([sys.executable, "-c", script, str(tmp_path / "cfg.json"), str(part)], env=environment)
    assert killed.returncode == -signal.SIGKILL
    (part / "config.yaml").write_text("name: text\n")
    resumed = run("fit", folder, tmp_path / "rest", *options, f"ckpt_path={part / 'checkpoints' / 'last.ckpt'}")
    assert resumed["val/loss"] == whole["val/loss"]
    first, second = (load_checkpoint(tmp_path / n / "checkpoints" / "last.ckpt") for n in ("whole", "rest"))
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


def test_masked_models_learn_what_they_can(folder: Path, tmp_path: Path) -> None:
    options = ["model=prob_sparse_tiny", "model.dim=16", "model.depth=1", "mixer=linear"]
    with pytest.raises(UserError, match="is not causal: it learns masked tokens"):
        run("fit", folder, tmp_path / "a", *options)
    metrics = run("fit", folder, tmp_path / "b", *options, "task.objective=masked")
    assert metrics["val/loss"] < np.log(256) and "zlib-9" not in metrics["test"]
    with pytest.raises(UserError, match="cannot continue a text"):
        run("predict", folder, tmp_path / "c", f"ckpt_path={tmp_path / 'b' / 'checkpoints' / 'best.ckpt'}")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.path=/nowhere/at.all"], "no such file"),
        (["data.tokenizer=/nowhere/bpe.json"], "no such file"),
        (["data.split_ratio=[1,0,0]"], "no document for val"),
        (["data.split_ratio=[1,0]"], "must be three parts"),
        (["data.split_ratio=[0.8,0.2,0]"], "no document for test.*test_after_fit=false"),
        (["data.eval_stride=64"], "must not be greater than data.seq_len=32"),
        (["data.seq_len=0"], "data.seq_len=0 must be greater than 0"),
        (["mixer=softmax", "task.carry_state=true"], "state of constant size"),
        (["task.test_protocols=[rows,slidng]"], "slidng"),
        (["task.probes=[paskey]"], "no probe 'paskey'.*passkey"),
        (["mixer=prob_sparse"], "does not support the pattern 'causal'"),
        (["model=patch_tiny"], "is for the task 'forecasting', not 'text'"),
        (["+data.sequence=3"], "unknown key data.sequence"),
    ],
)
def test_bad_input_is_named_before_training(folder: Path, tmp_path: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        run("fit", folder, tmp_path / "run", "trainer.max_epochs=1", "data.steps=1", *overrides)


def test_a_checkpoint_of_another_task_is_refused(
    fitted: tuple[Path, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    path = fitted[0] / "checkpoints" / "best.ckpt"
    other = ["task=forecasting", "data=csv", "data.path=a.csv", "model=patch_tiny"]
    given = [*other, f"ckpt_path={path}", f"paths.runs={tmp_path}", "logger.tensorboard=false"]
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        cfg = OmegaConf.to_container(compose("config", overrides=given), resolve=True)
    with pytest.raises(UserError, match="is a checkpoint of task=text, not forecasting"):
        execute("predict", cfg, tmp_path / "run")
    with pytest.raises(UserError, match="is a checkpoint of task=forecasting, not text"):
        saved_parameters({"hyper_parameters": {k: {"name": "forecasting"} for k in KEYS}}, "text", path)


def test_a_checkpoint_of_another_tokenizer_is_refused(
    fitted: tuple[Path, dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers (seqzoo[text]) is not installed")
    from seqzoo.pipelines.text.tokenizer import train_bpe

    train_bpe([b"one two three " * 9], tmp_path / "bpe.json", vocab_size=270)
    path = fitted[0] / "checkpoints" / "best.ckpt"
    with pytest.raises(UserError, match=r"was trained with data\.tokenizer='bytes'"):
        run("test", folder, tmp_path / "t", f"ckpt_path={path}", f"data.tokenizer={tmp_path / 'bpe.json'}")
    metrics = run("fit", folder, tmp_path / "b", f"data.tokenizer={tmp_path / 'bpe.json'}", "trainer.max_epochs=1")
    assert 0 < metrics["test/bits_per_byte"] < 8
