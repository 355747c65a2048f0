"""Tags on parameters that need their own optimiser treatment, and the groups made from them."""

from __future__ import annotations

from typing import Any

from torch import nn

_TAG = "_seqzoo_optim"


def tag_parameter(
    parameter: nn.Parameter, *, weight_decay: float | None = None, max_lr: float | None = None
) -> nn.Parameter:
    """Mark a parameter: weight_decay replaces the optimiser's, max_lr caps its learning rate. Returns it."""
    setattr(parameter, _TAG, {"weight_decay": weight_decay, "max_lr": max_lr})
    return parameter


def parameter_groups(module: nn.Module, *, lr: float, weight_decay: float) -> list[dict[str, Any]]:
    """Optimiser groups in which every trainable parameter of `module` stands exactly once.

    Vectors and scalars (biases, norms) and embedding tables get no weight decay; tags (`tag_parameter`) come first.
    """
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in module.parameters():
        if not parameter.requires_grad:
            continue
        tag = getattr(parameter, _TAG, {})
        decay, cap = tag.get("weight_decay"), tag.get("max_lr")
        if decay is None:
            decay = 0.0 if parameter.dim() < 2 or id(parameter) in tables else weight_decay
        rate = lr if cap is None else min(lr, cap)
        groups.setdefault((rate, decay), []).append(parameter)
    return [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
