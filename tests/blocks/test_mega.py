"""MEGA: the layer by its formulas, its chunks and cache, the gate against the residual, the public implementation."""

from __future__ import annotations

import math

import pytest
import torch

from seqzoo.blocks.block import Block
from seqzoo.blocks.layers.chunk_attention import ChunkAttention, laplace, relu2
from seqzoo.blocks.layers.relative_bias import RotaryRelativeBias, SimpleRelativeBias
from seqzoo.blocks.mixers.mega import Mega, MegaState
from seqzoo.blocks.parameters import parameter_groups
from seqzoo.blocks.protocol import state_elements
from seqzoo.blocks.registry import create_mixer

torch.set_num_threads(1)
D, Z, V = 6, 4, 5


def build(seed=0, **options):
    """A mixer in fp64, its parameters moved away from their small start."""
    torch.manual_seed(seed)
    mixer = Mega(D, dtype=torch.float64, **{"d_state": 3, "z_dim": Z, "hidden_dim": V, **options}).eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def sequence(batch, length, seed=1):
    return torch.randn(batch, length, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def silu(x):
    return x * sigmoid(x)


def average(ema, x, direction):
    """The recurrence, one token after another."""
    delta, alpha, beta, gamma = (getattr(ema, n)[direction] for n in ("delta", "alpha", "beta", "gamma"))
    p = sigmoid(delta)
    h, outputs = torch.zeros(delta.shape, dtype=x.dtype), []
    for token in x:
        h = (1 - p * sigmoid(alpha)) * h + p * beta * token[:, None]
        outputs.append((gamma * h).sum(1) / math.sqrt(delta.shape[1]))
    return torch.stack(outputs)


def score_bias(bias, i, j):
    """The bias of query i and key j (within a chunk): looked up, or two rotated vectors multiplied."""
    if isinstance(bias, SimpleRelativeBias):
        return bias.weight[j - i + bias.max_len - 1]
    half = bias.dim // 2
    angle = 10000.0 ** (-torch.arange(half, dtype=torch.float64) / half)

    def rotated(x, place):
        a, b = x[:half], x[half:]
        return torch.cat((a * torch.cos(place * angle) - b * torch.sin(place * angle),
                          b * torch.cos(place * angle) + a * torch.sin(place * angle)))  # fmt: skip

    return rotated(bias.a, i) @ rotated(bias.b, j)


def attend(attention, q, k, v, visible):
    """One output per query: visible(i) lists the keys of query i as (place of the key, its place in the bias)."""
    outputs = []
    for i, query in enumerate(q):
        own, keys = visible(i)
        scores = [query @ k[j] for j, _ in keys]
        bias = torch.stack([score_bias(attention.bias, own, place) for _, place in keys])
        if attention.attention == "softmax":
            weights = torch.softmax(torch.stack(scores) / math.sqrt(attention.z_dim) + bias, 0)
        else:
            x = torch.stack(scores) / len(keys) + bias
            erf = torch.erf((x - math.sqrt(0.5)) / (math.sqrt(1 / (4 * math.pi)) * math.sqrt(2)))
            weights = 0.5 * (1 + erf) if attention.attention == "laplace" else torch.clamp(x, min=0) ** 2
        outputs.append(weights @ v[[j for j, _ in keys]])
    return torch.stack(outputs)


def by_hand(mixer, x, residual):
    """One row (L, D) of the self patterns."""
    gated, attention = mixer.gated, mixer.gated.attention
    smooth = average(mixer.ema, x, 0)
    if not mixer.causal:
        smooth = smooth + average(mixer.ema, x.flip(0), 1).flip(0)
    m = silu(smooth + mixer.ema.omega * x)
    v = silu(x @ gated.v_proj.weight.T + gated.v_proj.bias)
    base = m @ gated.mx_proj.weight.T + gated.mx_proj.bias
    u, z, r, h = base.split([D, Z, V, D], 1)
    z = silu(z)
    q, k = (z * gated.qk_weight[i] + gated.qk_bias[i] for i in (0, 1))
    chunk = len(x) if attention.chunk_size is None else attention.chunk_size

    def visible(i):
        start = i // chunk * chunk
        end = i + 1 if mixer.causal else min(start + chunk, len(x))
        return i - start, [(j, j - start) for j in range(start, end)]

    o = attend(attention, q, k, v, visible)
    h = silu(h + (silu(r) * o) @ gated.h_proj.weight.T + gated.h_proj.bias)
    return sigmoid(u) * (h - residual)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attention", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("relative_bias", ["simple", "rotary"])
@pytest.mark.parametrize("chunk_size", [None, 1, 5])
def test_the_layer_by_its_formulas(causal, attention, relative_bias, chunk_size):
    mixer = build(causal=causal, attention=attention, relative_bias=relative_bias, chunk_size=chunk_size, max_len=20)
    for length in (1, 5, 13):
        x, residual = sequence(2, length), sequence(2, length, seed=2)
        want = torch.stack([by_hand(mixer, *row) for row in zip(x, residual, strict=True)])
        torch.testing.assert_close(mixer(x, residual=residual).y, want, atol=1e-12, rtol=1e-12)
        if causal and length > 1:
            state, pieces = mixer.init_state(2), []
            for part, before in zip(x.split([2, 1, length - 3], 1), residual.split([2, 1, length - 3], 1), strict=True):
                y, state, _ = mixer(part, state=state, residual=before)
                pieces.append(y)
            torch.testing.assert_close(torch.cat(pieces, 1), want, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("attention", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("relative_bias", ["simple", "rotary"])
def test_the_cross_layer_by_its_formulas(causal, attention, relative_bias):
    mixer = build(cross=True, causal=causal, attention=attention, relative_bias=relative_bias, max_len=12)
    x, residual, context = sequence(2, 7), sequence(2, 7, seed=2), sequence(2, 11, seed=3)
    gated, rows = mixer.gated, []
    for one, before, source in zip(x, residual, context, strict=True):
        u, r, q = (one @ gated.q_proj.weight.T + gated.q_proj.bias).split([D, D, Z], 1)
        k = source @ gated.k_proj.weight.T + gated.k_proj.bias
        v = silu(source @ gated.v_proj.weight.T + gated.v_proj.bias)
        o = attend(gated.attention, q, k, v, lambda i: (i, [(j, j) for j in range(11)]))
        h = silu((silu(r) * o) @ gated.h_proj.weight.T + gated.h_proj.bias)
        rows.append(sigmoid(u) * (h - before))
    y = mixer(x, context, residual=residual).y
    torch.testing.assert_close(y, torch.stack(rows), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("causal", [True, False])
def test_a_chunk_as_long_as_the_sequence_is_full_attention(causal):
    full = build(causal=causal, chunk_size=None, max_len=16)
    for chunk_size in (16, 13):
        chunked = build(causal=causal, chunk_size=chunk_size, max_len=3)
        weights = {**full.state_dict(), "gated.attention.bias.weight": full.gated.attention.bias.weight}
        centre = 16 - chunk_size
        weights["gated.attention.bias.weight"] = full.gated.attention.bias.weight[centre : 31 - centre]
        chunked.load_state_dict(weights)
        x = sequence(2, 13)
        torch.testing.assert_close(chunked(x).y, full(x).y, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("attention", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("causal", [True, False])
def test_attention_stays_within_its_chunk(attention, causal):
    """The Jacobian of the values is block diagonal, and full inside a block (up to the query, if causal)."""
    layer = ChunkAttention(Z, chunk_size=4, causal=causal, attention=attention).double()
    q, k = torch.rand(2, 1, 11, Z, dtype=torch.float64)
    with torch.no_grad():
        layer.bias.weight.add_(1.0)  # relu2 is zero below zero
    v = torch.randn(1, 11, 1, dtype=torch.float64)
    seen = torch.autograd.functional.jacobian(lambda v: layer(q, k, v)[0], v)[0, :, 0, 0, :, 0] != 0
    place = torch.arange(11)
    want = place[:, None] // 4 == place // 4
    assert torch.equal(seen, want & (place <= place[:, None]) if causal else want)


@pytest.mark.parametrize("truncation", [1, 4])
@pytest.mark.parametrize("causal", [True, False])
def test_truncation_bounds_what_the_average_reads(causal, truncation):
    """With chunks of one token, y_t reads W inputs (W on each side)."""
    mixer = build(causal=causal, truncation=truncation, chunk_size=1)
    x = sequence(1, 12).requires_grad_()
    y = mixer(x).y
    for t in range(12):
        reads = torch.autograd.grad(y[0, t].sum(), x, retain_graph=True)[0][0].abs().sum(1) > 1e-14
        last = t if causal else t + truncation - 1
        assert reads.nonzero().flatten().tolist() == list(range(max(0, t - truncation + 1), min(last, 11) + 1))


def test_a_block_adds_up_to_the_gated_residual():
    """norm inside, (1 - u) x + u h outside, with x as it was before the norm; without prenorm the norm comes after."""
    mixer = build(causal=True, chunk_size=4)
    block = Block(D, mixer, None).double().eval()
    with torch.no_grad():
        block.norm_mixer.weight.add_(torch.randn(D))
    x = 3 + 2 * sequence(2, 9)
    want = x + torch.stack([by_hand(mixer, *row) for row in zip(block.norm_mixer(x), x, strict=True)])
    torch.testing.assert_close(block(x).y, want, atol=1e-12, rtol=1e-12)
    block.prenorm = False
    want = block.norm_mixer(x + torch.stack([by_hand(mixer, row, row) for row in x]))
    torch.testing.assert_close(block(x).y, want, atol=1e-12, rtol=1e-12)


def test_the_cache_is_empty_at_the_border_of_a_chunk():
    """A state after full chunks goes on as one whose keys and values were replaced; one in between does not."""
    mixer = build(causal=True, chunk_size=4)
    x, after = sequence(2, 9), sequence(2, 3, seed=2)
    for length, same in ((8, True), (4, True), (6, False), (9, False)):
        state = mixer(x[:, :length], state=mixer.init_state(2)).state
        assert state.attention.k.shape == (2, 3, Z) and state.attention.length.tolist() == [length] * 2
        other = state.attention._replace(k=state.attention.k + 1, v=state.attention.v - 1)
        y, changed = (mixer(after, state=s).y for s in (state, MegaState(state.ema, other)))
        assert torch.equal(y, changed) == same


@pytest.mark.parametrize(
    ("options", "size"),
    [
        ({}, D * 3 + 127 * (Z + V)),
        ({"chunk_size": 7, "truncation": 5}, D * (3 + 5) + 6 * (Z + V)),
        ({"chunk_size": None, "relative_bias": "rotary"}, D * 3 + 20 * (Z + V)),
    ],
)
def test_state_size(options, size):
    mixer = build(causal=True, **options)
    state = mixer(sequence(2, 20), state=mixer.init_state(2)).state
    assert mixer.state_size(20) == state_elements(state) == size


def test_attention_functions():
    """Laplace rises from 0 to 1 through 1/2 at sqrt(1/2), where it has the value and the slope of the squared ReLU."""
    x = torch.linspace(-40, 40, 801, dtype=torch.float64, requires_grad=True)
    y = laplace(x)
    assert y.min() >= 0 and y.max() == 1 and bool((y[1:] >= y[:-1]).all())
    point = torch.tensor(math.sqrt(0.5), dtype=torch.float64, requires_grad=True)
    for function in (laplace, relu2):
        value = function(point)
        assert value.item() == pytest.approx(0.5, abs=1e-15)
        assert torch.autograd.grad(value, point)[0].item() == pytest.approx(math.sqrt(2), abs=1e-12)


@pytest.mark.parametrize(("rows", "columns"), [(5, 5), (3, 7), (7, 3), (1, 1)])
def test_relative_biases(rows, columns):
    torch.manual_seed(0)
    for bias in (SimpleRelativeBias(8, dtype=torch.float64), RotaryRelativeBias(6, dtype=torch.float64)):
        want = torch.stack([torch.stack([score_bias(bias, i, j) for j in range(columns)]) for i in range(rows)])
        torch.testing.assert_close(bias(rows, columns), want, atol=1e-15, rtol=1e-12)


def test_published_initial_values():
    torch.manual_seed(0)
    mixer = Mega(64, z_dim=128, d_state=16, relative_bias="rotary")
    gated, ema = mixer.gated, mixer.ema
    for weight in (gated.v_proj.weight, gated.mx_proj.weight, gated.h_proj.weight, gated.qk_weight):
        assert weight.std().item() == pytest.approx(0.02, rel=0.1) and abs(weight.mean()) < 2e-3
    for bias in (gated.v_proj.bias, gated.mx_proj.bias, gated.h_proj.bias, gated.qk_bias):
        assert not bias.any()
    assert gated.attention.bias.a.std().item() == pytest.approx(0.02, rel=0.3)
    assert ema.omega.std().item() == pytest.approx(1, rel=0.3)
    assert ema.delta.shape == ema.gamma.shape == (2, 64, 16)
    assert [round(x.item()) for x in ema.beta[0, 0, :4]] == [1, -1, 1, -1]
    cross = Mega(64, cross=True).gated
    assert cross.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_the_averages_are_trained_like_other_matrices():
    """The published training has one group: no tag, so the weight decay and learning rate of the optimiser."""
    mixer = Mega(16)
    groups = parameter_groups(mixer, lr=0.01, weight_decay=0.1)
    assert {group["lr"] for group in groups} == {0.01}
    decayed = {id(p) for group in groups if group["weight_decay"] == 0.1 for p in group["params"]}
    assert all(id(getattr(mixer.ema, name)) in decayed for name in ("delta", "alpha", "beta", "gamma"))
    assert sum(len(group["params"]) for group in groups) == len(list(mixer.parameters()))


def test_feature_dropout_drops_whole_channels():
    mixer = build(chunk_size=4, drop=0.5, hidden_drop=0.5, feature_drop=True).train()
    seen = []
    mixer.gated.hidden_drop.register_forward_hook(lambda _, __, out: seen.append(out))
    mixer(sequence(3, 9))
    zero = seen[0] == 0
    assert torch.equal(zero.any(1), zero.all(1)) and 0 < zero.all(1).sum() < zero.all(1).numel()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": "laplas"}, "attention='laplas' is unknown. Did you mean laplace"),
        ({"relative_bias": "rotari"}, "Did you mean rotary"),
        ({"relative_bias": "rotary", "z_dim": 5}, "even width, got 5; nearest: 4"),
        ({"activation": "sillu"}, "Did you mean silu"),
        ({"backend": "flash"}, "backend='flash'"),
        ({"chunk_size": 0}, "chunk_size=0 must be at least 1"),
        ({"truncation": 0}, "truncation=0 must be at least 1"),
        ({"d_state": 0}, "d_state=0"),
        ({"z_dim": 0}, "z_dim=0"),
        ({"hidden_dim": 0}, "hidden_dim=0"),
        ({"max_len": 0, "chunk_size": None}, "max_len=0"),
        ({"drop": 1.0}, r"1\.0 must be in \[0, 1\)"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        Mega(8, **options)


def test_bad_inputs():
    mixer = build(causal=True, chunk_size=None, max_len=8)
    with pytest.raises(ValueError, match="9 positions exceed max_len=8"):
        mixer(sequence(1, 9))
    with pytest.raises(ValueError, match="residual has shape"):
        mixer(sequence(1, 5), residual=sequence(1, 4))
    with pytest.raises(ValueError, match="state is of 2 rows, but there are 3 sequences"):
        mixer(sequence(3, 5), state=mixer.init_state(2))
    other = create_mixer("s4d", D, causal=True).init_state(3)
    with pytest.raises(ValueError, match="state is a S4DState, expected the MegaState"):
        mixer(sequence(3, 5), state=other)


# --- transformers had MEGA up to 4.57 (models/deprecated/mega), a copy of the public code

_NOT_THERE = "transformers has no Mega classes (4.57 was the last release with them)"


def reference(**options):
    config = pytest.importorskip("transformers.models.deprecated.mega.configuration_mega", reason=_NOT_THERE)
    shape = {"hidden_size": D, "shared_representation_size": Z, "intermediate_size": V, "ema_projection_size": 3}
    shape |= {"max_positions": 40, "normalize_before_mega": True, "normalization_type": "layernorm"}
    shape |= {"attention_probs_dropout_prob": 0.0, "hidden_dropout_prob": 0.0}
    return config.MegaConfig(**{**shape, **options})


def moved(theirs):
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.copy_(0.5 * torch.randn(parameter.shape))
    return theirs.double().eval()


def copy_weights(ours, theirs):
    """Of one of transformers' two attention classes into a mixer of ours."""
    gated, bias = ours.gated, ours.gated.attention.bias
    names = ("q_proj", "k_proj", "v_proj", "h_proj") if ours.cross else ("v_proj", "mx_proj", "h_proj")
    for name in names:
        getattr(gated, name).load_state_dict(getattr(theirs, name).state_dict())
    with torch.no_grad():
        if isinstance(bias, SimpleRelativeBias):
            bias.weight.copy_(theirs.rel_pos_bias.rel_pos_bias[: len(bias.weight)])
        else:
            bias.a.copy_(theirs.rel_pos_bias.alpha[0])
            bias.b.copy_(theirs.rel_pos_bias.b_param[0])
        if ours.cross:
            return
        gated.qk_weight.copy_(theirs.qk_weight)
        gated.qk_bias.copy_(theirs.qk_bias)
        ema, source = ours.ema, theirs.ema_gate
        for name, other in (("delta", "damping_factor"), ("alpha", "decay_factor"), ("beta", "ema_expansion_matrix")):
            getattr(ema, name).copy_(getattr(source, other).reshape(getattr(ema, name).shape))
        ema.gamma.copy_(source.kernel_projection_matrix.reshape(ema.gamma.shape))
        ema.omega.copy_(source.residual_weight)


@pytest.mark.parametrize("attention", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("relative_bias", ["simple", "rotary"])
@pytest.mark.parametrize("chunk_size", [-1, 5])
@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("truncation", [None, 7])
def test_transformers_gated_attention(attention, relative_bias, chunk_size, bidirectional, truncation):
    """Outputs and, through one block, gradients. They take the FFT in float32 and round mu and sigma of Laplace."""
    modeling = pytest.importorskip("transformers.models.deprecated.mega.modeling_mega", reason=_NOT_THERE)
    config = reference(
        attention_activation=attention,
        relative_positional_bias=relative_bias,
        chunk_size=chunk_size,
        use_chunking=chunk_size > 0,
        bidirectional=bidirectional,
        truncation=truncation,
    )
    torch.manual_seed(0)
    theirs = moved(modeling.MegaMovingAverageGatedAttention(config))
    ours = build(
        causal=not bidirectional,
        attention=attention,
        relative_bias=relative_bias,
        chunk_size=None if chunk_size < 0 else chunk_size,
        max_len=40,
        truncation=truncation,
    )
    copy_weights(ours, theirs)
    block = Block(D, ours, None).double().eval()
    block.norm_mixer.load_state_dict(theirs.norm.norm.state_dict())
    x = sequence(3, 20).requires_grad_()
    causal = None
    if not bidirectional:
        size = 20 if chunk_size < 0 else chunk_size
        causal = torch.ones(size, size, dtype=torch.float64).tril()
    want = theirs(x.transpose(0, 1), causal_mask=causal)[0].transpose(0, 1)
    got = block(x).y
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    cotangent = sequence(3, 20, seed=4)
    gradients = [torch.autograd.grad((y * cotangent).sum(), x)[0] for y in (got, want)]
    torch.testing.assert_close(*gradients, atol=2e-5, rtol=1e-5)
    if bidirectional:
        mask = torch.arange(20) < torch.tensor([20, 17, 3])[:, None]
        want = theirs(x.transpose(0, 1), padding_mask=mask.long())[0].transpose(0, 1)
        torch.testing.assert_close(block(x, mask=mask).y[mask], want[mask], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("attention", ["softmax", "laplace", "relu2"])
@pytest.mark.parametrize("relative_bias", ["simple", "rotary"])
def test_transformers_gated_cross_attention(attention, relative_bias):
    modeling = pytest.importorskip("transformers.models.deprecated.mega.modeling_mega", reason=_NOT_THERE)
    config = reference(attention_activation=attention, relative_positional_bias=relative_bias)
    torch.manual_seed(0)
    theirs = moved(modeling.MegaGatedCrossAttention(config))
    ours = build(cross=True, attention=attention, relative_bias=relative_bias, max_len=40)
    copy_weights(ours, theirs)
    block = Block(D, ours, None).double().eval()
    block.norm_mixer.load_state_dict(theirs.norm.norm.state_dict())
    x, context = sequence(3, 9), sequence(3, 12, seed=3)
    mask = torch.arange(12) < torch.tensor([12, 8, 1])[:, None]
    source = context.transpose(0, 1)
    want = theirs(x.transpose(0, 1), source, source, key_padding_mask=mask.long())[0].transpose(0, 1)
    torch.testing.assert_close(block(x, context, context_mask=mask).y, want, atol=1e-5, rtol=1e-5)
