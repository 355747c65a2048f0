"""Position schemes: algebraic properties, published values, and transformers' implementations."""

import math

import pytest
import torch

from seqzoo.blocks.layers.positions import (
    LearnedPosition,
    SinusoidalPosition,
    T5RelativeBias,
    alibi_bias,
    alibi_slopes,
    check_rope_scaling,
    create_position,
    rope,
    rotary_angles,
)

F64 = torch.float64


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary_dim", [None, 6])
def test_rope_scores_depend_on_the_distance_only(interleaved, rotary_dim):
    q, k = torch.randn(2, 1, 1, 1, 10, dtype=F64)

    def score(m, n):
        options = {"rotary_dim": rotary_dim, "interleaved": interleaved, "base": 100.0}
        turned = [rope(t, torch.tensor([[p]]), **options) for t, p in ((q, m), (k, n))]
        return (turned[0] * turned[1]).sum().item()

    assert score(7, 3) == pytest.approx(score(1007, 1003), abs=1e-9)
    assert abs(score(7, 3) - score(7, 4)) > 1e-3


@pytest.mark.parametrize("interleaved", [False, True])
def test_rope_is_a_rotation(interleaved):
    x, positions = torch.randn(2, 9, 3, 8, dtype=F64), torch.arange(9)[None]
    y = rope(x, positions, interleaved=interleaved)
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y[:, 0], x[:, 0])
    assert (y[:, 1] - x[:, 1]).abs().max() > 0.1
    partial = rope(x, positions, rotary_dim=4, interleaved=interleaved)
    assert torch.equal(partial[..., 4:], x[..., 4:])
    torch.testing.assert_close(partial[..., :4], rope(x[..., :4], positions, interleaved=interleaved))


def test_rope_layouts_are_a_permutation_of_each_other():
    x, positions = torch.randn(2, 9, 3, 8, dtype=F64), torch.randint(0, 1000, (2, 9))
    halves_first = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])  # pair (2i, 2i+1) becomes (i, i + 4)
    want = rope(x, positions, interleaved=True)[..., halves_first]
    torch.testing.assert_close(rope(x[..., halves_first], positions), want, rtol=1e-12, atol=1e-12)


def test_rope_angles_are_float32_in_bfloat16():
    x, position = torch.randn(1, 1, 1, 8), torch.tensor([[1001]])  # 1001 is not a bfloat16 number
    y = rope(x.bfloat16(), position)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), rope(x.bfloat16().float(), position), rtol=1e-2, atol=1e-2)


def test_rope_is_llamas():
    pytest.importorskip("transformers")
    from transformers.models.llama.configuration_llama import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

    config = LlamaConfig(hidden_size=64, num_attention_heads=4, max_position_embeddings=4096)
    q, k = torch.randn(2, 11, 4, 16), torch.randn(2, 11, 2, 16)
    positions = torch.randint(0, 4000, (2, 11))
    cos, sin = LlamaRotaryEmbedding(config)(q, positions)
    theirs = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    for ours, other in zip((rope(q, positions), rope(k, positions)), theirs, strict=True):
        torch.testing.assert_close(ours, other.transpose(1, 2), rtol=1e-5, atol=1e-5)


def test_scaled_frequencies_are_llamas():
    """Of every third length, from waves that turn often to waves that hardly turn, against the public code."""
    transformers = pytest.importorskip("transformers")
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    numbers = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    for base, length in ((10000.0, 8192), (500000.0, 8192), (100.0, 64)):
        for kind in ("linear", "llama3"):
            given = {"rope_type": kind, "rope_theta": base, **numbers, "original_max_position_embeddings": length}
            config = transformers.LlamaConfig(hidden_size=128, num_attention_heads=2, rope_parameters=given)
            want = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"))[0]
            scaling = {"kind": kind, "factor": 8.0}
            if kind == "llama3":
                scaling |= {"low": 1.0, "high": 4.0, "length": length}
            got = rotary_angles(torch.tensor([1]), 64, 64, base, torch.float32, scaling)[0]
            torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
            plain = rotary_angles(torch.tensor([1]), 64, 64, base, torch.float32)[0]
            kept = got / plain
            assert kept[-1].item() == pytest.approx(1 / 8) and (kind == "linear" or kept[0].item() == 1.0)


def test_interpolated_positions_are_positions_over_the_factor():
    x = torch.randn(1, 5, 2, 8, dtype=torch.float64)
    positions = torch.arange(0, 15, 3).unsqueeze(0)
    got = rope(x, positions, scaling={"kind": "linear", "factor": 3.0})
    torch.testing.assert_close(got, rope(x, positions // 3), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("scaling", "message"),
    [
        ({"kind": "yarn"}, "'yarn' is unknown.*linear, llama3"),
        ("linear", "'linear' is unknown"),
        ({"kind": "linear", "factr": 2.0}, "no use for 'factr'.*factor"),
        ({"kind": "linear", "factor": 0}, "factor=0, which must be a positive number"),
        ({"kind": "llama3", "low": 4.0}, r"low=4.0, which must be below high=4\.0"),
    ],
)
def test_wrong_scalings_are_refused(scaling, message):
    with pytest.raises(ValueError, match=message):
        check_rope_scaling(scaling)


@pytest.mark.parametrize(("rotary_dim", "nearest"), [(5, 4), (0, 2), (12, 8)])
def test_rope_refuses_a_bad_width(rotary_dim, nearest):
    with pytest.raises(ValueError, match=rf"rotary_dim={rotary_dim}.*nearest: {nearest}"):
        rope(torch.zeros(1, 1, 1, 8), torch.zeros(1, 1, dtype=torch.int64), rotary_dim=rotary_dim)


def test_alibi_slopes():
    assert alibi_slopes(8).tolist() == [2.0**-h for h in range(1, 9)]
    assert alibi_slopes(4).tolist() == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    # The paper's appendix for 12 heads: those of 8, then every other one of 16.
    want = [2.0**-h for h in range(1, 9)] + [2.0**-0.5, 2.0**-1.5, 2.0**-2.5, 2.0**-3.5]
    torch.testing.assert_close(alibi_slopes(12), torch.tensor(want))
    assert alibi_slopes(1).tolist() == [2.0**-8]
    assert len(alibi_slopes(7)) == 7


def test_alibi_slopes_and_bias_are_blooms():
    pytest.importorskip("transformers")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor

    for heads in (4, 6, 12):
        theirs = build_alibi_tensor(torch.ones(1, 5, dtype=torch.int64), heads, torch.float32)
        theirs = theirs.view(1, heads, 1, 5)  # slope * j: the row's constant is dropped by the softmax
        place = torch.arange(5)[None]
        ours = alibi_bias(place, place, heads, causal=True)
        causal = torch.ones(5, 5, dtype=torch.bool).tril()
        for bias in (ours - theirs).unbind(1):
            rows = [row[seen] for row, seen in zip(bias[0], causal, strict=True)]
            assert all((row - row[0]).abs().max() < 1e-6 for row in rows)


def test_alibi_bias_by_hand():
    bias = alibi_bias(torch.tensor([[3]]), torch.tensor([[0, 3, 5]]), 2, causal=False)
    assert bias.shape == (1, 2, 1, 3)
    assert bias[0, :, 0].tolist() == [[-3 / 16, 0, -2 / 16], [-3 / 256, 0, -2 / 256]]
    assert alibi_bias(torch.tensor([[3]]), torch.tensor([[0, 3, 5]]), 2, causal=True)[0, 0, 0, 2] == 0


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (16, 50), (8, 20)])
def test_t5_buckets_are_t5s(causal, num_buckets, max_distance):
    pytest.importorskip("transformers")
    from transformers.models.t5.modeling_t5 import T5Attention

    q, k = torch.arange(300)[None], torch.arange(300)[None]
    ours = T5RelativeBias(2, num_buckets, max_distance, causal).buckets(q, k)
    theirs = T5Attention._relative_position_bucket(k[:, None, :] - q[:, :, None], not causal, num_buckets, max_distance)
    assert torch.equal(ours, theirs)


def test_t5_bias_reads_the_table_per_head():
    layer = T5RelativeBias(3, 8, 20, causal=True)
    bias = layer(torch.tensor([[5]]), torch.tensor([[5, 3, 4]]))
    assert bias.shape == (1, 3, 1, 3)
    assert torch.equal(bias[0, :, 0], layer.table.weight[[0, 2, 1]].T)
    for bad in ((7, 20, True), (6, 20, False), (8, 4, True)):
        with pytest.raises(ValueError, match=r"num_buckets|max_distance"):
            T5RelativeBias(3, *bad)


@pytest.mark.parametrize("dim", [6, 5])
def test_sinusoidal_is_its_formula(dim):
    positions = torch.tensor([[0, 1, 50], [7, 7, 1000]])
    y = SinusoidalPosition(dim)(positions, dtype=F64)
    for b in range(2):
        for t in range(3):
            for c in range(dim):
                angle = int(positions[b, t]) / 10000 ** ((c - c % 2) / dim)
                want = math.cos(angle) if c % 2 else math.sin(angle)
                assert y[b, t, c].item() == pytest.approx(want, abs=1e-12)
    assert SinusoidalPosition(dim)(positions).dtype == torch.float32


def test_learned_positions():
    layer = LearnedPosition(4, 10)
    assert torch.equal(layer(torch.tensor([[3, 9, -1]]))[0], layer.table.weight[[3, 9, 0]])
    with pytest.raises(ValueError, match="position 10 is beyond max_len=10"):
        layer(torch.tensor([[10]]))


def test_create_position():
    assert create_position("none", 8) is None
    assert isinstance(create_position("sinusoidal", 8), SinusoidalPosition)
    assert create_position("learned", 8, max_len=5).max_len == 5
    with pytest.raises(ValueError, match="max_len"):
        create_position("learned", 8)
    with pytest.raises(ValueError, match="sinusoidal"):
        create_position("sinusoid", 8)
