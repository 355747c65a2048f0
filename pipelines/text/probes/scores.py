"""Scores of the probes, pure functions: of a generated text, of teacher-forced logits, and their tables.

A model that is too small to stop, or that was never trained on the answers' format, still has a teacher-forced score:
it reads the prompt with the right answer after it and is asked for each token of that answer. With A the answer's
tokens and x all tokens before each,

log-probability     sum over t in A of log p(x_t | x_<t)
answer correct      argmax p(. | x_<t) = x_t for every t in A
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .text_tasks import SEPARATOR, Probe
from .token_tasks import NOT_ASKED

Row = dict[str, Any]


def containment(text: str, answers: Sequence[str]) -> float:
    """The fraction of the answers that the text holds, in any case of the letters (the score of arXiv:2404.06654)."""
    folded = text.casefold()
    return sum(answer.casefold() in folded for answer in answers) / len(answers)


def exact_match(text: str, answers: Sequence[str]) -> bool:
    """Whether the text begins, after white space, with the answers as a teacher writes them.

    What comes after does not count, so that a model need not stop; but 123456 is not 12345.
    """
    text, wanted = text.lstrip(), SEPARATOR.join(answers)
    return text.startswith(wanted) and not text[len(wanted) : len(wanted) + 1].isalnum()


def teacher_forced(
    probes: Sequence[Probe], encode: Callable[[str], Sequence[int]], *, start: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets, int64 (B, L), for the scores below: prompt and answer, -100 wherever no answer is asked.

    encode: a text to ids; prompt and continuation are encoded apart, as they are when the prompt is continued.
    start: what stands before the first token. Rows are as long as the longest, filled up with `start` on the right.
    """
    rows = []
    for probe in probes:
        prompt, answer = list(encode(probe.prompt)), list(encode(probe.continuation))
        rows.append(([start, *prompt, *answer[:-1]], [NOT_ASKED] * len(prompt) + answer))
    length = max((len(tokens) for tokens, _ in rows), default=0)
    tokens = np.full((len(rows), length), start, np.int64)
    targets = np.full((len(rows), length), NOT_ASKED, np.int64)
    for i, (row, wanted) in enumerate(rows):
        tokens[i, : len(row)], targets[i, : len(wanted)] = row, wanted
    return tokens, targets


def answer_log_prob(logits: Tensor, targets: Tensor) -> Tensor:
    """The log-probability of the asked tokens of each row, in nats, (B,); 0 where a row asks nothing.

    logits: (B, L, V), of the token at `targets` (B, L) given all before it; targets: -100 where nothing is asked. The
    sum is taken in float32 or finer.
    """
    asked = targets != NOT_ASKED
    log_p = torch.log_softmax(_asked(logits, asked), dim=-1)
    picked = log_p.gather(-1, targets[asked].unsqueeze(-1)).squeeze(-1)
    rows = torch.zeros(len(targets), dtype=picked.dtype, device=picked.device)
    return rows.index_add(0, asked.nonzero()[:, 0], picked)


def answers_correct(logits: Tensor, targets: Tensor) -> Tensor:
    """Whether the most likely token is the right one at every asked place of each row: bool (B,), True where none is.

    Arguments as `answer_log_prob`.
    """
    asked = targets != NOT_ASKED
    wrong = logits[asked].argmax(-1) != targets[asked]
    rows = torch.zeros(len(targets), dtype=torch.long, device=targets.device)
    return rows.index_add(0, asked.nonzero()[:, 0], wrong.long()) == 0


def asked_accuracy(logits: Tensor, targets: Tensor) -> tuple[int, int]:
    """(right, asked): how many asked tokens the most likely ones meet, for sums over batches. Shapes as above."""
    asked = targets != NOT_ASKED
    return int((logits[asked].argmax(-1) == targets[asked]).sum()), int(asked.sum())


def accuracy_grid(
    results: Iterable[tuple[Mapping[str, Any], float]], by: Sequence[str] = ("task", "length", "depth")
) -> list[Row]:
    """Mean and count of scores, a row for each combination of the keys `by`, sorted by them.

    results: (meta, score), meta as that of a Probe or any mapping that holds the keys (a model's name, say). A depth
    that is None stays None and comes first.
    """
    cells: dict[tuple[Any, ...], list[float]] = {}
    for meta, score in results:
        cells.setdefault(tuple(meta[key] for key in by), []).append(float(score))
    order = sorted(cells, key=lambda cell: [(value is not None, value) for value in cell])
    return [
        {
            **dict(zip(by, cell, strict=True)),
            "mean": math.fsum(cells[cell]) / len(cells[cell]),
            "count": len(cells[cell]),
        }
        for cell in order
    ]


def effective_length(rows: Iterable[Mapping[str, Any]], threshold: float) -> int | None:
    """The largest length up to which every length has a mean of at least `threshold`, None if the shortest has not.

    rows: of one task, as `accuracy_grid` gives them; depths of a length are averaged, weighted by their counts.
    """
    sums: dict[int, tuple[float, int]] = {}
    for row in rows:
        total, count = sums.get(row["length"], (0.0, 0))
        sums[row["length"]] = total + row["mean"] * row["count"], count + row["count"]
    reached = None
    for length, (total, count) in sorted(sums.items()):
        if total / count < threshold:
            break
        reached = length
    return reached


def _asked(logits: Tensor, asked: Tensor) -> Tensor:
    # only these rows: a whole (B, L, V) in float32 would be the largest tensor of the evaluation
    picked = logits[asked]
    return picked if picked.dtype == torch.float64 else picked.float()
