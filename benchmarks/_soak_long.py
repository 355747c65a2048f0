"""A long training with everything that may grow watched: memory, open files, threads, step time, files."""

from __future__ import annotations

import csv
import os
import time
from pathlib import Path
from typing import Any

from _runs import RESULTS, write_result
from _soak import CASES, environment, run_folder, start

STEPS_A_SECOND = 2.0  # of a run of six hours whose steps are of ordinary size
CASES["long"] = (
    "experiment=forecasting/weather",
    *("model.dim=16", "model.depth=1", "data.steps=200", "data.batch_size=8", "data.num_workers=1"),
    *("trainer.max_epochs=-1", "trainer.limit_val_batches=2", "callbacks.checkpoint.every_n_train_steps=50"),
    *("test_after_fit=false", "callbacks.early_stopping=null", "scheduler=none", "trainer.accelerator=cpu"),
)


def _status(process: int) -> dict[str, float]:
    """Resident memory in MB, open files, threads and children of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
    return {
        "rss_mb": int(values["VmRSS"].split()[0]) / 1024,
        "files": len(os.listdir(f"/proc/{process}/fd")),
        "threads": int(values["Threads"]),
        "workers": len(children),
        "workers_rss_mb": sum(_resident(int(child)) for child in children),
    }


def _resident(process: int) -> float:
    try:
        return int(Path(f"/proc/{process}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    except OSError:
        return 0.0


def _sizes(run: Path) -> dict[str, int]:
    """Bytes of the log files of a run, and how many files it has."""
    files = [path for path in run.rglob("*") if path.is_file()]
    named = {"run.log": "run_log", "metrics.csv": "metrics_csv"}
    found = {key: sum(path.stat().st_size for path in files if path.name == name) for name, key in named.items()}
    found["tensorboard"] = sum(path.stat().st_size for path in files if "tensorboard" in path.parts)
    return {**found, "run_files": len(files)}


def _steps(run: Path) -> int:
    path = run / "logs" / "metrics.csv"
    if not path.is_file():
        return 0
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - 2000, 0))
        last = file.read().decode().splitlines()[-1]
    with open(path, encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file))
    value = last.split(",")[columns.index("step")] if last.count(",") == len(columns) - 1 else ""
    return int(value) + 1 if value.isdigit() else 0


def long_run(root: Path, minutes: float) -> None:
    """Train for so many minutes, look every five seconds, and write the curves."""
    process = start("long", root, common=(), env=environment(os.environ.get("SEQZOO_DATA")))
    begun, rows = time.time(), []
    while process.poll() is None and time.time() - begun < 60 * minutes:
        time.sleep(5)
        run = run_folder(root)
        if run is not None and (steps := _steps(run)):
            rows.append({"seconds": time.time() - begun, "steps": steps, **_status(process.pid), **_sizes(run)})
            rows[-1]["cpu_s"] = _cpu(process.pid)
    process.terminate()
    status = process.wait()
    write(rows, status)


def _cpu(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def slope(rows: list[dict[str, Any]], name: str) -> float:
    """Growth per 1000 steps in the second half, by least squares."""
    import numpy as np

    half = rows[len(rows) // 2 :]
    return float(np.polyfit([r["steps"] for r in half], [r[name] for r in half], 1)[0] * 1000)


def write(rows: list[dict[str, Any]], status: int) -> None:
    """The curves as CSV and picture, and what they come to as JSON."""
    with open(RESULTS / "soak_long.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    half, last = rows[len(rows) // 2], rows[-1]
    first = rows[len(rows) // 10]
    per_step = [1000 * (b["cpu_s"] - a["cpu_s"]) / (b["steps"] - a["steps"]) for a, b in ((first, half), (half, last))]
    bytes_a_step = {n: (last[n] - half[n]) / (last["steps"] - half["steps"]) for n in _LOGS}
    steps = int(6 * 3600 * STEPS_A_SECOND)
    result = {
        "steps": last["steps"],
        "minutes": round(last["seconds"] / 60, 1),
        "exit_status": status,
        "rss_mb": {"half-way": round(half["rss_mb"], 1), "end": round(last["rss_mb"], 1)},
        "rss_mb_per_1000_steps": round(slope(rows, "rss_mb"), 3),
        "open_files": {"half-way": half["files"], "end": last["files"]},
        "threads": {"half-way": half["threads"], "end": last["threads"]},
        "cpu_ms_a_step": {"first half": round(per_step[0], 2), "second half": round(per_step[1], 2)},
        "log_bytes_a_step": {name: round(value, 2) for name, value in bytes_a_step.items()},
        "log_mb_after_six_hours": {
            "steps": steps,
            **{name: round(value * steps / 1e6, 2) for name, value in bytes_a_step.items()},
        },
        "run_files": {"half-way": half["run_files"], "end": last["run_files"]},
    }
    write_result("soak_long", result)
    _plot(rows)


_LOGS = ("run_log", "metrics_csv", "tensorboard")


def _plot(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row["steps"] for row in rows]
    shown = {
        "resident memory, MB": ("rss_mb", "workers_rss_mb"),
        "open files, threads": ("files", "threads"),
        "CPU seconds": ("cpu_s",),
        "log files, bytes": _LOGS,
    }
    figure, axes = plt.subplots(1, len(shown), figsize=(15, 3.2), layout="constrained")
    for axis, (title, names) in zip(axes, shown.items(), strict=True):
        for name in names:
            axis.plot(steps, [row[name] for row in rows], label=name)
        axis.set(title=title, xlabel="steps", ylim=(0, None))
        axis.legend(fontsize=8)
    figure.savefig(RESULTS / "soak_long.png", dpi=100)
