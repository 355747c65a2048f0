"""The agent mixer: its formula in one and two dimensions, pooling and tables, the causal form, options."""

import math

import pytest
import torch
from torch.nn import functional as F

from seqzoo.blocks.layers.agents import AgentBias, pool_agents
from seqzoo.blocks.mixers.agent import AgentAttention, AgentState
from seqzoo.blocks.parameters import parameter_groups
from seqzoo.blocks.protocol import state_elements
from seqzoo.blocks.registry import create_mixer

torch.set_num_threads(1)
DIM, HEADS = 12, 3
EXACT = {"atol": 1e-12, "rtol": 1e-12}
LEARNED = {"agents": "learned", "num_agents": 5}


def build(**options):
    """In float64 and eval mode; biases and tables far from their start, so that they count."""
    torch.manual_seed(0)
    mixer = AgentAttention(DIM, dtype=torch.float64, **{"num_heads": HEADS, "num_agents": 4, **options}).eval()
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer


def sequence(batch, length, seed=1):
    return torch.randn(batch, length, DIM, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def split(x):
    """(B, L, H K) to (B, H, L, K)."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2)


def attend(mixer, q, agents, k, v, bias_1=0.0, bias_2=0.0):
    """Both softmaxes written out, of (B, L, H K) and agents (B, n, H K); before the output projection."""
    q, agents, k, v = (split(t) for t in (q, agents, k, v))
    scale = mixer.head_dim**-0.5
    gathered = (agents @ k.transpose(-1, -2) * scale + bias_1).softmax(-1) @ v
    return ((q @ agents.transpose(-1, -2) * scale + bias_2).softmax(-1) @ gathered).transpose(1, 2).flatten(2)


def gradients_agree(got, want, inputs):
    weight = torch.randn(got.shape, dtype=got.dtype, generator=torch.Generator().manual_seed(9))
    pairs = zip(*(torch.autograd.grad((y * weight).sum(), inputs) for y in (got, want)), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("length", [1, 3, 7, 20])
def test_one_dimension_by_hand(length):
    mixer, x = build(), sequence(2, length).requires_grad_()
    q, k, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
    agents = F.adaptive_avg_pool1d(q.transpose(1, 2), 4).transpose(1, 2)
    bias_1, bias_2 = (
        F.interpolate(b.table, length, mode="linear") for b in (mixer.aggregate_bias, mixer.broadcast_bias)
    )
    o = attend(mixer, q, agents, k, v, bias_1, bias_2.transpose(-1, -2))
    local = F.conv1d(v.transpose(1, 2), mixer.conv.weight, mixer.conv.bias, padding=1, groups=DIM).transpose(1, 2)
    want, got = mixer.out_proj(o + local), mixer(x).y
    torch.testing.assert_close(got, want, **EXACT)
    gradients_agree(got, want, [x, *mixer.parameters()])


@pytest.mark.parametrize("grid", [(4, 6), (1, 9), (5, 3)])
@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_two_dimensions_with_class_tokens_by_hand(grid, prefix):
    mixer = build(grid_size=grid, num_prefix_tokens=prefix)
    x = sequence(2, prefix + math.prod(grid)).requires_grad_()
    q, k, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
    spatial = [t[:, prefix:].transpose(1, 2).unflatten(2, grid) for t in (q, v)]
    agents = F.adaptive_avg_pool2d(spatial[0], 2).flatten(2).transpose(1, 2)
    biases = []
    for part in (mixer.aggregate_bias, mixer.broadcast_bias):
        table = F.interpolate(part.table, grid, mode="bilinear") + part.rows[..., None] + part.columns[..., None, :]
        biases.append(torch.cat(([part.prefix] if prefix else []) + [table.flatten(2)], -1))
    o = attend(mixer, q, agents, k, v, biases[0], biases[1].transpose(-1, -2))
    local = mixer.conv(spatial[1]).flatten(2).transpose(1, 2)
    want, got = mixer.out_proj(o + F.pad(local, (0, 0, prefix, 0))), mixer(x, grid=grid).y
    torch.testing.assert_close(got, want, **EXACT)
    gradients_agree(got, want, [x, *mixer.parameters()])


def test_tokens_without_a_grid_stand_on_one_row():
    mixer, x = build(grid_size=(3, 4)), sequence(2, 7)
    torch.testing.assert_close(mixer(x).y, mixer(x, grid=(1, 7)).y, **EXACT)
    assert not torch.allclose(mixer(sequence(2, 12)).y, mixer(sequence(2, 12), grid=(3, 4)).y)
    flat = build()
    assert torch.equal(flat(x).y, flat(x, grid=(1, 7)).y)  # one dimension does not read it


def test_tables_of_another_grid_are_interpolated():
    mixer, x = build(grid_size=(4, 6)), sequence(1, 8 * 6)
    wide = build(grid_size=(8, 6))
    state = mixer.state_dict()
    for name in ("aggregate_bias.rows", "broadcast_bias.rows"):
        state[name] = F.interpolate(state[name], 8, mode="linear")
    wide.load_state_dict(state)
    torch.testing.assert_close(mixer(x, grid=(8, 6)).y, wide(x, grid=(8, 6)).y, **EXACT)


def test_holes_in_a_grid_are_as_if_absent():
    mixer = build(grid_size=(4, 5), num_prefix_tokens=1)
    mask = torch.ones(3, 21, dtype=torch.bool)
    mask[1, [0, 3, 4, 17]] = False
    mask[2, 1 + torch.arange(10)] = False  # the upper half: the two upper agents have nothing
    x = sequence(3, 21)
    x[~mask] = 1e3
    x.requires_grad_()
    y = mixer(x, mask=mask, grid=(4, 5)).y
    assert (y[~mask] == 0).all()
    torch.testing.assert_close(y[:1], mixer(x[:1], grid=(4, 5)).y, **EXACT)
    (gradient,) = torch.autograd.grad(y.square().sum(), x)
    assert (gradient[~mask] == 0).all() and gradient.isfinite().all()
    # Row 2 by hand: the lower agents, the keys that are there, values zero at pads for the convolution.
    real = mask[2, 1:].view(4, 5)
    row = x[2:].detach().clone()
    row[:, ~mask[2]] = 0
    q, k, v = mixer.q_proj(row), mixer.k_proj(row), mixer.v_proj(row) * mask[2, :, None]
    lower = q[:, 1:].unflatten(1, (4, 5))[:, 2:]
    agents = torch.stack((lower[:, :, :3].mean((1, 2)), lower[:, :, 2:].mean((1, 2))), 1)
    bias = [b(21, height=4)[:, :, 2:, :] for b in (mixer.aggregate_bias, mixer.broadcast_bias)]
    hide = torch.where(mask[2], 0.0, -torch.inf).double()
    o = attend(mixer, q, agents, k, v, bias[0] + hide, bias[1].transpose(-1, -2))
    local = mixer.conv(v[:, 1:].transpose(1, 2).unflatten(2, (4, 5))).flatten(2).transpose(1, 2)
    want = mixer.out_proj(o + F.pad(local, (0, 0, 1, 0)))
    assert real.sum() == 10
    torch.testing.assert_close(y[2, mask[2]], want[0, mask[2]], **EXACT)


@pytest.mark.parametrize("options", [{}, {"grid_size": (3, 4)}])
def test_class_tokens_and_pads_on_rows_of_their_own_length(options):
    mixer, x = build(num_prefix_tokens=2, **options), sequence(4, 9)
    lengths = [9, 5, 2, 1]
    y = mixer(x, mask=torch.arange(9) < torch.tensor(lengths)[:, None]).y
    for row, n in enumerate(lengths):
        torch.testing.assert_close(y[row, :n], mixer(x[row : row + 1, :n]).y[0], **EXACT)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (14, 9), (5, 16)])
@pytest.mark.parametrize("count", [(1, 1), (3, 3), (7, 7), (2, 5)])
def test_pooling_is_adaptive_average_pooling(size, count):
    x = torch.randn(2, *size, 3, dtype=torch.float64)
    want = F.adaptive_avg_pool2d(x.permute(0, 3, 1, 2), count).flatten(2).transpose(1, 2)
    got, real = pool_agents(x.flatten(1, 2), count, height=size[0])
    torch.testing.assert_close(got, want, **EXACT)
    assert real.all()


def test_bins_average_real_tokens_only():
    x = torch.randn(4, 11, 3, dtype=torch.float64)
    lengths = torch.tensor([11, 5, 2, 0])
    got, real = pool_agents(x, (1, 4), lengths=lengths)
    for row, n in enumerate(lengths.tolist()):
        assert real[row].all() == (n > 0)
        if n:
            want = F.adaptive_avg_pool1d(x[row, :n].T, 4).T
            torch.testing.assert_close(got[row], want, **EXACT)
    mask = torch.rand(4, 11) < 0.4
    mask[0, :3] = False
    got, real = pool_agents(x, (1, 4), mask=mask)
    for row in range(4):
        for i in range(4):
            part = slice(i * 11 // 4, -(-(i + 1) * 11 // 4))
            here = x[row, part][mask[row, part]]
            assert real[row, i] == (len(here) > 0)
            want = here.mean(0) if len(here) else torch.zeros(3, dtype=torch.float64)
            torch.testing.assert_close(got[row, i], want, **EXACT)
    assert not real.all()


def test_pooling_is_not_in_half_precision_under_autocast():
    x = torch.randn(1, 4099, 2) + 1
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = pool_agents(x, (1, 3))
    assert torch.equal(got, pool_agents(x, (1, 3))[0])


def test_cross_takes_agents_from_the_queries_and_keys_from_the_context():
    mixer, x, context = build(cross=True), sequence(2, 9), sequence(2, 6, seed=2)
    q = mixer.q_proj(x)
    agents = F.adaptive_avg_pool1d(q.transpose(1, 2), 4).transpose(1, 2)
    want = mixer.out_proj(attend(mixer, q, agents, mixer.k_proj(context), mixer.v_proj(context)))
    torch.testing.assert_close(mixer(x, context).y, want, **EXACT)
    empty = torch.tensor([[True] * 6, [False] * 6])
    y = mixer(x, context, context_mask=empty).y
    assert (y[1] == 0).all()
    torch.testing.assert_close(y[:1], want[:1], **EXACT)


def test_which_agents_a_pattern_has_unless_told():
    learned = {(c, x): build(causal=c, cross=x).agents is not None for c in (False, True) for x in (False, True)}
    assert learned == {(False, False): False, (False, True): False, (True, False): True, (True, True): True}


def test_causal_outputs_are_those_of_a_full_mixer_over_each_prefix():
    plain = {**LEARNED, "agent_bias": False, "conv_kernel": 0}
    causal = build(causal=True, chunk_size=4, **{k: v for k, v in plain.items() if k != "agent_bias"})
    full, x = build(**plain), sequence(2, 14)
    full.load_state_dict(causal.state_dict())
    y = causal(x).y
    for n in range(1, 15):
        torch.testing.assert_close(y[:, n - 1], full(x[:, :n]).y[:, -1], **EXACT)
    assert not torch.allclose(full(x).y, y)


def test_causal_convolution_looks_back_only_and_is_added_before_the_output_projection():
    mixer = build(causal=True, **LEARNED)
    without, x = build(causal=True, **LEARNED, conv_kernel=0), sequence(2, 9)
    without.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("conv")})
    v = F.pad(mixer.v_proj(x).transpose(1, 2), (2, 0))
    local = F.conv1d(v, mixer.conv.weight, mixer.conv.bias, groups=DIM).transpose(1, 2)
    torch.testing.assert_close(mixer(x).y - without(x).y, local @ mixer.out_proj.weight.T, **EXACT)


def test_causal_cross_is_cross_with_learned_agents():
    causal, plain = build(causal=True, cross=True, **LEARNED), build(cross=True, **LEARNED)
    x, context = sequence(2, 9), sequence(2, 6, seed=2)
    agents = causal.agents.flatten(1).expand(2, -1, -1)
    want = attend(causal, causal.q_proj(x), agents, causal.k_proj(context), causal.v_proj(context))
    torch.testing.assert_close(causal(x, context).y, causal.out_proj(want), **EXACT)
    torch.testing.assert_close(causal(x, context).y, plain(x, context).y, **EXACT)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
def test_learned_agents_are_agent_attention_pytorch(dtype, masked):
    pytest.importorskip("einops", reason="agent-attention-pytorch needs einops")
    package = pytest.importorskip("agent_attention_pytorch", reason="the independent implementation is not installed")
    theirs = package.AgentSelfAttention(
        DIM, num_agent_tokens=5, dim_head=6, heads=HEADS, talking_heads=False, gate=False
    ).to(dtype)
    torch.nn.init.normal_(theirs.agent_tokens)
    ours = build(**LEARNED, head_dim=6, agent_bias=False, conv_kernel=0, qkv_bias=False, proj_bias=False).to(dtype)
    weights = dict(zip(("q_proj", "k_proj", "v_proj"), theirs.to_qkv[0].weight.chunk(3), strict=True))
    weights["out_proj"] = theirs.to_out[1].weight
    state = {f"{name}.weight": weight for name, weight in weights.items()}
    ours.load_state_dict({"agents": theirs.agent_tokens.transpose(0, 1), **state})
    x, mask = sequence(3, 17).to(dtype), None
    if masked:
        mask = torch.arange(17) < torch.tensor([17, 9, 1])[:, None]
    want, got = theirs(x, mask=mask), ours(x, mask=mask).y
    tight = 1e-12 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(got, want, atol=tight, rtol=tight)


def test_the_second_scale_and_the_shortcut():
    mixer, x = build(broadcast_exponent=0.3, shortcut=0.075, agent_bias=False, conv_kernel=0), sequence(2, 9)
    q, k, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
    agents = F.adaptive_avg_pool1d(q.transpose(1, 2), 4).transpose(1, 2)
    change = mixer.head_dim ** (-0.5 * 0.3) / mixer.head_dim**-0.5
    want = attend(mixer, q * change, agents, k, v) + 0.075 * v
    torch.testing.assert_close(mixer(x).y, mixer.out_proj(want), **EXACT)


def test_initial_parameters_and_their_groups():
    mixer = AgentAttention(32, num_heads=4, num_agents=49, grid_size=(14, 14), num_prefix_tokens=1)
    for part in (mixer.aggregate_bias, mixer.broadcast_bias):
        shapes = {name: tuple(p.shape) for name, p in part.named_parameters()}
        assert shapes == {
            "table": (4, 49, 7, 7),
            "rows": (4, 49, 14),
            "columns": (4, 49, 14),
            "prefix": (4, 49, 1),
        }
        assert 0.018 < part.table.std() < 0.022 and part.table.abs().max() < 0.12
    assert mixer.conv.weight.shape == (32, 1, 3, 3)
    learned = AgentAttention(32, num_heads=4, num_agents=200, agents="learned", causal=True)
    assert learned.agents.shape == (200, 4, 8) and abs(learned.agents.std() - 1) < 0.05
    for model in (mixer, learned):
        names = {id(p): name for name, p in model.named_parameters()}
        groups = parameter_groups(model, lr=1.0, weight_decay=0.1)
        decayed = {names[id(p)] for g in groups if g["weight_decay"] for p in g["params"]}
        assert decayed == {"q_proj.weight", "k_proj.weight", "v_proj.weight", "out_proj.weight", "conv.weight"}


def test_state_has_its_size_and_stays_in_float32():
    mixer = AgentAttention(16, num_heads=2, causal=True, **LEARNED).bfloat16().eval()
    state = mixer.init_state(3)
    assert {t.dtype for t in state.running} == {torch.float32}
    out = mixer(torch.randn(3, 20, 16).bfloat16(), state=state)
    assert isinstance(out.state, AgentState)
    assert {t.dtype for t in out.state.running} == {torch.float32} and out.state.conv.dtype == torch.bfloat16
    assert mixer.state_size(7) == state_elements(out.state) == 2 * 5 * (8 + 2) + 2 * 16
    bare = AgentAttention(16, num_heads=2, causal=True, conv_kernel=0, **LEARNED)
    assert bare.init_state(1).conv is None
    assert bare.state_size(7) == state_elements(bare.init_state(1)) == 2 * 5 * (8 + 2)


def test_dropout_of_both_weights_in_training_only():
    mixer, x = build(attn_drop=0.5), sequence(2, 9)
    want = build()
    want.load_state_dict(mixer.state_dict())
    torch.testing.assert_close(mixer(x).y, want(x).y, **EXACT)
    mixer.train()
    assert not torch.allclose(mixer(x).y, mixer(x).y)


def test_a_bias_table_of_rows_of_their_own_length():
    bias, lengths = AgentBias(2, 3, size=4, num_prefix=1, dtype=torch.float64), torch.tensor([9, 4, 1, 0])
    got = bias(10, lengths=lengths)
    assert got.shape == (4, 2, 3, 10)
    for row, n in enumerate(lengths.tolist()):
        assert torch.equal(got[row, :, :, :1], bias.prefix)
        if n:
            torch.testing.assert_close(got[row, :, :, 1 : 1 + n], F.interpolate(bias.table, n, mode="linear"), **EXACT)
    assert torch.equal(bias(1), bias.prefix[None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"causal": True, "agents": "pooled"}, "agents='pooled' are means of all queries.*needs agents='learned'"),
        ({"causal": True, "cross": True, "agents": "pooled"}, "the pattern 'causal-cross' needs agents='learned'"),
        ({"agents": "learnt"}, "agents='learnt' is unknown. Did you mean learned"),
        ({"num_agents": 0}, "num_agents=0"),
        ({"num_agents": 50, "grid_size": (7, 7)}, "num_agents=50 must be a square.*49 and 64"),
        ({"grid_size": (7, 0)}, r"grid_size=\(7, 0\)"),
        ({"grid_size": (2, 2), "causal": True, **LEARNED}, "not for the pattern 'causal'"),
        ({"num_prefix_tokens": 1, "causal": True, **LEARNED}, "num_prefix_tokens=1"),
        ({"num_prefix_tokens": -1}, "num_prefix_tokens=-1"),
        ({"agent_bias": True, "causal": True, **LEARNED}, "agent_bias=True is for the pattern 'self'"),
        ({"bias_size": 0}, "bias_size=0"),
        ({"conv_kernel": 4}, "conv_kernel=4 must be odd, such as 5"),
        ({"conv_kernel": 3, "cross": True}, "conv_kernel=3"),
        ({"shortcut": 0.1, "cross": True}, "shortcut=0.1"),
        ({"attn_drop": 0.1, "causal": True, **LEARNED}, "attn_drop=0.1"),
        ({"attn_drop": 1.0}, "attn_drop=1.0"),
        ({"chunk_size": 12}, "chunk_size=12 must be a power of two, such as 8"),
        ({"num_heads": 5}, "num_heads=5 does not divide dim=12; nearest that does: 4"),
        ({"backend": "chunked"}, "agent_attention_plain: backend='chunked' is unknown"),
        ({"backend": "sdpa", "causal": True, **LEARNED}, "agent_attention: backend='sdpa' is unknown"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_mixer("agent", DIM, **{"num_heads": HEADS, **options})


def test_bad_inputs():
    mixer, x = build(grid_size=(3, 4), num_prefix_tokens=1), sequence(2, 13)
    assert mixer(x, grid=(3, 4)).y.shape == x.shape
    for grid, message in (((3, 5), "holds 15 tokens, x has 12"), ((1, 3, 4), r"must be \(height, width\)")):
        with pytest.raises(ValueError, match=message):
            mixer(x, grid=grid)
    with pytest.raises(ValueError, match="not for cu_seqlens"):
        mixer(x[:1], grid=(3, 4), cu_seqlens=torch.tensor([0, 6, 13], dtype=torch.int32))
    causal = build(causal=True, **LEARNED)
    with pytest.raises(ValueError, match="state is of 3 rows, but there are 2 sequences"):
        causal(x, state=causal.init_state(3))
    with pytest.raises(ValueError, match="state is a LinearState, expected the AgentState"):
        causal(x, state=create_mixer("linear", DIM, num_heads=HEADS, causal=True).init_state(2))
    with pytest.raises(ValueError, match="initial_state has shapes"):
        causal(x, state=build(causal=True, agents="learned", num_agents=6).init_state(2))
