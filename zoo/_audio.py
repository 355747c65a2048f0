"""From samples to one vector a token, whole or as they come: what the audio models have in common."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks.backbone import Backbone, BackboneState, MixerChoice
from ..blocks.layers.front_end import FrontEndOutput, FrontEndState
from ..blocks.layers.front_ends import create_front_end, measure
from ..blocks.layers.time_encoding import AbsoluteTimeEncoding
from ..blocks.layers.token_merging import TokenMerging
from ._features import ZooModel


class AudioState(NamedTuple):
    """front: samples that wait for their frame. given: int64 (B,), tokens so far. backbone: its state."""

    front: FrontEndState
    given: Tensor
    backbone: BackboneState


class AudioOutput(NamedTuple):
    """y: of the tokens (B, L, ...), zero beyond a row's, or of the recordings (B, ...). state: None unless one was
    passed in. aux: scalar losses by name. lengths: int64 (B,), tokens of each row."""

    y: Tensor
    state: AudioState | None
    aux: dict[str, Tensor]
    lengths: Tensor


class AudioEncoder(nn.Module):
    """Recordings (B, T) to tokens (B, L, D): front end -> linear map -> absolute time -> `Backbone`.

    sample_rate: in Hz. front_end: see `create_front_end`. mixer, dim, depth, ffn, mlp_ratio, norm, norm_eps, prenorm,
    position, max_len, causal, proj_drop, drop_path: the backbone, as `Backbone` takes them. input_drop: dropout of its
    input. time_encoding: options of `AbsoluteTimeEncoding`, {} for its defaults, None for none. token_merging: the same
    of `TokenMerging`, before the backbone; times are lost then.

    With causal=True and mixers that have a state, pieces of a recording give what the whole gives: pass `init_state`
    and each returned state on, then `flush`. Raises ValueError for unknown names and options, and for a state where the
    model cannot stream.
    """

    def __init__(
        self,
        *,
        sample_rate: int = 16000,
        front_end: str | Mapping[str, Any] = "log_mel",
        mixer: MixerChoice | Sequence[MixerChoice] = "softmax",
        dim: int = 64,
        depth: int = 2,
        ffn: str | Callable[..., nn.Module] | None = "gelu",
        mlp_ratio: float | None = None,
        norm: str = "layernorm",
        norm_eps: float | None = None,
        prenorm: bool = True,
        position: str = "none",
        max_len: int | None = None,
        causal: bool = False,
        input_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        time_encoding: Mapping[str, Any] | None = None,
        token_merging: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.sample_rate = dim, sample_rate
        self.front_end = create_front_end(front_end, sample_rate=sample_rate)
        self.proj = nn.Linear(self.front_end.dim, dim)
        self.drop = nn.Dropout(input_drop)
        self.time_encoding = None if time_encoding is None else AbsoluteTimeEncoding(dim, **time_encoding)
        self.token_merging = None if token_merging is None else TokenMerging(**token_merging)
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

    @property
    def streaming(self) -> bool:
        """Whether pieces give what the whole gives."""
        norm = self.front_end.norm
        return self.backbone.streaming and self.token_merging is None and not (norm is not None and norm.whole)

    def features(self, samples: Tensor, lengths: Tensor | None = None) -> FrontEndOutput:
        """What the front end makes of whole recordings; `encode` goes on from there, augmentation may stand between."""
        return self.front_end(samples, lengths=lengths)

    def encode(self, features: Tensor, lengths: Tensor | None = None, *, start: Tensor | int = 0) -> AudioOutput:
        """features: (B, L, F). lengths: int64 (B,), tokens of each row, None when all are real. start: int64 (B,) or a
        number, tokens before the first, where the rows are parts of recordings."""
        ragged = lengths is not None
        if lengths is None:
            lengths = torch.full(features.shape[:1], features.shape[1], dtype=torch.int64, device=features.device)
        return self._encode(features, lengths, None, start, ragged=ragged)

    def forward(
        self, samples: Tensor, lengths: Tensor | None = None, *, state: AudioState | None = None
    ) -> AudioOutput:
        """samples: floating (B, T) in [-1, 1]. lengths: int64 (B,), real samples of each row, which come first; None
        when all are. state: of the pieces before."""
        if state is None:
            out = self.features(samples, lengths)
            return self.encode(out.features, None if lengths is None else out.lengths)
        out = self.front_end(samples, lengths=lengths, state=state.front)
        return self._encode(out.features, out.lengths, state._replace(front=out.state), state.given)

    def flush(self, state: AudioState) -> AudioOutput:
        """The tokens that remain once the recordings have ended."""
        out = self.front_end.flush(state.front)
        return self._encode(out.features, out.lengths, state, state.given)

    def init_state(
        self, batch_size: int = 1, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> AudioState:
        """Before the first sample. Raises ValueError where the model cannot stream, saying why."""
        if not self.streaming:
            raise ValueError(f"the model cannot stream: {self._why()}")
        own = self.proj.weight
        device, dtype = device or own.device, dtype or own.dtype
        given = torch.zeros(batch_size, dtype=torch.int64, device=device)
        front = self.front_end.init_state(batch_size, device=device)
        return AudioState(front, given, self.backbone.init_state(batch_size, device=device, dtype=dtype))

    def measure(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
        """Take the statistics of the front end's norm from recordings: samples (B, T) with lengths (B,) or None."""
        measure(self.front_end, batches)

    def _why(self) -> str:
        if self.token_merging is not None:
            return "token_merging chooses among the tokens of the whole recording"
        if not self.backbone.causal:
            return "causal=False reads what comes later; build it with causal=True, or read it in windows"
        if not self.backbone.streaming:
            return "a mixer has no state"
        return "the norm of the front end takes statistics of whole recordings"

    def _encode(
        self,
        features: Tensor,
        lengths: Tensor,
        state: AudioState | None,
        start: Tensor | int,
        *,
        ragged: bool = True,
    ) -> AudioOutput:
        """ragged: False where all tokens of all rows are known to be real."""
        x = self.drop(self.proj(features.to(self.proj.weight.dtype)))
        mask = None
        if ragged and bool((lengths < x.shape[1]).any()):
            mask = torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)
        if self.time_encoding is not None:
            x = self.time_encoding(x, mask=mask, start=start)
        if self.token_merging is not None:
            x, mask, _ = self.token_merging(x, mask=mask)
            lengths = mask.sum(1)
        out = self.backbone(x, mask=mask, state=None if state is None else state.backbone)
        if state is None:
            return AudioOutput(out.y, None, out.aux, lengths)
        return AudioOutput(out.y, AudioState(state.front, state.given + lengths, out.state), out.aux, lengths)


class AudioZooModel(ZooModel):
    """A model of recordings (B, T), whose `encoder` hears them."""

    encoder: AudioEncoder

    def _run_trunk(self, *args: Any, **arguments: Any) -> Any:
        return self.encoder(*args, **arguments)

    @property
    def feature_reduction(self) -> int:
        return int(self.encoder.front_end.hop_length)

    @property
    def input_spec(self) -> dict[str, Any]:
        return {"kind": "samples", "sample_rate": self.encoder.sample_rate}

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor]:
        """Half a second of noise."""
        shape = (batch_size, self.encoder.sample_rate // 2)
        return (torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 0.2 - 0.1,)
