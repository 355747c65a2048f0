"""What the forecasting pipeline asks of a model."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from ..blocks.layers.distributions import OutputDistribution


class Forecaster(nn.Module):
    """A model from a batch of windows to the parameters of its output distribution.

    uses: which of the kinds "past", "future", "static" (covariates) and "calendar" it reads; the pipeline refuses data
    with others. output: set by the constructor; how P numbers become a point, quantiles and a loss. config: set by
    `create_model`.
    """

    uses: ClassVar[frozenset[str]] = frozenset()
    output: OutputDistribution
    config: dict[str, Any]

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
