"""Token-level recall and copying: a small model is trained on them and tested at other lengths.

Each task is a pure function `task(rng, rows, length, **options) -> (tokens, targets)`, both int64 (B, L): targets[b, t]
is what the model must give after it has read tokens[b, : t + 1], and -100 where nothing is asked. Everything random
comes from `rng`, so that a batch is a function of its seed: np.random.default_rng([seed, split, batch]).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import numpy as np

from ...errors import UserError, nearest

NOT_ASKED = -100
NOISE, MARKER = 0, 1  # of the copying tasks; their symbols are 2 ... vocab_size - 1

Batch = tuple[np.ndarray, np.ndarray]

# MQAR as published: (length, pairs, rows) of the training mixture, (length, pairs) of the tests of 1,000 rows each.
MQAR_TRAINING = ((64, 4, 100_000), (128, 8, 20_000), (256, 16, 20_000), (256, 32, 20_000), (256, 64, 20_000))
MQAR_TESTS = ((64, 4), (64, 8), (64, 16), (128, 32), (256, 64), (512, 128), (1024, 256))
# Induction heads as in the Mamba paper: trained at one length, tested from 2^6 to 2^20.
INDUCTION_TRAINING = 256
INDUCTION_TESTS = tuple(2**power for power in range(6, 21))


def mqar(
    rng: np.random.Generator,
    rows: int,
    length: int,
    *,
    num_pairs: int = 4,
    vocab_size: int = 8192,
    num_passes: int = 1,
    power: float = 0.01,
    fillers: Literal["distinct", "public", "none"] = "distinct",
) -> Batch:
    """Multi-query associative recall (Arora et al., arXiv:2312.04927, with the recipe of their public code).

    A row starts with n pairs (key, value), the same n pairs again in every further pass (the repeated context of
    arXiv:2407.05483): keys from 1 ... V/2 - 1 and values from V/2 ... V - 1, each without replacement. The rest is S =
    (L - 2 n passes) // 2 slots of two tokens. Each key comes once more at the start of a slot, drawn without
    replacement with p(slot g) ~ g^(a - 1), g = 1 ... S, in the order of the pairs; its value is asked there.

    num_pairs: n. power: a; 1 is uniform, 0.01 is the public recipe, which prefers the first slots. fillers: what the
    other places hold. "distinct": tokens that are no key of the row, so that a key is always a pair or a query;
    "public": any token, as in the public code, which sometimes hits a key of the row; "none": token 0.
    Raises UserError where the pairs and queries do not fit the length or the vocabulary.
    """
    half, context = vocab_size // 2, 2 * num_pairs * num_passes
    slots = (length - context) // 2
    _check(rows, length)
    if num_pairs < 1 or num_passes < 1:
        raise UserError(f"num_pairs={num_pairs} and num_passes={num_passes} must be positive")
    if slots < num_pairs:
        raise UserError(
            f"num_pairs={num_pairs} with num_passes={num_passes} needs a length of {context + 2 * num_pairs} or more, "
            f"got length={length}; at this length at most {length // (2 * num_passes + 2)} pairs fit"
        )
    if num_pairs > half - 1:
        raise UserError(
            f"num_pairs={num_pairs} needs vocab_size={2 * num_pairs + 2} or more, got vocab_size={vocab_size}"
        )
    if fillers not in ("distinct", "public", "none"):
        raise UserError(f"fillers={fillers!r} is unknown.{nearest(fillers, ('distinct', 'public', 'none'))}")
    keys = 1 + _distinct(rng, rows, num_pairs, half - 1)
    values = half + _distinct(rng, rows, num_pairs, vocab_size - half)
    slot = _without_replacement(rng, rows, num_pairs, np.arange(1, slots + 1) ** (power - 1.0))
    if fillers == "distinct":
        tokens = _excluding(rng, keys, vocab_size, length)
    elif fillers == "public":
        tokens = rng.integers(0, vocab_size, (rows, length))
    else:
        tokens = np.zeros((rows, length), np.int64)
    tokens[:, 0:context:2] = np.tile(keys, num_passes)
    tokens[:, 1:context:2] = np.tile(values, num_passes)
    targets = np.full((rows, length), NOT_ASKED)
    np.put_along_axis(tokens, context + 2 * slot, keys, axis=1)
    np.put_along_axis(targets, context + 2 * slot, values, axis=1)
    return tokens, targets


def induction_heads(rng: np.random.Generator, rows: int, length: int, *, vocab_size: int = 16) -> Batch:
    """Induction heads (Fu et al., arXiv:2212.14052; the lengths of Gu and Dao, arXiv:2312.00752, section 4.1.2).

    Random tokens from 0 ... V - 2. The special token V - 1 stands at one place, uniform over 0 ... L - 3, and again at
    the end, where the token that followed it is asked.
    """
    _check(rows, length, at_least=3)
    _check_symbols(vocab_size, 1)
    tokens = rng.integers(0, vocab_size - 1, (rows, length))
    place = rng.integers(0, length - 2, (rows, 1))
    targets = np.full((rows, length), NOT_ASKED)
    targets[:, -1] = np.take_along_axis(tokens, place + 1, axis=1)[:, 0]
    np.put_along_axis(tokens, place, vocab_size - 1, axis=1)
    tokens[:, -1] = vocab_size - 1
    return tokens, targets


def selective_copying(
    rng: np.random.Generator, rows: int, length: int, *, num_symbols: int = 16, vocab_size: int = 16
) -> Batch:
    """Selective copying (Gu and Dao, arXiv:2312.00752, section 4.1.1; there 16 symbols among 4,096 places).

    The first L - n places hold noise (token 0) and n random symbols from 2 ... V - 1 at places drawn without
    replacement; the last n hold the marker 1, and at the i-th of them the i-th symbol is asked. num_symbols: n.
    """
    context = _copying_context(rows, length, num_symbols, vocab_size)
    place = np.sort(_distinct(rng, rows, num_symbols, context), axis=1)
    return _copied(rng, place, length, num_symbols, vocab_size)


def copying(rng: np.random.Generator, rows: int, length: int, *, num_symbols: int = 16, vocab_size: int = 16) -> Batch:
    """Copying after a delay (Hochreiter and Schmidhuber, 1997; Arjovsky et al., arXiv:1511.06464, section 5.1).

    As `selective_copying` with the symbols in the first n places, so that the delay is the same in every row.
    """
    _copying_context(rows, length, num_symbols, vocab_size)
    place = np.tile(np.arange(num_symbols), (rows, 1))
    return _copied(rng, place, length, num_symbols, vocab_size)


TOKEN_TASKS: dict[str, Callable[..., Batch]] = {
    "mqar": mqar,
    "induction": induction_heads,
    "selective_copying": selective_copying,
    "copying": copying,
}


def token_batch(task: str, rng: np.random.Generator, rows: int, length: int, **options: Any) -> Batch:
    """The batch of the task of that name; an unknown name or option is a UserError with the close ones."""
    known = _defaults(task)
    for option in options:
        if option not in known:
            raise UserError(f"{task} has no option {option!r}.{nearest(option, known)}")
    return TOKEN_TASKS[task](rng, rows, length, **options)


def chance_level(task: str, **options: Any) -> float:
    """The accuracy of a uniform guess among the tokens that can be an answer (all equally likely: also the majority).

    A model that has read an MQAR row but binds nothing can do better: 1 / num_pairs, one of the row's values.
    """
    vocab_size = {**_defaults(task), **options}["vocab_size"]
    answers = {"mqar": vocab_size - vocab_size // 2, "induction": vocab_size - 1}.get(task, vocab_size - 2)
    return 1 / answers


def _defaults(task: str) -> dict[str, Any]:
    """The options of a task."""
    if task not in TOKEN_TASKS:
        raise UserError(f"there is no token task {task!r}.{nearest(task, TOKEN_TASKS)}")
    return dict(TOKEN_TASKS[task].__kwdefaults__ or {})


def _check(rows: int, length: int, at_least: int = 1) -> None:
    if rows < 1:
        raise UserError(f"rows={rows} must be positive")
    if length < at_least:
        raise UserError(f"length={length} is too short: the task needs {at_least} or more")


def _check_symbols(vocab_size: int, special: int) -> None:
    if vocab_size < special + 2:
        raise UserError(f"vocab_size={vocab_size} leaves fewer than two symbols: take {special + 2} or more")


def _copying_context(rows: int, length: int, num_symbols: int, vocab_size: int) -> int:
    if num_symbols < 1:
        raise UserError(f"num_symbols={num_symbols} must be positive")
    _check(rows, length, at_least=2 * num_symbols)
    _check_symbols(vocab_size, 2)
    return length - num_symbols


def _copied(rng: np.random.Generator, place: np.ndarray, length: int, num_symbols: int, vocab_size: int) -> Batch:
    symbols = rng.integers(2, vocab_size, place.shape)
    tokens = np.full((len(place), length), NOISE)
    targets = np.full((len(place), length), NOT_ASKED)
    np.put_along_axis(tokens, place, symbols, axis=1)
    tokens[:, -num_symbols:] = MARKER
    targets[:, -num_symbols:] = symbols
    return tokens, targets


def _distinct(rng: np.random.Generator, rows: int, number: int, size: int) -> np.ndarray:
    """(rows, number) integers of 0 ... size - 1, none twice in a row, in random order."""
    return _smallest(rng.random((rows, size)), number)


def _without_replacement(rng: np.random.Generator, rows: int, number: int, weights: np.ndarray) -> np.ndarray:
    """(rows, number) successive draws without replacement with these weights (up to a factor).

    The order of exponential variables divided by their weights is that of successive draws (Efraimidis and Spirakis,
    2006).
    """
    return _smallest(rng.exponential(size=(rows, len(weights))) / weights, number)


def _smallest(scores: np.ndarray, number: int) -> np.ndarray:
    """Where the `number` smallest scores of each row are, the smallest first."""
    if number < scores.shape[1]:
        found = np.argpartition(scores, number - 1, axis=1)[:, :number]
    else:
        found = np.tile(np.arange(number), (len(scores), 1))
    order = np.argsort(np.take_along_axis(scores, found, axis=1), axis=1)
    return np.take_along_axis(found, order, axis=1)


def _excluding(rng: np.random.Generator, excluded: np.ndarray, size: int, length: int) -> np.ndarray:
    """(rows, length) integers, uniform over those of 0 ... size - 1 that are not in the row of `excluded` (rows, n)."""
    rows, number = excluded.shape
    draws = rng.integers(0, size - number, (rows, length))
    # The u-th integer that is left is u + the number of excluded e_i (ascending) with e_i - i <= u. One search serves
    # all rows once each has its own range.
    lower = np.sort(excluded, axis=1) - np.arange(number)
    offset = size * np.arange(rows)[:, None]
    below = np.searchsorted((lower + offset).ravel(), (draws + offset).ravel(), side="right").reshape(rows, length)
    return draws + below - number * np.arange(rows)[:, None]
