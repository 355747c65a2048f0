"""What a user may hand over: names and contents that are not UTF-8, too long prompts, another tokenizer, nothing."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.run import execute
from seqzoo.pipelines.text.corpus import load_corpus
from seqzoo.pipelines.text.tokenizer import ByteTokenizer, train_bpe

LIMIT = 40
SMALL = [
    *("task=text", "data=text", "model=language_tiny", "mixer=softmax", "mixer.num_heads=2", "model.dim=16"),
    *("model.depth=1", "model.position=learned", f"+model.max_len={LIMIT}", "data.seq_len=32", "data.batch_size=4"),
    *("data.steps=3", "data.split_ratio=[0.6,0.2,0.2]", "trainer.max_epochs=1", "trainer.accelerator=cpu"),
    *("logger.tensorboard=false", "callbacks.progress=none", "trainer.log_every_n_steps=1", "task.temperature=0"),
]
NOT_TEXT = b"one \xff\xfe two \x80 three "


def run(command: str, folder: Path | str, run_dir: Path, *overrides: str, **task: Any) -> dict[str, Any]:
    given = [*SMALL, f"paths.runs={run_dir.parent}", f"data.path={folder}", *overrides]
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        cfg: Any = OmegaConf.to_container(compose("config", overrides=given), resolve=True)
    cfg["task"] |= task
    return execute(command, cfg, run_dir)


@pytest.fixture(autouse=True, scope="module")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SEQZOO_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files whose names and contents are bytes, in a folder whose name is."""
    root = tmp_path_factory.mktemp("input")
    inner = os.path.join(os.fsencode(root), b"d\xff")
    os.mkdir(inner)
    for i in range(12):
        with open(os.path.join(inner, b"\xfe%02d.txt" % i), "wb") as file:
            file.write(NOT_TEXT * (i + 3))
    return root


@pytest.fixture(scope="module")
def fitted(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint of a fit, whose test has run too."""
    run_dir = tmp_path_factory.mktemp("runs") / "fit"
    metrics = run("fit", folder, run_dir)
    assert 0 < metrics["test/bits_per_byte"] < 9
    return run_dir / "checkpoints" / "last.ckpt"


def test_names_and_contents_need_not_be_text(folder: Path, fitted: Path, tmp_path: Path) -> None:
    """Through the cache, fit, test and predict, byte for byte."""
    found = load_corpus(str(folder), ByteTokenizer(), cache_dir=tmp_path)
    assert [os.fsencode(name) for name in found.names] == [b"\xfe%02d.txt" % i for i in range(12)]
    contents = [c for stage in ("train", "val", "test") for c in found.content(stage, ByteTokenizer())]
    assert sorted(contents) == sorted(NOT_TEXT * (i + 3) for i in range(12))
    again = run("test", folder, tmp_path / "test", f"ckpt_path={fitted}")
    assert again["test/bits_per_byte"] > 0
    run("predict", folder, tmp_path / "predict", f"ckpt_path={fitted}", prompt="a\udcff", max_new_tokens=4)
    record = json.loads((tmp_path / "predict" / "generated.jsonl").read_text())
    assert record["prompt_hex"] == "61ff" and record["tokens"] <= 4


def test_one_file_whose_name_is_not_text(folder: Path, tmp_path: Path) -> None:
    path = os.fsdecode(os.path.join(os.fsencode(folder), b"d\xff", b"\xfe03.txt"))
    found = load_corpus(path, ByteTokenizer(), split_ratio=(1, 0, 0), cache_dir=tmp_path)
    assert next(found.content("train", ByteTokenizer())) == NOT_TEXT * 6


def test_a_tokenizer_of_text_says_what_it_loses(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers (seqzoo[text]) is not installed")
    made = train_bpe([b"one two three " * 9], tmp_path / "bpe.json", vocab_size=270)
    found = load_corpus(str(folder), made, cache_dir=tmp_path)
    number = 3 * sum(i + 3 for i in range(12))
    assert f"{number} places are not UTF-8 and are U+FFFD to this tokenizer; data.tokenizer=bytes keeps" in (
        capsys.readouterr().out
    )
    assert sorted(found.content("train", made))[0].startswith("one \ufffd\ufffd two \ufffd three ".encode())
    before = made.replaced
    made.encode(b"\xff" + "\ufffd".encode())
    assert made.replaced == before + 1  # one was there
    (tmp_path / "fine.txt").write_text("caf\u00e9 \ufffd")
    load_corpus(str(tmp_path / "fine.txt"), made, cache_dir=tmp_path)
    assert capsys.readouterr().out == ""


def test_a_prompt_longer_than_the_positions_is_refused(
    folder: Path, fitted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = (folder, tmp_path / "p", f"ckpt_path={fitted}")
    record = tmp_path / "p" / "generated.jsonl"
    # the separator and 39 bytes are read, so that one token comes; of a shorter prompt the rest of the table
    for prompt, number in (("a" * (LIMIT - 1), 1), ("a" * (LIMIT - 4), 4)):
        run("predict", *options, prompt=prompt, max_new_tokens=9)
        assert json.loads(record.read_text())["tokens"] == number
        assert f"(the model has no positions for more than {number} new tokens)" in capsys.readouterr().out
    run("predict", *options, prompt="a", max_new_tokens=5)
    assert "no positions" not in capsys.readouterr().out
    run("predict", *options, prompt=["b", "a" * (LIMIT - 3)], max_new_tokens=9)
    assert "more than 3 new tokens; continuations 1 end there)" in capsys.readouterr().out
    record.unlink()
    monkeypatch.setattr("seqzoo.zoo._generate._stream", lambda *_: pytest.fail("something was computed"))
    message = f"prompt 1 has {LIMIT + 1} tokens, but the model's learned positions end at max_len={LIMIT}"
    with pytest.raises(UserError, match=f"{message}; keep its last {LIMIT} or fewer"):
        run("predict", *options, prompt=["fine", "a" * LIMIT])
    assert not record.exists()


def test_rows_longer_than_the_positions_are_refused_before_training(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"data\.seq_len=64.*max_len={LIMIT}"):
        run("fit", folder, tmp_path / "long", "data.seq_len=64")


def test_a_tokenizer_that_changed_since_is_named(folder: Path, fitted: Path, tmp_path: Path) -> None:
    pytest.importorskip("tokenizers", reason="tokenizers (seqzoo[text]) is not installed")
    choice = tmp_path / "bpe.json"
    train_bpe([b"one two three " * 9], choice, vocab_size=270)
    run("fit", folder, tmp_path / "bpe", f"data.tokenizer={choice}", "test_after_fit=false")
    path = f"ckpt_path={tmp_path / 'bpe' / 'checkpoints' / 'last.ckpt'}"
    run("predict", folder, tmp_path / "p", path, prompt="one", max_new_tokens=3)
    train_bpe([b"four five six " * 9], choice, vocab_size=270)
    with pytest.raises(UserError, match=r"bpe\.json is .* now, the model was trained with json:"):
        run("predict", folder, tmp_path / "p", path, prompt="one")
    with pytest.raises(UserError, match="trained with"):
        run("test", folder, tmp_path / "t", path, f"data.tokenizer={choice}")
    choice.unlink()
    with pytest.raises(UserError, match="no such file"):
        run("predict", folder, tmp_path / "p", path, prompt="one")


@pytest.mark.parametrize("content", [b"", None])
def test_an_empty_corpus_is_named_before_training(tmp_path: Path, content: bytes | None) -> None:
    (tmp_path / "empty").mkdir()
    if content is not None:
        (tmp_path / "empty" / "a.txt").write_bytes(content)
    message = "no file ending in" if content is None else "every document is empty"
    with pytest.raises(UserError, match=message):
        run("fit", tmp_path / "empty", tmp_path / "run")


def test_a_state_does_not_go_beyond_a_table_of_positions(folder: Path, tmp_path: Path) -> None:
    """A carried state would: the test reads windows instead, and training with one is refused."""
    options = ("mixer=gla", "mixer.num_heads=2")
    found = run("fit", folder, tmp_path / "fit", *options, "task.test_protocols=auto")["test"]
    assert any("windows of 32" in name for name in found) and not any("carried" in name for name in found)
    with pytest.raises(UserError, match="no learned positions"):
        run("fit", folder, tmp_path / "carry", *options, "task.carry_state=true")
