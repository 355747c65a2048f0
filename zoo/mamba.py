"""Mamba (arXiv:2312.00752) and Mamba-2 (arXiv:2405.21060) language models.

Blocks of one residual branch, norm -> mixer, without feed-forward; a final RMSNorm, and a head tied to the embedding.
`base` is the published 130m configuration, its vocabulary (that of GPT-NeoX) padded as there; `tiny` and `small` read
bytes.
"""

from __future__ import annotations

from typing import Any

from ._language import LanguageModel
from ._registry import register_model

_PAPER, _PAPER_2 = "arXiv:2312.00752", "arXiv:2405.21060"
_BLOCK: dict[str, Any] = {"ffn": "none", "norm": "rmsnorm", "norm_eps": 1e-5}
_TINY: dict[str, Any] = {**_BLOCK, "vocab_size": 256, "dim": 64, "depth": 4}
_SMALL: dict[str, Any] = {**_BLOCK, "vocab_size": 256, "dim": 256, "depth": 8}
_BASE: dict[str, Any] = {**_BLOCK, "dim": 768, "depth": 24}


@register_model(LanguageModel, task="text", paper=_PAPER, mixer="mamba", **_TINY)
def mamba_tiny(**options: Any) -> LanguageModel:
    """Mamba over bytes, four blocks of width 64."""
    return LanguageModel(**options)


@register_model(LanguageModel, task="text", paper=_PAPER, mixer="mamba", **_SMALL)
def mamba_small(**options: Any) -> LanguageModel:
    """Mamba over bytes, eight blocks of width 256."""
    return LanguageModel(**options)


@register_model(LanguageModel, task="text", paper=_PAPER, mixer="mamba", **_BASE, vocab_size=50280)
def mamba_base(**options: Any) -> LanguageModel:
    """Mamba as published at 130m: 24 blocks of width 768, 50280 tokens."""
    return LanguageModel(**options)


@register_model(LanguageModel, task="text", paper=_PAPER_2, mixer="mamba2", **_TINY)
def mamba2_tiny(**options: Any) -> LanguageModel:
    """Mamba-2 over bytes, four blocks of width 64."""
    return LanguageModel(**options)


@register_model(LanguageModel, task="text", paper=_PAPER_2, mixer="mamba2", **_SMALL)
def mamba2_small(**options: Any) -> LanguageModel:
    """Mamba-2 over bytes, eight blocks of width 256."""
    return LanguageModel(**options)


@register_model(LanguageModel, task="text", paper=_PAPER_2, mixer="mamba2", **_BASE, vocab_size=50288)
def mamba2_base(**options: Any) -> LanguageModel:
    """Mamba-2 as published at 130m: 24 blocks of width 768, 50288 tokens."""
    return LanguageModel(**options)
