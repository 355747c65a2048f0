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
    *("audio/digits", "audio/find", "video/find", "audio/retrieval", "video/signs", "video/pretrain"),
]


@pytest.fixture
def soak(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import soak

    yield soak
    for name in ("soak", "_soak", "_soak_long", "_runs"):
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


def test_what_grows_in_a_long_run_is_seen(soak: Any, tmp_path: Path) -> None:
    """Made-up curves: memory grows by 2 MB and log files by 12 bytes each thousand steps, a step becomes slower."""
    from _soak_long import EPOCH, _reached, slope, summary

    rows = []
    for steps in range(100, 20001, 100):
        cpu = steps * 0.01 if steps <= 10000 else 100 + (steps - 10000) * 0.02
        grows = {"rss_mb": 900 + steps * 0.002, "workers_rss_mb": 50.0, "files": 20, "threads": 7, "workers": 4}
        logs = {"run_log": 100, "metrics_csv": steps * 12 // 1000, "tensorboard": 0, "run_files": 9}
        rows.append({"steps": steps, "epochs": steps // EPOCH, "seconds": 3 * cpu, "cpu_s": cpu, **grows, **logs})
    assert abs(slope(rows, "rss_mb") - 2) < 1e-9 and abs(slope(rows, "files")) < 1e-9
    found = summary(rows, 143)
    assert found["growth_in_six_hours"] == {"rss_mb": 43.2, "files": 0.0, "threads": 0.0}
    assert found["rss_mb_of_a_worker"] == {"first quarter": 12.5, "last quarter": 12.5}
    assert found["cpu_ms_a_step"] == {"first quarter": 10.0, "last quarter": 20.0}
    assert found["ms_a_step"] == {"first quarter": 30.0, "last quarter": 60.0}
    assert found["log_bytes_a_step"]["metrics_csv"] == {"first quarter": 0.01, "last quarter": 0.01}
    assert (found["epochs"], found["checkpoints"], found["loader_processes_started"]) == (200, 600, 800)

    (tmp_path / "logs").mkdir()
    log = tmp_path / "logs" / "metrics.csv"
    assert _reached(tmp_path) == (0, 0)
    log.write_text("epoch,lr,step,train/loss\n,0.1,0,\n0,,19,2.5\n,0.1,39,\n")
    assert _reached(tmp_path) == (20, 0)
    log.write_text("epoch,lr,step,train/loss\n" + ",0.1,0,\n" * 1000 + "3,,399,2.5\n4,,49")
    assert _reached(tmp_path) == (400, 3)
