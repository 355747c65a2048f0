"""The Mamba mixer: its formula step by step, transformers and mambapy, its start, optimiser tags, counts and errors."""

import math

import pytest
import torch
from torch.nn import functional as F

from seqzoo.blocks.mixers import mamba
from seqzoo.blocks.mixers.mamba import Mamba, MambaState
from seqzoo.blocks.parameters import parameter_groups
from seqzoo.blocks.protocol import state_elements
from seqzoo.blocks.registry import create_mixer
from seqzoo.kernels.selective_scan import selective_scan


def build(dim=6, dtype=torch.float64, **options):
    torch.manual_seed(0)
    return Mamba(dim, dtype=dtype, **{"d_state": 4, **options}).eval()


def sequence(batch, length, dim=6, seed=1):
    return torch.randn(batch, length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def one_direction(scan, u):
    """The published recurrence on u (B, L, E), token after token, the convolution by its taps."""
    taps, past = scan.conv.weight[:, 0], scan.conv.kernel_size - 1
    h, outputs = torch.zeros(u.shape[0], *scan.a_log.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        x = scan.conv.bias + sum(taps[:, past - k] * u[:, t - k] for k in range(past + 1) if t >= k)
        x = F.silu(x)
        low, b, c = scan.x_proj(x).split([scan.dt_rank, scan.d_state, scan.d_state], -1)
        dt = F.softplus(scan.dt_proj(low))
        h = torch.exp(dt[..., None] * -scan.a_log.exp()) * h + (dt * x)[..., None] * b[:, None]
        outputs.append((h * c[:, None]).sum(-1) + scan.d * x)
    return torch.stack(outputs, 1)


@pytest.mark.parametrize("backend", ["auto", "chunked", "naive"])
def test_the_layer_step_by_step(backend):
    mixer, x = build(causal=True, backend=backend, chunk_size=8, proj_bias=True), sequence(2, 43)
    u, z = mixer.in_proj(x).chunk(2, -1)
    want = mixer.out_proj(one_direction(mixer.scan, u) * F.silu(z))
    torch.testing.assert_close(mixer(x).y, want, atol=1e-12, rtol=0)


def test_bidirectional_is_two_scans_with_their_own_parameters():
    """Shared: both projections and the gate. Own: convolution, x_proj, dt_proj, a_log, d."""
    mixer, x = build(), sequence(2, 29)
    own = {name for name, _ in mixer.scan_reverse.named_parameters()}
    assert own == {"conv.weight", "conv.bias", "x_proj.weight", "dt_proj.weight", "dt_proj.bias", "a_log", "d"}
    assert not torch.equal(mixer.scan.x_proj.weight, mixer.scan_reverse.x_proj.weight)
    u, z = mixer.in_proj(x).chunk(2, -1)
    y = one_direction(mixer.scan, u) + one_direction(mixer.scan_reverse, u.flip(1)).flip(1)
    torch.testing.assert_close(mixer(x).y, mixer.out_proj(y * F.silu(z)), atol=1e-12, rtol=0)


def renamed(theirs):
    """Their state dict under our names."""
    names = {"conv1d.weight": "conv.weight", "conv1d.bias": "conv.bias", "A_log": "a_log", "D": "d"}
    return {k if k.startswith(("in_", "out_")) else f"scan.{names.get(k, k)}": v for k, v in theirs.items()}


def test_transformers():
    """Outputs and every gradient with copied weights. Theirs computes the scan in float32, whatever the weights."""
    modeling = pytest.importorskip("transformers.models.mamba.modeling_mamba")
    from transformers import MambaConfig

    config = MambaConfig(hidden_size=24, state_size=8, num_hidden_layers=1, vocab_size=4, use_bias=True)
    theirs = modeling.MambaMixer(config, 0).eval()
    ours = Mamba(24, causal=True, d_state=8, proj_bias=True, chunk_size=16).eval()
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


def test_mambapy():
    """Their parallel scan and their steps with copied weights; they take A in float32."""
    mambapy = pytest.importorskip("mambapy.mamba", reason="mambapy is not installed")
    theirs = mambapy.MambaBlock(mambapy.MambaConfig(d_model=12, n_layers=1, d_state=8)).double()
    ours, x = build(12, causal=True, d_state=8), sequence(2, 33, 12)
    ours.load_state_dict(renamed(theirs.state_dict()))
    torch.testing.assert_close(ours(x).y, theirs(x), atol=1e-9, rtol=0)
    cache, state = (None, torch.zeros(2, 24, 3, dtype=torch.float64)), ours.init_state(2)
    for t in range(6):
        want, cache = theirs.step(x[:, t], cache)
        got, state, _ = ours(x[:, t : t + 1], state=state)
        torch.testing.assert_close(got[:, 0], want, atol=1e-9, rtol=0)


def test_it_starts_as_published():
    mixer = Mamba(256, causal=True)
    scan = mixer.scan
    dt = F.softplus(scan.dt_proj.bias.double())
    assert 0.001 * 0.999 <= dt.min() < 0.0015 and 0.07 < dt.max() <= 0.1 * 1.001
    # log dt is uniform: its mean is the middle, within a few of its standard errors.
    assert abs(dt.log().mean() - (math.log(0.001) + math.log(0.1)) / 2) < 0.25
    bound = 16**-0.5  # dt_rank = 256 / 16
    assert bound * 0.99 < scan.dt_proj.weight.abs().max() <= bound
    assert torch.equal(scan.a_log[7], torch.arange(1.0, 17.0).log())
    assert bool((scan.d == 1).all())
    assert (mixer.in_proj.bias, mixer.out_proj.bias, scan.x_proj.bias) == (None, None, None)
    floored = build(256, causal=True, dt_min=1e-6, dt_max=1e-5).scan
    torch.testing.assert_close(F.softplus(floored.dt_proj.bias).max().item(), 1e-4, rtol=1e-3, atol=0)
    constant = build(64, causal=True, dt_init="constant", dt_scale=0.5).scan
    assert bool((constant.dt_proj.weight == 0.5 * 4**-0.5).all())


def test_no_weight_decay_where_the_paper_has_none():
    mixer = build()
    groups = parameter_groups(mixer, lr=1e-3, weight_decay=0.1)
    bare = {id(p) for group in groups if group["weight_decay"] == 0 for p in group["params"]}
    names = {name for name, p in mixer.named_parameters() if id(p) in bare}
    vectors = {"a_log", "d", "dt_proj.bias", "conv.bias"}
    assert names == {f"{scan}.{name}" for scan in ("scan", "scan_reverse") for name in vectors}


def test_counts():
    """Parameters by the formula of the paper's layer; the state."""
    mixer = Mamba(32, causal=True)
    inner, rank, states = 64, 2, 16
    expected = 32 * 2 * inner + inner * (4 + 1) + inner * (rank + 2 * states) + inner * (rank + 1)
    assert sum(p.numel() for p in mixer.parameters()) == expected + inner * states + inner + inner * 32
    state = mixer(torch.randn(3, 7, 32), state=mixer.init_state(3)).state
    assert state_elements(state) == mixer.state_size(7) == mixer.state_size(0) == inner * (states + 3)


@pytest.mark.parametrize("autocast", [True, False])
def test_scan_and_state_are_computed_in_float32(autocast, monkeypatch):
    """Under bfloat16 autocast and with bfloat16 weights: dt and a reach the kernel in float32, the state stays so."""
    seen = []

    def kernel(*tensors, **options):
        seen.extend(tensors[i].dtype for i in (1, 2))
        return selective_scan(*tensors, **options)

    monkeypatch.setattr(mamba, "selective_scan", kernel)
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
        ({"d_state": 0}, "d_state=0 must be a positive integer"),
        ({"d_conv": 2.5}, "d_conv=2.5 must be a positive integer"),
        ({"dt_rank": "autos"}, "dt_rank='autos' must be a positive integer"),
        ({"expand": 0}, "expand=0 leaves"),
        ({"dt_min": 0.2}, "dt_min=0.2 and dt_max=0.1"),
        ({"dt_init_floor": 0.0}, "dt_init_floor=0.0"),
        ({"dt_init": "rand"}, "dt_init='rand' is unknown. Did you mean random"),
        ({"dt_scale": -1.0}, "dt_scale=-1.0"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"backend": "fast"}, "backend='fast' is unknown"),
        ({"cross": True}, "does not support the pattern 'cross'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("mamba", 8, **options)


def test_states_that_do_not_fit_are_refused():
    mixer, x = build(causal=True), sequence(2, 5)
    other = create_mixer("s4d", 6, causal=True, d_state=4).init_state(2)
    with pytest.raises(ValueError, match="state is a S4DState, expected the MambaState"):
        mixer(x, state=other)
    with pytest.raises(ValueError, match="state is of 3 rows, but there are 2 sequences"):
        mixer(x, state=mixer.init_state(3))
    with pytest.raises(ValueError, match=r"initial_state has shape \(2, 12, 7\), expected \(2, 12, 4\)"):
        mixer(x, state=MambaState(mixer.init_state(2).conv, torch.zeros(2, 12, 7)))
