"""BiFormer: a pyramid of convolutions and bi-level routing attention for images (arXiv:2303.08810, CVPR 2023).

Zhu et al., section 3.3 and appendix: four stages at 1/4, 1/8, 1/16 and 1/32 of the image. A block is x + DWConv3x3(x),
then x + attention(norm(x)), then x + MLP(norm(x)). The attention is `bi_level_routing` on 7 x 7 regions, with 1, 4 and
16 routed regions in the first three stages, and full attention in the last.

As in the published code of the released weights: in the last stage the heads are 8 whatever the width, q, k and v have
no bias, the scores are scaled by the root of the head's width, and the convolution of the local context reads the input
of the attention, not its values. Ours: images of any size (windows at the edge are partial; the published code pads).

Compared with the published model (tiny) on copied weights and a 224 x 224 image: largest difference of the logits
4.4e-15 in float64, 1.4e-6 in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..blocks.block import DropPath
from ..blocks.layers.ffn import GeluMLP
from ..blocks.mixers.bi_level_routing import BiLevelRouting
from ._features import Trunk
from ._image import ImageClassifier, create_classifier, reset_vit_linear
from ._registry import register_model

PAPER = "arXiv:2303.08810"


class _FullAttention(nn.Module):
    """Attention among all tokens of a grid plus a depthwise convolution of its input: (B, L, D) -> (B, L, D)."""

    def __init__(self, dim: int, lce_kernel: int, num_heads: int = 8) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv_proj = nn.Linear(dim, 3 * dim, bias=False)
        self.lce = nn.Conv2d(dim, dim, lce_kernel, padding=lce_kernel // 2, groups=dim)
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        q, k, v = self.qkv_proj(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        local = self.lce(x.transpose(1, 2).unflatten(2, grid)).flatten(2).transpose(1, 2)
        return self.out_proj(y + local)


class _Block(nn.Module):
    """Position, attention and feed-forward, each a residual branch: (B, D, H, W) -> (B, D, H, W).

    topk: routed regions, 0 for attention among all tokens.
    """

    def __init__(
        self,
        dim: int,
        *,
        topk: int,
        num_regions: int,
        head_dim: int,
        lce_kernel: int,
        mlp_ratio: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.position = nn.Conv2d(dim, dim, 3, padding=1, groups=dim)
        self.norm_mixer = nn.LayerNorm(dim, eps=1e-6)
        self.mixer: nn.Module
        if topk:
            self.mixer = BiLevelRouting(
                dim,
                num_heads=dim // head_dim,
                spatial=True,
                num_regions=num_regions,
                topk=topk,
                lce_kernel=lce_kernel,
            )
        else:
            self.mixer = _FullAttention(dim, lce_kernel)
        self.norm_ffn = nn.LayerNorm(dim, eps=1e-6)
        self.ffn = GeluMLP(dim, mlp_ratio)
        self.drop_path = DropPath(drop_path)
        self.grad_checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(self._mix, x, use_reentrant=False)
        return self._mix(x)

    def _mix(self, x: Tensor) -> Tensor:
        x = x + self.position(x)
        grid = x.shape[2], x.shape[3]
        tokens = x.flatten(2).transpose(1, 2)
        mixed = self.norm_mixer(tokens)
        mixed = self.mixer(mixed, grid=grid).y if isinstance(self.mixer, BiLevelRouting) else self.mixer(mixed, grid)
        tokens = tokens + self.drop_path(mixed)
        tokens = tokens + self.drop_path(self.ffn(self.norm_ffn(tokens)))
        return tokens.transpose(1, 2).unflatten(2, grid)


class BiFormer(ImageClassifier):
    """Images (B, in_channels, H, W) to logits (B, num_classes).

    dims, depths, topks: width, blocks and routed regions of each stage, 0 for full attention (then dims is a multiple
    of 8). head_dim: width of a head where regions are routed. num_regions: regions along each side of the grid.
    mlp_ratio: of the feed-forwards. lce_kernel: taps of the convolution beside the attention. drop_path: of the last
    block, growing linearly from 0; the authors trained the small model with 0.15. num_classes=0: the features.

    Raises ValueError for stages of different numbers and widths that do not divide.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_channels: int = 3,
        dims: Sequence[int] = (64, 128, 256, 512),
        depths: Sequence[int] = (2, 2, 8, 2),
        topks: Sequence[int] = (1, 4, 16, 0),
        head_dim: int = 32,
        num_regions: int = 7,
        mlp_ratio: float = 3.0,
        lce_kernel: int = 5,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        dims, depths, topks = tuple(dims), tuple(depths), tuple(topks)
        if not dims or len({len(dims), len(depths), len(topks)}) != 1:
            raise ValueError(f"dims={dims}, depths={depths} and topks={topks} must have one entry per stage each")
        for dim, topk in zip(dims, topks, strict=True):
            if dim % (head_dim if topk else 8):
                what = f"head_dim={head_dim}" if topk else "the 8 heads of full attention (topk=0)"
                raise ValueError(f"dims={dims}: {dim} is not divisible by {what}")
        if lce_kernel < 1 or lce_kernel % 2 == 0:
            raise ValueError(f"lce_kernel={lce_kernel} must be odd and positive")
        rates = iter(torch.linspace(0, drop_path, max(sum(depths), 1), device="cpu").tolist())
        stages: list[nn.Module] = []
        before = in_channels
        for dim, depth, topk in zip(dims, depths, topks, strict=True):
            first = [] if stages else [*_halve(before, dim // 2), nn.GELU()]
            blocks = [
                _Block(
                    dim,
                    topk=topk,
                    num_regions=num_regions,
                    head_dim=head_dim,
                    lce_kernel=lce_kernel,
                    mlp_ratio=mlp_ratio,
                    drop_path=next(rates),
                )
                for _ in range(depth)
            ]
            stages.append(nn.Sequential(*first, *_halve(dim // 2 if first else before, dim), *blocks))
            before = dim
        self.in_channels, self.dims = in_channels, dims
        self.stages = nn.Sequential(*stages)
        self.norm = nn.BatchNorm2d(before)
        self.head = create_classifier(before, num_classes)
        reset_vit_linear(self)

    mixers = ("bi_level_routing", "softmax")

    def _trunk(self) -> Trunk:
        blocks = {f"stages.{i}": stage for i, stage in enumerate(self.stages)}
        return Trunk(self.norm, blocks, self.dims)

    def _reductions(self, number: int) -> list[int]:
        return [4 << i for i in range(number)]

    def embed(self, images: Tensor) -> Tensor:
        """(B, D), the mean over the grid of the last stage."""
        return self.norm(self.stages(images)).mean((2, 3))


def _halve(channels: int, dim: int) -> list[nn.Module]:
    """A convolution to half the resolution, and its norm."""
    return [nn.Conv2d(channels, dim, 3, stride=2, padding=1), nn.BatchNorm2d(dim)]


@register_model(BiFormer, task="image", paper=PAPER, dims=[64, 128, 256, 512], depths=[2, 2, 8, 2], topks=[1, 4, 16, 0])
def bi_former_tiny(**options: Any) -> BiFormer:
    """BiFormer-T: images, four stages of 2, 2, 8 and 2 blocks, 13.1 million parameters."""
    return BiFormer(**options)


@register_model(
    BiFormer, task="image", paper=PAPER, dims=[64, 128, 256, 512], depths=[4, 4, 18, 4], topks=[1, 4, 16, 0]
)
def bi_former_small(**options: Any) -> BiFormer:
    """BiFormer-S: images, four stages of 4, 4, 18 and 4 blocks, 25.5 million parameters."""
    return BiFormer(**options)


@register_model(
    BiFormer, task="image", paper=PAPER, dims=[96, 192, 384, 768], depths=[4, 4, 18, 4], topks=[1, 4, 16, 0]
)
def bi_former_base(**options: Any) -> BiFormer:
    """BiFormer-B: as small, half as wide again, 56.8 million parameters."""
    return BiFormer(**options)
