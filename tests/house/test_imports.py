"""What importing costs and needs: nothing at the door, no extra anywhere, and never the wrong `kernels`."""

from __future__ import annotations

import doctest
import importlib
import inspect
import os
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import seqzoo

REPO = Path(__file__).parents[2]
FOLDERS = ("zoo", "blocks", "kernels", "pipelines", "conf", "model_cards")
# The modules of every extra, and what those bring that the core must not lean on.
OPTIONAL = (
    *("av", "datasets", "decord", "huggingface_hub", "matplotlib", "PIL", "pvlib", "scipy", "soundfile", "soxr"),
    *("tensorboard", "timm", "tokenizers", "torchaudio", "torchcodec", "torchvision", "transformers"),
)

BLOCK = """
import sys, importlib.metadata as metadata
class Blocked:
    # Not only unimportable but not installed: lightning and torchmetrics ask the metadata first.
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OPTIONAL:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Blocked())
find = metadata.Distribution.from_name.__func__
def from_name(cls, name):
    if name.lower().replace("-", "_") in {o.lower() for o in OPTIONAL}:
        raise metadata.PackageNotFoundError(name)
    return find(cls, name)
metadata.Distribution.from_name = classmethod(from_name)
"""


def library() -> list[str]:
    """Every module, folder by folder: `seqzoo.__path__` does not show them in an editable installation."""
    names = []
    for folder in FOLDERS:
        package = importlib.import_module(f"seqzoo.{folder}")
        names.append(package.__name__)
        names += [found.name for found in pkgutil.walk_packages(package.__path__, package.__name__ + ".")]
    return names


def python(code: str, *, cwd: Path | None = None, safe_path: bool = True) -> subprocess.CompletedProcess[str]:
    """Run `code` in a fresh interpreter; without safe_path the working directory is on sys.path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONSAFEPATH"}
    header = f"OPTIONAL = {OPTIONAL!r}\nFOLDERS = {FOLDERS!r}\n"
    return subprocess.run(
        [sys.executable, *(["-P"] if safe_path else []), "-c", header + code],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
    )


def test_import_seqzoo_is_light():
    heavy = ("torch", "lightning", "numpy", "pandas", "hydra", "triton")
    result = python(f"import sys, seqzoo; print([m for m in {heavy} if m in sys.modules])")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


def test_every_public_name_is_there():
    for name in seqzoo.__all__:
        assert getattr(seqzoo, name) is not None
    assert set(seqzoo.__all__) <= set(dir(seqzoo))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        seqzoo.nothing  # noqa: B018


def test_every_module_imports_without_any_extra():
    code = BLOCK + "import importlib, pkgutil\n" + inspect.getsource(library)
    code += "names = library()\nfor name in names: importlib.import_module(name)\n"
    code += "print(len(names), [name for name in (*FOLDERS, *OPTIONAL) if name in sys.modules])"
    result = python(code, cwd=REPO, safe_path=False)
    assert result.returncode == 0, result.stderr[-3000:]
    count, rest = result.stdout.strip().split(" ", 1)
    assert int(count) > 40, "the walk missed the folders"
    # Neither a folder of ours under a bare name nor an extra that slipped through.
    assert rest == "[]"


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_bare_folder_name_is_refused_in_the_repository(folder: str):
    result = python(f"import {folder}", cwd=REPO, safe_path=False)
    assert result.returncode == 1
    assert f"ImportError: import seqzoo.{folder}, not {folder}" in result.stderr


def test_the_examples_in_docstrings_hold():
    # Through the namespace: `pytest --doctest-modules blocks` would import the file as `blocks`.
    for name in library():
        result = doctest.testmod(importlib.import_module(name), optionflags=doctest.NORMALIZE_WHITESPACE)
        assert result.failed == 0, f"a doctest of {name} fails; see the captured output"


def test_building_a_model_imports_no_compiler():
    """torch._dynamo takes more than a second, triton and timm another each."""
    done = python(
        "import sys, seqzoo\n"
        "assert 'mamba2_tiny' in seqzoo.list_models()\n"
        "seqzoo.create_model('mamba2_tiny')\n"
        "heavy = {'torch._dynamo', 'triton', 'timm', 'transformers', 'lightning'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    assert done.returncode == 0, done.stderr


def test_constants_are_marked_as_the_compiler_marks_them():
    import torch

    from seqzoo.kernels.tracing import constant_result

    ours, theirs = constant_result(lambda: 1), torch.compiler.assume_constant_result(lambda: 1)
    assert vars(ours) == vars(theirs) != {}
