"""TCNCA: the network as a Toeplitz matrix and by its receptive field, MEGA as the limit, the simple form, its rings."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from seqzoo.blocks.block import Block
from seqzoo.blocks.layers.tcn import TemporalConvNet
from seqzoo.blocks.mixers.mega import Mega
from seqzoo.blocks.mixers.tcnca import TCNCA, TcncaState
from seqzoo.blocks.protocol import state_elements
from seqzoo.blocks.registry import mixer_info

torch.set_num_threads(1)
D = 6


def sequence(batch, length, dim=D, seed=1):
    return torch.randn(batch, length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def network(dim=D, seed=0, **options):
    torch.manual_seed(seed)
    return TemporalConvNet(dim, dtype=torch.float64, **options).eval()


def build(seed=0, **options):
    torch.manual_seed(seed)
    small = {"tcn_depth": 2, "kernel_size": 3, "dilation_factor": 3, "chunk_size": 4, "z_dim": 4, "hidden_dim": 5}
    mixer = TCNCA(D, dtype=torch.float64, **{**small, **options}).eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def residual_convs(tcn, x, *, causal):
    """The blocks through torch's convolution: x <- x + act(conv(... act(conv(x))))."""
    y = x.transpose(1, 2)
    act = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "none": lambda x: x}[tcn.activation]
    for first in range(0, len(tcn.convs), tcn.num_convs):
        branch = y
        for conv in tcn.convs[first : first + tcn.num_convs]:
            weight = conv.weight
            if conv.gain is not None:
                weight = conv.gain.view(-1, 1, 1) * weight / weight.square().sum((1, 2), keepdim=True).sqrt()
            past = (weight.shape[2] - 1) * conv.dilation
            branch = F.pad(branch, (past, 0) if causal else (past // 2, past // 2))
            branch = F.conv1d(branch, weight, conv.bias, dilation=conv.dilation, groups=tcn.dim // weight.shape[1])
            if conv.pointwise is not None:
                branch = F.conv1d(branch, conv.pointwise.weight.unsqueeze(2), conv.pointwise.bias)
            branch = act(branch)
        y = y + branch
    return y.transpose(1, 2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_convs": 2, "activation": "gelu"},
        {"groups": 1, "activation": "relu"},
        {"groups": 2, "weight_norm": True},
        {"pointwise": True, "weight_norm": True, "num_convs": 2},
        {"activation": "none"},
    ],
)
def test_the_network_is_residual_blocks_of_torchs_convolutions(causal, options):
    tcn = network(depth=3, kernel_size=3, dilation_factor=2, causal=causal, **options)
    if options.get("weight_norm"):
        with torch.no_grad():
            for conv in tcn.convs:
                conv.gain.mul_(1.7)
    for length in (1, 4, 30):
        x = sequence(2, length).requires_grad_()
        want = residual_convs(tcn, x, causal=causal)
        y, state = tcn(x)
        assert state is None
        torch.testing.assert_close(y, want, atol=1e-12, rtol=1e-12)
        inputs, weight = [x, *tcn.parameters()], sequence(2, length, seed=3)
        got = torch.autograd.grad((y * weight).sum(), inputs)
        for a, b in zip(got, torch.autograd.grad((want * weight).sum(), inputs), strict=True):
            torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("causal", [True, False])
def test_without_activation_it_is_a_toeplitz_matrix(causal):
    """Per channel, whose impulse response is the convolution over blocks of (delta + the block's kernel)."""
    tcn = network(depth=3, kernel_size=3, dilation_factor=3, causal=causal, activation="none")
    with torch.no_grad():
        for conv in tcn.convs:
            conv.bias.zero_()
    length, place = 40, torch.arange(40)
    x = sequence(2, length)
    y = tcn(x)[0]
    for channel in range(D):
        response = {0: 1.0}  # by lag
        for conv in tcn.convs:
            taps = conv.weight[channel, 0].tolist()
            shifts = [(2 - k if causal else 1 - k) * conv.dilation for k in range(3)]
            kernel = dict.fromkeys((0, *shifts), 0.0)
            kernel[0] += 1.0
            for shift, tap in zip(shifts, taps, strict=True):
                kernel[shift] += tap
            product: dict[int, float] = {}
            for a, left in response.items():
                for b, right in kernel.items():
                    product[a + b] = product.get(a + b, 0.0) + left * right
            response = product
        lag = place[:, None] - place
        matrix = torch.tensor([[response.get(int(n), 0.0) for n in row] for row in lag], dtype=torch.float64)
        if not causal:  # zeros beyond the ends enter between the blocks: compare where they do not reach
            inner = slice(13, length - 13)
            torch.testing.assert_close(y[:, inner, channel], (x[..., channel] @ matrix.T)[:, inner])
        else:
            torch.testing.assert_close(y[..., channel], x[..., channel] @ matrix.T, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("num_convs", [1, 2])
@pytest.mark.parametrize(
    ("size", "factor", "depth"), [(3, 2, 3), (3, 3, 3), (5, 4, 2), (2, 1, 3), (3, 5, 2), (4, 7, 2)]
)
def test_receptive_field_by_autograd(size, factor, depth, num_convs):
    """R = 1 + n (K - 1) (f^D - 1) / (f - 1) exactly; without gaps for one convolution per block iff f <= K."""
    options = {"kernel_size": size, "dilation_factor": factor, "depth": depth, "num_convs": num_convs}
    tcn = network(causal=True, **options)
    geometric = depth if factor == 1 else (factor**depth - 1) // (factor - 1)
    field = 1 + num_convs * (size - 1) * geometric
    assert tcn.receptive_field == field
    x = sequence(1, field + 20).requires_grad_()
    (gradient,) = torch.autograd.grad(tcn(x)[0][0, -1].sum(), x)
    read = (gradient[0].abs().sum(1) != 0).flip(0)
    assert read.nonzero().max() == field - 1
    if num_convs == 1:
        assert bool(read[:field].all()) == (factor <= size)


def test_the_field_of_the_published_setting():
    assert network(depth=4, kernel_size=17, dilation_factor=8, causal=True).receptive_field == 9361
    assert network(depth=4, kernel_size=17, dilation_factor=8, num_convs=2, causal=True).receptive_field == 18721


@pytest.mark.parametrize("causal", [True, False])
def test_with_the_same_input_to_the_gates_it_is_mega(causal):
    """One chunk or several: what follows m = silu(T(x) + omega x) is the gated attention of MEGA."""
    for chunk_size in (20, 4):
        ours = build(causal=causal, chunk_size=chunk_size)
        mega = Mega(D, z_dim=4, hidden_dim=5, causal=causal, chunk_size=chunk_size, dtype=torch.float64).eval()
        mega.gated.load_state_dict(ours.mixing.state_dict())
        x, residual = sequence(2, 13), sequence(2, 13, seed=2)
        m = F.silu(residual_convs(ours.tcn, x, causal=causal) + ours.omega * x)
        mega.ema.forward = lambda x, *, m=m, **_: (m, None)
        want = mega(x, residual=residual).y
        torch.testing.assert_close(ours(x, residual=residual).y, want, atol=1e-12, rtol=1e-12)
        block = Block(D, ours, None).double()
        normed = block.norm_mixer(x)
        torch.testing.assert_close(block(x).y, x + ours(normed, residual=x).y, atol=1e-12, rtol=1e-12)


def test_without_skip_the_input_reaches_the_gates_through_the_network_alone():
    ours, bare = build(causal=True), build(causal=True, skip=False)
    bare.load_state_dict({k: v for k, v in ours.state_dict().items() if k != "omega"})
    with torch.no_grad():
        ours.omega.zero_()
    x = sequence(2, 9)
    assert torch.equal(bare(x).y, ours(x).y)


@pytest.mark.parametrize("attention", ["softmax", "laplace"])
@pytest.mark.parametrize("causal", [True, False])
def test_the_simple_form_by_its_formula(attention, causal):
    """y = W_o Attn(LN(residual + T(x))), dense attention with the mask of the chunks."""
    ours = build(variant="simple", causal=causal, attention=attention)
    x, residual, length = sequence(2, 11), sequence(2, 11, seed=2), 11
    plain = ours.mixing
    m = F.layer_norm(residual + residual_convs(ours.tcn, x, causal=causal), (D,), ours.norm.weight, ours.norm.bias)
    q, k, v = plain.q_proj(m), plain.k_proj(m), plain.v_proj(m)
    place = torch.arange(length)
    seen = place[:, None] // 4 == place // 4
    if causal:
        seen = seen & (place <= place[:, None])
    offset = (place - place[:, None]).clamp(-3, 3)
    bias = plain.attention.bias.weight[offset + 3]
    if attention == "softmax":
        weights = (q @ k.mT / math.sqrt(4) + bias).masked_fill(~seen, -math.inf).softmax(-1)
    else:
        scores = q @ k.mT / seen.sum(1, keepdim=True) + bias
        weights = 0.5 * (1 + torch.erf((scores - 0.5**0.5) / (math.sqrt(1 / (4 * math.pi)) * 2**0.5))) * seen
    want = plain.out_proj(weights @ v)
    torch.testing.assert_close(ours(x, residual=residual).y, want, atol=1e-12, rtol=1e-12)


def test_the_rings_hold_the_last_inputs_of_every_convolution():
    ours = build(causal=True, tcn_depth=2, num_convs=2)
    x = sequence(2, 30)
    state = ours(x, state=ours.init_state(2)).state
    assert [tail.shape[1] for tail in state.tails] == [2, 2, 6, 6]
    assert torch.equal(state.tails[0], x[:, -2:])
    first = ours.tcn.convs[0]
    inner = F.silu(F.conv1d(F.pad(x.mT, (2, 0)), first.weight, first.bias, groups=D)).mT
    torch.testing.assert_close(state.tails[1], inner[:, -2:], atol=1e-12, rtol=1e-12)
    assert ours.state_size(30) == state_elements(state) == D * (ours.tcn.receptive_field - 1) + 3 * (4 + 5)


def test_cross_is_megas():
    for causal in (True, False):
        ours = build(cross=True, causal=causal)
        mega = Mega(D, z_dim=4, cross=True, causal=causal, dtype=torch.float64).eval()
        mega.gated.load_state_dict(ours.mixing.state_dict())
        x, context = sequence(2, 7), sequence(2, 9, seed=3)
        assert torch.equal(ours(x, context).y, mega(x, context).y)


def test_it_says_that_it_is_a_reconstruction():
    assert mixer_info("tcnca").origin == "reconstruction"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"variant": "gate"}, "variant='gate' is unknown. Did you mean gated"),
        ({"kernel_size": 4}, "kernel_size=4 must be odd unless causal; nearest: 5"),
        ({"kernel_size": 0, "causal": True}, "kernel_size=0 must be at least 1"),
        ({"tcn_depth": 0}, "tcn_depth=0"),
        ({"dilation_factor": 0}, "dilation_factor=0"),
        ({"num_convs": 0}, "num_convs=0"),
        ({"groups": 3}, "groups=3 does not divide dim=8; nearest that does: 2"),
        ({"tcn_activation": "sillu"}, "Did you mean silu"),
        ({"attention": "laplas"}, "Did you mean laplace"),
        ({"chunk_size": 0}, "chunk_size=0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        TCNCA(8, **options)


def test_bad_inputs():
    ours = build(causal=True)
    state = ours.init_state(2)
    assert isinstance(state, TcncaState)
    with pytest.raises(ValueError, match="state is of 2 rows, but there are 3 sequences"):
        ours(sequence(3, 5), state=state)
    with pytest.raises(ValueError, match="state is a ChunkState, expected the TcncaState"):
        ours(sequence(2, 5), state=state.attention)
    with pytest.raises(ValueError, match="residual has shape"):
        ours(sequence(2, 5), residual=sequence(2, 6))
