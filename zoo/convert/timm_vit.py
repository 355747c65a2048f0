"""timm's vision transformers: ViT (arXiv:2010.11929), DeiT and DeiT III, with registers, DINOv2."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from ._config import Config
from ._names import NameMap, Plan, Split
from ._registry import register_converter

_BLOCK, _OURS = "blocks.*.", "backbone.blocks.*."
NAMES: NameMap = {
    "cls_token": "cls_token",
    "reg_token": "reg_token",
    "pos_embed": "pos_embed",
    "patch_embed.proj": "patch_embed",
    "norm_pre": "norm_pre",
    f"{_BLOCK}norm1": f"{_OURS}norm_mixer",
    f"{_BLOCK}attn.qkv": Split(tuple(f"{_OURS}mixer.{part}_proj" for part in "qkv"), lambda qkv: qkv.chunk(3)),
    f"{_BLOCK}attn.proj": f"{_OURS}mixer.out_proj",
    f"{_BLOCK}ls1.gamma": f"{_OURS}scale_mixer",
    f"{_BLOCK}norm2": f"{_OURS}norm_ffn",
    f"{_BLOCK}mlp.fc1": f"{_OURS}ffn.up_proj",
    f"{_BLOCK}mlp.fc2": f"{_OURS}ffn.down_proj",
    f"{_BLOCK}ls2.gamma": f"{_OURS}scale_ffn",
    "norm": "backbone.norm",
    "fc_norm": "fc_norm",
    "head": "head",
}
# What no tensor tells: the heads of a size, and that its blocks are plain ones with GELU and norms of eps 1e-6.
HEADS = {"tiny": 3, "little": 5, "small": 6, "medium": 8, "mediumd": 8, "betwixt": 10, "base": 12}
HEADS |= dict.fromkeys(("large", "huge", "giant", "gigantic"), 16)
_OTHER_HEADS = {"vit_base_patch16_gap_224": 16}  # not those of its size
PLAIN = re.compile(r"(?:vit|deit|deit3)_([a-z]+)_patch\d+(?:_reg\d+)?(_gap)?_(?:\d+|dinov2)")
# Arguments of timm that the tensors show by themselves, or that matter in training only.
_SHOWN = {"patch_size", "in_chans", "num_classes", "embed_dim", "depth", "mlp_ratio", "qkv_bias", "proj_bias"}
_SHOWN |= {"init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm", "fc_norm", "weight_init"}
_SHOWN |= {"fix_init", "drop_rate", "pos_drop_rate", "patch_drop_rate", "proj_drop_rate", "attn_drop_rate"}
_SHOWN |= {"drop_path_rate", "img_size", "global_pool", "num_heads", "dynamic_img_size"}
_POOLINGS = {"token": "token", "avg": "mean"}
_PREPROCESSING = ("mean", "std", "input_size", "interpolation", "crop_pct", "crop_mode")


@register_converter("timm")
def plan(config: Config, tensors: Mapping[str, Tensor]) -> Plan:
    """timm's ViT, DeiT, DeiT III and DINOv2 (the config names an architecture)."""
    architecture, given = str(config.get("architecture")).split(".")[0], dict(config.get("model_args") or {})
    for key, value in given.items():
        if key not in _SHOWN and value not in (None, False, "learn", "gelu", ""):
            raise ValueError(f"{config.where} has model_args.{key}={value!r}, which cannot be converted")
    form = PLAIN.fullmatch(architecture)
    heads = given.get("num_heads", _OTHER_HEADS.get(architecture, HEADS.get(form.group(1)) if form else None))
    if form is None or heads is None:
        raise ValueError(
            f"{config.where} has architecture={architecture!r}; only plain ViT, DeiT and DINOv2 of timm can be "
            f"converted (vit_base_patch16_224, deit3_small_patch16_384 ...; sizes {', '.join(HEADS)})"
        )
    patch, depth = _tensor(tensors, "patch_embed.proj.weight"), _depth(tensors)
    position, first = _tensor(tensors, "pos_embed"), "blocks.0."
    up = _tensor(tensors, f"{first}mlp.fc1.weight")
    down = _tensor(tensors, f"{first}mlp.fc2.weight")
    if down.shape[1] != up.shape[0]:
        raise ValueError("the feed-forward layers (blocks.*.mlp) are gated; only plain ones can be converted")
    registers = tensors["reg_token"].shape[1] if "reg_token" in tensors else 0
    prefix = registers + ("cls_token" in tensors)
    img_size, with_prefix = _image(config, given, position.shape[1], prefix, tuple(patch.shape[2:]))
    options: dict[str, Any] = {
        "img_size": list(img_size),
        "patch_size": list(patch.shape[2:]),
        "in_channels": patch.shape[1],
        "num_classes": len(tensors["head.weight"]) if "head.weight" in tensors else 0,
        "dim": patch.shape[0],
        "depth": depth,
        "mixer": {
            "name": "softmax",
            "num_heads": heads,
            "qkv_bias": f"{first}attn.qkv.bias" in tensors,
            "proj_bias": f"{first}attn.proj.bias" in tensors,
        },
        "ffn": {"name": "gelu", "bias": f"{first}mlp.fc1.bias" in tensors},
        "mlp_ratio": len(up) / patch.shape[0],
        "norm_eps": 1e-6,
        "layer_scale": 1e-5 if f"{first}ls1.gamma" in tensors else None,
        "class_token": "cls_token" in tensors,
        "num_registers": registers,
        "position_prefix": with_prefix,
        "patch_bias": "patch_embed.proj.bias" in tensors,
        "input_norm": "norm_pre.weight" in tensors,
        "pooling": _pooling(config, given, form.group(2) is not None or "cls_token" not in tensors),
        "norm_after_pool": "fc_norm.weight" in tensors,
    }
    pretrained = config.get("pretrained_cfg") or {}
    return Plan("vit_base", options, NAMES, preprocessing={k: pretrained[k] for k in _PREPROCESSING if k in pretrained})


def _tensor(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise ValueError(f"the tensor {name} is missing: this is no ViT of timm")
    return tensors[name]


def _depth(tensors: Mapping[str, Tensor]) -> int:
    numbers = [int(m.group(1)) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name))]
    if not numbers:
        raise ValueError("there are no tensors blocks.0. ...: this is no ViT of timm")
    return max(numbers) + 1


def _pooling(config: Config, given: Mapping[str, Any], mean: bool) -> str:
    word = given.get("global_pool", config.get("global_pool")) or ("avg" if mean else "token")
    if word not in _POOLINGS:
        raise ValueError(f"{config.where} has global_pool={word!r}; only {' or '.join(_POOLINGS)} can be converted")
    return _POOLINGS[word]


def _image(
    config: Config, given: Mapping[str, Any], positions: int, prefix: int, patch: tuple[int, ...]
) -> tuple[tuple[int, int], bool]:
    """Pixels of an image, and whether the prefix tokens have positions: from the number of positions and, where the
    image is no square, the sizes of the config."""
    named = given.get("img_size") or ((config.get("pretrained_cfg") or {}).get("input_size") or (None,))[1:]
    sizes: list[tuple[int, int]] = []
    if isinstance(named, int):
        sizes.append((named, named))
    elif isinstance(named, Sequence) and len(named) == 2:
        sizes.append((int(named[0]), int(named[1])))
    for count in (positions - prefix, positions):  # a square, as a last resort: a table resized after training
        side = math.isqrt(max(count, 0))
        if side and side * side == count:
            sizes.append((side * patch[0], side * patch[1]))
    for height, width in sizes:
        patches = (height // patch[0]) * (width // patch[1])
        if positions - patches in (prefix, 0):
            return (height, width), positions - patches == prefix
    raise ValueError(
        f"{config.where}: {positions} positions fit no image of {patch[0]} x {patch[1]} patches; give img_size"
    )
