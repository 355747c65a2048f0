"""BERT: a bidirectional encoder of tokens (arXiv:1810.04805, section 3), with the head of its masked language model.

    x = norm(word + position + type)        post-norm blocks: x <- norm(x + attention(x)), x <- norm(x + ffn(x))
    logits = table norm(gelu(W x + b)) + c, the table that of the words

`base` is the published configuration, its vocabulary that of bert-base-uncased; `tiny` and `small` read bytes. MiniLM
(arXiv:2002.10957) is a BERT of another size: `bert_base` with dim=384, depth=6. Compared with transformers' classes:
`convert.bert`. Deviations: dropout stands after the activation of the feed-forward too, and pads on the left do not
shift positions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks.backbone import BackboneState, token_positions
from ..blocks.layers.embeddings import TokenEmbedding
from ..blocks.layers.ffn import FFNChoice
from ..blocks.layers.norm import LayerNorm
from ..blocks.layers.positions import LearnedPosition
from ..blocks.registry import did_you_mean
from ..blocks.sequence_model import SequenceModel, SequenceOutput, SequenceState
from ._language import LanguageModel
from ._registry import register_sizes

HEADS = ("masked", "none", "classes")


class BertEmbedding(nn.Module):
    """norm(word + position + type) and dropout: tokens int64 (B, L), or these and their types, -> (B, L, D).

    num_tokens, max_len, num_types: rows of the three tables, which start from N(0, std^2). Without types all are 0.
    """

    def __init__(
        self,
        num_tokens: int,
        dim: int,
        *,
        max_len: int,
        num_types: int,
        norm_eps: float,
        std: float,
        drop: float,
    ) -> None:
        super().__init__()
        if num_types < 0:
            raise ValueError(f"num_types={num_types} must not be negative; 0 for no types")
        self.dim, self.num_types = dim, num_types
        self.word = TokenEmbedding(num_tokens, dim, std=std)
        self.position = LearnedPosition(dim, max_len)
        self.token_type = nn.Embedding(num_types, dim) if num_types else None
        self.norm = LayerNorm(dim, norm_eps)
        self.drop = nn.Dropout(drop)
        if self.token_type is not None:
            nn.init.normal_(self.token_type.weight, std=std)

    def init_state(self, batch_size: int, *, device: torch.device | str | None = None) -> Tensor:
        """Real tokens seen so far of each row, (B,) int64: the position of the next one."""
        return torch.zeros(batch_size, dtype=torch.int64, device=device)

    def read(
        self,
        inputs: Tensor | tuple[Tensor, Tensor],
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """The vectors and the next state. mask, cu_seqlens: as `Mixer.forward`."""
        tokens, types = inputs if isinstance(inputs, tuple) else (inputs, None)
        x = self.word(tokens)
        batch, length = tokens.shape
        positions = token_positions(batch, length, mask, cu_seqlens, state, tokens.device)
        x = x + self.position(positions, dtype=x.dtype)
        if self.token_type is not None:
            x = x + self.token_type(torch.zeros_like(tokens) if types is None else types)
        elif types is not None:
            raise ValueError("token_types were given to a model with num_types=0")
        if state is not None:
            state = state + (length if mask is None else mask.sum(1))
        return self.drop(self.norm(x)), state


class MaskedHead(nn.Module):
    """Logits of hidden tokens, (B, L, D) -> (B, L, num_tokens): table norm(gelu(W x + b)) + c.

    tied: the embedding whose table is the weight, None for one of its own. approximate: form of GELU, see `GeluMLP`.
    """

    def __init__(
        self, dim: int, num_tokens: int, *, tied: nn.Embedding | None, norm_eps: float, std: float, approximate: str
    ) -> None:
        super().__init__()
        self.dim, self.approximate = dim, approximate
        self.transform = nn.Linear(dim, dim)
        self.norm = LayerNorm(dim, norm_eps)
        self.proj = nn.Linear(dim, num_tokens, bias=False) if tied is None else None
        self.bias = nn.Parameter(torch.zeros(num_tokens))
        self._table = (tied if self.proj is None else self.proj,)  # in a tuple: an embedding is no submodule of this
        for layer in (self.transform, self.proj):
            if layer is not None:
                nn.init.normal_(layer.weight, std=std)
        nn.init.zeros_(self.transform.bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(F.gelu(self.transform(x), approximate=self.approximate))
        return F.linear(x, self._table[0].weight, self.bias)  # type: ignore[union-attr]


class ClassHead(nn.Module):
    """Logits of a text, (B, L, D) -> (B, num_classes): W tanh(P x_1 + b) + c, x_1 the state of the first token."""

    def __init__(self, dim: int, num_classes: int, *, drop: float, std: float) -> None:
        super().__init__()
        if num_classes < 1:
            raise ValueError(f"num_classes={num_classes} must be positive; head='none' gives features")
        self.dim = dim
        self.pooler, self.proj = nn.Linear(dim, dim), nn.Linear(dim, num_classes)
        self.drop = nn.Dropout(drop)
        for layer in (self.pooler, self.proj):
            nn.init.normal_(layer.weight, std=std)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(self.drop(torch.tanh(self.pooler(x[:, 0]))))


class BertModel(LanguageModel):
    """Tokens (B, L) to logits of the hidden ones (B, L, vocab_size), to features, or to classes.

    vocab_size, dim, depth, num_heads, mlp_ratio, ffn, norm_eps, causal, proj_drop, drop_path: as `LanguageModel` has
    them, over softmax attention; causal is False as published. max_len, num_types: rows of the position and of the type
    table. head: "masked", "none" (y are the states of the last block, (B, L, dim)) or "classes" (logits (B,
    num_classes) from the first token). tie_embeddings: the masked head reuses the table of the words. attn_drop,
    embedding_drop: dropouts of the attention weights and of the embedding. embedding_std: of the normal start of tables
    and heads. Raises ValueError for another head.
    """

    classifier = "model.head"
    mixers = ("softmax",)

    def __init__(
        self,
        *,
        vocab_size: int = 30522,
        dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        ffn: FFNChoice = "gelu",
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-12,
        max_len: int = 512,
        num_types: int = 2,
        causal: bool = False,
        head: str = "masked",
        num_classes: int = 2,
        tie_embeddings: bool = True,
        embedding_std: float = 0.02,
        embedding_drop: float = 0.0,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        if head not in HEADS:
            raise ValueError(f"head={head!r} is not a choice.{did_you_mean(head, HEADS)}")
        super().__init__(
            vocab_size=vocab_size,
            mixer={"name": "softmax", "num_heads": num_heads, "attn_drop": attn_drop},
            dim=dim,
            depth=depth,
            ffn=ffn,
            mlp_ratio=mlp_ratio,
            norm="layernorm",
            norm_eps=norm_eps,
            prenorm=False,
            causal=causal,
            rescale_residual=False,
            proj_drop=proj_drop,
            drop_path=drop_path,
        )
        embedding = BertEmbedding(
            vocab_size,
            dim,
            max_len=max_len,
            num_types=num_types,
            norm_eps=norm_eps,
            std=embedding_std,
            drop=embedding_drop,
        )
        part: nn.Module | None = None
        if head == "masked":
            part = MaskedHead(
                dim,
                vocab_size,
                tied=embedding.word if tie_embeddings else None,
                norm_eps=norm_eps,
                std=embedding_std,
                approximate=ffn.get("approximate", "none") if isinstance(ffn, dict) else "none",
            )
        elif head == "classes":
            part = ClassHead(dim, num_classes, drop=proj_drop, std=embedding_std)
        self.model = SequenceModel(embedding, self.backbone, part)

    def forward(
        self,
        tokens: Tensor,
        *,
        mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        state: BackboneState | SequenceState | None = None,
        token_types: Tensor | None = None,
    ) -> SequenceOutput:
        """As `LanguageModel.forward`. token_types: int64 (B, L), the part of the text that a token is of, else 0."""
        inputs: Any = tokens if token_types is None else (tokens, token_types)
        return self.model(inputs, mask=mask, cu_seqlens=cu_seqlens, state=state)

    @property
    def is_classifier(self) -> bool:
        return isinstance(self.model.head, ClassHead)

    def _run_trunk(self, *args: Any, **arguments: Any) -> SequenceOutput:
        return self(*args, **arguments)


_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("BERT over bytes, four blocks of width 64.", {"vocab_size": 256, "dim": 64, "depth": 4, "num_heads": 4}),
    "small": (
        "BERT over bytes, eight blocks of width 256.",
        {"vocab_size": 256, "dim": 256, "depth": 8, "num_heads": 4},
    ),
    "base": ("BERT as published: twelve blocks of width 768, 30522 tokens.", {"dim": 768, "depth": 12}),
}
register_sizes("bert", BertModel, _SIZES, module=__name__, task="text", paper="arXiv:1810.04805")
