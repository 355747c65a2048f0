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
    place: Tensor | None = None,
    draw: int = 0,
) -> tuple[Tensor, Tensor]:
    """Of `share` of the tokens, 80 % become the mask token, 10 % a random one, 10 % stay; those are asked.

    tokens: int64 (B, L). real: bool (B, L), True for a real token. place: int64 (B, L), numbers of the tokens in their
    corpus: the choice then follows from them and from `draw` alone, whatever the batch. Returns (inputs, targets) of
    that shape.
    """
    if place is None:
        draws = [torch.rand(tokens.shape, generator=generator).to(tokens.device) for _ in range(3)]
    else:
        place = place ^ _mixed(torch.tensor(draw)).to(place.device) if draw else place
        draws = [_uniform(place, salt) for salt in range(3)]
    asked, kind, which = draws
    chosen = asked < share
    if real is not None:
        chosen &= real
    other = (which * vocab_size).long().clamp(max=vocab_size - 1)
    inputs = torch.where(chosen & (kind < 0.8), mask_token, tokens)
    inputs = torch.where(chosen & (kind >= 0.9), other, inputs)
    return inputs, torch.where(chosen, tokens, IGNORED)


def _uniform(number: Tensor, salt: int) -> Tensor:
    """A number in [0, 1), float64, for each int64: SplitMix64 (doi:10.1145/2660193.2660195, figure 17)."""
    return _shifted(_mixed(number * 3 + salt), 11).double() * 2.0**-53


def _mixed(x: Tensor) -> Tensor:
    x = (x + 1) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ _shifted(x, 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ _shifted(x, 27)) * _signed(0x94D049BB133111EB)
    return x ^ _shifted(x, 31)


def _signed(number: int) -> int:
    return number - (1 << 64)


def _shifted(x: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
