"""`optimizer.layer_decay`: the groups of every optimiser, steps and schedules over them, frozen and low-rank nets."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.muon import inner_matrices
from seqzoo.pipelines.nets import create_net
from seqzoo.pipelines.training import OPTIMIZERS, TrainingModule, create_optimizer
from seqzoo.zoo import create_model, save_model
from seqzoo.zoo._layers import parameter_layers
from seqzoo.zoo.classifier import SequenceClassifier

OPTIONS: dict[str, dict[str, Any]] = {
    "adam": {"name": "adam", "lr": 1.0, "weight_decay": 0.0, "betas": [0.9, 0.999]},
    "adamw": {"name": "adamw", "lr": 1.0, "weight_decay": 0.25, "betas": [0.9, 0.999]},
    "muon": {
        "name": "muon",
        "lr": 8.0,
        "adam_lr": 1.0,
        "weight_decay": 0.25,
        "momentum": 0.95,
        "betas": [0.9, 0.95],
    },
    "sgd": {"name": "sgd", "lr": 1.0, "weight_decay": 0.0, "momentum": 0.0, "nesterov": False},
}


def small(mixer: str = "mamba") -> Any:
    return create_model("classifier_tiny", dim=16, depth=3, mixer=mixer, num_classes=3)


def rates(optimizer: torch.optim.Optimizer, net: nn.Module) -> dict[str, float]:
    names = {id(p): name for name, p in net.named_parameters()}
    found = [(names[id(p)], group["lr"]) for group in optimizer.param_groups for p in group["params"]]
    assert len(found) == len(dict(found))  # each once
    return dict(found)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_each_rate_is_the_one_without_times_the_power_of_its_layer(name: str) -> None:
    net = small()
    plain = rates(create_optimizer(net, OPTIONS[name]), net)
    assert plain == rates(create_optimizer(net, {**OPTIONS[name], "layer_decay": None}), net)
    found = rates(create_optimizer(net, {**OPTIONS[name], "layer_decay": 0.5}), net)
    layers, head = parameter_layers(net)
    assert head == 4 and set(found) == set(dict(net.named_parameters()))
    assert found == {n: plain[n] * 0.5 ** (head - layer) for n, layer in layers.items()}
    assert found["head.1.weight"] == plain["head.1.weight"] and len(set(plain.values())) > (name == "muon")


def test_muon_scales_the_matrices_and_adam_s_part() -> None:
    net = small("softmax")
    optimizer = create_optimizer(net, {**OPTIONS["muon"], "layer_decay": 0.5})
    found, matrices = rates(optimizer, net), inner_matrices(net)
    for name, p in net.named_parameters():
        block = int(name.split(".")[2]) if ".blocks." in name else None
        scale = 0.5 ** (3 - block) if block is not None else {"e": 1 / 16, "h": 1.0, "b": 0.5}[name[0]]
        assert found[name] == (8.0 if id(p) in matrices else 1.0) * scale, name
    parts = optimizer._parts  # type: ignore[attr-defined]
    assert {type(p).__name__ for p in parts} == {"Muon", "AdamW"} and sum(id(p) in matrices for p in net.parameters())


def test_a_capped_rate_is_scaled_too() -> None:
    """Mamba's A and D have a cap; layer 1 of 4 has an eighth of it, and Muon leaves them to Adam."""
    net = create_model("classifier_tiny", dim=16, depth=3, mixer="s4d", num_classes=3)
    plain = rates(create_optimizer(net, OPTIONS["muon"]), net)
    found = rates(create_optimizer(net, {**OPTIONS["muon"], "layer_decay": 0.5}), net)
    capped = [n for n, rate in plain.items() if rate < 1 and ".blocks.0." in n]
    assert capped and all(found[n] == plain[n] / 8 for n in capped)


def test_a_step_of_sgd_is_shorter_by_the_power() -> None:
    net = small("softmax")
    before = {n: p.detach().clone() for n, p in net.named_parameters()}
    optimizer = create_optimizer(net, {**OPTIONS["sgd"], "layer_decay": 0.5})
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    layers, head = parameter_layers(net)
    for name, p in net.named_parameters():
        torch.testing.assert_close(before[name] - p.detach(), torch.full_like(p, 0.5 ** (head - layers[name])))


def fitting(net: nn.Module, optimizer: dict[str, Any], scheduler: dict[str, Any]) -> Any:
    module = TrainingModule(optimizer=optimizer, scheduler=scheduler)
    module.net = net
    module._trainer = SimpleNamespace(  # type: ignore[assignment]
        precision_plugin=SimpleNamespace(scaler=None), estimated_stepping_batches=10, strategy=SimpleNamespace()
    )
    module._fabric = None
    return module.configure_optimizers()


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_a_schedule_scales_all_layers_alike(name: str) -> None:
    net = small("softmax")
    made = fitting(net, {**OPTIONS[name], "layer_decay": 0.5}, {"name": "cosine", "warmup_fraction": 0.3})
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    wanted = rates(create_optimizer(net, {**OPTIONS[name], "layer_decay": 0.5}), net)
    assert rates(optimizer, net) == pytest.approx({n: r / 4 for n, r in wanted.items()})  # step 1 of 3, of warm-up
    seen = set()
    for _ in range(9):
        optimizer.step()
        scheduler.step()
        found = rates(optimizer, net)
        factor = found["head.1.weight"] / wanted["head.1.weight"]
        assert found == pytest.approx({n: r * factor for n, r in wanted.items()})
        seen.add(round(factor, 6))
    assert len(seen) > 5


def test_frozen_and_low_rank_nets(tmp_path: Any) -> None:
    folder = str(save_model(small("softmax"), tmp_path / "model"))
    options = {"dim": 16, "depth": 3, "mixer": "softmax", "num_classes": 3, "pretrained": folder}

    def found(**more: Any) -> dict[str, float]:
        net = create_net("classifier_tiny", {**options, **more}, None, SequenceClassifier, "classifier")
        return rates(create_optimizer(net, {**OPTIONS["adamw"], "layer_decay": 0.5}), net)

    assert found(frozen=True) == {"head.1.weight": 1.0, "head.1.bias": 1.0}
    updates = found(lora=2)
    assert set(updates.values()) == {1.0, 0.5, 0.25, 0.125}
    for name, rate in updates.items():
        assert rate == (0.5 ** (3 - int(name.split(".")[2])) if "lora" in name else 1.0), name
    assert len(updates) == 2 + 2 * 3 * 6  # six linear layers a block


def test_refused_before_training() -> None:
    for wrong in (0, 1.5, "x", True):
        with pytest.raises(UserError, match=r"optimizer\.layer_decay=.* must be a number in \(0, 1\]"):
            TrainingModule(optimizer={"name": "adamw", "layer_decay": wrong}, scheduler={})
    dlinear = create_model("dlinear", seq_len=16, pred_len=4, in_channels=1)
    with pytest.raises(UserError, match=r"optimizer\.layer_decay: DLinear has no blocks"):
        create_optimizer(dlinear, {**OPTIONS["adamw"], "layer_decay": 0.5})
