"""check_mixer itself: what it takes, what it runs, what its messages say."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

from seqzoo.blocks.mixers.linear import LinearAttention
from seqzoo.blocks.protocol import PATTERNS, Mixer
from seqzoo.blocks.testing import CheckError, check_mixer, find_subjects, run_check


class WrongSize(LinearAttention):
    variants = {"whole": {"causal": True, "num_heads": 2}}

    def state_size(self, length: int) -> int:
        return length


class Picky(LinearAttention):
    """An option that goes with one pattern only."""

    def __init__(self, dim: int, *, causal: bool = False, cross: bool = False, strict: bool = False) -> None:
        if strict and (causal or not cross):
            raise ValueError("strict=True is for the pattern 'cross'")
        super().__init__(dim, num_heads=2, causal=causal, cross=cross)


def patterns(mixer: type[Mixer], options: dict[str, Any] | None = None) -> list[str]:
    return [subject.pattern for subject in find_subjects(mixer, options=options)]


def test_the_message_names_mixer_variant_check_and_numbers() -> None:
    expected = r"^WrongSize\[whole\]: state_size: after 0 tokens: state_size says 0 elements, the state holds 144$"
    with pytest.raises(AssertionError, match=expected):
        check_mixer(WrongSize, checks=["state_size"])


def test_variants_are_completed_by_the_patterns_they_leave_out() -> None:
    labels = {subject.label: dict(subject.options) for subject in find_subjects(WrongSize)}
    assert labels["WrongSize[whole]"] == {"causal": True, "num_heads": 2}
    assert labels["WrongSize[causal-cross]"] == {"causal": True, "cross": True, "num_heads": 2}
    assert sorted(patterns(WrongSize)) == sorted(PATTERNS)
    assert [subject.first for subject in find_subjects(WrongSize)] == [True] * 4


def test_options_given_are_tried_in_every_pattern_they_allow() -> None:
    assert patterns(Picky, {}) == list(PATTERNS)
    assert patterns(Picky, {"strict": True}) == ["cross"]
    assert patterns(Picky, {"causal": True}) == ["causal"]
    assert check_mixer(Picky, options={"strict": True}, checks=["causal_cross", "padding"]) == ["padding"]
    with pytest.raises(ValueError, match="no option 'strickt'"):
        find_subjects(Picky, options={"strickt": True})


def test_a_factory_is_checked_as_it_builds() -> None:
    (subject,) = find_subjects(lambda dim: Picky(dim, cross=True, strict=True))
    assert (subject.pattern, subject.cls) == ("cross", Picky)


def test_a_variant_that_cannot_be_built_fails_its_checks_only() -> None:
    class Broken(LinearAttention):
        variants = {"default": {}, "other": {"extra": 3}}

    fine, broken = find_subjects(Broken)[:2]
    run_check("padding", fine)
    expected = r"^Broken\[other\]: padding: expected no error, got ValueError: .*'extra'"
    with pytest.raises(CheckError, match=expected):
        run_check("padding", broken)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"no check 'streeming'\. Did you mean streaming"):
        check_mixer(LinearAttention, checks=["streeming"])
    with pytest.raises(TypeError, match="Linear is not a subclass"):
        check_mixer(nn.Linear)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"unknown mixer 'sofmax'\. Did you mean softmax"):
        check_mixer("sofmax")
    with pytest.raises(CheckError, match=r"Odd: patterns: expected some of self, .* got \{'sideways'\}"):
        check_mixer(type("Odd", (Mixer,), {"patterns": frozenset({"sideways"})}))
