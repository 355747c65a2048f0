"""Fifty training steps under bf16 autocast: everything stays finite and something is learned, for every mixer."""

from __future__ import annotations

import pytest
import torch

from seqzoo import Backbone, list_mixers, mixer_info
from seqzoo.blocks.parameters import parameter_groups

OPTIONS = {
    "mamba2": {"head_dim": 8},
    "mega": {"chunk_size": 8},
    "tcnca": {"chunk_size": 8},
    "long_vq": {"chunk_size": 8},
}


@pytest.mark.parametrize("name", list_mixers())
def test_training_in_bf16(name: str) -> None:
    causal = "causal" in mixer_info(name).patterns
    backbone = Backbone(16, 2, mixer={"name": name, **OPTIONS.get(name, {})}, causal=causal)
    x = torch.randn(4, 40, 16)
    target = x.roll(3, dims=1) * x  # a product of what lies three steps back
    optimizer = torch.optim.AdamW(parameter_groups(backbone, lr=3e-3, weight_decay=0.01))
    losses = []
    for _ in range(50):
        with torch.autocast("cpu", torch.bfloat16):
            out = backbone(x)
        loss = (out.y.float() - target).square().mean() + sum(out.aux.values(), torch.zeros(()))
        optimizer.zero_grad()
        loss.backward()
        for key, parameter in backbone.named_parameters():
            assert parameter.grad is None or bool(parameter.grad.isfinite().all()), key
        optimizer.step()
        losses.append(loss.item())
    assert all(torch.isfinite(p).all() for p in backbone.parameters())
    assert losses[-1] < 0.9 * losses[0]
