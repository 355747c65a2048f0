"""ListOps expressions in their surface form, their values, and the tab-separated files that they are published in.

The surface form applies an operator to one argument at a time, and then to its closing bracket:
[MAX 2 3 ] is written ( ( ( [MAX 2 ) 3 ) ] ). The round brackets carry nothing and are no tokens.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ...errors import UserError, one_line
from .listops import CLOSE, FIRST_DIGIT, FIRST_OPERATOR, SYMBOLS, VOCAB_SIZE
from .split import Split, pad

HEADER = ("Source", "Target")
_TOKENS = {symbol: token for token, symbol in enumerate(SYMBOLS) if symbol}
_TOKENS["X"] = CLOSE  # the release's tokeniser replaces "]" by it


def _median(values: Sequence[int]) -> int:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) // 2


_FUNCTIONS: dict[str, Callable[[Sequence[int]], int]] = {
    "[MIN": min,
    "[MAX": max,
    "[MED": _median,
    "[SM": lambda values: sum(values) % 10,
}


def evaluate(tokens: Sequence[int] | np.ndarray) -> int:
    """The value, 0 to 9, of an expression without padding. Raises ValueError, with the token, where it is none."""
    open_calls: list[tuple[str, list[int]]] = [("", [])]
    for place, token in enumerate(np.asarray(tokens).tolist()):
        if len(open_calls) == 1 and open_calls[0][1]:
            raise ValueError(f"token {place}: the expression has ended before")
        if FIRST_DIGIT <= token < FIRST_OPERATOR:
            open_calls[-1][1].append(token - FIRST_DIGIT)
        elif FIRST_OPERATOR <= token < CLOSE:
            open_calls.append((SYMBOLS[token], []))
        elif token == CLOSE and len(open_calls) > 1:
            name, values = open_calls.pop()
            if not values:
                raise ValueError(f"token {place}: {name} has no arguments")
            open_calls[-1][1].append(_FUNCTIONS[name](values))
        else:
            raise ValueError(f"token {place}: {'] closes nothing' if token == CLOSE else f'{token} is no symbol'}")
    if len(open_calls) > 1 or not open_calls[0][1]:
        raise ValueError(f"{open_calls[-1][0]} is not closed" if len(open_calls) > 1 else "the expression is empty")
    return open_calls[0][1][0]


def to_source(tokens: Sequence[int] | np.ndarray) -> str:
    """The surface form of an expression without padding."""
    evaluate(tokens)
    open_calls: list[list[str]] = [[]]
    for token in np.asarray(tokens).tolist():
        if token == CLOSE:
            # one pair of brackets for each argument and one for the closing bracket, all beginning before the operator
            operator, *arguments = open_calls.pop()
            text = "( " * (len(arguments) + 1) + operator
            open_calls[-1].append(text + "".join(f" {argument} )" for argument in [*arguments, SYMBOLS[CLOSE]]))
        elif token >= FIRST_OPERATOR:
            open_calls.append([SYMBOLS[token]])
        else:
            open_calls[-1].append(SYMBOLS[token])
    return open_calls[0][0]


def from_source(text: str) -> np.ndarray:
    """Tokens, uint8, of an expression in its surface form, with or without the round brackets. Raises ValueError for a
    symbol that there is not; `evaluate` checks the rest."""
    symbols = [symbol for symbol in text.split() if symbol not in "()"]
    for symbol in symbols:
        if symbol not in _TOKENS:
            raise ValueError(f"{symbol!r} is no symbol of ListOps: {' '.join(SYMBOLS[1:])}")
    return np.array([_TOKENS[symbol] for symbol in symbols], dtype=np.uint8)


def write_tsv(split: Split, path: str | Path) -> None:
    """Write the release's format: a line `Source<TAB>Target`, then an expression and its value in each line."""
    with Path(path).open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file, delimiter="\t")
        writer.writerow(HEADER)
        for tokens, length, label in zip(split.tokens, split.lengths, split.labels, strict=True):
            writer.writerow([to_source(tokens[:length]), int(label)])


def read_tsv(path: str | Path) -> Split:
    """Read the release's format, or that of the original ListOps (arXiv:1804.06028): `value<TAB>expression`, no header.

    Raises UserError, with the line, for what is no expression and for a value that is not the expression's.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no ListOps file {path}; `write_tsv` writes one")
    rows: list[np.ndarray] = []
    labels: list[int] = []
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline().rstrip("\n").split("\t")
        released = tuple(first) == HEADER
        file.seek(0)
        for number, line in enumerate(file, start=1):
            if (released and number == 1) or not line.strip():
                continue
            fields = line.rstrip("\n").split("\t")
            if len(fields) != 2:
                raise UserError(f"{path}:{number}: {len(fields)} columns, not an expression and its value")
            source, target = fields if released else fields[::-1]
            try:
                rows.append(from_source(source))
                value = evaluate(rows[-1])
            except ValueError as error:
                raise UserError(f"{path}:{number}: {one_line(error)}") from None
            if target.strip() != str(value):
                raise UserError(f"{path}:{number}: value {target[:20]!r}, but the expression's is {value}")
            labels.append(value)
    if not rows:
        raise UserError(f"{path} has no expressions")
    tokens, lengths = pad(rows)
    return Split(tokens, lengths, np.array(labels, dtype=np.int64), num_classes=10, vocab_size=VOCAB_SIZE)
