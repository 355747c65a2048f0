"""The front ends by name, and their frames in stacks."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..registry import did_you_mean
from .feature_norm import KINDS, FeatureNorm
from .front_end import FrontEnd
from .spectrogram import MFCC, LogMel
from .waveform import ConvStem, WaveformPatches

FRONT_ENDS: dict[str, type[FrontEnd]] = {
    "log_mel": LogMel,
    "mfcc": MFCC,
    "patches": WaveformPatches,
    "conv_stem": ConvStem,
}
_OWN = ("stack", "norm")
# Of those that learn their features: a width, and patches of 10 ms.
_WIDTH = 64


class StackedFrames(FrontEnd):
    """Each `stack` frames of another front end, one after the other, as one of stack * D features.

    Fewer tokens per second without a loss, as in Listen, Attend and Spell (arXiv:1508.01211) without its recurrence.
    inner: a front end without a norm. stack: frames, at least 1. tail: of the stack; the last one is filled with the
    frames of silence. norm: a `FeatureNorm` of stack * D features, or None.
    """

    def __init__(self, inner: FrontEnd, stack: int, *, tail: str = "drop", norm: FeatureNorm | None = None) -> None:
        if isinstance(stack, bool) or not isinstance(stack, int) or stack < 1:
            raise ValueError(f"stack={stack!r} must be a positive integer")
        if inner.norm is not None:
            raise ValueError("the frames of a stack are normalised as a stack: give norm to StackedFrames")
        super().__init__(
            stack * inner.dim,
            frame_length=inner.frame_length + (stack - 1) * inner.hop_length,
            hop_length=stack * inner.hop_length,
            sample_rate=inner.sample_rate,
            tail=tail,
            norm=norm,
        )
        self.inner, self.stack = inner, stack

    def frames(self, samples: Tensor) -> Tensor:
        return self.inner.frames(samples).unflatten(1, (-1, self.stack)).flatten(2)


def create_front_end(choice: str | Mapping[str, Any], *, sample_rate: int) -> StackedFrames:
    """A front end from its name, "log_mel", "mfcc", "patches" or "conv_stem", or {"name": ..., **options}.

    sample_rate: in Hz. Options are those of the class, and for all of them stack (frames in a token, 1), norm ("fixed",
    "affine", "utterance" or None) and tail, here "pad": no sample is left out. Without others, patches are of 10 ms and
    learned features 64 wide. Raises ValueError for unknown names and options, naming the nearest.
    """
    options: dict[str, Any] = {"name": choice} if isinstance(choice, str) else dict(choice)
    name = options.pop("name", None)
    if name not in FRONT_ENDS:
        raise ValueError(f"front_end={name!r} is unknown.{did_you_mean(str(name), FRONT_ENDS)}")
    cls = FRONT_ENDS[name]
    known = {*inspect.signature(cls.__init__).parameters} - {"self", "sample_rate", "device", "dtype"} | {*_OWN}
    for key in options:
        if key not in known:
            raise ValueError(f"the front end {name!r} has no option {key!r}.{did_you_mean(key, known)}")
    if name in ("patches", "conv_stem"):
        options.setdefault("dim", _WIDTH)
    if name == "patches":
        options.setdefault("patch_len", max(sample_rate // 100, 1))
    stack, kind, tail = options.pop("stack", 1), options.pop("norm", None), options.pop("tail", "pad")
    if kind is not None and kind not in KINDS:
        raise ValueError(f"front_end.norm={kind!r} is unknown.{did_you_mean(str(kind), KINDS)}")
    front = StackedFrames(cls(**options, sample_rate=sample_rate), stack, tail=tail)
    if kind is not None:
        front.norm = FeatureNorm(front.dim, kind)
    return front


@torch.no_grad()
def measure(front_end: FrontEnd, batches: Iterable[tuple[Tensor, Tensor | None]]) -> None:
    """Take the statistics of the norm ("fixed" or "affine") from recordings: samples (B, T) with lengths (B,) or None.

    Nothing for a front end without such a norm. Raises ValueError for fewer than two frames.
    """
    norm = front_end.norm
    if norm is None or norm.whole:
        return
    front_end.norm = None
    try:
        outputs = (front_end(samples, lengths=lengths) for samples, lengths in batches)
        norm.measure((out.features, out.lengths) for out in outputs)
    finally:
        front_end.norm = norm
