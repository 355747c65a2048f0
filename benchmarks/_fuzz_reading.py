"""What the fuzzer reads of a file, by format, and a process that reads one file after another within limits.

    python benchmarks/_fuzz_reading.py wav

says {} with its CPU seconds, then takes paths on stdin and answers each with a line of JSON: outcome ("read", "refused"
or "escaped"), error, place, the megabytes by which its memory grew at most, and the CPU seconds of the process so far.
A file that takes too long ends it with SIGPROF.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

CPU_SECONDS, MEGABYTES = 20.0, 1024


def _wav(path: Path) -> None:
    from seqzoo.pipelines.audio.reader import AudioReader

    with AudioReader(path, channels="all") as reader:
        reader.read()
    with AudioReader(path, sample_rate=8000) as reader:
        for _ in reader.blocks(0.1):
            pass


def _table(path: Path) -> None:
    from seqzoo.pipelines.forecasting.tables import load_table

    cache = tempfile.mkdtemp(prefix="fuzz-")
    try:
        load_table(path, cache_dir=cache, gaps="fill")
    finally:
        shutil.rmtree(cache, ignore_errors=True)


def _rows(path: Path) -> None:
    from seqzoo.pipelines.audio.sources import table_clips

    table_clips(path)


def _examples(path: Path) -> None:
    from seqzoo.pipelines.documents.readers import read_part

    columns = dict.fromkeys(("text", "file", "label", "split"))
    for _ in read_part("train", path, columns):
        pass


def _documents(path: Path) -> None:
    from seqzoo.pipelines.text.sources import read_documents

    for _ in read_documents([path], path.parent):
        pass


def _video(path: Path) -> None:
    from seqzoo.pipelines.video.reader import open_video

    with open_video(path, backend="av", timeout=30) as reader:
        last = len(reader) - 1
        reader.read([0, last // 2, last])


def _config(path: Path) -> None:
    from seqzoo.zoo import read_config

    with tempfile.TemporaryDirectory() as folder:
        shutil.copyfile(path, Path(folder) / "config.json")
        read_config(folder)


def _annotations(path: Path) -> None:
    from seqzoo.pipelines.video.sources import activitynet_clips

    activitynet_clips(path, path.parent, missing="skip")


def _tokenizer(path: Path) -> None:
    from seqzoo.pipelines.text.tokenizer import create_tokenizer

    create_tokenizer(path)


def _weights(path: Path) -> None:
    from seqzoo.zoo._files import read_state

    read_state(path)


READERS: dict[str, tuple[Callable[[Path], None], ...]] = {
    "wav": (_wav,),
    "csv": (_table, _rows, _examples),
    "parquet": (_table,),
    "mp4": (_video,),
    "json": (_config, _annotations, _tokenizer),
    "jsonl": (_documents, _rows, _examples),
    "safetensors": (_weights,),
}


def read(path: Path, kind: str) -> dict[str, Any]:
    """Read a file by every reader of its format: what came of it. What a reader may raise is the error of its layer."""
    from seqzoo.pipelines.errors import UserError

    outcome = "refused"
    for reader in READERS[kind]:
        ours: type[Exception] = ValueError if reader in (_config, _weights) else UserError
        try:
            reader(path)
            outcome = "read"
        except ours as error:
            # json's and numpy's errors are ValueErrors too; ours name the file
            if type(error) is ValueError and path.stem not in str(error) and "config.json" not in str(error):
                return _escaped(reader, error)
        except Exception as error:
            return _escaped(reader, error)
    return {"outcome": outcome}


def _escaped(reader: Callable[[Path], None], error: BaseException) -> dict[str, Any]:
    frames = [
        f for f in traceback.extract_tb(error.__traceback__) if "/pipelines/" in f.filename or "/zoo/" in f.filename
    ]
    place = f"{Path(frames[-1].filename).name}:{frames[-1].name}" if frames else ""
    text = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return {"outcome": "escaped", "reader": reader.__name__, "error": text, "place": place}


def limit_memory(megabytes: int) -> None:
    """Let the process have so much more than it has now."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * os.sysconf("SC_PAGE_SIZE") + (megabytes << 20)
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    used = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(part.ru_utime + part.ru_stime for part in used)


def _memory(key: str) -> int:
    """Kilobytes, of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(key))


def main() -> None:
    kind = sys.argv[1]
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    warm = Path(sys.argv[2])  # an intact file: what is imported now does not count as the memory of a case
    read(warm, kind)
    limit_memory(4 * MEGABYTES)
    print(json.dumps({"cpu": cpu_seconds()}), file=answers, flush=True)
    for line in sys.stdin:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = _memory("VmRSS")
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        answer = read(Path(line.rstrip("\n")), kind)
        signal.setitimer(signal.ITIMER_PROF, 0)
        answer |= {"grew": max(0, _memory("VmHWM") - before) >> 10, "cpu": cpu_seconds()}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
