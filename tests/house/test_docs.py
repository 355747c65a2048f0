"""What the documents say holds: code runs, links lead to files, tables are current, one key, one thing."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from types import ModuleType

import pytest

from seqzoo import list_mixers, list_models, mixer_info
from seqzoo.pipelines.validate import task_package, trains
from seqzoo.zoo import model_info

REPO = Path(__file__).parents[2]
PAGES = sorted([*REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("blocks/*.md"), *REPO.glob("kernels/*/*.md")])
FENCE = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text(encoding="utf-8")) if kind == language]


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("readme_tables", REPO / "docs" / "tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_python_in_the_documents_runs(page: Path, tmp_path: Path):
    code = "\n".join(blocks(page, "python"))
    if not code:
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_the_readme_has_python_that_is_run():
    assert sum(len(code.splitlines()) for code in blocks(REPO / "README.md", "python")) > 10


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_to_files(page: Path):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = [t for t in re.findall(r"\]\(([^)\s]+)\)", text) if not re.match(r"https?:|#|mailto:", t)]
    missing = [t for t in targets if not (page.parent / t.split("#")[0]).exists()]
    assert not missing, f"{page.name} links to {missing}"


def test_the_readme_tables_are_current(tables: ModuleType):
    behind = tables.stale((REPO / "README.md").read_text(encoding="utf-8"))
    assert not behind, f"README.md is behind in {behind}: make docs"


def test_a_table_that_is_behind_is_noticed(tables: ModuleType):
    text = (REPO / "README.md").read_text(encoding="utf-8")
    row = next(line for line in text.splitlines() if line.startswith("| [`linear`]"))
    assert tables.stale(text.replace(row + "\n", "")) == ["mixers"]
    with pytest.raises(ValueError, match="no table 'nothing'"):
        tables.filled("<!-- table:nothing -->\n<!-- /table -->")


def test_a_results_file_becomes_a_table(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    rows = [{"mixer": "linear", "mse": 0.123456, "by_seed": [1, 2]}, {"mixer": "s4d", "mse": 20_000}]
    record = {"rows": rows, "command": "python b.py", "date": "2026-01-02", "versions": {"torch": "2.14.1"}}
    (tmp_path / "b.json").write_text(json.dumps(record))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.results().splitlines() == [
        "[`b`](benchmarks/results/b.json): `python b.py`, 2026-01-02, torch 2.14.1",
        "",
        "| mixer | mse |",
        "| --- | --- |",
        "| linear | 0.1235 |",
        "| s4d | 20,000 |",
    ]


def commands() -> list[list[str]]:
    """Every `lightning ...` line of the README and the forecasting page, as words."""
    lines = [
        line
        for page in (REPO / "README.md", REPO / "docs" / "forecasting.md")
        for code in blocks(page, "sh")
        for line in code.splitlines()
    ]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("lightning ")]


def test_the_command_lines_in_the_documents_compose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each names existing groups, options and keys; nothing is run and no file is read."""
    from hydra import compose, initialize_config_module

    from seqzoo.pipelines.overrides import complete_mixer, parse_arguments

    monkeypatch.chdir(tmp_path)
    found = commands()
    assert len(found) > 5
    for words in found:
        request = parse_arguments(words[1], words[2:])
        sets = [re.sub(r"(\w)=([^\[,]+),.*", r"\1=\2", word) for word in complete_mixer(request.overrides)]
        with initialize_config_module("seqzoo.conf", version_base="1.3"):
            cfg = compose("config", overrides=sets)
        task = cfg["task"]["name"]
        if cfg["model"] is None:
            assert not trains(task), words
        else:
            assert getattr(task_package(task), "MODELS", task) == model_info(cfg["model"]["name"]).task, words


def test_the_extras_of_the_readme_are_those_of_the_package():
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    section = (REPO / "README.md").read_text(encoding="utf-8").split("| extra |")[1].split("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", section, re.MULTILINE)) == set(project["optional-dependencies"])


def test_every_dependency_is_pinned_exactly_and_no_host_is_named():
    text = (REPO / "constraints.txt").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9.-]+==[\w.]+", line) for line in lines)
    assert "://" not in text
    project = tomllib.loads((REPO / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(requirement for extra in extras for requirement in extra)]
    names = {re.match(r"[\w.-]+", requirement)[0].lower() for requirement in wanted} - {"seqzoo"}  # type: ignore[index]
    assert names <= {line.split("==")[0].lower() for line in lines}


def test_one_key_names_a_mixer_everywhere(tables: ModuleType):
    keys = {key for key in list_mixers() if tables.shipped(mixer_info(key).cls)}  # not those of other tests
    files = {
        "blocks/mixers": {path.stem for path in (REPO / "blocks" / "mixers").glob("*.py")} - {"__init__"},
        "conf/mixer": {path.stem for path in (REPO / "conf" / "mixer").glob("*.yaml")} - {"custom"},
    }
    assert files == dict.fromkeys(files, keys)
    assert all((REPO / "tests" / "blocks" / f"test_{key}.py").is_file() for key in keys)


def test_one_key_names_a_model_everywhere(tables: ModuleType):
    keys = {key for key in list_models() if tables.shipped(model_info(key).build)}
    assert {path.stem for path in (REPO / "conf" / "model").glob("*.yaml")} == keys


def test_bars_become_a_table(tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert tables.bars("cpu", "python b.py") == "Not measured yet: `python b.py` writes this table."
    row = {"operation": "linear", "case": "c", "length": 4096, "pass": "fwd", "ours": "ours", "peer": "fla"}
    row |= {"of": "time", "ours ms": 12.345, "peer ms": 40.0, "ratio": 0.309, "bar": 0.5, "met": True}
    rows = [
        row,
        {**row, "bar": None},
        {**row, "ours": "ours, bf16", "peer ms": None, "ratio": None, "met": None},
        {**row, "of": "memory", "ours MiB": 2.0, "peer MiB": 1.0, "ratio": 2.0, "bar": 1.3, "met": False},
        {**row, "of": "roof", "peer": "the copy", "peer ms": None, "of roof": 0.5, "bar": 0.45},
    ]
    record = {"rows": rows, "date": "2026-01-02", "packages": {"torch": "2.14.1"}, "hardware": {"processor": "Z"}}
    (tmp_path / "cpu.json").write_text(json.dumps(record))
    head, _, *lines = tables.bars("cpu", "python b.py").splitlines()
    assert head.startswith("`python b.py`, 2026-01-02, Z, torch 2.14.1: 2 of 3 bars met.")
    assert lines[2:] == [
        "| linear, c | 4096 | fwd | 12.3 ms | fla: 40 ms | 0.309 | <= 0.5 | yes |",
        "| linear, c | 4096 | fwd | bf16: 12.3 ms | fla |  | <= 0.5 | not run |",
        "| linear, c | 4096 | fwd | 2 MiB | fla: 1 MiB | 2 | <= 1.3 | no |",
        "| linear, c | 4096 | fwd | 12.3 ms | the copy | 0.5 | >= 0.45 | yes |",
    ]
    assert "linear" not in tables.results()
