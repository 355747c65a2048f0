"""What long_context.py trains on: rows of text, of needles in it, of MQAR and of induction heads, from a seed.

A batch is a function of (seed, step), so that every model reads the same stream whatever its speed and however many
processes prepare it. A row has `seq_len` tokens, is filled up with the separator on the right, and each kind of target
has the same weight in the loss, however many of them a batch holds.
"""

from __future__ import annotations

import functools

import numpy as np
from torch.utils.data import Dataset

from seqzoo.pipelines.text.probes.generate import draw_probe
from seqzoo.pipelines.text.probes.scores import teacher_forced
from seqzoo.pipelines.text.probes.token_grid import after_separator
from seqzoo.pipelines.text.probes.token_tasks import NOT_ASKED, token_batch
from seqzoo.pipelines.text.sources import standard_library

SHARES = {"text": 1, "needle": 3, "mqar": 3, "induction": 1}  # rows of eight
SHORTEST = 320  # bytes that any needle with its question fits
PAIRS = (4, 8, 16, 32, 64)
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

    steps: items. batch: rows, a multiple of eight.
    """

    def __init__(self, steps: int, batch: int, seq_len: int, seed: int) -> None:
        if batch % sum(SHARES.values()):
            raise ValueError(f"batch={batch} must be a multiple of {sum(SHARES.values())}")
        if seq_len < SHORTEST:
            raise ValueError(f"seq_len={seq_len} must be {SHORTEST} or more: a needle and its question must fit")
        self.steps, self.seq_len, self.seed = steps, seq_len, seed
        self.rows = {kind: share * batch // sum(SHARES.values()) for kind, share in SHARES.items()}
        library()  # before worker processes start, which then share it

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, step: int) -> Batch:
        if step >= self.steps:
            raise IndexError(step)
        rng = np.random.default_rng([self.seed, step])
        tokens, targets, weights = zip(*(_filled(part, self.seq_len) for part in self._parts(rng)), strict=True)
        return np.concatenate(tokens), np.concatenate(targets), np.concatenate(weights)

    def _parts(self, rng: np.random.Generator) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """(tokens, targets, weights) of each kind and length."""
        tokens, targets = text_rows(rng, self.rows["text"], self.seq_len)
        parts = [(tokens, targets, np.full(targets.shape, 1 / targets.size))]
        needles = []
        for _ in range(self.rows["needle"]):
            task = ("passkey", "needle")[rng.integers(2)]
            needles.append(draw_probe(rng, task, int(rng.integers(SHORTEST, self.seq_len + 1))))
        parts.append(_needles(needles))
        for kind in ("mqar", "induction"):
            drawn = [self._token_row(rng, kind) for _ in range(self.rows[kind])]
            asked = sum(int((wanted != NOT_ASKED).sum()) for _, wanted in drawn)
            parts += [(*row, np.where(row[1] != NOT_ASKED, 1 / asked, 0.0)) for row in drawn]
        return parts

    def _token_row(self, rng: np.random.Generator, kind: str) -> tuple[np.ndarray, np.ndarray]:
        """At a power of two from 64 to seq_len, with any number of PAIRS that fits, all equally likely."""
        length = 2 ** int(rng.integers(6, self.seq_len.bit_length()))
        if kind == "induction":
            return after_separator(token_batch("induction", rng, 1, length - 1, vocab_size=16))
        fitting = [n for n in PAIRS if 4 * n < length]
        pairs = fitting[rng.integers(len(fitting))]
        return after_separator(token_batch("mqar", rng, 1, length - 1, num_pairs=pairs, vocab_size=256))


def _needles(probes: list) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The answers weigh as much together as everything before them, which is asked too."""
    tokens, answers = teacher_forced(probes, lambda text: list(text.encode()))
    targets = np.full(answers.shape, NOT_ASKED)
    for row, probe in enumerate(probes):
        document = list((probe.prompt + probe.continuation).encode())
        targets[row, : len(document)] = document
    answer, other = answers != NOT_ASKED, (answers == NOT_ASKED) & (targets != NOT_ASKED)
    return tokens, targets, answer / answer.sum() + other / other.sum()


def _filled(part: tuple[np.ndarray, np.ndarray, np.ndarray], seq_len: int) -> Batch:
    tokens, targets, weights = part
    room = ((0, 0), (0, seq_len - tokens.shape[1]))
    return (
        np.pad(tokens, room).astype(np.uint8),
        np.pad(targets, room, constant_values=NOT_ASKED).astype(np.int16),
        np.pad(weights, room).astype(np.float32),
    )
