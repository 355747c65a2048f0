"""Saving and loading: equal outputs, what lies beside the weights; wrong and hostile folders are refused."""

import errno
import json
import logging
import os
import pickle
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from seqzoo.blocks.backbone import Backbone
from seqzoo.zoo import _files as files
from seqzoo.zoo import create_model, load_backbone, load_model, read_config, save_model
from seqzoo.zoo._files import file_sha256
from seqzoo.zoo._limits import BoundedBuilding


@pytest.fixture
def saved(tmp_path):
    model = create_model("patch_tiny", seq_len=48, pred_len=12, in_channels=2, mixer="linear").eval()
    return model, save_model(model, tmp_path / "model", preprocessing={"freq": "h"})


def batch():
    return {"past_target": torch.randn(2, 48, 2)}


def edit(folder, **changes):
    path = folder / "config.json"
    record = json.loads(path.read_text())
    record.update(changes)
    path.write_text(json.dumps(record))


def put(folder, content):
    """Other bytes in place of the weights, with their own sha256 in the config: only what they are can refuse them."""
    path = folder / "model.safetensors"
    path.write_bytes(content)
    edit(folder, sha256=file_sha256(path))


def test_round_trip(saved):
    model, folder = saved
    again = load_model(folder)
    inputs = batch()
    assert torch.equal(again(inputs), model(inputs))
    assert not again.training and again.preprocessing == {"freq": "h"}
    assert json.loads((folder / "config.json").read_text())["preprocessing"] == {"freq": "h"}
    assert sorted(p.name for p in folder.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    assert load_model(str(folder)).config == model.config


def test_what_was_loaded_is_saved_again(saved, tmp_path):
    """Preprocessing and files go on, the weights are the same bytes."""
    model, _ = saved
    (tmp_path / "bpe.json").write_text('{"vocab": 1}')
    first = save_model(
        model, tmp_path / "a", preprocessing={"labels": ["x"]}, files={"tokenizer.json": tmp_path / "bpe.json"}
    )
    second = save_model(load_model(first), tmp_path / "b")
    assert (second / "config.json").read_text() == (first / "config.json").read_text()
    assert file_sha256(first / "model.safetensors") == file_sha256(second / "model.safetensors")
    loaded = load_model(second)
    assert loaded.files["tokenizer.json"].read_text() == '{"vocab": 1}'
    (second / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json has sha256"):
        load_model(second)
    (second / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        load_model(second)


def test_bf16_halves_the_file_and_rounds_the_weights(saved, tmp_path):
    model, folder = saved
    half = save_model(model, tmp_path / "half", dtype="bfloat16")
    sizes = [(f / "model.safetensors").stat().st_size for f in (folder, half)]
    assert sizes[1] < 0.6 * sizes[0]
    loaded = load_model(half)
    for name, value in model.state_dict().items():
        got = loaded.state_dict()[name]
        assert got.dtype == value.dtype and torch.equal(got, value.to(torch.bfloat16).to(value.dtype))
    with pytest.raises(ValueError, match="dtype='int8'"):
        save_model(model, tmp_path / "x", dtype="int8")


def test_load_backbone(saved):
    model, folder = saved
    backbone = load_backbone(folder)
    assert isinstance(backbone, Backbone) and not backbone.training
    x = torch.randn(2, 6, 32)
    assert torch.equal(backbone(x).y, model.model.backbone(x).y)


def test_load_backbone_where_there_is_none(tmp_path):
    model = create_model("dlinear", seq_len=8, pred_len=2, in_channels=1)
    with pytest.raises(ValueError, match="DLinear holds no Backbone"):
        load_backbone(save_model(model, tmp_path / "d"))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "_orig_mod.module._orig_mod."])
def test_prefixes_are_stripped_at_loading(saved, prefix):
    model, folder = saved
    state = {prefix + k: v for k, v in load_file(folder / "model.safetensors").items()}
    save_file(state, folder / "again")
    put(folder, (folder / "again").read_bytes())
    inputs = batch()
    assert torch.equal(load_model(folder)(inputs), model(inputs))


def test_compiled_prefixes_are_stripped_at_saving(saved, tmp_path):
    model, _ = saved
    wrapped = torch.nn.DataParallel(model)
    wrapped.config = model.config
    folder = save_model(wrapped, tmp_path / "wrapped")
    assert set(load_file(folder / "model.safetensors")) == set(model.state_dict())


def test_another_head_keeps_the_backbone_and_says_so(tmp_path, caplog):
    model = create_model("classifier_tiny", num_classes=4)
    folder = save_model(model, tmp_path / "m")
    with caplog.at_level(logging.WARNING):
        other = load_model(folder, num_classes=7)
    assert "the head starts anew" in caplog.text and "head.1.weight" in caplog.text and "blocks" not in caplog.text
    assert other.config["options"]["num_classes"] == 7
    mine, theirs = model.state_dict(), other.state_dict()
    assert all(torch.equal(theirs[k], mine[k]) for k in mine if not k.startswith("head."))
    assert theirs["head.1.weight"].shape == (7, 64)
    caplog.clear()
    bare = load_model(folder, num_classes=0)
    assert not caplog.text and not [k for k in bare.state_dict() if k.startswith("head.")]
    # A head that fits is taken over, whatever else was overridden.
    assert torch.equal(load_model(folder, proj_drop=0.5).state_dict()["head.1.weight"], mine["head.1.weight"])


def test_another_horizon_and_another_vocabulary(saved, tmp_path):
    model, folder = saved
    longer = load_model(folder, pred_len=20, loss="quantile")
    assert torch.equal(
        longer.model.backbone.blocks[0].norm_mixer.weight, model.model.backbone.blocks[0].norm_mixer.weight
    )
    language = create_model("language_tiny", mixer="linear")
    more = load_model(save_model(language, tmp_path / "l"), vocab_size=300)
    assert torch.equal(more.backbone.blocks[1].mixer.q_proj.weight, language.backbone.blocks[1].mixer.q_proj.weight)
    assert more(torch.tensor([[299]])).y.shape[-1] == 300


def test_other_mismatches_are_listed_by_name(saved):
    _, folder = saved
    with pytest.raises(ValueError, match=r"misshaped: .*k_proj\.weight \(32, 32\) instead of \(48, 48\)"):
        load_model(folder, dim=48)
    with pytest.raises(ValueError, match=r"missing: .*blocks\.1\..* and \d+ more"):
        load_model(folder, depth=2)
    with pytest.raises(ValueError, match="Did you mean depth"):
        load_model(folder, dept=2)


def test_without_an_override_a_head_must_fit(saved):
    _, folder = saved
    state = load_file(folder / "model.safetensors")
    del state["model.head.proj.bias"]
    save_file(state, folder / "again")
    put(folder, (folder / "again").read_bytes())
    with pytest.raises(ValueError, match=r"missing: model\.head\.proj\.bias"):
        load_model(folder)


def test_wrong_hash_prints_both(saved):
    _, folder = saved
    edit(folder, sha256="0" * 64)
    with pytest.raises(ValueError, match=r"sha256 [0-9a-f]{64}.*0{64}"):
        load_model(folder)
    edit(folder, sha256=None)
    with pytest.raises(ValueError, match="its config says None"):
        load_model(folder)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_renamed_is_not_opened(saved, tmp_path):
    _, folder = saved
    proof = tmp_path / "exploded"
    torch.save({"w": torch.zeros(1), "b": Bomb(str(proof))}, tmp_path / "zip.pt")
    for content in ((tmp_path / "zip.pt").read_bytes(), pickle.dumps(Bomb(str(proof)), protocol=2)):
        put(folder, content)
        with pytest.raises(ValueError, match="is a pickle"):
            load_model(folder)
    assert not proof.exists()


@pytest.mark.parametrize("length", [0x80, 0x180, int.from_bytes(b"PK", "little")])
def test_a_header_as_long_as_a_pickle_begins_is_read(tmp_path, length):
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    content = torch.tensor([1.0, -2.0]).numpy().tobytes()
    path = tmp_path / "model.safetensors"
    path.write_bytes(length.to_bytes(8, "little") + header.ljust(length) + content)
    assert files.read_state(path)["w"].tolist() == [1.0, -2.0]


def test_headers_that_lie(saved):
    _, folder = saved
    good = (folder / "model.safetensors").read_bytes()
    length = int.from_bytes(good[:8], "little")
    cases = {
        "claims 1,152,921,504,606,846,976 bytes": (1 << 60).to_bytes(8, "little") + good[8:],
        "cut off or overlong": good[:-4],
        "cut off or no safetensors": good[:200],
        "header claims 0 bytes, the file has 0": b"",
        "header is not what it should be": good[:8] + b"[" * length + good[8 + length :],
        "overlong": good + b"more",
    }
    for message, content in cases.items():
        put(folder, content)
        with pytest.raises(ValueError, match=message):
            load_model(folder)
    # Offsets beyond the file, in a header of the right length.
    header = json.loads(good[8 : 8 + length])
    first = next(k for k in header if k != "__metadata__")
    header[first]["data_offsets"][1] = 1 << 60
    text = json.dumps(header).encode()
    put(folder, len(text).to_bytes(8, "little") + text + good[8 + length :])
    with pytest.raises(ValueError, match="its tensors need 1,152,921,504"):
        load_model(folder)


def test_newer_schema_and_targets_are_refused(saved):
    _, folder = saved
    edit(folder, schema_version=99)
    with pytest.raises(ValueError, match=r"schema version 99.*pip install -U"):
        load_model(folder)
    for options in ({"mixer": {"_target_": "os.system"}}, {"mixer": [{"name": "linear", "_partial_": True}]}):
        edit(folder, schema_version=1, options=options)
        with pytest.raises(ValueError, match=r"_target_|_partial_"):
            load_model(folder)


def test_the_first_schema_is_read(saved):
    model, folder = saved
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({k: config[k] for k in ("name", "options", "preprocessing", "sha256")} | {"schema_version": 1})
    )
    inputs = batch()
    assert torch.equal(load_model(folder)(inputs), model(inputs))


def test_configs_that_are_none(saved, monkeypatch):
    _, folder = saved
    path, good = folder / "config.json", (folder / "config.json").read_text()
    cases = {
        "not valid JSON": ["{", "\x00", "[" * 100_000, ""],
        "holds a list": ["[]"],
        "no model name": ["{}", '{"name": 3}'],
        "options is a list": [good.replace('"options": {', '"options": [], "was": {')],
    }
    for message, texts in cases.items():
        for text in texts:
            path.write_text(text)
            with pytest.raises(ValueError, match=message):
                load_model(folder)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not valid JSON"):
        load_model(folder)
    with path.open("wb") as file:
        file.truncate(files.MAX_CONFIG_BYTES + 1)  # sparse: nothing is written and nothing must be read
    with pytest.raises(ValueError, match="it is not read"):
        load_model(folder)


@pytest.mark.parametrize("name", ["../outside", "a/b", "/etc/passwd", ".hidden", "..", "config.json", "a..b", ""])
def test_names_that_lead_out_of_the_folder(saved, tmp_path, name):
    model, folder = saved
    edit(folder, files={name: "0" * 64})
    with pytest.raises(ValueError, match="only plain file names"):
        load_model(folder)
    with pytest.raises(ValueError, match="only plain file names"):
        save_model(model, tmp_path / "x", files={name: folder / "README.md"})


@pytest.mark.parametrize("name", ["../../etc/passwd", "os.system", "patch_tin"])
def test_a_config_that_names_no_model(saved, name):
    _, folder = saved
    edit(folder, name=name)
    with pytest.raises(ValueError, match="unknown model"):
        load_model(folder)


def test_an_unknown_mixer_is_named_and_not_imported(saved):
    _, folder = saved
    options = json.loads((folder / "config.json").read_text())["options"]
    for mixer, message in (("linea", "Did you mean linear"), ("os.system", "unknown mixer 'os.system'")):
        edit(folder, options={**options, "mixer": mixer})
        with pytest.raises(ValueError, match=message):
            load_model(folder)


def test_a_config_cannot_make_us_read_other_files(tmp_path, monkeypatch):
    """`encoder.weights` of a video model names a file or the hub; in a saved model they are all in its own."""
    pytest.importorskip("timm", reason="needs seqzoo[video]")
    from seqzoo.zoo import _frames
    from seqzoo.zoo._loading import without_sources

    options = {"encoder": {"name": "mobilenetv3_small_050", "image_size": 32}, "dim": 16, "depth": 1}
    folder = save_model(create_model("video_classifier_tiny", **options), tmp_path / "v")
    monkeypatch.setattr(_frames, "read_weights", lambda *_: pytest.fail("a file was read"))
    options["encoder"]["weights"] = "/etc/passwd"
    edit(folder, options=options)
    load_model(folder)
    assert without_sources({"a": [{"weights": "hub"}], "weights": 3}) == {"a": [{"weights": None}], "weights": 3}


def test_links_are_followed(saved, tmp_path):
    """As the hub's cache lays them out: the files of a snapshot are links to others."""
    model, folder = saved
    (tmp_path / "blobs").mkdir()
    for path in list(folder.iterdir()):
        target = tmp_path / "blobs" / path.name
        path.rename(target)
        path.symlink_to(target)
    inputs = batch()
    assert torch.equal(load_model(folder)(inputs), model(inputs))
    (tmp_path / "blobs" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        load_model(folder)


def test_not_a_folder_of_ours(tmp_path, saved):
    _, folder = saved
    shutil.copytree(folder, tmp_path / "some" / "mine")
    with pytest.raises(ValueError, match=r"no config\.json; the folder mine in it is one"):
        load_model(tmp_path / "some")
    with pytest.raises(ValueError, match="made by create_model"):
        save_model(torch.nn.Linear(1, 1), tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"has no model\.safetensors"):
        load_model(folder)
    with pytest.raises(ValueError, match="no such folder, no weights of this name and no hub id"):
        load_model("nothing here")
    with pytest.raises(ValueError, match="is not a saved model"):
        read_config(tmp_path / "nothing")


def test_only_plain_values_are_written(tmp_path):
    model = create_model(
        "patch_tiny", seq_len=48, pred_len=12, in_channels=2, mixer=lambda dim, **kw: _linear(dim, **kw)
    )
    with pytest.raises(ValueError, match=r"options\.mixer holds a function"):
        save_model(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def _linear(dim, **options):
    from seqzoo.blocks.registry import create_mixer

    return create_mixer("linear", dim, **options)


def test_a_full_disk_leaves_the_old_model_whole(saved, tmp_path, monkeypatch):
    _, folder = saved
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    real = os.replace

    def full(source, target):
        if str(target).endswith("model.safetensors"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(ValueError, match="no space left on the disk"):
        save_model(create_model("patch_tiny", seq_len=48, pred_len=12, in_channels=2), folder)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


@pytest.mark.skipif(os.name != "posix", reason="permissions of POSIX")
def test_the_files_of_a_saved_model_are_as_open_as_the_umask_lets_them(tmp_path):
    old = os.umask(0o027)
    try:
        save_model(create_model("gla_tiny", dim=16, depth=1), tmp_path / "model")
    finally:
        os.umask(old)
    assert {path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "model").iterdir()} == dict.fromkeys(
        ("config.json", "model.safetensors", "README.md"), "0o640"
    )


def test_the_folder_of_a_run_names_its_model(tmp_path):
    save_model(create_model("gla_tiny", dim=16, depth=1), tmp_path / "run" / "model")
    for source in (tmp_path / "run", str(tmp_path / "run"), tmp_path / "run" / "model"):
        assert load_model(source).config["options"]["dim"] == 16
    save_model(create_model("gla_tiny", dim=32, depth=1), tmp_path / "run")  # a saved model that holds another
    assert load_model(tmp_path / "run").config["options"]["dim"] == 32


def test_loading_does_not_import_the_compiler(tmp_path):
    save_model(create_model("gla_tiny", dim=16, depth=1), tmp_path / "model")
    code = f"import sys, seqzoo; seqzoo.load_model({str(tmp_path / 'model')!r}); print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-1] == "False"


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.ones(1 << 44),
        lambda: torch.zeros(3).repeat(10**6, 10**7),
        lambda: torch.zeros(1 << 22, 1) * torch.zeros(1, 1 << 22),
        lambda: [torch.zeros(1 << 20) for _ in range(10_000)],
    ],
    ids=["a factory", "a repeat", "an outer product", "many small ones"],
)
def test_building_is_bounded_before_anything_is_allocated(make):
    with pytest.raises(ValueError, match="asks for a model of at least"), BoundedBuilding(1000, 1, "some/file"):
        make()


def test_what_a_model_needs_is_not_bounded():
    with BoundedBuilding(1 << 20, 10, "some/file"):
        kept = [torch.randn(256, 256).exp() for _ in range(50)]
    assert len(kept) == 50


def test_an_elementwise_operation_makes_what_its_tensors_broadcast_to():
    column, row = torch.zeros(2048, 1), torch.zeros(2048, dtype=torch.float64)
    with BoundedBuilding(1 << 20, 10, "some/file") as bound:
        torch.maximum(column, row)
    assert bound.made == 2048 * 2048 * 8
