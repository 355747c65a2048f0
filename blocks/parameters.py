"""Tags on parameters that need their own optimiser treatment, and the groups made from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

_TAGS = "_seqzoo_optimizer_tags"


def tag_parameter(
    module: nn.Module, name: str, *, weight_decay: float | None = None, max_lr: float | None = None
) -> None:
    """Mark the parameter `name` of `module`: weight_decay replaces the optimiser's, max_lr caps its learning rate.

    The tag is kept by the module, not by the parameter, so that copies and moves keep it. Raises ValueError when the
    module has no such parameter of its own.
    """
    if name not in module._parameters:
        raise ValueError(f"{type(module).__name__} has no parameter {name!r} of its own to tag")
    module.__dict__.setdefault(_TAGS, {})[name] = {"weight_decay": weight_decay, "max_lr": max_lr}


def parameter_groups(
    module: nn.Module, *, lr: float, weight_decay: float, scales: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Optimiser groups in which every trainable parameter of `module` stands exactly once.

    Vectors and scalars (biases, norms) and embedding tables get no weight decay; tags (`tag_parameter`) come first.
    scales: factors of the rates by the names of the parameters, caps included (layer-wise rates); groups then hold
    theirs as "lr_scale". Raises KeyError for a parameter without one.
    """
    tags: dict[int, dict[str, float | None]] = {}
    tables = set()
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            tables.add(id(part.weight))
        for name, tag in getattr(part, _TAGS, {}).items():
            tags[id(getattr(part, name))] = tag
    groups: dict[tuple[float, float, float | None], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        tag = tags.get(id(parameter), {})
        decay, cap = tag.get("weight_decay"), tag.get("max_lr")
        if decay is None:
            decay = 0.0 if parameter.dim() < 2 or id(parameter) in tables else weight_decay
        rate = lr if cap is None else min(lr, cap)
        groups.setdefault((rate, decay, None if scales is None else scales[name]), []).append(parameter)
    return [
        {"params": params, "lr": rate, "weight_decay": decay}
        if scale is None
        else {"params": params, "lr": rate * scale, "weight_decay": decay, "lr_scale": scale}
        for (rate, decay, scale), params in groups.items()
    ]
