"""What `lightning doctor` finds wrong: each case with made-up facts, and this installation as it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from seqzoo.pipelines.cli import main
from seqzoo.pipelines.failures.versions import (
    cuda_problems,
    import_problems,
    python_problems,
    requirement_problems,
    space_problems,
    torch_problems,
)

NEEDS = ["numpy>=2", "torch>=2.11", "triton>=3.6; sys_platform == 'nowhere'", "matplotlib>=3.9; extra == 'plot'"]


def test_requirements() -> None:
    there = {"numpy": "1.26.4", "torch": "2.14.1+cpu"}
    found = requirement_problems("seqzoo", NEEDS, there.get)
    assert [(row["what"], row["problem"], row["do"]) for row in found] == [
        ("numpy", "1.26.4, but seqzoo needs numpy>=2", "pip install 'numpy>=2'")
    ]
    assert requirement_problems("seqzoo", NEEDS, {**there, "numpy": "2.4.6"}.get) == []
    lines = ["torch==2.13.0"]
    assert requirement_problems("torchvision", lines, there.get)[0]["problem"] == (
        "2.14.1+cpu, but torchvision needs torch==2.13.0"
    )
    assert requirement_problems("seqzoo", lines, {}.get)[0]["problem"] == "not installed, but seqzoo needs it"
    assert requirement_problems("torchvision", lines, {}.get, also_missing=False) == []


def test_python_and_torch() -> None:
    assert python_problems(">=3.11", "3.12.1") == python_problems(None, "2.7") == []
    assert "3.10.2, but seqzoo needs >=3.11" in python_problems(">=3.11", "3.10.2")[0]["problem"]
    assert torch_problems("2.14.1", {}) == torch_problems("2.11.0+cpu", {"torchvision": "0.26.0+cpu"}) == []
    assert "newer than 2.14" in torch_problems("2.15.0", {})[0]["problem"]
    wrong = torch_problems("2.14.1+cu130", {"torchvision": "0.29.1+cpu", "torchaudio": "2.11.0"})
    assert [row["what"] for row in wrong] == ["torchvision"]
    assert "built for cpu, torch 2.14.1+cu130 for cu130" in wrong[0]["problem"]


@pytest.mark.parametrize(
    ("built", "driver", "works", "there", "said"),
    [
        ("13.0", 13010, True, True, None),
        ("12.6", 13000, True, True, None),
        (None, None, False, False, None),
        ("13.0", None, False, False, None),
        ("13.0", 12040, False, True, "torch is built for CUDA 13.0, the driver runs 12.4 at most"),
        (None, 13000, False, True, "built for the CPU, but this machine has an NVIDIA driver"),
        ("13.0", 13000, False, True, "sees no GPU, though a driver is there"),
    ],
)
def test_cuda(built: str | None, driver: int | None, works: bool, there: bool, said: str | None) -> None:
    found = cuda_problems(built, driver, works=works, there=there)
    assert len(found) == (said is not None) and (said is None or said in found[0]["problem"])


def test_architectures() -> None:
    both = {"works": True, "there": True}
    for capability, wrong in (((9, 0), False), ((8, 6), False), ((7, 0), True), ((12, 0), True)):
        found = cuda_problems("13.0", 13000, capability=capability, compiled=["sm_80", "sm_90a", "compute_90"], **both)
        assert bool(found) == wrong, capability
    assert cuda_problems("13.0", 13000, capability=(8, 0), compiled=["sm_86"], **both)  # newer ones do not run on it
    assert "no kernels for this GPU, sm_120 (it has 80 to 90)" in found[0]["problem"]


def test_packages_that_cannot_be_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "brokenvision.py").write_text("raise RuntimeError('operator brokenvision::nms does not exist')")
    monkeypatch.syspath_prepend(str(tmp_path))
    found = import_problems(["brokenvision", "notthereatall", "json"])
    assert [row["what"] for row in found] == ["brokenvision"] and "::nms does not exist" in found[0]["problem"]
    sys.modules.pop("brokenvision", None)


def test_space() -> None:
    assert space_problems({"/a": 3 << 30}, 1 << 30) == space_problems({}, None) == []
    found = space_problems({"/a": 1 << 30, "/b": 3 << 30}, 64 << 20)
    assert [row["what"] for row in found] == ["/a", "/dev/shm"]
    assert "1.1 GB are free" in found[0]["problem"] and "64 MB in all" in found[1]["problem"]


def test_the_command_prints_them(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("kernel_rows", "decoder_rows", "accelerators", "command_rows"):
        monkeypatch.setattr(f"seqzoo.pipelines.doctor.{name}", lambda: [])
    rows = [{"what": "numpy", "problem": "1.26.4, but seqzoo needs numpy>=2", "do": "pip install 'numpy>=2'"}]
    for found in (rows, []):
        monkeypatch.setattr("seqzoo.pipelines.failures.versions.problems", lambda found=found: found)
        assert main(["doctor", "--json"]) == 0
        assert json.loads(capsys.readouterr().out)["problems"] == found
        assert main(["doctor"]) == 0
        assert ("pip install 'numpy>=2'" if found else "none found") in capsys.readouterr().out
    monkeypatch.setattr("seqzoo.pipelines.failures.versions.problems", lambda: 1 / 0)
    assert main(["doctor", "--json"]) == 0
    assert "ZeroDivisionError" in json.loads(capsys.readouterr().out)["problems"][0]["problem"]


def test_this_installation() -> None:
    from seqzoo.pipelines.failures.versions import problems

    for row in problems():
        assert set(row) == {"what", "problem", "do"} and all(row.values())
        assert row["what"] not in ("seqzoo", "python", "lightning", "hydra-core", "safetensors"), row
