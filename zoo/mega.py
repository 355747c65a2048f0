"""MEGA (arXiv:2209.10655): language models, and the image classifier of its Long Range Arena table.

`mega_base` is the published enwik8 model but for its vocabulary, which is all 256 bytes; `tiny` and `small` are ours.
`mega_lra_image` reads grey-scale pixels one after another: the published configuration with chunks of 128, MEGA-chunk,
and a bias in the last layer. The published classifier has none there: head_bias=False, 10 parameters fewer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.backbone import Backbone, MixerChoice
from ..blocks.layers.ffn import SiluMLP
from ._image import ImageClassifier
from ._language import LanguageModel
from ._registry import register_model

_PAPER = "arXiv:2209.10655"


def _feed_forward(drop: float, hidden_drop: float) -> Callable[..., nn.Module]:
    """A factory as `Backbone` calls it, whose own dropout (that of the mixers' outputs) MEGA does not have."""

    def build(dim: int, mlp_ratio: float, drop: float = 0.0, *, rates: tuple[float, float]) -> nn.Module:
        return SiluMLP(dim, mlp_ratio, rates[0], hidden_drop=rates[1])

    return partial(build, rates=(drop, hidden_drop))


class MegaLanguageModel(LanguageModel):
    """A `LanguageModel` with what the published one adds: embeddings times sqrt(dim), a final norm without parameters.

    vocab_size, mixer, dim, depth, mlp_ratio, tie_embeddings, drop_path: as there. drop: dropout of the embedding and
    of the feed-forward layers' outputs (the mixers have their own). hidden_drop: inside the feed-forward layers.
    Pre-norm with layer norms of eps 1e-5; tables start N(0, 1 / dim), other weights N(0, 0.02).
    """

    def __init__(
        self,
        *,
        vocab_size: int = 256,
        mixer: MixerChoice | Sequence[MixerChoice] = "mega",
        dim: int = 512,
        depth: int = 12,
        mlp_ratio: float = 2.0,
        causal: bool = True,
        tie_embeddings: bool = True,
        drop: float = 0.1,
        hidden_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__(
            vocab_size=vocab_size,
            mixer=mixer,
            dim=dim,
            depth=depth,
            ffn=_feed_forward(drop, hidden_drop),
            mlp_ratio=mlp_ratio,
            norm="layernorm",
            norm_eps=1e-5,
            causal=causal,
            tie_embeddings=tie_embeddings,
            embedding_std=dim**-0.5,
            embedding_scale=dim**0.5,
            embedding_drop=drop,
            rescale_residual=False,
            drop_path=drop_path,
        )
        self.backbone.norm = nn.LayerNorm(dim, eps=1e-5, elementwise_affine=False)


class MegaImageClassifier(ImageClassifier):
    """Pixels as a sequence -> bidirectional blocks -> mean over the pixels -> hidden layer with GELU -> logits.

    mixer, dim, depth, mlp_ratio, norm, prenorm, drop_path: of the `Backbone`; norm is "batchnorm", "layernorm",
    "rmsnorm" or "scalenorm". num_classes: 0 gives features instead of logits. head_dim: of the hidden layer.
    head_bias: a bias of the last layer. in_channels: colours of a pixel. drop: dropout of embedding, feed-forward
    outputs and hidden layer. hidden_drop: inside the feed-forward layers.
    A pixel x becomes w x + b, w from N(0, 1) and b from N(0, 0.1); the published preprocessing is
    (grey - 0.48) / 0.24, grey in [0, 1].
    """

    def __init__(
        self,
        *,
        mixer: MixerChoice | Sequence[MixerChoice] = "mega",
        dim: int = 160,
        depth: int = 8,
        mlp_ratio: float = 2.0,
        norm: str = "batchnorm",
        prenorm: bool = True,
        num_classes: int = 10,
        head_dim: int = 320,
        head_bias: bool = True,
        in_channels: int = 1,
        drop: float = 0.0,
        hidden_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if num_classes < 0:
            raise ValueError(f"num_classes={num_classes} must be positive, or 0 for features instead of logits")
        self.in_channels = in_channels
        self.embedding = nn.Linear(in_channels, dim)
        nn.init.normal_(self.embedding.weight)
        nn.init.normal_(self.embedding.bias, std=0.1)
        self.drop = nn.Dropout(drop)
        self.backbone = Backbone(
            dim,
            depth,
            mixer=mixer,
            ffn=_feed_forward(drop, hidden_drop),
            mlp_ratio=mlp_ratio,
            norm=norm,
            norm_eps=1e-5,
            prenorm=prenorm,
            drop_path=drop_path,
            final_norm=prenorm,
        )
        self.head: nn.Module = nn.Identity()
        if num_classes:
            layers = nn.Linear(dim, head_dim), nn.Linear(head_dim, num_classes, bias=head_bias)
            for layer in layers:
                self._start_classifier(layer)
            self.head = nn.Sequential(layers[0], nn.Dropout(drop), nn.GELU(), layers[1])

    def _start_classifier(self, layer: nn.Linear) -> None:
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor]:
        """Images of 8 pixels, to keep the sequence short."""
        shape = (batch_size, self.in_channels, 8, 8)
        return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)

    def embed(self, images: Tensor) -> Tensor:
        """images: (B, in_channels, H, W), normalised. Returns the mean (B, D) over the pixels, row after row."""
        if images.dim() != 4 or images.shape[1] != self.in_channels:
            raise ValueError(f"images have shape {tuple(images.shape)}, expected (B, {self.in_channels}, H, W)")
        x = self.drop(self.embedding(images.flatten(2).transpose(1, 2)))
        return self.backbone(x, grid=tuple(images.shape[2:])).y.mean(1)


def _mixer(**options: Any) -> dict[str, Any]:
    return {"name": "mega", "d_state": 16, **options}


_TINY = _mixer(z_dim=32, hidden_dim=128, chunk_size=128, relative_bias="rotary", drop=0.1)
_SMALL = _mixer(z_dim=64, hidden_dim=512, chunk_size=512, relative_bias="rotary", drop=0.1)
_BASE = _mixer(z_dim=128, hidden_dim=1024, chunk_size=2048, relative_bias="rotary", truncation=8192, drop=0.1)
_IMAGE = _mixer(z_dim=96, hidden_dim=320, chunk_size=128, attention="laplace", truncation=1024)


@register_model(MegaLanguageModel, task="text", paper=_PAPER, mixer=_TINY, dim=64, depth=4)
def mega_tiny(**options: Any) -> MegaLanguageModel:
    """MEGA over bytes, four blocks of width 64, chunks of 128."""
    return MegaLanguageModel(**options)


@register_model(MegaLanguageModel, task="text", paper=_PAPER, mixer=_SMALL, dim=256, depth=8)
def mega_small(**options: Any) -> MegaLanguageModel:
    """MEGA over bytes, eight blocks of width 256, chunks of 512."""
    return MegaLanguageModel(**options)


@register_model(MegaLanguageModel, task="text", paper=_PAPER, mixer=_BASE, dim=512, depth=12)
def mega_base(**options: Any) -> MegaLanguageModel:
    """MEGA as published for enwik8: twelve blocks of width 512, chunks of 2048, 39 million parameters."""
    return MegaLanguageModel(**options)


@register_model(MegaImageClassifier, task="image", paper=_PAPER, mixer=_IMAGE, dim=160, depth=8)
def mega_lra_image(**options: Any) -> MegaImageClassifier:
    """MEGA-chunk of the Long Range Arena's image task: eight blocks of width 160, 2,824,770 parameters."""
    return MegaImageClassifier(**options)
