"""Features learned from the samples themselves: patches of the waveform, and a stem of strided convolutions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..registry import did_you_mean
from .feature_norm import FeatureNorm
from .front_end import FrontEnd

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}
STEM_NORMS = ("layer", "none")


class WaveformPatches(FrontEnd):
    """A linear map of each patch of samples: y_i = W x[i stride : i stride + patch_len] + b.

    As images are cut into patches (arXiv:2010.11929, eq. 1), in one dimension. dim: D. patch_len, stride: in samples,
    the stride patch_len by default. sample_rate: in Hz. tail, norm: see `FrontEnd` and `FeatureNorm`.
    """

    def __init__(
        self,
        dim: int,
        *,
        sample_rate: int,
        patch_len: int,
        stride: int | None = None,
        bias: bool = True,
        tail: str = "drop",
        norm: FeatureNorm | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        hop = patch_len if stride is None else stride
        super().__init__(dim, frame_length=patch_len, hop_length=hop, sample_rate=sample_rate, tail=tail, norm=norm)
        self.proj = nn.Linear(patch_len, dim, bias=bias, device=device, dtype=dtype)

    def frames(self, samples: Tensor) -> Tensor:
        patches = samples.unfold(1, self.frame_length, self.hop_length)
        return self.proj(patches.to(self.proj.weight.dtype))


class ConvStem(FrontEnd):
    """Strided convolutions of the waveform, x <- act(norm(conv(x))): the encoder of wav2vec 2.0, arXiv:2006.11477.

    dim: channels of the last layer, D. channels: of those before (default dim). kernel_sizes, strides: of each layer;
    the defaults are the paper's, a frame of 400 samples every 320. norm_layers: "layer" normalises the channels at each
    step, "none" does not. The paper's base model normalises its first layer over the whole recording instead
    ("group"), which cannot stream and is refused. activation: "gelu", "silu" or "relu". bias: of the convolutions.
    tail, norm: see `FrontEnd` and `FeatureNorm`. No layer pads, so a frame depends on its own samples alone.
    Weights start Kaiming-normal, biases zero. Raises ValueError for values outside these.
    """

    def __init__(
        self,
        dim: int,
        *,
        sample_rate: int,
        channels: int | None = None,
        kernel_sizes: Sequence[int] = (10, 3, 3, 3, 3, 2, 2),
        strides: Sequence[int] = (5, 2, 2, 2, 2, 2, 2),
        norm_layers: str = "layer",
        activation: str = "gelu",
        bias: bool = True,
        tail: str = "drop",
        norm: FeatureNorm | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        frame, hop = receptive_field(kernel_sizes, strides)
        if norm_layers == "group":
            raise ValueError(
                'norm_layers="group" takes statistics of whole recordings, so it cannot stream; norms that can: '
                + ", ".join(STEM_NORMS)
            )
        if norm_layers not in STEM_NORMS:
            raise ValueError(f"norm_layers={norm_layers!r} is unknown.{did_you_mean(norm_layers, STEM_NORMS)}")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is unknown.{did_you_mean(activation, _ACTIVATIONS)}")
        super().__init__(dim, frame_length=frame, hop_length=hop, sample_rate=sample_rate, tail=tail, norm=norm)
        self.activation = activation
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = dim if channels is None else channels
        widths = [1, *[inner] * (len(kernel_sizes) - 1), dim]
        self.convs = nn.ModuleList(
            nn.Conv1d(widths[i], widths[i + 1], kernel, stride=stride, bias=bias, **where)
            for i, (kernel, stride) in enumerate(zip(kernel_sizes, strides, strict=True))
        )
        self.norms = nn.ModuleList(
            nn.LayerNorm(width, **where) if norm_layers == "layer" else nn.Identity() for width in widths[1:]
        )
        for conv in self.convs:
            nn.init.kaiming_normal_(conv.weight)  # type: ignore[arg-type]
            if bias:
                nn.init.zeros_(conv.bias)  # type: ignore[arg-type]

    def frames(self, samples: Tensor) -> Tensor:
        act = _ACTIVATIONS[self.activation]
        x = samples.unsqueeze(1).to(self.convs[0].weight.dtype)  # type: ignore[arg-type]
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = act(norm(conv(x).transpose(1, 2)).transpose(1, 2))
        return x.transpose(1, 2)


def receptive_field(kernel_sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, int]:
    """Inputs that one output of a stack of strided convolutions reads, and inputs from one output to the next:
    1 + sum_i (k_i - 1) prod_{j < i} s_j, and prod_i s_i. Raises ValueError for none, unequal numbers, sizes below 1 and
    a stride above its kernel, which would leave inputs unread."""
    if not kernel_sizes or len(kernel_sizes) != len(strides):
        raise ValueError(f"{len(kernel_sizes)} kernel_sizes and {len(strides)} strides: equal numbers, one at least")
    field, hop = 1, 1
    for kernel, stride in zip(kernel_sizes, strides, strict=True):
        if not 1 <= stride <= kernel:
            raise ValueError(f"stride={stride} must be between 1 and its kernel size {kernel}")
        field += (kernel - 1) * hop
        hop *= stride
    return field, hop
