"""MEGA models: published counts, saving, the image classifier, what the published language model adds."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from seqzoo.blocks.layers.norm import BatchNorm, ScaleNorm
from seqzoo.zoo import create_model, load_model, save_model

SMALL = {"dim": 16, "depth": 2, "head_dim": 12, "mixer": {"name": "mega", "z_dim": 6, "d_state": 2, "chunk_size": 9}}


def count(name, **options):
    with torch.device("meta"):
        return sum(p.numel() for p in create_model(name, **options).parameters())


def images(size=3, side=5, seed=0):
    return torch.randn(size, 1, side, side, generator=torch.Generator().manual_seed(seed))


def test_published_parameter_counts():
    """LRA-Image as counted with a bias in the last layer, and without, as the public code has it; enwik8's 39M."""
    assert count("mega_lra_image") == 2_824_770
    assert count("mega_lra_image", head_bias=False) == 2_824_760
    assert count("mega_base") == 12 * 3_252_608 + 256 * 512 == 39_162_368


def test_norms_and_start_of_the_image_classifier_are_the_published_ones():
    model = create_model("mega_lra_image")
    norms = [m for m in model.backbone.modules() if isinstance(m, BatchNorm)]
    assert len(norms) == 17 and all(norm.eps == 1e-5 for norm in norms)
    assert all(block.prenorm and block.mixer.gated.attention.attention == "laplace" for block in model.backbone.blocks)
    assert model.embedding.weight.std().item() == pytest.approx(1, rel=0.3)
    assert model.embedding.bias.std().item() == pytest.approx(0.1, rel=0.3)
    assert model.backbone.blocks[0].ffn.up_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize(("norm", "prenorm"), [("batchnorm", True), ("scalenorm", False)])
def test_the_image_classifier(norm, prenorm):
    torch.manual_seed(0)
    model = create_model("mega_lra_image", **SMALL, norm=norm, prenorm=prenorm)
    logits = model(images())
    assert logits.shape == (3, 10)
    logits.square().sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not bool((p.grad != 0).any())] == []
    kind = BatchNorm if norm == "batchnorm" else ScaleNorm
    assert sum(isinstance(m, kind) for m in model.modules()) == 4 + prenorm
    # The mean over all pixels, which are read in both directions: the last pixel reaches the first feature.
    features = create_model("mega_lra_image", **SMALL, num_classes=0).eval()
    x = images(1)
    y = features.backbone(features.embedding(x.flatten(2).mT)).y
    torch.testing.assert_close(features(x), y.mean(1))
    with pytest.raises(ValueError, match=r"images have shape \(3, 25\), expected \(B, 1, H, W\)"):
        model(images()[:, 0].flatten(1))
    with pytest.raises(ValueError, match="num_classes=-1"):
        create_model("mega_lra_image", num_classes=-1)


def test_the_language_model_scales_its_embedding_and_ends_in_a_bare_norm():
    torch.manual_seed(0)
    model = create_model("mega_tiny").eval()
    tokens = torch.arange(7)[None]
    table = model.model.embedding.weight
    assert table.std().item() == pytest.approx(64**-0.5, rel=0.05)
    torch.testing.assert_close(model.model.embedding(tokens), 8 * table[:7][None])
    features = model.model.forward_features(tokens).y
    torch.testing.assert_close(features.mean(-1), torch.zeros(1, 7), atol=1e-5, rtol=0)
    torch.testing.assert_close(features.var(-1, unbiased=False), torch.ones(1, 7), atol=1e-2, rtol=0)
    torch.testing.assert_close(model(tokens).y, features @ table.T)
    assert not list(model.backbone.norm.parameters())


def test_dropouts_are_where_the_published_model_has_them():
    """Embedding, average, gated output, feed-forward output: one rate; none on what a block adds to the residual."""
    model = create_model("mega_tiny", drop=0.25, hidden_drop=0.125)
    block = model.backbone.blocks[0]
    assert model.model.embedding.drop.p == block.ffn.drop.p == 0.25
    assert block.ffn.hidden_drop.p == 0.125 and block.drop.p == 0
    assert block.mixer.gated.drop.rate == 0.1


def test_saving_and_loading(tmp_path):
    model, x = create_model("mega_tiny", dim=16, depth=2).eval(), torch.randint(256, (2, 9))
    again = load_model(save_model(model, tmp_path / "text"))
    assert torch.equal(again(x).y, model(x).y)
    classifier = create_model("mega_lra_image", **SMALL)
    classifier(images())  # moves the running statistics, which are saved too
    classifier.eval()
    again = load_model(save_model(classifier, tmp_path / "image"))
    assert torch.equal(again(images(seed=1)), classifier(images(seed=1)))


def test_hybrids_and_other_mixers():
    mixer = [{"name": "mega", "chunk_size": 4}, {"name": "softmax", "num_heads": 2}]
    model = create_model("mega_tiny", dim=16, depth=2, mixer=mixer).eval()
    assert isinstance(model.backbone.norm, nn.LayerNorm)
    x = torch.randint(256, (1, 6))
    parts = [model(x[:, :4], state=model.init_state(1))]
    parts.append(model(x[:, 4:], state=parts[0].state))
    torch.testing.assert_close(torch.cat([p.y for p in parts], 1), model(x).y, atol=1e-5, rtol=1e-5)
