"""The wheel and the sdist carry every file of the six folders, under one top-level package, and work."""

from __future__ import annotations

import configparser
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

import seqzoo

REPO = Path(__file__).parents[2]
FOLDERS = ("zoo", "blocks", "kernels", "pipelines", "conf", "model_cards")
SUFFIXES = (".py", ".cpp", ".yaml", ".md", ".safetensors", ".json")


def source_files() -> list[str]:
    """Tracked files and new ones that git does not ignore; without git, all that a package can carry."""
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=REPO,
        capture_output=True,
        text=True,
    )
    if listed.returncode == 0 and listed.stdout:
        return [name for name in listed.stdout.splitlines() if (REPO / name).is_file()]
    roots = [REPO / folder for folder in (*FOLDERS, "seqzoo")]
    inside = [path for root in roots for path in root.rglob("*") if path.suffix in (*SUFFIXES, ".typed")]
    files = [*inside, *(path for path in REPO.iterdir() if path.is_file())]
    return [str(path.relative_to(REPO)) for path in files]


def build(source: Path, out: Path, kind: str) -> Path:
    command = [sys.executable, "-m", "build", f"--{kind}", "--no-isolation", "--skip-dependency-check"]
    result = subprocess.run(
        [*command, "--outdir", str(out), str(source)], capture_output=True, text=True, cwd=out.parent
    )
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-2000:]
    return next(out.glob("*.whl" if kind == "wheel" else "*.tar.gz"))


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The source tree without anything that building or running left in it."""
    tree = tmp_path_factory.mktemp("source") / "seqzoo"
    for name in source_files():
        target = tree / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO / name, target)
    return tree


@pytest.fixture(scope="module")
def sdist(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(copy, tmp_path_factory.mktemp("sdist") / "out", "sdist")


@pytest.fixture(scope="module")
def wheel(copy: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(copy, tmp_path_factory.mktemp("wheel") / "out", "wheel")


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("/")}


def test_the_wheel_holds_the_six_folders_and_nothing_else(copy: Path, wheel: Path):
    packed = contents(wheel)
    expected = {
        f"seqzoo/{path.relative_to(copy)}"
        for folder in FOLDERS
        for path in (copy / folder).rglob("*")
        if path.suffix in SUFFIXES
    }
    expected |= {f"seqzoo/{path.name}" for path in (copy / "seqzoo").iterdir() if path.is_file()}
    assert {f"seqzoo/{folder}/__init__.py" for folder in FOLDERS} <= expected
    ours = {name for name in packed if ".dist-info/" not in name}
    assert ours == expected
    assert {name.split("/")[0] for name in packed} == {"seqzoo", f"seqzoo-{seqzoo.__version__}.dist-info"}


def test_every_file_of_the_six_folders_is_of_a_kind_that_is_packed(copy: Path):
    odd = [
        str(path.relative_to(copy))
        for folder in FOLDERS
        for path in (copy / folder).rglob("*")
        if path.is_file() and path.suffix not in SUFFIXES
    ]
    assert not odd, f"the wheel would lack {odd}: add their kind to pyproject.toml and to SUFFIXES"


def test_the_wheel_from_the_sdist_is_the_wheel_from_the_tree(sdist: Path, wheel: Path, tmp_path: Path):
    with tarfile.open(sdist) as archive:
        archive.extractall(tmp_path, filter="data")
    unpacked = next(path for path in tmp_path.iterdir() if path.is_dir())
    again = contents(build(unpacked, tmp_path / "out", "wheel"))
    assert again == contents(wheel)


def test_the_entry_points_and_the_licence(wheel: Path):
    info = f"seqzoo-{seqzoo.__version__}.dist-info"
    packed = contents(wheel)
    scripts = configparser.ConfigParser()
    scripts.read_string(packed[f"{info}/entry_points.txt"].decode())
    main = "seqzoo.__main__:main"
    assert dict(scripts["console_scripts"]) == {"lightning": main, "seqzoo": main}
    assert b"Apache License" in packed[f"{info}/licenses/LICENSE"]
    assert b"License-Expression: Apache-2.0" in packed[f"{info}/METADATA"]


def test_the_unpacked_wheel_works(wheel: Path, tmp_path: Path):
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import importlib.resources as r, seqzoo\n"
        "from seqzoo import list_mixers, list_models\n"
        "assert list_mixers() and list_models()\n"
        "assert r.files('seqzoo.conf').joinpath('config.yaml').is_file()\n"
        "print(seqzoo.__file__, seqzoo.blocks.__file__)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.count(str(tmp_path)) == 2, "imported another copy"
