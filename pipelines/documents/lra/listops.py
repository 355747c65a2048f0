"""ListOps as Long Range Arena generates it (arXiv:2011.04006, section 2.1; first arXiv:1804.06028): ten classes.

A node is an operator with probability 1/4 while its depth is below `max_depth`, else a digit; the root has depth 1.
Operators MIN, MAX, MED and SM (sum modulo 10) are equally likely and take 2 to `max_args` arguments. A tree counts if
min_length < length < max_length, where a digit has length 1 and an operator 2 (itself and the closing bracket)
plus its arguments; each tree counts once. MED is the median, of an even number of arguments the mean of the middle
two rounded down.

The release draws with Python's random module from no seed; here tree t of a seed is a pure function of both, so that
a larger set begins with the smaller one.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from ...errors import UserError
from .bits import below, bits, stream
from .split import Split, cached_splits, check_sizes, cut, pad

PAD, FIRST_DIGIT, FIRST_OPERATOR, CLOSE = 0, 1, 11, 15
OPERATORS = ("[MIN", "[MAX", "[MED", "[SM")
SYMBOLS = ("", *"0123456789", *OPERATORS, "]")  # SYMBOLS[token] is its surface form; token 0 is padding
VOCAB_SIZE = len(SYMBOLS)
VERSION = 1  # of what a seed gives: raise it when the hash in the tests changes
_TREES = 4096  # drawn at a time
_ATTEMPTS = 500  # batches without a new tree before the grammar counts as exhausted


@dataclass(frozen=True)
class Grammar:
    """Limits of the trees; the defaults are the release's, anything else is a variant of ours and is named so."""

    min_length: int = 500
    max_length: int = 2000
    max_depth: int = 10
    max_args: int = 10

    def __post_init__(self) -> None:
        check_sizes(max_depth=self.max_depth, max_args=self.max_args, max_length=self.max_length)
        if self.max_args < 2:
            raise UserError(f"max_args={self.max_args} must be at least 2: every operator has two arguments or more")
        if not 0 <= self.min_length < self.max_length - 1:
            raise UserError(
                f"min_length={self.min_length} and max_length={self.max_length} leave no length between them: both are"
                " exclusive, min_length < length < max_length"
            )
        longest = _longest(self.max_depth, self.max_args, self.min_length + 1)
        if longest <= self.min_length:
            raise UserError(
                f"no tree of max_depth={self.max_depth} and max_args={self.max_args} is longer than {longest} tokens,"
                f" but min_length={self.min_length}"
            )

    @property
    def name(self) -> str:
        """The name for tables: listops, or "listops (ours: ...)" with what differs from the release."""
        release = {field.name: field.default for field in fields(self)}
        changed = [f"{key}={value}" for key, value in asdict(self).items() if value != release[key]]
        return f"listops (ours: {', '.join(changed)})" if changed else "listops"


def _longest(depth: int, args: int, enough: int) -> int:
    """Length of the longest tree, or some number of at least `enough`."""
    length = 1
    for _ in range(depth - 1):
        length = 2 + args * length
        if length >= enough:
            break
    return length


def sample(count: int, *, grammar: Grammar | None = None, seed: int = 0) -> Split:
    """The first `count` different trees of a seed as tokens, with their values as labels.

    tokens uint8 (count, max_length - 1). Raises UserError where the grammar has too few trees.
    """
    grammar = grammar or Grammar()
    rows: list[np.ndarray] = []
    labels: list[int] = []
    seen: set[bytes] = set()
    key, number, idle = stream(seed, "listops"), 0, 0
    while len(rows) < count:
        before = len(rows)
        trees = bits(key, np.arange(number, number + _TREES, dtype=np.uint64))
        tokens, bounds, values = _trees(trees, grammar)
        for begin, end, value in zip(bounds[:-1], bounds[1:], values, strict=True):
            row = tokens[begin:end]
            mark = row.tobytes()
            if mark not in seen and len(rows) < count:
                seen.add(mark)
                rows.append(row)
                labels.append(int(value))
        number += _TREES
        idle = 0 if len(rows) > before else idle + 1
        if idle == _ATTEMPTS:
            raise UserError(
                f"{grammar.name}: {idle * _TREES:,} further trees brought nothing new after {len(rows):,} of the"
                f" {count:,} asked for; allow more lengths or ask for fewer examples"
            )
    padded, lengths = pad(rows, grammar.max_length - 1)
    return Split(padded, lengths, np.array(labels, dtype=np.int64), num_classes=10, vocab_size=VOCAB_SIZE)


def listops_splits(
    *,
    train: int = 96_000,
    val: int = 2_000,
    test: int = 2_000,
    grammar: Grammar | None = None,
    seed: int = 0,
    cache_dir: str | Path | None = None,
) -> dict[str, Split]:
    """The splits of the benchmark, from the cache or made (about half a minute). Test and validation come first in the
    stream of trees, so that their examples do not depend on how many are trained on.
    """
    check_sizes(train=train, val=val, test=test)
    grammar = grammar or Grammar()
    options = {"version": VERSION, "sizes": [train, val, test], "grammar": asdict(grammar), "seed": seed}

    def make() -> dict[str, Split]:
        return cut(sample(train + val + test, grammar=grammar, seed=seed), train=train, val=val, test=test)

    return cached_splits("listops", options, cache_dir, make)


@dataclass
class _Level:
    """The nodes of one depth, of all trees side by side. parent: number of the parent in the level above (M,);
    tree (M,); kind: the token (M,); children: how many (M,), which are consecutive in the level below.
    """

    parent: np.ndarray
    tree: np.ndarray
    kind: np.ndarray
    children: np.ndarray


def _trees(keys: np.ndarray, grammar: Grammar) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens of the trees that the grammar accepts, one after the other, their bounds and their values."""
    levels, dropped = _grow(keys, grammar)
    lengths: list[np.ndarray] = []
    values: list[np.ndarray] = []
    for level in reversed(levels):
        below_length = lengths[-1] if lengths else np.zeros(0, dtype=np.int64)
        below_value = values[-1] if values else np.zeros(0, dtype=np.int64)
        lengths.append(_lengths(level, below_length))
        values.append(_values(level, below_value))
    lengths.reverse()
    total = lengths[0]  # of the roots, which are in the order of the trees
    accepted = (total > grammar.min_length) & (total < grammar.max_length) & ~dropped
    bounds = np.concatenate([[0], np.cumsum(np.where(accepted, total, 0))])
    tokens = _write(levels, lengths, accepted, bounds)
    return tokens, np.concatenate([[0], bounds[1:][accepted]]), values[-1][accepted]


def _grow(keys: np.ndarray, grammar: Grammar) -> tuple[list[_Level], np.ndarray]:
    """The trees, level by level, and bool (trees,): which became too long and were not grown to their end."""
    levels: list[_Level] = []
    tree, parent = np.arange(len(keys)), np.zeros(len(keys), dtype=np.int64)
    size = np.zeros(len(keys), dtype=np.int64)  # nodes and closing brackets so far: the tree is at least as long
    dropped = np.zeros(len(keys), dtype=bool)
    for depth in range(1, grammar.max_depth + 1):
        value = bits(keys)
        operator = (value & np.uint64(3)) == 0
        if depth == grammar.max_depth:
            operator[:] = False
        kind = np.where(
            operator, FIRST_OPERATOR + ((value >> np.uint64(2)) & np.uint64(3)).astype(np.int64), FIRST_DIGIT
        )
        # the digit and the number of arguments come from the same upper bits: a node has only one of them
        kind += np.where(operator, 0, below(10, value))
        children = np.where(operator, 2 + below(grammar.max_args - 1, value), 0)
        size += np.bincount(tree, weights=1 + operator, minlength=len(size)).astype(np.int64)
        after = size + np.bincount(tree, weights=children, minlength=len(size)).astype(np.int64)
        dropped |= after >= grammar.max_length
        children[dropped[tree]] = 0
        levels.append(_Level(parent, tree, kind, children))
        if not children.any():
            break
        parent = np.repeat(np.arange(len(children)), children)
        order = np.arange(len(parent)) - np.repeat(np.cumsum(children) - children, children)
        keys = bits(keys[parent], order + 1)
        tree = tree[parent]
    return levels, dropped


def _lengths(level: _Level, children: np.ndarray) -> np.ndarray:
    """Length of each node, from those of the level below."""
    operator = level.kind >= FIRST_OPERATOR
    return 1 + operator + _sums(level.children, children)


def _sums(count: np.ndarray, values: np.ndarray) -> np.ndarray:
    """Sums of consecutive groups of `values`, count[i] in group i."""
    total = np.concatenate([[0], np.cumsum(values)])
    last = np.cumsum(count)
    return total[last] - total[last - count]


def _values(level: _Level, children: np.ndarray) -> np.ndarray:
    """Value of each node, from those of the level below."""
    value = level.kind - FIRST_DIGIT
    nodes = np.flatnonzero(level.children)
    number, operator = level.children[nodes], level.kind[nodes] - FIRST_OPERATOR
    # how many arguments of each node are each digit: every operator is a function of that
    histogram = np.bincount(
        np.repeat(np.arange(len(nodes)), number) * 10 + children, minlength=10 * len(nodes)
    ).reshape(-1, 10)
    rank = np.cumsum(histogram, axis=1)
    minimum = np.argmax(rank > 0, axis=1)
    maximum = np.argmax(rank == number[:, None], axis=1)
    lower = np.argmax(rank > ((number - 1) // 2)[:, None], axis=1)
    upper = np.argmax(rank > (number // 2)[:, None], axis=1)
    total = histogram @ np.arange(10)
    value[level.kind >= FIRST_OPERATOR] = 0  # those of dropped trees have no arguments
    value[nodes] = np.choose(operator, [minimum, maximum, (lower + upper) // 2, total % 10])
    return value


def _write(levels: list[_Level], lengths: list[np.ndarray], accepted: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """The tokens of the accepted trees, each node at its place in the order of reading."""
    tokens = np.zeros(bounds[-1], dtype=np.uint8)
    start = bounds[:-1]
    for depth, (level, length) in enumerate(zip(levels, lengths, strict=True)):
        if depth:
            # an argument begins where the operator's token and the arguments before it end
            count = levels[depth - 1].children
            before = np.concatenate([[0], np.cumsum(length)[:-1]])
            first = np.cumsum(count) - count
            start = start[level.parent] + 1 + before - before[first[level.parent]]
        keep = accepted[level.tree]
        tokens[start[keep]] = level.kind[keep]
        operator = keep & (level.kind >= FIRST_OPERATOR)
        tokens[start[operator] + length[operator] - 1] = CLOSE
    return tokens
