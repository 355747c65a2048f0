"""ViT of the zoo: published counts, tokens, pooling, any mixer; equality with timm is in test_convert_timm.py."""

import pytest
import torch

from seqzoo.zoo import create_model, load_model, save_model

TINY = {"img_size": 16, "patch_size": 4, "dim": 24, "depth": 2, "num_classes": 5}


def images(size=(16, 16)):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(
    ("name", "count"), [("vit_tiny", 5_717_416), ("vit_small", 22_050_664), ("vit_base", 86_567_656)]
)
def test_published_parameter_counts(name, count):
    """ViT-Ti/16, ViT-S/16 and ViT-B/16 at 224 pixels, 1000 classes."""
    with torch.device("meta"):
        model = create_model(name)
    assert sum(p.numel() for p in model.parameters()) == count


def test_tokens_and_pooling():
    """Class token, registers, then the patches row after row."""
    model = create_model("vit_tiny", **TINY, num_registers=2, head_drop=0.5).eval()
    x = images()
    tokens = model.forward_tokens(x)
    assert tokens.shape == (2, 1 + 2 + 16, 24)
    torch.testing.assert_close(model(x), model.head(tokens[:, 0]))
    mean = create_model("vit_tiny", **TINY, num_registers=2, class_token=False, pooling="mean", norm_after_pool=True)
    mean.eval()
    tokens = mean.forward_tokens(x)
    assert tokens.shape == (2, 2 + 16, 24)
    torch.testing.assert_close(mean(x), mean.head(mean.fc_norm(tokens[:, 2:].mean(1))))
    assert all(block.mixer.num_prefix_tokens == 3 for block in model.backbone.blocks)


def test_the_prefix_has_positions_or_not():
    whole = create_model("vit_tiny", **TINY)
    patches = create_model("vit_tiny", **TINY, position_prefix=False)
    assert whole.pos_embed.shape == (1, 17, 24) and patches.pos_embed.shape == (1, 16, 24)
    state = {**whole.state_dict(), "pos_embed": whole.pos_embed[:, 1:].detach()}
    state["cls_token"] = whole.cls_token.detach() + whole.pos_embed[:, :1].detach()
    patches.load_state_dict(state)
    torch.testing.assert_close(patches.eval()(images()), whole.eval()(images()))


def test_an_oblong_image():
    model = create_model("vit_tiny", **{**TINY, "img_size": (8, 20), "patch_size": (4, 5)}).eval()
    assert model.grid == (2, 4)
    assert model(images((8, 20))).shape == (2, 5)
    with pytest.raises(ValueError, match=r"shape \(2, 3, 16, 16\), expected \(B, C, 8, 20\)"):
        model(images())


@pytest.mark.parametrize("mixer", ["agent", "mamba", "linear"])
def test_any_mixer(mixer):
    model = create_model("vit_tiny", **{**TINY, "class_token": False, "pooling": "mean", "mixer": mixer})
    model(images()).square().sum().backward()
    assert all(p.grad is not None for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 5}, "patch_size=5 does not divide img_size=16; nearest that it divides: 15"),
        ({"pooling": "max"}, "pooling='max' is not a choice"),
        ({"class_token": False}, "with class_token=False take pooling='mean'"),
        ({"num_registers": -1}, "num_registers=-1"),
        ({"img_size": (16, 16, 16)}, "must be a positive integer, or two"),
        ({"img_size": 0}, "img_size=0 must be a positive integer"),
    ],
)
def test_options_that_do_not_go_together(options, message):
    with pytest.raises(ValueError, match=message):
        create_model("vit_tiny", **{**TINY, **options})


def test_saving_and_loading(tmp_path):
    model = create_model("vit_tiny", **TINY, layer_scale=0.1, input_norm=True).eval()
    again = load_model(save_model(model, tmp_path / "model"))
    assert torch.equal(again(images()), model(images()))
