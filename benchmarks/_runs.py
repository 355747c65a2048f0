"""What the benchmarks share: runs of the real command, medians, results as JSON."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"


def data_folder() -> str:
    """The folder with ETTh1.csv, from the variable SEQZOO_DATA; exits with a message when it is not there."""
    folder = Path(os.environ.get("SEQZOO_DATA", ROOT / "data"))
    if not (folder / "ETTh1.csv").is_file():
        sys.exit(f"no ETTh1.csv in {folder}; set SEQZOO_DATA to the folder that holds it")
    return str(folder.resolve())


def fit(overrides: list[str], run_dir: Path, *, threads: int | None = None) -> dict[str, Any]:
    """`lightning fit` with these overrides in a process of its own; its metrics, with the wall time in seconds.

    A finished run in `run_dir` with the same overrides is read, not repeated: a benchmark of hours can be stopped
    and called again.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    record = run_dir / "benchmark.json"
    if record.is_file() and (done_before := json.loads(record.read_text(encoding="utf-8")))["overrides"] == overrides:
        return {**_metrics(run_dir), "seconds": done_before["seconds"]}
    env = {**os.environ, "SEQZOO_DATA": data_folder(), "PYTHONSAFEPATH": "1"}
    if threads is not None:
        env["OMP_NUM_THREADS"] = str(threads)
    command = [
        sys.executable,
        "-m",
        "seqzoo",
        "fit",
        *overrides,
        f"hydra.run.dir='{run_dir}'",
        "callbacks.progress=plain",
    ]
    start = time.perf_counter()
    with (run_dir / "output.txt").open("w", encoding="utf-8") as log:
        done = subprocess.run(command, env=env, stdout=log, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nfailed, see {run_dir / 'output.txt'}")
    seconds = time.perf_counter() - start
    record.write_text(json.dumps({"overrides": overrides, "seconds": seconds}), encoding="utf-8")
    return {**_metrics(run_dir), "seconds": seconds}


def _metrics(run_dir: Path) -> dict[str, Any]:
    return json.loads((run_dir / "metrics.json").read_text(encoding="utf-8"))


def earlier_rows(name: str, settings: dict[str, Any], folder: Path = RESULTS) -> list[dict[str, Any]]:
    """Rows of benchmarks/results/<name>.json where it was written with the same settings, else none.

    So that what takes long can be measured a row at a time.
    """
    path = folder / f"{name}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return known["rows"] if known.get("settings") == settings else []


def write_result(name: str, result: dict[str, Any], folder: Path = RESULTS) -> Path:
    """Write benchmarks/results/<name>.json, or one in another folder, with the date, the machine and the versions."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    record = {
        **result,
        "date": datetime.now(UTC).date().isoformat(),
        "command": result.get("command")
        or f"python benchmarks/{Path(sys.argv[0]).name} {' '.join(sys.argv[1:])}".strip(),
        "machine": {"processor": platform.machine(), "cores": os.cpu_count()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    path.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return path
