"""BiFormer: the published parameter counts, shapes, gradients, any size of image, saving."""

import pytest
import torch

from seqzoo.zoo import create_model, list_models, load_model, save_model
from seqzoo.zoo.bi_former import BiFormer

torch.set_num_threads(1)
SMALL = {"dims": [16, 32], "depths": [1, 1], "topks": [2, 0], "head_dim": 8, "num_regions": 3, "num_classes": 5}


# The published 13.1, 25.5 and 56.8 million, to the last one as the authors' code builds them.
@pytest.mark.parametrize(("size", "number"), [("tiny", 13_142_760), ("small", 25_536_232), ("base", 56_804_968)])
def test_published_number_of_parameters(size, number):
    with torch.device("meta"):
        model = create_model(f"bi_former_{size}")
    assert sum(p.numel() for p in model.parameters()) == number
    assert f"bi_former_{size}" in list_models(task="image")


@pytest.mark.parametrize("size", [(64, 64), (50, 75)])
def test_every_parameter_learns_from_images_of_any_size(size):
    torch.manual_seed(0)
    model = create_model("bi_former_tiny", **SMALL, drop_path=0.2)
    logits = model(torch.randn(4, 3, *size))
    assert logits.shape == (4, 5)
    (logits * torch.randn_like(logits)).sum().backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_first_stage_routes_and_the_last_attends_to_all():
    """With one routed region of nine a far token is out of reach of the attention; not so in full attention."""
    torch.manual_seed(0)
    model = create_model("bi_former_tiny", **SMALL).double().eval()
    routed, full = model.stages[0][5], model.stages[1][2]
    assert routed.mixer.topk == 2 and routed.mixer.scale == 16**-0.5 and routed.mixer.num_heads == 2
    x = torch.randn(1, 12 * 12, 32, dtype=torch.float64, requires_grad=True)
    y = full.mixer(x, (12, 12))
    (gradient,) = torch.autograd.grad(y[0, 0].sum(), x)
    assert (gradient.abs().amax(2) > 0).all()
    x = torch.randn(1, 12 * 12, 16, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(routed.mixer(x, grid=(12, 12)).y[0, 0].sum(), x)
    assert 32 <= int((gradient.abs().amax(2) > 0).sum()) <= 32 + 9  # two regions of 16, and the convolution's window


def test_full_attention_by_its_formula():
    """8 heads, no bias, scaled by the head's width, and the convolution reads the input."""
    torch.manual_seed(0)
    attention = create_model("bi_former_tiny", **SMALL).double().stages[1][2].mixer
    x = torch.randn(2, 12, 32, dtype=torch.float64)
    q, k, v = (t.unflatten(2, (8, 4)).transpose(1, 2) for t in (x @ attention.qkv_proj.weight.t()).chunk(3, 2))
    mixed = ((q @ k.transpose(2, 3) / 2).softmax(3) @ v).transpose(1, 2).flatten(2)
    local = attention.lce(x.transpose(1, 2).unflatten(2, (3, 4))).flatten(2).transpose(1, 2)
    torch.testing.assert_close(attention(x, (3, 4)), attention.out_proj(mixed + local), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("place", [(0, 5), (1, 2)], ids=["routed", "full"])
def test_a_block_is_three_residual_branches(place):
    """On a grid that is higher than wide."""
    torch.manual_seed(0)
    block = create_model("bi_former_tiny", **SMALL).double().eval().stages[place[0]][place[1]]
    x = torch.randn(2, SMALL["dims"][place[0]], 9, 6, dtype=torch.float64)
    tokens = (x + block.position(x)).flatten(2).mT
    mixed = block.mixer(block.norm_mixer(tokens), grid=(9, 6))
    tokens = tokens + (mixed if isinstance(mixed, torch.Tensor) else mixed.y)
    tokens = tokens + block.ffn(block.norm_ffn(tokens))
    torch.testing.assert_close(block(x), tokens.mT.unflatten(2, (9, 6)), atol=1e-12, rtol=1e-12)


def test_the_features_are_a_mean_of_what_the_last_norm_gives():
    torch.manual_seed(0)
    model = create_model("bi_former_tiny", **SMALL).double().eval()
    torch.nn.init.normal_(model.norm.weight)
    images = torch.randn(2, 3, 40, 72, dtype=torch.float64)
    maps = images
    for kind, layer in zip(("Conv2d", "BatchNorm2d", "GELU", "Conv2d", "BatchNorm2d"), model.stages[0], strict=False):
        assert type(layer).__name__ == kind
        maps = layer(maps)
    for layer in (*model.stages[0][5:], *model.stages[1]):
        maps = layer(maps)
    want = model.head(model.norm(maps).flatten(2).sum(2) / maps[0, 0].numel())
    torch.testing.assert_close(model(images), want, atol=1e-12, rtol=1e-12)


def test_features_and_initial_weights():
    torch.manual_seed(0)
    model = create_model("bi_former_tiny", **{**SMALL, "num_classes": 0, "dims": [64, 128]}).eval()
    assert model(torch.randn(2, 3, 32, 32)).shape == (2, 128)
    for layer in (model.stages[0][5].mixer.q_proj, model.stages[0][5].ffn.up_proj, model.stages[1][2].mixer.qkv_proj):
        assert abs(layer.weight.std() - 0.02) < 1e-3
    assert model.stages[0][5].norm_mixer.eps == 1e-6


def test_drop_path_grows_to_the_last_block():
    with torch.device("meta"):
        model = BiFormer(drop_path=0.3)
    rates = [part.rate for name, part in model.named_modules() if name.endswith("drop_path")]
    torch.testing.assert_close(torch.tensor(rates), torch.linspace(0, 0.3, 14))


def test_a_saved_model_loads_to_equal_outputs(tmp_path):
    torch.manual_seed(0)
    model = create_model("bi_former_tiny", **SMALL).eval()
    images = torch.randn(2, 3, 40, 40)
    loaded = load_model(save_model(model, tmp_path / "saved"))
    assert torch.equal(loaded(images), model(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": [1]}, "one entry per stage"),
        ({"head_dim": 5}, "head_dim=5"),
        ({"dims": [16, 36]}, "8 heads"),
        ({"lce_kernel": 4}, "lce_kernel=4"),
        ({"num_classes": -1}, "num_classes=-1"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("bi_former_tiny", **{**SMALL, **options})
