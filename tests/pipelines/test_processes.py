"""Sweeps and ranks: jobs in processes of their own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

FAKE = """
import json, os, sys, types
module = types.ModuleType("seqzoo.pipelines.run")
def execute(command, cfg, run_dir):
    record = {"command": command, "seed": cfg["seed"], "pid": os.getpid(), "argv": sys.argv[1:],
              "targets": cfg["command_line_targets"], "cwd": os.getcwd()}
    record["rank"] = os.environ.get("LOCAL_RANK")
    (run_dir / f"record{os.environ.get('LOCAL_RANK', '')}.json").write_text(json.dumps(record))
    (run_dir / "metrics.json").write_text(json.dumps({"objective": cfg["seed"] + 0.5}))
    if cfg["name"] == "bad":
        raise RuntimeError("this job fails")
    if cfg["name"] == "ranks" and "LOCAL_RANK" not in os.environ:
        # as Lightning's launcher does
        import subprocess
        import __main__
        word = [sys.executable, "-m", __main__.__spec__.name, *sys.argv[1:]]
        subprocess.run(word, env={**os.environ, "LOCAL_RANK": "1"}, check=True)
    return {}
module.execute = execute
sys.modules["seqzoo.pipelines.run"] = module
"""


def run(tmp_path: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, where `run.execute` is the recorder above."""
    (tmp_path / "fake").mkdir(exist_ok=True)
    (tmp_path / "fake" / "sitecustomize.py").write_text(FAKE)
    (tmp_path / "work").mkdir(exist_ok=True)
    keep = {k: v for k, v in os.environ.items() if not k.startswith("SEQZOO") and k not in ("LOCAL_RANK", "RANK")}
    return subprocess.run(
        [sys.executable, "-P", "-m", "seqzoo", *words],
        cwd=tmp_path / "work",
        env={**keep, "PYTHONPATH": str(tmp_path / "fake")},
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_sweep_runs_each_job_in_its_own_process_and_folder(tmp_path: Path) -> None:
    done = run(tmp_path, "test", "-m", "seed=1,2", "name=good,bad", "mixer._target_=m.M", "mixer.rank=1")
    assert done.returncode == 1, done.stderr  # two of the four failed, the others ran
    records = [json.loads(p.read_text()) for p in sorted((tmp_path / "work").rglob("record.json"))]
    assert [r["seed"] for r in records] == [1, 1, 2, 2] and len({r["pid"] for r in records}) == 4
    assert all(r["command"] == "test" and r["targets"] == ["m.M"] for r in records)
    folders = sorted(p.parent for p in (tmp_path / "work").rglob("record.json"))
    assert [f.name for f in folders] == ["0", "1", "2", "3"] and len({f.parent for f in folders}) == 1
    assert all((f / "config-test.yaml").is_file() for f in folders)
    assert [p.name for p in (tmp_path / "work").iterdir()] == ["runs"]
    table = done.stdout
    assert table.count("failed (1)") == 2 and "1.5" in table and "2.5" in table
    assert done.stderr.count("this job fails") == 2 and "Traceback" not in done.stderr


def test_a_sweep_over_a_wrong_option_starts_no_job(tmp_path: Path) -> None:
    done = run(tmp_path, "fit", "-m", "mixer=softmax,softmx")
    assert done.returncode == 2 and "Did you mean softmax" in done.stderr
    assert list((tmp_path / "work").rglob("record*.json")) == []


def test_a_rank_that_lightning_starts_keeps_command_and_folder(tmp_path: Path) -> None:
    done = run(tmp_path, "test", "name=ranks", "seed=6")
    assert done.returncode == 0, done.stderr
    first, second = sorted((tmp_path / "work").rglob("record*.json"))
    assert first.parent == second.parent
    one, two = json.loads(first.read_text()), json.loads(second.read_text())
    assert (one["rank"], two["rank"]) == (None, "1") and one["pid"] != two["pid"]
    assert all(two[k] == one[k] for k in ("command", "seed", "argv", "cwd"))
