"""Both softmaxes of agent attention in tiles, against two calls of softmax attention by its formula."""

import pytest
import torch

from seqzoo.kernels.agent_attention import agent_attention, tiled

torch.set_num_threads(1)
H, M = 3, 5


def draw(batch, length, source, dtype=torch.float64, value=4):
    seed = torch.Generator().manual_seed(length)
    shapes = (batch, length, H, 4), (batch, M, H, 4), (batch, source, H, 4), (batch, source, H, value)
    return [torch.randn(*shape, generator=seed, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def biases(*shapes):
    seed = torch.Generator().manual_seed(3)
    return [torch.randn(*shape, generator=seed, dtype=torch.float64).requires_grad_() for shape in shapes]


def with_gradients(y, inputs):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), inputs)]


def compare(inputs, options, tolerance=1e-12, extra=()):
    leaves = [*inputs, *extra]
    got, want = (agent_attention(*inputs, **options, backend=backend) for backend in ("tiled", "naive"))
    for a, b in zip(with_gradients(got, leaves), with_gradients(want, leaves), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("tile", [1, 1 << 10, 1 << 17])
@pytest.mark.parametrize(("length", "source"), [(1, 1), (63, 64), (65, 200), (200, 65)])
@pytest.mark.parametrize("batch", [1, 3])
def test_is_two_softmaxes(monkeypatch, tile, length, source, batch):
    monkeypatch.setattr(tiled, "_TILE", tile)
    compare(draw(batch, length, source, value=3), {"scale": 0.7, "broadcast_scale": 1.3})


@pytest.mark.parametrize("tile", [1, 1 << 12])
@pytest.mark.parametrize("shapes", [
    ((H, M, 150), (1, H, 70, M)), ((3, H, M, 150), (3, H, 70, M)), ((3, 1, 1, 150), (M,)), ((1, M, 1), (3, 1, 70, 1)),
])  # fmt: skip
def test_biases_of_any_shape_and_their_gradients(monkeypatch, tile, shapes):
    monkeypatch.setattr(tiled, "_TILE", tile)
    extra = biases(*shapes)
    compare(draw(3, 70, 150), {"aggregate_bias": extra[0], "broadcast_bias": extra[1]}, extra=extra)


@pytest.mark.parametrize("tile", [1, 1 << 12])
def test_masks(monkeypatch, tile):
    monkeypatch.setattr(tiled, "_TILE", tile)
    seed = torch.Generator().manual_seed(2)
    key_mask, agent_mask = torch.rand(3, 150, generator=seed) < 0.5, torch.rand(3, M, generator=seed) < 0.5
    key_mask[0, :140] = False  # whole tiles without a key
    key_mask[1], agent_mask[2] = False, False  # a row without a key, one without an agent
    extra = biases((H, M, 150))
    inputs = draw(3, 70, 150)
    compare(inputs, {"key_mask": key_mask, "agent_mask": agent_mask})
    compare(inputs, {"key_mask": key_mask, "agent_mask": agent_mask[:1], "aggregate_bias": extra[0]}, extra=extra)


def test_float32_strides_half_and_autocast():
    compare(draw(2, 130, 140, torch.float32), {}, 1e-5)
    inputs = draw(2, 70, 80)
    want = agent_attention(*inputs, backend="naive")
    turned = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in inputs]
    torch.testing.assert_close(agent_attention(*turned, backend="tiled"), want, rtol=1e-12, atol=1e-12)
    low = agent_attention(*(t.bfloat16() for t in inputs), backend="tiled")
    assert low.dtype == torch.bfloat16 and (low - want).norm() / want.norm() < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(agent_attention(*(t.float() for t in inputs), backend="tiled"), low)


def test_half_precision_is_computed_in_float32():
    """Bit by bit: what float32 gives for the same numbers, rounded at the end; gradients too."""
    inputs, results = [t.bfloat16() for t in draw(2, 70, 200)], []
    weight = torch.randn(2, 70, H, 4).bfloat16()
    for dtype in (torch.bfloat16, torch.float32):
        leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
        y = agent_attention(*leaves, backend="tiled")
        results.append([y.detach(), *torch.autograd.grad(y, leaves, weight.to(dtype))])
    for one, other in zip(*results, strict=True):
        assert one.dtype == torch.bfloat16 and torch.equal(one, other.bfloat16())


def test_auto_is_tiled_unless_weights_are_dropped(monkeypatch):
    calls = []
    monkeypatch.setattr(tiled, "_forward", lambda *a, real=tiled._forward: calls.append(1) or real(*a))
    inputs = draw(2, 10, 12)
    agent_attention(*inputs)
    agent_attention(*inputs, drop=0.5)
    agent_attention(*inputs, backend="sdpa")
    assert len(calls) == 1
    with pytest.raises(ValueError, match="does not support drop"):
        agent_attention(*inputs, drop=0.5, backend="tiled")


def test_operator_is_registered_for_the_compiler():
    inputs, extra = draw(2, 5, 7), biases((1, H, M, 7), (2, 1, 5, M))
    key_mask, agent_mask = torch.ones(2, 7, dtype=torch.bool), torch.ones(2, M, dtype=torch.bool)
    operator = torch.ops.seqzoo.agent_attention.default
    torch.library.opcheck(operator, (*inputs, *extra, key_mask, agent_mask, 0.5, 0.4))
    torch.library.opcheck(operator, (*inputs, None, None, None, None, 0.5, 0.4))


def test_nothing_to_see():
    for length, source in ((0, 3), (3, 0)):
        y = agent_attention(*(t.detach() for t in draw(2, length, source)))
        assert y.shape == (2, length, H, 4) and (y == 0).all()
