"""The Mamba-2 mixer: the quadratic form of SSD, the recurrence, transformers, its start, options and errors."""

import pytest
import torch
from torch.nn import functional as F

from seqzoo.blocks.mixers import mamba2
from seqzoo.blocks.mixers.mamba2 import Mamba2, Mamba2State
from seqzoo.blocks.parameters import parameter_groups
from seqzoo.blocks.protocol import state_elements
from seqzoo.blocks.registry import create_mixer
from seqzoo.kernels.gated_linear_attention import gated_linear_attention


def build(dim=8, dtype=torch.float64, **options):
    torch.manual_seed(0)
    mixer = Mamba2(dim, dtype=dtype, **{"d_state": 5, "head_dim": 4, **options}).eval()
    if mixer.norm is not None:
        torch.nn.init.normal_(mixer.norm.weight)
    return mixer


def sequence(batch, length, dim=8, seed=1):
    return torch.randn(batch, length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def inputs_of(scan, xbc, dt, limit=(0.0, None)):
    """x (B, L, H, P), B and C for every head (B, L, H, N), dt and the log decay (B, L, H), from the projections."""
    past = scan.conv.kernel_size - 1
    taps = F.pad(xbc, (0, 0, past, 0)).unfold(1, past + 1, 1)  # (B, L, channels, taps)
    xbc = F.silu((taps * scan.conv.weight[:, 0]).sum(-1) + (0 if scan.conv.bias is None else scan.conv.bias))
    heads, groups = scan.num_heads, scan.num_groups
    x, b, c = xbc.split([heads * scan.head_dim, groups * scan.d_state, groups * scan.d_state], -1)
    b, c = (t.unflatten(-1, (groups, scan.d_state)).repeat_interleave(heads // groups, 2) for t in (b, c))
    dt = F.softplus(dt + scan.dt_bias).clamp(*limit)
    return x.unflatten(-1, (heads, scan.head_dim)), b, c, dt, -dt * scan.a_log.exp()


def skipped(scan, x):
    return scan.d.view(scan.num_heads, -1) * x


def quadratic(scan, *projected, **options):
    """y = (L * C B^T) (dt x) + D x with the mask L_ts = exp(a_{s+1} + ... + a_t) written out (equation 16)."""
    x, b, c, dt, a = inputs_of(scan, *projected, **options)
    total = a.cumsum(1)
    mask = torch.exp((total[:, :, None] - total[:, None]).clamp(max=0))
    mask = mask * torch.ones(x.shape[1], x.shape[1], dtype=x.dtype).tril()[None, :, :, None]
    y = torch.einsum("btsh,bthn,bshn,bsh,bshp->bthp", mask, c, b, dt, x)
    return (y + skipped(scan, x)).flatten(2)


def recurrent(scan, *projected, **options):
    """h_t = exp(a_t) h_{t-1} + dt_t x_t B_t^T, y_t = h_t C_t + D x_t, one token after another."""
    x, b, c, dt, a = inputs_of(scan, *projected, **options)
    h, outputs = x.new_zeros(x.shape[0], scan.num_heads, scan.head_dim, scan.d_state), []
    for t in range(x.shape[1]):
        h = a[:, t].exp()[..., None, None] * h + (dt[:, t, :, None] * x[:, t])[..., None] * b[:, t, :, None]
        outputs.append((h @ c[:, t, :, :, None])[..., 0])
    return (torch.stack(outputs, 1) + skipped(scan, x)).flatten(2)


def gated(mixer, y, z):
    """The norm over each group, by its formula: of y silu(z), or of y before it is multiplied by silu(z)."""
    first = not mixer.norm.norm_before_gate
    groups = (y * F.silu(z) if first else y).unflatten(-1, (mixer.norm.num_groups, -1))
    y = (groups / (groups.square().mean(-1, keepdim=True) + 1e-5).sqrt()).flatten(-2) * mixer.norm.weight
    return y if first else y * F.silu(z)


@pytest.mark.parametrize("form", [quadratic, recurrent])
@pytest.mark.parametrize(
    "options",
    [
        {"chunk_size": 8},
        {"backend": "naive"},
        {"num_groups": 2, "norm_before_gate": True, "d_has_hdim": True},
        {"num_groups": 4, "conv_bias": False, "proj_bias": True, "d_conv": 3},
    ],
)
def test_the_dual_forms(form, options):
    mixer, x = build(causal=True, **options), sequence(2, 43)
    torch.nn.init.normal_(mixer.scan.d)
    z, xbc, dt = mixer.in_proj(x).split([16, mixer.scan.conv.channels, 4], -1)
    want = mixer.out_proj(gated(mixer, form(mixer.scan, xbc, dt), z))
    torch.testing.assert_close(mixer(x).y, want, atol=1e-12, rtol=0)


def test_time_steps_are_clamped_and_the_norm_may_be_missing():
    mixer, x = build(causal=True, rmsnorm=False, dt_limit_low=0.01, dt_limit_high=0.03), sequence(1, 20)
    z, xbc, dt = mixer.in_proj(x).split([16, mixer.scan.conv.channels, 4], -1)
    loose = F.softplus(dt + mixer.scan.dt_bias)
    assert loose.min() < 0.01 and loose.max() > 0.03  # both limits are met
    y = quadratic(mixer.scan, xbc, dt, limit=(0.01, 0.03))
    torch.testing.assert_close(mixer(x).y, mixer.out_proj(y * F.silu(z)), atol=1e-12, rtol=0)


def test_channels_outside_the_scan_are_a_gated_unit():
    mixer, x = build(causal=True, d_ssm=8), sequence(1, 20)
    z0, x0, z, xbc, dt = mixer.in_proj(x).split([8, 8, 8, 8 + 2 * 5, 2], -1)
    y = gated(mixer, quadratic(mixer.scan, xbc, dt), z)
    want = mixer.out_proj(torch.cat([F.silu(z0) * x0, y], -1))
    torch.testing.assert_close(mixer(x).y, want, atol=1e-12, rtol=0)


def test_bidirectional_is_two_scans_with_their_own_parameters():
    """Shared: z, x, norm, out_proj. Own: B, C, dt, convolution, dt_bias, a_log, d."""
    mixer, x = build(num_groups=2), sequence(2, 29)
    assert {n for n, _ in mixer.scan_reverse.named_parameters()} == {n for n, _ in mixer.scan.named_parameters()}
    z, xs, bc, dt = mixer.in_proj(x).split([16, 16, 20, 4], -1)
    back, back_dt = mixer.in_proj_reverse(x).split([20, 4], -1)
    y = quadratic(mixer.scan, torch.cat([xs, bc], -1), dt)
    y = y + quadratic(mixer.scan_reverse, torch.cat([xs, back], -1).flip(1), back_dt.flip(1)).flip(1)
    torch.testing.assert_close(mixer(x).y, mixer.out_proj(gated(mixer, y, z)), atol=1e-12, rtol=0)


def renamed(theirs):
    """Their state dict under our names."""
    names = {"conv1d.weight": "conv.weight", "conv1d.bias": "conv.bias", "A_log": "a_log", "D": "d"}
    return {k if k.startswith(("in_", "out_", "norm")) else f"scan.{names.get(k, k)}": v for k, v in theirs.items()}


@pytest.mark.parametrize("groups", [1, 2])
def test_transformers(groups):
    """Outputs and every gradient with copied weights. Theirs computes the scan in float32, whatever the weights."""
    modeling = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    from transformers import Mamba2Config

    limits = (0.005, 0.05) if groups == 2 else (0.0, float("inf"))
    config = Mamba2Config(
        hidden_size=24,
        state_size=8,
        num_heads=6,
        head_dim=8,
        n_groups=groups,
        chunk_size=16,
        num_hidden_layers=1,
        vocab_size=4,
        time_step_limit=limits,
    )
    theirs = modeling.Mamba2Mixer(config, 0).eval()
    torch.nn.init.normal_(theirs.norm.weight)
    bounds = {"dt_limit_low": 0.005, "dt_limit_high": 0.05} if groups == 2 else {}
    ours = Mamba2(24, causal=True, d_state=8, head_dim=8, num_groups=groups, **bounds).eval()
    ours.load_state_dict(renamed(theirs.state_dict()))
    x, weight = sequence(2, 50, 24).float().requires_grad_(), sequence(2, 50, 24, seed=2).float()
    got, want = ours(x).y, theirs(x)
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-5)
    found = dict(zip(renamed(dict(theirs.named_parameters())), theirs.parameters(), strict=True))
    for a, b in zip(
        torch.autograd.grad((got * weight).sum(), [x, *(p for _, p in ours.named_parameters())]),
        torch.autograd.grad((want * weight).sum(), [x, *(found[n] for n, _ in ours.named_parameters())]),
        strict=True,
    ):
        torch.testing.assert_close(a, b, atol=1e-5 * b.abs().max().item(), rtol=0)


def test_it_starts_as_published():
    scan = Mamba2(512, causal=True, head_dim=2, d_state=4).scan
    dt = F.softplus(scan.dt_bias.double())
    assert 0.001 * 0.999 <= dt.min() < 0.0015 and 0.07 < dt.max() <= 0.1 * 1.001
    a = scan.a_log.exp()
    assert 1 <= a.min() < 1.3 and 15.7 < a.max() <= 16.001
    assert abs(a.mean() - 8.5) < 1  # uniform, not log-uniform (whose mean is 5.4)
    assert bool((scan.d == 1).all())
    bounded = build(causal=True, conv_init=0.01).scan.conv.weight
    assert 0.005 < bounded.abs().max() <= 0.01


def test_no_weight_decay_where_the_paper_has_none():
    mixer = build(d_has_hdim=True)
    groups = parameter_groups(mixer, lr=1e-3, weight_decay=0.1)
    decayed = {id(p) for group in groups if group["weight_decay"] > 0 for p in group["params"]}
    names = {name for name, p in mixer.named_parameters() if id(p) in decayed}
    assert names == {
        *("in_proj.weight", "in_proj_reverse.weight", "out_proj.weight"),
        *("scan.conv.weight", "scan_reverse.conv.weight"),
    }


def test_counts():
    """Parameters by the formula of the paper's layer; the state."""
    mixer = Mamba2(32, causal=True, num_groups=1, d_state=16, head_dim=16)
    inner, heads, channels = 64, 4, 64 + 2 * 16
    expected = 32 * (2 * inner + 2 * 16 + heads) + channels * (4 + 1) + 3 * heads + inner + inner * 32
    assert sum(p.numel() for p in mixer.parameters()) == expected
    state = mixer(torch.randn(3, 7, 32), state=mixer.init_state(3)).state
    assert state_elements(state) == mixer.state_size(7) == mixer.state_size(0) == inner * 16 + 3 * channels


@pytest.mark.parametrize("autocast", [True, False])
def test_scan_and_state_are_computed_in_float32(autocast, monkeypatch):
    """Under bfloat16 autocast and with bfloat16 weights: what the kernel gets is float32, and so is the state."""
    seen = []

    def kernel(*tensors, **options):
        seen.extend(tensors[i].dtype for i in (0, 1, 2, 3))
        return gated_linear_attention(*tensors, **options)

    monkeypatch.setattr(mamba2, "gated_linear_attention", kernel)
    mixer, x = build(16, dtype=torch.float32 if autocast else torch.bfloat16, causal=True), sequence(1, 9, 16)
    state = mixer.init_state(1)
    assert state.h.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        state = mixer(x.to(state.conv.dtype), state=state).state
    assert set(seen) == {torch.float32} and state.h.dtype == torch.float32
    assert state.conv.dtype == mixer.in_proj.weight.dtype


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, r"head_dim=64 does not divide int\(expand \* dim\)=16; nearest that does: 16"),
        ({"head_dim": 8, "num_groups": 3}, "num_groups=3 does not divide the number of heads=2; nearest that does: 2"),
        ({"head_dim": 4, "d_ssm": 6}, "head_dim=4 does not divide d_ssm=6; nearest that does: 3"),
        ({"head_dim": 4, "d_ssm": 20}, "d_ssm=20 is more than the 16 inner channels"),
        ({"head_dim": 8, "d_state": 0}, "d_state=0 must be a positive integer"),
        ({"head_dim": 8, "a_min": 0.0}, "a_min=0.0 and a_max=16.0"),
        ({"head_dim": 8, "dt_limit_low": 0.2, "dt_limit_high": 0.1}, "dt_limit_low=0.2"),
        ({"head_dim": 8, "dt_min": 0.0}, "dt_min=0.0"),
        ({"head_dim": 8, "conv_init": 0.0}, "conv_init=0.0"),
        ({"head_dim": 8, "chunk_size": 24}, "chunk_size=24 must be a power of two"),
        ({"head_dim": 8, "rmsnorm": False, "norm_before_gate": True}, "norm_before_gate=True needs rmsnorm=True"),
        ({"head_dim": 8, "backend": "fast"}, "backend='fast' is unknown"),
        ({"head_dim": 8, "cross": True}, "does not support the pattern 'cross'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("mamba2", 8, **options)


def test_states_that_do_not_fit_are_refused():
    mixer, x = build(causal=True), sequence(2, 5)
    other = create_mixer("mamba", 8, causal=True).init_state(2)
    with pytest.raises(ValueError, match="state is a MambaState, expected the Mamba2State"):
        mixer(x, state=other)
    with pytest.raises(ValueError, match="state is of 3 rows, but there are 2 sequences"):
        mixer(x, state=mixer.init_state(3))
    with pytest.raises(ValueError, match="initial_state has shape"):
        mixer(x, state=Mamba2State(mixer.init_state(2).conv, torch.zeros(2, 4, 4, 5)))
