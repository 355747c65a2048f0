"""A long training with everything that may grow watched: memory, open files, threads, step time, files.

Six hours of training with steps of a second are 21,600 steps; with epochs of 1,000 of them and a checkpoint every 500
they have 22 epochs, as many validations and starts of the loaders' processes, and 65 checkpoints. Here as many steps
are made, so short that they take minutes, in ten times as many epochs: 216, each of which starts the processes of both
loaders anew, two and two, validates, and saves at its end beside the checkpoints every 50 steps, 648 in all.
"""

from __future__ import annotations

import csv
import itertools
import os
import time
from pathlib import Path
from statistics import median
from typing import Any

from _runs import RESULTS, write_result
from _soak import CASES, environment, run_folder, start

STEPS = 6 * 3600  # of six hours, a second each
EPOCH, SAVED = 100, 50  # steps of an epoch, and between two checkpoints in it
CASES["long"] = (
    "experiment=forecasting/weather",
    *("model=patch_tiny", "mixer=linear", "model.dim=16", "model.depth=1", "model.patch_len=12", "model.stride=12"),
    *("data.seq_len=48", "data.batch_size=4", "data.eval_batch_size=32", f"data.steps={EPOCH}", "data.num_workers=2"),
    *("trainer.max_epochs=-1", "trainer.limit_val_batches=2", "+trainer.reload_dataloaders_every_n_epochs=1"),
    *(f"callbacks.checkpoint.every_n_train_steps={SAVED}", "callbacks.early_stopping=null", "test_after_fit=false"),
    *("scheduler=none", "trainer.accelerator=cpu"),
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


def _reached(run: Path) -> tuple[int, int]:
    """Steps and epochs that a run has told of in its log."""
    path = run / "logs" / "metrics.csv"
    if not path.is_file():
        return 0, 0
    with open(path, "rb") as file:
        file.seek(max(path.stat().st_size - 2000, 0))
        last = file.read().decode().splitlines()
    with open(path, encoding="utf-8", newline="") as file:
        columns = next(csv.reader(file))
    for line in reversed(last):  # the last one may be half written, rows of a rate have no epoch
        values = dict(zip(columns, line.split(","), strict=False))
        if len(values) == len(columns) and values["step"].isdigit() and values.get("epoch", "").isdigit():
            return int(values["step"]) + 1, int(values["epoch"])
    return 0, 0


def long_run(root: Path, minutes: float, steps: int = STEPS) -> None:
    """Train for so many steps, or minutes, look every five seconds, and write the curves."""
    process = start("long", root, common=(), env=environment(os.environ.get("SEQZOO_DATA")))
    begun, rows = time.time(), []
    while process.poll() is None and time.time() - begun < 60 * minutes:
        time.sleep(5)
        run = run_folder(root)
        done, epochs = _reached(run) if run is not None else (0, 0)
        if run is not None and done and not (rows and done == rows[-1]["steps"]):
            times = {"seconds": time.time() - begun, "cpu_s": _cpu(process.pid)}
            rows.append({"steps": done, "epochs": epochs, **times, **_status(process.pid), **_sizes(run)})
        if done >= steps:
            break
    process.terminate()
    status = process.wait()
    write(rows, status)


def _cpu(process: int) -> float:
    """Seconds of the process itself."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def slope(rows: list[dict[str, Any]], name: str) -> float:
    """Growth per 1000 steps after the first quarter, by least squares."""
    import numpy as np

    rest = rows[len(rows) // 4 :]
    return float(np.polyfit([r["steps"] for r in rest], [r[name] for r in rest], 1)[0] * 1000)


def quarters(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """The rows of each quarter of the steps, with the last row before it."""
    first, last = rows[0]["steps"], rows[-1]["steps"]
    bounds = [first + (last - first) * part // 4 for part in range(5)]
    return [[r for r in rows if low <= r["steps"] <= high] for low, high in itertools.pairwise(bounds)]


def summary(rows: list[dict[str, Any]], status: int | None) -> dict[str, Any]:
    """What the rows come to: slopes, and the first quarter beside the last one."""
    parts, last = quarters(rows), rows[-1]
    ends = {"first quarter": parts[0], "last quarter": parts[-1]}

    def mean(name: str) -> dict[str, float]:
        return {q: round(sum(r[name] for r in part) / len(part), 1) for q, part in ends.items()}

    def largest(name: str) -> dict[str, float]:
        return {q: max(r[name] for r in part) for q, part in ends.items()}

    def per_step(name: str, factor: float = 1.0) -> dict[str, float]:
        ranges = {q: (part[0], part[-1]) for q, part in ends.items()}
        return {
            q: round(factor * (b[name] - a[name]) / max(b["steps"] - a["steps"], 1), 2) for q, (a, b) in ranges.items()
        }

    # how many there are at a moment varies, and one that is ending has no memory any more: the median
    worker = {q: median(r["workers_rss_mb"] / max(r["workers"], 1) for r in part) for q, part in ends.items()}
    growing = ("rss_mb", "files", "threads")
    return {
        "steps": last["steps"],
        "epochs": last["epochs"],
        "validations": last["epochs"],
        "loader_processes_started": 4 * last["epochs"],
        "checkpoints": last["steps"] // SAVED + last["epochs"],
        "six_hours_have": {"steps": STEPS, "epochs": 22, "validations": 22, "checkpoints": 65},
        "minutes": round(last["seconds"] / 60, 1),
        "exit_status": status,
        "growth_per_1000_steps": {name: round(slope(rows, name), 3) for name in growing},
        "growth_in_six_hours": {name: round(slope(rows, name) * STEPS / 1000, 1) for name in growing},
        "rss_mb": mean("rss_mb"),
        "rss_mb_of_a_worker": {q: round(value, 1) for q, value in worker.items()},
        "open_files_at_most": largest("files"),
        "threads_at_most": largest("threads"),
        "processes_at_most": largest("workers"),
        "run_files": largest("run_files"),
        "cpu_ms_a_step": per_step("cpu_s", 1000),
        "ms_a_step": per_step("seconds", 1000),
        "log_bytes_a_step": {name: per_step(name) for name in LOGS},
        "log_mb": {name: round(last[name] / 1e6, 3) for name in LOGS},
    }


def write(rows: list[dict[str, Any]], status: int | None) -> None:
    """The curves as CSV and picture, and what they come to as JSON."""
    with open(RESULTS / "soak_long.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()} for row in rows)
    write_result("soak_long", summary(rows, status))
    _plot(rows)


LOGS = ("run_log", "metrics_csv", "tensorboard")


def _plot(rows: list[dict[str, Any]]) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    steps = [row["steps"] for row in rows]
    pairs = list(itertools.pairwise(rows))
    rates = {
        name: [1000 * (b[key] - a[key]) / (b["steps"] - a["steps"]) for a, b in pairs]
        for name, key in (("on the clock", "seconds"), ("CPU", "cpu_s"))
    }
    shown = {
        "resident memory, MB": ("rss_mb", "workers_rss_mb"),
        "open files, threads, processes": ("files", "threads", "workers"),
        "log files, bytes": LOGS,
    }
    figure, axes = plt.subplots(1, len(shown) + 1, figsize=(16, 3.4), layout="constrained")
    for axis, (title, names) in zip(axes, shown.items(), strict=False):
        for name in names:
            axis.plot(steps, [row[name] for row in rows], label=name)
        axis.set(title=title, xlabel="steps", ylim=(0, None))
        axis.legend(fontsize=8)
    for name, values in rates.items():
        axes[-1].plot(steps[1:], values, label=name, linewidth=0.8)
    axes[-1].set(title="a step, ms", xlabel="steps", ylim=(0, None))
    axes[-1].legend(fontsize=8)
    figure.savefig(RESULTS / "soak_long.png", dpi=100)
