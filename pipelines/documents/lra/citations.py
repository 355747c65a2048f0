"""Pairs of documents that may cite the same: a substitute of ours for the papers of the Retrieval task, made offline.

Long Range Arena's Retrieval needs papers that cannot be passed on. Here a document is a text of made-up words from a
mixture of topics, each topic a Dirichlet draw over one vocabulary. Both documents of a pair have the same mixture, and
both have `mentions` rare words, placed more than `start` bytes from their beginning. In a pair of label 1 `shared` of
these are the same in both, in a pair of label 0 none is. So neither topics, nor lengths, nor the first `start` bytes,
nor one document alone tell the label: rare words must be compared across the documents. Accuracies on these pairs are
not accuracies on the benchmark.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ...errors import UserError
from .bits import stream
from .split import Split, cached_splits, check_sizes, cut, pad

NAME = "citations (ours)"
VERSION = 1  # of what a seed gives
_LETTERS = np.frombuffer(b"abcdefghijklmnopqrstuvwxyz", dtype=np.uint8)


@dataclass(frozen=True)
class Library:
    """What the documents are made of. length: most bytes of a document; the fewest are about half of it. start: rare
    words begin behind it. mentions: rare words of a document; shared: those that a citing pair has in common."""

    length: int = 4000
    start: int = 1000
    words: int = 2000
    rare: int = 20_000
    topics: int = 20
    concentration: float = 0.02
    mentions: int = 12
    shared: int = 6

    def __post_init__(self) -> None:
        whole = {name: value for name, value in asdict(self).items() if name not in ("concentration", "start")}
        check_sizes(**whole)
        if not self.concentration > 0:
            raise UserError(f"concentration={self.concentration} must be above 0")
        if self.shared > self.mentions:
            raise UserError(f"shared={self.shared} is more than mentions={self.mentions}")
        if self.rare < 2 * self.mentions:
            raise UserError(f"rare={self.rare} must be at least twice mentions={self.mentions}")
        # a rare word has 8 letters; common ones of at most 9 stand between two of them
        room = self.length // 2 - self.start
        if self.start < 0 or room < 40 * self.mentions:
            raise UserError(
                f"start={self.start} leaves {max(room, 0)} bytes of the shortest texts (half of length={self.length})"
                f" for {self.mentions} rare words; leave {40 * self.mentions}"
            )


class _Words:
    """The vocabularies and topics of a seed. Common words have 3 to 7 letters, rare ones 8: none is both."""

    def __init__(self, library: Library, seed: int) -> None:
        random = _random(seed, "words")
        self.common = _vocabulary(random, library.words, 3, 7)
        self.rare = _vocabulary(random, library.rare, 8, 8)
        topics = random.dirichlet(np.full(library.words, library.concentration), size=library.topics)
        self.cumulated = np.cumsum(topics, axis=1)


def sample(count: int, library: Library | None = None, *, seed: int = 0) -> Split:
    """The first `count` pairs of a seed: tokens uint8 (count, 2, length). Labels are fair coins."""
    library = library or Library()
    words = _Words(library, seed)
    tokens = np.zeros((count, 2, library.length), dtype=np.uint8)
    lengths = np.zeros((count, 2), dtype=np.int32)
    labels = np.zeros(count, dtype=np.int64)
    for number in range(count):
        random = _random(seed, "pair", number)
        labels[number] = random.integers(2)
        rare = random.choice(library.rare, size=2 * library.mentions, replace=False)
        first, second = rare[: library.mentions], rare[library.mentions :]
        if labels[number]:
            second = np.concatenate([first[: library.shared], second[library.shared :]])
        mixture = random.dirichlet(np.ones(library.topics))
        texts = [_document(random, words, library, mixture, mentions) for mentions in (first, second)]
        tokens[number], lengths[number] = pad(texts, library.length)
    return Split(tokens, lengths, labels, num_classes=2, vocab_size=256)


def citation_splits(
    *,
    train: int = 20_000,
    val: int = 2_000,
    test: int = 2_000,
    library: Library | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> dict[str, Split]:
    """Splits of generated pairs, from the cache or made; test and validation come first, as they do for ListOps."""
    check_sizes(train=train, val=val, test=test)
    library = library or Library()
    options = {"version": VERSION, "sizes": [train, val, test], "library": asdict(library), "seed": seed}

    def make() -> dict[str, Split]:
        return cut(sample(train + val + test, library, seed=seed), train=train, val=val, test=test)

    return cached_splits("citations", options, cache_dir, make)


def _document(
    random: np.random.Generator, words: _Words, library: Library, mixture: np.ndarray, mentions: np.ndarray
) -> bytes:
    """A text of the mixture with the rare words of those numbers spread, in random order, over what follows `start`."""
    length = int(random.integers(library.length // 2, library.length + 1))
    number = length // 4 + 1  # no word with its blank is shorter than four bytes
    topic = np.searchsorted(np.cumsum(mixture), random.random(number)).clip(max=library.topics - 1)
    draws = random.random(number)
    chosen = [0] * number
    for which in np.unique(topic):
        places = np.flatnonzero(topic == which)
        found = np.searchsorted(words.cumulated[which], draws[places]).clip(max=library.words - 1)
        for place, word in zip(places.tolist(), found.tolist(), strict=True):
            chosen[place] = word
    common = [words.common[word] for word in chosen]
    ends = np.cumsum([len(word) + 1 for word in common])
    # the texts end at `length` with the rare words in it, and the last of them stands whole
    room = length - len(mentions) * 9
    kept = int(np.searchsorted(ends, room, side="right"))
    begin = int(np.searchsorted(ends, library.start, side="right")) + 1
    places = np.sort(random.choice(np.arange(begin, kept), size=len(mentions), replace=False))[::-1]
    text = common[:kept]
    for place, mention in zip(places.tolist(), random.permutation(mentions).tolist(), strict=True):
        text.insert(place, words.rare[mention])
    return b" ".join(text)


def _vocabulary(random: np.random.Generator, count: int, shortest: int, longest: int) -> list[bytes]:
    """`count` different words of random letters."""
    found: dict[bytes, None] = {}
    while len(found) < count:
        size = int(random.integers(shortest, longest + 1))
        found[_LETTERS[random.integers(len(_LETTERS), size=size)].tobytes()] = None
    return list(found)


def _random(seed: int, name: str, number: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.PCG64([int(stream(seed, name)[0]), number]))
