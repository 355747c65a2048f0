"""Patch forecasters: instance norm, patches as tokens, any mixer as the backbone, a linear head (PatchTST,
arXiv:2211.14730).

Deviations: the mixer is a choice (PatchTST is `mixer="softmax"` with `position="learned"`, `norm="batchnorm"` in the
paper's code, LayerNorm or RMSNorm here); P output numbers per step; channels may share tokens (`channel_mixing`);
masks, calendar, covariates and static values enter when the data have them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.backbone import Backbone, MixerChoice
from ..blocks.layers.distributions import OutputDistribution, create_output
from ..blocks.layers.embeddings import InstanceNorm, PatchEmbedding
from ..blocks.layers.heads import ForecastHead
from ..blocks.sequence_model import SequenceModel
from ._forecaster import Forecaster
from ._registry import register_model


class PatchForecaster(Forecaster):
    """RevIN -> patches -> `Backbone` -> head, for each channel alone or for all channels in shared tokens.

    seq_len, pred_len: steps read and forecast. in_channels: target channels. num_*: widths of the covariates in the
    batch (0: absent). loss, quantiles: the output distribution. dim, depth, mixer, ffn, mlp_ratio, norm, position,
    proj_drop, drop_path: the backbone. patch_len, stride: of the patches. channel_mixing: tokens hold all channels.
    channel_embedding: a learned vector per channel (channel-independent form). mask_channel: patches also hold which
    values were observed. calendar: read the calendar features of past and horizon. revin, revin_affine: instance norm.
    linear_skip: add a linear map of the whole window to the output, one for each channel (TiDE's global residual,
    arXiv:2304.08424); with `season` steps it starts as the seasonal naive forecast (ours), with 0 near zero.
    """

    uses = frozenset({"past", "future", "static", "calendar"})
    heads = ("model.head.", "skip")

    def __init__(
        self,
        *,
        seq_len: int,
        pred_len: int,
        in_channels: int,
        out_channels: int | None = None,
        num_time_features: int = 0,
        num_past_covariates: int = 0,
        num_future_covariates: int = 0,
        num_static_covariates: int = 0,
        loss: str = "mse",
        quantiles: list[float] | None = None,
        mixer: MixerChoice | Sequence[MixerChoice] = "softmax",
        dim: int = 64,
        depth: int = 2,
        patch_len: int = 16,
        stride: int = 8,
        ffn: str | None = "gelu",
        mlp_ratio: float | None = 2.0,
        norm: str = "layernorm",
        position: str = "learned",
        channel_mixing: bool = False,
        channel_embedding: bool = False,
        mask_channel: bool = False,
        calendar: bool = False,
        revin: bool = True,
        revin_affine: bool = True,
        linear_skip: bool = False,
        season: int = 0,
        proj_drop: float = 0.1,
        head_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if out_channels not in (None, in_channels):
            raise ValueError(
                f"a patch model forecasts its own channels: out_channels={out_channels}, in_channels={in_channels}"
            )
        self.output = create_output(loss, levels=quantiles)
        self.in_channels, self.seq_len, self.pred_len = in_channels, seq_len, pred_len
        self.num_time_features = num_time_features
        self.num_past_covariates, self.num_future_covariates = num_past_covariates, num_future_covariates
        self.num_static_covariates = num_static_covariates
        self.channel_mixing, self.mask_channel = channel_mixing, mask_channel
        self.num_time = num_time_features if calendar else 0
        self.num_past, self.num_future, self.num_static = (
            num_past_covariates,
            num_future_covariates,
            num_static_covariates,
        )
        self.revin = InstanceNorm(in_channels, affine=revin_affine) if revin else None

        shared = self.num_time + num_past_covariates + num_future_covariates
        per_token = in_channels if channel_mixing else 1
        embedding = PatchEmbedding(
            seq_len, per_token * (1 + mask_channel) + shared, dim, patch_len=patch_len, stride=stride
        )
        known_ahead = self.num_time + num_future_covariates
        head = ForecastHead(
            dim,
            embedding.num_patches,
            pred_len,
            self.output.num_params * per_token,
            num_future_features=known_ahead + num_static_covariates if known_ahead else 0,
            drop=head_drop,
        )
        backbone = Backbone(
            dim,
            depth,
            mixer=mixer,
            ffn=ffn,
            mlp_ratio=mlp_ratio,
            norm=norm,
            position=position,
            max_len=embedding.num_patches,
            proj_drop=proj_drop,
            drop_path=drop_path,
        )
        self.model = SequenceModel(embedding, backbone, head)
        if linear_skip and not 0 <= season <= seq_len:
            raise ValueError(f"season={season} must be between 0 and seq_len={seq_len}")
        self.skip = (
            nn.Parameter(_skip_start(in_channels, seq_len, pred_len, self.output, season)) if linear_skip else None
        )
        self.static = nn.Linear(num_static_covariates, dim) if num_static_covariates else None
        self.channel = (
            nn.Parameter(torch.randn(in_channels, dim) * 0.02) if channel_embedding and not channel_mixing else None
        )

    def _per_channel(self, x: Tensor, batch: int) -> Tensor:
        """(B, ...) -> (B*C, ...) or unchanged when channels share tokens."""
        if self.channel_mixing:
            return x
        return x.unsqueeze(1).expand(-1, self.in_channels, *x.shape[1:]).reshape(batch * self.in_channels, *x.shape[1:])

    @property
    def reads_calendar(self) -> bool:
        return self.num_time > 0

    @property
    def feature_reduction(self) -> int:
        embedding: Any = self.model.embedding
        return int(embedding.stride)

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the parameters (B, H, C, P) of the output distribution, scaled."""
        params, _ = self.forward_aux(batch)
        return params

    def forward_aux(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """As `forward`, with the mixers' auxiliary losses by name."""
        x, observed = batch["past_target"], batch.get("past_observed")
        size, length, channels = x.shape
        if self.revin is not None:
            x, loc, scale = self.revin(x, observed)
        window, features = x, [x.unsqueeze(-1)]
        if self.mask_channel:
            known = torch.ones_like(x) if observed is None else observed.to(x.dtype)
            features.append(known.unsqueeze(-1))
        tokens_in = torch.cat(features, dim=-1)  # (B, L, C, 1 or 2)
        if self.channel_mixing:
            tokens_in = tokens_in.flatten(2)
        else:
            tokens_in = tokens_in.transpose(1, 2).reshape(size * channels, length, -1)
        shared = []
        if self.num_time:
            shared.append(batch["past_time"])
        if self.num_past:
            shared.append(batch["past_covariates"])
        if self.num_future:
            shared.append(batch["future_covariates"][:, :length])
        if shared:
            tokens_in = torch.cat((tokens_in, self._per_channel(torch.cat(shared, dim=-1), size)), dim=-1)

        tokens = self.model.embedding(tokens_in)
        if self.static is not None:
            tokens = tokens + self._per_channel(self.static(batch["static_covariates"]), size).unsqueeze(1)
        if self.channel is not None:
            tokens = tokens + self.channel.repeat(size, 1).unsqueeze(1)
        features_out = self.model.backbone(tokens)
        head: ForecastHead = self.model.head  # type: ignore[assignment]
        future = self._known_ahead(batch, size, length) if head.num_future_features else None
        raw = head(features_out.y, future)
        if self.channel_mixing:
            raw = raw.unflatten(-1, (channels, -1))
        else:
            raw = raw.unflatten(0, (size, channels)).transpose(1, 2)
        if self.skip is not None:
            raw = raw + torch.einsum("blc,clhp->bhcp", window, self.skip)
        params = self.output.constrain(raw)
        if self.revin is not None:
            params = self.output.affine(params, loc, scale)
        return params, features_out.aux

    def _known_ahead(self, batch: dict[str, Tensor], size: int, length: int) -> Tensor:
        parts = []
        if self.num_time:
            parts.append(batch["future_time"])
        if self.num_future:
            parts.append(batch["future_covariates"][:, length:])
        if self.num_static:
            parts.append(batch["static_covariates"].unsqueeze(1).expand(-1, self.pred_len, -1))
        return self._per_channel(torch.cat(parts, dim=-1), size)


def _skip_start(channels: int, seq_len: int, pred_len: int, output: OutputDistribution, season: int) -> Tensor:
    """Weights (C, L, H, P) of the linear skip: copy the same phase of the last season, or next to nothing."""
    if season == 0:
        return torch.randn(channels, seq_len, pred_len, output.num_params) * 0.1 / seq_len
    weight = torch.zeros(channels, seq_len, pred_len, output.num_params)
    steps = torch.arange(pred_len)
    for index in output.locations:
        weight[:, seq_len - season + steps % season, steps, index] = 1.0
    return weight


@register_model(PatchForecaster, task="forecasting", paper="arXiv:2211.14730", dim=32, depth=1, mlp_ratio=2.0)
def patch_tiny(**options: Any) -> PatchForecaster:
    """Patches, one block of width 32, any mixer."""
    return PatchForecaster(**options)


@register_model(PatchForecaster, task="forecasting", paper="arXiv:2211.14730", dim=64, depth=2, mlp_ratio=2.0)
def patch_small(**options: Any) -> PatchForecaster:
    """Patches, two blocks of width 64, any mixer."""
    return PatchForecaster(**options)


@register_model(PatchForecaster, task="forecasting", paper="arXiv:2211.14730", dim=128, depth=3, mlp_ratio=2.0)
def patch_base(**options: Any) -> PatchForecaster:
    """Patches, three blocks of width 128 (the paper's width for large sets), any mixer."""
    return PatchForecaster(**options)
