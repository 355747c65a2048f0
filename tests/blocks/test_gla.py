"""Gated linear attention, the mixer: its own checks; the conformance suite does the rest."""

import math

import pytest
import torch
import torch.nn.functional as F

from seqzoo.blocks.mixers.gla import GatedLinearAttention, GLAState
from seqzoo.blocks.protocol import state_elements
from seqzoo.blocks.registry import create_mixer
from seqzoo.kernels.gated_linear_attention import gated_linear_attention
from seqzoo.kernels.linear_attention import linear_attention

FORMS = {
    "default": {},
    "conv": {"d_conv": 4, "conv_bias": True, "num_heads": 2, "num_kv_heads": 1},
    "wide": {"num_heads": 2, "expand_k": 1.0, "expand_v": 1.5, "feature_map": "elu+1", "gate_fn": "sigmoid",
             "gate_logit_normalizer": 2.0, "clamp_min": -0.5, "gate_low_rank_dim": 3},
    "plain": {"output_gate": False, "norm_affine": False, "norm_eps": 0.1, "num_heads": 1},
}  # fmt: skip


def build(dim=16, **options):
    torch.manual_seed(0)
    mixer = create_mixer("gla", dim, dtype=torch.float64, **options).eval()
    with torch.no_grad():
        for name, parameter in mixer.named_parameters():  # off their start, so that nothing hides
            parameter.add_(0.3 * torch.randn_like(parameter) if "proj" in name else torch.rand_like(parameter))
    return mixer


def tensor(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def parts(mixer, x):
    """q, k, v and log alpha of each head, (B, L, H, K)."""
    joint = [p(x) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)]
    if mixer.conv is not None:
        taps, bias = mixer.conv.weight, mixer.conv.bias
        rows = F.pad(torch.cat(joint, -1).mT, (mixer.conv.kernel_size - 1, 0))
        joint = F.silu(F.conv1d(rows, taps, bias, groups=taps.shape[0])).mT.split(mixer.widths, -1)
    gate = F.logsigmoid(mixer.decay_proj[1](mixer.decay_proj[0](x))) / mixer.gate_logit_normalizer
    if mixer.clamp_min is not None:
        gate = gate.clamp(min=mixer.clamp_min)
    q, k, v, gate = (
        t.unflatten(-1, (-1, width))
        for t, width in zip((*joint, gate), (mixer.key_dim, mixer.key_dim, mixer.value_dim, mixer.key_dim), strict=True)
    )
    if mixer.feature_map is not None:
        q, k = F.elu(q) + 1, F.elu(k) + 1
    repeats = mixer.num_heads // mixer.num_kv_heads
    k, v, gate = (t.repeat_interleave(repeats, 2) for t in (k, v, gate))
    return q * mixer.key_dim**-0.5, k, v, gate


def loop(q, k, v, gate):
    s, rows = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        s = gate[:, t, :, :, None].exp() * s + k[:, t, :, :, None] * v[:, t, :, None, :]
        rows.append((q[:, t, :, :, None] * s).sum(-2))
    return torch.stack(rows, 1), s


def around(mixer, o, x):
    eps = mixer.norm.eps
    o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + eps)
    o = (o * mixer.norm.weight if hasattr(mixer.norm, "weight") else o).flatten(2)
    if mixer.gate_proj is not None:
        gate = mixer.gate_proj(x)
        o = o * (torch.sigmoid(gate) * (gate if mixer.gate_fn == "silu" else 1))
    return mixer.out_proj(o)


@pytest.mark.parametrize("backend", ["chunked", "naive"])
@pytest.mark.parametrize("form", list(FORMS))
def test_causal_is_the_recurrence(form, backend):
    mixer, x = build(causal=True, backend=backend, **FORMS[form]), tensor(2, 70, 16)
    o, s = loop(*parts(mixer, x))
    start = mixer.init_state(2)
    out = mixer(x, state=start)
    close(out.y, around(mixer, o, x))
    close(out.state.s, s)
    assert not start.s.any()
    for length in (0, 1, 10**6):
        assert mixer.state_size(length) == state_elements(start) == state_elements(out.state)


@pytest.mark.parametrize("form", list(FORMS))
def test_bidirectional_is_a_pass_each_way_with_the_token_counted_once(form):
    mixer, x = build(**FORMS[form]), tensor(2, 50, 16)
    q, k, v, gate = parts(mixer, x)
    o = loop(q, k, v, gate)[0] + loop(*(t.flip(1) for t in (q, k, v, gate)))[0].flip(1)
    close(mixer(x).y, around(mixer, o - (q * k).sum(-1, keepdim=True) * v, x))


def test_matches_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.gla.naive", reason="flash-linear-attention is not installed")
    for form in FORMS.values():
        mixer, x = build(causal=True, **form).float(), tensor(2, 70, 16).float()
        q, k, v, gate = parts(mixer, x)
        state = mixer.init_state(2)._replace(s=torch.randn_like(mixer.init_state(2).s))
        o, s = naive.naive_recurrent_gla(q * mixer.key_dim**0.5, k, v, gate, state.s, True)
        out = mixer(x, state=state)
        torch.testing.assert_close(out.state.s, s, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.y, around(mixer, o, x), atol=1e-5, rtol=1e-5)


def test_a_constant_gate_is_constant_decay_and_an_open_one_none():
    """With W_2 = 0 the gate is its bias: Lightning's operation; at alpha = 1, unnormalised linear attention."""
    mixer, x = build(causal=True, num_heads=4), tensor(2, 70, 16)
    torch.nn.init.zeros_(mixer.decay_proj[1].weight)
    logits = torch.tensor([-3.0, 0.0, 2.0, 50.0], dtype=torch.float64)
    mixer.decay_proj[1].bias.data = logits.repeat_interleave(mixer.key_dim)
    q, k, v, _ = parts(mixer, x)
    o, _ = gated_linear_attention(q, k, v, F.logsigmoid(logits) / 16)
    close(mixer(x).y, around(mixer, o, x))
    mixer.decay_proj[1].bias.data.fill_(1e3)
    o, _ = linear_attention(q, k, v, causal=True, normalize=False)
    close(mixer(x).y, around(mixer, o, x))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalizer", [16.0, 0.01])
def test_gradients_are_those_of_the_oracle(causal, normalizer):
    """Also where a token forgets by exp(-100): with it, exp(-G) would not be a number after eight of them."""
    x, weight = tensor(2, 70, 16), tensor(2, 70, 16, seed=3)
    found = []
    for backend in ("chunked", "naive"):
        mixer = build(causal=causal, backend=backend, d_conv=3, gate_logit_normalizer=normalizer)
        inputs = x.clone().requires_grad_()
        found.append(torch.autograd.grad((mixer(inputs).y * weight).sum(), [inputs, *mixer.parameters()]))
    for got, want in zip(*found, strict=True):
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


def test_strong_gates_in_single_precision():
    # A norm of nearly nothing would multiply the rounding; eps = 1 does not.
    mixer, x = build(causal=True, gate_logit_normalizer=0.1, norm_eps=1.0), tensor(2, 130, 16)
    want = mixer(x).y
    single = mixer.float()
    inputs = x.float().requires_grad_()
    y = single(inputs).y
    torch.testing.assert_close(y, want.float(), atol=1e-5, rtol=1e-5)
    assert all(torch.isfinite(g).all() for g in torch.autograd.grad(y.sum(), [inputs, *single.parameters()]))


def test_weights_start_as_published():
    torch.manual_seed(0)
    mixer = GatedLinearAttention(256)
    for layer in (mixer.q_proj, mixer.k_proj, *mixer.decay_proj):
        bound = 2**-2.5 * math.sqrt(6 / sum(layer.weight.shape))
        assert 0.97 * bound < layer.weight.abs().max() <= bound
    for layer in (mixer.v_proj, mixer.gate_proj, mixer.out_proj):
        bound = 256**-0.5
        assert 0.97 * bound < layer.weight.abs().max() <= bound
    gate = (F.logsigmoid(mixer.decay_proj(torch.randn(100, 256))) / 16).exp()
    assert gate.min() > 0.93 and gate.max() < 0.98  # about 2^(-1/16): half forgotten after 16 tokens


def test_parameter_counts():
    def count(**options):
        return sum(p.numel() for p in GatedLinearAttention(64, **options).parameters())

    base = 2 * 64 * 32 + 3 * 64 * 64 + 64 * 16 + 16 * 32 + 32 + 16  # q and k; v, gate and output; decay; norm
    assert count() == base
    assert count(d_conv=4) == base + 4 * (32 + 32 + 64)
    assert count(output_gate=False, norm_affine=False) == base - 64 * 64 - 16
    assert count(num_kv_heads=2) == base - 64 * 16 - 64 * 32 - 16 * 16 - 16


def test_the_state_has_the_tail_of_the_convolution():
    mixer, x = build(causal=True, d_conv=4), tensor(3, 30, 16)
    mask = torch.arange(30) < torch.tensor([30, 12, 2])[:, None]
    out = mixer(x, mask=mask, state=mixer.init_state(3))
    joint = torch.cat([p(x) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)], -1)
    close(out.state.conv[0], joint[0, 27:])
    close(out.state.conv[1], joint[1, 9:12])
    close(out.state.conv[2], torch.cat([joint.new_zeros(1, joint.shape[2]), joint[2, :2]]))
    assert mixer.state_size(5) == 4 * 2 * 4 + 3 * (8 + 8 + 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gates_and_state_stay_in_single_precision(dtype):
    """2^(-1/16) in bf16 is 0.957: after 300 tokens the past would be off by a tenth."""
    mixer = GatedLinearAttention(16, causal=True, dtype=dtype)
    for parameter in mixer.parameters():
        torch.nn.init.zeros_(parameter)
    state = GLAState(torch.ones(1, 4, 2, 4))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.float32):
        state = mixer(torch.ones(1, 300, 16, dtype=dtype), state=state).state
    assert state.s.dtype == torch.float32
    torch.testing.assert_close(state.s, torch.full_like(state.s, 2 ** (-300 / 16)), atol=0, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"expand_k": 0.3}, "expand_k=0.3 times dim=16 is not a positive integer; nearest 0.3125"),
        ({"expand_v": 0.0}, "expand_v=0.0"),
        ({"feature_map": "elu"}, r"feature_map='elu' is unknown. Did you mean relu, elu\+1"),
        ({"gate_fn": "silo"}, "Did you mean silu"),
        ({"gate_low_rank_dim": 0}, "gate_low_rank_dim=0"),
        ({"d_conv": -1}, "d_conv=-1"),
        ({"gate_logit_normalizer": 0.0}, "gate_logit_normalizer=0.0"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"clamp_min": 0.5}, "clamp_min=0.5"),
        ({"proj_drop": 1.0}, "proj_drop=1.0"),
        ({"chunk_size": 0}, "chunk_size=0 must be a power of two"),
        ({"backend": "flash"}, "backend='flash' is unknown"),
    ],
)
def test_bad_options_are_refused_when_built(options, message):
    with pytest.raises(ValueError, match=message):
        GatedLinearAttention(16, **options)


def test_states_of_others_are_refused():
    mixer, x = build(causal=True), tensor(2, 5, 16)
    linear = create_mixer("linear", 16, num_heads=4, causal=True).init_state(2)
    for state, message in (
        (linear, "LinearState of another mixer"),
        (build(causal=True, d_conv=4).init_state(2), "of another mixer"),
        (mixer.init_state(3), r"shape \(3, 4, 2, 4\), expected \(2, 4, 2, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            mixer(x, state=state)
    with pytest.raises(ValueError, match="does not support the pattern 'cross'"):
        create_mixer("gla", 16, cross=True)
