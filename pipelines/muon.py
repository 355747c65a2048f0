"""Muon (Jordan et al., 2024): orthogonalised momentum for the matrices inside a model, AdamW for everything else."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.backbone import Backbone
from ..blocks.parameters import parameter_groups
from .errors import UserError


class MuonAdamW(torch.optim.Optimizer):
    """`torch.optim.Muon` and `torch.optim.AdamW` as one optimizer, for trainers and schedules that know one.

    Groups and states are those of the two, so that a change of a group's rate reaches them and a checkpoint holds
    both. groups, others: parameter groups with their rates and decays.
    """

    def __init__(
        self,
        groups: Sequence[dict[str, Any]],
        others: Sequence[dict[str, Any]],
        *,
        momentum: float,
        betas: tuple[float, float],
        fused: bool,
    ) -> None:
        self._parts: list[torch.optim.Optimizer] = []
        if groups:
            self._parts.append(torch.optim.Muon(groups, momentum=momentum))
        if others:
            self._parts.append(torch.optim.AdamW(others, betas=betas, fused=fused))
        super().__init__([group for part in self._parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        first = 0
        for part in self._parts:
            number = len(part.param_groups)
            part.param_groups = self.param_groups[first : first + number]
            part.state = self.state
            first += number

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self._parts:
            part.step()
        return loss


def inner_matrices(module: nn.Module) -> set[int]:
    """ids of the weights of `nn.Linear` layers in the module's backbones: not embeddings, heads, vectors or tables."""
    found: Iterable[nn.Module] = (
        part for b in module.modules() if isinstance(b, Backbone) for part in b.modules() if isinstance(part, nn.Linear)
    )
    return {id(part.weight) for part in found if isinstance(part.weight, Tensor) and min(part.weight.shape) > 1}


def create_muon(
    module: nn.Module,
    *,
    lr: float,
    weight_decay: float,
    adam_lr: float,
    momentum: float,
    betas: tuple[float, float],
    fused: bool,
    scales: Mapping[str, float] | None = None,
) -> MuonAdamW:
    """Muon with rate lr on `inner_matrices`, AdamW with adam_lr on the rest; tags of parameters hold for both.

    scales: factors of both rates by the names of the parameters, as of `parameter_groups`.

    Raises UserError for a model without a backbone.
    """
    matrices = inner_matrices(module)
    if not matrices:
        raise UserError("optimizer=muon works on the matrices of a backbone, and this model has none; take adamw")
    groups: list[dict[str, Any]] = []
    others: list[dict[str, Any]] = []
    for group in parameter_groups(module, lr=adam_lr, weight_decay=weight_decay, scales=scales):
        inside = [p for p in group["params"] if id(p) in matrices]
        outside = [p for p in group["params"] if id(p) not in matrices]
        scale = group.get("lr_scale", 1.0)
        if inside and group["lr"] == adam_lr * scale:
            groups.append({**group, "params": inside, "lr": lr * scale})
        elif inside:  # a tag caps the rate of AdamW; such a parameter stays with it
            others.append({**group, "params": inside})
        if outside:
            others.append({**group, "params": outside})
    return MuonAdamW(groups, others, momentum=momentum, betas=betas, fused=fused)
