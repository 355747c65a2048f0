"""`lightning export`: what it writes and says, and what it refuses before anything is made."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from seqzoo.pipelines.cli import main
from seqzoo.pipelines.help import TOOLS
from seqzoo.zoo import create_model, load_model, save_model


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """The folder of a run, with its model."""
    torch.manual_seed(0)
    model = create_model("language_tiny", dim=8, depth=1, mixer={"name": "softmax", "num_heads": 2}, ffn="none")
    save_model(model, tmp_path / "run" / "model", preprocessing={"tokenizer": "bytes"})
    return tmp_path / "run"


def test_a_run_becomes_a_program_of_one_length(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    assert main(["export", str(run), str(target), "length=6", "batch=2"]) == 0
    out = capsys.readouterr().out
    assert f"{target / 'model.pt2'}: language_tiny, " in out
    assert "input input: int64 (2, 6)" in out and "output y: float32 (2, 6, 256)" in out
    assert "differ from the model's by" in out
    record = json.loads((target / "export.json").read_text())
    assert record["preprocessing"] == {"tokenizer": "bytes"} and record["sizes"] == {}
    tokens = torch.randint(256, (2, 6))
    with torch.no_grad():
        expected = load_model(run / "model")(tokens).y
        found = torch.export.load(str(target / "model.pt2")).module()(tokens)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)

    assert main(["export", str(run), str(target)]) == 2
    assert "is there already: name a new folder, or give overwrite=true" in capsys.readouterr().err
    assert main(["export", str(run), str(run / "model"), "overwrite=true"]) == 2
    assert "is a saved model, whose files an export would replace" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["formt=onnx"], "no option 'formt=onnx'. Did you mean"),
        (["--onnx"], "no option '--onnx'"),
        (["format=onx"], "format=onx is not a choice. Did you mean"),
        (["length=dynamik"], "length=dynamik must be a positive number or auto or dynamic or example"),
        (["length=0"], "length=0 must be a positive number"),
        (["batch=auto"], "batch=auto must be a positive number or dynamic"),
        (["overwrite=yes"], "overwrite=yes is not a choice"),
        (["third"], "takes SOURCE and TARGET, got 3"),
    ],
)
def test_wrong_words(words: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "nowhere", str(tmp_path / "target"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_what_is_nowhere_and_what_has_no_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "nowhere", str(tmp_path / "target")]) == 2
    assert "load_model('nowhere'): no such folder" in capsys.readouterr().err
    save_model(create_model("dlinear", seq_len=8, pred_len=2, in_channels=1), tmp_path / "saved")
    assert main(["export", str(tmp_path / "saved"), str(tmp_path / "target"), "length=dynamic"]) == 2
    assert "length='dynamic': dlinear takes inputs of kind 'series'" in capsys.readouterr().err
    assert not (tmp_path / "target").exists()


def test_help_says_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--help"]) == 0
    assert "usage: lightning export SOURCE TARGET [format=torch|onnx]" in capsys.readouterr().out
    assert "export" in TOOLS
