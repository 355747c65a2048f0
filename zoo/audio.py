"""Classifiers of recordings and detectors of events over any mixer: samples -> `AudioEncoder` -> logits.

The frame of the classifier is that of the Audio Spectrogram Transformer (arXiv:2104.01778) with stacks of frames in
place of patches, that of the detector polyphonic sound event detection (arXiv:1702.06286): one score per label and
token. Sizes are ours.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocks.backbone import MixerChoice
from ..blocks.registry import did_you_mean
from ._audio import AudioEncoder, AudioOutput, AudioState, AudioZooModel
from ._registry import register_sizes
from .classifier import POOLINGS, pool

HEADS = ("labels", "text")
# A first guess of how often a label is heard in a token, so that training does not begin with finding it out.
_RARE = 0.03


class _AudioModel(AudioZooModel):
    """An `AudioEncoder` with a head; the constructors of the subclasses say what its options are."""

    def __init__(self, num_classes: int, **encoder: Any) -> None:
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes={num_classes!r} must be a positive integer")
        self.num_classes = num_classes
        self.encoder = AudioEncoder(**encoder)


class AudioClassifier(_AudioModel):
    """Recordings (B, T) to logits (B, num_classes).

    pooling: "mean", "last" or "max" over the tokens of a recording. head_drop: dropout before the last layer. All other
    options are those of `AudioEncoder`. config: set by `create_model`. Raises ValueError as `AudioEncoder` does, and
    for an unknown pooling.
    """

    def __init__(
        self,
        *,
        num_classes: int = 2,
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
        pooling: str = "mean",
        input_drop: float = 0.0,
        head_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        time_encoding: Mapping[str, Any] | None = None,
        token_merging: Mapping[str, Any] | None = None,
    ) -> None:
        options = {k: v for k, v in locals().items() if k in _ENCODER}
        super().__init__(num_classes, **options, token_merging=token_merging)
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is not a choice.{did_you_mean(pooling, POOLINGS)}")
        self.pooling = pooling
        self.head = nn.Sequential(nn.Dropout(head_drop), nn.Linear(dim, num_classes))

    def forward(self, samples: Tensor, lengths: Tensor | None = None) -> AudioOutput:
        """samples: floating (B, T). lengths: int64 (B,), real samples of each row; None when all are. Returns logits
        in y; neither pads nor other rows change them."""
        out = self.encoder.features(samples, lengths)
        return self.classify(out.features, None if lengths is None else out.lengths)

    def classify(self, features: Tensor, lengths: Tensor | None = None) -> AudioOutput:
        """Logits (B, num_classes) from the features of `encoder.features`. lengths: None where all are real."""
        out = self.encoder.encode(features, lengths)
        y = out.y.float() if out.y.dtype in (torch.bfloat16, torch.float16) else out.y
        mask = torch.arange(y.shape[1], device=y.device) < out.lengths.unsqueeze(1)
        return out._replace(y=self.head(pool(y, mask, self.pooling)))


class EventDetector(_AudioModel):
    """Recordings (B, T) to logits (B, L, num_classes): which labels are heard in each token, any number at once.

    head: "labels" has a vector for each of them; "text" compares tokens with vectors of their names in words,
    logits = s cos(W y, v_c) + b with s and b learned, so that any other words can be asked for (`score`). text_dim: of
    these vectors. All other options are those of `AudioEncoder`. `encoder.front_end.times` are the tokens' centres in
    seconds. config: set by `create_model`. Raises ValueError as `AudioEncoder` does, and for an unknown head.
    """

    label_vectors: Tensor
    classifier = "out"
    heads = ("out.", "label_vectors")

    def __init__(
        self,
        *,
        num_classes: int = 2,
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
        head: str = "labels",
        text_dim: int = 384,
        input_drop: float = 0.0,
        head_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        time_encoding: Mapping[str, Any] | None = None,
    ) -> None:
        options = {k: v for k, v in locals().items() if k in _ENCODER}
        super().__init__(num_classes, **options)
        if head not in HEADS:
            raise ValueError(f"head={head!r} is not a choice.{did_you_mean(head, HEADS)}")
        self.drop = nn.Dropout(head_drop)
        rare = math.log(_RARE / (1 - _RARE))
        self.text = head == "text"
        if self.text:
            self.out = nn.Linear(dim, text_dim)
            self.scale = nn.Parameter(torch.tensor(math.log(10.0)))
            self.bias = nn.Parameter(torch.tensor(rare))
            self.register_buffer("label_vectors", torch.zeros(num_classes, text_dim))
        else:
            self.out = nn.Linear(dim, num_classes)
            self._start_classifier(self.out)

    def _start_classifier(self, layer: nn.Linear) -> None:
        nn.init.constant_(layer.bias, math.log(_RARE / (1 - _RARE)))

    @property
    def is_classifier(self) -> bool:
        return not self.text  # whose labels are vectors: `set_label_vectors`

    def forward(
        self, samples: Tensor, lengths: Tensor | None = None, *, state: AudioState | None = None
    ) -> AudioOutput:
        """samples: floating (B, T). lengths: int64 (B,), real samples of each row; None when all are. state: of the
        pieces before. Returns logits in y, zero beyond a row's tokens."""
        return self._logits(self.encoder(samples, lengths, state=state))

    def detect(self, features: Tensor, lengths: Tensor, *, start: Tensor | int = 0) -> AudioOutput:
        """Logits from the features of `encoder.features`; start: as of `AudioEncoder.encode`."""
        return self._logits(self.encoder.encode(features, lengths, start=start))

    def flush(self, state: AudioState) -> AudioOutput:
        """The logits that remain once the recordings have ended."""
        return self._logits(self.encoder.flush(state))

    def init_state(self, batch_size: int = 1, **arguments: Any) -> AudioState:
        """Before the first sample; arguments as `AudioEncoder.init_state`."""
        return self.encoder.init_state(batch_size, **arguments)

    def answer(self, y: Tensor) -> Tensor:
        """Logits (B, L, num_classes) of tokens y (B, L, dim), what the encoder gives."""
        return self.score(y, self.label_vectors) if self.text else self.out(self.drop(y))

    def set_label_vectors(self, vectors: Tensor) -> None:
        """The names of the labels as vectors, (num_classes, text_dim). Raises ValueError without a head of text."""
        self._check_text()
        if vectors.shape != self.label_vectors.shape:
            raise ValueError(f"vectors are {tuple(vectors.shape)}, expected {tuple(self.label_vectors.shape)}")
        self.label_vectors.copy_(F.normalize(vectors, dim=-1))

    def score(self, y: Tensor, vectors: Tensor) -> Tensor:
        """Logits (B, L, N) of tokens y (B, L, dim), what the encoder gives, for any words as vectors (N, text_dim).
        Raises ValueError without a head of text."""
        self._check_text()
        tokens = F.normalize(self.out(self.drop(y)), dim=-1)
        return self.scale.exp() * (tokens @ F.normalize(vectors, dim=-1).to(tokens.dtype).mT) + self.bias

    def _logits(self, out: AudioOutput) -> AudioOutput:
        y = self.answer(out.y)
        real = torch.arange(y.shape[1], device=y.device) < out.lengths.unsqueeze(1)
        return out._replace(y=y.masked_fill(~real.unsqueeze(-1), 0))

    def _check_text(self) -> None:
        if not self.text:
            raise ValueError('head="labels" knows its labels alone; words can be asked for with head="text"')


_ENCODER = frozenset(AudioEncoder.__init__.__annotations__) - {"return", "token_merging"}
_SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "tiny": ("two blocks of width 64", {"dim": 64, "depth": 2}),
    "small": ("four blocks of width 128", {"dim": 128, "depth": 4}),
    "base": ("eight blocks of width 384", {"dim": 384, "depth": 8}),
}
_HEADS = {"tiny": 4, "small": 4, "base": 6}
# Tokens of 40 ms: four frames of 10 ms.
_FRONT = {"name": "log_mel", "stack": 4, "norm": "fixed"}


def _family(family: str, what: str, task: str, paper: str, cls: type[_AudioModel]) -> None:
    sizes = {
        size: (
            f"{what}, any mixer (`mixer`), {shape}.",
            {**options, "mixer": {"name": "softmax", "num_heads": _HEADS[size]}},
        )
        for size, (shape, options) in _SIZES.items()
    }
    shared: dict[str, Any] = {"paper": paper, "mlp_ratio": 2.0, "position": "sinusoidal", "front_end": _FRONT}
    register_sizes(family, cls, sizes, module=__name__, task=task, **shared)


_family("audio_classifier", "Recordings in classes", "audio_classify", "arXiv:2104.01778", AudioClassifier)
_family("audio_detector", "Events in recordings", "audio_events", "arXiv:1702.06286", EventDetector)
