"""Block, Backbone and SequenceModel over the registered mixers."""

import pytest
import torch
from torch import nn

from seqzoo.blocks.backbone import Backbone, token_positions
from seqzoo.blocks.parameters import parameter_groups
from seqzoo.blocks.registry import list_mixers
from seqzoo.blocks.sequence_model import SequenceModel


def run_in_pieces(
    backbone: Backbone, x: torch.Tensor, sizes: list[int], mask: torch.Tensor | None = None
) -> torch.Tensor:
    state = backbone.init_state(x.shape[0], dtype=x.dtype)
    outputs, start = [], 0
    for size in sizes:
        piece = slice(start, start + size)
        out = backbone(x[:, piece], mask=None if mask is None else mask[:, piece], state=state)
        state = out.state
        outputs.append(out.y)
        start += size
    return torch.cat(outputs, dim=1)


def small(mixer):
    """The mixer with heads that fit a width of 16."""
    return {"name": mixer, "head_dim": 8} if mixer == "mamba2" else mixer


@pytest.mark.parametrize("mixer", list_mixers(pattern="self"))
def test_every_mixer_fits_and_learns(mixer):
    backbone = Backbone(16, 2, mixer=small(mixer))
    x = torch.randn(2, 11, 16)
    out = backbone(x)
    assert out.y.shape == x.shape and out.state is None
    (out.y * torch.randn_like(out.y)).sum().backward()
    assert all(p.grad is not None for p in backbone.parameters())


@pytest.mark.parametrize("position", ["none", "learned", "sinusoidal"])
def test_hybrid_streams_as_the_whole(position):
    mixers = [small(mixer) for mixer in list_mixers(pattern="causal", streaming=True)]
    backbone = Backbone(
        16,
        len(mixers) + 1,
        mixer=mixers,
        ffn="swiglu",
        norm="rmsnorm",
        position=position,
        max_len=32,
        causal=True,
    ).double()
    backbone.eval()  # a codebook moves in training
    x = torch.randn(2, 13, 16, dtype=torch.float64)
    whole = backbone(x).y
    for sizes in ([13], [5, 1, 7], [1] * 13):
        torch.testing.assert_close(run_in_pieces(backbone, x, sizes), whole, rtol=1e-9, atol=1e-9)
    assert backbone.streaming


def test_left_padding_does_not_shift_positions():
    backbone = Backbone(16, 2, mixer="linear", position="sinusoidal", causal=True).double()
    x = torch.randn(1, 9, 16, dtype=torch.float64)
    padded = torch.cat((torch.full((1, 4, 16), 1e3, dtype=torch.float64), x), dim=1)
    mask = torch.arange(13).unsqueeze(0) >= 4
    torch.testing.assert_close(backbone(padded, mask=mask).y[:, 4:], backbone(x).y, rtol=1e-9, atol=1e-9)
    streamed = run_in_pieces(backbone, padded, [3, 4, 6], mask)
    torch.testing.assert_close(streamed[:, 4:], backbone(x).y, rtol=1e-9, atol=1e-9)


def test_positions_of_packed_rows_restart():
    bounds = torch.tensor([0, 3, 4, 8], dtype=torch.int32)
    positions = token_positions(1, 8, None, bounds, None, torch.device("cpu"))
    assert positions.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3]]
    offset = torch.tensor([10, 0, 5])
    assert token_positions(1, 8, None, bounds, offset, torch.device("cpu")).tolist() == [[10, 11, 12, 0, 5, 6, 7, 8]]


def test_packed_equals_separate():
    backbone = Backbone(16, 2, mixer=["softmax", "linear"], position="sinusoidal", causal=True).double()
    pieces = [torch.randn(1, n, 16, dtype=torch.float64) for n in (5, 1, 4)]
    bounds = torch.tensor([0, 5, 6, 10], dtype=torch.int32)
    packed = backbone(torch.cat(pieces, dim=1), cu_seqlens=bounds).y
    separate = torch.cat([backbone(p).y for p in pieces], dim=1)
    torch.testing.assert_close(packed, separate, rtol=1e-9, atol=1e-9)


def test_gradient_checkpointing_changes_nothing():
    backbone = Backbone(16, 3, mixer="softmax").double()
    x = torch.randn(2, 7, 16, dtype=torch.float64)
    weight = torch.randn_like(x)
    grads = []
    for enable in (False, True):
        backbone.set_grad_checkpointing(enable)
        backbone.zero_grad()
        (backbone(x).y * weight).sum().backward()
        grads.append([p.grad.clone() for p in backbone.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_intermediates_end_in_the_output():
    backbone = Backbone(16, 3, mixer="linear", final_norm=False)
    x = torch.randn(1, 5, 16)
    out, features = backbone.forward_intermediates(x, indices=[0, -1])
    torch.testing.assert_close(features[-1], out.y)
    assert len(features) == 2
    with pytest.raises(ValueError, match=r"contains 3.*3 blocks"):
        backbone.forward_intermediates(x, indices=[3])


def test_state_size_is_the_sum_of_the_mixers():
    backbone = Backbone(16, 2, mixer=["softmax", "linear"], causal=True)
    assert backbone.state_size(10) == sum(b.mixer.state_size(10) for b in backbone.blocks)


def test_cross_mixer_reads_the_context_and_stays_causal():
    backbone = Backbone(16, 2, mixer="softmax", cross_mixer="softmax", causal=True).double()
    x, context = torch.randn(1, 6, 16, dtype=torch.float64), torch.randn(1, 4, 16, dtype=torch.float64)
    y = backbone(x, context).y
    changed = x.clone()
    changed[:, 4:] += 1e3
    assert torch.equal(backbone(changed, context).y[:, :4], y[:, :4])
    assert not torch.allclose(backbone(x, context + 1).y[:, 0], y[:, 0])


def test_norms_may_come_after_the_sums():
    backbone = Backbone(16, 1, mixer="softmax", cross_mixer="softmax", prenorm=False, final_norm=False).double().eval()
    (block,) = backbone.blocks
    x, context = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 4, 16, dtype=torch.float64)
    want = block.norm_mixer(x + block.mixer(x).y)
    want = block.norm_cross(want + block.cross_mixer(want, context).y)
    want = block.norm_ffn(want + block.ffn(want))
    torch.testing.assert_close(backbone(x, context).y, want)


def test_gated_mixers_are_given_the_residual():
    """x before its norm, to the mixer and to the cross mixer."""
    backbone = Backbone(16, 1, mixer="mega", cross_mixer="mega", ffn="none", final_norm=False).double().eval()
    (block,) = backbone.blocks
    x, context = 5 + torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 4, 16, dtype=torch.float64)
    want = x + block.mixer(block.norm_mixer(x), residual=x).y
    want = want + block.cross_mixer(block.norm_cross(want), context, residual=want).y
    torch.testing.assert_close(backbone(x, context).y, want)


def test_batch_norms_do_not_count_pads():
    backbone = Backbone(16, 2, mixer="linear", norm="batchnorm").double()
    rows = [torch.randn(n, 16, dtype=torch.float64) for n in (9, 4)]
    x, mask = torch.full((2, 11, 16), 1e3, dtype=torch.float64), torch.zeros(2, 11, dtype=torch.bool)
    for i, row in enumerate(rows):
        x[i, : len(row)], mask[i, : len(row)] = row, True
    packed = backbone(torch.cat(rows)[None], cu_seqlens=torch.tensor([0, 9, 13], dtype=torch.int32)).y[0]
    torch.testing.assert_close(backbone(x, mask=mask).y[mask], packed)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mixer": "softmx"}, "Did you mean softmax"),
        ({"mixer": {"name": "softmax", "num_head": 2}}, "num_heads"),
        ({"mixer": []}, "empty list"),
        ({"mixer": ["linear"] * 3}, "depth=2"),
        ({"mixer": "prob_sparse", "causal": True}, "mixers that do: .*linear"),
        ({"ffn": "glu"}, "swiglu"),
        ({"norm": "layernorn"}, "layernorm"),
        ({"norm": "batchnorm", "causal": True}, "later tokens"),
        ({"position": "rotary"}, "sinusoidal"),
    ],
)
def test_bad_options_name_the_valid_ones(options, message):
    with pytest.raises(ValueError, match=message):
        Backbone(16, 2, **options)


def test_sequence_model_joins_the_parts():
    model = SequenceModel(nn.Linear(3, 16), Backbone(16, 1, mixer="linear", causal=True), nn.Linear(16, 5))
    x = torch.randn(2, 7, 3)
    assert model(x).y.shape == (2, 7, 5)
    state = model.init_state(2)
    first = model(x[:, :4], state=state)
    second = model(x[:, 4:], state=first.state)
    torch.testing.assert_close(torch.cat((first.y, second.y), dim=1), model(x).y, rtol=1e-5, atol=1e-5)


def test_sequence_model_refuses_parts_of_another_width():
    embedding = nn.Linear(3, 8)
    embedding.dim = 8
    with pytest.raises(ValueError, match="embedding has dim=8"):
        SequenceModel(embedding, Backbone(16, 1, mixer="linear"))


def test_parallel_branches_read_the_same_input():
    """x + mixer(norm(x)) + ffn(norm'(x)), whole and in pieces."""
    backbone = Backbone(16, 1, mixer="softmax", causal=True, parallel=True, final_norm=False).double().eval()
    (block,) = backbone.blocks
    x = torch.randn(2, 6, 16, dtype=torch.float64)
    nn.init.normal_(block.norm_ffn.weight)
    want = x + block.mixer(block.norm_mixer(x)).y + block.ffn(block.norm_ffn(x))
    torch.testing.assert_close(backbone(x).y, want)
    torch.testing.assert_close(run_in_pieces(backbone, x, [3, 1, 2]), want)
    for wrong in ({"prenorm": False}, {"ffn": "none"}, {"cross_mixer": "softmax"}):
        with pytest.raises(ValueError, match="parallel=True needs"):
            Backbone(16, 1, parallel=True, **wrong)


def test_layer_scale_multiplies_every_branch():
    options = {"mixer": "softmax", "cross_mixer": "softmax", "final_norm": False}
    backbone = Backbone(16, 1, layer_scale=0.25, **options).double().eval()
    (block,) = backbone.blocks
    gains = [block.scale_mixer, block.scale_cross, block.scale_ffn]
    assert all(g.shape == (16,) and bool((g == 0.25).all()) for g in gains)
    for gain in gains:
        nn.init.normal_(gain)
    x, context = torch.randn(2, 6, 16, dtype=torch.float64), torch.randn(2, 4, 16, dtype=torch.float64)
    want = x + block.mixer(block.norm_mixer(x)).y * gains[0]
    want = want + block.cross_mixer(block.norm_cross(want), context).y * gains[1]
    want = want + block.ffn(block.norm_ffn(want)) * gains[2]
    torch.testing.assert_close(backbone(x, context).y, want)
    groups = parameter_groups(backbone, lr=1.0, weight_decay=0.5)
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    assert not decayed & {id(gain) for gain in gains}
    assert not any("scale" in name for name in Backbone(16, 1, **options).state_dict())


def test_a_feed_forward_may_have_options():
    backbone = Backbone(16, 1, ffn={"name": "swiglu", "bias": True, "mlp_ratio": 2.0})
    assert backbone.blocks[0].ffn.up_proj.bias.shape == (32,)
