"""From frames to vectors: given features, patches of pixels, or any image model of timm."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ._timm import feature_map, fit_weights, import_timm, read_weights

# Models of ours; every other name is one of timm.
OWN = ("features", "patches")


class FrameEncoder(nn.Module):
    """What a frame encoder is: frames to vectors on a grid, (B, T', h, w, `dim`).

    `tubelet` frames make one step, T' = ceil(T / tubelet); `pixels` says that it takes pictures and no features.
    """

    dim: int
    tubelet: int = 1
    pixels: bool = True

    def forward(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        """frames: as the class says. mask: bool (B, T), True = real frame; what the others give does not matter."""
        raise NotImplementedError(f"{type(self).__name__} must define forward")


class GivenFeatures(FrameEncoder):
    """Vectors that a frozen encoder made: (B, T, dim), or on a grid (B, T, h, w, dim)."""

    pixels = False

    def __init__(self, *, dim: int = 512) -> None:
        super().__init__()
        self.dim = _whole("encoder.dim", dim)

    def forward(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        if frames.dim() not in (3, 5) or frames.shape[-1] != self.dim or not frames.is_floating_point():
            raise ValueError(
                f"features are {frames.dtype} {tuple(frames.shape)}, expected floating (B, T, {self.dim}) or "
                f"(B, T, h, w, {self.dim}): encoder.dim={self.dim}"
            )
        return frames if frames.dim() == 5 else frames[:, :, None, None]


class PixelPatches(FrameEncoder):
    """Pixels of tubelets: pictures (B, T, H, W, 3), uint8 or floating in [0, 1], scaled to [-1, 1], cut into blocks of
    `tubelet` frames and patch_size x patch_size pixels; the linear map that follows makes them the tubelet embedding of
    ViViT (arXiv:2103.15691), patches of single frames with tubelet=1.

    image_size: side or (H, W) that pictures are scaled to, None: as they are. Missing frames at the end of a tubelet
    are grey. Raises ValueError for pictures that patches do not cover.
    """

    def __init__(self, *, patch_size: int = 16, tubelet: int = 1, image_size: int | list[int] | None = None) -> None:
        super().__init__()
        self.patch_size, self.tubelet = _whole("encoder.patch_size", patch_size), _whole("encoder.tubelet", tubelet)
        self.image_size = _size(image_size)
        self.dim = 3 * self.tubelet * self.patch_size**2

    def forward(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        x = _resized(_pictures(frames), self.image_size) * 2 - 1
        if mask is not None:
            x = x.masked_fill(~mask[:, :, None, None, None], 0)
        p, t = self.patch_size, self.tubelet
        for name, side in (("high", x.shape[2]), ("wide", x.shape[3])):
            if side % p:
                raise ValueError(
                    f"pictures are {side} pixels {name}, not a multiple of encoder.patch_size={p}; encoder.image_size="
                    f"{max(p, side // p * p)} scales them"
                )
        x = F.pad(x, (0, 0, 0, 0, 0, 0, 0, -x.shape[1] % t))
        x = x.unflatten(3, (-1, p)).unflatten(2, (-1, p)).unflatten(1, (-1, t))
        return x.permute(0, 1, 3, 5, 2, 4, 6, 7).flatten(4)


class TimmFrames(FrameEncoder):
    """An image model of timm on each frame: pictures (B, T, H, W, 3), uint8 or floating in [0, 1].

    name: of the model. weights: None for a random start (a saved model brings its own), "hub" for the published ones, a
    local .safetensors or .pth file with its state dict. frozen: never trained, in eval mode, without gradients; False
    trains it. grid: its feature map (h, w), False: pooled. image_size: side or (H, W) that frames are scaled to, None:
    the model's own. frame_batch: frames at a time. Only real frames are read. Raises ValueError for an unknown model
    and for weights that do not fit, ImportError without timm.
    """

    def __init__(
        self,
        name: str,
        *,
        weights: str | None = None,
        frozen: bool = True,
        grid: bool = False,
        image_size: int | list[int] | None = None,
        frame_batch: int = 64,
    ) -> None:
        super().__init__()
        timm = import_timm()
        if name not in timm.list_models():
            close = timm.list_models(f"*{name.split('_')[0]}*")[:4]
            hint = f" Models of timm like it: {', '.join(close)}." if close else ""
            raise ValueError(f"encoder={name!r} is neither {' nor '.join(OWN)} nor a model of timm.{hint}")
        self.model = timm.create_model(name, pretrained=weights == "hub", num_classes=0)
        if weights not in (None, "hub"):
            path = Path(str(weights))
            fit_weights(self.model, read_weights(path), path, name)
        self.frozen, self.grid, self.frame_batch = frozen, grid, _whole("encoder.frame_batch", frame_batch)
        own: Mapping[str, Any] = self.model.pretrained_cfg
        self.image_size = _size(image_size) or tuple(own.get("input_size", (3, 224, 224))[1:])
        self.register_buffer("mean", torch.tensor(own.get("mean", (0.5,) * 3)), persistent=False)
        self.register_buffer("std", torch.tensor(own.get("std", (0.5,) * 3)), persistent=False)
        self.dim = int(self.model.num_features if grid else getattr(self.model, "head_hidden_size", 0) or 0)
        self.dim = self.dim or int(self.model.num_features)
        if frozen:
            self.model.requires_grad_(False)
            self.model.eval()

    mean: Tensor
    std: Tensor

    def train(self, mode: bool = True) -> TimmFrames:
        super().train(mode)
        if self.frozen:
            self.model.eval()
        return self

    def forward(self, frames: Tensor, mask: Tensor | None) -> Tensor:
        _check_pictures(frames)
        real = frames.flatten(0, 1) if mask is None else frames[mask]
        if torch.compiler.is_exporting():  # the number of parts would be a part of the program
            parts = [self._encode(real)]
        else:
            parts = [self._encode(part) for part in real.split(self.frame_batch)] if len(real) else []
        found = torch.cat(parts) if parts else self.mean.new_zeros(0, 1, 1, self.dim)
        if mask is None:
            return found.unflatten(0, frames.shape[:2])
        whole = found.new_zeros(*mask.shape, *found.shape[1:])
        return whole.masked_scatter(mask[:, :, None, None, None], found)

    def _encode(self, pictures: Tensor) -> Tensor:
        """(N, H, W, 3) to (N, h, w, dim)."""
        x = _resized(_pictures(pictures).unsqueeze(0), self.image_size)[0].to(self.mean.dtype)
        x = ((x - self.mean) / self.std).permute(0, 3, 1, 2)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            y = self.model.forward_features(x)
            if not self.grid:
                return self.model.forward_head(y, pre_logits=True).flatten(1)[:, None, None]
        return feature_map(self.model, y, *x.shape[2:])


def create_frame_encoder(encoder: str | Mapping[str, Any]) -> FrameEncoder:
    """encoder: "features", "patches", the name of a model of timm, or {"name": ..., **options} of the class. Raises
    ValueError for a name or an option that there is not."""
    options = {"name": encoder} if isinstance(encoder, str) else dict(encoder)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise ValueError(f"encoder={encoder!r} has no name; {', '.join(OWN)} or a model of timm")
    cls: Callable[..., FrameEncoder] = {"features": GivenFeatures, "patches": PixelPatches}.get(name, TimmFrames)
    known = [key for key in cls.__init__.__annotations__ if key not in ("name", "return")]
    for key in options:
        if key not in known:
            raise ValueError(f"encoder {name!r} has no option {key!r}; its options: {', '.join(known)}")
    return TimmFrames(name, **options) if cls is TimmFrames else cls(**options)


def frame_spec(encoder: FrameEncoder) -> dict[str, Any]:
    """What a frame encoder takes, as plain values."""
    if not encoder.pixels:
        return {"kind": "frame features", "dim": encoder.dim}
    size = getattr(encoder, "image_size", None)
    return {"kind": "frames", "channels": 3, "size": None if size is None else list(size)}


def example_frames(encoder: FrameEncoder, batch_size: int = 1) -> Tensor:
    """Eight frames that it takes, random but the same every time; pictures of its size, or of four patches."""
    state = torch.Generator().manual_seed(0)
    if not encoder.pixels:
        return torch.randn(batch_size, 8, encoder.dim, generator=state)
    size = getattr(encoder, "image_size", None) or (2 * getattr(encoder, "patch_size", 16),) * 2
    return torch.rand(batch_size, 8, *size, 3, generator=state)


def _check_pictures(frames: Tensor) -> None:
    kind = frames.dtype == torch.uint8 or frames.is_floating_point()
    if frames.dim() < 4 or frames.shape[-1] != 3 or not kind:
        raise ValueError(
            f"frames are {frames.dtype} {tuple(frames.shape)}, expected uint8 or floating in [0, 1] (B, T, H, W, 3)"
        )


def _pictures(frames: Tensor) -> Tensor:
    """Floating in [0, 1]."""
    _check_pictures(frames)
    return frames.float() / 255 if frames.dtype == torch.uint8 else frames


def _resized(frames: Tensor, size: tuple[int, ...] | None) -> Tensor:
    """(B, T, H, W, 3) at another size, bilinear and antialiased."""
    if size is None or tuple(frames.shape[2:4]) == tuple(size):
        return frames
    x = frames.flatten(0, 1).permute(0, 3, 1, 2)
    x = F.interpolate(x, size=tuple(size), mode="bilinear", antialias=True, align_corners=False)
    return x.permute(0, 2, 3, 1).unflatten(0, frames.shape[:2])


def _size(size: int | list[int] | tuple[int, ...] | None) -> tuple[int, ...] | None:
    if size is None:
        return None
    sides = (size, size) if isinstance(size, int) else tuple(size)
    if len(sides) != 2 or min(sides) < 1:
        raise ValueError(f"encoder.image_size={size} must be a side or (H, W), in pixels")
    return sides


def _whole(name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name}={value!r} must be a positive integer")
    return value
