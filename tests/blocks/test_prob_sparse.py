"""The ProbSparse mixer: presets, masked mode, padding, packing, determinism."""

import pytest
import torch
from torch.nn import functional as F

from seqzoo.blocks.mixers.prob_sparse import ProbSparseAttention
from seqzoo.blocks.registry import create_mixer

torch.set_num_threads(1)


def build(dim=16, *, train=False, **options):
    torch.manual_seed(0)
    return ProbSparseAttention(dim, dtype=torch.float64, **options).train(train)


def sequence(batch, length, dim=16, seed=1):
    return torch.randn(batch, length, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def heads(mixer, x, source):
    for projection, t in ((mixer.q_proj, x), (mixer.k_proj, source), (mixer.v_proj, source)):
        yield projection(t).unflatten(-1, (mixer.num_heads, mixer.head_dim)).transpose(1, 2)


@pytest.mark.parametrize("sampling", ["query", "block"])
@pytest.mark.parametrize("masked", [False, True])
def test_with_every_query_kept_it_is_multi_head_attention(sampling, masked):
    mixer = build(num_heads=4, factor=100, sampling=sampling, masked=masked)
    x = sequence(2, 140)
    y = F.scaled_dot_product_attention(*heads(mixer, x, x), is_causal=masked)
    torch.testing.assert_close(mixer(x).y, mixer.out_proj(y.transpose(1, 2).flatten(2)), atol=1e-12, rtol=0)


def test_cross_with_every_query_kept_is_cross_attention():
    mixer = build(num_heads=2, head_dim=3, factor=100, cross=True)
    x, context = sequence(2, 30), sequence(2, 45, seed=2)
    real = torch.rand(2, 45, generator=torch.Generator().manual_seed(3)) < 0.7
    y = F.scaled_dot_product_attention(*heads(mixer, x, context), attn_mask=real[:, None, None])
    torch.testing.assert_close(
        mixer(x, context, context_mask=real).y,
        mixer.out_proj(y.transpose(1, 2).flatten(2)),
        atol=1e-12,
        rtol=0,
    )


def test_original_mix_is_the_published_layout():
    """Published: (B, L, H, K) is transposed to (B, H, L, K) and viewed as (B, L, H * K)."""
    mixed, plain = (
        build(num_heads=4, masked=True, preset="original"),
        build(num_heads=4, masked=True, preset="original", mix=False),
    )
    mixed.out_proj = plain.out_proj = torch.nn.Identity()
    x = sequence(2, 50)
    y = plain(x).y.view(2, 50, 4, 4)
    torch.testing.assert_close(mixed(x).y, y.transpose(2, 1).contiguous().view(2, 50, -1))
    assert not torch.equal(mixed(x).y, plain(x).y)


def test_presets_differ_as_documented():
    clean, original = build(), build(preset="original")
    assert (clean.divisor, clean.lazy, clean.mix) == ("samples", "mean", False)
    assert (original.divisor, original.lazy, original.mix) == ("keys", "sum", False)
    assert build(preset="original", masked=True).mix and not build(masked=True).mix
    x = sequence(1, 80)
    # The last lazy row of the clean masked mode is the mean of V, of the original one the sum.
    for preset, scale in (("clean", 80), ("original", 1)):
        mixer = build(preset=preset, masked=True, mix=False, factor=1, num_heads=16)
        mixer.out_proj = torch.nn.Identity()
        total = mixer.v_proj(x).sum(1) / scale
        agree = (mixer(x).y[:, -1] - total).abs() < 1e-10
        assert agree.sum() >= 8  # heads of width one: those in which the last query was not selected


@pytest.mark.parametrize("name", ProbSparseAttention.variants)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_is_as_if_absent(name, side):
    options = {**ProbSparseAttention.variants[name], "factor": 1}
    mixer = build(**options)
    x = sequence(3, 40)
    context = sequence(3, 50, seed=2) if mixer.cross else None
    counts = (40, 23, 9)
    place = torch.arange(40)
    mask = torch.stack([(place < n) if side == "right" else (place >= 40 - n) for n in counts])
    context_mask = None if context is None else torch.arange(50) < torch.tensor([[50], [31], [20]])
    y = mixer(x, context, mask=mask, context_mask=context_mask).y
    for row in range(3):
        other = None if context is None else context[row : row + 1, context_mask[row]]
        alone = mixer(x[row : row + 1, mask[row]], other).y
        torch.testing.assert_close(y[row : row + 1, mask[row]], alone, atol=1e-12, rtol=0)
    assert (y[~mask] == 0).all()


@pytest.mark.parametrize("options", [{}, {"sampling": "block"}, {"masked": True, "preset": "original"}])
def test_packed_is_separate(options):
    mixer = build(factor=1, **options)
    x = sequence(1, 60)
    y = mixer(x, cu_seqlens=torch.tensor([0, 25, 26, 60], dtype=torch.int32)).y
    parts = [mixer(x[:, a:b]).y for a, b in ((0, 25), (25, 26), (26, 60))]
    torch.testing.assert_close(y, torch.cat(parts, 1), atol=1e-12, rtol=0)


def test_eval_is_deterministic_and_training_draws_anew():
    x = sequence(2, 200)
    mixer = build(factor=1)
    state = torch.get_rng_state()
    assert torch.equal(mixer(x).y, mixer(x).y)
    assert torch.equal(state, torch.get_rng_state())  # evaluation leaves the global generator alone
    other = build(factor=1, seed=1)
    assert not torch.equal(mixer(x).y, other(x).y)
    mixer.train()
    torch.manual_seed(5)
    first, second = mixer(x).y, mixer(x).y
    assert not torch.equal(first, second)
    torch.manual_seed(5)
    assert torch.equal(first, mixer(x).y)


def test_parameter_count_and_gradients():
    mixer = build(factor=1, train=True)
    assert sum(p.numel() for p in mixer.parameters()) == 4 * (16 * 16 + 16)
    mixer(sequence(2, 50)).y.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for n, p in mixer.named_parameters() if n != "k_proj.bias")


def test_the_selection_is_not_causal_and_the_causal_pattern_is_refused():
    """Why: in the masked mode a later token changes an earlier output, through the selection."""
    mixer = build(factor=1, masked=True)
    x = sequence(1, 60)
    changed = x.clone()
    changed[:, 40:] *= 10
    assert not torch.equal(mixer(x).y[:, :40], mixer(changed).y[:, :40])
    for pattern in ({"causal": True}, {"causal": True, "cross": True}):
        with pytest.raises(ValueError, match="ProbSparseAttention does not support the pattern 'causal"):
            create_mixer("prob_sparse", 16, **pattern)
    with pytest.raises(ValueError, match="carries no state"):
        mixer.init_state(1)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"num_heads": 3}, "num_heads=3"),
        ({"head_dim": 0}, "head_dim=0"),
        ({"preset": "orignal"}, "original"),
        ({"sampling": "blocks"}, "block"),
        ({"factor": 0}, "factor=0"),
        ({"mix": True}, "mix=True"),
        ({"masked": True, "cross": True}, "masked=True"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        ProbSparseAttention(16, **options)


def test_bf16_autocast():
    mixer = ProbSparseAttention(16, factor=100)
    x = sequence(2, 40).float()
    with torch.autocast("cpu", torch.bfloat16):
        y = mixer(x).y
    torch.testing.assert_close(y.float(), mixer(x).y, atol=2e-2, rtol=2e-2)
