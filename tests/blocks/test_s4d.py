"""The S4D mixer: its formula, streaming, padding, optimiser tags and options."""

import pytest
import torch
from torch.nn import functional as F

from seqzoo.blocks.mixers.s4d import S4D, S4DState
from seqzoo.blocks.parameters import parameter_groups
from seqzoo.blocks.protocol import state_elements
from seqzoo.blocks.registry import create_mixer

torch.set_num_threads(1)


def build(dim=6, **options):
    torch.manual_seed(0)
    return S4D(dim, dtype=torch.float64, **{"d_state": 8, **options}).eval()


def sequence(batch, length, dim=6, seed=1):
    return torch.randn(batch, length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_hand(mixer, x, rate=1.0):
    """The causal layer from its parameters with zero-order hold, one step after another."""
    a = torch.complex(-mixer.log_a_real.exp(), mixer.a_imag)
    b, c = torch.view_as_complex(mixer.b), torch.view_as_complex(mixer.c[0])
    step = (rate * mixer.log_dt.exp())[:, None]
    a_bar = torch.exp(step * a)
    b_bar = (a_bar - 1) / a * b
    state, outputs = torch.zeros(x.shape[0], *a.shape, dtype=a.dtype), []
    for t in range(x.shape[1]):
        state = a_bar * state + b_bar * x[:, t, :, None]
        outputs.append(2 * (c * state).real.sum(-1) + mixer.d * x[:, t])
    left, right = mixer.out_proj(F.gelu(torch.stack(outputs, 1))).chunk(2, -1)
    return left * torch.sigmoid(right)


@pytest.mark.parametrize("backend", ["auto", "chunked", "fft", "naive"])
@pytest.mark.parametrize("rate", [1.0, 2.5])
def test_the_layer_step_by_step(backend, rate):
    mixer = build(causal=True, backend=backend, rate=rate)
    x = sequence(2, 130)
    torch.testing.assert_close(mixer(x).y, by_hand(mixer, x, rate), atol=1e-11, rtol=0)


def test_rate_resamples():
    """Half the samples at twice the rate: a slow input held constant over pairs gives nearly the same
    output."""
    mixer = build(causal=True, output="linear", activation="none", dt_min=0.001, dt_max=0.005)
    x = torch.sin(torch.linspace(0, 3, 200, dtype=torch.float64)).view(1, 200, 1).expand(1, 200, 6)
    fine = mixer(x.repeat_interleave(2, 1)).y[:, 1::2]
    plain = mixer(x).y
    mixer.rate = 2.0
    torch.testing.assert_close(mixer(x).y, fine, atol=1e-10, rtol=0)
    assert (plain - fine).abs().max() > 1e-3


def test_bidirectional_is_two_causal_layers_and_counts_the_centre_once():
    mixer = build(output="linear", activation="none")
    x = sequence(2, 90)
    ahead, behind = (build(causal=True, output="linear", activation="none") for _ in range(2))
    for layer, row in ((ahead, 0), (behind, 1)):
        layer.load_state_dict({**mixer.state_dict(), "c": mixer.c[row : row + 1]})
        layer.out_proj = torch.nn.Identity()
    behind.d.data.zero_()
    later = F.pad(behind(x.flip(1)).y.flip(1)[:, 1:], (0, 0, 0, 1))  # from the tokens after t only
    torch.testing.assert_close(mixer(x).y, mixer.out_proj(ahead(x).y + later), atol=1e-11, rtol=0)


@pytest.mark.parametrize("backend", ["chunked", "fft"])
@pytest.mark.parametrize("init", ["lin", "legs"])
def test_prefill_chunks_and_steps_equal_the_whole(backend, init):
    mixer = build(causal=True, backend=backend, init=init, discretization="bilinear")
    x = sequence(2, 140)
    state = mixer.init_state(2)
    assert mixer(x).state is None
    whole, parts = mixer(x, state=state), []
    for part in x.split([100, 1, 1, 38], 1):
        y, state, _ = mixer(part, state=state)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), mixer(x).y, atol=1e-11, rtol=0)
    torch.testing.assert_close(state.x, whole.state.x, atol=1e-11, rtol=0)
    assert state.x.requires_grad
    assert state_elements(state) == mixer.state_size(140) == mixer.state_size(1) == 6 * 8


def test_the_state_carries_gradients():
    mixer = build(causal=True)
    x = sequence(1, 40).requires_grad_()
    first = mixer(x[:, :25], state=mixer.init_state(1))
    second = mixer(x[:, 25:], state=first.state)
    weight = sequence(1, 15, seed=3)
    split = torch.autograd.grad((second.y * weight).sum(), [x, *mixer.parameters()])
    whole = torch.autograd.grad((mixer(x).y[:, 25:] * weight).sum(), [x, *mixer.parameters()])
    assert split[0][:, :25].abs().min() > 0
    for a, b in zip(split, whole, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-10)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("kind", ["left", "right", "holes"])
def test_pads_are_as_if_absent(causal, kind):
    mixer = build(causal=causal)
    x = sequence(3, 100)
    place = torch.arange(100)
    masks = {
        "right": [place < n for n in (100, 70, 9)],
        "left": [place >= 100 - n for n in (100, 70, 9)],
        "holes": [place % 3 != 1, place % 7 > 2, (place > 20) & (place < 30)],
    }
    mask = torch.stack(masks[kind])
    state = S4DState(torch.randn(3, 6, 4, 2, dtype=torch.float64)) if causal else None
    y, last, _ = mixer(x, mask=mask, state=state)
    for row in range(3):
        one = slice(row, row + 1)
        alone = mixer(x[one, mask[row]], state=S4DState(state.x[one]) if causal else None)
        torch.testing.assert_close(y[one, mask[row]], alone.y, atol=1e-11, rtol=0)
        if causal:
            torch.testing.assert_close(last.x[one], alone.state.x, atol=1e-11, rtol=0)
    assert (y[~mask] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_packed_is_separate(causal):
    mixer = build(causal=causal)
    x, cu = sequence(1, 120), torch.tensor([0, 70, 71, 120], dtype=torch.int32)
    state = S4DState(torch.randn(3, 6, 4, 2, dtype=torch.float64)) if causal else None
    y, last, _ = mixer(x, cu_seqlens=cu, state=state)
    for row, (a, b) in enumerate(((0, 70), (70, 71), (71, 120))):
        alone = mixer(x[:, a:b], state=S4DState(state.x[row : row + 1]) if causal else None)
        torch.testing.assert_close(y[:, a:b], alone.y, atol=1e-11, rtol=0)
        if causal:
            torch.testing.assert_close(last.x[row : row + 1], alone.state.x, atol=1e-11, rtol=0)


def test_only_the_fft_form_is_inexact():
    assert build().exact and build(backend="naive").exact and not build(backend="fft").exact


@pytest.mark.parametrize("train_b", [False, True])
def test_special_parameters_have_their_own_group(train_b):
    mixer = build(train_b=train_b, init="legs", lr_max=5e-4)
    groups = parameter_groups(mixer, lr=1e-2, weight_decay=0.1)
    names = {id(p): name for name, p in mixer.named_parameters()}
    found = {(g["lr"], g["weight_decay"]): {names[id(p)] for p in g["params"]} for g in groups}
    special = {"log_dt", "log_a_real", "a_imag"} | ({"b"} if train_b else set())
    assert found[5e-4, 0.0] == special
    assert found[1e-2, 0.1] == {"c", "out_proj.weight"}
    assert found[1e-2, 0.0] == {"d", "out_proj.bias"}
    assert {"b"} <= set(mixer.state_dict())


def test_initial_parameters():
    mixer = build(dim=400, d_state=64, dt_min=0.01, dt_max=0.1)
    step = mixer.log_dt.exp()
    assert 0.01 <= step.min() < 0.011 and 0.09 < step.max() <= 0.1
    torch.testing.assert_close(-mixer.log_a_real.exp(), torch.full((400, 32), -0.5, dtype=torch.float64))
    torch.testing.assert_close(mixer.a_imag[3], torch.pi * torch.arange(32, dtype=torch.float64))
    assert abs(mixer.c.square().mean() - 0.5) < 0.02 and mixer.c.shape == (2, 400, 32, 2)


def test_dropout_takes_whole_channels():
    mixer = build(dim=64, drop=0.5, output="linear", activation="none").train()
    mixer.out_proj = torch.nn.Identity()
    y = mixer(sequence(3, 20, 64)).y
    dead = (y == 0).all(1)
    assert torch.equal((y == 0).any(1), dead)
    assert 0.3 < dead.double().mean() < 0.7 and not torch.equal(dead[0], dead[1])
    packed = mixer(sequence(1, 40, 64), cu_seqlens=torch.tensor([0, 25, 40])).y[0]
    assert not torch.equal((packed[:25] == 0).all(0), (packed[25:] == 0).all(0))


def test_low_precision_keeps_an_fp32_state():
    mixer = S4D(6, d_state=8, causal=True).bfloat16()
    out = mixer(sequence(2, 70).bfloat16(), state=mixer.init_state(2))
    assert out.y.dtype == torch.bfloat16 and out.state.x.dtype == torch.float32
    assert S4D(6, causal=True).init_state(1, dtype=torch.float16).x.dtype == torch.float32
    full = S4D(6, d_state=8, causal=True)
    x = sequence(2, 70).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = full(x).y
    torch.testing.assert_close(y.float(), full(x).y, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"d_state": 7}, "d_state=7"),
        ({"init": "legendre"}, "init='legendre'"),
        ({"discretization": "zho"}, "zoh"),
        ({"activation": "gleu"}, "gelu"),
        ({"output": "gule"}, "output='gule'"),
        ({"backend": "fast"}, "backend='fast'"),
        ({"dt_min": 0.2}, "dt_min=0.2"),
        ({"rate": 0.0}, "rate=0.0"),
        ({"lr_max": -1.0}, "lr_max=-1.0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        S4D(6, **options)


def test_unsupported_patterns_and_states():
    with pytest.raises(ValueError, match="S4D does not support the pattern 'cross'"):
        create_mixer("s4d", 6, cross=True)
    with pytest.raises(ValueError, match="carries no state"):
        build().init_state(1)
    with pytest.raises(ValueError, match="carries no state"):
        build().state_size(1)
    with pytest.raises(ValueError, match="state is of 1 rows, but there are 2 sequences"):
        build(causal=True)(sequence(2, 5), state=build(causal=True).init_state(1))
