"""The interface of every registered model: features, intermediates, heads, checkpointing, weight decay.

It runs over the registry, so a new model gets it for free. `forward_features` and the intermediates are compared with
the model taken apart by hand; every family whose parts are its own has such a check at the end.
"""

import copy

import pytest
import torch
from torch import nn

from seqzoo.blocks.backbone import Backbone
from seqzoo.blocks.layers.norm import normalize
from seqzoo.zoo import FeatureExtractor, create_model, list_models, model_info, register_model
from seqzoo.zoo._features import feature_indices

SERIES = {"seq_len": 32, "pred_len": 8, "in_channels": 2}
# Of families that are large at their smallest.
SMALL = {
    "informer": {**SERIES, "dim": 32, "num_heads": 4},
    "dlinear": SERIES,
    "agent_deit_tiny": {"img_size": 32, "dim": 48, "depth": 2, "num_agents": 4, "num_classes": 5},
    "bi_former_tiny": {"dims": [32, 32, 32, 32], "depths": [1, 1, 1, 1], "num_regions": 2, "topks": [1, 2, 4, 0]},
    "mega_lra_image": {"dim": 32, "depth": 2, "head_dim": 16},
    "vit_tiny": {"img_size": 32, "dim": 48, "depth": 2, "num_classes": 5},
    **{f"{family}_tiny": {"dim": 64} for family in ("vis4mer", "selective_s4")},
}
OURS = [n for n in list_models() if model_info(n).build.__module__.startswith("seqzoo.")]
NAMES = [n for n in OURS if n.endswith("_tiny") or "_" not in n or n == "mega_lra_image"]


def build(name, **options):
    given = {**(SERIES if model_info(name).task == "forecasting" else {}), **SMALL.get(name, {}), **options}
    return create_model(name, **given)


def inputs(model, batch_size=2):
    return model.example_inputs(batch_size)


def y_of(output):
    return output if isinstance(output, torch.Tensor) else output.y


def test_every_family_is_here():
    families = {n.rpartition("_")[0] if n.rpartition("_")[2] in ("tiny", "small", "base") else n for n in OURS}
    assert families == {n.removesuffix("_tiny") for n in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_features_and_intermediates(name):
    model = build(name).eval()
    args, info = inputs(model), model.feature_info
    if model.no_features is not None:
        assert not info and not model_info(name).has_features
        with pytest.raises(ValueError, match="has no features"):
            model.forward_intermediates(*args)
        with pytest.raises(ValueError, match="has no features"):
            create_model(name, features_only=True, **SMALL.get(name, {}))
        return
    assert model_info(name).has_features and len(info) > 0
    before = y_of(model(*args))
    features, found = model.forward_intermediates(*args)
    assert torch.equal(features, model.forward_features(*args))
    assert torch.equal(before, y_of(model(*args))), "the hooks must leave nothing behind"
    assert not any(part._forward_hooks for part in model.modules())
    assert len(found) == len(info)
    pyramid = features.dim() == 4
    for x, row in zip(found, info, strict=True):
        assert (x.shape[1] if pyramid else x.shape[-1]) == row["num_chs"]
        assert isinstance(model.get_submodule(row["module"]), nn.Module)
    # The last one, normed, is the features, and the chosen ones are those of all.
    last = model.forward_intermediates(*args, indices=1, norm=True, intermediates_only=True)
    torch.testing.assert_close(last[0], features, atol=1e-6, rtol=1e-6)
    some = model.forward_intermediates(*args, indices=[-1, 0], intermediates_only=True)
    assert torch.equal(some[0], found[-1]) and torch.equal(some[1], found[0])
    without_norm = isinstance(getattr(model._trunk().end, "norm", None), nn.Identity)
    assert torch.equal(found[-1], features) == without_norm
    with pytest.raises(ValueError, match=f"{len(info)} blocks"):
        model.forward_intermediates(*args, indices=[len(info)])


@pytest.mark.parametrize("name", [n for n in NAMES if model_info(n).has_features])
def test_a_feature_extractor_is_the_list(name):
    options = {**(SERIES if model_info(name).task == "forecasting" else {}), **SMALL.get(name, {})}
    torch.manual_seed(1)
    whole = build(name).eval()
    torch.manual_seed(1)
    extractor = create_model(name, features_only=True, out_indices=1, **options).eval()
    args = inputs(whole)
    found = extractor(*args)
    assert isinstance(found, list) and len(found) == len(extractor.feature_info) == 1
    wanted = whole.forward_intermediates(*args, indices=1, intermediates_only=True)
    torch.testing.assert_close(found[0], wanted[0], atol=0, rtol=0)
    assert extractor.feature_info.module_name() == whole.feature_info.module_name()[-1:]


@pytest.mark.parametrize("name", NAMES)
def test_a_new_head(name):
    model = build(name).eval()
    args = inputs(model)
    if not model.is_classifier:
        with pytest.raises(ValueError, match="no classifier"):
            model.reset_classifier(7)
        return
    was = {k: v.clone() for k, v in model.state_dict().items()}
    model.reset_classifier(7)
    assert y_of(model(*args)).shape[-1] == 7
    assert model.config["options"]["num_classes"] == 7
    assert not model.get_classifier().training or not isinstance(model.get_classifier(), nn.Sequential)
    changed = {k for k, v in model.state_dict().items() if k not in was or v.shape != was[k].shape}
    assert changed and all(k.startswith(model.classifier) for k in changed)
    assert all(torch.equal(v, was[k]) for k, v in model.state_dict().items() if k not in changed)
    again = create_model(name, **{**model.config["options"]}).eval()
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in model.state_dict().items()}
    model.reset_classifier(0)
    bare = y_of(model(*args))
    copied = copy.deepcopy(model)
    copied.reset_classifier(3)
    assert y_of(copied(*args)).shape == (*bare.shape[:-1], 3)
    assert not any(k.startswith(model.classifier + ".") for k in model.state_dict())
    built = create_model(name, **{**model.config["options"]})
    assert set(built.state_dict()) == set(model.state_dict())
    with pytest.raises(ValueError, match="num_classes=-1"):
        model.reset_classifier(-1)


@pytest.mark.parametrize("name", NAMES)
def test_checkpointing_changes_neither_output_nor_gradients(name):
    model = build(name)
    if name == "dlinear":
        with pytest.raises(ValueError, match="no blocks"):
            model.set_grad_checkpointing()
        return
    args = inputs(model)

    def run(enable):
        copied = copy.deepcopy(model)  # codebooks move while a model trains
        copied.set_grad_checkpointing(enable)
        torch.manual_seed(2)
        y = y_of(copied(*args))
        y.square().sum().backward()
        return [y.detach(), *(p.grad.clone() for p in copied.parameters() if p.grad is not None)]

    plain, again = run(False), run(True)
    assert len(plain) == len(again)
    for a, b in zip(plain, again, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_no_weight_decay_names_vectors_and_tables(name):
    model = build(name)
    spared = model.no_weight_decay()
    parameters = dict(model.named_parameters())
    assert spared <= set(parameters)
    tagged = {id(p) for m in model.modules() for p in (getattr(m, "weight", None),) if isinstance(m, nn.Embedding)}
    small = {n for n, p in parameters.items() if p.dim() < 2 and p.requires_grad}
    assert {n for n, p in parameters.items() if id(p) in tagged} <= spared
    # a tag may ask for decay of a vector, nothing else may
    assert len(small - spared) <= len(small) // 2


def test_checkpointing_really_recomputes():
    """Two calls of each block: forward and backward."""
    for name in ("bi_former_tiny", "informer", "language_tiny"):
        model = build(name)
        calls = []
        block = next(part for part in model.modules() if type(part).__name__ in ("_Block", "Block", "EncoderLayer"))
        inner = next(part for n, part in block.named_modules() if n.endswith("ffn"))
        inner.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        model.set_grad_checkpointing()
        y_of(model(*inputs(model))).sum().backward()
        assert len(calls) == 2, name


def test_a_language_model_taken_apart():
    model = create_model("language_tiny", mixer="linear").eval()
    (tokens,) = model.example_inputs(2)
    x, wanted = model.model.embedding(tokens), []
    for block in model.backbone.blocks:
        x = block(x).y
        wanted.append(x)
    features, found = model.forward_intermediates(tokens)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)
    torch.testing.assert_close(features, model.backbone.norm(x), atol=0, rtol=0)
    normed = model.forward_intermediates(tokens, norm=True, indices=[0], intermediates_only=True)[0]
    torch.testing.assert_close(normed, model.backbone.norm(wanted[0]), atol=0, rtol=0)


def test_pads_are_zero_in_features_and_normed_intermediates():
    model = create_model("classifier_tiny", norm="layernorm").eval()
    nn.init.ones_(model.backbone.norm.bias)  # so that a norm of zeros is none
    (tokens,) = model.example_inputs(2)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[1, 7:] = False
    features, found = model.forward_intermediates(tokens, mask=mask, norm=True)
    for x in (features, *found):
        assert bool((x[1, 7:] == 0).all()) and bool((x[1, :7] != 0).any())
    alone = model.forward_features(tokens[1:, :7])
    torch.testing.assert_close(features[1:, :7], alone, atol=1e-5, rtol=1e-5)


def test_frames_within_a_factorised_backbone():
    """What blocks within frames give is (real frames, places, D); here it lies as the features do."""
    options = {"encoder": {"name": "features", "dim": 6}, "layout": "factorised", "dim": 16, "depth": 2}
    model = create_model("video_classifier_tiny", mixer="linear", **options).eval()
    frames, mask = torch.randn(2, 4, 2, 3, 6), torch.ones(2, 4, dtype=torch.bool)
    mask[1, 3] = False
    features, found = model.forward_intermediates(frames, mask)
    assert [x.shape for x in found] == [(2, 24, 16)] * 2 and features.shape == (2, 24, 16)
    assert bool((found[0][1, 18:] == 0).all()) and bool((found[0][1, :18] != 0).all())
    normed = model.forward_intermediates(frames, mask, norm=True, indices=1, intermediates_only=True)[0]
    torch.testing.assert_close(normed, features, atol=1e-6, rtol=1e-6)
    whole = model.forward_intermediates(frames, intermediates_only=True)
    torch.testing.assert_close(whole[0][0], found[0][0], atol=1e-6, rtol=1e-6)


def test_the_pyramid_of_bi_former():
    model = build("bi_former_tiny").eval()
    (images,) = model.example_inputs(2)
    x, wanted = images, []
    for stage in model.stages:
        x = stage(x)
        wanted.append(x)
    features, found = model.forward_intermediates(images)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert torch.equal(features, model.norm(x))
    sides = [64 // x.shape[-1] for x in found]
    assert model.feature_info.reduction() == sides == [4, 8, 16, 32]


def test_the_encoder_of_informer():
    model = build("informer").eval()
    (batch,) = model.example_inputs(2)
    batch["past_time"] = torch.randn(2, 32, 4)
    batch["future_time"] = torch.randn(2, 8, 4)
    torch.manual_seed(3)
    features, found = model.forward_intermediates(batch)
    assert [x.shape[1] for x in found] == [32, 16] == [32 // r for r in model.feature_info.reduction()]
    torch.testing.assert_close(features, model.encoder_norm(found[-1]), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("name", "length"), [("patch_tiny", 32), ("audio_classifier_tiny", 8000), ("agent_deit_tiny", 32), ("vit_tiny", 32)]
)
def test_reduction_counts_the_tokens(name, length):
    """Samples, steps or pixels of a side divided by the tokens along them, up to an edge."""
    model = build(name).eval()
    rows = model.forward_features(*inputs(model, 1)).shape[1]
    if name.endswith(("deit_tiny", "vit_tiny")):
        rows = round((rows - 1) ** 0.5)
    assert abs(length / model.feature_info.reduction()[0] - rows) <= 1.5


def test_a_class_of_one_s_own_gets_the_interface():
    class Mine(nn.Module):
        def __init__(self, *, dim: int = 8, num_classes: int = 2) -> None:
            super().__init__()
            self.backbone = Backbone(dim, 3, mixer="linear")
            self.head = nn.Linear(dim, num_classes)

        def forward(self, x):
            return self.head(self.backbone(x).y.mean(1))

    @register_model(Mine, task="mine")
    def my_own_tiny(**options):
        """A model of a test."""
        return Mine(**options)

    from seqzoo.zoo import _registry

    try:
        model = create_model("my_own_tiny")
        x = torch.randn(2, 5, 8)
        features, found = model.forward_intermediates(x, indices=2)
        assert len(found) == 2 and torch.equal(features, normalize(model.backbone.norm, found[-1], None))
        model.reset_classifier(4)
        assert model(x).shape == (2, 4)
        assert isinstance(create_model("my_own_tiny", features_only=True), FeatureExtractor)
        assert "my_own_tiny" in list_models("my_*", modality="mine", features_only=True)
    finally:
        _registry._REGISTRY.pop("my_own_tiny")


def test_indices():
    assert feature_indices(None, 3) == [0, 1, 2]
    assert feature_indices(2, 3) == [1, 2]
    assert feature_indices([-1, 0], 3) == [2, 0]
    for wrong in (0, 4, [3], [-4]):
        with pytest.raises(ValueError, match="3 blocks"):
            feature_indices(wrong, 3)


def test_a_head_that_is_not_there_cannot_be_replaced():
    model = create_model("vit_tiny", img_size=32, dim=48, depth=1)
    model.head = nn.Identity()
    with pytest.raises(ValueError, match="without a head"):
        model.reset_classifier(3)


def test_a_new_head_starts_as_the_family_starts_its_own():
    vit = build("vit_tiny")
    vit.reset_classifier(400)
    assert abs(float(vit.head.weight.detach().std()) / 0.02 - 1) < 0.05 and not bool(vit.head.bias.any())
    detector = build("audio_detector_tiny")
    detector.reset_classifier(3)
    torch.testing.assert_close(detector.out.bias.detach().sigmoid(), torch.full((3,), 0.03))
    mega = build("mega_lra_image")
    mega.reset_classifier(3)
    assert float(mega.head[-1].weight.detach().abs().max()) <= (6 / (16 + 3)) ** 0.5 and not bool(
        mega.head[-1].bias.any()
    )


def test_timm_knows_the_same_reset():
    """timm's models answer the calls of ours: the same names, the same shapes."""
    timm = pytest.importorskip("timm", reason="needs seqzoo[video]")
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=32, embed_dim=48, depth=2, num_heads=3).eval()
    ours = create_model("vit_tiny", img_size=32, dim=48, depth=2).eval()
    images = torch.randn(2, 3, 32, 32)
    for model in (theirs, ours):
        model.reset_classifier(0)
        assert model(images).shape == (2, 48)
        model.reset_classifier(3)
        assert model(images).shape == (2, 3)
    assert theirs.forward_features(images).shape == ours.forward_features(images).shape
    assert len(theirs.feature_info) == len(ours.feature_info)
    for key in ("num_chs", "reduction"):
        assert [row[key] for row in theirs.feature_info] == [row[key] for row in ours.feature_info]
