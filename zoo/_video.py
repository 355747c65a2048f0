"""From frames to one vector a token: what the video models have in common."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks.backbone import Backbone, MixerChoice
from ..blocks.layers.norm import LayerNorm
from ..blocks.layers.positions import POSITIONS, LearnedPosition, SinusoidalPosition, create_position
from ..blocks.layers.time_tokens import FrameTimeEncoding
from ..blocks.registry import did_you_mean
from ._factorised import FactorisedBackbone
from ._frames import create_frame_encoder

LAYOUTS = ("frames", "joint", "factorised")


class VideoOutput(NamedTuple):
    """y: logits, (B, C) of a classifier, (B, T) of a grounder. boundaries: (B, T, 2), logits of start and end, or None.
    aux: scalar losses by name. mask: bool (B, T), True = real frame."""

    y: Tensor
    boundaries: Tensor | None
    aux: dict[str, Tensor]
    mask: Tensor


class VideoTokens(NamedTuple):
    """x: (B, L, D), L the product of the grid. grid: (T', h, w). mask: bool (B, T'), True = real step, None when all
    are. frames: T, of which `tubelet` make one step. aux: scalar losses by name."""

    x: Tensor
    grid: tuple[int, int, int]
    mask: Tensor | None
    frames: int
    aux: dict[str, Tensor]


class GridPosition(nn.Module):
    """A vector for each place of a picture, (h, w, D): sines of its row in the first half of the channels, of its
    column in the other, or the sum of two learned ones."""

    def __init__(self, kind: str, dim: int, max_side: int) -> None:
        super().__init__()
        self.dim, self.learned = dim, kind == "learned"
        if self.learned:
            self.rows, self.columns = LearnedPosition(dim, max_side), LearnedPosition(dim, max_side)
        else:
            self.rows, self.columns = SinusoidalPosition(dim // 2), SinusoidalPosition(dim - dim // 2)  # type: ignore[assignment]

    def forward(self, height: int, width: int, device: torch.device) -> Tensor:
        rows = self.rows(torch.arange(height, device=device).unsqueeze(0))[0].unsqueeze(1)
        columns = self.columns(torch.arange(width, device=device).unsqueeze(0))[0].unsqueeze(0)
        if self.learned:
            return rows + columns
        return torch.cat((rows.expand(-1, width, -1), columns.expand(height, -1, -1)), -1)


class VideoEncoder(nn.Module):
    """Frames to tokens (B, L, D): frame encoder -> linear map -> position and time -> mixers.

    encoder: what reads a frame, "features", "patches", a model of timm, or {"name": ..., **options}; see
    `create_frame_encoder`. layout: "frames", one token a frame (a grid of vectors is averaged); "joint", all vectors of
    all frames in one sequence, frame by frame, its mixers given the grid (T, h, w); "factorised", see
    `FactorisedBackbone`. mixer, dim, depth, ffn, mlp_ratio, norm, norm_eps, prenorm, causal, proj_drop, drop_path: of
    the backbone, as `Backbone` takes them. space_mixer: within a frame, for "factorised"; None: softmax. position: of
    the frame's number and of the place in it, "sinusoidal", "learned" or "none"; max_len: frames of the learned table,
    max_side: its rows and columns. time_encoding: options of `FrameTimeEncoding`, for frames that come with their times
    in seconds; {} for its defaults, None for none. input_norm: layer norm of the vectors before the linear map.
    input_drop: dropout after it.

    Frames that are pads, wherever they stand, and other rows change nothing. Raises ValueError for unknown names and
    options.
    """

    def __init__(
        self,
        *,
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
        time_encoding: Mapping[str, Any] | None = None,
        input_norm: bool = False,
        input_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        for name, choice, known in (("layout", layout, LAYOUTS), ("position", position, POSITIONS)):
            if choice not in known:
                raise ValueError(f"{name}={choice!r} is not a choice.{did_you_mean(str(choice), known)}")
        if space_mixer is not None and layout != "factorised":
            raise ValueError(f"space_mixer is for layout='factorised', here it is {layout!r}")
        self.dim, self.layout = dim, layout
        self.frame_encoder = create_frame_encoder(encoder)
        self.input_norm = LayerNorm(self.frame_encoder.dim) if input_norm else nn.Identity()
        self.proj = nn.Linear(self.frame_encoder.dim, dim)
        self.drop = nn.Dropout(input_drop)
        self.position = create_position(position, dim, max_len=max_len)
        flat = layout == "frames" or position == "none"
        self.grid_position = None if flat else GridPosition(position, dim, max_side)
        self.time_encoding = None if time_encoding is None else FrameTimeEncoding(dim, **time_encoding)
        options: dict[str, Any] = {
            "mixer": mixer,
            "ffn": ffn,
            "mlp_ratio": mlp_ratio,
            "norm": norm,
            "norm_eps": norm_eps,
            "prenorm": prenorm,
            "causal": causal,
            "proj_drop": proj_drop,
            "drop_path": drop_path,
        }
        self.backbone: Backbone | FactorisedBackbone
        if layout == "factorised":
            self.backbone = FactorisedBackbone(
                dim, depth, space_mixer="softmax" if space_mixer is None else space_mixer, **options
            )
        else:
            self.backbone = Backbone(dim, depth, final_norm=prenorm, **options)

    @property
    def tubelet(self) -> int:
        """Frames that make one step."""
        return self.frame_encoder.tubelet

    def forward(self, frames: Tensor, *, mask: Tensor | None = None, times: Tensor | None = None) -> VideoTokens:
        """frames: uint8 or floating in [0, 1] (B, T, H, W, 3), or what the encoder "features" takes, floating (B, T, F)
        or (B, T, h, w, F). mask: bool (B, T), True = real frame; None: all are. times: floating (B, T), seconds."""
        return self.mix(self.embed(frames, mask=mask, times=times))

    def embed(self, frames: Tensor, *, mask: Tensor | None = None, times: Tensor | None = None) -> VideoTokens:
        """The tokens before the mixers."""
        self._check(frames, mask, times)
        number, step = frames.shape[1], self.tubelet
        if mask is not None and bool(mask.all()):
            mask = None
        x = self.frame_encoder(frames, mask)
        if self.layout == "frames":
            x = x.mean((2, 3), keepdim=True)
        if mask is not None:
            mask = nn.functional.pad(mask, (0, -number % step)).unflatten(1, (-1, step)).any(2)
            x = x.masked_fill(~mask[:, :, None, None, None], 0)
        x = self.drop(self.proj(self.input_norm(x.to(self.proj.weight.dtype))))
        if self.position is not None:
            place = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
            if mask is not None:
                place = (mask.long().cumsum(1) - 1).clamp_min(0)
            x = x + self.position(place).to(x.dtype)[:, :, None, None]
        if self.grid_position is not None:
            x = x + self.grid_position(*x.shape[2:4], x.device).to(x.dtype)
        if self.time_encoding is not None:
            if times is None:
                raise ValueError("time_encoding needs the times (B, T) of the frames, in seconds")
            x = x + self.time_encoding(times[:, ::step]).to(x.dtype)[:, :, None, None]
        if mask is not None:
            x = x.masked_fill(~mask[:, :, None, None, None], 0)
        steps, height, width = x.shape[1:4]
        return VideoTokens(x.flatten(1, 3), (steps, height, width), mask, number, {})

    def mix(self, tokens: VideoTokens) -> VideoTokens:
        """The tokens after the mixers, zero at pads."""
        if isinstance(self.backbone, FactorisedBackbone):
            out = self.backbone(tokens.x, tokens.mask, tokens.grid)
        else:
            grid = tokens.grid if self.layout == "joint" else None
            out = self.backbone(tokens.x, mask=token_mask(tokens), grid=grid)
        return tokens._replace(x=out.y, aux=out.aux)

    def _check(self, frames: Tensor, mask: Tensor | None, times: Tensor | None) -> None:
        if frames.dim() < 3 or not frames.shape[1]:
            raise ValueError(f"frames have shape {tuple(frames.shape)}, expected (B, T, ...) with T of at least 1")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != frames.shape[:2]):
            raise ValueError(f"mask is {mask.dtype} {tuple(mask.shape)}, expected bool {tuple(frames.shape[:2])}")
        if times is not None and times.shape != frames.shape[:2]:
            raise ValueError(f"times have shape {tuple(times.shape)}, expected {tuple(frames.shape[:2])}")


def token_mask(tokens: VideoTokens) -> Tensor | None:
    """bool (B, L), True = token of a real step; None when all are."""
    if tokens.mask is None:
        return None
    return tokens.mask.repeat_interleave(tokens.grid[1] * tokens.grid[2], 1)


def per_frame(tokens: VideoTokens, tubelet: int) -> Tensor:
    """(B, T, D): the mean over the picture, the frames of a tubelet sharing theirs."""
    x = tokens.x.unflatten(1, tokens.grid).mean((2, 3))
    return x.repeat_interleave(tubelet, 1)[:, : tokens.frames]
