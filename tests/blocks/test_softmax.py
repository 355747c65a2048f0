"""SoftmaxAttention against torch's MultiheadAttention and a dense float64 formula; the cache; refusals.

What every mixer must do (causality, padding, packing, streaming, gradients) is in the conformance suite.
"""

import pytest
import torch
from torch import nn

from seqzoo.blocks.layers.positions import alibi_slopes, rope
from seqzoo.blocks.mixers.softmax import SoftmaxAttention
from seqzoo.blocks.protocol import state_elements
from seqzoo.blocks.registry import create_mixer, mixer_info
from seqzoo.kernels.softmax import window as window_module

F64 = torch.float64
LENGTHS = torch.tensor([21, 9, 1])


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Windows cut into several blocks at the lengths used here."""
    monkeypatch.setattr(window_module, "MIN_BLOCK", 4)


def build(seed=0, dim=16, **options):
    torch.manual_seed(seed)
    mixer = SoftmaxAttention(dim, dtype=F64, **options).eval()
    for parameter in mixer.parameters():
        nn.init.normal_(parameter, std=0.4)
    return mixer


def tokens(*shape, seed=1):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def dense(mixer, x):
    """The formula for one unpadded sequence (L, D), score by score from positions; float64."""
    length, heads, width = len(x), mixer.num_heads, mixer.head_dim
    q = mixer.q_proj(x).view(length, heads, width)
    k, v = (p(x).view(length, -1, width) for p in (mixer.k_proj, mixer.v_proj))
    k, v = (t.repeat_interleave(heads // mixer.num_kv_heads, 1) for t in (k, v))
    window, sinks = mixer.window_size or length, mixer.num_sinks
    i, j = torch.arange(length)[:, None], torch.arange(length)[None]
    seen = (i - j < window) & (j - i < window) | (j < sinks)
    if mixer.causal:
        seen = seen & (j <= i)
    stand = i.expand(length, length)  # where the query stands, seen from key j
    if mixer.sink_positions == "cache":
        stand = torch.where(j < sinks, stand.clamp(max=sinks + window - 1), stand)
    if mixer.position == "rope":
        scores = torch.empty(heads, length, length, dtype=F64)
        for a in range(length):
            turned_q = rope(q[a].expand(length, -1, -1)[:, None], stand[a][:, None])[:, 0]
            turned_k = rope(k[:, None], j[0][:, None])[:, 0]
            scores[:, a] = (turned_q * turned_k).sum(-1).T
    else:
        scores = torch.einsum("ahk,bhk->hab", q, k)
    scores = scores * mixer.scale
    if mixer.position == "alibi":
        scores = scores - alibi_slopes(heads, dtype=F64)[:, None, None] * (stand - j).abs()
    if mixer.position == "t5":
        for a in range(length):
            for b in range(length):
                where = torch.tensor([[int(stand[a, b])]]), torch.tensor([[b]])
                scores[:, a, b] = scores[:, a, b] + mixer.relative_bias(*where)[0, :, 0, 0]
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return mixer.out_proj(torch.einsum("hab,bhk->ahk", weights, v).flatten(1))


SELF = {
    name: options
    for name, options in SoftmaxAttention.variants.items()
    if not options.get("cross")
    and not {"qk_norm", "rotary_dim", "rope_interleaved", "rope_scaling"}
    & set(options)  # the formula above has none of these
}


@pytest.mark.parametrize("name", SELF)
def test_dense_formula_alone_padded_and_packed(name):
    mixer, x = build(**SELF[name]), tokens(3, 21, 16)
    want = [dense(mixer, x[b, :n]) for b, n in enumerate(LENGTHS)]
    torch.testing.assert_close(mixer(x[:1]).y[0], want[0], rtol=1e-12, atol=1e-12)
    for side in ("right", "left", "scattered"):
        mask = torch.zeros(3, 21, dtype=torch.bool)
        for b, n in enumerate(LENGTHS.tolist()):
            where = {"right": torch.arange(n), "left": torch.arange(21 - n, 21)}
            index = where[side] if side in where else torch.randperm(21)[:n].sort().values
            mask[b, index] = True
        padded = torch.full_like(x, 50.0)
        for b, n in enumerate(LENGTHS):
            padded[b, mask[b]] = x[b, :n]
        y = mixer(padded, mask=mask).y
        assert (y[~mask] == 0).all()
        torch.testing.assert_close(y[mask], torch.cat(want), rtol=1e-12, atol=1e-12)
    bounds = torch.tensor([0, 21, 30, 30, 31], dtype=torch.int32)  # the third is empty
    packed = torch.cat([x[b, :n] for b, n in enumerate(LENGTHS)])
    y = mixer(packed[None], cu_seqlens=bounds).y[0]
    torch.testing.assert_close(y, torch.cat(want), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["default", "rope", "window_rope", "window_self", "sinks_cache", "window_t5"])
def test_gradients_of_the_dense_formula(name):
    mixer, x = build(**SELF[name]), tokens(1, 21, 16).requires_grad_()
    inputs, weight = [x, *mixer.parameters()], tokens(21, 16, seed=3)
    got = torch.autograd.grad((mixer(x).y[0] * weight).sum(), inputs)
    want = torch.autograd.grad((dense(mixer, x[0]) * weight).sum(), inputs)
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("cross", [False, True])
def test_multihead_attention_with_copied_weights(causal, cross):
    ours = build(num_heads=4, causal=causal, cross=cross)
    theirs = nn.MultiheadAttention(16, 4, batch_first=True, dtype=F64).eval()
    with torch.no_grad():
        theirs.in_proj_weight.copy_(torch.cat([p.weight for p in (ours.q_proj, ours.k_proj, ours.v_proj)]))
        theirs.in_proj_bias.copy_(torch.cat([p.bias for p in (ours.q_proj, ours.k_proj, ours.v_proj)]))
    theirs.out_proj.load_state_dict(ours.out_proj.state_dict())
    x, context = tokens(3, 7, 16), tokens(3, 9, 16, seed=4)
    pads = torch.arange(9 if cross else 7) >= torch.tensor([[9], [4], [1]])
    future = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal and not cross else None
    source = context if cross else x
    want = theirs(x, source, source, key_padding_mask=pads, attn_mask=future, need_weights=False)[0]
    if cross:
        torch.testing.assert_close(ours(x, context, context_mask=~pads).y, want, rtol=1e-12, atol=1e-12)
    else:
        got = ours(x, mask=~pads).y
        torch.testing.assert_close(got[~pads], want[~pads], rtol=1e-12, atol=1e-12)


def test_rope_options_reach_the_scores():
    base = {"num_heads": 2, "position": "rope"}
    x = tokens(1, 9, 16)
    options = [{}, {"rotary_dim": 4}, {"rope_interleaved": True}, {"rope_base": 10.0}]
    options.append({"rope_scaling": {"kind": "linear", "factor": 3.0}})
    outputs = [build(**base, **more)(x).y for more in options]
    assert all((a - b).abs().max() > 1e-3 for n, a in enumerate(outputs) for b in outputs[:n])


def test_qk_norm_ignores_the_size_of_queries_and_keys():
    mixer, x = build(num_heads=4, qk_norm=True, qkv_bias=False), tokens(2, 7, 16)
    mixer.q_norm.eps = mixer.k_norm.eps = 0.0
    before = mixer(x).y
    with torch.no_grad():
        mixer.q_proj.weight.mul_(7.0)
        mixer.k_proj.weight.mul_(0.2)
    torch.testing.assert_close(mixer(x).y, before, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("more", [{}, {"position": "rope"}, {"num_sinks": 2}, {"position": "alibi"}])
def test_a_window_of_the_whole_length_is_full_attention(more):
    x = tokens(2, 13, 16)
    full = build(causal=True, **{k: v for k, v in more.items() if k != "num_sinks"})
    for window_size in (13, 14, 100):
        mixer = build(causal=True, window_size=window_size, **more)
        state = mixer.init_state(2)
        torch.testing.assert_close(mixer(x).y, full(x).y, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(mixer(x, state=state).y, full(x).y, rtol=1e-12, atol=1e-12)


STREAMING = {name: options for name, options in SELF.items() if options.get("causal")}


@pytest.mark.parametrize("name", STREAMING)
@pytest.mark.parametrize("side", ["left", "right"])
def test_prefill_chunks_and_steps_of_mixed_lengths(name, side):
    """A padded prompt, a padded chunk, then steps: each row as if it were alone, positions without gaps."""
    mixer, x = build(**STREAMING[name]), tokens(3, 40, 16)
    state, done = mixer.init_state(3), [0, 0, 0]
    seen = [[], [], []]
    for width, counts in (
        (15, (15, 4, 0)),
        (6, (2, 6, 3)),
        *[(1, (1, 1, 1))] * 3,
        (1, (1, 0, 1)),
        (9, (9, 1, 5)),
    ):
        chunk, mask = torch.full((3, width, 16), 9.0, dtype=F64), torch.zeros(3, width, dtype=torch.bool)
        for b, n in enumerate(counts):
            part = slice(0, n) if side == "right" else slice(width - n, width)
            chunk[b, part], mask[b, part] = x[b, done[b] : done[b] + n], True
            done[b] += n
        y, state, _ = mixer(chunk, mask=mask, state=state)
        for b in range(3):
            seen[b].append(y[b, mask[b]])
    assert state.length.tolist() == done
    for b in range(3):
        torch.testing.assert_close(torch.cat(seen[b]), dense(mixer, x[b, : done[b]]), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["rope", "sinks_cache", "window_t5"])
def test_packed_states_are_one_per_sequence(name):
    mixer, x = build(**STREAMING[name]), tokens(1, 31, 16)
    bounds = torch.tensor([0, 21, 30, 31], dtype=torch.int32)
    state = mixer(x, cu_seqlens=bounds, state=mixer.init_state(3)).state
    assert state.length.tolist() == [21, 9, 1]
    after = tokens(1, 12, 16, seed=5)
    got = mixer(after, cu_seqlens=torch.tensor([0, 2, 8, 12]), state=state).y[0]
    ends = ((0, 21, 0, 2), (21, 30, 2, 8), (30, 31, 8, 12))
    want = [dense(mixer, torch.cat((x[0, a:b], after[0, c:d])))[b - a :] for a, b, c, d in ends]
    torch.testing.assert_close(got, torch.cat(want), rtol=1e-12, atol=1e-12)


def test_state_sizes():
    full = build(num_heads=4, num_kv_heads=2, causal=True)
    window = build(num_heads=4, num_kv_heads=2, causal=True, window_size=5, num_sinks=3)
    assert (full.state_size(0), full.state_size(10)) == (0, 2 * 10 * 2 * 4)
    assert window.state_size(0) == window.state_size(10**6) == 2 * (3 + 4) * 2 * 4
    for mixer in (full, window):
        state = mixer.init_state(2)
        for count in (1, 6, 20):
            state = mixer(tokens(2, count, 16), state=state).state
            assert state_elements(state) == mixer.state_size(int(state.length[0]))


def test_the_window_keeps_the_newest_tokens_and_the_first():
    mixer = build(num_heads=4, causal=True, window_size=4, num_sinks=2)
    state = mixer.init_state(2)
    assert (state.position == -1).all()
    mask = torch.tensor([[True] * 9, [False, True] * 4 + [False]])
    state = mixer(tokens(2, 9, 16), mask=mask, state=state).state
    assert state.position.tolist() == [[0, 1, 6, 7, 8], [0, 1, 1, 2, 3]]
    state = mixer(tokens(2, 2, 16), state=state).state
    assert state.position.tolist() == [[0, 1, 8, 9, 10], [0, 1, 3, 4, 5]]


def test_max_len_is_a_bound():
    mixer = build(causal=True)
    state = mixer.init_state(2, max_len=10)
    state = mixer(tokens(2, 9, 16), state=state).state
    state = mixer(tokens(2, 1, 16), state=state).state
    with pytest.raises(ValueError, match="1 tokens after 10 exceed max_len=10"):
        mixer(tokens(2, 1, 16), state=state)


def test_a_cache_may_have_another_dtype():
    mixer, x = build(causal=True, position="rope").float(), tokens(2, 9, 16).float()
    for options in ({}, {"window_size": 20}):
        mixer = SoftmaxAttention(16, causal=True, position="rope", **options)
        state = mixer.init_state(2, dtype=torch.bfloat16)
        ys = []
        for chunk in x.split([4, 1, 4], 1):
            y, state, _ = mixer(chunk, state=state)
            ys.append(y)
        assert state.k.dtype == torch.bfloat16
        torch.testing.assert_close(torch.cat(ys, 1), mixer(x).y, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("cross", [False, True])
def test_rows_without_a_visible_token_are_zero_with_zero_gradients(cross):
    mixer = build(num_heads=4, cross=cross)
    x, context = tokens(2, 5, 16).requires_grad_(), tokens(2, 5, 16, seed=3).requires_grad_()
    real = torch.tensor([True, False])[:, None].expand(2, 5)
    y = mixer(x, context, context_mask=real).y if cross else mixer(x, mask=real).y
    assert (y[1] == 0).all() and (y[0] != 0).all()
    inputs = (x, context) if cross else (x,)
    for grad in torch.autograd.grad(y.square().sum(), inputs):
        assert (grad[1] == 0).all() and grad.isfinite().all() and (grad[0] != 0).any()


def test_infinite_pads_do_no_harm():
    x = tokens(2, 6, 16)
    mask = torch.arange(6) < torch.tensor([[6], [3]])
    for options in ({}, {"causal": True}, {"causal": True, "window_size": 2}):
        mixer = build(**options)
        got = mixer(x.masked_fill(~mask[..., None], torch.nan), mask=mask).y
        assert torch.equal(got, mixer(x, mask=mask).y)


def test_dropout_works_in_training_only():
    x = tokens(2, 9, 16)
    for options in ({"attn_drop": 0.5}, {"proj_drop": 0.5}, {"attn_drop": 0.5, "backend": "naive"}):
        mixer = build(**options)
        want = build()(x).y
        torch.testing.assert_close(mixer(x).y, want, rtol=1e-12, atol=1e-12)
        mixer.train()
        assert not torch.allclose(mixer(x).y, want)


def test_compiles_with_a_mask_and_a_state():
    options = {"num_heads": 4, "window_size": 2, "num_sinks": 1, "position": "rope"}
    mixer, x = build(causal=True, **options), tokens(2, 9, 16)
    mask = torch.arange(9) < torch.tensor([[9], [3]])
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    got, want = (m(x, mask=mask, state=mixer.init_state(2)) for m in (compiled, mixer))
    torch.testing.assert_close(got.y, want.y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(got.state.k, want.state.k, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide dim=16; nearest that does: 4"),
        ({"num_heads": 4, "num_kv_heads": 3}, "num_kv_heads=3 does not divide num_heads=4"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"position": "rotary"}, "position='rotary'"),
        ({"position": "rope", "head_dim": 3}, "rotary_dim=3 must be even"),
        ({"rotary_dim": 2}, "need position='rope'"),
        ({"window_size": 0}, "window_size=0"),
        ({"num_sinks": 2}, "num_sinks=2"),
        ({"window_size": 4, "num_sinks": -1}, "num_sinks=-1"),
        ({"cross": True, "window_size": 4}, "window_size=4"),
        ({"cross": True, "position": "rope"}, "position='rope'"),
        ({"sink_positions": "cache", "causal": True}, "num_sinks=0"),
        ({"window_size": 4, "num_sinks": 2, "sink_positions": "cache", "position": "rope"}, "causal=False"),
        ({"window_size": 4, "num_sinks": 2, "sink_positions": "caches"}, "Did you mean cache"),
    ],
)
def test_refuses_options(options, words):
    with pytest.raises(ValueError, match=words):
        SoftmaxAttention(16, **options)


def test_refuses_inputs():
    mixer = build(causal=True)
    with pytest.raises(ValueError, match="state is of 3 rows, but there are 2 sequences"):
        mixer(tokens(2, 4, 16), state=mixer.init_state(3))
    for bounds in ([0, 3], [1, 4], [0, 5, 4]):
        with pytest.raises(ValueError, match="cu_seqlens"):
            mixer(tokens(1, 4, 16), cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
    with pytest.raises(ValueError, match="backend='triton'"):
        build(backend="triton")(tokens(1, 4, 16))


def test_is_registered():
    assert mixer_info("softmax").cls is SoftmaxAttention
    assert isinstance(create_mixer({"name": "softmax", "num_heads": 2}, 16), SoftmaxAttention)
