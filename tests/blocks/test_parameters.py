"""Optimiser groups: every trainable parameter once, tags obeyed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from seqzoo.blocks.parameters import parameter_groups, tag_parameter


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.linear = nn.Linear(4, 4)
        self.norm = nn.LayerNorm(4)
        self.slow = nn.Parameter(torch.zeros(4, 4))
        self.decayed = nn.Parameter(torch.zeros(4))
        tag_parameter(self, "slow", weight_decay=0.0, max_lr=1e-3)
        tag_parameter(self, "decayed", weight_decay=0.5)
        self.frozen = nn.Parameter(torch.zeros(4, 4), requires_grad=False)


def settings(model: Model, lr: float) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, lr=lr, weight_decay=0.1)
    found = [(names[id(p)], (g["lr"], g["weight_decay"])) for g in groups for p in g["params"]]
    assert len(found) == len(dict(found))  # each once
    return dict(found)


def test_groups() -> None:
    assert settings(Model(), lr=1e-2) == {
        "linear.weight": (1e-2, 0.1),
        "linear.bias": (1e-2, 0.0),
        "norm.weight": (1e-2, 0.0),
        "norm.bias": (1e-2, 0.0),
        "table.weight": (1e-2, 0.0),
        "slow": (1e-3, 0.0),
        "decayed": (1e-2, 0.5),
    }


def test_the_cap_does_not_raise_a_lower_rate() -> None:
    assert settings(Model(), lr=1e-4)["slow"] == (1e-4, 0.0)


def test_a_tied_table_stands_once_and_is_not_decayed() -> None:
    model = Model()
    model.linear.weight = model.table.weight
    assert settings(model, lr=1e-2)["table.weight"] == (1e-2, 0.0)


def test_an_optimiser_takes_the_groups_and_obeys_them() -> None:
    model = Model()
    optimizer = torch.optim.SGD(parameter_groups(model, lr=1.0, weight_decay=0.0))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    bias = model.linear.bias.detach().clone()
    optimizer.step()
    assert torch.allclose(model.slow, torch.full((4, 4), -1e-3))
    assert torch.allclose(model.linear.bias, bias - 1.0)
    assert torch.equal(model.frozen, torch.zeros(4, 4))


def test_tags_survive_a_change_of_precision_and_a_copy() -> None:
    assert settings(Model().double(), lr=1e-2) == settings(Model(), lr=1e-2)
    assert settings(copy.deepcopy(Model()), lr=1e-2) == settings(Model(), lr=1e-2)


def test_only_own_parameters_can_be_tagged() -> None:
    with pytest.raises(ValueError, match="no parameter 'weight' of its own"):
        tag_parameter(Model(), "weight")
