"""The documents pipeline through the command's function: fit, test, predict, resume, Long Range Arena and its table."""

from __future__ import annotations

import csv
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch.callbacks import Callback
from omegaconf import OmegaConf

from seqzoo.pipelines import run as running
from seqzoo.pipelines.checkpoints import load_checkpoint
from seqzoo.pipelines.cli import main
from seqzoo.pipelines.config_files import list_groups
from seqzoo.pipelines.documents.arena import SOURCES, settings_of
from seqzoo.pipelines.documents.lra_command import published_rows, run_rows
from seqzoo.pipelines.documents.module import model_arguments
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.run import execute
from seqzoo.pipelines.validate import validate_names
from seqzoo.zoo import create_model, load_model

SMALL = [
    "mixer=softmax",
    "mixer.num_heads=2",
    "model=classifier_tiny",
    "model.dim=16",
    "model.depth=1",
    "data.batch_size=8",
    "data.steps=20",
    "optimizer.lr=2.0e-2",
    "trainer.log_every_n_steps=5",
    "trainer.max_epochs=2",
    "trainer.accelerator=cpu",
    "logger.tensorboard=false",
    "callbacks.progress=none",
]
EXPERIMENTS = [e for e in list_groups()["experiment"] if e.split("/")[0] in ("documents", "lra")]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQZOO_CACHE", str(tmp_path_factory.getbasetemp() / "documents-cache"))
        yield


@pytest.fixture(scope="module")
def letters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Documents of vowels and of consonants, of 5 to 60 letters: one look at the letters is enough."""
    root = tmp_path_factory.mktemp("letters")
    random = np.random.default_rng(0)
    for label, known in (("vowels", "aeiou"), ("consonants", "bcdfghjklmnp"), ("digits", "0123456789")):
        (root / label).mkdir()
        for i in range(20):
            text = "".join(random.choice(list(known), size=int(random.integers(5, 60))))
            (root / label / f"{i:02}.txt").write_text(text)
    return root


def composed(*overrides: str) -> dict[str, Any]:
    GlobalHydra.instance().clear()
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        return OmegaConf.to_container(compose("config", overrides=list(overrides)), resolve=True)  # type: ignore[return-value]


def run(command: str, run_dir: Path, *overrides: str) -> dict[str, Any]:
    given = ["task=documents", *SMALL, f"paths.runs={run_dir.parent}", *overrides]
    cfg = composed(*given)
    run_dir.mkdir(parents=True, exist_ok=True)
    if command == "fit":
        (run_dir / "config.yaml").write_text(yaml.safe_dump(cfg))
    return execute(command, cfg, run_dir)


@pytest.fixture(scope="module")
def fitted(letters: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    run_dir = tmp_path_factory.mktemp("runs") / "first"
    return run_dir, run("fit", run_dir, "data=labelled", f"data.path={letters}")


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_fit_leaves_scores_beside_the_majority(fitted: tuple[Path, dict[str, Any]]) -> None:
    run_dir, metrics = fitted
    names = {p.relative_to(run_dir).as_posix() for p in run_dir.rglob("*") if p.is_file()}
    assert {"checkpoints/best.ckpt", "checkpoints/last.ckpt", "model/model.safetensors", "metrics.json"} <= names
    assert {"test.csv", "scores.json", "confusion.csv", "confusion.png", "loss.png"} <= names
    assert metrics["test/accuracy"] > 0.9 and metrics["test/majority"] == metrics["test/chance"] == pytest.approx(1 / 3)
    table = rows(run_dir / "test.csv")
    assert [row["method"].split(":")[0] for row in table] == ["classifier_tiny, softmax", "majority", "chance"]
    confusion = rows(run_dir / "confusion.csv")
    counts = np.array([[int(row[label]) for label in ("consonants", "digits", "vowels")] for row in confusion])
    assert counts.sum(1).tolist() == [2, 2, 2]
    assert np.trace(counts) / 6 == pytest.approx(metrics["test/accuracy"])


@pytest.mark.parametrize("size", [1, 4])
def test_scores_do_not_depend_on_the_batch(
    fitted: tuple[Path, dict[str, Any]], letters: Path, size: int, tmp_path: Path
) -> None:
    path = fitted[0] / "checkpoints" / "best.ckpt"
    options = ["data=labelled", f"data.path={letters}", f"ckpt_path={path}", f"data.eval_batch_size={size}"]
    again = run("test", tmp_path / "test", *options)
    for name in ("test/accuracy", "test/macro_f1", "test/loss"):
        assert again[name] == pytest.approx(fitted[1][name], rel=1e-5), name


def test_prediction_of_new_documents(fitted: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    """In their order, as the exported model gives them one by one; a table's own labels stand beside."""
    new = tmp_path / "new"
    new.mkdir()
    texts = {"b.txt": "aeaeaeiouu", "a.txt": "1234512345678", "c.txt": "bcbcd"}
    for name, text in texts.items():
        (new / name).write_text(text)
    options = ["data=labelled", f"ckpt_path={fitted[0] / 'checkpoints' / 'best.ckpt'}"]
    run("predict", tmp_path / "p", *options, f"data.path={new}")
    found = rows(tmp_path / "p" / "predictions.csv")
    assert [(r["document"], r["label"]) for r in found] == [
        ("a.txt", "digits"),
        ("b.txt", "vowels"),
        ("c.txt", "consonants"),
    ]
    net = load_model(fitted[0] / "model").eval()
    for row in found:
        chances = torch.softmax(net(torch.tensor([list(texts[row["document"]].encode())])).y[0], 0)
        assert float(row["probability"]) == pytest.approx(float(chances.detach().max()), abs=1e-5)
    (tmp_path / "t.csv").write_text("text,label\naeio,vowels\n12345,vowels\nbcd,\n")
    metrics = run("predict", tmp_path / "q", *options, f"data.path={tmp_path / 't.csv'}")
    found = rows(tmp_path / "q" / "predictions.csv")
    assert [r["given"] for r in found] == ["vowels", "vowels", ""] and metrics["accuracy"] == 0.5


def test_labels_keep_their_numbers_on_other_data(
    fitted: tuple[Path, dict[str, Any]], letters: Path, tmp_path: Path
) -> None:
    """A folder with two of the labels only, whose numbers by themselves would be others."""
    few = tmp_path / "few"
    for label in ("vowels", "digits"):
        (few / label).mkdir(parents=True)
        for file in sorted((letters / label).iterdir())[:5]:
            (few / label / file.name).write_bytes(file.read_bytes())
    options = ["data=labelled", f"ckpt_path={fitted[0] / 'checkpoints' / 'best.ckpt'}"]
    assert run("test", tmp_path / "t", *options, f"data.path={few}")["test/accuracy"] == 1.0
    (few / "vovels").mkdir()
    for i in range(3):
        (few / "vovels" / f"{i}.txt").write_text(f"a{i}")
    with pytest.raises(UserError, match=r"label 'vovels', which the model does not know\. Did you mean vowels"):
        run("test", tmp_path / "u", *options, f"data.path={few}")


def test_a_checkpoint_of_other_data_is_refused(
    fitted: tuple[Path, dict[str, Any]], letters: Path, tmp_path: Path
) -> None:
    path = f"ckpt_path={fitted[0] / 'checkpoints' / 'last.ckpt'}"
    with pytest.raises(UserError, match=r"cannot be resumed: model\.dim=32 here, 16 there"):
        run("fit", tmp_path / "a", "data=labelled", f"data.path={letters}", path, "model.dim=32")
    with pytest.raises(UserError, match=r"was trained with data\.tokenizer='bytes', here it is 'listops'"):
        run("test", tmp_path / "b", "data=listops", *TINY_LISTS, path)
    with pytest.raises(UserError, match=r"give the name of a \.csv file"):
        run("predict", tmp_path / "c", "data=labelled", f"data.path={letters}", path, "+output=x.txt")


def test_a_stopped_run_resumes_to_the_same_bits(letters: Path, tmp_path: Path) -> None:
    """Stopped within the first epoch; dropout counts too."""
    options = ["data=labelled", f"data.path={letters}", "model.proj_drop=0.2", "test_after_fit=false", "data.steps=8"]
    whole = run("fit", tmp_path / "whole", *options)

    class Stop(Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            trainer.should_stop = trainer.global_step >= 5

    old = running._callbacks
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(running, "_callbacks", lambda *a, **k: [*old(*a, **k), Stop()])
        run("fit", tmp_path / "part", *options, "callbacks.checkpoint.every_n_train_steps=5")
    saved = load_checkpoint(tmp_path / "part" / "checkpoints" / "last.ckpt")
    assert saved["global_step"] == 5
    rest = run("fit", tmp_path / "rest", *options, f"ckpt_path={tmp_path / 'part' / 'checkpoints' / 'last.ckpt'}")
    assert rest["val/loss"] == whole["val/loss"]
    first, second = (load_checkpoint(tmp_path / n / "checkpoints" / "last.ckpt") for n in ("whole", "rest"))
    for name, value in first["state_dict"].items():
        assert torch.equal(value, second["state_dict"][name]), name


# --- Long Range Arena

TINY_LISTS = [
    f"data.settings.{key}={value}"
    for key, value in {"train": 64, "val": 20, "test": 30, "min_length": 5, "max_length": 30, "max_args": 4}.items()
]
TINY_PAIRS = [
    f"data.settings.{key}={value}"
    for key, value in {
        "train": 20,
        "val": 4,
        "test": 6,
        "length": 300,
        "start": 20,
        "words": 40,
        "rare": 60,
        "mentions": 3,
        "shared": 2,
    }.items()
]
TINY_PICTURES = ["data.settings.train=8", "data.settings.val=4", "data.settings.test=4"]
ONE = ["trainer.max_epochs=1", "data.steps=2"]


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("listops", [*TINY_LISTS, "data.steps=2", "trainer.max_epochs=1"]),
        ("citations", [*TINY_PAIRS, *ONE]),
        ("pathfinder", [*TINY_PICTURES, *ONE, "model.inputs=values", "mixer=linear", "mixer.num_heads=2"]),
    ],
)
def test_generated_tasks_run(name: str, options: list[str], tmp_path: Path) -> None:
    metrics = run("fit", tmp_path / name, f"data={name}", *options)
    assert metrics["test/documents"] == {"listops": 30, "citations": 6, "pathfinder": 4}[name]
    assert (tmp_path / name / "confusion.png").is_file()


def test_the_table_of_runs_and_the_published_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run("fit", tmp_path / "runs" / "one", "data=listops", *TINY_LISTS, *ONE)
    broken = tmp_path / "runs" / "two"
    broken.mkdir()
    (broken / "metrics.json").write_text("{")
    (found,) = run_rows(tmp_path / "runs")
    assert found["accuracy"] == pytest.approx(100 * metrics["test/accuracy"])
    assert found["majority"] == pytest.approx(100 * metrics["test/majority"])
    assert (found["mixer"], found["steps"], found["documents"], found["run"]) == ("softmax", 2, 64, "one")
    assert found["task"].startswith("listops (ours: min_length=5")
    assert main(["lra", f"runs={tmp_path / 'runs'}"]) == 0
    ours, published = capsys.readouterr().out.split("published, in per cent")
    assert "classifier_tiny" in ours and "Reformer" not in ours
    assert "classifier_tiny" not in published and "Performer " in published
    assert main(["lra", f"runs={tmp_path / 'runs'}", "published=false"]) == 0
    assert "Performer" not in capsys.readouterr().out
    assert main(["lra", "rnus=x"]) == 2 and "Did you mean runs" in capsys.readouterr().err
    assert main(["lra", f"runs={tmp_path / 'none'}"]) == 2


def test_published_rows_are_marked() -> None:
    table = {row["model"]: row for row in published_rows()}
    assert table["Performer"]["ListOps"] == "18.01~" and table["Reformer"]["ListOps"] == "37.27"
    assert "MEGA *" in table and "MEGA" not in table
    assert not any(name.startswith("TCNCA") for name in table)
    assert table["always the majority label"]["Image"] == "10.00"


@pytest.mark.parametrize("source", SOURCES)
def test_data_files_state_the_settings(source: str) -> None:
    path = ["data.path=x"] if source.startswith("lra_") else []
    cfg = composed("task=documents", f"data={source}", *path)
    assert sorted(cfg["data"].get("settings", {})) == sorted(settings_of(source))


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_builds(experiment: str) -> None:
    cfg = composed(f"experiment={experiment}", "data.path=x")
    validate_names(cfg)
    pairs = "retrieval" in experiment
    schema = {
        "labels": ["a", "b"],
        "vocab_size": 256,
        "towers": 1 + pairs,
        "value_mean": 0.5,
        "value_std": 0.5,
        "longest": 9,
    }
    with torch.device("meta"):
        create_model(cfg["model"]["name"], **model_arguments(cfg["model"], schema))
    family = experiment.partition("_")[2]
    first = cfg["model"]["mixer"][0] if isinstance(cfg["model"]["mixer"], list) else cfg["model"]["mixer"]
    wanted = {"transformer": "softmax", "s4d": "s4d", "mega": "mega", "hybrid": "mamba2"}
    assert experiment.startswith("documents/") or family == "" or first["name"] == wanted[family]


def test_mega_of_the_image_task_has_its_published_size() -> None:
    cfg = composed("experiment=lra/image_mega", "data.path=x")
    schema = {
        "labels": list("0123456789"),
        "vocab_size": 256,
        "towers": 1,
        "value_mean": 0.48,
        "value_std": 0.24,
        "longest": 1024,
    }
    with torch.device("meta"):
        model = create_model("classifier_base", **model_arguments(cfg["model"], schema))
    assert sum(p.numel() for p in model.parameters()) == 2_824_770


@pytest.mark.parametrize("mixer", ["softmax", "s4d", "mamba2"])
def test_a_sweep_changes_the_mixer_alone(mixer: str) -> None:
    cfg, other = composed("experiment=lra/listops", f"mixer={mixer}"), composed("experiment=lra/listops")
    assert cfg["model"]["mixer"]["name"] == mixer
    assert {**cfg, "mixer": 0, "model": 0} == {**other, "mixer": 0, "model": 0}


def test_values_need_bytes() -> None:
    cfg = composed("experiment=lra/listops", "model.inputs=values")
    schema = {"labels": ["a", "b"], "vocab_size": 16, "towers": 1, "value_mean": 0.5, "value_std": 0.5, "longest": 9}
    with pytest.raises(UserError, match=r"reads numbers 0 \.\. 255, but the data have 16 tokens"):
        model_arguments(cfg["model"], schema)


def test_learned_positions_are_as_many_as_the_longest_document_has_tokens() -> None:
    schema = {"labels": ["a", "b"], "vocab_size": 256, "towers": 1, "longest": 77}
    model = {"name": "classifier_tiny", "position": "learned", "max_len": None}
    assert model_arguments(model, schema)["max_len"] == 77
    with pytest.raises(UserError, match=r"model\.max_len=50 learned positions are too few for documents of 77 tokens"):
        model_arguments({**model, "max_len": 50}, schema)


def test_metrics_are_in_the_file(fitted: tuple[Path, dict[str, Any]]) -> None:
    saved = json.loads((fitted[0] / "metrics.json").read_text())
    assert saved["test/accuracy"] == fitted[1]["test/accuracy"]
    assert os.path.getsize(fitted[0] / "confusion.png") > 2000
