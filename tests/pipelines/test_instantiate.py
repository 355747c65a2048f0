"""Building from `_target_`: what is allowed is built, what is hostile is never called."""

from __future__ import annotations

import builtins
import functools
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import CSVLogger, Logger

from seqzoo.blocks.protocol import Mixer
from seqzoo.pipelines.errors import UserError
from seqzoo.pipelines.instantiate import allowed_packages, resolve_mixer_target, safe_instantiate


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replace everything that a hostile config could call by a recorder."""
    made: list[str] = []

    def record(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def spy(*args: object, **kwargs: object) -> object:
            if name == "eval" and args != ("'owned'",):
                return original(*args, **kwargs)  # the standard library makes classes with it
            made.append(name)
            return None

        # what the object says of itself stays as it is, so that only the allow-list decides
        for attribute in ("__module__", "__qualname__"):
            setattr(spy, attribute, getattr(original, attribute, None))
        monkeypatch.setattr(owner, name, spy)

    record(os, "system")
    record(torch, "load")
    record(torch.hub, "load")
    record(builtins, "eval")
    record(pathlib.Path, "write_text")
    record(np, "load")
    record(subprocess, "run")
    return made


HOSTILE = [
    {"_target_": "os.system", "command": "touch owned"},
    {"_target_": "torch.load", "f": "x.ckpt", "weights_only": False},
    {"_target_": "torch.hub.load", "repo_or_dir": "a/b", "model": "c"},
    {"_target_": "builtins.eval", "_args_": ["'owned'"]},
    {"_target_": "pathlib.Path.write_text", "_args_": ["x", "y"]},
    {"_target_": "numpy.load", "file": "x.npy", "allow_pickle": True},
    {"_target_": "functools.partial", "_args_": [{"_target_": "os.system", "command": "x"}]},
    # aliases: allowed words at the front, something else behind them
    {"_target_": "torch.nn.modules.torch.hub.load", "repo_or_dir": "a/b", "model": "c"},
    {"_target_": "torch.optim.adamw.torch.load", "f": "x"},
    {"_target_": "lightning.pytorch.callbacks.os.system", "command": "x"},
    {"_target_": "seqzoo.pipelines.doctor.subprocess.run", "args": ["true"]},
    {"_target_": "seqzoo.pipelines.doctor.os.system", "command": "x"},
    # of an allowed kind, but reached through our module: it must be named where it lives
    {"_target_": "seqzoo.blocks.protocol.nn.Linear", "in_features": 1, "out_features": 1},
    # our own functions are no loophole either
    {"_target_": "seqzoo.pipelines.instantiate.safe_instantiate", "node": {"x": 1}, "allow": ["os"]},
    {"_target_": "seqzoo.pipelines.errors.UserError", "_args_": ["x"]},
    # nested, in options, lists and dicts
    {
        "_target_": "torch.nn.Linear",
        "in_features": {"_target_": "os.system", "command": "x"},
        "out_features": 1,
    },
    {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "builtins.eval", "_args_": ["'owned'"]}]},
    {
        "_target_": "lightning.pytorch.callbacks.EarlyStopping",
        "monitor": {"deep": [{"deeper": {"_target_": "torch.load", "f": "x"}}]},
    },
    {"_target_": "torch.nn.Linear", "in_features": 1, "out_features": 1, "_recursive_": False},
    {"_target_": ["os.system"], "command": "x"},
    {"_target_": "os"},
    {"_target_": "torch.nn.functional.relu", "input": 1},
    {"_target_": "torch.optim.lr_scheduler.warnings.warn", "message": "x"},
]


@pytest.mark.parametrize("node", HOSTILE, ids=lambda n: str(n["_target_"]))
def test_hostile_configs_are_refused_and_nothing_is_called(node: dict, calls: list[str]) -> None:
    with pytest.raises(UserError, match=r"_target_|not supported"):
        safe_instantiate(node)
    assert calls == []


def test_an_outer_object_is_not_built_when_an_inner_one_is_refused(tmp_path: pathlib.Path) -> None:
    node = {
        "_target_": "torch.nn.Sequential",
        "_args_": [
            {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path / "logs")},
            {"_target_": "os.system", "command": "x"},
        ],
    }
    with pytest.raises(UserError, match=r"os\.system"):
        safe_instantiate(node)
    assert list(tmp_path.iterdir()) == []


def test_refused_modules_are_not_even_imported(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "hostile_mod.py").write_text("raise SystemExit('imported')\n")
    monkeypatch.chdir(tmp_path)
    for target in ("hostile_mod.Thing", "hostile_mod.inner.Thing"):
        with pytest.raises(UserError, match="not on the list"):
            safe_instantiate({"_target_": target})
        with pytest.raises(UserError, match="comes from a file"):
            resolve_mixer_target(target)
    assert "hostile_mod" not in sys.modules


def test_allowed_objects_are_built(tmp_path: pathlib.Path) -> None:
    stop = safe_instantiate(
        {"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "val/loss", "patience": 7},
        expected=Callback,
    )
    assert isinstance(stop, EarlyStopping) and stop.patience == 7
    logger = safe_instantiate(
        {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path)}, expected=Logger
    )
    assert isinstance(logger, CSVLogger)
    net = safe_instantiate(
        {
            "_target_": "torch.nn.Sequential",
            "_args_": [
                {"_target_": "torch.nn.Linear", "in_features": 3, "out_features": 2},
                {"_target_": "torch.nn.GELU"},
            ],
        }
    )
    assert [type(m) for m in net] == [torch.nn.Linear, torch.nn.GELU] and net[0].in_features == 3
    optimizer = safe_instantiate({"_target_": "torch.optim.AdamW", "_partial_": True, "lr": 0.25})
    assert isinstance(optimizer, functools.partial)
    assert optimizer(net.parameters()).param_groups[0]["lr"] == 0.25
    assert (
        type(
            safe_instantiate({"_target_": "seqzoo.blocks.mixers.prob_sparse.ProbSparseAttention", "_args_": [16]})
        ).__name__
        == "ProbSparseAttention"
    )


def test_expected_class_and_options_are_checked() -> None:
    with pytest.raises(UserError, match="is not a Logger"):
        safe_instantiate({"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "x"}, expected=Logger)
    with pytest.raises(UserError, match=r"no option 'patiense'. Did you mean patience"):
        safe_instantiate({"_target_": "lightning.pytorch.callbacks.EarlyStopping", "monitor": "x", "patiense": 3})
    with pytest.raises(UserError, match="EarlyStopping"):
        safe_instantiate({"_target_": "lightning.pytorch.callbacks.EarlyStoping", "monitor": "x"})
    with pytest.raises(UserError, match="failed"):
        safe_instantiate({"_target_": "torch.nn.Linear", "in_features": 1})
    with pytest.raises(UserError, match="needs the key _target_"):
        safe_instantiate({"monitor": "x"})


USER_MODULE = """
import os
from seqzoo.blocks.protocol import Mixer, MixerOutput

class MyMixer(Mixer):
    def __init__(self, dim, *, rank=2, causal=False, cross=False):
        super().__init__(dim, causal=causal, cross=cross)
    def forward(self, x, context=None, **kwargs):
        return MixerOutput(x)

class NotAMixer:
    def __init__(self, size=1):
        self.size = size

def build(size=1):
    return NotAMixer(size)
"""


@pytest.fixture
def user_module(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> str:
    name = f"user_mod_{abs(hash(tmp_path)) % 10**8}"
    (tmp_path / f"{name}.py").write_text(USER_MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SEQZOO_ALLOW", raising=False)
    return name


def test_packages_that_the_user_trusts(user_module: str, monkeypatch: pytest.MonkeyPatch) -> None:
    node = {"_target_": f"{user_module}.NotAMixer", "size": 4}
    with pytest.raises(UserError, match="not on the list"):
        safe_instantiate(node)
    assert safe_instantiate(node, allow=[user_module]).size == 4
    assert safe_instantiate({"_target_": f"{user_module}.build", "size": 5}, allow=[user_module]).size == 5
    # trust in a package is not trust in what it imports, nor in one whose name only begins alike
    with pytest.raises(UserError, match=r"posix|nt"):
        safe_instantiate({"_target_": f"{user_module}.os.system", "command": "x"}, allow=[user_module])
    with pytest.raises(UserError, match="not on the list"):
        safe_instantiate(node, allow=[user_module[:-1]])
    monkeypatch.setenv("SEQZOO_ALLOW", f"other, {user_module}.")
    assert allowed_packages(["a"]) == ("a", "other", user_module)
    assert safe_instantiate(node).size == 4


def test_a_mixer_named_on_the_command_line(user_module: str) -> None:
    target = f"{user_module}.MyMixer"
    with pytest.raises(UserError, match="comes from a file"):
        resolve_mixer_target(target)
    before = list(sys.path)
    found = resolve_mixer_target(target, command_line_targets=[target])
    assert issubclass(found, Mixer) and found.__name__ == "MyMixer"
    assert sys.path == before  # the working folder is there during the import only
    assert resolve_mixer_target(target, allow=[user_module]) is found
    own = "seqzoo.blocks.mixers.prob_sparse.ProbSparseAttention"
    assert resolve_mixer_target(own).__name__ == "ProbSparseAttention"


def test_what_is_no_mixer_is_refused_even_from_the_command_line(user_module: str, calls: list[str]) -> None:
    for target in ("os.system", f"{user_module}.NotAMixer", "torch.nn.Linear", "torch.hub.load"):
        with pytest.raises(UserError, match="not a subclass"):
            resolve_mixer_target(target, command_line_targets=[target])
    with pytest.raises(UserError, match=r"no 'MyMixr'.*MyMixer"):
        resolve_mixer_target(f"{user_module}.MyMixr", command_line_targets=[f"{user_module}.MyMixr"])
    with pytest.raises(UserError, match="no module 'nowhere_at_all'"):
        resolve_mixer_target("nowhere_at_all.M", command_line_targets=["nowhere_at_all.M"])
    with pytest.raises(UserError, match="dotted name"):
        resolve_mixer_target("MyMixer", command_line_targets=["MyMixer"])
    assert calls == []


def test_an_error_inside_the_users_module_is_told(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "broken_mod_a.py").write_text("import not_installed_anywhere\n")
    (tmp_path / "broken_mod_b.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="not_installed_anywhere"):
        resolve_mixer_target("broken_mod_a.M", command_line_targets=["broken_mod_a.M"])
    with pytest.raises(UserError, match="ZeroDivisionError"):
        resolve_mixer_target("broken_mod_b.M", command_line_targets=["broken_mod_b.M"])
