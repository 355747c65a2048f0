"""Masked language modelling (BERT, arXiv:1810.04805, section 3.1) for models that see both sides."""

from __future__ import annotations

import torch
from torch import Tensor

from .rows import IGNORED


def mask_tokens(
    tokens: Tensor,
    *,
    share: float,
    mask_token: int,
    vocab_size: int,
    real: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Of `share` of the tokens, 80 % become the mask token, 10 % a random one, 10 % stay; those are asked.

    tokens: int64 (B, L). real: bool (B, L), True for a real token. Returns (inputs, targets) of that shape.
    """
    draw, kind = (torch.rand(tokens.shape, generator=generator).to(tokens.device) for _ in range(2))
    chosen = draw < share
    if real is not None:
        chosen &= real
    other = torch.randint(0, vocab_size, tokens.shape, generator=generator).to(tokens.device)
    inputs = torch.where(chosen & (kind < 0.8), mask_token, tokens)
    inputs = torch.where(chosen & (kind >= 0.9), other, inputs)
    return inputs, torch.where(chosen, tokens, IGNORED)
