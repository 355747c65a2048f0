"""The conformance suite over the registry: every mixer, every variant, every check that applies."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

from seqzoo.blocks.protocol import PATTERNS
from seqzoo.blocks.registry import list_mixers, mixer_info
from seqzoo.blocks.testing import CHECKS, applies, check_mixer, find_subjects, run_check

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "custom_mixer.py"
SUBJECTS = {subject.label: subject for name in list_mixers() for subject in find_subjects(name)}
CASES = [(label, check) for label, subject in SUBJECTS.items() for check in CHECKS if applies(check, subject)]


@pytest.mark.parametrize(("label", "check"), CASES, ids=[f"{label}-{check}" for label, check in CASES])
def test_mixer_conforms(label: str, check: str) -> None:
    run_check(check, SUBJECTS[label])


@pytest.mark.parametrize("name", list_mixers())
def test_every_pattern_is_checked(name: str) -> None:
    checked = {subject.pattern for subject in SUBJECTS.values() if subject.factory == name}
    assert checked == set(mixer_info(name).patterns)


def test_every_check_runs_somewhere() -> None:
    assert {check for _, check in CASES} == set(CHECKS)
    assert {subject.pattern for subject in SUBJECTS.values()} == set(PATTERNS)


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """examples/custom_mixer.py, loaded as from its own folder; the registry forgets it afterwards."""
    from seqzoo.blocks import registry

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    spec = importlib.util.spec_from_file_location("custom_mixer", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "custom_mixer", module)
    spec.loader.exec_module(module)
    return module


def test_the_example_mixer_conforms(example: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    example.main()
    printed = capsys.readouterr().out
    assert all(check in printed for check in ("streaming_masks", "causality_perturbation", "padding", "packed"))
    assert "my_ema" in list_mixers(pattern="causal", streaming=True)


def test_a_name_a_class_and_a_factory_are_checked_alike(example: ModuleType) -> None:
    quick = ["shapes_and_dtypes", "streaming", "padding"]
    assert check_mixer("my_ema", checks=quick) == quick
    assert check_mixer(example.MyMixer, dim=6, options={"causal": True}, checks=quick) == quick
    assert check_mixer(lambda dim: example.MyMixer(dim, causal=True), checks=quick) == quick
    assert check_mixer(lambda dim: example.MyMixer(dim), checks=quick) == ["shapes_and_dtypes", "padding"]
