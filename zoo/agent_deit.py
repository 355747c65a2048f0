"""Agent-DeiT: the DeiT image classifier with agent attention (arXiv:2312.08874, section 5.1; DeiT: arXiv:2012.12877).

Patches by a convolution, a class token, learned positions, pre-norm blocks (`Backbone`), a linear head on the class
token. Compared with the authors' models at 224 pixels: as many parameters, to the last one, and with copied weights the
logits differ by at most 4e-15 in float64 and 3e-6 in float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.backbone import Backbone, MixerChoice
from ..blocks.protocol import Mixer
from ._image import ImageClassifier, create_classifier, reset_vit_linear
from ._registry import register_model


class AgentDeiT(ImageClassifier):
    """Images (B, in_channels, img_size, img_size) to logits (B, num_classes).

    img_size, patch_size: pixels, the second divides the first. dim, depth, num_heads, mlp_ratio, qkv_bias: of the
    blocks. num_agents: per block, a square number. num_agent_layers: only the first so many blocks have agents, the
    others softmax attention; None for all. attn_drop, proj_drop, drop_path: dropouts. Starts as published: truncated
    normal weights of deviation 0.02 (the convolutions as torch starts them).
    """

    def __init__(
        self,
        *,
        img_size: int = 224,
        patch_size: int = 16,
        in_channels: int = 3,
        num_classes: int = 1000,
        dim: int = 192,
        depth: int = 12,
        num_heads: int = 3,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        num_agents: int = 49,
        num_agent_layers: int | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if patch_size < 1 or img_size % patch_size:
            raise ValueError(
                f"patch_size={patch_size} does not divide img_size={img_size}; the nearest size it divides is "
                f"{max(1, round(img_size / max(patch_size, 1))) * max(patch_size, 1)}"
            )
        with_agents = depth if num_agent_layers is None else num_agent_layers
        if not 0 <= with_agents <= depth:
            raise ValueError(
                f"num_agent_layers={num_agent_layers} must be between 0 and depth={depth}, or None for all"
            )
        side = img_size // patch_size
        self.img_size, self.grid, self.in_channels = img_size, (side, side), in_channels
        common: dict[str, Any] = {"num_heads": num_heads, "qkv_bias": qkv_bias, "attn_drop": attn_drop}
        agent = {"name": "agent", **common, "num_agents": num_agents, "grid_size": self.grid, "num_prefix_tokens": 1}
        mixers: list[MixerChoice] = [agent] * with_agents
        mixers += [{"name": "softmax", **common}] * (depth - with_agents)
        self.patch_embed = nn.Conv2d(in_channels, dim, patch_size, patch_size)
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim))
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + side * side, dim))
        self.pos_drop = nn.Dropout(proj_drop)
        self.backbone = Backbone(
            dim,
            depth,
            mixer=mixers,
            ffn="gelu",
            mlp_ratio=mlp_ratio,
            norm="layernorm",
            norm_eps=1e-6,
            proj_drop=proj_drop,
            drop_path=drop_path,
        )
        for mixer in (part for part in self.backbone.modules() if isinstance(part, Mixer)):
            mixer.num_prefix_tokens = 1  # the class token stands on no grid, for softmax attention neither
        self.head = create_classifier(dim, num_classes)
        for token in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(token, std=0.02)
        reset_vit_linear(self)

    mixers = ("agent", "softmax")

    @property
    def feature_reduction(self) -> int:
        return int(self.patch_embed.stride[0])

    def embed(self, images: Tensor) -> Tensor:
        """The class token after the last norm, (B, dim). Raises ValueError for images of another size."""
        if images.dim() != 4 or tuple(images.shape[2:]) != (self.img_size, self.img_size):
            raise ValueError(
                f"images have the shape {tuple(images.shape)}, expected (B, C, {self.img_size}, {self.img_size}); "
                "img_size is chosen when the model is built"
            )
        x = self.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat((self.cls_token.expand(x.shape[0], -1, -1).to(x.dtype), x), 1) + self.pos_embed
        return self.backbone(self.pos_drop(x), grid=self.grid).y[:, 0]


_PAPER = "arXiv:2312.08874"


@register_model(AgentDeiT, task="image", paper=_PAPER, dim=192, num_heads=3)
def agent_deit_tiny(**options: Any) -> AgentDeiT:
    """DeiT-T with 49 agents in every block, 6.0M parameters."""
    return AgentDeiT(**options)


@register_model(AgentDeiT, task="image", paper=_PAPER, dim=384, num_heads=6, drop_path=0.1)
def agent_deit_small(**options: Any) -> AgentDeiT:
    """DeiT-S with 49 agents in every block, 22.6M parameters."""
    return AgentDeiT(**options)


@register_model(
    AgentDeiT,
    task="image",
    paper=_PAPER,
    dim=768,
    num_heads=12,
    num_agents=81,
    num_agent_layers=4,
    drop_path=0.3,
)
def agent_deit_base(**options: Any) -> AgentDeiT:
    """DeiT-B with 81 agents in the first four blocks, 87.2M parameters."""
    return AgentDeiT(**options)
