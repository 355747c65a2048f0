"""`model.pretrained`: a task's net starts from a saved model, frozen or with low-rank updates."""

from pathlib import Path

import pytest
import torch

from seqzoo.blocks.layers.lora import has_lora
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.nets import create_net
from seqzoo.pipelines.overrides import parse_arguments
from seqzoo.pipelines.run import execute  # noqa: F401 - the command's own import path
from seqzoo.zoo import LanguageModel, create_model, load_model, save_model
from seqzoo.zoo.classifier import SequenceClassifier

SMALL = {"dim": 16, "depth": 2, "mixer": "linear"}


@pytest.fixture
def language(tmp_path: Path):
    """A language model in a folder; its blocks are those that a classifier may have."""
    model = create_model("language_tiny", **SMALL)
    return model, str(save_model(model, tmp_path / "language"))


def classifier(folder: str | None, **more):
    options = {
        **SMALL,
        "ffn": "swiglu",
        "norm": "rmsnorm",
        "causal": True,
        "mlp_ratio": None,
        "num_classes": 3,
        "pooling": "last",
        **more,
    }
    return create_net("classifier_tiny", {**options, "pretrained": folder}, None, SequenceClassifier, "classifier")


def test_a_net_of_the_same_class_has_all_weights(language):
    model, folder = language
    net = create_net("language_tiny", {**SMALL, "pretrained": folder}, None, LanguageModel, "language model")
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in net.state_dict().items())
    assert all(p.requires_grad for p in net.parameters()) and net.training
    assert "pretrained" not in net.config["options"]


def test_a_classifier_takes_the_backbone_and_the_table_of_a_language_model(language, caplog):
    model, folder = language
    net = classifier(folder)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, net.backbone.state_dict()[name]), name
    assert torch.equal(net.embedding.weight, model.model.embedding.weight)
    assert "head.1.weight" in caplog.text and "backbone" not in caplog.text.split("stay")[1]


def test_frozen_trains_the_head_alone(language):
    net = classifier(language[1], frozen=True)
    assert {n for n, p in net.named_parameters() if p.requires_grad} == {"head.1.weight", "head.1.bias"}


def test_updates_are_trained_and_folded_into_what_is_saved(language, tmp_path):
    _, folder = language
    net = classifier(folder, lora=2)
    free = {n for n, p in net.named_parameters() if p.requires_grad}
    assert {"head.1.weight", "head.1.bias"} < free and has_lora(net)
    assert all(n.startswith("head.") or n.endswith(("lora_a", "lora_b")) for n in free)
    for name, parameter in net.named_parameters():
        if name.endswith("lora_b"):
            torch.nn.init.normal_(parameter)
    (tokens,) = net.example_inputs(2)
    saved = load_model(save_model(net, tmp_path / "tuned"))
    assert not has_lora(saved) and set(saved.state_dict()) == set(classifier(None).state_dict())
    torch.testing.assert_close(saved(tokens).y, net.eval()(tokens).y, atol=1e-5, rtol=1e-5)


def test_what_does_not_go_together(language):
    _, folder = language
    with pytest.raises(UserError, match="need weights to start from"):
        classifier(None, frozen=True)
    with pytest.raises(UserError, match=r"model\.pretrained=.*does not fit the SequenceClassifier: backbone\.blocks"):
        classifier(folder, dim=32)
    with pytest.raises(UserError, match=r"model\.pretrained=nowhere: .*no such folder"):
        classifier("nowhere")


def test_the_words_need_no_plus():
    words = ["model.pretrained=runs/x/model", "model.lora=4", "+model.frozen=true", "model.dim=3"]
    assert parse_arguments("fit", words).overrides == [
        "++model.pretrained=runs/x/model",
        "++model.lora=4",
        "+model.frozen=true",
        "model.dim=3",
    ]
