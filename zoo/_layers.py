"""In which layer of a model each parameter lies, for learning rates that fall with the distance from the head.

Layer 0 is what stands before the blocks; one layer for each block follows, in the order of the pass, and last the head.
A norm or a change of resolution belongs to a block: the norm behind the blocks to the last one, what opens a stage of
a pyramid to the first block of the stage. A block is a part with a child `mixer` or `attention`; what a class of ours
builds in another order than it uses it stands in the tables below.
"""

from __future__ import annotations

import re
from typing import Any

from torch import nn

# Lists whose i-th part makes one layer with the i-th part of another list beside them.
_TOGETHER = re.compile(r"(^|\.)(within|distil)(\.\d+)(?=\.|$)")
_BESIDE = {"within": "across", "distil": "encoder"}
# Built behind the blocks, used before them.
_BEFORE = {
    "PatchForecaster": ("static.", "channel"),
    "SelectiveS4": ("mask_generator.", "momentum_norm.", "momentum_mixer."),
    "VideoGrounder": ("query_proj.", "fuse."),
}
# Parameters that a model holds itself and that act behind the blocks; all others of its own are of layer 0.
_BEHIND = {"EventDetector": ("scale", "bias"), "PatchForecaster": ("skip",), "VideoGrounder": ("similarity",)}
_NORMS = ("norm", "encoder_norm", "decoder_norm")


def parameter_layers(model: nn.Module) -> tuple[dict[str, int], int]:
    """The layer of each parameter by name, from 0, and that of the head, which may have no parameters of its own.

    A model inside another one (a pretext around a classifier) keeps its layers, and what is around it is a head. The
    layers of an image model of timm that reads frames come before all others, in its own order. In a model without
    blocks all is head, layer 0.
    """
    prefix, inner = next(((n, m) for n, m in model.named_modules() if hasattr(m, "no_features")), ("", model))
    prefix = f"{prefix}." if prefix else ""
    own, head = _own_layers(inner)
    layers = {f"{prefix}{name}": layer for name, layer in own.items()}
    return {name: layers.get(name, head) for name in _names(model)}, head


def layer_scales(model: nn.Module, layer_decay: float) -> dict[str, float]:
    """layer_decay^(N - layer) of each parameter by name, N the layer of the head, whose factor is 1.

    As timm's `param_groups_layer_decay`, after BEiT (arXiv:2106.08254). Raises ValueError for a factor outside (0, 1]
    and for a model without blocks.
    """
    check_layer_decay(layer_decay)
    layers, head = parameter_layers(model)
    if head == 0:
        raise ValueError(f"layer_decay: {type(model).__name__} has no blocks whose rates could differ; leave it out")
    return {name: layer_decay ** (head - layer) for name, layer in layers.items()}


def check_layer_decay(value: Any) -> None:
    """Raise ValueError unless the value is a number in (0, 1]."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
        raise ValueError(f"layer_decay={value!r} must be a number in (0, 1], such as 0.75; 1 gives all layers one rate")


def _names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


def _beside(name: str) -> str:
    return _TOGETHER.sub(lambda found: f"{found[1]}{_BESIDE[found[2]]}{found[3]}", name)


def _own_layers(model: nn.Module) -> tuple[dict[str, int], int]:
    """The layers of a model by the names of its parameters, and that of its head."""
    names = _names(model)
    reading = _frame_layers(model)
    blocks = _blocks(model, skip=tuple(reading))
    if not blocks:
        return dict.fromkeys(names, 0), 0
    before, behind = (
        tuple(p for cls in type(model).__mro__ for p in table.get(cls.__name__, ())) for table in (_BEFORE, _BEHIND)
    )
    of_block = {n: next((b for b in blocks if _beside(n).startswith(f"{b}.")), None) for n in names}
    last = list(blocks)[-1]
    layers: dict[str, int] = {}
    seen = 0
    for i, name in enumerate(names):
        block = of_block[name]
        if name in reading:
            layers[name] = reading[name]
        elif before and name.startswith(before):
            layers[name] = 0
        elif name in behind:
            layers[name] = len(blocks) + 1
        elif block is not None:
            layers[name] = blocks[block]
            seen = max(seen, blocks[block])
        else:
            following = next((of_block[n] for n in names[i:] if of_block[n] is not None), None)
            if following is None and seen:
                layers[name] = seen if _is_norm(name, last) else len(blocks) + 1
            elif seen and following is not None and name.startswith(f"{following.rpartition('.')[0]}."):
                layers[name] = blocks[following]
            else:
                layers[name] = seen
    lowest = min(layers.values())
    return {name: layer - lowest for name, layer in layers.items()}, len(blocks) + 1 - lowest


def _blocks(model: nn.Module, skip: tuple[str, ...]) -> dict[str, int]:
    """Names of the blocks and their layers, from 1."""
    found: dict[str, int] = {}
    outer: tuple[str, ...] = ()
    for name, part in model.named_modules():
        inside = bool(outer) and f"{name}.".startswith(outer)
        if inside or not name or not any(child in ("mixer", "attention") for child, _ in part.named_children()):
            continue
        if any(n.startswith(f"{name}.") for n in skip):
            continue
        outer += (f"{name}.",)
        found.setdefault(_beside(name), len(found) + 1)
    return found


def _is_norm(name: str, block: str) -> bool:
    """Whether a parameter is of a norm that stands beside the blocks or around them."""
    parts = name.split(".")
    return any(part in _NORMS and block.startswith("".join(f"{p}." for p in parts[:i])) for i, part in enumerate(parts))


def _frame_layers(model: nn.Module) -> dict[str, int]:
    """Layers of an image model of timm that reads frames, below 0, the last one -1."""
    found = ((n, m) for n, m in model.named_modules() if hasattr(m, "group_matcher") and not hasattr(m, "no_features"))
    name, reader = next(found, ("", None))
    if reader is None or not any(True for _ in reader.parameters()):
        return {}
    from timm.models import group_parameters

    matcher: Any = reader
    layers: dict[str, int] = group_parameters(reader, matcher.group_matcher(coarse=False), reverse=True)
    top = max(layers.values()) + 1
    return {f"{name}.{key}": layer - top for key, layer in layers.items()}
