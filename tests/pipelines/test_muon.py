"""Muon and AdamW as one optimizer: who gets which parameter, by hand, and that nothing is lost on the way to disk."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import seqzoo
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.muon import create_muon, inner_matrices

OPTIONS: dict[str, Any] = {
    "lr": 0.02,
    "adam_lr": 1e-3,
    "weight_decay": 0.1,
    "momentum": 0.95,
    "betas": (0.9, 0.95),
    "fused": True,
}


def model(mixer: str = "softmax") -> nn.Module:
    torch.manual_seed(0)
    return seqzoo.create_model("language_tiny", dim=16, depth=2, vocab_size=32, mixer={"name": mixer})


def loss(net: nn.Module, step: int) -> torch.Tensor:
    tokens = torch.randint(0, 32, (2, 9), generator=torch.Generator().manual_seed(step))
    logits = net(tokens[:, :-1]).y
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())


@pytest.mark.parametrize("mixer", ["softmax", "mamba", "mega", "long_vq"])
def test_every_parameter_stands_in_one_group(mixer: str) -> None:
    net = model(mixer)
    optimizer = create_muon(net, **OPTIONS)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in net.parameters())
    matrices = inner_matrices(net)
    names = {n for n, p in net.named_parameters() if id(p) in matrices}
    assert names and all("blocks" in n and n.endswith("weight") for n in names)
    assert "model.embedding.table.weight" not in names
    for group in optimizer.param_groups:
        for p in group["params"]:
            if group["lr"] == OPTIONS["lr"]:
                assert id(p) in matrices and group["weight_decay"] in (0.0, 0.1)
            else:
                assert group["lr"] <= OPTIONS["adam_lr"]


def test_a_matrix_moves_by_an_orthogonal_step_and_a_vector_as_adamw_moves_it() -> None:
    net = model()
    optimizer = create_muon(net, **{**OPTIONS, "weight_decay": 0.0})
    twin = copy.deepcopy(net)
    alone = torch.optim.AdamW(twin.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.0)
    for part, steps in ((net, optimizer), (twin, alone)):
        loss(part, 0).backward()
        steps.step()
    weight, before = net.backbone.blocks[0].mixer.out_proj.weight, model().backbone.blocks[0].mixer.out_proj.weight
    singular = torch.linalg.svdvals((before - weight).double().detach() / 0.02)
    assert singular.max() < 1.3 and (singular > 0.6).double().mean() > 0.8  # Newton-Schulz brings them near 1
    norm, other = (m.backbone.norm.weight for m in (net, twin))
    torch.testing.assert_close(norm, other)


def test_a_schedule_reaches_both_and_a_checkpoint_holds_both() -> None:
    def run(net: nn.Module, first: int, last: int, saved: dict[str, Any] | None) -> dict[str, Any]:
        optimizer = create_muon(net, **OPTIONS)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1))
        if saved is not None:
            optimizer.load_state_dict(saved["optimizer"])
            schedule.load_state_dict(saved["schedule"])
        for step in range(first, last):
            optimizer.zero_grad()
            loss(net, step).backward()
            optimizer.step()
            schedule.step()
        rates = {round(group["lr"] * (last + 1), 9) for group in optimizer.param_groups}
        assert rates == {0.02, 1e-3}
        return copy.deepcopy({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()})

    whole, part = model(), model()
    run(whole, 0, 6, None)
    saved = run(part, 0, 3, None)
    run(part, 3, 6, saved)
    for (name, a), b in zip(whole.named_parameters(), part.parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_model_without_a_backbone_is_refused() -> None:
    with pytest.raises(UserError, match="this model has none; take adamw"):
        create_muon(nn.Linear(3, 3), **OPTIONS)
