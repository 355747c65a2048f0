"""Dropout with few random bits: the same law as torch's, in training only."""

import pytest
import torch
from torch import nn

from seqzoo.blocks.layers.dropout import Dropout


@pytest.mark.parametrize("p", [0.05, 0.3, 0.5, 0.9])
def test_it_drops_with_probability_p_and_keeps_the_mean(p):
    n = 1 << 20
    y = Dropout(p)(torch.ones(n))
    kept = y != 0
    assert abs(kept.double().mean() - (1 - p)) < 5 * (p * (1 - p) / n) ** 0.5
    torch.testing.assert_close(y[kept], torch.full_like(y[kept], 1 / (1 - p)), rtol=1e-4, atol=0)
    # neighbours, of which four share a draw, are independent
    for lag in (1, 2, 3, 4):
        both = (kept[lag:] & kept[:-lag]).double().mean()
        assert abs(both - (1 - p) ** 2) < 6 * (p * (1 - p) / n) ** 0.5


def test_every_element_drops_alike():
    """Whatever its place in a draw of 64 bits, and in the last, partial one."""
    layer, share = Dropout(0.25), torch.zeros(7)
    for _ in range(4000):
        share += layer(torch.ones(7)) == 0
    assert ((share / 4000 - 0.25).abs() < 0.035).all()


def test_the_gradient_passes_where_the_value_does():
    x = torch.randn(5, 33, 3, requires_grad=True)
    y = Dropout(0.4)(x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y, x * gradient)
    assert set(gradient.unique().tolist()) == {0.0, gradient.max().item()}


def test_the_seed_decides():
    layer, x = Dropout(0.5), torch.randn(4, 9)
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(layer(x))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_dtype_layout_and_edges(dtype):
    x = torch.randn(3, 5, 7, dtype=dtype).transpose(0, 2)
    assert torch.equal(Dropout(0.5).eval()(x), x)
    assert torch.equal(Dropout(0.0)(x), x)
    assert torch.equal(Dropout(1.0)(x), torch.zeros_like(x))
    y = Dropout(0.5)(x)
    assert y.dtype == dtype and torch.equal(y[y != 0], 2 * x[y != 0])
    assert Dropout(0.5)(x[:0]).shape == (0, 5, 3)
    assert Dropout(0.5)(x[0, 0, 0]).shape == ()


def test_compiled_it_is_torch_own():
    layer = Dropout(0.5)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.manual_seed(3)
    y = compiled(torch.ones(64))
    torch.manual_seed(3)
    assert torch.equal(y, nn.functional.dropout(torch.ones(64), 0.5))
