"""How fast and in how much memory `lightning predict experiment=audio/find` hears ten minutes and an hour.

    python benchmarks/audio_stream.py [--minutes 10 60] [--threads 1 2] [--folder DIR]

SEQZOO_DATA is the folder of fsdd and audio_long: spoken digits are planted into the recordings at 16 kHz, so that the
hour is resampled to the 8 kHz of the model, written as WAV. The detector is the one that experiment=audio/find builds,
after one training step: what it finds costs the same. It hears windows, which is the default; find_causal carries its
state; and softmax in windows. Each run is a process of its own; its time is that of hearing alone
(what predict prints) and of the whole command, its memory the largest resident set. Writes
benchmarks/results/audio_stream.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _measure import hardware
from _report import markdown
from _runs import RESULTS, earlier_rows, write_result

from seqzoo.pipelines.audio.backgrounds import cut_backgrounds
from seqzoo.pipelines.audio.composer import compose_recording
from seqzoo.pipelines.audio.known import digit_clips

WAYS: dict[str, list[str]] = {
    "mamba2, windows": ["experiment=audio/find"],
    "mamba2, causal, state": ["experiment=audio/find_causal"],
    "softmax, windows": [
        *("experiment=audio/find", "mixer=softmax", "mixer.position=rope"),
        *("task.window=null", "task.window_overlap=2", "task.windows_at_once=8"),  # as long as those of training
    ],
}
SOURCE_RATE = 16000
NAME = "audio_stream"


def data_folder() -> Path:
    """The folder of fsdd and audio_long; exits with a message when they are not there."""
    folder = Path(os.environ.get("SEQZOO_DATA", "data")).resolve()
    for name in ("fsdd", "audio_long"):
        if not (folder / name).is_dir():
            sys.exit(f"no folder {name} in {folder}; set SEQZOO_DATA to the folder that holds it")
    return folder


def command(name: str, *overrides: str, threads: int = 1) -> tuple[float, float]:
    """Wall seconds and the largest resident set in MiB of `lightning <name>` in a process of its own."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"}
    given = [sys.executable, "-m", "seqzoo", name, *overrides]
    with tempfile.TemporaryFile("w+") as log:
        begin = time.perf_counter()
        process = subprocess.Popen(given, env=environment, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - begin
        if status:
            log.seek(0)
            sys.exit(f"{' '.join(given)}\n{log.read()}")
    return seconds, usage.ru_maxrss / 1024


def trained(way: str, folder: Path) -> Path:
    """A checkpoint after one step."""
    run = folder / way.replace(", ", "_").replace(" ", "_")
    path = run / "checkpoints" / "last.ckpt"
    if not path.is_file():
        short = ["trainer.max_epochs=1", "data.steps=1", "data.val_recordings=1", "data.val_minutes=0.5"]
        command("fit", *WAYS[way], *short, "test_after_fit=false", f"hydra.run.dir='{run}'")
    return path


def recording(minutes: float, folder: Path, data: Path) -> Path:
    """A WAV file of 16 kHz with digits in it."""
    path = folder / f"{minutes:g}_minutes.wav"
    if not path.is_file():
        parts = cut_backgrounds(data / "audio_long", SOURCE_RATE, (1.0, 0.0, 0.0))
        compose_recording(path, digit_clips(data / "fsdd"), parts["train"], minutes=minutes, sample_rate=SOURCE_RATE)
    return path


def measured(way: str, minutes: float, threads: int, folder: Path, data: Path) -> dict[str, Any]:
    run = folder / "predict"
    seconds, memory = command(
        "predict",
        *WAYS[way],
        f"ckpt_path={trained(way, folder)}",
        f"data.path={recording(minutes, folder, data)}",
        f"hydra.run.dir='{run}'",
        threads=threads,
    )
    found = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return {
        "model": way,
        "minutes": minutes,
        "threads": threads,
        "times real time": round(found["times_real_time"], 1),
        "whole command, s": round(seconds, 1),
        "peak MiB": round(memory, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[10, 60])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--models", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--folder", type=Path, help="where recordings and runs are kept; default: a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    data = data_folder()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        settings = {"sample_rate": SOURCE_RATE}
        rows = {(row["model"], row["minutes"], row["threads"]): row for row in earlier_rows(NAME, settings, given.out)}
        for way in given.models:
            for threads in given.threads:
                for minutes in given.minutes:
                    row = measured(way, minutes, threads, folder, data)
                    rows[way, minutes, threads] = row
                    print(row, flush=True)
    command = "python benchmarks/audio_stream.py --threads " + " ".join(map(str, given.threads))
    write(list(rows.values()), settings, command, given.out)


def write(rows: list[dict[str, Any]], settings: dict[str, Any], command: str, folder: Path) -> None:
    """Both files; memory also beside that of the shortest recording of the same model."""
    for row in rows:
        same = [other for other in rows if (other["model"], other["threads"]) == (row["model"], row["threads"])]
        shortest = min(same, key=lambda other: other["minutes"])
        row["of the shortest"] = round(row["peak MiB"] / shortest["peak MiB"], 3)
    record = {"settings": settings, "command": command, "hardware": hardware(torch.device("cpu")), "rows": rows}
    path = write_result(NAME, record, folder)
    page = [
        "# Hearing hours",
        f"`{command}`, on a CPU. Digits are planted into recordings of 16 kHz, which the detector of "
        "experiment=audio/find hears at 8 kHz, in a process of its own for each row: how much faster than it sounds, "
        "the whole command with its start, and the largest resident set.",
        markdown(rows),
    ]
    path.with_suffix(".md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
