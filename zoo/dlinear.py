"""DLinear (arXiv:2205.13504): one linear map for the trend and one for the remainder.

Deviations: P output numbers per step instead of one, so that quantiles and Student-t work too.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks.layers.distributions import create_output
from ._forecaster import Forecaster
from ._registry import register_model


class DLinear(Forecaster):
    """Decomposition into a moving average and a remainder, each mapped linearly from L to H steps.

    kernel_size: odd width of the moving average (25 in the paper). individual: a map per channel instead of one for
    all. in_channels must equal out_channels: every channel forecasts itself. It reads no covariates and no calendar.
    """

    no_features = "its linear maps lead from the window to the horizon at once"
    heads = ("trend.", "remainder.")

    def __init__(
        self,
        *,
        seq_len: int,
        pred_len: int,
        in_channels: int,
        out_channels: int | None = None,
        loss: str = "mse",
        quantiles: list[float] | None = None,
        kernel_size: int = 25,
        individual: bool = False,
    ) -> None:
        super().__init__()
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd and positive")
        if out_channels not in (None, in_channels):
            raise ValueError(
                f"dlinear forecasts its own channels: out_channels={out_channels}, in_channels={in_channels}"
            )
        self.output = create_output(loss, levels=quantiles)
        self.seq_len, self.pred_len, self.kernel_size, self.individual = (
            seq_len,
            pred_len,
            kernel_size,
            individual,
        )
        self.in_channels = in_channels
        width = pred_len * self.output.num_params
        copies = in_channels if individual else 1
        self.trend = nn.ModuleList(nn.Linear(seq_len, width) for _ in range(copies))
        self.remainder = nn.ModuleList(nn.Linear(seq_len, width) for _ in range(copies))

    def decompose(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(..., L) -> moving average (ends repeated) and remainder."""
        half = (self.kernel_size - 1) // 2
        padded = F.pad(x, (half, half), mode="replicate")
        trend = F.avg_pool1d(padded, self.kernel_size, stride=1)
        return trend, x - trend

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Returns the parameters (B, H, C, P) of the output distribution, scaled."""
        trend, remainder = self.decompose(batch["past_target"].transpose(1, 2))  # (B, C, L)
        if self.individual:
            parts = [
                t(trend[:, i]) + r(remainder[:, i])
                for i, (t, r) in enumerate(zip(self.trend, self.remainder, strict=True))
            ]
            raw = torch.stack(parts, dim=1)
        else:
            raw = self.trend[0](trend) + self.remainder[0](remainder)
        raw = raw.unflatten(-1, (self.pred_len, self.output.num_params)).transpose(1, 2)
        return self.output.constrain(raw)


@register_model(DLinear, task="forecasting", paper="arXiv:2205.13504")
def dlinear(**options: Any) -> DLinear:
    """Linear maps of trend and remainder."""
    return DLinear(**options)
