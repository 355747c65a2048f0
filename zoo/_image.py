"""What the image classifiers of the zoo share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ._features import ZooModel


class ImageClassifier(ZooModel):
    """A model from images (B, in_channels, H, W) to logits (B, num_classes).

    A subclass defines `embed` and builds `head`, a linear map, or the identity where num_classes is 0 (then the output
    is what `embed` gives). in_channels, img_size: of the images, in pixels; None where any size will do.
    """

    head: nn.Module
    in_channels: int
    img_size: int | tuple[int, int] | None = None

    def embed(self, images: Tensor) -> Tensor:
        """The pooled features (B, D) that the head reads."""
        raise NotImplementedError(f"{type(self).__name__} must define embed")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.embed(images))

    def _run_trunk(self, images: Tensor) -> Tensor:
        return self.embed(images)

    @property
    def input_spec(self) -> dict[str, Any]:
        return {
            "kind": "image",
            "channels": self.in_channels,
            "size": list(self.img_size) if isinstance(self.img_size, tuple) else self.img_size,
        }

    def example_inputs(self, batch_size: int = 1) -> tuple[Tensor]:
        """Images of the model's size, or of 64 pixels."""
        size = self.img_size or 64
        shape = (batch_size, self.in_channels, *((size, size) if isinstance(size, int) else size))
        return (torch.randn(shape, generator=torch.Generator().manual_seed(0)),)

    def _start_classifier(self, layer: nn.Linear) -> None:
        reset_vit_linear(layer)


def create_classifier(dim: int, num_classes: int) -> nn.Module:
    """A linear head, or the identity for num_classes=0. Raises ValueError for a negative number."""
    if num_classes < 0:
        raise ValueError(f"num_classes={num_classes} must be positive, or 0 for features instead of logits")
    return nn.Linear(dim, num_classes) if num_classes else nn.Identity()


def reset_vit_linear(model: nn.Module) -> None:
    """Every linear layer of `model` as vision transformers start: truncated normal of deviation 0.02, zero biases."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            nn.init.trunc_normal_(layer.weight, std=0.02)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
