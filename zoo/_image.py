"""What the image classifiers of the zoo share."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn


class ImageClassifier(nn.Module):
    """A model from images (B, in_channels, H, W) to logits (B, num_classes).

    A subclass defines `forward_features` and builds `head`, a linear map, or the identity where num_classes is 0 (then
    the output is the features). config: set by `create_model`.
    """

    head: nn.Module
    config: dict[str, Any]

    def forward_features(self, images: Tensor) -> Tensor:
        """The features (B, D) that the head reads."""
        raise NotImplementedError(f"{type(self).__name__} must define forward_features")

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.forward_features(images))


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
