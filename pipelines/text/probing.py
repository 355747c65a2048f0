"""Long-context probes of a trained language model: can it give back what stood far before?"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from ...zoo import LanguageModel
from ..errors import UserError, nearest
from .probes.generate import probe_grid
from .probes.heatmap import plot_accuracy_grid
from .probes.scores import accuracy_grid, answer_log_prob, answers_correct, asked_accuracy, teacher_forced
from .probes.text_tasks import TEXT_TASKS, Probe, find_task
from .probes.token_grid import TokenCell, token_cells, token_rows
from .probes.token_tasks import TOKEN_TASKS
from .tokenizer import Tokenizer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_TOKENS = 1 << 14  # of a batch


def check_probe(name: str) -> None:
    """Raise UserError for a name that is neither a text nor a token probe."""
    known = (*TEXT_TASKS, *TOKEN_TASKS)
    if name not in known:
        raise UserError(f"there is no probe {name!r}.{nearest(name, known)}")


def probes_of(
    tasks: Sequence[str], lengths: Sequence[int], samples: int, tokenizer: Tokenizer, seed: int
) -> Iterator[Probe]:
    """`samples` probes for each text task, length (in tokens) and, where one needle is asked, depth of DEPTHS."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text.encode("utf-8", "surrogateescape")))

    for task in tasks:
        depths = DEPTHS if find_task(task).one_needle else None
        number = samples if depths else samples * len(DEPTHS)
        yield from probe_grid(task, sorted(lengths), depths, samples=number, seed=seed, count_tokens=count)


def run_probes(
    net: LanguageModel, tokenizer: Tokenizer, tasks: Sequence[str], lengths: Sequence[int], *, samples: int, seed: int
) -> list[dict[str, Any]]:
    """Rows for each task (of text or tokens), length and depth or number of items, in the order of `tasks`.

    samples: probes of a depth; what has no depth gets five times as many. A row has task, length, depth, items (pairs
    of MQAR, symbols to copy), mean, chance, count and bits: `run_text_probes` and `run_token_probes` say what counts.
    Raises UserError for an unknown task, and before anything is evaluated where a token task does not fit.
    """
    for task in tasks:
        check_probe(task)
    vocab = getattr(net, "vocab_size", tokenizer.vocab_size)
    cells = [cell for task in tasks if task in TOKEN_TASKS for cell in token_cells(task, lengths, vocab)]
    text = [task for task in tasks if task in TEXT_TASKS]
    rows = run_text_probes(net, tokenizer, text, lengths, samples=samples, seed=seed)
    rows += run_token_probes(net, cells, rows=samples * len(DEPTHS), start=tokenizer.separator, seed=seed)
    return sorted(rows, key=lambda row: tasks.index(row["task"]))


@torch.no_grad()
def run_text_probes(
    net: LanguageModel, tokenizer: Tokenizer, tasks: Sequence[str], lengths: Sequence[int], *, samples: int, seed: int
) -> list[dict[str, Any]]:
    """Mean and count of answers that are right to the last token, when the model reads the right answer
    (teacher-forced), and `bits`, the mean information of an answer to the model."""
    device = next(net.parameters()).device
    right: list[tuple[dict[str, Any], float]] = []
    bits: list[tuple[dict[str, Any], float]] = []

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text.encode("utf-8", "surrogateescape")).tolist()

    probes = sorted(probes_of(tasks, lengths, samples, tokenizer, seed), key=lambda p: p.meta["length"])
    for length, same in groupby(probes, key=lambda p: p.meta["length"]):
        together, size = list(same), max(1, _TOKENS // length)
        for first in range(0, len(together), size):
            group = together[first : first + size]
            arrays = teacher_forced(group, encode, start=tokenizer.separator)
            tokens, targets = (torch.from_numpy(array).to(device) for array in arrays)
            logits = net(tokens).y  # what is filled up on the right comes after everything that is asked
            hits, logs = answers_correct(logits, targets).tolist(), answer_log_prob(logits, targets).tolist()
            right += [(p.meta, float(h)) for p, h in zip(group, hits, strict=True)]
            bits += [(p.meta, -v / math.log(2)) for p, v in zip(group, logs, strict=True)]
    return [
        _row(row["task"], row["length"], row["mean"], row["count"], other["mean"], depth=row["depth"])
        for row, other in zip(accuracy_grid(right), accuracy_grid(bits), strict=True)
    ]


@torch.no_grad()
def run_token_probes(
    net: LanguageModel, cells: Sequence[TokenCell], *, rows: int, start: int = 0, seed: int = 0
) -> list[dict[str, Any]]:
    """Mean and count of asked tokens (not rows) that are the likeliest ones, over `rows` rows of each cell, and `bits`,
    the mean information of an asked token. chance: of a uniform guess among the possible answers."""
    device = next(net.parameters()).device
    found = []
    for cell in cells:
        arrays = token_rows(cell, rows, start=start, seed=seed)
        right = asked = 0
        nats = 0.0
        size = max(1, _TOKENS // cell.length)
        for first in range(0, rows, size):
            tokens, targets = (torch.from_numpy(part[first : first + size]).to(device) for part in arrays)
            logits = net(tokens).y
            hits, number = asked_accuracy(logits, targets)
            right, asked = right + hits, asked + number
            nats -= float(answer_log_prob(logits, targets).sum())
        bits = nats / math.log(2) / asked
        found.append(_row(cell.task, cell.length, right / asked, asked, bits, items=cell.items, chance=cell.chance))
    return found


def _row(
    task: str,
    length: int,
    mean: float,
    count: int,
    bits: float,
    *,
    depth: float | None = None,
    items: int | None = None,
    chance: float | None = None,
) -> dict[str, Any]:
    keys = ("task", "length", "depth", "items", "mean", "chance", "count", "bits")
    return dict(zip(keys, (task, length, depth, items, mean, chance, count, bits), strict=True))


def draw_probes(rows: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Heat maps of the tasks with a depth; nothing where there are none."""
    if all(row["depth"] is None for row in rows):
        return None
    return plot_accuracy_grid(rows, path, unit="tokens", title="answers right to the last token")
