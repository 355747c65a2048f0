"""Checkpoints and saved models that someone else wrote: see test_hostile.py."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from payloads import Payload
from safetensors.torch import save_file

from seqzoo.pipelines.checkpoints import load_checkpoint, saved_parameters
from seqzoo.pipelines.errors import UserError
from seqzoo.zoo import create_model, load_model, save_model
from seqzoo.zoo._files import file_sha256, read_state

ROOT = Path(__file__).parents[2]
CORPUS = ROOT / "tests" / "data" / "fuzz"

pytestmark = pytest.mark.usefixtures("canary")


def _checkpoint(**content: Any) -> Path:
    path = Path("some.ckpt")
    torch.save({"state_dict": {}, **content}, path)
    return path


def test_a_checkpoint_with_a_payload_is_not_read(canary: Path) -> None:
    path = _checkpoint(hyper_parameters=Payload(canary))
    with pytest.raises(UserError, match="holds more than tensors and plain values"):
        load_checkpoint(path)
    path.write_bytes(pickle.dumps(Payload(canary)))
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        load_checkpoint(path)


def test_a_target_in_a_checkpoints_hyper_parameters_is_not_imported(canary: Path, tmp_path: Path) -> None:
    from seqzoo.pipelines.nets import mixer_class

    (tmp_path / "evil_saved.py").write_text(f"import os\nos.mkdir({str(canary)!r})\n")
    sections = {key: {} for key in ("task", "optimizer", "scheduler", "schema")}
    for target in ("evil_saved.Mixer", "os.mkdir", "seqzoo.pipelines.cli.main"):
        path = _checkpoint(hyper_parameters={**sections, "model": {"name": "x", "mixer": {"_target_": target}}})
        saved = saved_parameters(load_checkpoint(path), "forecasting", path)
        with pytest.raises(UserError, match="_target_"):
            mixer_class(saved["model"], {"command_line_targets": []})
    assert "evil_saved" not in sys.modules


@pytest.mark.parametrize("saved", [None, 3, [], {"model": 3}, "task", {"task": []}])
def test_hyper_parameters_that_are_none(saved: Any) -> None:
    keys: dict[str, Any] = {key: {} for key in ("model", "task", "optimizer", "scheduler", "schema")}
    content = {**keys, **saved} if isinstance(saved, dict) else saved
    path = _checkpoint(hyper_parameters=content)
    with pytest.raises(UserError, match="no forecasting checkpoint"):
        saved_parameters(load_checkpoint(path), "forecasting", path)


def test_a_checkpoint_that_would_unpack_to_more_than_it_is() -> None:
    path = _checkpoint(big=torch.zeros(1 << 20))
    with zipfile.ZipFile(path) as whole, zipfile.ZipFile("bomb.ckpt", "w", zipfile.ZIP_DEFLATED) as bomb:
        for part in whole.namelist():
            bomb.writestr(part, whole.read(part))
    assert Path("bomb.ckpt").stat().st_size < 1 << 16
    with pytest.raises(UserError, match="truncated or not a checkpoint"):
        load_checkpoint("bomb.ckpt")


def test_arrays_with_objects_are_not_unpickled(canary: Path) -> None:
    """Our caches are .npy files; NumPy reads objects in one only where it is told to."""
    from seqzoo.pipelines.documents.lra.image import read_batch

    np.save("a.npy", np.array([Payload(canary)], dtype=object), allow_pickle=True)
    np.savez("a.npz", x=np.array([Payload(canary)], dtype=object))
    for read in (lambda: np.load("a.npy"), lambda: np.load("a.npz")["x"]):
        with pytest.raises(ValueError, match="allow_pickle"):
            read()
    Path("data_batch_1").write_bytes(pickle.dumps({"data": Payload(canary)}))
    with pytest.raises(UserError, match="not read"):
        read_batch(Path("data_batch_1"))


def test_no_line_of_the_library_unpickles() -> None:
    """Whoever adds one says here why it is safe."""
    known = {
        "blocks/testing/basics.py": "pickle.loads",  # of what it pickled itself
        "pipelines/documents/lra/image.py": "pickle.Unpickler",  # knows the names of arrays only
    }
    words = ("pickle.load", "pickle.Unpickler", "allow_pickle=True", "weights_only=False", "yaml.load(", "unsafe_load",
             "yaml.full_load", "joblib", "shelve", "marshal", "extractall", "unpack_archive", "shell=True", "os.system",
             " eval(", " exec(")  # fmt: skip
    found = {}
    for folder in ("kernels", "blocks", "zoo", "pipelines", "seqzoo"):
        for path in (ROOT / folder).rglob("*.py"):
            for word in words:
                name = path.relative_to(ROOT).as_posix()
                if word in path.read_text(encoding="utf-8") and not known.get(name, "-").startswith(word):
                    found[name] = word
    assert not found


# saved models ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save_model(
        create_model("patch_tiny", seq_len=48, pred_len=12, in_channels=2, mixer="linear"), tmp_path / "m"
    )


def _edit(folder: Path, **options: Any) -> None:
    path = folder / "config.json"
    record = json.loads(path.read_text())
    record["options"].update(options)
    path.write_text(json.dumps(record))


HUGE: list[dict[str, Any]] = [
    {"dim": 1 << 14},
    {"dim": 1 << 40},
    {"depth": 10**9},
    {"seq_len": 10**12},
    {"pred_len": 10**9},
    {"in_channels": 10**12},
    {"dim": 10**400},
    {"mixer": {"name": "s4d", "d_state": 1 << 40}},
    {"mixer": {"name": "long_vq", "codebook_size": 1 << 40}},
]


_LOADING = """
import json, resource, sys
from seqzoo.zoo import load_model
load_model(sys.argv[1])
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (3 << 30),) * 2)
resource.setrlimit(resource.RLIMIT_CPU, (120, 120))
for folder in sys.argv[2:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        said = f"{load_model(folder)} was built"
    except ValueError as error:
        said = str(error)
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
    print(json.dumps([said, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10]), flush=True)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits and /proc of Linux")
def test_configs_that_ask_for_a_huge_model(saved: Path) -> None:
    """Refused before it is allocated: each grows the process by less than 512 MiB, all take less than 2 minutes of
    CPU."""
    folders = []
    for number, options in enumerate(HUGE):
        folders.append(Path(f"huge{number}"))
        shutil.copytree(saved, folders[-1])
        _edit(folders[-1], **options)
    command = [sys.executable, "-c", _LOADING, str(saved), *map(str, folders)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    for options, folder, (said, grew) in zip(HUGE, folders, answers, strict=False):
        assert str(folder) in said and "was built" not in said, (options, said)
        assert grew < 512, (options, grew)
    assert done.returncode == 0 and len(answers) == len(HUGE), done.stderr


def test_a_header_of_exabytes_costs_nothing(saved: Path) -> None:
    path = saved / "model.safetensors"
    content = path.read_bytes()
    claims = {"exabytes": 1 << 60, "all": (1 << 64) - 1, "more than any header": 200_000_000}
    for claimed in claims.values():
        with path.open("wb") as file:
            file.write(claimed.to_bytes(8, "little") + content[8:])
            file.truncate(300_000_000)  # sparse
        tracemalloc.start()
        with pytest.raises(ValueError, match="header claims"):
            read_state(path)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
        tracemalloc.stop()


@pytest.mark.parametrize("offset", ["1e999", "9" * 5000, '"x"', "null", "{}", "[]"])
def test_offsets_that_are_no_numbers(offset: str) -> None:
    header = f'{{"w":{{"dtype":"F32","shape":[1],"data_offsets":[0,{offset}]}}}}'.encode()
    Path("w").write_bytes(len(header).to_bytes(8, "little") + header + b"\0" * 4)
    with pytest.raises(ValueError, match="w is no safetensors file"):
        read_state(Path("w"))


@pytest.mark.parametrize(
    "text", ['{"name": ' + "9" * 5000 + "}", '{"name": "a", "options": ' + '{"a":' * 900 + "1" + "}" * 901]
)
def test_numbers_and_depths_that_json_allows(saved: Path, text: str) -> None:
    (saved / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config\.json|unknown model|sha256"):
        load_model(saved)


def test_a_safetensors_file_that_is_a_pickle(saved: Path, canary: Path) -> None:
    path = saved / "model.safetensors"
    torch.save({"w": Payload(canary)}, path)
    record = json.loads((saved / "config.json").read_text())
    (saved / "config.json").write_text(json.dumps({**record, "sha256": file_sha256(path)}))
    with pytest.raises(ValueError, match="is a pickle"):
        load_model(saved)


@pytest.mark.parametrize("where", ["options", "preprocessing", "record"])
def test_a_target_anywhere_in_a_saved_config(saved: Path, where: str) -> None:
    path = saved / "config.json"
    record = json.loads(path.read_text())
    record[where] = {**record.get(where, {}), "a": [{"b": {"_target_": "os.mkdir", "path": "canary"}}]}
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match="holds '_target_'"):
        load_model(saved)


def test_weights_of_a_small_file_are_not_refused() -> None:
    """The bound leaves room: what ships and what the caller overrides is built."""
    save_file({"a": torch.ones(2)}, "a")
    folder = save_model(create_model("dlinear", seq_len=8, pred_len=2, in_channels=1), "d")
    assert load_model(folder).config["options"]["pred_len"] == 2
