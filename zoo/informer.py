"""Informer (arXiv:2012.07436): ProbSparse encoder with distilling, generative decoder.

Follows the published code: post-norm layers, circular convolutions, masked ProbSparse self-attention in the decoder
(Informer's own decoder mode, not a causal mixer: see `ProbSparseAttention`), full cross-attention. Deviations:
feed-forwards are linear layers instead of width-1 convolutions (the same function), P output numbers per step,
covariates enter as further input channels. The default multivariate ETTh1 model has exactly 11,330,055 parameters.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..blocks.layers.distributions import create_output
from ..blocks.layers.dropout import Dropout
from ..blocks.layers.embeddings import CircularConv, SeriesEmbedding
from ..blocks.protocol import Mixer
from ..blocks.registry import create_mixer
from ._features import Trunk
from ._forecaster import Forecaster
from ._registry import register_model

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu}


class FeedForward(nn.Module):
    """Linear, activation, dropout, linear, dropout, with torch's default initialisation."""

    def __init__(self, dim: int, hidden: int, *, drop: float, activation: str) -> None:
        super().__init__()
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation={activation!r} must be one of {', '.join(_ACTIVATIONS)}")
        self.up, self.down = nn.Linear(dim, hidden), nn.Linear(hidden, dim)
        self.activation, self.drop = _ACTIVATIONS[activation], Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down(self.drop(self.activation(self.up(x)))))


class EncoderLayer(nn.Module):
    """Post-norm: norm(x + attention(x)), then norm(x + feed-forward(x))."""

    def __init__(self, dim: int, attention: Mixer, hidden: int, *, drop: float, activation: str) -> None:
        super().__init__()
        self.attention = attention
        self.ffn = FeedForward(dim, hidden, drop=drop, activation=activation)
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.drop = Dropout(drop)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.drop(self.attention(x).y))
        return self.norm2(x + self.ffn(x))


class Distil(nn.Module):
    """Halve the sequence: circular convolution, BatchNorm, ELU, max-pool of 3 with stride 2: L -> ceil(L/2)."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.conv = CircularConv(dim, dim, kaiming=False)
        self.norm = nn.BatchNorm1d(dim)
        self.pool = nn.MaxPool1d(3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        # Channels stay last: normalised as rows, pooled in the layout that torch pools fastest.
        x = F.elu(self.norm(x.flatten(0, 1)).view_as(x))
        return self.pool(x.transpose(1, 2)).transpose(1, 2)


class DecoderLayer(nn.Module):
    """Post-norm: masked self-attention, cross-attention to the encoder, feed-forward."""

    def __init__(
        self, dim: int, attention: Mixer, cross_attention: Mixer, hidden: int, *, drop: float, activation: str
    ) -> None:
        super().__init__()
        self.attention, self.cross_attention = attention, cross_attention
        self.ffn = FeedForward(dim, hidden, drop=drop, activation=activation)
        self.norm1, self.norm2, self.norm3 = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.drop = Dropout(drop)

    def forward(self, x: Tensor, context: Tensor, last: int | None = None) -> Tensor:
        """x: (B, L, D). last: the number of final steps that are wanted, (B, last, D); all by default."""
        y = self.attention(x).y
        if last is not None:  # what follows looks at each step alone
            x, y = x[:, -last:], y[:, -last:]
        x = self.norm1(x + self.drop(y))
        x = self.norm2(x + self.drop(self.cross_attention(x, context).y))
        return self.norm3(x + self.ffn(x))


class Informer(Forecaster):
    """Encoder-decoder forecaster: the whole horizon comes out of one pass of the decoder.

    seq_len: steps the encoder reads; label_len: last known steps the decoder starts from (None: half of seq_len);
    pred_len: horizon. in_channels, out_channels: targets. num_*: widths of calendar features and covariates.
    attention: "prob_sparse" or "softmax" (the paper's Informer-dagger). preset: "original" (as published) or "clean",
    see `ProbSparseAttention`; factor: its sampling factor c. encoder_depth, decoder_depth: layers; distil: halve the
    length between encoder layers. time_embedding: "timeF", "fixed" or "learned". drop: dropout everywhere.

    Static covariates are not read. Raises ValueError for unknown choices and a label_len longer than seq_len.
    """

    uses = frozenset({"past", "future", "calendar"})
    heads = ("proj.",)
    mixers = ("prob_sparse", "softmax")

    def __init__(
        self,
        *,
        seq_len: int,
        pred_len: int,
        in_channels: int,
        out_channels: int | None = None,
        label_len: int | None = None,
        num_time_features: int = 4,
        num_past_covariates: int = 0,
        num_future_covariates: int = 0,
        loss: str = "mse",
        quantiles: list[float] | None = None,
        attention: str = "prob_sparse",
        preset: str = "clean",
        factor: int = 5,
        dim: int = 512,
        num_heads: int = 8,
        mlp_ratio: float = 4.0,
        encoder_depth: int = 2,
        decoder_depth: int = 1,
        distil: bool = True,
        time_embedding: str = "timeF",
        activation: str = "gelu",
        drop: float = 0.05,
    ) -> None:
        super().__init__()
        self.label_len = seq_len // 2 if label_len is None else label_len
        if not 0 <= self.label_len <= seq_len:
            raise ValueError(f"label_len={label_len} must be between 0 and seq_len={seq_len}")
        if attention not in ("prob_sparse", "softmax"):
            raise ValueError(f"attention={attention!r} must be prob_sparse or softmax")
        out_channels = in_channels if out_channels is None else out_channels
        self.output = create_output(loss, levels=quantiles)
        self.pred_len, self.in_channels, self.out_channels = pred_len, in_channels, out_channels
        self.seq_len, self.num_time_features = seq_len, num_time_features
        self.num_past_covariates, self.num_future_covariates = num_past_covariates, num_future_covariates
        self.grad_checkpointing = False
        self.num_past, self.num_future = num_past_covariates, num_future_covariates
        width = in_channels + num_past_covariates + num_future_covariates
        hidden = int(dim * mlp_ratio)
        common: dict[str, Any] = {"drop": drop, "activation": activation}

        def embedding() -> SeriesEmbedding:
            return SeriesEmbedding(
                width, dim, num_time_features=num_time_features, time_embedding=time_embedding, drop=drop
            )

        def self_attention(masked: bool) -> Mixer:
            if attention == "softmax":
                return create_mixer("softmax", dim, num_heads=num_heads, attn_drop=drop, causal=masked)
            return create_mixer("prob_sparse", dim, num_heads=num_heads, factor=factor, preset=preset, masked=masked)

        self.encoder_embedding = embedding()
        self.decoder_embedding = embedding()
        self.encoder = nn.ModuleList(
            EncoderLayer(dim, self_attention(False), hidden, **common) for _ in range(encoder_depth)
        )
        self.distil = nn.ModuleList(Distil(dim) for _ in range(encoder_depth - 1 if distil else 0))
        self.encoder_norm = nn.LayerNorm(dim)
        self.decoder = nn.ModuleList(
            DecoderLayer(
                dim,
                self_attention(True),
                create_mixer("softmax", dim, num_heads=num_heads, attn_drop=drop, cross=True),
                hidden,
                **common,
            )
            for _ in range(decoder_depth)
        )
        for module in self.modules():
            if isinstance(module, Mixer):  # the published code leaves all projections at torch's default
                for projection in (module.q_proj, module.k_proj, module.v_proj, module.out_proj):
                    projection.reset_parameters()  # type: ignore[operator,union-attr]
        self.decoder_norm = nn.LayerNorm(dim)
        self.proj = nn.Linear(dim, out_channels * self.output.num_params)

    def _trunk(self) -> Trunk:
        """The encoder; what the decoder makes are steps of the horizon."""
        blocks: dict[str, nn.Module] = {f"encoder.{i}": layer for i, layer in enumerate(self.encoder)}
        width = int(self.encoder_norm.normalized_shape[0])
        return Trunk(self.encoder_norm, blocks, (width,) * len(blocks), norm=lambda x, call: self.encoder_norm(x))

    def _reductions(self, number: int) -> list[int]:
        return [1 << min(i, len(self.distil)) for i in range(number)]

    def _apply_layer(self, layer: nn.Module, *inputs: Any) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(layer, *inputs, use_reentrant=False)
        return layer(*inputs)

    def _inputs(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Encoder values and calendar, decoder values (unknown steps are zero) and calendar."""
        past, known = batch["past_target"], batch["future_covariates"] if self.num_future else None
        size, length, _ = past.shape
        start = length - self.label_len
        values = [past]
        future = [past.new_zeros(size, self.pred_len, self.in_channels)]
        if self.num_past:
            values.append(batch["past_covariates"])
            future.append(past.new_zeros(size, self.pred_len, self.num_past))
        if known is not None:
            values.append(known[:, :length])
            future.append(known[:, length:])
        encoder = torch.cat(values, dim=-1)
        decoder = torch.cat((encoder[:, start:], torch.cat(future, dim=-1)), dim=1)
        time = torch.cat((batch["past_time"][:, start:], batch["future_time"]), dim=1)
        return encoder, batch["past_time"], decoder, time

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the parameters (B, H, C, P) of the output distribution, scaled."""
        encoder_in, encoder_time, decoder_in, decoder_time = self._inputs(batch)
        x = self.encoder_embedding(encoder_in, encoder_time)
        for i, layer in enumerate(self.encoder):
            x = self._apply_layer(layer, x)
            if i < len(self.distil):
                x = self.distil[i](x)
        context = self.encoder_norm(x)
        y = self.decoder_embedding(decoder_in, decoder_time)
        for i, layer in enumerate(self.decoder):
            y = self._apply_layer(layer, y, context, self.pred_len if i == len(self.decoder) - 1 else None)
        raw = self.proj(self.decoder_norm(y[:, -self.pred_len :]))
        return self.output.constrain(raw.unflatten(-1, (self.out_channels, self.output.num_params)))


@register_model(Informer, task="forecasting", paper="arXiv:2012.07436")
def informer(**options: Any) -> Informer:
    """ProbSparse encoder-decoder with distilling and a generative decoder."""
    return Informer(**options)
