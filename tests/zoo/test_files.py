"""Saving and loading: equal outputs, and folders that are wrong are refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from seqzoo.zoo import create_model, load_model, save_model


@pytest.fixture
def saved(tmp_path):
    model = create_model("patch_tiny", seq_len=48, pred_len=12, in_channels=2, mixer="linear").eval()
    return model, save_model(model, tmp_path / "model", preprocessing={"freq": "h"})


def batch():
    return {"past_target": torch.randn(2, 48, 2)}


def test_round_trip(saved):
    model, folder = saved
    again = load_model(folder)
    inputs = batch()
    assert torch.equal(again(inputs), model(inputs))
    assert not again.training
    assert json.loads((folder / "config.json").read_text())["preprocessing"] == {"freq": "h"}


def test_compiled_prefixes_are_stripped(saved, tmp_path):
    model, _ = saved
    wrapped = torch.nn.DataParallel(model)
    wrapped.config = model.config
    folder = save_model(wrapped, tmp_path / "wrapped")
    assert set(load_file(folder / "model.safetensors")) == set(model.state_dict())


def edit(folder, **changes):
    path = folder / "config.json"
    record = json.loads(path.read_text())
    record.update(changes)
    path.write_text(json.dumps(record))


def test_wrong_hash_prints_both(saved):
    _, folder = saved
    edit(folder, sha256="0" * 64)
    with pytest.raises(ValueError, match=r"sha256 [0-9a-f]{64}.*0{64}"):
        load_model(folder)


def test_truncated_weights_are_refused(saved):
    _, folder = saved
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="sha256"):
        load_model(folder)


def test_newer_schema_and_targets_are_refused(saved):
    _, folder = saved
    edit(folder, schema_version=99)
    with pytest.raises(ValueError, match="schema version 99"):
        load_model(folder)
    edit(folder, schema_version=1, options={"mixer": {"_target_": "os.system"}})
    with pytest.raises(ValueError, match="_target_"):
        load_model(folder)


def test_unknown_names_are_named(saved):
    _, folder = saved
    edit(folder, name="patch_tin")
    with pytest.raises(ValueError, match="Did you mean patch_tiny"):
        load_model(folder)


def test_misshaped_tensors_are_listed(saved):
    from seqzoo.zoo._files import file_sha256 as _sha256

    _, folder = saved
    path = folder / "model.safetensors"
    state = load_file(path)
    name = next(iter(state))
    del state[name]
    save_file(state, path)
    edit(folder, sha256=_sha256(path))
    with pytest.raises(ValueError, match=f"missing: {name}"):
        load_model(folder)


def test_not_a_folder_of_ours(tmp_path):
    with pytest.raises(ValueError, match=r"no config\.json"):
        load_model(tmp_path)
    with pytest.raises(ValueError, match="made by create_model"):
        save_model(torch.nn.Linear(1, 1), tmp_path)


def test_only_plain_values_are_written(tmp_path):
    model = create_model(
        "patch_tiny", seq_len=48, pred_len=12, in_channels=2, mixer=lambda dim, **kw: _linear(dim, **kw)
    )
    with pytest.raises(ValueError, match=r"options\.mixer holds a function"):
        save_model(model, tmp_path / "m")


def _linear(dim, **options):
    from seqzoo.blocks.registry import create_mixer

    return create_mixer("linear", dim, **options)
