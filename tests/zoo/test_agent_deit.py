"""Agent-DeiT: sizes, gradients, saving, and without agents timm's DeiT."""

import pytest
import torch

from seqzoo.blocks.mixers.agent import AgentAttention
from seqzoo.blocks.mixers.softmax import SoftmaxAttention
from seqzoo.zoo import create_model, list_models, load_model, model_info, save_model

torch.set_num_threads(1)
SMALL = {"img_size": 24, "patch_size": 6, "dim": 12, "depth": 2, "num_heads": 3, "num_agents": 4, "num_classes": 5}


def build(**options):
    torch.manual_seed(0)
    return create_model("agent_deit_tiny", **{**SMALL, **options})


# The authors' own models count these; the paper's table says 6.0M, 22.7M and 87.2M.
@pytest.mark.parametrize(("size", "count"), [("tiny", 6_015_640), ("small", 22_647_112), ("base", 87_204_904)])
def test_parameters_are_as_many_as_published(size, count):
    with torch.device("meta"):
        model = create_model(f"agent_deit_{size}")
    assert sum(p.numel() for p in model.parameters()) == count


def test_they_are_registered_as_image_models():
    names = ["agent_deit_base", "agent_deit_small", "agent_deit_tiny"]
    assert list_models("agent_deit*", task="image") == names
    assert {model_info(name).paper for name in names} == {"arXiv:2312.08874"}


def test_images_to_logits_with_a_gradient_everywhere():
    model = build()
    images = torch.randn(2, 3, 24, 24, requires_grad=True)
    logits = model(images)
    assert logits.shape == (2, 5)
    (logits * torch.randn(2, 5)).sum().backward()
    assert (images.grad != 0).all()
    dead = {n for n, p in model.named_parameters() if not bool((p.grad != 0).any())}
    # The head reads the class token alone: what the last block adds to patches reaches nothing.
    patches = ("conv.weight", "conv.bias", *(f"broadcast_bias.{n}" for n in ("table", "rows", "columns")))
    assert dead == {f"backbone.blocks.1.mixer.{name}" for name in patches}


def test_without_a_head_come_features():
    model = build(num_classes=0).eval()
    images = torch.randn(2, 3, 24, 24)
    assert model(images).shape == (2, 12) and torch.equal(model(images), model.embed(images))


def test_which_blocks_have_agents():
    kinds = [type(block.mixer) for block in build(depth=3, num_agent_layers=2).backbone.blocks]
    assert kinds == [AgentAttention, AgentAttention, SoftmaxAttention]
    mixer = build().backbone.blocks[0].mixer
    assert mixer.grid_size == (4, 4) and mixer.num_prefix_tokens == 1 and mixer.num_agents == 4


def test_without_agents_it_is_the_deit_of_timm():
    vit = pytest.importorskip("timm.models.vision_transformer", reason="timm is not installed")
    theirs = vit.VisionTransformer(img_size=24, patch_size=6, embed_dim=12, depth=2, num_heads=3, num_classes=5).eval()
    ours = build(num_agent_layers=0).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    names = {
        "patch_embed.": "patch_embed.proj.",
        "backbone.norm.": "norm.",
        "backbone.blocks.": "blocks.",
        "norm_mixer": "norm1",
        "norm_ffn": "norm2",
        "ffn.up_proj": "mlp.fc1",
        "ffn.down_proj": "mlp.fc2",
        "mixer.out_proj": "attn.proj",
    }
    state, found = {}, theirs.state_dict()
    for key in ours.state_dict():
        their_key = key
        for mine, other in names.items():
            their_key = their_key.replace(mine, other)
        head, _, rest = their_key.partition("mixer.")
        if rest:
            state[key] = found[f"{head}attn.qkv.{rest[7:]}"].chunk(3)["qkv".index(rest[0])]
        else:
            state[key] = found[their_key]
    ours.load_state_dict(state)
    images = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(ours(images), theirs(images), atol=1e-5, rtol=1e-5)
    with torch.device("meta"):
        full = create_model("agent_deit_tiny", num_agent_layers=0)
    assert sum(p.numel() for p in full.parameters()) == 5_717_416  # DeiT-T


def test_starts_as_published():
    model = build(dim=48)
    for weight in (model.backbone.blocks[0].mixer.q_proj.weight, model.backbone.blocks[1].ffn.up_proj.weight):
        assert 0.018 < weight.std() < 0.022 and weight.abs().max() < 0.1
    assert 0.018 < model.pos_embed.std() < 0.022 and (model.head.bias == 0).all()


def test_drop_path_grows_to_its_value_and_training_draws():
    model = build(drop_path=0.4, depth=3)
    assert [round(block.drop_path.rate, 6) for block in model.backbone.blocks] == [0.0, 0.2, 0.4]
    assert model_info("agent_deit_small").defaults["drop_path"] == 0.1


def test_saved_and_loaded(tmp_path):
    model, images = build().eval(), torch.randn(2, 3, 24, 24)
    again = load_model(save_model(model, tmp_path / "model"))
    assert torch.equal(again(images), model(images))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"patch_size": 7}, "patch_size=7 does not divide img_size=24; the nearest size it divides is 21"),
        ({"num_agent_layers": 3}, "num_agent_layers=3 must be between 0 and depth=2"),
        ({"num_classes": -1}, "num_classes=-1"),
        ({"num_agents": 5}, "num_agents=5 must be a square"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_images_of_another_size():
    with pytest.raises(ValueError, match=r"images have the shape \(2, 3, 18, 24\), expected \(B, C, 24, 24\)"):
        build()(torch.randn(2, 3, 18, 24))
