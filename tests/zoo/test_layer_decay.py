"""In which layer each parameter of a model lies: over the registry, by hand, and beside timm."""

import copy

import pytest
import torch
from torch import nn

from seqzoo.blocks.layers.lora import add_lora
from seqzoo.zoo import create_model, list_models, model_info
from seqzoo.zoo._layers import layer_scales, parameter_layers

SERIES = {"seq_len": 32, "pred_len": 8, "in_channels": 2}
SMALL = {
    "informer": {**SERIES, "dim": 16, "num_heads": 2, "encoder_depth": 3, "decoder_depth": 2},
    "agent_deit_tiny": {"img_size": 32, "dim": 48, "depth": 3, "num_agents": 4, "num_classes": 5},
    "bi_former_tiny": {"dims": [32, 32, 32, 32], "depths": [1, 2, 3, 1], "num_regions": 2, "topks": [1, 2, 4, 0]},
    "mega_lra_image": {"dim": 16, "depth": 3, "head_dim": 16},
    "vit_tiny": {"img_size": 32, "dim": 48, "depth": 3, "num_classes": 5},
    **{f"{family}_tiny": {"dim": 32} for family in ("vis4mer", "selective_s4")},
}
OURS = [n for n in list_models() if model_info(n).build.__module__.startswith("seqzoo.") and n != "dlinear"]
NAMES = [n for n in OURS if n.endswith("_tiny") or "_" not in n or n == "mega_lra_image"]


def build(name, **options):
    given = {**(SERIES if model_info(name).task == "forecasting" else {}), **SMALL.get(name, {}), **options}
    return create_model(name, **given)


@pytest.mark.parametrize("name", NAMES)
def test_layers_follow_the_pass(name):
    """What lies in a lower layer is called before what lies in a higher one, and every block is a layer of its own."""
    model = build(name).eval()
    layers, head = parameter_layers(model)
    assert set(layers) == {n for n, _ in model.named_parameters()}
    assert set(range(1, head)) <= set(layers.values()) <= set(range(head + 1))
    if model.no_features is None and name not in ("informer", "bi_former_tiny"):
        assert head == len(model.feature_info) + 1
    assert layer_scales(model, 0.75) == {n: 0.75 ** (head - layer) for n, layer in layers.items()}
    names = {part: n for n, part in model.named_modules()}
    order = []
    for part in model.modules():
        # the embedding of a decoder is one, although it comes late; what a model holds itself is of both ends
        if (
            any(p is not None for p in part._parameters.values())
            and "decoder_embedding" not in names[part]
            and names[part]
        ):
            part.register_forward_pre_hook(lambda part, _: order.append(part))
    with torch.no_grad():
        model(*model.example_inputs(1))
    called = list(dict.fromkeys(order))
    found = [max(layers.get(f"{names[part]}.{key}", 0) for key in part._parameters) for part in called]
    if found[-1] == 0:  # a table that is also the last layer
        found.pop()
    assert len(found) > head and found == sorted(found), [
        (names[part], layer) for part, layer in zip(called, found, strict=False)
    ]


def of_parts(model):
    """Layer of each part with parameters."""
    return {n.rpartition(".")[0] or n: layer for n, layer in parameter_layers(model)[0].items()}


def test_an_encoder_and_a_decoder():
    found = of_parts(build("informer"))
    wanted = {
        "encoder_embedding.value.conv": 0,
        "decoder_embedding.value.conv": 0,
        "encoder.0.attention.q_proj": 1,
        "distil.0.conv.conv": 1,
        "encoder.1.ffn.up": 2,
        "distil.1.norm": 2,
        "encoder.2.norm2": 3,
        "encoder_norm": 3,
        "decoder.0.cross_attention.k_proj": 4,
        "decoder.1.norm3": 5,
        "decoder_norm": 5,
        "proj": 6,
    }
    assert {name: found[name] for name in wanted} == wanted


def test_a_pyramid():
    found = of_parts(build("bi_former_tiny"))
    wanted = {"stages.0.0": 0, "stages.0.4": 0, "stages.0.5.norm_ffn": 1, "stages.1.0": 2, "stages.1.1": 2}
    wanted |= {"stages.1.2.position": 2, "stages.1.3.norm_mixer": 3, "stages.2.0": 4, "stages.2.4.norm_ffn": 6}
    wanted |= {"stages.3.0": 7, "stages.3.2.mixer.qkv_proj": 7, "norm": 7, "head": 8}
    assert {name: found[name] for name in wanted} == wanted


def test_frames_then_places():
    found = of_parts(create_model("video_classifier_tiny", layout="factorised", depth=3, position="learned", max_len=9))
    wanted = {"encoder.proj": 0, "encoder.position.table": 0, "encoder.grid_position.rows.table": 0}
    wanted |= {f"encoder.backbone.{part}.{i}.norm_mixer": i + 1 for part in ("across", "within") for i in range(3)}
    wanted |= {"encoder.backbone.within.2.ffn.up_proj": 3, "encoder.backbone.norm": 3, "head.1": 4}
    assert {name: found[name] for name in wanted} == wanted


def test_what_a_class_builds_behind_its_blocks():
    grounder = of_parts(create_model("video_grounder_tiny", depth=1))
    assert [grounder[n] for n in ("query_proj", "fuse", "encoder.backbone.norm", "head")] == [0, 0, 1, 2]
    patch = of_parts(
        build(
            "patch_tiny",
            **{"num_static_covariates": 3, "channel_embedding": True, "linear_skip": True, "num_time_features": 2},
        )
    )
    assert [patch[n] for n in ("revin", "static", "channel", "model.backbone.norm", "model.head.proj", "skip")] == [
        *(0, 0, 0),
        *(1, 2, 2),
    ]
    detector = parameter_layers(create_model("audio_detector_tiny", head="text", depth=1))[0]
    assert [detector[n] for n in ("encoder.proj.bias", "scale", "bias", "out.weight")] == [0, 2, 2, 2]
    same = create_model("video_grounder_tiny", depth=1, query_dim=512)
    assert parameter_layers(same)[0]["similarity"] == 2
    chosen = of_parts(build("selective_s4_tiny"))
    assert [chosen[n] for n in ("mask_generator.out.0", "stages.0.norm", "stages.2.proj", "head")] == [0, 1, 3, 4]


def test_an_image_model_that_reads_frames_keeps_its_own_layers():
    pytest.importorskip("timm", reason="needs seqzoo[video]")
    encoder = {"name": "vit_tiny_patch16_224", "frozen": False}
    model = create_model("video_classifier_tiny", encoder=encoder)
    found, reader = of_parts(model), "encoder.frame_encoder.model"
    assert [found[f"{reader}.{n}"] for n in ("patch_embed.proj", "blocks.0.norm1", "blocks.11.mlp.fc2", "norm")] == [
        *(0, 1),
        *(12, 12),
    ]
    assert [found[n] for n in ("encoder.proj", "encoder.backbone.blocks.0.norm_ffn", "head.1")] == [13, 14, 16]


def test_a_tied_table_is_an_embedding_and_the_blocks_keep_their_distance():
    tied, free = (create_model("language_tiny", depth=2, tie_embeddings=tie) for tie in (True, False))
    a, b = layer_scales(tied, 0.5), layer_scales(free, 0.5)
    assert a == {name: scale for name, scale in b.items() if not name.startswith("model.head")}
    assert a["model.embedding.weight"] == 0.125 and a["model.backbone.norm.weight"] == 0.5
    assert b["model.head.proj.weight"] == 1


def test_low_rank_updates_lie_where_their_layer_does():
    model = build("vit_tiny")
    before = layer_scales(model, 0.5)
    add_lora(model, rank=2, trained=("head.",))
    after = layer_scales(model, 0.5)
    name = "backbone.blocks.1.mixer.q_proj"
    assert after[f"{name}.parametrizations.weight.0.lora_a"] == before[f"{name}.weight"] == 0.25


def test_a_model_within_another_keeps_its_layers():
    """The pretext has a copy of the model, whose blocks are none of the pass that is trained."""

    class Pretext(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = create_model("classifier_tiny")
            self.projector = nn.Linear(2, 2)
            self.copy = copy.deepcopy(self.model)

    outer = Pretext()
    inner, head = parameter_layers(outer.model)
    found, number = parameter_layers(outer)
    assert number == head == 3
    assert found == {n: inner.get(n.removeprefix("model."), head) for n, _ in outer.named_parameters()}
    assert found["model.backbone.blocks.0.norm_ffn.weight"] == 1 and found["projector.bias"] == head


@pytest.mark.parametrize("pooling", ["token", "mean"])
def test_timm_s_own_function_gives_the_same(pooling):
    """timm's groups of our model, by its `group_matcher`, and of timm's model under our names."""
    timm = pytest.importorskip("timm", reason="needs seqzoo[video]")
    from timm.optim import param_groups_layer_decay

    ours = build("vit_tiny", pooling=pooling, norm_after_pool=pooling == "mean", num_registers=2)
    theirs = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=32,
        embed_dim=48,
        depth=3,
        num_heads=3,
        num_classes=5,
        reg_tokens=2,
        global_pool="avg" if pooling == "mean" else "token",
    )

    def scales(model):
        names = {id(p): name for name, p in model.named_parameters()}
        groups = param_groups_layer_decay(model, layer_decay=0.75)
        return {names[id(p)]: group["lr_scale"] for group in groups for p in group["params"]}

    wanted = layer_scales(ours, 0.75)
    assert scales(ours) == wanted
    renamed = {"patch_embed.proj": "patch_embed", "mlp.fc1": "ffn.up_proj", "mlp.fc2": "ffn.down_proj"}
    renamed |= {"norm1": "norm_mixer", "norm2": "norm_ffn", "attn.proj": "mixer.out_proj", "attn.qkv": "mixer.q_proj"}
    compared = set()
    for name, scale in scales(theirs).items():
        own = name
        for a, b in renamed.items():
            own = own.replace(a, b)
        own = f"backbone.{own}" if own.startswith(("blocks.", "norm.")) else own
        assert wanted[own] == scale, name
        compared.add(own)
    assert {n for n in wanted if not any(f".{x}_proj" in n for x in "kv")} == compared


def test_refusals():
    model = build("vit_tiny")
    for wrong in (0, -0.5, 1.5, float("nan"), True, "0.75"):
        with pytest.raises(ValueError, match=r"layer_decay=.* must be a number in \(0, 1\]"):
            layer_scales(model, wrong)
    with pytest.raises(ValueError, match="layer_decay: DLinear has no blocks"):
        layer_scales(create_model("dlinear", **SERIES), 0.75)
