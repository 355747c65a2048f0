"""Low-rank adaptation of linear layers (LoRA, arXiv:2106.09685).

    W' = W + alpha / r  B A,   A (r, in) from U(-1 / sqrt(in), 1 / sqrt(in)), B (out, r) zero: at the start W' = W

Only A and B are trained. They stand beside W as a parametrisation of `weight`, so that kernels which read the weight
itself see W' too, and layers keep their class. Same formula and start as peft's linear layers, without its dropout.
"""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize


class LowRank(nn.Module):
    """The parametrisation: W -> W + alpha / rank B A; W itself where it holds the sum already (`merged`)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        place: Any = {"device": weight.device, "dtype": weight.dtype}
        self.scale, self.merged = alpha / rank, False
        self.lora_a = nn.Parameter(torch.empty(rank, weight.shape[1], **place))
        self.lora_b = nn.Parameter(torch.zeros(weight.shape[0], rank, **place))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))

    def delta(self) -> Tensor:
        return self.scale * (self.lora_b @ self.lora_a)

    def forward(self, weight: Tensor) -> Tensor:
        return weight if self.merged else weight + self.delta()


def add_lora(
    model: nn.Module,
    *,
    rank: int = 8,
    alpha: float | None = None,
    targets: str | Sequence[str] = "*",
    trained: Sequence[str] = (),
) -> list[str]:
    """Give the linear layers of `model` low-rank updates and freeze all else; returns their names.

    rank: r. alpha: of the scale alpha / r; None: 2 r. targets: wildcards of the names of layers. trained: prefixes of
    parameters that are trained whole, such as a new head, whose layers get no update. Raises ValueError for a rank
    below 1, for targets that no layer fits and for a model that has updates already.
    """
    if rank < 1:
        raise ValueError(f"rank={rank} must be at least 1")
    if next(_updates(model), None) is not None:
        raise ValueError("the model has low-rank updates already; fold_lora makes them part of its weights")
    patterns, kept = [targets] if isinstance(targets, str) else list(targets), tuple(trained)
    linear = [name for name, part in model.named_modules() if type(part) is nn.Linear]
    chosen = [
        name
        for name in linear
        if any(fnmatch.fnmatchcase(name, p) for p in patterns) and not (kept and f"{name}.".startswith(kept))
    ]
    if not chosen:
        raise ValueError(f"targets={patterns} fit no linear layer; there are {', '.join(linear[:6]) or 'none'}")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(bool(kept) and name.startswith(kept))
    for name in chosen:
        layer: Any = model.get_submodule(name)
        parametrize.register_parametrization(
            layer, "weight", LowRank(layer.weight, rank, 2 * rank if alpha is None else alpha)
        )
    return chosen


def merge_lora(model: nn.Module) -> None:
    """Put the updates into the weights, for speed; `unmerge_lora` takes them out again, up to rounding."""
    _move(model, merged=True)


def unmerge_lora(model: nn.Module) -> None:
    """Take the updates out of the weights, so that training can go on."""
    _move(model, merged=False)


@torch.no_grad()
def fold_lora(model: nn.Module) -> None:
    """Make the updates part of the weights for good: the layers and their names are what they were before."""
    for layer, _ in list(_updates(model)):
        weight = layer.weight.detach().clone()
        # not torch's own removal: it empties the class, which copies of the model share
        del layer._modules["parametrizations"]
        layer.__class__ = type(layer).__bases__[0]
        layer.weight = nn.Parameter(weight)


def has_lora(model: nn.Module) -> bool:
    """Whether a linear layer of the model has an update."""
    return next(_updates(model), None) is not None


def folded(model: nn.Module) -> nn.Module:
    """The model without updates: itself where it has none, else a copy with them in its weights."""
    if not has_lora(model):
        return model
    copied = copy.deepcopy(model)
    fold_lora(copied)
    return copied


def lora_state(model: nn.Module) -> dict[str, Tensor]:
    """The updates alone, by name: what has to be kept of a fine-tuned model beside the one it started from."""
    return {name: value for name, value in model.state_dict().items() if name.endswith((".lora_a", ".lora_b"))}


def _updates(model: nn.Module) -> Iterator[tuple[Any, LowRank]]:
    for part in model.modules():
        found: Any = getattr(part, "parametrizations", None)
        if found is not None and "weight" in found and isinstance(found["weight"][0], LowRank):
            yield part, found["weight"][0]


@torch.no_grad()
def _move(model: nn.Module, *, merged: bool) -> None:
    for layer, update in _updates(model):
        if update.merged != merged:
            layer.parametrizations["weight"].original.add_(update.delta(), alpha=1 if merged else -1)
            update.merged = merged
