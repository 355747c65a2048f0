"""Lightning Attention, the mixer: its own checks; the conformance suite does the rest."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from seqzoo.blocks.mixers.lightning import LightningAttention, LightningState, decay_slopes
from seqzoo.blocks.parameters import parameter_groups
from seqzoo.blocks.protocol import state_elements
from seqzoo.blocks.registry import create_mixer
from seqzoo.kernels.linear_attention import linear_attention

MINIMAX = {"norm": "rmsnorm", "gate": "full", "schedule": "minimax"}
TRANSNORMER = {"norm": "srmsnorm", "gate": "linear", "value_act": False, "lrpe": True, "schedule": "paper"}
FORMS = {"authors": {}, "minimax": MINIMAX, "transnormer": TRANSNORMER, "plain": {"gate": "none", "norm_eps": 0.1}}


def build(dim=16, **options):
    torch.manual_seed(0)
    options = {"num_heads": 4, "layer_index": 1, "num_layers": 6, **options}
    mixer = create_mixer("lightning", dim, dtype=torch.float64, **options).eval()
    for parameter in mixer.norm.parameters():  # weights of 1 would hide a norm that has none
        torch.nn.init.uniform_(parameter, 0.5, 2)
    return mixer


def tensor(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def close(got, want):
    torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)


def heads(mixer, x):
    """q, k, v of each head, (B, H, L, K), as the papers have them."""
    q, k, v = (
        p(x).unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    )
    q, k, v = F.silu(q), F.silu(k), F.silu(v) if mixer.value_act else v
    if mixer.lrpe is not None:
        angle = mixer.lrpe.theta[:, None] * torch.arange(x.shape[1])[:, None]
        q, k = (torch.cat([t * angle.cos(), t * angle.sin()], -1) for t in (q, k))
    return q, k, v


def around(mixer, o, x, form):
    """From o (B, H, L, V) to the output."""
    o = o.transpose(1, 2).flatten(2)
    if form == "transnormer":
        o = o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6)
    elif form == "minimax":
        o = mixer.norm.weight * o * torch.rsqrt(o.square().mean(-1, keepdim=True) + 1e-6)
    else:
        o = F.layer_norm(o, o.shape[-1:], mixer.norm.weight, mixer.norm.bias, 0.1 if form == "plain" else 1e-5)
    if form == "transnormer":
        o = o * mixer.gate_proj(x)
    elif form != "plain":
        o = o * torch.sigmoid(mixer.gate_proj(x))
    return mixer.out_proj(o)


@pytest.mark.parametrize("backend", ["chunked", "naive"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("form", list(FORMS))
def test_equals_the_dense_decay_mask(form, causal, backend):
    mixer, x = build(causal=causal, backend=backend, **FORMS[form]), tensor(2, 77, 16)
    q, k, v = heads(mixer, x)
    distance = torch.arange(77)[:, None] - torch.arange(77)
    slopes = -torch.tensor(mixer.log_decay, dtype=torch.float64)[:, None, None]
    mask = torch.exp(-slopes * distance.abs())
    if causal:
        mask = mask.tril()
    close(mixer(x).y, around(mixer, (q @ k.mT * mask) @ v, x, form))


@pytest.mark.parametrize("form", ["authors", "transnormer"])
def test_the_state_is_the_recurrence(form):
    mixer, x = build(causal=True, **FORMS[form]), tensor(2, 40, 16)
    q, k, v = heads(mixer, x)
    decay = torch.tensor(mixer.log_decay, dtype=torch.float64).exp()[:, None, None]
    s, rows = torch.zeros(2, 4, k.shape[-1], 4, dtype=torch.float64), []
    for t in range(40):
        s = decay * s + k[:, :, t, :, None] * v[:, :, t, None, :]
        rows.append((q[:, :, t, None] @ s).squeeze(2))
    start = mixer.init_state(2)
    out = mixer(x, state=start)
    close(out.y, around(mixer, torch.stack(rows, 2), x, form))
    close(out.state.s, s)
    assert (out.state.position is None) == (form == "authors")
    assert not start.s.any()
    for length in (0, 1, 10**6):
        assert mixer.state_size(length) == state_elements(start) == state_elements(out.state)


def test_matches_transformers_minimax():
    """Its projection holds q, k, v of a head side by side, and so does each head of the weight."""
    modeling = pytest.importorskip(
        "transformers.models.minimax.modeling_minimax", reason="transformers is not installed"
    )
    from transformers import MiniMaxConfig

    config = MiniMaxConfig(
        hidden_size=48, num_attention_heads=6, head_dim=8, num_hidden_layers=3, block_size=16,
        layer_types=["linear_attention"] * 3,
    )  # fmt: skip
    for layer in range(3):
        torch.manual_seed(layer)
        theirs = modeling.MiniMaxLightningAttention(config, layer)
        ours = LightningAttention(48, num_heads=6, causal=True, layer_index=layer, num_layers=3, **MINIMAX)
        torch.nn.init.uniform_(theirs.norm.weight, 0.5, 2)
        q, k, v = (w.flatten(0, 1) for w in theirs.qkv_proj.weight.unflatten(0, (6, 3, 8)).unbind(1))
        weights = {"q_proj": q, "k_proj": k, "v_proj": v, "gate_proj": theirs.output_gate.weight}
        weights |= {"out_proj": theirs.out_proj.weight, "norm": theirs.norm.weight}
        ours.load_state_dict({f"{name}.weight": weight for name, weight in weights.items()})
        x = tensor(2, 70, 48).float()
        want, want_state = theirs(x, None, None)
        out = ours(x, state=ours.init_state(2))
        torch.testing.assert_close(out.y, want, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(out.state.s, want_state, atol=1e-5, rtol=1e-5)
        assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_without_decay_it_is_unnormalised_linear_attention():
    mixer, x = build(causal=True), tensor(2, 70, 16)
    mixer.log_decay = (0.0,) * 4
    q, k, v = (t.transpose(1, 2) for t in heads(mixer, x))
    o, _ = linear_attention(q, k, v, causal=True, normalize=False)
    close(mixer(x).y, around(mixer, o.transpose(1, 2), x, "authors"))


def test_slopes_of_the_authors_and_of_minimax():
    for layer in range(6):
        for number in (1, 2, 8, 64):
            base = torch.tensor([2 ** (-8 * (h + 1) / number) for h in range(number)], dtype=torch.float64)
            for schedule, depth in (("alibi", layer / 5), ("minimax", layer / (5 + 1e-5))):
                close(decay_slopes(number, schedule, layer_index=layer, num_layers=6), base * (1 - depth + 1e-5))
    # Other numbers of heads: the power of two below, then every other slope of the next one; MiniMax has one formula.
    six = [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8, 2.0**-1, 2.0**-3]
    close(decay_slopes(6), torch.tensor(six, dtype=torch.float64) * (1 + 1e-5))
    close(decay_slopes(6, "minimax"), 2 ** (-8 * torch.arange(1, 7).double() / 6) * (1 + 1e-5))


def test_slopes_of_the_paper():
    close(decay_slopes(4, "paper", layer_index=0, num_layers=8), torch.tensor([2.0, 4, 6, 8]).double() * 7 / 8)
    assert not decay_slopes(4, "paper", layer_index=7, num_layers=8).any()  # the last layer sees everything


@pytest.mark.parametrize("schedule", ["alibi", "minimax", "paper"])
def test_slopes_are_finite_for_one_layer_and_fall_with_depth(schedule):
    single = decay_slopes(8, schedule)
    assert torch.isfinite(single).all() and (single > 0).all()
    layers = [decay_slopes(8, schedule, layer_index=i, num_layers=5) for i in range(5)]
    assert all((deep < shallow).all() and (deep >= 0).all() for shallow, deep in itertools.pairwise(layers))


def test_the_decay_keeps_its_digits_in_half_precision():
    mixer = build(causal=True, num_heads=2).bfloat16()
    q = torch.zeros(1, 1, 16, dtype=torch.bfloat16)
    state = LightningState(torch.ones(1, 2, 8, 8))
    for _ in range(3):
        state = mixer(q, state=state).state
    want = torch.tensor([math.exp(3 * g) for g in mixer.log_decay])
    torch.testing.assert_close(state.s[0, :, 0, 0], want, atol=0, rtol=1e-6)  # exp(3 s) with s in bf16 is off by 1e-3
    assert state.s.dtype == torch.float32


def test_lrpe_is_relative():
    """An empty past of any length does not matter, and the product only knows distances."""
    mixer, x = build(causal=True, **TRANSNORMER), tensor(2, 30, 16)
    late = LightningState(mixer.init_state(2).s, torch.tensor([1000, 7]))
    out = mixer(x, state=late)
    torch.testing.assert_close(out.y, mixer(x).y, atol=1e-9, rtol=0)  # angles of 1000 lose three digits
    assert out.state.position.tolist() == [1030, 37]
    start = 10000.0 ** (-2 / 16 * torch.arange(16).double())
    torch.testing.assert_close(mixer.lrpe.theta.detach(), start.view(4, 4), atol=1e-6, rtol=1e-6)
    groups = parameter_groups(mixer, lr=1e-3, weight_decay=0.1)
    assert [g["weight_decay"] for g in groups if any(p is mixer.lrpe.theta for p in g["params"])] == [0.0]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("lrpe", [True, False])
def test_pads_do_not_age_the_past(causal, lrpe):
    mixer, x = build(causal=causal, lrpe=lrpe), tensor(3, 50, 16)
    place = torch.arange(50)
    mask = torch.stack([place % 3 != 1, place >= 21, (place > 9) & (place < 15)])
    state = mixer(tensor(3, 9, 16, seed=2), state=mixer.init_state(3)).state if causal else None
    out = mixer(x, mask=mask, state=state)
    for row in range(3):
        one = slice(row, row + 1)
        part = None if state is None else LightningState(*(None if t is None else t[one] for t in state))
        alone = mixer(x[one, mask[row]], state=part)
        close(out.y[one, mask[row]], alone.y)
        if causal:
            close(out.state.s[one], alone.state.s)
            assert not lrpe or torch.equal(out.state.position[one], alone.state.position)
    assert (out.y[~mask] == 0).all()


@pytest.mark.parametrize("causal", [True, False])
def test_gradients_are_those_of_the_oracle(causal):
    x, weight = tensor(2, 70, 16), tensor(2, 70, 16, seed=3)
    found = []
    for backend in ("chunked", "naive"):
        mixer = build(causal=causal, backend=backend, **TRANSNORMER)
        inputs = x.clone().requires_grad_()
        found.append(torch.autograd.grad((mixer(inputs).y * weight).sum(), [inputs, *mixer.parameters()]))
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want, atol=1e-11, rtol=1e-11)


def test_parameter_counts():
    def count(**options):
        return sum(p.numel() for p in build(dim=64, num_heads=8, **options).parameters())

    assert count() == 4 * 64 * 64 + 2 * 64 * 8 + 2 * 64  # the authors' module
    assert count(**MINIMAX) == 5 * 64 * 64 + 64
    assert count(**TRANSNORMER) == 5 * 64 * 64 + 64
    assert count(gate="none", qkv_bias=True, proj_bias=True) == 4 * (64 * 64 + 64) + 2 * 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 3}, "num_heads=3 does not divide dim=16"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"schedule": "alibis"}, "schedule='alibis' is unknown. Did you mean alibi"),
        ({"norm": "batchnorm"}, "norm='batchnorm' is unknown"),
        ({"gate": "lowrank"}, "Did you mean low_rank"),
        ({"layer_index": 6, "num_layers": 6}, "layer_index=6 .* num_layers=6; the last layer is 5"),
        ({"layer_index": -1}, "layer_index=-1"),
        ({"norm_eps": 0.0}, "norm_eps=0.0"),
        ({"proj_drop": 1.0}, "proj_drop=1.0"),
        ({"chunk_size": 12}, "chunk_size=12 must be a power of two"),
        ({"backend": "flash"}, "backend='flash' is unknown"),
    ],
)
def test_bad_options_are_refused_when_built(options, message):
    with pytest.raises(ValueError, match=message):
        LightningAttention(16, **{"num_heads": 4, **options})


def test_states_of_others_are_refused():
    mixer, x = build(causal=True), tensor(2, 5, 16)
    linear = create_mixer("linear", 16, num_heads=4, causal=True).init_state(2)
    for state, message in (
        (linear, "LinearState of another mixer"),
        (build(causal=True, lrpe=True).init_state(2), "of another mixer"),
        (mixer.init_state(3), r"shape \(3, 4, 4, 4\), expected \(2, 4, 4, 4\)"),
        (build(causal=True, num_heads=2).init_state(2), r"expected \(2, 4, 4, 4\)"),
    ):
        with pytest.raises(ValueError, match=message):
            mixer(x, state=state)
    with pytest.raises(ValueError, match="does not support the pattern 'cross'"):
        create_mixer("lightning", 16, cross=True)
