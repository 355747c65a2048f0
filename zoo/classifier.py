"""Classifiers of long sequences over any mixer: tokens or pixels -> `Backbone` -> pooling -> logits.

The frame is that of Long Range Arena (arXiv:2011.04006): an encoder, a pooled vector, a small head; for pairs of
documents one encoder reads both (two towers). Sizes are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.backbone import Backbone, MixerChoice
from ..blocks.layers.embeddings import TokenEmbedding
from ..blocks.registry import did_you_mean
from ..blocks.sequence_model import SequenceOutput
from ._features import ZooModel
from ._registry import register_sizes

POOLINGS = ("mean", "last", "max")
INPUTS = ("tokens", "values")


class ValueEmbedding(nn.Module):
    """Tokens as numbers: x -> w (x / 255 - mean) / std + b, int64 (B, L) -> (B, L, D).

    w starts from N(0, 1), b from N(0, 0.1). For pixels, whose brightness is a quantity and not a name (MEGA's embedding
    of grey pixels, arXiv:2209.10655).
    """

    def __init__(self, dim: int, *, mean: float = 0.5, std: float = 0.5, drop: float = 0.0) -> None:
        super().__init__()
        if not std > 0:
            raise ValueError(f"value_std={std} must be positive")
        self.dim, self.mean, self.std = dim, mean, std
        self.proj = nn.Linear(1, dim)
        self.drop = nn.Dropout(drop)
        nn.init.normal_(self.proj.weight)
        nn.init.normal_(self.proj.bias, std=0.1)

    def forward(self, tokens: Tensor) -> Tensor:
        values = (tokens.to(self.proj.weight.dtype) / 255 - self.mean) / self.std
        return self.drop(self.proj(values.unsqueeze(-1)))


def pool(x: Tensor, mask: Tensor | None, how: str) -> Tensor:
    """One vector of each row, (B, L, D) -> (B, D): the mean, the last or the largest over its real tokens.

    mask: bool (B, L), True = real token, on either side of the pads; None: all are. A row without any is 0.
    """
    if mask is None:
        return x.mean(1) if how == "mean" else x[:, -1] if how == "last" else x.amax(1)
    real = mask.unsqueeze(-1)
    if how == "mean":
        return torch.where(real, x, 0).sum(1) / mask.sum(1, keepdim=True).clamp_min(1)
    if how == "last":
        # the last place that is real: argmax gives the first of equals, so the places are numbered
        place = (mask * torch.arange(1, x.shape[1] + 1, device=x.device)).argmax(1)
        return torch.where(mask.any(1, keepdim=True), x[torch.arange(len(x), device=x.device), place], 0)
    return torch.where(mask.any(1, keepdim=True), torch.where(real, x, -torch.inf).amax(1), 0)


class SequenceClassifier(ZooModel):
    """Documents (B, L), or pairs of them (B, 2, L), to logits (B, num_classes).

    num_classes; vocab_size: tokens, 256 for bytes. mixer, dim, depth, ffn, mlp_ratio, norm, norm_eps, prenorm,
    position, max_len, proj_drop, drop_path: the backbone, as `Backbone` takes them. causal: every position sees the
    past only; then take pooling="last". pooling: "mean", "last" or "max" over the real tokens. inputs: "tokens" looks
    them up, "values" reads them as numbers 0 .. 255, normalised by value_mean and value_std. towers: 2 reads pairs with
    one encoder; the head gets [x1, x2, x1 * x2, x1 - x2] (arXiv:2111.00396). head_dim: width of the head's hidden layer
    (ReLU); None: none with one tower, dim with two. embedding_std: of the normal start of the table. embedding_drop,
    head_drop: dropouts.

    config: set by `create_model`.
    """

    def __init__(
        self,
        *,
        num_classes: int = 2,
        vocab_size: int = 256,
        mixer: MixerChoice | Sequence[MixerChoice] = "softmax",
        dim: int = 64,
        depth: int = 2,
        ffn: str | Callable[..., nn.Module] | None = "gelu",
        mlp_ratio: float | None = None,
        norm: str = "layernorm",
        norm_eps: float | None = None,
        prenorm: bool = True,
        position: str = "sinusoidal",
        max_len: int | None = None,
        causal: bool = False,
        pooling: str = "mean",
        inputs: str = "tokens",
        value_mean: float = 0.5,
        value_std: float = 0.5,
        towers: int = 1,
        head_dim: int | None = None,
        embedding_std: float = 1.0,
        embedding_drop: float = 0.0,
        head_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        for name, value in (("num_classes", num_classes), ("vocab_size", vocab_size)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        for name, choice, known in (("pooling", pooling, POOLINGS), ("inputs", inputs, INPUTS)):
            if choice not in known:
                raise ValueError(f"{name}={choice!r} is not a choice.{did_you_mean(choice, known)}")
        if towers not in (1, 2):
            raise ValueError(f"towers={towers!r} must be 1 (documents) or 2 (pairs of documents)")
        self.num_classes, self.vocab_size, self.pooling, self.towers = num_classes, vocab_size, pooling, towers
        self.embedding: nn.Module = (
            TokenEmbedding(vocab_size, dim, std=embedding_std, drop=embedding_drop)
            if inputs == "tokens"
            else ValueEmbedding(dim, mean=value_mean, std=value_std, drop=embedding_drop)
        )
        self.backbone = Backbone(
            dim,
            depth,
            mixer=mixer,
            ffn=ffn,
            mlp_ratio=mlp_ratio,
            norm=norm,
            norm_eps=norm_eps,
            prenorm=prenorm,
            position=position,
            max_len=max_len,
            causal=causal,
            proj_drop=proj_drop,
            drop_path=drop_path,
            final_norm=prenorm,
        )
        width = dim if towers == 1 else 4 * dim
        hidden = head_dim or (None if towers == 1 else dim)
        layers: list[nn.Module] = [nn.Dropout(head_drop)]
        if hidden is not None:
            layers += [nn.Linear(width, hidden), nn.ReLU(), nn.Dropout(head_drop)]
            width = hidden
        self.head = nn.Sequential(*layers, nn.Linear(width, num_classes))

    def _run_trunk(self, tokens: Tensor, *, mask: Tensor | None = None) -> SequenceOutput:
        return self.embed(tokens, mask=mask)

    @property
    def input_spec(self) -> dict[str, Any]:
        return {"kind": "tokens", "vocab_size": self.vocab_size, "towers": self.towers}

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor]:
        """Tokens (B, 12), or (B, 2, 12) with two towers."""
        shape = (batch_size, 12) if self.towers == 1 else (batch_size, 2, 12)
        return (torch.randint(self.vocab_size, shape, generator=torch.Generator().manual_seed(0)),)

    def embed(self, tokens: Tensor, *, mask: Tensor | None = None) -> SequenceOutput:
        """The pooled vectors, (B, D) or (B, 2, D), in y, and the auxiliary losses by name."""
        pairs = self.towers == 2
        if tokens.dim() != 1 + self.towers or (pairs and tokens.shape[1] != 2):
            expected = "(B, 2, L)" if pairs else "(B, L)"
            raise ValueError(f"tokens have shape {tuple(tokens.shape)}, expected {expected} with towers={self.towers}")
        if mask is not None and mask.shape != tokens.shape:
            raise ValueError(f"mask has shape {tuple(mask.shape)}, tokens {tuple(tokens.shape)}")
        if pairs:  # both documents in one batch of the encoder, whose codebooks and norms see both
            tokens, mask = tokens.flatten(0, 1), None if mask is None else mask.flatten(0, 1)
        out = self.backbone(self.embedding(tokens), mask=mask)
        # a mean of thousands of terms: never in half precision
        x = pool(out.y.float() if out.y.dtype in (torch.bfloat16, torch.float16) else out.y, mask, self.pooling)
        return SequenceOutput(x.unflatten(0, (-1, 2)) if pairs else x, None, out.aux)

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None) -> SequenceOutput:
        """tokens: int64 (B, L), or (B, 2, L) with two towers. mask: bool of the same shape, True = real token. Returns
        y, the logits (B, num_classes), and auxiliary losses by name; neither pads nor other rows change the logits."""
        out = self.embed(tokens, mask=mask)
        x = out.y
        if self.towers == 2:
            first, second = x.unbind(1)
            x = torch.cat((first, second, first * second, first - second), -1)
        return SequenceOutput(self.head(x), None, out.aux)


_SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "tiny": ("two blocks of width 64", {"dim": 64, "depth": 2}),
    "small": ("four blocks of width 128", {"dim": 128, "depth": 4}),
    "base": ("six blocks of width 512", {"dim": 512, "depth": 6}),
}


def _hybrid(recurrent: int, heads: int, window: int) -> dict[str, Any]:
    """Mamba-2 in both directions, which knows the order, then attention within a window."""
    scan = {"name": "mamba2", "d_state": 64, "head_dim": 32}
    local = {"name": "softmax", "num_heads": heads, "position": "rope", "window_size": window}
    return {"mixer": [scan] * recurrent + [local], "position": "none"}


def _family(family: str, what: str, paper: str, own: dict[str, dict[str, Any]]) -> None:
    sizes = {size: (f"{what}, {shape}.", {**options, **own[size]}) for size, (shape, options) in _SIZES.items()}
    shared: dict[str, Any] = {"task": "documents", "paper": paper, "mlp_ratio": 2.0}
    register_sizes(family, SequenceClassifier, sizes, module=__name__, **shared)


_family("classifier", "Documents in classes, any mixer (`mixer`)", "arXiv:2011.04006", {size: {} for size in _SIZES})
_family(
    "hybrid_classifier",
    "Documents in classes, Mamba-2 and attention in a window",
    "arXiv:2405.21060",
    {"tiny": _hybrid(1, 4, 64), "small": _hybrid(3, 4, 128), "base": _hybrid(2, 8, 256)},
)
