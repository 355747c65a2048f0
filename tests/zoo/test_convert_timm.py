"""Converted vision transformers against timm's: features, logits, gradients; which architectures fit."""

import functools

import pytest
import torch

from seqzoo.zoo import create_model, load_model
from seqzoo.zoo.convert import convert, make_plan
from seqzoo.zoo.convert._names import check_fit

timm = pytest.importorskip("timm")

FRAME = {"img_size": 24, "patch_size": 8, "embed_dim": 36, "depth": 2, "num_heads": 3, "num_classes": 7}
CASES = {
    "plain": {},
    "deit3": {"init_values": 0.1, "no_embed_class": True},
    "registers": {"reg_tokens": 2},
    "dinov2": {"reg_tokens": 4, "no_embed_class": True, "init_values": 1e-5, "num_classes": 0},
    "mean": {"class_token": False, "global_pool": "avg"},
    "mean_norm_before": {"class_token": False, "global_pool": "avg", "fc_norm": False, "reg_tokens": 1},
    "mean_with_token": {"global_pool": "avg"},
    "oblong": {"img_size": (16, 40), "patch_size": (4, 8), "in_chans": 1},
    "no_biases": {"qkv_bias": False, "proj_bias": False, "mlp_ratio": 2.5},
    "norm_first": {"pre_norm": True},
}


@functools.cache
def theirs_of(case):
    torch.manual_seed(4)
    model = timm.models.vision_transformer.VisionTransformer(**{**FRAME, **CASES[case]}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.double()


def config_of(case):
    return {"architecture": "vit_tiny_patch16_224", "model_args": {**FRAME, **CASES[case]}}


def images(model):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, model.in_chans, *model.patch_embed.img_size, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
@pytest.mark.parametrize("case", CASES)
def test_equal_features_and_logits(case, dtype, tolerance):
    theirs = theirs_of(case)
    ours = convert(theirs.state_dict(), config=config_of(case), dtype=dtype)
    x = images(theirs)
    with torch.no_grad():
        for got, want in (
            (ours(x.to(dtype)), theirs(x)),
            (ours.embed(x.to(dtype)), theirs.forward_head(theirs.forward_features(x), pre_logits=True)),
            (ours.forward_tokens(x.to(dtype)), theirs.forward_features(x)),
        ):
            torch.testing.assert_close(got.double(), want, atol=tolerance * max(1.0, want.abs().max().item()), rtol=0)


@pytest.mark.parametrize("case", CASES)
def test_equal_gradients(case):
    theirs = theirs_of(case)
    ours = convert(theirs.state_dict(), config=config_of(case))
    x = images(theirs)
    theirs.zero_grad()
    want = theirs(x)
    cotangent = torch.randn(want.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    (want * cotangent).sum().backward()
    (ours(x) * cotangent).sum().backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    wanted, left_out = make_plan(theirs.state_dict(), config=config_of(case)).translate(gradients)
    got = {name: p.grad for name, p in ours.named_parameters()}
    assert set(got) == set(wanted) and not left_out
    for name, grad in got.items():
        torch.testing.assert_close(grad, wanted[name], atol=1e-9, rtol=0)
        assert name.endswith("k_proj.bias") or bool((grad != 0).any()), name


# one of every kind of name; all 50 of timm 1.0 that the converter takes were compared once
ARCHITECTURES = (
    "vit_tiny_patch16_224",
    "vit_base_patch16_gap_224",
    "vit_small_patch14_reg4_dinov2",
    "vit_medium_patch16_reg4_gap_256",
    "deit_small_patch16_224",
    "deit3_medium_patch16_224",
)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_published_architectures_fit(architecture):
    """Shapes, heads, epsilon and activation, from the tensors and the name alone."""
    with torch.device("meta"):
        theirs = timm.create_model(architecture, depth=2)
        state = theirs.state_dict()
        plan = make_plan(state, config={"architecture": architecture, "global_pool": theirs.global_pool})
        ours = create_model(plan.name, **plan.options)
    check_fit(plan, plan.translate(state)[0], ours.state_dict(), architecture)
    block = theirs.blocks[0]
    assert ours.backbone.blocks[0].mixer.num_heads == block.attn.num_heads
    assert ours.backbone.blocks[0].norm_mixer.eps == block.norm1.eps and type(block.mlp.act) is torch.nn.GELU
    assert tuple(ours.img_size) == tuple(theirs.patch_embed.img_size)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())


def test_from_a_folder_to_a_folder(tmp_path):
    """The folder that timm saves for the Hub; what images are normalised with goes along."""
    theirs = timm.create_model("vit_tiny_patch16_224", depth=1, num_classes=5).eval()
    timm.models.save_for_hf(theirs, tmp_path / "theirs", safe_serialization=True)
    convert(tmp_path / "theirs", tmp_path / "ours")
    ours = load_model(tmp_path / "ours")
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), atol=1e-5, rtol=0)
    assert ours.preprocessing["mean"] == list(theirs.pretrained_cfg["mean"])
    assert ours.preprocessing["input_size"] == [3, 224, 224]


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "resnet50"}, "architecture='resnet50'; only plain ViT, DeiT and DINOv2"),
        ({"architecture": "vit_base_patch16_clip_224"}, "only plain ViT"),
        ({"architecture": "vit_base_patch16_siglip_224"}, "only plain ViT"),
        ({"architecture": "deit_tiny_distilled_patch16_224"}, "only plain ViT"),
        ({"model_args": {"qk_norm": True}}, "model_args.qk_norm=True"),
        ({"model_args": {"act_layer": "quick_gelu"}}, "model_args.act_layer='quick_gelu'"),
        ({"model_args": {"global_pool": "map"}}, "global_pool='map'; only token or avg"),
        ({"model_args": {"num_heads": 5}}, "num_heads=5 does not divide dim=36"),
        ({"model_args": {"img_size": 80}, "drop": "pos_embed"}, "tensor pos_embed is missing"),
        ({"drop": "head.bias"}, r"missing: head\.bias"),
        ({"drop": "blocks.1.norm2.weight"}, r"missing: blocks\.1\.norm2\.weight"),
        ({"add": "blocks.1.attn.q_norm.weight"}, r"no place for: blocks\.1\.attn\.q_norm\.weight"),
    ],
)
def test_what_ours_has_not_is_refused(config, message):
    state = dict(theirs_of("plain").state_dict())
    state.pop(config.get("drop"), None)
    if "add" in config:
        state[config["add"]] = torch.ones(12)
    given = {**config_of("plain"), **config}
    given["model_args"] = {**FRAME, **config.get("model_args", {})}
    with pytest.raises(ValueError, match=message):
        convert(state, config=given)


def test_gated_feed_forwards_are_refused():
    with torch.device("meta"):
        model = timm.create_model("vit_giant_patch14_dinov2", depth=1)
    with pytest.raises(ValueError, match="are gated"):
        convert(model.state_dict(), config={"architecture": "vit_giant_patch14_dinov2"})


def test_positions_that_fit_no_image_are_refused():
    state = {**theirs_of("plain").state_dict(), "pos_embed": torch.zeros(1, 12, 36)}
    config = {"architecture": "vit_tiny_patch16_224", "model_args": {"num_heads": 3}}
    with pytest.raises(ValueError, match="12 positions fit no image of 8 x 8 patches"):
        convert(state, config=config)
    state["pos_embed"] = torch.zeros(1, 7, 36)
    oblong = {**config, "pretrained_cfg": {"input_size": [3, 16, 24]}}
    assert make_plan(state, config=oblong).options["img_size"] == [16, 24]
