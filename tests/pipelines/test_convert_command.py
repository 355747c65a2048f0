"""`lightning convert`: what it writes and says, and what it refuses."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest
import torch

from seqzoo.pipelines.cli import main
from seqzoo.pipelines.help import TOOLS
from seqzoo.zoo import load_model

transformers = pytest.importorskip("transformers")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A BERT with a pooler, which nothing reads."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=23, hidden_size=12, num_hidden_layers=2, num_attention_heads=3, intermediate_size=20
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def test_the_folder_and_the_report(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    assert main(["convert", str(source), str(target)]) == 0
    out = capsys.readouterr().out
    model, theirs = load_model(target), transformers.BertModel.from_pretrained(source).eval()
    number = sum(p.numel() for p in model.parameters())
    assert f"{target}: bert_base with the weights of {source}, {number:,} parameters" in out
    assert "left out, since nothing reads it: bert.pooler.dense" in out
    assert f"seqzoo.load_model({str(target)!r})" in out
    x = torch.randint(23, (2, 7))
    with torch.no_grad():
        torch.testing.assert_close(model(x).y, theirs(x).last_hidden_state, atol=1e-5, rtol=0)


def test_words(source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "target"
    assert main(["convert", str(source), str(target), "dtype=bfloat16"]) == 0
    half = (target / "model.safetensors").stat().st_size
    assert main(["convert", str(source), str(target), "overwrite=true"]) == 0
    assert 1.7 < (target / "model.safetensors").stat().st_size / half < 2.1
    capsys.readouterr()
    for words, message in (
        ([str(source)], "takes SOURCE and TARGET, got 1"),
        ([str(source), str(target)], "holds files"),
        ([str(source), str(target), "dtyp=float16"], "no option 'dtyp=float16'. Did you mean dtype?"),
        ([str(source), str(target), "--force"], "no option '--force'"),
        ([str(source), str(target), "dtype=int8"], "dtype=int8 is not a choice."),
        ([str(source), str(target), "overwrite=1"], "overwrite=1 is not a choice."),
        ([str(tmp_path / "none"), str(target)], "no such folder"),
    ):
        assert main(["convert", *words]) == 2
        assert message in capsys.readouterr().err


def test_help_and_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "--help"]) == main(["convert"]) == 0
    assert capsys.readouterr().out.count("usage: lightning convert SOURCE TARGET") == 2
    assert main(["convert", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    names = importlib.import_module("seqzoo.zoo.convert").list_converters()
    assert [line.split()[0] for line in lines] == names and "gpt_neox" in lines[1]
    assert "convert" in TOOLS
