"""Overrides as text: split, sorted, completed, quoted."""

from __future__ import annotations

from pathlib import Path

import pytest

from seqzoo.pipelines.errors import UserError, nearest
from seqzoo.pipelines.overrides import (
    command_line_targets,
    complete_mixer,
    parse_arguments,
    quote,
    split_override,
)


def test_split_override() -> None:
    assert split_override("a.b=3") == ("", "a.b", "3")
    assert split_override("++a=b=c") == ("++", "a", "b=c")
    assert split_override("~a.b") == ("~", "a.b", None)
    assert split_override("data@x=csv") == ("", "data", "csv")


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["mixer._target_=m.M"], ["mixer=custom", "mixer._target_=m.M"]),
        (
            ["seed=1", "mixer._target_=m.M", "mixer.rank=3"],
            ["mixer=custom", "seed=1", "mixer._target_=m.M", "++mixer.rank=3"],
        ),
        (
            ["mixer=custom", "mixer._target_=m.M", "+mixer.a=1"],
            ["mixer=custom", "mixer._target_=m.M", "+mixer.a=1"],
        ),
        (["mixer=linear", "mixer.eps=1"], ["mixer=linear", "mixer.eps=1"]),
        (["mixer.num_heads=2"], ["mixer.num_heads=2"]),
    ],
)
def test_complete_mixer(typed: list[str], completed: list[str]) -> None:
    assert complete_mixer(typed) == completed
    assert complete_mixer(completed) == completed  # a rank gets the completed line and must not change it


def test_a_mixer_of_ones_own_excludes_a_registered_one() -> None:
    with pytest.raises(UserError, match="mixer=linear"):
        complete_mixer(["mixer=linear", "mixer._target_=m.M"])


def test_command_line_targets() -> None:
    typed = ["mixer._target_=m.M", "++callbacks.extra.x._target_='p.C'", "mixer.target=no", "seed=1"]
    assert command_line_targets(typed) == ["m.M", "p.C"]


def test_parse_arguments_sorts_the_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    request = parse_arguments(
        "fit", ["a=1", "-m", "--allow", "p", "b=2", "--cfg=job", "--config-dir", "mine", "--allow=q"]
    )
    assert request.overrides == ["a=1", "b=2"] and request.flags == ["-m", "--cfg", "job"]
    assert request.allow == ["p", "q"] and request.config_dirs == [str(tmp_path / "mine")] and request.sweep
    with pytest.raises(UserError, match="not both"):
        parse_arguments("fit", ["--config-dir", "mine", "hydra.searchpath=[]"])
    # a pickle must not be loaded from the command line
    with pytest.raises(UserError, match="unknown flag --experimental-rerun"):
        parse_arguments("fit", ["--experimental-rerun", "x.pickle"])


@pytest.mark.parametrize(
    "value", ["/plain", "/with space", "/it's", "/a,b", "/a=b", "/back\\slash", "/${x}".replace("$", "")]
)
def test_quote_is_read_back_by_hydra(value: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create().parse_overrides([f"hydra.run.dir={quote(value)}"])
    assert parsed[0].value() == value


def test_nearest() -> None:
    assert nearest("softmx", ["softmax", "linear"]) == " Did you mean softmax?"
    assert nearest("zzz", ["softmax", "linear"]) == " Known: linear, softmax."


@pytest.mark.parametrize("text", ["def main(", "a, b = c", "it's {", "x=\\"])
def test_a_prompt_is_read_as_it_stands(text: str) -> None:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    (word,) = parse_arguments("predict", [f"task.prompt={text}"]).overrides
    (override,) = OverridesParser.create().parse_overrides([word])
    assert override.value() == text
    (word,) = parse_arguments("predict", [f"query={text}"]).overrides
    assert OverridesParser.create().parse_overrides([word])[0].value() == text
    for kept in (
        "query=[a taxi, a tram]",
        "task.prompt=null",
        "task.prompt=['a', 'b']",
        "task.prompt='quoted ('",
        "task.seed=a(b)",
    ):
        assert parse_arguments("predict", [kept]).overrides == [kept]
