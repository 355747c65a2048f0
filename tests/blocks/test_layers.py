"""Norms and feed-forward layers against their formulas and torch's own layers."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from seqzoo.blocks.layers.ffn import GeluMLP, SiluMLP, SwiGLU, create_ffn
from seqzoo.blocks.layers.norm import BatchNorm, LayerNorm, RMSNorm, ScaleNorm, SimpleRMSNorm, create_norm
from seqzoo.blocks.layers.rows import lay_out, packed_groups, rank_order, take


def moved(module):
    """Parameters away from the ones and zeros they start from."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def test_layer_norm_is_torchs():
    norm, theirs = moved(LayerNorm(12, eps=1e-3)), nn.LayerNorm(12, eps=1e-3)
    theirs.load_state_dict(norm.state_dict())
    x = torch.randn(2, 5, 12) * 3 + 1
    torch.testing.assert_close(norm(x), theirs(x))


def test_rms_norm_is_its_formula():
    norm = moved(RMSNorm(12, eps=1e-2).double())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    want = x / ((x**2).mean(-1, keepdim=True) + 1e-2).sqrt()
    torch.testing.assert_close(norm(x), want * norm.weight, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(SimpleRMSNorm(12, eps=1e-2)(x), want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", [LayerNorm, RMSNorm, SimpleRMSNorm])
def test_norms_keep_the_dtype_and_take_statistics_in_float32(kind):
    norm = kind(64)
    x = (torch.randn(3, 64) * 100 + 1000).bfloat16()
    y = norm(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - norm(x.float())).abs().max() < 2e-2
    assert norm.bfloat16()(x).dtype == torch.bfloat16


def test_scale_norm_is_its_formula():
    norm = moved(ScaleNorm(12, eps=1e-2).double())
    assert norm.weight.shape == (1,)
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    want = norm.weight * x / ((x**2).mean(-1, keepdim=True) + 1e-2).sqrt()
    torch.testing.assert_close(norm(x), want, rtol=1e-12, atol=1e-12)


def test_batch_norm_is_torchs_over_the_real_tokens():
    """In training, then in eval with the running statistics; pads count in neither and come out as 0."""
    norm, theirs = moved(BatchNorm(6).double()), nn.BatchNorm1d(6).double()
    theirs.load_state_dict(norm.norm.state_dict())
    x = torch.randn(3, 7, 6, dtype=torch.float64) * 3 + 1
    mask = torch.rand(3, 7) > 0.4
    for mode in (True, False):
        norm.train(mode), theirs.train(mode)
        torch.testing.assert_close(norm(x), theirs(x.transpose(1, 2)).transpose(1, 2), rtol=1e-12, atol=1e-12)
        y = norm(torch.where(mask[..., None], x, 1e6), mask)
        torch.testing.assert_close(y[mask], theirs(x[mask]), rtol=1e-12, atol=1e-12)
        assert not y[~mask].any()
        assert not norm(x, torch.zeros_like(mask)).any()
    torch.testing.assert_close(norm.norm.running_var, theirs.running_var)
    assert isinstance(nn.SyncBatchNorm.convert_sync_batchnorm(norm).norm, nn.SyncBatchNorm)


def test_create_norm():
    assert isinstance(create_norm("layernorm", 8), LayerNorm)
    assert create_norm("rmsnorm", 8).eps == 1e-6
    assert create_norm("rmsnorm", 8, eps=1e-3).eps == 1e-3
    assert isinstance(create_norm(nn.LayerNorm, 8), nn.LayerNorm)
    with pytest.raises(ValueError, match=r"layernrm.*layernorm"):
        create_norm("layernrm", 8)


def test_gelu_mlp_is_its_formula():
    layer = moved(GeluMLP(6, mlp_ratio=2.5).double())
    assert layer.up_proj.out_features == 15
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    h = x @ layer.up_proj.weight.T + layer.up_proj.bias
    h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    want = h @ layer.down_proj.weight.T + layer.down_proj.bias
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_silu_mlp_is_its_formula():
    layer = SiluMLP(64, drop=0.25, hidden_drop=0.5)
    assert layer.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.1) and not layer.up_proj.bias.any()
    assert (layer.drop.p, layer.hidden_drop.p, SiluMLP(4, drop=0.25).hidden_drop.p) == (0.25, 0.5, 0.25)
    layer = moved(SiluMLP(6).double())
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    h = x @ layer.up_proj.weight.T + layer.up_proj.bias
    want = (h / (1 + torch.exp(-h))) @ layer.down_proj.weight.T + layer.down_proj.bias
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_swiglu_is_its_formula():
    layer = moved(SwiGLU(6, bias=True).double())
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    gate, up = layer.gate_proj(x), layer.up_proj(x)
    want = F.linear(gate * torch.sigmoid(gate) * up, layer.down_proj.weight, layer.down_proj.bias)
    torch.testing.assert_close(layer(x), want, rtol=1e-12, atol=1e-12)


def test_widths():
    assert SwiGLU(4096, multiple_of=256).up_proj.out_features == 11008  # Llama 7B
    # A product a hair under the integer keeps its channel.
    assert [SwiGLU(3 * n).up_proj.out_features for n in range(1, 200)] == [8 * n for n in range(1, 200)]
    for bad in ({"mlp_ratio": 0.0}, {"multiple_of": 0}):
        with pytest.raises(ValueError, match=next(iter(bad))):
            SwiGLU(8, **bad)


@pytest.mark.parametrize("name", ["gelu", "swiglu"])
def test_dropout_works_in_training_only(name):
    layer, x = create_ffn(name, 64, drop=0.5), torch.randn(1, 8, 64)
    assert (layer(x) == 0).float().mean() > 0.3
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_create_ffn():
    assert create_ffn("none", 8) is None
    assert create_ffn(None, 8) is None
    assert create_ffn("gelu", 8).up_proj.out_features == 32
    assert create_ffn("swiglu", 8, mlp_ratio=2).up_proj.out_features == 16
    assert isinstance(create_ffn(GeluMLP, 8), GeluMLP)
    with pytest.raises(ValueError, match=r"swigl.*swiglu"):
        create_ffn("swigl", 8)


def test_a_feed_forward_of_a_dict_has_options():
    assert create_ffn({"name": "none"}, 8) is None
    layer = create_ffn({"name": "gelu", "bias": False, "approximate": "tanh"}, 8, mlp_ratio=2, drop=0.3)
    assert layer.up_proj.bias is None and layer.up_proj.out_features == 16 and layer.drop.p == 0.3
    x = torch.randn(3, 8)
    hidden = layer.up_proj(x)
    cubic = 0.5 * hidden * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (hidden + 0.044715 * hidden**3)))
    torch.testing.assert_close(layer.eval()(x), cubic @ layer.down_proj.weight.T)
    assert not torch.allclose(layer(x), F.gelu(hidden) @ layer.down_proj.weight.T, atol=1e-6)
    for wrong, message in (({"name": "gelu", "bia": 1}, "bias"), ({"bias": True}, "needs the key 'name'")):
        with pytest.raises(ValueError, match=message):
            create_ffn(wrong, 8)
    with pytest.raises(ValueError, match="approximate='tan'"):
        create_ffn({"name": "gelu", "approximate": "tan"}, 8)


def test_real_tokens_come_first_and_go_back():
    mask = torch.tensor([[False, True, True, False, True], [False] * 5, [True] * 5])
    x = torch.arange(5).expand(3, -1)
    order, back, number = rank_order(mask)
    assert number.tolist() == [3, 0, 5]
    assert take(x, order)[0, :3].tolist() == [1, 2, 4]
    assert torch.equal(take(take(x, order), back), x)


def test_packed_groups_pad_little_and_miss_nothing():
    lengths = torch.tensor([1000, *[3, 5, 8, 0, 13] * 30])
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)))
    total = int(lengths.sum())
    groups = list(packed_groups(bounds, total, together=False))
    places = torch.cat([place[valid] for place, valid in groups])
    assert torch.equal(places.sort().values, torch.arange(total))
    assert sum(valid.numel() for _, valid in groups) < 2 * total
    ((place, valid),) = packed_groups(bounds, total, together=True)
    assert torch.equal(valid.sum(1), lengths)
    assert all(torch.equal(p[v].diff(), torch.ones_like(p[v][1:])) for p, v in zip(place, valid, strict=True))


def test_rows_are_reversed_within_their_tokens():
    """Padded anywhere or packed: place, reverse, restore is each row's own tokens backwards."""
    x = torch.arange(1.0, 13).view(2, 6, 1)
    assert torch.equal(lay_out(None, None, 6).reverse(x), x.flip(1))
    mask = torch.tensor([[False, True, True, False, True, True], [False] * 6])
    layout = lay_out(mask, None, 6)
    y = layout.restore(layout.reverse(layout.place(x)))
    assert y[0, :, 0].tolist() == [0, 6, 5, 0, 3, 2] and not y[1].any()
    layout = lay_out(None, torch.tensor([0, 2, 2, 6], dtype=torch.int32), 6)
    assert layout.restore(layout.reverse(layout.place(x[:1])))[0, :, 0].tolist() == [2, 1, 6, 5, 4, 3]
