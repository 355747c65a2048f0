"""Stops in a text that comes token by token: cut wherever tokens end, never shown in part; what prompts may be."""

from __future__ import annotations

import itertools
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from seqzoo.blocks.sequence_model import SequenceOutput
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.text.answers import Answer
from seqzoo.pipelines.text.predict import continue_prompts
from seqzoo.pipelines.text.tokenizer import ByteTokenizer, FileTokenizer, Tokenizer, train_bpe

BYTES = ByteTokenizer()
TEXT, STOP = b"xySTOPzw", b"STOP"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory: pytest.TempPathFactory) -> FileTokenizer:
    """Many pieces of TEXT are tokens, TEXT itself is one, and so are all bytes."""
    pytest.importorskip("tokenizers", reason="tokenizers (seqzoo[text]) is not installed")
    pieces = [TEXT[i:j] for i in range(len(TEXT)) for j in range(i + 1, len(TEXT) + 1)]
    path = tmp_path_factory.mktemp("bpe") / "bpe.json"
    return train_bpe([b"\n".join([*pieces, *[TEXT] * 50]), "é€".encode()], path, vocab_size=400)


def splits(text: bytes) -> list[list[bytes]]:
    """The text in pieces, in every way."""
    found = []
    for cuts in itertools.product([False, True], repeat=len(text) - 1):
        ends = [i + 1 for i, cut in enumerate(cuts) if cut]
        found.append([text[i:j] for i, j in zip([0, *ends], [*ends, len(text)], strict=True)])
    return found


def stream(tokenizer: Tokenizer, pieces: list[bytes], stops: list[bytes]) -> tuple[list[bytes], Answer]:
    """What is shown after each token, all of it; and after the end."""
    answer, shown, seen = Answer(tokenizer, stops), b"", []
    for token in (t for piece in pieces for t in tokenizer.encode(piece).tolist()):
        done = answer.add(token)
        seen.append(shown := shown + answer.take())
        if done:
            break
    answer.finish()
    seen.append(shown + answer.take())
    return seen, answer


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_stop_is_cut_however_it_is_split_and_never_shown(kind: str, bpe: FileTokenizer) -> None:
    tokenizer: Tokenizer = BYTES if kind == "bytes" else bpe
    for pieces in splits(TEXT):
        seen, answer = stream(tokenizer, pieces, [b"TOXX", STOP, b"never"])
        assert answer.stopped and answer.text == seen[-1] == b"xy"
        assert all(b"xy".startswith(s) for s in seen)
    if kind == "bpe":  # one token may hold the stop, what is before it and what is after it
        _, answer = stream(tokenizer, [TEXT], [STOP])
        assert len(tokenizer.encode(TEXT)) == 1 and answer.text == b"xy" and answer.tokens == 1
        # of several in one token the first to end, as byte by byte
        for kind_of in (BYTES, bpe):
            assert stream(kind_of, [TEXT], [b"ySTOPz", b"TO", b"STO", b"w"])[1].text == b"xy"
            assert stream(kind_of, [TEXT], [b"ySTOPz", b"TO"])[1].text == b"xyS"


@pytest.mark.parametrize("kind", ["bytes", "bpe"])
def test_a_stop_that_is_never_met_is_text(kind: str, bpe: FileTokenizer) -> None:
    """What waits is shown as soon as it cannot become a stop, at the end in any case."""
    tokenizer: Tokenizer = BYTES if kind == "bytes" else bpe
    for pieces in splits(b"aSTSTOzSTO"):
        seen, answer = stream(tokenizer, pieces, [STOP])
        assert not answer.stopped and seen[-1] == answer.text == b"aSTSTOzSTO"
        assert answer.tokens == len(seen) - 1
    seen, _ = stream(BYTES, [b"aSTSTOzSTO"], [STOP])
    assert seen == [b"a"] * 3 + [b"aST"] * 3 + [b"aSTSTOz"] * 4 + [b"aSTSTOzSTO"]


def test_the_first_stop_to_end_is_cut_and_of_two_the_longer() -> None:
    for text, stops, kept in (
        (b"aaab", [b"aab"], b"a"),
        (b"1234", [b"234", b"34", b"12345"], b"1"),
        (b"1234", [b"1234", b"23"], b"1"),
        (b"aaa", [b"", b"x"], b"aaa"),
    ):
        for tokens in ([text], [text[i : i + 1] for i in range(len(text))]):
            _, answer = stream(BYTES, tokens, stops)
            assert answer.text == kept, (text, stops)


def test_characters_are_whole_before_they_are_shown(bpe: FileTokenizer) -> None:
    # the bytes of é and € as the tokens of single bytes
    tokens = [bpe._backend.token_to_id(name) for name in "Ã©âĤ¬"]
    answer, seen = Answer(bpe), []
    for token in tokens:
        answer.add(token)
        seen.append(answer.take().decode())
    assert seen == ["", "é", "", "", "€"]
    answer = Answer(bpe)
    answer.add(tokens[0])
    assert answer.take() == b""
    answer.finish()
    assert answer.text.decode() == "\ufffd"


class Seen(NamedTuple):
    row: Tensor
    read: Tensor


class Script(nn.Module):
    """Says script[row] token by token after a prompt of lengths[row] tokens."""

    def __init__(self, scripts: list[list[int]], lengths: list[int], vocab_size: int) -> None:
        super().__init__()
        self.scripts, self.lengths, self.vocab_size, self.steps = scripts, lengths, vocab_size, 0

    def init_state(self, batch_size: int, **_: Any) -> Seen:
        return Seen(torch.arange(batch_size), torch.zeros(batch_size, dtype=torch.long))

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, state: Seen) -> SequenceOutput:
        self.steps += tokens.shape[1] == 1
        logits = torch.zeros(*tokens.shape, self.vocab_size)
        for i, row in enumerate(state.row.tolist()):
            for j in range(tokens.shape[1]):
                place = int(state.read[i]) + j + 1 - self.lengths[row]
                if 0 <= place < len(self.scripts[row]):
                    logits[i, j, self.scripts[row][place]] = 30.0
        number = tokens.shape[1] if mask is None else mask.sum(1)
        return SequenceOutput(logits, Seen(state.row, state.read + number), {})


def predicted(
    tokenizer: Tokenizer, prompts: Any, scripts: list[list[int]], stop: list[str], choice: str = "bytes"
) -> tuple[list[dict[str, Any]], Script]:
    encoded = [1 + len(tokenizer.encode(p.encode("utf-8", "surrogateescape"))) for p in prompts]
    net = Script(scripts, encoded, tokenizer.vocab_size)
    schema = {"tokenizer": choice, "tokenizer_key": tokenizer.key}
    module: Any = SimpleNamespace(net=net, task={"objective": "next"}, schema=schema)
    task = dict.fromkeys(("top_k", "top_p", "min_p")) | {"temperature": 0, "repetition_penalty": 1.0}
    given = prompts if len(prompts) > 1 else prompts[0]
    return continue_prompts(module, {**task, "max_new_tokens": 12, "prompt": given, "stop": stop}, seed=0), net


def test_prompts_of_different_lengths_stop_each_at_its_own_place(bpe: FileTokenizer, tmp_path: Path) -> None:
    texts = [b"xySTOPzw", b"STOPzwxy", b"wSTOwSTO", b"zSTO"]
    wanted = ["xy", "", "wSTOwSTO", "zSTO"]
    for tokenizer, choice in ((BYTES, "bytes"), (bpe, str(tmp_path / "bpe.json"))):
        if choice != "bytes":
            Path(choice).write_text(bpe._backend.to_str())
            tokenizer = FileTokenizer(choice)
        # the last tokens: a document's end ends a row, and what waited is text
        scripts = [[*tokenizer.encode(t).tolist(), *([tokenizer.separator] * 20)] for t in texts]
        found, _ = predicted(tokenizer, ["", "a", "a longer one", "mid"], scripts, ["STOP"], choice)
        assert [r["continuation"] for r in found] == wanted
        ends = [len(tokenizer.encode(t)) for t in texts[2:]]
        assert [r["tokens"] for r in found[2:]] == ends


def test_a_row_that_stopped_is_computed_no_more() -> None:
    texts = [b"aSTOP" + b"b" * 9, b"c" * 3 + b"STOP" + b"d" * 5]
    found, net = predicted(BYTES, ["p", "q"], [list(t) for t in texts], ["STOP"])
    assert [r["continuation"] for r in found] == ["a", "ccc"] and net.steps == 6


def test_the_terminal_never_has_a_part_of_a_stop(capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = predicted(BYTES, ["say "], [list("é ST STOP x".encode())], ["STOP"])
    assert capsys.readouterr().out == "say é ST "
    assert found == [{"prompt": "say ", "continuation": "é ST ", "tokens": 6}]


def test_bytes_that_are_no_text_are_kept(capsys: pytest.CaptureFixture[str]) -> None:
    found, _ = predicted(BYTES, ["a\udcff"], [[0xFE, 65, 0]], [])
    assert found[0] == {
        "prompt": "a\ufffd",
        "prompt_hex": "61ff",
        "continuation": "\ufffdA",
        "continuation_hex": "fe41",
        "tokens": 2,
    }
    assert capsys.readouterr().out == "a\ufffd\ufffdA"


def test_options_out_of_range_are_the_users(capsys: pytest.CaptureFixture[str]) -> None:
    module: Any = SimpleNamespace(
        net=Script([[1]], [1], 256), task={"objective": "next"}, schema={"tokenizer": "bytes", "tokenizer_key": "bytes"}
    )
    task = dict.fromkeys(("top_k", "top_p", "min_p", "prompt")) | {"repetition_penalty": 1.0, "stop": []}
    with pytest.raises(UserError, match="temperature=-1"):
        continue_prompts(module, {**task, "temperature": -1, "max_new_tokens": 3}, seed=0)
    assert capsys.readouterr().out == ""
