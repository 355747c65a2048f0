"""ViS4mer: state spaces over the tokens of a long video, ever fewer of them (arXiv:2204.01692, ECCV 2022).

Islam and Bertasius, section 3: frozen features of frames, then three stages, each
    z = norm(x);  x = x + drop(S4(z));  x = GELU(W average of each two tokens of x),
so that length and width halve; then the mean over time and a linear map. S4 is causal there and ends in gelu, dropout
of whole channels and a linear map of its own, as in the released code.

Ours: S4D (arXiv:2206.11893) in place of S4, with the imaginary parts of HiPPO-LegS and its B, diagonal without the
correction of rank one; the released model holds an input map that it does not use where widths are equal, ours has
none then. A mean over tokens is one over real tokens, and an odd last token is a pair of its own; `parity=True` does as
released: missing tokens are zeros that count, an odd last token is dropped.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..blocks.layers.norm import LayerNorm
from ..blocks.layers.rows import rank_order, take
from ..blocks.mixers.s4d import S4D
from ._features import ZooModel
from ._frames import create_frame_encoder, example_frames, frame_spec
from ._registry import register_sizes
from ._video import VideoOutput
from .classifier import pool

PAPER = "arXiv:2204.01692"


class ViS4merStage(nn.Module):
    """S4 with its residual, then half as many tokens of half the width: (B, L, D) to (B, ceil(L / 2), D / 2)."""

    def __init__(self, dim: int, *, d_state: int, init: str, causal: bool, drop: float) -> None:
        super().__init__()
        options: Any = {"init": init, "train_b": True, "output": "linear"}
        self.norm = LayerNorm(dim)
        self.mixer = S4D(dim, d_state=d_state, causal=causal, drop=drop, **options)
        self.drop = nn.Dropout1d(drop)
        self.proj = nn.Linear(dim, dim // 2)
        self.grad_checkpointing = False

    def mix(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """x + drop(S4(norm(x)))."""
        z = self.mixer(self.norm(x), mask=mask).y
        return x + self.drop(z.transpose(1, 2)).transpose(1, 2)

    def forward(self, x: Tensor, mask: Tensor | None, parity: bool) -> tuple[Tensor, Tensor | None]:
        """mask: bool (B, L), True = real token, which come first. Returns the tokens and their mask."""
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            x = checkpoint(self.mix, x, mask, use_reentrant=False)
        else:
            x = self.mix(x, mask)
        if parity:
            return F.gelu(self.proj(F.avg_pool1d(x.transpose(1, 2), 2).transpose(1, 2))), None
        x, mask = halve(x, mask)
        y = F.gelu(self.proj(x))
        return (y if mask is None else y.masked_fill(~mask.unsqueeze(-1), 0)), mask


class ViS4mer(ZooModel):
    """Features (B, L, F) or frames to logits (B, num_classes).

    encoder: what reads a frame, as `create_frame_encoder` takes it; all vectors of all frames are tokens. Published:
    features of width 1024, of 60 frames with 197 tokens each. dim: width of the first stage; a linear map comes before
    where the vectors have another. num_stages: each halves length and width. d_state, init, causal: of `S4D`. drop: in
    S4 and behind it. parity: see above. config: set by `create_model`. Raises ValueError for a width that cannot be
    halved so often, and with parity for fewer tokens than stages can halve.
    """

    no_features = "its stages merge tokens; embed gives the vector of a video"
    mixers = ("s4d",)

    def __init__(
        self,
        *,
        num_classes: int = 2,
        encoder: str | Mapping[str, Any] = "features",
        dim: int = 1024,
        num_stages: int = 3,
        d_state: int = 64,
        init: str = "legs",
        causal: bool = True,
        drop: float = 0.2,
        parity: bool = False,
    ) -> None:
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes={num_classes!r} must be a positive integer")
        if num_stages < 1 or dim < 1 or dim % 2**num_stages:
            raise ValueError(f"dim={dim} must be a multiple of 2^num_stages = {2**num_stages}: each stage halves it")
        self.num_classes, self.dim, self.parity = num_classes, dim, parity
        self.frame_encoder = create_frame_encoder(encoder)
        width = self.frame_encoder.dim
        self.proj = nn.Identity() if width == dim else nn.Linear(width, dim)
        self.stages = nn.ModuleList(
            ViS4merStage(dim >> i, d_state=d_state, init=init, causal=causal, drop=drop) for i in range(num_stages)
        )
        self.head = nn.Linear(dim >> num_stages, num_classes)

    @property
    def input_spec(self) -> dict[str, Any]:
        return frame_spec(self.frame_encoder)

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor, ...]:
        """Eight frames of what the encoder takes."""
        return (example_frames(self.frame_encoder, batch_size),)

    @property
    def first(self) -> ViS4merStage:
        """The stage that reads the tokens."""
        return self.stages[0]  # type: ignore[return-value]

    def forward(self, frames: Tensor, mask: Tensor | None = None, times: Tensor | None = None) -> VideoOutput:
        """frames: as of `VideoEncoder.forward`. mask: bool (B, T), True = real frame; None: all are. times: not used.
        Returns logits in y; without parity neither pads, wherever they stand, nor other rows change them."""
        out = self.embed(frames, mask, times)
        return out._replace(y=self.head(out.y))

    def embed(self, frames: Tensor, mask: Tensor | None = None, times: Tensor | None = None) -> VideoOutput:
        """The mean over the last tokens, (B, dim / 2^num_stages), in y; arguments as of `forward`."""
        x, real = self.tokens(frames, mask)
        y = self.encode(x, real)
        seen = torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device) if mask is None else mask
        return VideoOutput(y, None, {}, seen)

    def tokens(self, frames: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """(B, L, dim), real tokens first, and which are real, bool (B, L), None when all are."""
        if mask is not None and (mask.dtype != torch.bool or mask.shape != frames.shape[:2]):
            raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, expected bool {tuple(frames.shape[:2])}")
        if mask is not None and bool(mask.all()):
            mask = None
        x = self.frame_encoder(frames, mask)
        step, places = self.frame_encoder.tubelet, x.shape[2] * x.shape[3]
        x = x.flatten(1, 3)
        if mask is not None:
            mask = F.pad(mask, (0, -mask.shape[1] % step)).unflatten(1, (-1, step)).any(2).repeat_interleave(places, 1)
            x = x.masked_fill(~mask.unsqueeze(-1), 0)
        weight = self.first.proj.weight
        x = self.proj(x.to(weight.dtype))
        if mask is None or self.parity:
            return x, None
        order, _, number = rank_order(mask)
        return take(x, order), torch.arange(x.shape[1], device=x.device) < number.unsqueeze(1)

    def encode(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """From what `tokens` gives to a vector of each row."""
        for stage in self.stages:
            if self.parity and x.shape[1] < 2:
                raise ValueError(f"parity=True: {len(self.stages)} stages need {2 ** len(self.stages)} tokens or more")
            x, mask = stage(x, mask, self.parity)
        wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
        return pool(wide, mask, "mean")


def halve(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The mean of tokens 2i and 2i + 1, of those that are real: (B, L, D) to (B, ceil(L / 2), D). mask: bool (B, L),
    True = real token, None: all are."""
    odd = x.shape[1] % 2
    if mask is None:
        pairs = F.pad(x, (0, 0, 0, odd)).unflatten(1, (-1, 2)).sum(2)
        count = pairs.new_full((pairs.shape[1], 1), 2.0)
        count[-1] -= odd
        return pairs / count, None
    pairs = F.pad(x.masked_fill(~mask.unsqueeze(-1), 0), (0, 0, 0, odd)).unflatten(1, (-1, 2)).sum(2)
    real = F.pad(mask, (0, odd)).unflatten(1, (-1, 2)).sum(2)
    return pairs / real.clamp_min(1).unsqueeze(-1), real > 0


SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "tiny": ("three stages from width 64", {"dim": 64}),
    "small": ("three stages from width 256", {"dim": 256}),
    "base": ("three stages from width 1024, as published", {"dim": 1024}),
}

register_sizes(
    "vis4mer",
    ViS4mer,
    {size: (f"ViS4mer: long videos in classes, {shape}.", options) for size, (shape, options) in SIZES.items()},
    module=__name__,
    task="video_classify",
    paper=PAPER,
    encoder={"name": "features", "dim": 1024},
)
