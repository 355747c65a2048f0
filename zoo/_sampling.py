"""From logits to the next token: penalty, temperature, top-k, top-p, min-p, then one draw per row.

The order is that of transformers' `generate`: repetition penalty -> temperature -> top-k -> top-p -> min-p, each on
what the one before left. B rows, V tokens of the vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; the fields are the arguments of `generate`.

    Raises ValueError, with the argument and its range, for a value outside it.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (_is_number(self.temperature) and 0 <= self.temperature < math.inf):
            raise ValueError(f"temperature={self.temperature!r} must be a number of at least 0; 0 takes the likeliest")
        if self.top_k is not None and not (_is_integer(self.top_k) and self.top_k >= 1):
            raise ValueError(f"top_k={self.top_k!r} must be a positive integer, or None to keep every token")
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            raise ValueError(f"top_p={self.top_p!r} must be in (0, 1]; 1 or None keeps every token")
        if self.min_p is not None and not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            raise ValueError(f"min_p={self.min_p!r} must be in [0, 1]; 0 or None keeps every token")
        if not (_is_number(self.repetition_penalty) and 0 < self.repetition_penalty < math.inf):
            raise ValueError(
                f"repetition_penalty={self.repetition_penalty!r} must be a positive number; 1 does nothing, more makes "
                "tokens that were there less likely"
            )

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def choose(self, logits: Tensor, uniform: Tensor | None, seen: Tensor | None) -> Tensor:
        """The next tokens, int64 (B,). logits: (B, V) float32, finite. uniform: (B,) float32 in [0, 1), one draw per
        row, None when greedy. seen: bool (B, V), tokens of the row so far, None without a penalty."""
        if seen is not None:
            logits = penalized(logits, seen, self.repetition_penalty)
        if uniform is None:
            return logits.argmax(-1)
        logits = heated(logits, self.temperature)
        if self.top_k is not None:
            logits = keep_top_k(logits, self.top_k)
        if self.top_p is not None:
            logits = keep_top_p(logits, self.top_p)
        if self.min_p is not None:
            logits = keep_min_p(logits, self.min_p)
        return draw(logits, uniform)


def penalized(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Logits of the tokens in `seen`, (B, V) bool, divided by the penalty where positive, multiplied where negative.

    CTRL (arXiv:1909.05858, section 4.1) divides all; that would favour a token with a negative logit, so, as in
    transformers, those are multiplied.
    """
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


def heated(logits: Tensor, temperature: float) -> Tensor:
    """Logits over the temperature, shifted so that the largest is 0: then a small temperature overflows nothing."""
    smallest = torch.finfo(logits.dtype).tiny
    return (logits - logits.amax(-1, keepdim=True)) / max(temperature, smallest)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """-inf for all but the k largest of each row and what equals the last of them."""
    last = logits.topk(min(k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < last, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """-inf for all but the fewest tokens of highest probability that sum to p or more (nucleus, arXiv:1904.09751)."""
    if p == 1:
        return logits
    ordered, index = logits.sort(dim=-1, descending=True)
    probability = ordered.softmax(-1)
    before = probability.cumsum(-1) - probability
    before[..., 0] = 0  # the first stays whatever the rounding
    removed = torch.empty_like(before, dtype=torch.bool).scatter_(-1, index, before >= p)
    return logits.masked_fill(removed, -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """-inf for tokens less probable than p times the most probable one (arXiv:2407.01082, section 3)."""
    if p == 0:
        return logits
    # log(p_i / p_max) is a difference of logits. For p = 1 that is 0: only what equals the largest stays.
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def draw(logits: Tensor, uniform: Tensor) -> Tensor:
    """The token at which the cumulative probability passes `uniform`, (B,) in [0, 1): int64 (B,).

    One number per row, whatever the vocabulary, so that a row depends on its own generator alone.
    """
    probability = logits.softmax(-1)
    total = probability.cumsum(-1)
    index = torch.searchsorted(total, uniform.unsqueeze(-1) * total[..., -1:], right=True)
    index = index.clamp(max=logits.shape[-1] - 1)
    # A parallel sum need not grow from one token to the next; one of probability 0 must not slip in.
    possible = probability.gather(-1, index) > 0
    return torch.where(possible, index, probability.argmax(-1, keepdim=True)).squeeze(-1)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
