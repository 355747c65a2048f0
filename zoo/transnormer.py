"""TransNormerLLM (arXiv:2307.14995): decayed linear attention, gated feed-forwards, norms without gains.

Blocks of `lightning` (silu on q and k, LRPE in the first block alone, SimpleRMSNorm, a linear output gate, the paper's
decay, longer in deeper blocks) and SGLU. The published models read a tokenizer's vocabulary; ours read bytes. `base`
has the published layout of the 385m model, 24 blocks of width 1024 with heads of 128; that its feed-forward width is
the published one was not verified.
"""

from __future__ import annotations

from typing import Any

from ._language import LanguageModel
from ._registry import register_sizes

SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "tiny": ("TransNormerLLM over bytes, four blocks of width 64.", {"dim": 64, "depth": 4, "num_heads": 4}),
    "small": ("TransNormerLLM over bytes, eight blocks of width 256.", {"dim": 256, "depth": 8, "num_heads": 4}),
    "base": ("TransNormerLLM over bytes, 24 blocks of width 1024.", {"dim": 1024, "depth": 24, "num_heads": 8}),
}


class TransNormer(LanguageModel):
    """A `LanguageModel` whose blocks differ in their decay and position.

    vocab_size, dim, depth, tie_embeddings, proj_drop, drop_path: as there. num_heads: of the attention. mlp_ratio: of
    the SGLU. schedule: of the decay, "paper", "alibi" (the public module) or "minimax".
    """

    mixers = ("lightning",)

    def __init__(
        self,
        *,
        vocab_size: int = 256,
        dim: int = 64,
        depth: int = 4,
        num_heads: int = 4,
        mlp_ratio: float = 8 / 3,
        schedule: str = "paper",
        tie_embeddings: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        common: dict[str, Any] = {
            "name": "lightning",
            "num_heads": num_heads,
            "schedule": schedule,
            "num_layers": depth,
            "norm": "srmsnorm",
            "gate": "linear",
            "value_act": False,
        }
        super().__init__(
            vocab_size=vocab_size,
            mixer=[{**common, "layer_index": i, "lrpe": i == 0} for i in range(depth)],
            dim=dim,
            depth=depth,
            ffn="sglu",
            mlp_ratio=mlp_ratio,
            norm="srmsnorm",
            tie_embeddings=tie_embeddings,
            proj_drop=proj_drop,
            drop_path=drop_path,
        )


register_sizes("transnormer", TransNormer, SIZES, module=__name__, task="text", paper="arXiv:2307.14995")
