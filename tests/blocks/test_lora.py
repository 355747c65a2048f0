"""Low-rank updates: the formula by hand and peft's own layer, merging, and layers whose weight a kernel reads."""

import copy

import pytest
import torch
from torch import nn

from seqzoo.blocks.backbone import Backbone
from seqzoo.blocks.layers.lora import (
    add_lora,
    fold_lora,
    folded,
    has_lora,
    lora_state,
    merge_lora,
    unmerge_lora,
)


def net():
    return nn.Sequential(nn.Linear(6, 5), nn.GELU(), nn.Linear(5, 4, bias=False)).double()


def trained(model):
    """Updates that are not zero."""
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):
            nn.init.normal_(parameter)
    return model


def test_the_formula():
    """y = W x + b + (alpha / r) B (A x), written out as peft's forward has it."""
    layer = nn.Linear(6, 5).double()
    weight, bias = layer.weight.detach().clone(), layer.bias.detach().clone()
    x = torch.randn(3, 6, dtype=torch.float64)
    before = layer(x)
    wrapped = nn.Sequential(layer)
    assert add_lora(wrapped, rank=3, alpha=12) == ["0"]
    torch.testing.assert_close(wrapped(x), before, atol=0, rtol=0)
    trained(wrapped)
    update = layer.parametrizations.weight[0]
    a, b = update.lora_a.detach(), update.lora_b.detach()
    assert a.shape == (3, 6) and b.shape == (5, 3) and isinstance(layer, nn.Linear)
    wanted = x @ weight.T + bias + (12 / 3) * ((x @ a.T) @ b.T)
    torch.testing.assert_close(wrapped(x), wanted, atol=1e-12, rtol=1e-12)


def test_peft_has_the_same_output_and_gradients():
    peft = pytest.importorskip("peft", reason="peft is not installed")
    ours, theirs = net(), net()
    theirs.load_state_dict(ours.state_dict())
    add_lora(ours, rank=2, alpha=5)
    trained(ours)
    theirs = peft.get_peft_model(theirs, peft.LoraConfig(r=2, lora_alpha=5, target_modules=["0", "2"])).double()
    for i in ("0", "2"):
        layer, update = theirs.base_model.model.get_submodule(i), ours.get_submodule(i).parametrizations.weight[0]
        layer.lora_A["default"].weight.data.copy_(update.lora_a)
        layer.lora_B["default"].weight.data.copy_(update.lora_b)
    x = torch.randn(7, 6, dtype=torch.float64)
    a, b = ours(x), theirs(x)
    torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)
    cotangent = torch.randn_like(a)
    a.backward(cotangent)
    b.backward(cotangent)
    for i in ("0", "2"):
        layer, update = theirs.base_model.model.get_submodule(i), ours.get_submodule(i).parametrizations.weight[0]
        torch.testing.assert_close(update.lora_a.grad, layer.lora_A["default"].weight.grad, atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(update.lora_b.grad, layer.lora_B["default"].weight.grad, atol=1e-12, rtol=1e-12)


def test_only_the_updates_are_trained():
    model = net()
    add_lora(model, rank=2, targets="0")
    assert {n for n, p in model.named_parameters() if p.requires_grad} == {
        "0.parametrizations.weight.0.lora_a",
        "0.parametrizations.weight.0.lora_b",
    }
    other = net()
    add_lora(other, rank=2, trained=("2.",))
    free = {n for n, p in other.named_parameters() if p.requires_grad}
    assert "2.weight" in free and "0.bias" not in free and set(lora_state(other)) < free


def test_merge_and_unmerge():
    model = net()
    plain = copy.deepcopy(model)
    add_lora(model, rank=2)
    trained(model)
    x = torch.randn(4, 6, dtype=torch.float64)
    wanted = model(x)
    merge_lora(model)
    torch.testing.assert_close(model(x), wanted, atol=1e-12, rtol=1e-12)
    merged = model[0].parametrizations.weight.original.clone()
    assert not torch.equal(merged, plain[0].weight)
    merge_lora(model)
    assert torch.equal(merged, model[0].parametrizations.weight.original), "a second time changes nothing"
    unmerge_lora(model)
    torch.testing.assert_close(model[0].parametrizations.weight.original, plain[0].weight, atol=1e-14, rtol=0)
    torch.testing.assert_close(model(x), wanted, atol=1e-12, rtol=1e-12)
    merge_lora(model)
    fold_lora(model)
    torch.testing.assert_close(model(x), wanted, atol=1e-12, rtol=1e-12)
    assert set(model.state_dict()) == set(plain.state_dict()) and type(model[0]) is nn.Linear and not has_lora(model)


def test_folded_is_a_copy():
    model = net()
    assert folded(model) is model
    add_lora(model)
    trained(model)
    x = torch.randn(4, 6, dtype=torch.float64)
    copied = folded(model)
    assert has_lora(model) and not has_lora(copied)
    torch.testing.assert_close(copied(x), model(x), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("mixer", ["softmax", "mamba2", "mamba", "mega", "gla"])
def test_mixers_see_the_updates(mixer):
    """Every update of a backbone gets a gradient and changes the output, whoever reads the weight."""
    options = {"softmax": {"num_heads": 2}, "gla": {"num_heads": 2}, "mamba2": {"head_dim": 16}}.get(mixer, {})
    model = Backbone(16, 1, mixer={"name": mixer, **options}, causal=True, ffn="swiglu").double()
    names = add_lora(model, rank=2)
    trained(model)
    x = torch.randn(2, 5, 16, dtype=torch.float64)
    wanted = model(x).y
    wanted.square().sum().backward()
    without = [n for n, p in model.named_parameters() if p.requires_grad and (p.grad is None or not bool(p.grad.any()))]
    assert len(names) > 2 and without == []
    torch.testing.assert_close(folded(model)(x).y, wanted, atol=1e-10, rtol=1e-10)


def test_what_is_refused():
    with pytest.raises(ValueError, match="rank=0"):
        add_lora(net(), rank=0)
    with pytest.raises(ValueError, match="fit no linear layer; there are 0, 2"):
        add_lora(net(), targets=["q_proj"])
    model = net()
    add_lora(model)
    with pytest.raises(ValueError, match="already"):
        add_lora(model)
