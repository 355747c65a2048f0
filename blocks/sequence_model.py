"""Embedding -> Backbone -> head: the shape that every task shares."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from .backbone import Backbone, BackboneState
from .protocol import State


class SequenceState(NamedTuple):
    """The state of an embedding that looks back, and the backbone's."""

    embedding: State
    backbone: BackboneState


class SequenceOutput(NamedTuple):
    """y: what the head returns; state: the carried state or None; aux: scalar losses by name."""

    y: Any
    state: BackboneState | SequenceState | None
    aux: dict[str, Tensor]


class SequenceModel(nn.Module):
    """An embedding (inputs -> (B, L, D)), a `Backbone` and a head ((B, L, D) -> task outputs).

    Any embedding and head serve, so one backbone works in every pipeline. An embedding with `read` and `init_state`
    (`NGramEmbedding`) looks back: it gets mask, cu_seqlens and its part of the state, a `SequenceState`. Raises
    ValueError when the width of the embedding or of the head (where they have a `dim`) is not the backbone's.
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
        embedding: Any = self.embedding
        if not hasattr(embedding, "read"):
            return self.backbone(embedding(inputs), context, **arguments)
        state: SequenceState | None = arguments.pop("state", None)
        parts = {key: arguments.get(key) for key in ("mask", "cu_seqlens")}
        x, seen = embedding.read(inputs, **parts, state=None if state is None else state.embedding)
        out = self.backbone(x, context, **arguments, state=None if state is None else state.backbone)
        return out if state is None else out._replace(state=SequenceState(seen, out.state))

    def forward(self, inputs: Any, context: Tensor | None = None, **arguments: Any) -> SequenceOutput:
        """inputs: what the embedding takes; context and keyword arguments as `Backbone.forward`."""
        features = self.forward_features(inputs, context, **arguments)
        return SequenceOutput(self.head(features.y), features.state, features.aux)

    def init_state(self, batch_size: int, **arguments: Any) -> BackboneState | SequenceState:
        """The state before the first token; arguments as `Mixer.init_state`."""
        state = self.backbone.init_state(batch_size, **arguments)
        embedding: Any = self.embedding
        if not hasattr(embedding, "read"):
            return state
        return SequenceState(embedding.init_state(batch_size, device=arguments.get("device")), state)
