"""Causal language models over bytes, one family per mixer: pre-norm blocks of a mixer and a SwiGLU feed-forward.

The frame (RMSNorm, SwiGLU, tied embedding) is that of Llama (arXiv:2302.13971) for all, so that families differ in
their mixer alone; the paper named for a family is its mixer's. Sizes are ours. Families with a frame of their own have
their own files: `mamba`, `mega`, `transnormer`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..blocks.backbone import MixerChoice
from ._language import LanguageModel
from ._registry import register_sizes

Mixers = MixerChoice | Sequence[MixerChoice]

SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "tiny": ("four blocks of width 64", {"dim": 64, "depth": 4}),
    "small": ("eight blocks of width 256", {"dim": 256, "depth": 8}),
    "base": ("twelve blocks of width 768", {"dim": 768, "depth": 12}),
}


def _family(family: str, what: str, paper: str, mixers: Mapping[str, Mixers], **shared: Any) -> None:
    """Register the three sizes of a family; mixers: what mixes, by size."""
    sizes = {
        size: (f"{what}, over bytes, {shape}.", {**options, "mixer": mixers[size]})
        for size, (shape, options) in SIZES.items()
    }
    register_sizes(family, LanguageModel, sizes, module=__name__, task="text", paper=paper, **shared)


def _by_size(name: str, tiny: dict[str, Any], small: dict[str, Any], base: dict[str, Any]) -> dict[str, Mixers]:
    return {"tiny": {"name": name, **tiny}, "small": {"name": name, **small}, "base": {"name": name, **base}}


def _heads(name: str, **options: Any) -> dict[str, Mixers]:
    """4, 4 and 12 heads."""
    return _by_size(name, *({"num_heads": number, **options} for number in (4, 4, 12)))


def _hybrid() -> dict[str, Mixers]:
    """Three Mamba-2 blocks, then one of attention within a window."""
    mixers: dict[str, Mixers] = {}
    for size, heads, window in (("tiny", 4, 128), ("small", 4, 512), ("base", 12, 2048)):
        head_dim = SIZES[size][1]["dim"] // heads
        recurrent = {"name": "mamba2", "d_state": 64, "head_dim": head_dim}
        local = {"name": "softmax", "num_heads": heads, "position": "rope", "window_size": window}
        mixers[size] = [recurrent, recurrent, recurrent, local]
    return mixers


_family("language", "Any mixer (`mixer`)", "arXiv:2302.13971", _by_size("softmax", {}, {}, {}))
_family(
    "transformer", "Softmax attention with rotary positions", "arXiv:2302.13971", _heads("softmax", position="rope")
)
_family("linear", "Linear attention (elu + 1)", "arXiv:2006.16236", _heads("linear"))
_family("gla", "Gated linear attention", "arXiv:2312.06635", _heads("gla"))
_family("s4d", "Diagonal state space", "arXiv:2206.11893", _by_size("s4d", {}, {}, {}))
_family(
    "agent",
    "Learned agents with a running softmax (the causal form is ours)",
    "arXiv:2312.08874",
    _heads("agent"),
)
_family(
    "bi_level_routing",
    "Per-token routing to past blocks (the causal form is ours)",
    "arXiv:2303.08810",
    _heads("bi_level_routing"),
    position="sinusoidal",
)
_family(
    "tcnca",
    "Dilated convolutions and gated chunk attention",
    "arXiv:2312.05605",
    _by_size(
        "tcnca",
        {"kernel_size": 9, "dilation_factor": 4, "chunk_size": 64},
        {"kernel_size": 17, "dilation_factor": 4, "chunk_size": 128},
        {"kernel_size": 17, "dilation_factor": 8, "chunk_size": 512},
    ),
)
_family(
    "long_vq",
    "Quantised global attention with a window",
    "arXiv:2404.11163",
    _by_size(
        "long_vq",
        {"codebook_size": 128, "chunk_size": 64},
        {"codebook_size": 256, "chunk_size": 128},
        {"codebook_size": 512, "chunk_size": 256},
    ),
)
_family("hybrid", "Three Mamba-2 blocks to one of attention in a window", "arXiv:2405.21060", _hybrid())
# ProbSparse attention has no causal form: its queries are chosen among all positions.
_family(
    "prob_sparse",
    "ProbSparse attention, for masked language modelling",
    "arXiv:2012.07436",
    _heads("prob_sparse"),
    causal=False,
    position="sinusoidal",
)
