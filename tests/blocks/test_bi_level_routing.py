"""Bi-level routing: against SDPA under a mask made by hand from the routing, in every pattern; its own options."""

import math

import pytest
import torch
from torch.nn import functional as F

from seqzoo.blocks.layers.block_routing import BlockRoutingState
from seqzoo.blocks.layers.windows import Windows
from seqzoo.blocks.mixers.bi_level_routing import BiLevelRouting
from seqzoo.blocks.protocol import state_elements
from seqzoo.blocks.registry import create_mixer

torch.set_num_threads(1)
DIM = 16


def build(**options):
    torch.manual_seed(0)
    mixer = create_mixer("bi_level_routing", DIM, dtype=torch.float64, **{"num_heads": 4, "region_size": 4, **options})
    with torch.no_grad():
        for parameter in mixer.parameters():  # off the small start, where all scores are near 0
            parameter.add_(0.3 * torch.randn_like(parameter))
    return mixer.eval()


def tensor(*shape, seed=1):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def runs(length, size):
    """The region of each token of a sequence."""
    return [i // size for i in range(length)]


def windows(grid, number):
    """The region of each token of a grid, any number of axes."""
    sides = [math.ceil(n / number) for n in grid]
    cells = torch.cartesian_prod(*(torch.arange(n) for n in grid)).tolist()
    return [tuple(c // side for c, side in zip(cell, sides, strict=True)) for cell in cells]


def ranked(queries, keys, topk):
    """For each region of queries the topk regions of keys, by their mean vectors, ties to the first."""
    return {g: sorted(keys, key=lambda r: (-float(query @ keys[r]), r))[:topk] for g, query in queries.items()}


def means(x, regions, real):
    return {
        r: torch.stack([x[i] for i, own in enumerate(regions) if own == r and real[i]]).mean(0).detach()
        for r in sorted({own for i, own in enumerate(regions) if real[i]})
    }


def by_mask(mixer, x, q_regions, *, source=None, k_regions=None, real=None, seen=None):
    """One row (L, D): which keys each head and query sees, written out, then torch's attention. No LCE."""
    source, k_regions = (x, q_regions) if source is None else (source, k_regions)
    real = [True] * len(x) if real is None else real
    seen = (real if source is x else [True] * len(source)) if seen is None else seen
    q, k, v = mixer.q_proj(x), mixer.k_proj(source), mixer.v_proj(source)
    mask = torch.zeros(mixer.num_heads, len(x), len(source), dtype=torch.bool)
    width = DIM // mixer.routing_heads
    for h in range(mixer.routing_heads):
        part = slice(h * width, (h + 1) * width)
        heads = slice(None) if mixer.routing_heads == 1 else slice(h, h + 1)
        chosen = ranked(means(q[:, part], q_regions, real), means(k[:, part], k_regions, seen), mixer.topk)
        for i, own in enumerate(q_regions):
            for j, there in enumerate(k_regions):
                mask[heads, i, j] = real[i] and seen[j] and there in chosen[own]
    q, k, v = (t.unflatten(1, (mixer.num_heads, -1)).transpose(0, 1) for t in (q, k, v))
    empty = ~mask.any(2, keepdim=True)
    o = F.scaled_dot_product_attention(q[None], k[None], v[None], attn_mask=mask | empty, scale=mixer.scale)[0]
    return o.masked_fill(empty, 0).transpose(0, 1).flatten(1)


def lce(mixer, x, grid=None, real=None):
    """The convolution of V of one row (L, D), by torch's own, zero at pads."""
    v = mixer.v_proj(x)
    v = v if real is None else v * torch.tensor(real)[:, None]
    if grid is None:
        taps = mixer.lce.weight.shape[-1]
        return F.conv1d(v.t()[None], mixer.lce.weight, mixer.lce.bias, padding=taps // 2, groups=DIM)[0].t()
    taps = mixer.lce.weight.shape[-1]
    image = v.t().unflatten(1, grid)[None]
    return F.conv2d(image, mixer.lce.weight, mixer.lce.bias, padding=taps // 2, groups=DIM)[0].flatten(1).t()


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=1e-11)


def same_gradients(mixer, got, want, *inputs):
    weight = tensor(*got.shape, seed=9)
    tensors = [*inputs, *mixer.parameters()]
    ours = torch.autograd.grad((got * weight).sum(), tensors)
    theirs = torch.autograd.grad((want * weight).sum(), tensors, materialize_grads=True)
    for a, b in zip(ours, theirs, strict=True):
        close(a, b, 1e-11)


@pytest.mark.parametrize("length", [1, 5, 16, 23])
def test_all_regions_are_dense_attention_and_the_convolution(length):
    mixer = build(topk=99, scale="head")
    x = tensor(2, length, DIM)
    q, k, v = (p(x).unflatten(2, (4, -1)).transpose(1, 2) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    dense = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    close(mixer(x).y, mixer.out_proj(dense + torch.stack([lce(mixer, row) for row in x])))
    causal = build(topk=99, scale="head", causal=True, lce_kernel=0)
    q, k, v = (p(x).unflatten(2, (4, -1)).transpose(1, 2) for p in (causal.q_proj, causal.k_proj, causal.v_proj))
    dense = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
    close(causal(x).y, causal.out_proj(dense))


@pytest.mark.parametrize("backend", ["chunked", "naive"])
@pytest.mark.parametrize("shared_routing", [True, False])
@pytest.mark.parametrize(("length", "topk"), [(23, 2), (40, 3), (7, 1)])
def test_sequences_equal_sdpa_under_the_routed_mask(length, topk, shared_routing, backend):
    """Outputs and gradients: those of a fixed mask, so nothing flows through the routing."""
    mixer = build(topk=topk, shared_routing=shared_routing, backend=backend)
    x = tensor(1, length, DIM).requires_grad_()
    want = mixer.out_proj(by_mask(mixer, x[0], runs(length, 4)) + lce(mixer, x[0]))
    got = mixer(x).y[0]
    close(got, want)
    same_gradients(mixer, got, want, x)
    dense = build(topk=99, shared_routing=shared_routing, backend=backend)
    assert (dense(x).y[0] - got).abs().max() > 1e-3 or length <= 4 * topk


@pytest.mark.parametrize(("grid", "number"), [((6, 6), 3), ((7, 5), 3), ((4, 9), 7), ((1, 8), 2), ((3, 4), 1)])
def test_grids_equal_sdpa_under_the_routed_mask(grid, number):
    """Also where windows at the edge are partial: what lies beyond the edge neither counts nor is seen."""
    mixer = build(spatial=True, num_regions=number, topk=2)
    x = tensor(1, math.prod(grid), DIM).requires_grad_()
    want = mixer.out_proj(by_mask(mixer, x[0], windows(grid, number)) + lce(mixer, x[0], grid))
    got = mixer(x, grid=grid).y[0]
    close(got, want)
    same_gradients(mixer, got, want, x)


def test_pads_on_a_grid_stay_where_they_are_and_are_not_seen():
    grid, mixer = (6, 7), build(spatial=True, num_regions=3, topk=2)
    x = tensor(2, 42, DIM)
    mask = torch.rand(2, 42, generator=torch.Generator().manual_seed(2)) > 0.3
    mask[1, :14] = False
    mask[1, 21:28] = False
    y = mixer(torch.where(mask[..., None], x, 1e3), mask=mask, grid=grid).y
    for row in range(2):
        real = mask[row].tolist()
        inner = by_mask(mixer, x[row], windows(grid, 3), real=real) + lce(mixer, x[row], grid, real)
        close(y[row, mask[row]], mixer.out_proj(inner)[mask[row]])
    assert (y[~mask] == 0).all()


def test_a_video_has_regions_in_time_and_a_convolution_in_space():
    grid, mixer = (3, 4, 5), build(spatial=True, num_regions=2, topk=3, lce_kernel=3)
    x = tensor(1, 60, DIM)
    local = torch.cat([lce(mixer, frame, grid[1:]) for frame in x[0].split(20)])
    close(mixer(x, grid=grid).y[0], mixer.out_proj(by_mask(mixer, x[0], windows(grid, 2)) + local))


def test_a_sequence_given_to_a_spatial_mixer_is_one_line_of_an_image():
    mixer = build(spatial=True, topk=99)
    x = tensor(2, 9, DIM)
    mixer.num_regions = 1
    close(mixer(x).y, mixer(x, grid=(1, 9)).y)
    plain = build(topk=2)  # not spatial: a grid changes nothing
    assert torch.equal(plain(x, grid=(3, 3)).y, plain(x).y)


@pytest.mark.parametrize("shared_routing", [True, False])
@pytest.mark.parametrize("causal", [True, False])
def test_cross_routes_over_the_regions_of_the_context(causal, shared_routing):
    """causal-cross: every token by its own query, so that no other query matters."""
    mixer = build(cross=True, causal=causal, topk=2, shared_routing=shared_routing)
    x, context = tensor(1, 40, DIM).requires_grad_(), tensor(1, 19, DIM, seed=2).requires_grad_()
    regions = runs(40, 1 if causal else 4)
    want = mixer.out_proj(by_mask(mixer, x[0], regions, source=context[0], k_regions=runs(19, 4)))
    got = mixer(x, context).y[0]
    close(got, want)
    same_gradients(mixer, got, want, x, context)
    seen = torch.ones(1, 19, dtype=torch.bool)
    seen[0, [0, 5, 6, 7, 13]] = False  # pads do not count for regions either: 14 tokens are left
    want = by_mask(mixer, x[0], regions, source=context[0, seen[0]], k_regions=runs(14, 4))
    close(mixer(x, context, context_mask=seen).y[0], mixer.out_proj(want))


def causal_by_hand(mixer, x):
    """CausalBlockRouting token by token, with the causal convolution."""
    size, width = mixer.region_size, DIM // mixer.routing_heads
    q, k, v = mixer.q_proj(x), mixer.k_proj(x), mixer.v_proj(x)
    outputs = []
    for t in range(len(x)):
        own, parts = t // size, []
        for h in range(mixer.num_heads):
            lane = h if mixer.routing_heads > 1 else 0
            part = slice(lane * width, (lane + 1) * width)
            past = {b: k[b * size : (b + 1) * size, part].mean(0).detach() for b in range(own)}
            best = ranked({0: q[t, part].detach()}, past, mixer.topk - 1)[0]
            seen = [j for j in range(t + 1) if j // size in (*best, own)]
            head = slice(h * mixer.head_dim, (h + 1) * mixer.head_dim)
            weights = (mixer.scale * k[seen, head] @ q[t, head]).softmax(0)
            parts.append(weights @ v[seen, head])
        outputs.append(torch.cat(parts))
    y = torch.stack(outputs)
    if mixer.lce is not None:
        taps = mixer.lce.kernel_size
        y = y + F.conv1d(F.pad(v.t()[None], (taps - 1, 0)), mixer.lce.weight, mixer.lce.bias, groups=DIM)[0].t()
    return mixer.out_proj(y)


@pytest.mark.parametrize("shared_routing", [True, False])
@pytest.mark.parametrize(("length", "topk"), [(45, 3), (45, 1), (70, 2)])
def test_causal_equals_the_definition_token_by_token(length, topk, shared_routing):
    mixer = build(causal=True, topk=topk, shared_routing=shared_routing)
    x = tensor(1, length, DIM).requires_grad_()
    want, got = causal_by_hand(mixer, x[0]), mixer(x).y[0]
    close(got, want)
    same_gradients(mixer, got, want, x)


def test_later_tokens_do_not_move_the_routing_of_earlier_ones():
    """Keys of 1e3 times the size in later blocks, complete or not, would win every choice if they were scored."""
    mixer, x = build(causal=True, topk=2), tensor(2, 70, DIM)
    want = mixer(x).y
    for cut in (5, 8, 33, 64):
        loud = torch.cat((x[:, :cut], 1e3 * tensor(2, 70 - cut, DIM, seed=cut)), 1)
        assert torch.equal(mixer(loud).y[:, :cut], want[:, :cut])
    # The control: the same in a block of the past does move later outputs, by the choice too.
    loud = x.clone()
    loud[:, 8:12] *= 1e3
    assert torch.equal(mixer(loud).y[:, :8], want[:, :8])
    assert (mixer(loud).y[:, 40:] - want[:, 40:]).abs().amax((1, 2)).min() > 1e-3


def test_the_state_holds_keys_values_and_sums():
    mixer, x = build(causal=True, topk=2), tensor(2, 19, DIM)
    state = mixer(x[:, :11], state=mixer.init_state(2)).state
    state = mixer(x[:, 11:], state=state).state
    assert isinstance(state, BlockRoutingState)
    close(state.k.flatten(2), mixer.k_proj(x))
    close(state.sums[:, 1], mixer.k_proj(x)[:, 4:8].sum(1))
    close(state.sums[:, 4], mixer.k_proj(x)[:, 16:].sum(1))
    assert state.length.tolist() == [19, 19] and not state.sums.requires_grad
    # 2 L D for keys and values, 5 regions, 4 inputs of the convolution
    assert state_elements(state) == mixer.state_size(19) == (2 * 19 + 5 + 4) * DIM


def test_a_full_cache_and_a_foreign_state_are_refused():
    mixer, x = build(causal=True), tensor(2, 6, DIM)
    state = mixer(x, state=mixer.init_state(2, max_len=8)).state
    with pytest.raises(ValueError, match="6 tokens after 6 exceed max_len=8"):
        mixer(x, state=state)
    with pytest.raises(ValueError, match="BlockRoutingState"):
        mixer(x, state=create_mixer("softmax", DIM, causal=True).init_state(2))
    with pytest.raises(ValueError, match="3 rows"):
        mixer(x, state=mixer.init_state(3))


@pytest.mark.parametrize("routing", ["soft", "learned"])
def test_soft_routing_weighs_keys_and_values_by_affinity(routing):
    """w = softmax over the chosen regions of scale Q_r K_r; softmax(q (w k)) (w v), as in the published code."""
    mixer = build(topk=2, routing=routing, lce_kernel=0)
    x = tensor(1, 12, DIM).requires_grad_()
    q, k, v = (p(x[0]) for p in (mixer.q_proj, mixer.k_proj, mixer.v_proj))
    q_mean, k_mean = (t.unflatten(0, (3, 4)).mean(1) for t in (q, k))
    if routing == "soft":
        q_mean, k_mean = q_mean.detach(), k_mean.detach()
    affinity = mixer.scale * q_mean @ k_mean.t()
    outputs = []
    for region in range(3):
        best = affinity[region].topk(2).indices
        weight = affinity[region, best].softmax(0).repeat_interleave(4)[:, None]
        keys = [4 * int(b) + i for b in best for i in range(4)]
        heads = (q[4 * region : 4 * region + 4], weight * k[keys], weight * v[keys])
        qh, kh, vh = (t.unflatten(1, (4, -1)).transpose(0, 1) for t in heads)
        outputs.append(F.scaled_dot_product_attention(qh, kh, vh, scale=mixer.scale).transpose(0, 1).flatten(1))
    want, got = mixer.out_proj(torch.cat(outputs)), mixer(x).y[0]
    close(got, want)
    same_gradients(mixer, got, want, x)


def test_windows_split_and_join():
    cut = Windows((5, 7), (2, 3))
    assert cut.counts == (3, 3) and cut.tokens == 6 and not cut.whole
    x = torch.arange(1, 36).view(1, 35)
    split = cut.split(x)
    assert split.shape == (1, 54) and split[0, :6].tolist() == [1, 2, 3, 8, 9, 10]
    assert split[0, 12:18].tolist() == [7, 0, 0, 14, 0, 0]
    assert torch.equal(cut.join(split), x)


def test_start_counts_and_scale():
    mixer = create_mixer("bi_level_routing", 64)
    assert mixer.scale == 64**-0.5 and create_mixer("bi_level_routing", 64, scale="head").scale == 8**-0.5
    assert sum(p.numel() for p in mixer.parameters()) == 4 * (64 * 64 + 64) + 64 * 5 + 64
    assert sum(p.numel() for p in create_mixer("bi_level_routing", 64, spatial=True).parameters()) == 16640 + 26 * 64
    for layer in (mixer.q_proj, mixer.k_proj, mixer.v_proj, mixer.out_proj):
        assert abs(layer.weight.std() - 0.02) < 1e-3 and not layer.bias.any()
    assert create_mixer("bi_level_routing", 64, cross=True).lce is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_heads": 5}, "num_heads=5 does not divide dim=16; nearest that does: 4"),
        ({"topk": 0}, "topk=0"),
        ({"region_size": -1}, "region_size=-1"),
        ({"num_regions": 1.5}, "num_regions=1.5"),
        ({"routing": "sfot"}, "soft"),
        ({"scale": "heads"}, "head"),
        ({"scale": 0.0}, "scale=0.0"),
        ({"lce_kernel": 4}, "lce_kernel=4"),
        ({"proj_drop": 1.0}, "proj_drop=1.0"),
        ({"backend": "cuda"}, "chunked, naive"),
        ({"causal": True, "spatial": True}, "spatial=False"),
        ({"causal": True, "cross": True, "routing": "soft"}, "routing='hard'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        BiLevelRouting(DIM, **{"num_heads": 4, **options})


def test_bad_grids():
    mixer, x = build(spatial=True), tensor(1, 12, DIM)
    with pytest.raises(ValueError, match=r"grid=\(3, 5\) holds 15 tokens, x has 12"):
        mixer(x, grid=(3, 5))
    with pytest.raises(ValueError, match=r"grid=\(12,\)"):
        mixer(x, grid=(12,))
    with pytest.raises(ValueError, match="cu_seqlens"):
        mixer(x, grid=(3, 4), cu_seqlens=torch.tensor([0, 5, 12], dtype=torch.int32))
