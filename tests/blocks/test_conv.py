"""The short causal convolution against torch's own, in pieces and with pads."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqzoo.blocks.layers.conv import ShortConv

torch.set_num_threads(1)


def build(channels=6, kernel_size=4, **options):
    torch.manual_seed(0)
    return ShortConv(channels, kernel_size, dtype=torch.float64, **options)


def draw(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kernel_size", [1, 2, 4])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["silu", None])
def test_it_is_torchs_depthwise_convolution(kernel_size, bias, activation):
    """Outputs and gradients; the weights of nn.Conv1d load as they are."""
    ours = build(kernel_size=kernel_size, bias=bias, activation=activation)
    theirs = nn.Conv1d(6, 6, kernel_size, groups=6, padding=kernel_size - 1, bias=bias, dtype=torch.float64)
    ours.load_state_dict(theirs.state_dict())
    x, weight = draw(2, 9, 6).requires_grad_(), draw(2, 9, 6, seed=2)
    want = theirs(x.transpose(1, 2))[..., :9].transpose(1, 2)
    want = F.silu(want) if activation else want
    got, state = ours(x)
    assert state is None
    torch.testing.assert_close(got, want, atol=1e-12, rtol=0)
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), (x, *ours.parameters())),
        torch.autograd.grad((want * weight).sum(), (x, *theirs.parameters())),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("kernel_size", [1, 4])
def test_pieces_equal_the_whole(kernel_size):
    conv, x = build(kernel_size=kernel_size), draw(2, 11, 6)
    state, parts = conv.init_state(2), []
    for part in x.split([1, 5, 1, 1, 3], 1):
        before = state.clone()
        y, new = conv(part, state=state, return_state=True)
        assert torch.equal(state, before)
        state = new
        parts.append(y)
    whole, last = conv(x, return_state=True)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-12, rtol=0)
    assert torch.equal(state, last)
    assert torch.equal(state, x[:, 11 - kernel_size + 1 :])


def test_the_state_follows_the_lengths():
    """The inputs kept are each row's last real ones, reaching back into the earlier state; an empty row keeps it."""
    conv, x, state = build(), draw(3, 7, 6), draw(3, 3, 6, seed=3)
    lengths = torch.tensor([5, 2, 0])
    y, last = conv(x, lengths=lengths, state=state, return_state=True)
    for row, n in enumerate(lengths.tolist()):
        alone, kept = conv(x[row : row + 1, :n], state=state[row : row + 1], return_state=True)
        torch.testing.assert_close(y[row, :n], alone[0], atol=1e-12, rtol=0)
        assert torch.equal(last[row], kept[0])
    assert torch.equal(last[2], state[2])
    assert torch.equal(last[1], torch.cat([state[1, 2:], x[1, :2]]))


def test_the_future_leaves_the_past_bitwise_alone():
    conv, x = build().float(), draw(2, 40, 6).float()
    changed = x.clone()
    changed[:, 17:] += 1e3
    assert torch.equal(conv(changed)[0][:, :17], conv(x)[0][:, :17])


def test_half_precision_adds_in_float32():
    conv = build(activation=None).bfloat16()
    x = (draw(1, 50, 6) * 100).bfloat16()
    state = conv.init_state(1)
    y, last = conv(x, state=state, return_state=True)
    assert y.dtype == last.dtype == state.dtype == torch.bfloat16
    exact = conv.float()(x.float())[0]
    assert torch.equal(y, exact.bfloat16())


def test_bad_values_are_refused():
    for options, message in (
        ({"channels": 0, "kernel_size": 4}, "channels=0"),
        ({"channels": 4, "kernel_size": 0}, "kernel_size=0"),
        ({"channels": 4, "kernel_size": 4, "activation": "silo"}, "activation='silo' is unknown. Did you mean silu"),
    ):
        with pytest.raises(ValueError, match=message):
            ShortConv(**options)
    conv = build()
    with pytest.raises(ValueError, match=r"x has shape \(2, 5, 7\)"):
        conv(draw(2, 5, 7))
    with pytest.raises(ValueError, match=r"state has shape \(3, 3, 6\), expected \(2, 3, 6\)"):
        conv(draw(2, 5, 6), state=conv.init_state(3))
