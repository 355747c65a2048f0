"""Embedding -> Backbone -> head: the shape that every task shares."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from .backbone import Backbone, BackboneState


class SequenceOutput(NamedTuple):
    """y: what the head returns; state: the backbone's carried state or None; aux: scalar losses by name."""

    y: Any
    state: BackboneState | None
    aux: dict[str, Tensor]


class SequenceModel(nn.Module):
    """An embedding (inputs -> (B, L, D)), a `Backbone` and a head ((B, L, D) -> task outputs).

    Any embedding and head serve, so one backbone works in every pipeline. Raises ValueError when the width of the
    embedding or of the head (where they have a `dim`) is not the backbone's.
    """

    def __init__(self, embedding: nn.Module, backbone: Backbone, head: nn.Module | None = None) -> None:
        super().__init__()
        for name, part in (("embedding", embedding), ("head", head)):
            width = getattr(part, "dim", backbone.dim)
            if width != backbone.dim:
                raise ValueError(f"the {name} has dim={width}, the backbone dim={backbone.dim}")
        self.embedding = embedding
        self.backbone = backbone
        self.head = nn.Identity() if head is None else head

    def forward_features(self, inputs: Any, context: Tensor | None = None, **arguments: Any) -> Any:
        """The backbone's output (y, state, aux) for the embedded inputs."""
        return self.backbone(self.embedding(inputs), context, **arguments)

    def forward(self, inputs: Any, context: Tensor | None = None, **arguments: Any) -> SequenceOutput:
        """inputs: what the embedding takes; context and keyword arguments as `Backbone.forward`."""
        features = self.forward_features(inputs, context, **arguments)
        return SequenceOutput(self.head(features.y), features.state, features.aux)

    def init_state(self, batch_size: int, **arguments: Any) -> BackboneState:
        """The backbone's state before the first token."""
        return self.backbone.init_state(batch_size, **arguments)
