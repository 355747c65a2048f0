"""ViT: the vision transformer (arXiv:2010.11929) and its later forms, over any mixer.

Patches by a convolution, a class token, learned positions, pre-norm blocks (`Backbone`), a linear head. Options are
what DeiT (arXiv:2012.12877), DeiT III (arXiv:2204.07118: layer scale, no position for the class token), registers
(arXiv:2309.16588) and the mean over the patches instead of the class token need. Compared with timm's classes, see
`convert.timm_vit`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.backbone import Backbone, MixerChoice
from ..blocks.layers.ffn import FFNChoice
from ..blocks.layers.norm import create_norm
from ..blocks.protocol import Mixer
from ..blocks.registry import did_you_mean
from ._image import ImageClassifier, create_classifier, reset_vit_linear
from ._registry import register_sizes

POOLINGS = ("token", "mean")


class VisionTransformer(ImageClassifier):
    """Images (B, in_channels, *img_size) to logits (B, num_classes).

    img_size: pixels of the side, or (height, width); patch_size: the same of a patch, which divides it. num_classes: 0
    gives features instead of logits. mixer, dim, depth, ffn, mlp_ratio, norm_eps, layer_scale, drop_path: of the
    `Backbone`, whose norms are "layernorm". class_token: one learned token before the patches; num_registers: more of
    them, which nothing reads. position_prefix: these tokens have positions too. patch_bias: of the convolution.
    input_norm: a norm after the positions (CLIP). pooling: "token" reads the class token, "mean" the patches.
    norm_after_pool: the last norm is of the pooled vector instead of every token. head_drop, proj_drop: dropouts of the
    head; of embedding, mixers and feed-forwards. Linear layers start truncated normal of deviation 0.02.
    """

    img_size: tuple[int, int]

    def __init__(
        self,
        *,
        img_size: int | Sequence[int] = 224,
        patch_size: int | Sequence[int] = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        mixer: MixerChoice | Sequence[MixerChoice] = "softmax",
        dim: int = 192,
        depth: int = 12,
        ffn: FFNChoice = "gelu",
        mlp_ratio: float = 4.0,
        norm_eps: float = 1e-6,
        layer_scale: float | None = None,
        class_token: bool = True,
        num_registers: int = 0,
        position_prefix: bool = True,
        patch_bias: bool = True,
        input_norm: bool = False,
        pooling: str = "token",
        norm_after_pool: bool = False,
        head_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if pooling not in POOLINGS:
            raise ValueError(f"pooling={pooling!r} is not a choice.{did_you_mean(pooling, POOLINGS)}")
        if pooling == "token" and not class_token:
            raise ValueError("pooling='token' reads the class token; with class_token=False take pooling='mean'")
        if num_registers < 0:
            raise ValueError(f"num_registers={num_registers} must not be negative")
        self.img_size, sides = _pair("img_size", img_size), _pair("patch_size", patch_size)
        for size, side in zip(self.img_size, sides, strict=True):
            if size % side:
                raise ValueError(
                    f"patch_size={patch_size} does not divide img_size={img_size}; nearest that it divides: "
                    f"{max(1, round(size / side)) * side}"
                )
        self.grid = (self.img_size[0] // sides[0], self.img_size[1] // sides[1])
        self.in_channels, self.pooling, self.position_prefix = in_channels, pooling, position_prefix
        self.num_prefix_tokens = int(class_token) + num_registers
        patches = self.grid[0] * self.grid[1]
        self.patch_embed = nn.Conv2d(in_channels, dim, sides, sides, bias=patch_bias)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, dim)) if class_token else None
        self.reg_token = nn.Parameter(torch.zeros(1, num_registers, dim)) if num_registers else None
        self.pos_embed = nn.Parameter(torch.empty(1, patches + self.num_prefix_tokens * position_prefix, dim))
        self.pos_drop = nn.Dropout(proj_drop)
        self.norm_pre = create_norm("layernorm", dim, norm_eps) if input_norm else nn.Identity()
        self.backbone = Backbone(
            dim,
            depth,
            mixer=mixer,
            ffn=ffn,
            mlp_ratio=mlp_ratio,
            norm="layernorm",
            norm_eps=norm_eps,
            layer_scale=layer_scale,
            proj_drop=proj_drop,
            drop_path=drop_path,
            final_norm=not norm_after_pool,
        )
        for part in self.backbone.modules():
            if isinstance(part, Mixer):
                part.num_prefix_tokens = self.num_prefix_tokens  # these stand on no grid
        self.fc_norm = create_norm("layernorm", dim, norm_eps) if norm_after_pool else nn.Identity()
        self.head_drop = nn.Dropout(head_drop)
        self.head = create_classifier(dim, num_classes)
        for token in (self.cls_token, self.reg_token, self.pos_embed):
            if token is not None:
                nn.init.trunc_normal_(token, std=0.02)
        reset_vit_linear(self)

    def forward_tokens(self, images: Tensor) -> Tensor:
        """The states of all tokens after the backbone, (B, prefix tokens + patches, dim): class token, registers,
        patches row after row. Raises ValueError for images of another size."""
        if images.dim() != 4 or tuple(images.shape[2:]) != self.img_size:
            raise ValueError(
                f"images have the shape {tuple(images.shape)}, expected (B, C, {self.img_size[0]}, {self.img_size[1]});"
                " img_size is chosen when the model is built"
            )
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        if not self.position_prefix:
            x = x + self.pos_embed
        prefix = [t.expand(x.shape[0], -1, -1).to(x.dtype) for t in (self.cls_token, self.reg_token) if t is not None]
        x = torch.cat((*prefix, x), 1)
        if self.position_prefix:
            x = x + self.pos_embed
        return self.backbone(self.norm_pre(self.pos_drop(x)), grid=self.grid).y

    @property
    def feature_reduction(self) -> int:
        return int(self.patch_embed.stride[0])

    def embed(self, images: Tensor) -> Tensor:
        """The vector (B, dim) that the head reads."""
        x = self.forward_tokens(images)
        x = x[:, 0] if self.pooling == "token" else x[:, self.num_prefix_tokens :].mean(1)
        return self.head_drop(self.fc_norm(x))


def _pair(name: str, value: int | Sequence[int]) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value)
    if len(pair) != 2 or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in pair):
        raise ValueError(f"{name}={value!r} must be a positive integer, or two: height and width")
    return pair[0], pair[1]


def _size(dim: int, num_heads: int) -> dict[str, Any]:
    return {"dim": dim, "mixer": {"name": "softmax", "num_heads": num_heads}}


_SIZES: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("ViT-Ti/16: twelve blocks of width 192, 5.7M parameters.", _size(192, 3)),
    "small": ("ViT-S/16: twelve blocks of width 384, 22.1M parameters.", _size(384, 6)),
    "base": ("ViT-B/16: twelve blocks of width 768, 86.6M parameters.", _size(768, 12)),
}
register_sizes("vit", VisionTransformer, _SIZES, module=__name__, task="image", paper="arXiv:2010.11929")
