"""Real runs of each pipeline, killed with `kill -9` and resumed: what `benchmarks/soak.py` does, a kill of each kind"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ..helpers.real_data import real_data

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
PIPELINES = [
    *("forecasting/weather", "forecasting/weather, two workers", "text/stdlib_bytes", "documents/listops_quick"),
    *("audio/digits", "audio/find", "video/find"),
]


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import soak

    yield soak
    for name in ("soak", "_soak", "_runs"):
        sys.modules.pop(name, None)


@pytest.mark.slow
@pytest.mark.parametrize("case", PIPELINES)
def test_kill_and_go_on(case: str, soak: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if case.startswith(("audio", "video")) and not (real_data() / "fsdd").is_dir():
        pytest.skip(f"needs {real_data()}")
    assert list(soak.CASES) == PIPELINES
    monkeypatch.setenv("SEQZOO_DATA", str(real_data()))
    rows = soak.chain(case, tmp_path, kills=2, seed=1, fresh=True)
    assert len(rows) == 2 and all(row["equal"] for row in rows), rows[0]["differences"]


def test_what_is_unequal_is_found(soak: Any, tmp_path: Path) -> None:
    """The comparison itself: a tensor, a number, a file and a row that differ; folders of the machine do not."""
    import torch
    from _soak import differences

    for name, value in (("a", 1.0), ("b", 1.0)):
        folder = tmp_path / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "logs").mkdir()
        nan = torch.tensor([value, float("nan")])
        paths = {f"{folder}/checkpoints/best.ckpt": nan}
        torch.save({"w": nan, "n": (1, float("nan")), "best": paths}, folder / "checkpoints" / "last.ckpt")
        (folder / "logs" / "metrics.csv").write_text("step\n1\n")
        (folder / "run.log").write_text(name)
    a, b = tmp_path / "a", tmp_path / "b"
    assert differences(a, b) == []
    for changed in ({"w": torch.tensor([1.0, 2.0])}, {"w": torch.ones(2).double()}, {"n": (2, 1.0)}, {"new": 1}):
        saved = torch.load(a / "checkpoints" / "last.ckpt", weights_only=True)
        torch.save({**saved, **changed}, b / "checkpoints" / "last.ckpt")
        assert differences(a, b), changed
    torch.save(saved, b / "checkpoints" / "last.ckpt")
    (b / "logs" / "metrics.csv").write_text("step\n2\n")
    assert differences(a, b) == ["logs/metrics.csv: other bytes"]
    (b / "extra.png").touch()
    assert "extra.png: only in one" in differences(a, b)
