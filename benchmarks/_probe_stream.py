"""What long_context.py trains on: text, needles in texts, MQAR and induction heads, from a seed.

Rows of texts and rows of tokens take turns. Texts have `seq_len` bytes, a quarter source text and the others passkeys
and needles. Rows of tokens have one shorter or equal length, two thirds MQAR and the others induction heads, as many
as give the same number of tokens. Two of three steps are of tokens in the first half, one of three in the second:
recall comes before needles. Easy rows come first: lengths begin at 64 and reach seq_len after 40 % of the steps. Each
kind of target weighs the same in the loss of a step, however many of them there are. A batch is a function of (seed,
step, steps), so that every model reads the same stream whatever its speed and however many processes prepare it.
"""

from __future__ import annotations

import functools

import numpy as np
from torch.utils.data import Dataset

from seqzoo.pipelines.text.probes.generate import draw_probe
from seqzoo.pipelines.text.probes.scores import teacher_forced
from seqzoo.pipelines.text.probes.text_tasks import Probe
from seqzoo.pipelines.text.probes.token_grid import after_separator
from seqzoo.pipelines.text.probes.token_tasks import NOT_ASKED, token_batch
from seqzoo.pipelines.text.sources import standard_library

SHORTEST = 320  # bytes that any needle with its question fits
PAIRS = (4, 8, 16, 32, 64)
GROWTH = 0.4  # of the steps, until rows of tokens have all lengths
Batch = tuple[np.ndarray, np.ndarray, np.ndarray]


@functools.lru_cache(maxsize=1)
def library() -> tuple[np.ndarray, np.ndarray]:
    """Bytes of the standard library's sources, the separator before each: for training, and every tenth file."""
    files = standard_library()
    parts = [b"".join(b"\0" + p.read_bytes() for i, p in enumerate(files) if (i % 10 == 9) == held) for held in (0, 1)]
    return np.frombuffer(parts[0], np.uint8), np.frombuffer(parts[1], np.uint8)


def text_rows(
    rng: np.random.Generator, rows: int, seq_len: int, *, held_out: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and the next ones, (rows, seq_len), from any place of the sources."""
    source = library()[held_out]
    window = source[rng.integers(0, len(source) - seq_len - 1, (rows, 1)) + np.arange(seq_len + 1)].astype(np.int64)
    return window[:, :-1], window[:, 1:]


class ProbeStream(Dataset):
    """Item n is the batch of step n: tokens uint8, targets int16 (-100: none) and weights float32, all (B, L).

    steps: items. batch: rows of seq_len, a multiple of four. Raises ValueError for sizes outside these.
    """

    def __init__(self, steps: int, batch: int, seq_len: int, seed: int) -> None:
        if batch < 4 or batch % 4:
            raise ValueError(f"batch={batch} must be a multiple of 4")
        if seq_len < SHORTEST:
            raise ValueError(f"seq_len={seq_len} must be {SHORTEST} or more: a needle and its question must fit")
        self.steps, self.batch, self.seq_len, self.seed = steps, batch, seq_len, seed
        self.lengths = [2**power for power in range(6, seq_len.bit_length())]
        library()  # before worker processes start, which then share it

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        if step >= self.steps:
            raise IndexError(step)
        rng = np.random.default_rng([self.seed, step])
        parts = self._texts(rng) if self.is_text(step) else self._tokens(rng, step)
        width = max(tokens.shape[1] for tokens, _, _ in parts)
        tokens, targets, weights = zip(*(_filled(part, width) for part in parts), strict=True)
        return np.concatenate(tokens), np.concatenate(targets), np.concatenate(weights)

    def is_text(self, step: int) -> bool:
        """Whether the rows of that step are texts."""
        return (step % 3 == 0) == (2 * step < self.steps)

    def _texts(self, rng: np.random.Generator) -> list[Batch]:
        rows = self.batch // 4
        tokens, targets = text_rows(rng, rows, self.seq_len)
        probes = [
            draw_probe(rng, ("passkey", "needle")[rng.integers(2)], int(rng.integers(SHORTEST, self.seq_len + 1)))
            for _ in range(self.batch - rows)
        ]
        return [(tokens, targets, np.full(targets.shape, 1 / targets.size)), _needles(probes)]

    def _tokens(self, rng: np.random.Generator, step: int) -> list[Batch]:
        grown = 1 + int(len(self.lengths) * step / (GROWTH * self.steps))
        length = self.lengths[rng.integers(min(grown, len(self.lengths)))]
        rows = self.batch * self.seq_len // length
        fitting = [n for n in PAIRS if 4 * n < length]
        each = max(1, 2 * rows // (3 * len(fitting)))
        parts = [
            after_separator(token_batch("mqar", rng, each, length - 1, num_pairs=n, vocab_size=256)) for n in fitting
        ]
        parts.append(
            after_separator(
                token_batch("induction", rng, max(1, rows - each * len(fitting)), length - 1, vocab_size=16)
            )
        )
        return [
            (tokens, targets, (targets != NOT_ASKED) / n)
            for (tokens, targets), n in zip(parts, _totals(parts), strict=True)
        ]


def _totals(parts: list[tuple[np.ndarray, np.ndarray]]) -> list[int]:
    """By what the weights of a part are divided: all numbers of pairs weigh the same, together as induction."""
    asked = [int((targets != NOT_ASKED).sum()) for _, targets in parts]
    return [n * (len(parts) - 1) for n in asked[:-1]] + asked[-1:]


def _needles(probes: list[Probe]) -> Batch:
    """The answers weigh as much together as everything before them, which is asked too."""
    tokens, answers = teacher_forced(probes, lambda text: list(text.encode()))
    targets = np.full(answers.shape, NOT_ASKED)
    for row, probe in enumerate(probes):
        document = list((probe.prompt + probe.continuation).encode())
        targets[row, : len(document)] = document
    answer, other = answers != NOT_ASKED, (answers == NOT_ASKED) & (targets != NOT_ASKED)
    return tokens, targets, answer / answer.sum() + other / other.sum()


def _filled(part: Batch, width: int) -> Batch:
    tokens, targets, weights = part
    room = ((0, 0), (0, width - tokens.shape[1]))
    return (
        np.pad(tokens, room).astype(np.uint8),
        np.pad(targets, room, constant_values=NOT_ASKED).astype(np.int16),
        np.pad(weights, room).astype(np.float32),
    )
