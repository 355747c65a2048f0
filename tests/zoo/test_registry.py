"""Names, tags and filters of the registry; weights by tag, with records that the tests register."""

import json
import logging
import subprocess
import sys

import pytest
import torch

from seqzoo.zoo import (
    Weights,
    create_model,
    list_models,
    load_backbone,
    load_model,
    model_info,
    register_model,
    register_weights,
    save_model,
    weights_info,
)
from seqzoo.zoo import _registry as registry
from seqzoo.zoo import _weights as weights
from seqzoo.zoo._files import file_sha256

RESULTS = [{"method": "ours", "accuracy": 0.9, "clips": 30}, {"method": "majority", "accuracy": 0.5, "clips": 30}]


@pytest.fixture
def no_weights(tmp_path, monkeypatch):
    """None ship and none are registered."""
    monkeypatch.setattr(weights, "weights_folder", lambda: tmp_path / "weights")
    monkeypatch.setattr(weights, "_REGISTERED", {})
    return tmp_path / "weights"


def ship(home, name, tag, *, default=False, **options):
    """A trained model where those that ship lie."""
    torch.manual_seed(len(tag))
    model = create_model(name, **options).eval()
    record = {"tag": tag, "results": RESULTS, "metric": "accuracy", "default": default, "license": "PSF-2.0"}
    save_model(model, home / f"{name}.{tag}", preprocessing={"labels": ["a", "b"]}, record=record)
    return model


@pytest.fixture
def shipped(no_weights):
    return {
        "one": ship(no_weights, "classifier_tiny", "one", num_classes=3, dim=16, depth=1),
        "two": ship(no_weights, "classifier_tiny", "two", num_classes=4, dim=32, depth=1, default=True),
        "stdlib": ship(no_weights, "hybrid_tiny", "stdlib"),
    }


def test_filters():
    assert list_models("mamba2_*") == ["mamba2_base", "mamba2_small", "mamba2_tiny"]
    assert list_models("") == list_models() == sorted(list_models())
    both = list_models(["mamba_*", "gla_t*"], exclude="*_base")
    assert both == ["gla_tiny", "mamba_small", "mamba_tiny"]
    assert list_models(["mamba_*"], exclude=["*_base", "*_small"]) == ["mamba_tiny"]
    assert list_models("nothing_*") == []


def test_tasks_modalities_and_mixers():
    assert set(list_models(modality="series")) == set(list_models(task="forecasting")) >= {"informer", "patch_tiny"}
    assert {"classifier_tiny", "hybrid_tiny"} <= set(list_models(modality="text"))
    assert set(list_models(modality="video")) == {n for n in list_models() if model_info(n).task.startswith("video")}
    mamba2 = list_models(mixer="mamba2", task="text")
    assert {"hybrid_tiny", "mamba2_tiny"} <= set(mamba2) and "mamba_tiny" not in mamba2
    assert "hybrid_tiny" in list_models(mixer="softmax")
    # A family whose mixer is no option says what it is, and says the truth.
    for name in ("transnormer_tiny", "bi_former_tiny", "informer", "agent_deit_tiny", "bert_tiny"):
        own = model_info(name).mixers
        given = {"seq_len": 32, "pred_len": 8, "in_channels": 1} if name == "informer" else {}
        built = {type(part).__name__ for part in create_model(name, **given).modules()}
        assert {registry_class(mixer) for mixer in own if mixer != "softmax"} <= built and own


def registry_class(mixer):
    from seqzoo import mixer_info

    return mixer_info(mixer).cls.__name__


def test_features_only_lists_those_that_give_them():
    found = list_models(features_only=True)
    assert "dlinear" not in found and set(found) < set(list_models())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"task": "forcasting"}, "unknown task 'forcasting'. Did you mean forecasting"),
        ({"modality": "vidio"}, "Did you mean video"),
        ({"mixer": "mamba3"}, "Did you mean mamba"),
    ],
)
def test_unknown_filters_name_the_nearest(arguments, message):
    with pytest.raises(ValueError, match=message):
        list_models(**arguments)


def test_unknown_names_and_options():
    with pytest.raises(ValueError, match=r"unknown model 'mamba2_tin'. Did you mean mamba2_tiny"):
        create_model("mamba2_tin")
    with pytest.raises(ValueError, match=r"has no option 'detph'. Did you mean depth"):
        create_model("mamba2_tiny", detph=2)
    with pytest.raises(ValueError, match="patch_tiny' needs seq_len, pred_len, in_channels"):
        create_model("patch_tiny")
    with pytest.raises(ValueError, match="has no option 'num_classes'"):
        create_model("mamba2_tiny", num_classes=3)
    with pytest.raises(ValueError, match="features_only=True"):
        create_model("mamba2_tiny", out_indices=[0])


def test_nothing_ships(no_weights):
    assert list_models(pretrained=True) == []
    with pytest.raises(ValueError, match="no weights for 'mamba2_tiny'; none ship yet"):
        create_model("mamba2_tiny", pretrained=True)


def test_lists_of_weights(shipped):
    assert list_models(pretrained=True) == ["classifier_tiny.one", "classifier_tiny.two", "hybrid_tiny.stdlib"]
    assert list_models("classifier_*", pretrained=True, exclude="*.one") == ["classifier_tiny.two"]
    assert list_models("*tiny", pretrained=True) == list_models(pretrained=True), "a wildcard may leave out the tag"
    assert list_models(pretrained=True, task="text") == ["hybrid_tiny.stdlib"]
    assert model_info("classifier_tiny").tags == ["two", "one"], "the default first"
    assert "classifier_tiny" in list_models(), "tags are no names of models"


@pytest.mark.parametrize(
    ("name", "tag"), [("classifier_tiny.one", "one"), ("classifier_tiny", "two"), ("classifier_tiny.two", "two")]
)
def test_weights_by_tag(shipped, name, tag):
    wanted = shipped[tag]
    for model in (create_model(name, pretrained=True), load_model(name)):
        assert {k: v.shape for k, v in model.state_dict().items()} == {
            k: v.shape for k, v in wanted.state_dict().items()
        }
        assert all(torch.equal(v, wanted.state_dict()[k]) for k, v in model.state_dict().items())
        assert model.preprocessing == {"labels": ["a", "b"]} and model.config == wanted.config
    assert create_model(name, pretrained=True).training and not load_model(name).training
    (tokens,) = wanted.example_inputs()
    assert torch.equal(load_model(name)(tokens).y, wanted(tokens).y)
    assert torch.equal(
        load_backbone(name)(torch.ones(1, 3, wanted.backbone.dim)).y,
        wanted.backbone(torch.ones(1, 3, wanted.backbone.dim)).y,
    )


def test_a_tag_without_weights_takes_their_options(shipped):
    model = create_model("classifier_tiny.one", proj_drop=0.25)
    assert model.backbone.dim == 16 and model.backbone.depth == 1
    assert model.config == {
        "name": "classifier_tiny",
        "options": {"num_classes": 3, "dim": 16, "depth": 1, "proj_drop": 0.25},
    }
    assert not all(torch.equal(v, shipped["one"].state_dict()[k]) for k, v in model.state_dict().items())


def test_a_new_head_on_pretrained_weights(shipped, caplog):
    with caplog.at_level(logging.WARNING):
        model = create_model("classifier_tiny.one", pretrained=True, num_classes=9)
    assert "the head starts anew" in caplog.text
    mine = shipped["one"].state_dict()
    assert all(torch.equal(v, mine[k]) for k, v in model.state_dict().items() if not k.startswith("head."))
    extractor = create_model("hybrid_tiny", pretrained=True, features_only=True, out_indices=[-1]).eval()
    (tokens,) = shipped["stdlib"].example_inputs()
    wanted = shipped["stdlib"].forward_intermediates(tokens, indices=[-1], intermediates_only=True)
    assert torch.equal(extractor(tokens)[0], wanted[0])
    with pytest.raises(ValueError, match=r"misshaped: backbone\.blocks\.0"):
        create_model("classifier_tiny.one", pretrained=True, dim=32)


def test_unknown_tags_and_models_without_weights(shipped):
    with pytest.raises(ValueError, match=r"no weights with the tag 'stdlb'. Did you mean stdlib"):
        create_model("hybrid_tiny.stdlb", pretrained=True)
    with pytest.raises(
        ValueError, match=r"no weights for 'gla_tiny'; there are for classifier_tiny.one, .*hybrid_tiny.stdlib"
    ):
        create_model("gla_tiny", pretrained=True)
    with pytest.raises(ValueError, match="no weights for 'hybrid_tin'"):
        create_model("hybrid_tin.stdlib", pretrained=True)
    with pytest.raises(ValueError, match=r"weights that ship: classifier_tiny.one"):
        load_model("hybrid_tin.stdlib")


def test_the_record_s_hash_is_the_pin(shipped, no_weights):
    """Other weights with a config of their own that agrees with them: the record knows better."""
    folder = no_weights / "classifier_tiny.one"
    elsewhere = no_weights.parent / "elsewhere"
    save_model(create_model("classifier_tiny", num_classes=3, dim=16, depth=1), elsewhere)
    record = weights_info("classifier_tiny.one")
    register_weights(Weights(**{**vars(record), "tag": "pinned", "source": str(elsewhere)}))
    with pytest.raises(
        ValueError, match=rf"{file_sha256(elsewhere / 'model.safetensors')}, its record says {record.sha256}"
    ):
        create_model("classifier_tiny.pinned", pretrained=True)
    assert folder.is_dir()


def test_records_of_one_s_own(no_weights, tmp_path):
    model = create_model("gla_tiny")
    folder = save_model(model, tmp_path / "mine")
    record = Weights(
        model="gla_tiny",
        tag="mine",
        source=str(folder),
        sha256=file_sha256(folder / "model.safetensors"),
        num_parameters=1,
        results=RESULTS,
    )
    assert register_weights(record) is register_weights(record)
    assert list_models(pretrained=True) == ["gla_tiny.mine"] and record.name == "gla_tiny.mine"
    assert record.metrics == {"accuracy": 0.9, "clips": 30.0}
    loaded = create_model("gla_tiny", pretrained=True)
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in loaded.state_dict().items())
    with pytest.raises(ValueError, match="already known"):
        register_weights(Weights(**{**vars(record), "license": "MIT"}))
    for wrong, message in (({"tag": "a.b"}, "small letters"), ({"sha256": "abc"}, "64 hexadecimal digits")):
        with pytest.raises(ValueError, match=message):
            Weights(**{**vars(record), **wrong})


def test_a_folder_that_ships_must_hold_its_record(no_weights):
    ship(no_weights, "gla_tiny", "one")
    path = no_weights / "gla_tiny.one" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "record": {**config["record"], "tag": "two"}}))
    with pytest.raises(ValueError, match=r"must hold the record of the weights 'gla_tiny.one'"):
        list_models(pretrained=True)
    path.write_text(json.dumps({**config, "record": {**config["record"], "licence": "MIT"}}))
    with pytest.raises(ValueError, match="unknown fields licence"):
        list_models(pretrained=True)


def test_what_ships_is_whole():
    """Every folder in zoo/weights loads, is small enough, and knows its licence, its data and its baselines."""
    total = 0
    for name in list_models(pretrained=True):
        record = weights_info(name)
        size = (weights.weights_folder() / name / "model.safetensors").stat().st_size
        total += size
        assert size <= 8 << 20, name
        assert record.license and record.data and record.command and record.purpose and record.limits, name
        assert len(record.results) >= 2 and record.metric in record.metrics, name
        load_model(name)
    assert total <= 48 << 20


def test_names_of_models():
    with pytest.raises(ValueError, match="already taken"):

        @register_model(torch.nn.Linear, task="text", paper="")
        def mamba2_tiny(**options):
            """Another of the same name."""

    def dotted(**options):
        """A name with a dot."""

    dotted.__name__ = "a.b"
    with pytest.raises(ValueError, match="holds a dot"):
        register_model(torch.nn.Linear, task="text", paper="")(dotted)
    assert "a.b" not in registry._REGISTRY


def test_importing_and_loading_needs_neither_lightning_nor_transformers(tmp_path):
    """At the door nothing is imported; building, saving and loading a model needs neither them nor the hub."""
    code = (
        "import sys, seqzoo\n"
        "heavy = ('lightning', 'transformers', 'huggingface_hub', 'hydra', 'timm', 'pandas', 'datasets')\n"
        "assert 'torch' not in sys.modules\n"
        f"folder = seqzoo.save_model(seqzoo.create_model('hybrid_tiny'), {str(tmp_path / 'm')!r})\n"
        "seqzoo.load_model(folder); seqzoo.list_models(pretrained=True)\n"
        "print([name for name in heavy if name in sys.modules])\n"
    )
    result = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr
