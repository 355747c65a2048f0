"""The token tasks as probes of a language model: which sizes at which length, and rows as the model reads them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ...errors import UserError, nearest
from .generate import SPLITS
from .token_tasks import NOT_ASKED, TOKEN_TASKS, Batch, chance_level, token_batch

PAIRS = (4, 16, 64)  # of MQAR, as far as they fit
SYMBOLS = 16  # the published vocabulary of induction heads and copying, and the symbols to copy
LARGEST = 8192  # the published vocabulary of MQAR


@dataclass(frozen=True)
class TokenCell:
    """A task at a length: `length` tokens that the model reads, the separator before them included.

    options: of the task. items: MQAR's pairs or the symbols to copy; None for induction.
    """

    task: str
    length: int
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def items(self) -> int | None:
        return self.options.get("num_pairs", self.options.get("num_symbols"))

    @property
    def chance(self) -> float:
        return chance_level(self.task, **self.options)


def token_cells(task: str, lengths: Sequence[int], vocab_size: int, *, pairs: Sequence[int] = PAIRS) -> list[TokenCell]:
    """The cells of a task for a model of `vocab_size` tokens, a row of the table each.

    MQAR takes the whole vocabulary up to 8,192 (256 ids for bytes: 127 keys, 128 values) and every number of `pairs`
    that fits the length and the vocabulary; the other tasks their published 16 ids. Raises UserError for an unknown
    task and for a length or vocabulary that the task does not fit.
    """
    if task not in TOKEN_TASKS:
        raise UserError(f"there is no token task {task!r}.{nearest(task, TOKEN_TASKS)}")
    cells = []
    for length in sorted(lengths):
        sizes: list[dict[str, Any]] = [{}]
        if task == "mqar":
            ids = min(vocab_size, LARGEST)
            fitting = [n for n in pairs if 4 * n < length and n < ids // 2]
            sizes = [{"num_pairs": n, "vocab_size": ids} for n in fitting or pairs[:1]]
        else:
            sizes = [{"vocab_size": min(vocab_size, SYMBOLS)}]
            if task != "induction":
                sizes[0]["num_symbols"] = SYMBOLS
        cells += [TokenCell(task, length, size) for size in sizes]
    for cell in cells:
        token_rows(cell, 1)  # what does not fit is said before anything is evaluated
    return cells


def token_rows(
    cell: TokenCell, rows: int, *, start: int = 0, seed: int = 0, split: str = "test", index: int = 0
) -> Batch:
    """Tokens and targets (rows, length) of a cell, a function of the cell, seed, split and index (of the batch).

    start: the separator, which stands before the row as before a document. Raises UserError as the task does.
    """
    if split not in SPLITS:
        raise UserError(f"split={split!r} is unknown.{nearest(split, SPLITS)}")
    key = [seed, SPLITS.index(split), zlib.crc32(cell.task.encode()), cell.length, cell.items or 0, index]
    rng = np.random.default_rng(key)
    return after_separator(token_batch(cell.task, rng, rows, cell.length - 1, **cell.options), start)


def after_separator(batch: Batch, start: int = 0) -> Batch:
    """The same rows behind a first token `start`, where nothing is asked."""
    tokens, targets = batch
    room = ((0, 0), (1, 0))
    return np.pad(tokens, room, constant_values=start), np.pad(targets, room, constant_values=NOT_ASKED)
