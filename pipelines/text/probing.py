"""Long-context probes of a trained language model: can it give back what stood far before?"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from ...zoo import LanguageModel
from .probes.generate import probe_grid
from .probes.heatmap import plot_accuracy_grid
from .probes.scores import accuracy_grid, answer_log_prob, answers_correct, teacher_forced
from .probes.text_tasks import Probe, find_task
from .tokenizer import Tokenizer

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
_TOKENS = 1 << 14  # of a batch


def probes_of(
    tasks: Sequence[str], lengths: Sequence[int], samples: int, tokenizer: Tokenizer, seed: int
) -> Iterator[Probe]:
    """`samples` probes for each task, length (in tokens) and, where one needle is asked, depth of DEPTHS."""

    def count(text: str) -> int:
        return len(tokenizer.encode(text.encode("utf-8", "surrogateescape")))

    for task in tasks:
        depths = DEPTHS if find_task(task).one_needle else None
        number = samples if depths else samples * len(DEPTHS)
        yield from probe_grid(task, sorted(lengths), depths, samples=number, seed=seed, count_tokens=count)


@torch.no_grad()
def run_probes(
    net: LanguageModel, tokenizer: Tokenizer, tasks: Sequence[str], lengths: Sequence[int], *, samples: int, seed: int
) -> list[dict[str, Any]]:
    """A row per task, length and depth: mean and count of answers that are right to the last token, when the model
    reads the right answer (teacher-forced), and `bits`, the mean information of an answer to the model."""
    device = next(net.parameters()).device
    right: list[tuple[dict[str, Any], float]] = []
    bits: list[tuple[dict[str, Any], float]] = []

    def encode(text: str) -> list[int]:
        return tokenizer.encode(text.encode("utf-8", "surrogateescape")).tolist()

    probes = sorted(probes_of(tasks, lengths, samples, tokenizer, seed), key=lambda p: p.meta["length"])
    size = max(1, _TOKENS // max(lengths))
    for first in range(0, len(probes), size):
        group = probes[first : first + size]
        arrays = teacher_forced(group, encode, start=tokenizer.separator)
        tokens, targets = (torch.from_numpy(array).to(device) for array in arrays)
        logits = net(tokens).y  # what is filled up on the right comes after everything that is asked
        hits, logs = answers_correct(logits, targets).tolist(), answer_log_prob(logits, targets).tolist()
        right += [(p.meta, float(h)) for p, h in zip(group, hits, strict=True)]
        bits += [(p.meta, -v / 0.6931471805599453) for p, v in zip(group, logs, strict=True)]
    information = accuracy_grid(bits)
    return [{**row, "bits": other["mean"]} for row, other in zip(accuracy_grid(right), information, strict=True)]


def draw_probes(rows: Sequence[dict[str, Any]], path: Path) -> Path | None:
    """Heat maps of the tasks with a depth; nothing where there are none."""
    if all(row["depth"] is None for row in rows):
        return None
    return plot_accuracy_grid(rows, path, unit="tokens", title="answers right to the last token")
