"""What the needles of the text probes are hidden in: endless streams of units, a unit being a sentence.

noise     the five sentences of the passkey probe (Mohtashami and Jaggi, arXiv:2305.16300), over and over
essay     the sentences of a text that the caller gives, from a random one on, around; without a text, sentences of a
          small grammar that says nothing of numbers
needles   sentences of the same form as the needle (distractors); made in text_tasks.py, which knows that form
"""

from __future__ import annotations

import functools
import itertools
import re
import textwrap
from collections.abc import Iterator

import numpy as np

from ...errors import UserError
from .words import ADJECTIVES, ENDINGS, NOUNS, OPENINGS, VERBS

NOISE = (
    "The grass is green.",
    "The sky is blue.",
    "The sun is yellow.",
    "Here we go.",
    "There and back again.",
)
MAX_UNIT = 300  # characters; a text without full stops is cut here, so that a unit stays small beside a prompt


def noise() -> Iterator[str]:
    """The five sentences, over and over."""
    return itertools.cycle(NOISE)


def essay(rng: np.random.Generator, text: str | None = None) -> Iterator[str]:
    """The sentences of `text` from a random one on, around; None: neutral sentences made up from `rng`.

    Raises UserError where the text holds no word.
    """
    if text is None:
        return neutral_sentences(rng)
    units = sentences(text)
    if not units:
        raise UserError("the essay holds no text: give some, or None for generated sentences")
    start = int(rng.integers(len(units)))
    return itertools.chain(units[start:], itertools.cycle(units))


@functools.lru_cache(maxsize=4)
def sentences(text: str) -> tuple[str, ...]:
    """The sentences of a text, white space (and the separator, the NUL byte) as one blank, none over 300 characters."""
    pieces = re.split(r"(?<=[.!?])\s+|(?<=[。！？])\s*", text.replace("\0", " "))
    plain = (" ".join(piece.split()) for piece in pieces)
    return tuple(part for piece in plain if piece for part in textwrap.wrap(piece, MAX_UNIT))


def neutral_sentences(rng: np.random.Generator) -> Iterator[str]:
    """Sentences of the grammar [opening] the [adjective] noun verb the [adjective] noun [ending], without end."""
    while True:
        # a block at a time: a draw for each word would cost more than everything else
        for first, second, *rest in rng.integers(0, 2**31, (64, 7)).tolist():
            opening, verb, ending = _pick(OPENINGS, rest[2]), _pick(VERBS, rest[3]), _pick(ENDINGS, rest[4])
            sentence = f"{opening}the {_thing(first, rest[0])} {verb} the {_thing(second, rest[1])}{ending}."
            yield sentence[0].upper() + sentence[1:]


def _pick(words: tuple[str, ...], number: int) -> str:
    return words[number % len(words)]


def _thing(noun: int, adjective: int) -> str:
    # an adjective before two nouns of three
    plain = _pick(NOUNS, noun)
    return plain if adjective % 3 == 0 else f"{_pick(ADJECTIVES, adjective // 3)} {plain}"
