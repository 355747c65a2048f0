"""Classifiers of videos and grounders of moments over any mixer: frames -> `VideoEncoder` -> logits.

Both frames are ours, after what is usual: the classifier pools the tokens of a video and maps them to logits
(ViViT, arXiv:2103.15691); the grounder puts the query into every frame and answers frame by frame (span-based grounding
as VSLNet has it, arXiv:2004.13931). Sizes are ours.
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
from ._features import ZooModel
from ._frames import example_frames, frame_spec
from ._registry import register_sizes
from ._video import VideoEncoder, VideoOutput, per_frame, token_mask
from .classifier import POOLINGS, pool

# A first guess of how often a frame lies within the moment that is asked for.
_RARE = 0.1


class _VideoModel(ZooModel):
    """A `VideoEncoder` with a head."""

    encoder: VideoEncoder

    @property
    def feature_reduction(self) -> int:
        return self.encoder.tubelet

    @property
    def input_spec(self) -> dict[str, Any]:
        return frame_spec(self.encoder.frame_encoder)

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor, ...]:
        """Eight frames of what the encoder takes."""
        return (example_frames(self.encoder.frame_encoder, batch_size),)


class VideoClassifier(_VideoModel):
    """Frames (B, T, H, W, 3) or features (B, T, F) to logits (B, num_classes).

    pooling: "mean", "last" or "max" over the tokens of a video. head_drop: dropout before the last layer. All other
    options are those of `VideoEncoder`. config: set by `create_model`. Raises ValueError as `VideoEncoder` does, and
    for an unknown pooling.
    """

    def __init__(
        self,
        *,
        num_classes: int = 2,
        encoder: str | Mapping[str, Any] = "features",
        layout: str = "frames",
        mixer: MixerChoice | Sequence[MixerChoice] = "softmax",
        space_mixer: MixerChoice | Sequence[MixerChoice] | None = None,
        dim: int = 64,
        depth: int = 2,
        ffn: str | Callable[..., nn.Module] | None = "gelu",
        mlp_ratio: float | None = None,
        norm: str = "layernorm",
        norm_eps: float | None = None,
        prenorm: bool = True,
        position: str = "sinusoidal",
        max_len: int | None = None,
        max_side: int = 32,
        causal: bool = False,
        pooling: str = "mean",
        time_encoding: Mapping[str, Any] | None = None,
        input_norm: bool = False,
        input_drop: float = 0.0,
        head_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        options = {k: v for k, v in locals().items() if k in _ENCODER}
        super().__init__()
        if isinstance(num_classes, bool) or not isinstance(num_classes, int) or num_classes < 1:
            raise ValueError(f"num_classes={num_classes!r} must be a positive integer")
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is not a choice.{did_you_mean(pooling, POOLINGS)}")
        self.num_classes, self.pooling = num_classes, pooling
        self.encoder = VideoEncoder(**options)
        self.head = nn.Sequential(nn.Dropout(head_drop), nn.Linear(dim, num_classes))

    def forward(self, frames: Tensor, mask: Tensor | None = None, times: Tensor | None = None) -> VideoOutput:
        """frames: as of `VideoEncoder.forward`. mask: bool (B, T), True = real frame; None: all are. times: floating
        (B, T), seconds, for `time_encoding`. Returns logits in y; neither pads nor other rows change them."""
        out = self.embed(frames, mask, times)
        return out._replace(y=self.head(out.y))

    def embed(self, frames: Tensor, mask: Tensor | None = None, times: Tensor | None = None) -> VideoOutput:
        """The pooled vectors (B, dim) in y; arguments as of `forward`."""
        tokens = self.encoder(frames, mask=mask, times=times)
        y = pool(_wide(tokens.x), token_mask(tokens), self.pooling)
        return VideoOutput(y, None, tokens.aux, _frame_mask(frames, mask))

    def _run_trunk(self, frames: Tensor, mask: Tensor | None = None, times: Tensor | None = None) -> VideoOutput:
        return self.embed(frames, mask, times)


class VideoGrounder(_VideoModel):
    """Frames or features, and a query as a vector (B, query_dim), to logits of each frame: whether it lies within the
    moment that the query means (B, T), and whether it is its first or its last one (B, T, 2).

    The query q enters every token before the mixers, x <- W [x, q, x q], and once more in the head, which reads
    [y, y q]; what leads to a frame's answer is thus a product of what is seen and what is asked. similarity: where
    features and queries are of one space (encoder.dim = query_dim), the logits also get s cos(f_t, q) of the given
    features, s learned, from 0. Boundaries make spans with `best_spans`. query_dim: width of the queries. All other
    options are those of `VideoEncoder`. config: set by `create_model`. Raises ValueError as `VideoEncoder` does.
    """

    def __init__(
        self,
        *,
        query_dim: int = 384,
        encoder: str | Mapping[str, Any] = "features",
        layout: str = "frames",
        mixer: MixerChoice | Sequence[MixerChoice] = "softmax",
        space_mixer: MixerChoice | Sequence[MixerChoice] | None = None,
        dim: int = 64,
        depth: int = 2,
        ffn: str | Callable[..., nn.Module] | None = "gelu",
        mlp_ratio: float | None = None,
        norm: str = "layernorm",
        norm_eps: float | None = None,
        prenorm: bool = True,
        position: str = "sinusoidal",
        max_len: int | None = None,
        max_side: int = 32,
        causal: bool = False,
        similarity: bool = True,
        time_encoding: Mapping[str, Any] | None = None,
        input_norm: bool = False,
        input_drop: float = 0.0,
        head_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        options = {k: v for k, v in locals().items() if k in _ENCODER}
        super().__init__()
        if isinstance(query_dim, bool) or not isinstance(query_dim, int) or query_dim < 1:
            raise ValueError(f"query_dim={query_dim!r} must be a positive integer")
        self.query_dim = query_dim
        self.encoder = VideoEncoder(**options)
        self.query_proj = nn.Linear(query_dim, dim)
        self.fuse = nn.Linear(3 * dim, dim)
        self.drop = nn.Dropout(head_drop)
        self.head = nn.Linear(2 * dim, 3)
        nn.init.constant_(self.head.bias[:1], math.log(_RARE / (1 - _RARE)))
        frames = self.encoder.frame_encoder
        shared = similarity and not frames.pixels and frames.dim == query_dim
        self.similarity = nn.Parameter(torch.zeros(3)) if shared else None

    def forward(
        self, frames: Tensor, query: Tensor, mask: Tensor | None = None, times: Tensor | None = None
    ) -> VideoOutput:
        """frames, mask, times: as of `VideoClassifier.forward`. query: floating (B, query_dim). Returns logits in y
        (B, T) and boundaries (B, T, 2), start and end, all 0 at pads; neither pads nor other rows change the rest."""
        if query.dim() != 2 or query.shape != (frames.shape[0], self.query_dim):
            raise ValueError(f"query has shape {tuple(query.shape)}, expected ({len(frames)}, {self.query_dim})")
        tokens = self.encoder.embed(frames, mask=mask, times=times)
        q = self.query_proj(query.to(self.query_proj.weight.dtype)).unsqueeze(1)
        x = self.fuse(torch.cat((tokens.x, q.expand_as(tokens.x), tokens.x * q), -1))
        real = token_mask(tokens)
        if real is not None:
            x = x.masked_fill(~real.unsqueeze(-1), 0)
        out = self.encoder.mix(tokens._replace(x=x))
        y = _wide(per_frame(out, self.encoder.tubelet))
        logits = self.head(self.drop(torch.cat((y, y * q), -1)))
        if self.similarity is not None:
            given = frames if frames.dim() == 3 else frames.mean((2, 3))
            alike = F.cosine_similarity(given.to(logits.dtype), query.to(logits.dtype).unsqueeze(1), dim=-1)
            logits = logits + alike.unsqueeze(-1) * self.similarity
        if mask is not None:
            logits = logits.masked_fill(~mask.unsqueeze(-1), 0)
        return VideoOutput(logits[..., 0], logits[..., 1:], out.aux, _frame_mask(frames, mask))

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor, ...]:
        """Eight frames of what the encoder takes, and a query."""
        query = torch.randn(batch_size, self.query_dim, generator=torch.Generator().manual_seed(1))
        return (*super().example_inputs(batch_size), query)


def best_spans(boundaries: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The likeliest span of each row: first and last frame i <= j with the largest product of the probabilities that i
    is the first and j the last, softmax over the real frames (VSLNet, arXiv:2004.13931). Returns int64 (B, 2) and the
    products, floating (B,).

    boundaries: (B, T, 2), logits. mask: bool (B, T), True = real frame; a row needs one.
    """
    logits = boundaries.float()
    if mask is not None:
        logits = logits.masked_fill(~mask.unsqueeze(-1), -torch.inf)
    log = logits.log_softmax(1)
    # the likeliest first frame up to each frame, then the likeliest last one: linear in T
    first, place = log[..., 0].cummax(1)
    best, last = (first + log[..., 1]).max(1)
    row = torch.arange(len(last), device=last.device)
    return torch.stack((place[row, last], last), 1), best.exp()


def _wide(x: Tensor) -> Tensor:
    """Means of many terms are never in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _frame_mask(frames: Tensor, mask: Tensor | None) -> Tensor:
    return torch.ones(frames.shape[:2], dtype=torch.bool, device=frames.device) if mask is None else mask


_ENCODER = frozenset(VideoEncoder.__init__.__annotations__) - {"return"}
_SIZES: dict[str, tuple[str, dict[str, int]]] = {
    "tiny": ("two blocks of width 64", {"dim": 64, "depth": 2}),
    "small": ("four blocks of width 128", {"dim": 128, "depth": 4}),
    "base": ("eight blocks of width 384", {"dim": 384, "depth": 8}),
}
_HEADS = {"tiny": 4, "small": 4, "base": 6}


def _family(family: str, what: str, task: str, paper: str, cls: type[_VideoModel]) -> None:
    sizes = {
        size: (
            f"{what}, any mixer (`mixer`), {shape}.",
            {**options, "mixer": {"name": "softmax", "num_heads": _HEADS[size]}},
        )
        for size, (shape, options) in _SIZES.items()
    }
    shared: dict[str, Any] = {"paper": paper, "mlp_ratio": 2.0, "encoder": {"name": "features", "dim": 512}}
    register_sizes(family, cls, sizes, module=__name__, task=task, input_norm=True, **shared)


_family("video_classifier", "Videos in classes", "video_classify", "arXiv:2103.15691", VideoClassifier)
_family("video_grounder", "Moments in videos", "video_grounding", "arXiv:2004.13931", VideoGrounder)
