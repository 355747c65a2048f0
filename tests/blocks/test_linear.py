"""Linear attention, the mixer: its own checks; the conformance suite does the rest."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from seqzoo.blocks.mixers.linear import LinearAttention, elu_plus_one
from seqzoo.blocks.protocol import state_elements
from seqzoo.blocks.registry import create_mixer, list_mixers


def build(**options):
    torch.manual_seed(0)
    return create_mixer("linear", 16, dtype=torch.float64, **{"num_heads": 4, **options}).eval()


def tensor(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def dense(mixer, x, context=None, key_mask=None, phi=lambda t: F.elu(t) + 1):
    """The published formula on the mixer's weights: a row-normalised kernel matrix times the values."""
    source = x if context is None else context

    def heads(t):
        return t.unflatten(-1, (mixer.num_heads, mixer.head_dim)).transpose(1, 2)

    q, k, v = heads(mixer.q_proj(x)), heads(mixer.k_proj(source)), heads(mixer.v_proj(source))
    w = phi(q) @ phi(k).transpose(-1, -2)
    if mixer.pattern == "causal":
        w = w.tril()
    if key_mask is not None:
        w = w * key_mask[:, None, None, :]
    o = (w / (w.sum(-1, keepdim=True) + mixer.eps)) @ v
    return mixer.out_proj(o.transpose(1, 2).flatten(2))


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", ["chunked", "naive"])
@pytest.mark.parametrize("cross", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_dense_formula(causal, cross, backend):
    for options in ({}, {"num_heads": 3, "head_dim": 5, "eps": 0.1}):
        mixer = build(causal=causal, cross=cross, backend=backend, **options)
        x, context = tensor(2, 67, 16), tensor(2, 31, 16, seed=2) if cross else None
        close(mixer(x, context).y, dense(mixer, x, context))


def test_relu_feature_map():
    mixer, x = build(feature_map="relu", causal=True, eps=1e-3), tensor(2, 20, 16)
    close(mixer(x).y, dense(mixer, x, phi=torch.relu))


@pytest.mark.parametrize("cross", [False, True])
def test_padding_takes_the_keys_out_of_both_sums(cross):
    """phi(0) = 1: keys at pads must be zero after the feature map, not before."""
    mixer = build(cross=cross)
    x, context = tensor(2, 9, 16), tensor(2, 6, 16, seed=2) if cross else None
    mask, context_mask = torch.ones(2, 9, dtype=torch.bool), torch.ones(2, 6, dtype=torch.bool)
    mask[0, 5:], mask[1, :2], context_mask[0, 1:3] = False, False, False
    y = mixer(x, context, mask=mask, context_mask=context_mask if cross else None).y
    want = dense(mixer, x, context, key_mask=context_mask if cross else mask)
    close(y, want * mask[..., None])
    assert (y[~mask] == 0).all()


def test_a_context_without_a_real_token_gives_zeros_before_the_output_bias():
    mixer = build(cross=True)
    y = mixer(tensor(1, 3, 16), tensor(1, 4, 16), context_mask=torch.zeros(1, 4, dtype=torch.bool)).y
    close(y, mixer.out_proj.bias.expand(1, 3, 16))


def test_state_is_the_two_sums_and_constant():
    mixer, x = build(causal=True), tensor(2, 70, 16)
    mask = torch.ones(2, 70, dtype=torch.bool)
    mask[1, 60:] = False
    start = mixer.init_state(2)
    out = mixer(x, mask=mask, state=start)
    k = elu_plus_one(mixer.k_proj(x)).unflatten(-1, (4, 4)) * mask[..., None, None]
    close(out.state.s, torch.einsum("blhk,blhv->bhkv", k, mixer.v_proj(x).unflatten(-1, (4, 4))))
    close(out.state.z, k.sum(1))
    assert not start.s.any() and not start.z.any()
    for length in (0, 1, 10**6):
        assert mixer.state_size(length) == state_elements(start) == state_elements(out.state) == 4 * 4 * 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_stays_in_single_precision(dtype):
    """bf16 sums would stop growing at 256: 1000 tokens count as 1000, in bf16 and under autocast."""
    mixer = LinearAttention(16, num_heads=4, causal=True, dtype=dtype)
    torch.nn.init.zeros_(mixer.k_proj.weight)
    torch.nn.init.zeros_(mixer.k_proj.bias)
    state = mixer.init_state(1)
    assert state.s.dtype == torch.float32
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        for part in torch.ones(1, 1000, 16, dtype=dtype).split(300, 1):
            state = mixer(part, state=state).state
    assert state.s.dtype == state.z.dtype == torch.float32
    assert torch.equal(state.z, torch.full_like(state.z, 1000.0))


def test_packed_with_states_equals_separate():
    mixer, x = build(causal=True), tensor(1, 75, 16).requires_grad_()
    bounds = [0, 4, 4, 70, 75]
    before = mixer(tensor(4, 3, 16, seed=5), state=mixer.init_state(4)).state
    out = mixer(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), state=before)
    parts = [
        mixer(x[:, a:b], state=type(before)(before.s[n : n + 1], before.z[n : n + 1]))
        for n, (a, b) in enumerate(itertools.pairwise(bounds))
    ]
    separate = torch.cat([p.y for p in parts], 1)
    close(out.y, separate)
    close(out.state.s, torch.cat([p.state.s for p in parts]))
    weight = tensor(1, 75, 16, seed=6)
    got, want = (torch.autograd.grad((y * weight).sum(), x, retain_graph=True)[0] for y in (out.y, separate))
    close(got, want)


def test_gradient_flows_through_a_carried_state():
    mixer, x = build(causal=True), tensor(2, 70, 16).requires_grad_()
    first = mixer(x[:, :40], state=mixer.init_state(2))
    second = mixer(x[:, 40:], state=first.state)
    weight = tensor(2, 30, 16, seed=6)
    got = torch.autograd.grad((second.y * weight).sum(), x)[0]
    want = torch.autograd.grad((mixer(x).y[:, 40:] * weight).sum(), x)[0]
    close(got, want)
    assert (got[:, :40] != 0).any()


def test_feature_map_is_elu_plus_one_and_keeps_small_values():
    x = tensor(1000) * 5
    close(elu_plus_one(x), F.elu(x) + 1)
    x = torch.tensor([-30.0, 0.0, 2.0], requires_grad=True)
    assert elu_plus_one(x)[0].item() == pytest.approx(math.exp(-30), rel=1e-5)  # F.elu(x) + 1 rounds to 0
    (gradient,) = torch.autograd.grad(elu_plus_one(x).sum(), x)
    torch.testing.assert_close(gradient, torch.tensor([math.exp(-30), 1.0, 1.0]))


def test_dropout_and_parameter_count():
    mixer, x = build(causal=True, proj_drop=0.5), tensor(2, 20, 16)
    assert sum(p.numel() for p in mixer.parameters()) == 4 * (16 * 16 + 16)
    assert sum(p.numel() for p in build(qkv_bias=False, proj_bias=False).parameters()) == 4 * 16 * 16
    assert torch.equal(mixer(x).y, mixer(x).y)
    zeros = (mixer.train()(x).y == 0).double().mean().item()
    assert 0.4 < zeros < 0.6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "dim=16 is not divisible by num_heads=3"),
        ({"num_heads": 0}, "num_heads=0"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"feature_map": "elu"}, r"feature_map='elu' is unknown. Did you mean .*elu\+1"),
        ({"eps": 0.0}, "eps=0.0"),
        ({"proj_drop": 1.0}, "proj_drop=1.0"),
        ({"backend": "flash"}, "backend='flash' is unknown; choose from auto, triton, chunked, naive"),
    ],
)
def test_bad_options_are_refused_when_built(options, message):
    with pytest.raises(ValueError, match=message):
        LinearAttention(16, **options)


def test_registered_for_every_pattern():
    for pattern in ("self", "causal", "cross", "causal-cross"):
        assert "linear" in list_mixers(pattern=pattern)
    assert "linear" in list_mixers(streaming=True)
