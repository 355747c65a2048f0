"""What the forecasting pipeline asks of a model."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from ..blocks.layers.distributions import OutputDistribution
from ._features import ZooModel


class Forecaster(ZooModel):
    """A model from a batch of windows to the parameters of its output distribution.

    uses: which of the kinds "past", "future", "static" (covariates) and "calendar" it reads; the pipeline refuses data
    with others. output: set by the constructor; how P numbers become a point, quantiles and a loss. config: set by
    `create_model`.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    output: OutputDistribution
    seq_len: int
    pred_len: int
    in_channels: int
    # widths of what the batch holds beside the targets
    num_time_features: int = 0
    num_past_covariates: int = 0
    num_future_covariates: int = 0
    num_static_covariates: int = 0

    @property
    def input_spec(self) -> dict[str, Any]:
        """Steps read and forecast, and the channels of past_target."""
        return {"kind": "series", "seq_len": self.seq_len, "pred_len": self.pred_len, "channels": self.in_channels}

    def example_inputs(self, batch_size: int = 1) -> tuple[dict[str, Tensor]]:
        """A batch of noise with everything that the model may read."""
        draw = torch.Generator().manual_seed(0)
        past, ahead = self.seq_len, self.pred_len
        sizes = {
            "past_target": (past, self.in_channels),
            "past_time": (past, self.num_time_features),
            "future_time": (ahead, self.num_time_features),
            "past_covariates": (past, self.num_past_covariates),
            "future_covariates": (past + ahead, self.num_future_covariates),
            "static_covariates": (self.num_static_covariates,),
        }
        return ({k: torch.rand(batch_size, *size, generator=draw) - 0.5 for k, size in sizes.items()},)

    @property
    def reads_calendar(self) -> bool:
        """Whether this model, as built, reads past_time and future_time; the loader leaves them out otherwise."""
        return "calendar" in self.uses

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """batch: see `pipelines.forecasting.windows`. Returns the parameters (B, H, C, P), in the scaled space."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def forward_aux(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """As `forward`, with auxiliary losses by name."""
        return self(batch), {}
