"""The import-layer check passes on the library and reports every kind of violation."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).parents[2]
FOLDERS = ("kernels", "blocks", "zoo", "pipelines", "conf", "model_cards", "seqzoo")


def run(root: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(REPO / ".ci" / "layers.py"), str(root)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A library of empty folders, to plant an import in."""
    for folder in FOLDERS:
        (tmp_path / folder / "room").mkdir(parents=True)
        (tmp_path / folder / "__init__.py").write_text('"""A folder."""\n')
    return tmp_path


def test_the_library_keeps_its_layers():
    result = run(REPO)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize(
    ("path", "line", "reason"),
    [
        ("kernels/room/op.py", "from ...blocks.protocol import Mixer", "not blocks"),
        ("kernels/op.py", "from .. import blocks", "not blocks"),
        ("blocks/room/mixer.py", "def f():\n    from ...zoo import create_model", "not zoo"),
        ("blocks/mixer.py", "from importlib import import_module\nimport_module('seqzoo.zoo')", "not zoo"),
        ("blocks/mixer.py", "import seqzoo.zoo", "not zoo"),
        ("zoo/family.py", "from ..pipelines.forecasting import data", "not pipelines"),
        ("zoo/family.py", "from ..conf import something", "from pipelines only"),
        ("zoo/family.py", "from seqzoo.blocks import Backbone", "imports are relative"),
        ("pipelines/task.py", "from seqzoo import create_model", "imports are relative"),
        ("pipelines/task.py", "import kernels", "write a relative import"),
        ("pipelines/task.py", "from tests.helpers import tiny", "not part of the library"),
        ("pipelines/task.py", "from ... import x", "leaves the package"),
        ("conf/__init__.py", "from ..kernels import softmax", "not kernels"),
        ("blocks/mixer.py", "from omegaconf import DictConfig", "stays in pipelines"),
    ],
)
def test_a_planted_violation_is_reported(tree: Path, path: str, line: str, reason: str):
    (tree / path).write_text(f'"""A module."""\n{line}\n')
    result = run(tree)
    number = 2 + line.count("\n")
    assert result.returncode == 1
    assert f"{path}:{number}: " in result.stdout and reason in result.stdout


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("kernels/op.py", "import torch\nfrom .room import naive"),
        ("blocks/room/mixer.py", "from ...kernels import op\nfrom ..protocol import Mixer"),
        ("zoo/family.py", "from ..blocks.backbone import Backbone\nfrom .. import kernels"),
        ("pipelines/task.py", "import lightning\nfrom ..zoo import create_model\nfrom .. import conf"),
        ("seqzoo/__main__.py", "from .pipelines.cli import main\nfrom . import blocks"),
    ],
)
def test_what_is_allowed_is_not_reported(tree: Path, path: str, line: str):
    (tree / path).write_text(f'"""A module."""\n{line}\n')
    result = run(tree)
    assert result.returncode == 0, result.stdout
