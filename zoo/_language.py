"""Language models over any mixer: token embedding -> `Backbone` -> norm -> head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.backbone import Backbone, BackboneState, MixerChoice
from ..blocks.layers.embeddings import TokenEmbedding
from ..blocks.layers.ffn import FFNChoice
from ..blocks.layers.heads import LanguageHead
from ..blocks.layers.ngrams import NGramEmbedding
from ..blocks.sequence_model import SequenceModel, SequenceOutput, SequenceState
from ._features import ZooModel


class LanguageModel(ZooModel):
    """Tokens (B, L) to the logits of the next token, (B, L, vocab_size).

    vocab_size: tokens, 256 for bytes. dim, depth, mixer, ffn, mlp_ratio, norm, norm_eps, prenorm, parallel, position,
    max_len, proj_drop, drop_path: the backbone, as `Backbone` takes them. causal: False lets every position see all
    others, for masked language modelling; such a model carries no state. tie_embeddings: the head reuses the
    embedding's table. embedding_std: of the normal start of embedding and head. embedding_scale, embedding_drop: see
    `TokenEmbedding`. ngrams: orders of hashed n-grams that are looked up beside each token, none by default;
    ngram_size, ngram_width: rows of a table and their width, see `NGramEmbedding`. rescale_residual: output projections
    of mixers and feed-forwards start smaller by the root of the number of residual branches (GPT-2, and Mamba, whose
    blocks have one branch).

    config: set by `create_model`.
    """

    heads = ("model.head.", "model.embedding.")  # another vocabulary needs both

    def __init__(
        self,
        *,
        vocab_size: int = 256,
        mixer: MixerChoice | Sequence[MixerChoice] = "softmax",
        dim: int = 64,
        depth: int = 2,
        ffn: FFNChoice = "swiglu",
        mlp_ratio: float | None = None,
        norm: str = "rmsnorm",
        norm_eps: float | None = None,
        prenorm: bool = True,
        parallel: bool = False,
        position: str = "none",
        max_len: int | None = None,
        causal: bool = True,
        tie_embeddings: bool = True,
        embedding_std: float = 0.02,
        embedding_scale: float = 1.0,
        embedding_drop: float = 0.0,
        ngrams: Sequence[int] = (),
        ngram_size: int = 1 << 15,
        ngram_width: int = 32,
        rescale_residual: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if not isinstance(vocab_size, int) or vocab_size < 1:
            raise ValueError(f"vocab_size={vocab_size!r} must be a positive integer")
        self.vocab_size = vocab_size
        table: dict[str, Any] = {"std": embedding_std, "scale": embedding_scale, "drop": embedding_drop}
        embedding = (
            NGramEmbedding(vocab_size, dim, orders=ngrams, size=ngram_size, width=ngram_width, **table)
            if ngrams
            else TokenEmbedding(vocab_size, dim, **table)
        )
        backbone = Backbone(
            dim,
            depth,
            mixer=mixer,
            ffn=ffn,
            mlp_ratio=mlp_ratio,
            norm=norm,
            norm_eps=norm_eps,
            prenorm=prenorm,
            parallel=parallel,
            position=position,
            max_len=max_len,
            causal=causal,
            proj_drop=proj_drop,
            drop_path=drop_path,
            final_norm=prenorm,
        )
        if rescale_residual:
            _rescale_residual(backbone)
        head = LanguageHead(dim, vocab_size, tied=embedding if tie_embeddings else None, std=embedding_std)
        self.model = SequenceModel(embedding, backbone, head)

    @property
    def backbone(self) -> Backbone:
        return self.model.backbone

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: BackboneState | SequenceState | None = None,
    ) -> SequenceOutput:
        """tokens: int64 (B, L). mask, cu_seqlens, state: as `Mixer.forward`. Returns y, the logits (B, L, vocab_size),
        the carried state when one was passed in, and auxiliary losses by name."""
        return self.model(tokens, mask=mask, cu_seqlens=cu_seqlens, state=state)

    def _run_trunk(self, tokens: Tensor, **arguments: Any) -> Any:
        return self.model.forward_features(tokens, **arguments)

    @property
    def input_spec(self) -> dict[str, Any]:
        return {"kind": "tokens", "vocab_size": self.vocab_size, "causal": self.backbone.causal}

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor]:
        """Tokens (B, 12)."""
        return (torch.randint(self.vocab_size, (batch_size, 12), generator=torch.Generator().manual_seed(0)),)

    def init_state(self, batch_size: int, **arguments: Any) -> BackboneState | SequenceState:
        """The state before the first token; arguments as `Mixer.init_state`. Raises ValueError where there is none."""
        return self.model.init_state(batch_size, **arguments)

    def state_size(self, length: int) -> int:
        """Floating-point elements of state per sequence after `length` tokens."""
        return self.backbone.state_size(length)


def _rescale_residual(backbone: Backbone) -> None:
    """Divide the weights that end a residual branch by the root of the number of branches."""
    ends = [
        getattr(part, name).weight
        for block in backbone.blocks
        for part, name in ((block.mixer, "out_proj"), (block.cross_mixer, "out_proj"), (block.ffn, "down_proj"))
        if isinstance(getattr(part, name, None), nn.Linear)
    ]
    branches = sum(part is not None for b in backbone.blocks for part in (b.mixer, b.cross_mixer, b.ffn))
    with torch.no_grad():
        for weight in ends:
            weight.mul_(branches**-0.5)
