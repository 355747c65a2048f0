"""Mutated files through the real readers: what escapes that is no error of ours, hangs, or takes too much memory.

    python benchmarks/fuzz.py --minutes 30 [--formats wav csv mp4] [--seed 0]

hypothesis makes the edits of small intact files and shrinks what escapes; a process beside this one reads them, at most
20 seconds of CPU and 1 GiB more memory for a case. What was found is written to tests/data/fuzz/, a row for each format
and seed to benchmarks/results/fuzz.json, beside the rows that are there, with the sums of all: CPU seconds are those of
this process and of the one that reads. tests/house/test_hostile_data.py reads all of tests/data/fuzz/ again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import select
import signal
import struct
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import _fuzz_reading
import hypothesis
import numpy as np
from _runs import RESULTS, ROOT, write_result
from hypothesis import strategies as st

CORPUS = ROOT / "tests" / "data" / "fuzz"
WALL_SECONDS, LARGEST = 180.0, 64 << 10
_NUMBERS = [0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, *((1 << n) - 1 for n in (31, 32, 64)), 1 << 31, 1 << 60]
_ODD = [b"../../etc/passwd", b"~nobody/x", b"a" * 5000, b"9" * 5000, b"-1e309", b"nan", b"\xff\xfe", b"\0"]
_JSON = [b"[" * 3000, b"{", b"}", b"null", b"true", b"-1", b"NaN", b'"\\ud800"', b"[]", b"{}", b'""']
_WORDS = {
    "csv": [*_ODD, *b', ; " \n \r 2024-13-45 9999-12-31 0001-01-01 =1+1 start inf \xef\xbb\xbf'.split(b" ")],
    "json": [*_ODD, *_JSON, b'"_target_":"os.system",', b'"files":{"../x":"0"},', b'"options":[],'],
    "jsonl": [*_ODD, *_JSON, b"\n"],
    "wav": [*b"fmt |data|LIST|RIFF|fact|RF64|ds64".split(b"|"), b"\0" * 16, b"\xff" * 16],
    "mp4": b"moov mdat trak stts stsz stco stsc ctts elst tkhd avc1 mp4v free dref".split(),
    "parquet": [b"PAR1", b"\0" * 8, b"\xff" * 8],
    "safetensors": [*_ODD, *_JSON, b'"data_offsets":[0,8]', b'"shape":[]', b'"F64"'],
}


# intact files ---------------------------------------------------------------------------------------------------------


def _seeds(kind: str, folder: Path) -> list[bytes]:
    """A few small intact files of a format."""
    made = []
    for number, write in enumerate(SEEDS[kind]):
        path = folder / f"seed{number}.{kind}"
        write(path)
        made.append(path.read_bytes())
    return made


def _wav(subtype: str, channels: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import soundfile

        samples = 0.5 * np.sin(np.arange(800 * channels).reshape(-1, channels) / 7)
        soundfile.write(path, samples, 16000, subtype=subtype, format="WAV")

    return write


def _text(content: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_text(content, encoding="utf-8")

    return write


def _mp4(codec: str, between: int) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import av

        with av.open(str(path), "w") as file:
            stream: Any = file.add_stream(codec, rate=10)
            stream.width, stream.height, stream.pix_fmt = 32, 32, "yuv420p"
            stream.codec_context.gop_size, stream.codec_context.max_b_frames = 4, between
            for number in range(9):
                picture = np.full((32, 32, 3), 25 * number, np.uint8)
                picture[number : number + 8] = 255
                file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            file.mux(stream.encode())

    return write


def _parquet(path: Path) -> None:
    import pandas as pd

    times = pd.date_range("2024-01-01", periods=40, freq="h")
    pd.DataFrame({"time": times, "a": np.arange(40.0), "b": np.arange(40) % 7}).to_parquet(path, index=False)


def _long_parquet(path: Path) -> None:
    import pandas as pd

    times = [*pd.date_range("2024-01-01", periods=12, freq="D").astype(str)] * 2
    frame = pd.DataFrame({"unique_id": ["x"] * 12 + ["y"] * 12, "ds": times, "y": np.arange(24.0)})
    frame.to_parquet(path, index=False, compression="zstd")


def _safetensors(path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"a.weight": torch.ones(3, 4), "b": torch.zeros(2, dtype=torch.bfloat16)}, path)


def _series() -> str:
    rows = [f"2024-01-{1 + k // 24:02d} {k % 24:02d}:00,{k * 0.5},{k % 7}" for k in range(48)]
    return "date,load,temp\n" + "\n".join(rows) + "\n"


def _panel() -> str:
    rows = [f"{s};2024-02-{k + 1:02d};{k + 3}" for s in ("x", "y") for k in range(20)]
    return "unique_id;ds;y\n" + "\n".join(rows) + "\n"


_ROWS = [
    {"path": "a.wav", "label": "yes", "start": 0, "end": 1.5},
    {"path": "b.wav", "label": "no", "start": "", "end": ""},
]
_DOCUMENTS = [{"text": "one of them\n", "label": "a"}, {"text": "\u00e9 another", "label": "b", "split": "val"}]
_CONFIG = {
    "schema_version": 2,
    "name": "patch_tiny",
    "options": {"seq_len": 48, "mixer": {"name": "linear"}},
    "sha256": "0" * 64,
    "preprocessing": {"freq": "h", "mean": [0.5, 1.0]},
    "files": {"tokenizer.json": "0" * 64},
}
_MOMENTS = {"v_1": {"duration": 9.5, "timestamps": [[0.0, 4.5], [3, 9]], "sentences": ["a man runs", "he stops"]}}
_TOKENS = {
    "version": "1.0",
    "added_tokens": [],
    "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    "model": {"type": "BPE", "vocab": {"a": 0, "b": 1, "ab": 2, "<|endoftext|>": 3}, "merges": [["a", "b"]]},
}

SEEDS: dict[str, list[Callable[[Path], None]]] = {
    "wav": [_wav("PCM_16", 1), _wav("FLOAT", 2), _wav("IMA_ADPCM", 1), _wav("ULAW", 1)],
    "csv": [
        _text(_series()),
        _text(_panel()),
        _text("path,label,start,end\na.wav,yes,0,1.5\nb.wav,no,,\n"),
        _text('text,label,split\n"one, of\nthem",a,train\ntwo,b,test\n'),
    ],
    "mp4": [_mp4("mpeg4", 0), _mp4("libx264", 2)],
    "parquet": [_parquet, _long_parquet],
    "json": [_text(json.dumps(content)) for content in (_CONFIG, _MOMENTS, _TOKENS)],
    "jsonl": [_text("\n".join(map(json.dumps, rows)) + "\n") for rows in (_ROWS, _DOCUMENTS)],
    "safetensors": [_safetensors],
}


# edits ----------------------------------------------------------------------------------------------------------------


def _edits(kind: str) -> st.SearchStrategy[list[tuple[Any, ...]]]:
    place, span = st.integers(0, 1 << 16), st.integers(1, 64)
    number = st.tuples(st.sampled_from(_NUMBERS), st.sampled_from("BHIQ"), st.sampled_from("<>"))
    edit = st.one_of(
        st.tuples(st.just("byte"), place, st.integers(0, 255)),
        st.tuples(st.just("number"), place, number),
        st.tuples(st.just("word"), place, st.sampled_from(_WORDS[kind])),
        st.tuples(st.just("over"), place, st.sampled_from(_WORDS[kind])),
        st.tuples(st.just("delete"), place, span),
        st.tuples(st.just("double"), place, span),
        st.tuples(st.just("insert"), place, st.binary(min_size=1, max_size=16)),
        st.tuples(st.just("cut"), place, st.just(0)),
    )
    return st.lists(edit, min_size=1, max_size=6)


def edited(content: bytes, edits: list[tuple[Any, ...]]) -> bytes:
    """The content after the edits; a place beyond the end counts on from the start."""
    data = bytearray(content)
    for what, place, value in edits:
        at = place % (len(data) + 1)
        if what == "byte":
            data[at : at + 1] = bytes([value])
        elif what == "number":
            number, width, order = value
            size = struct.calcsize(width)
            data[at : at + size] = (number % (1 << 8 * size)).to_bytes(size, "little" if order == "<" else "big")
        elif what in ("word", "insert"):
            data[at:at] = value
        elif what == "over":
            data[at : at + len(value)] = value
        elif what == "delete":
            del data[at : at + value]
        elif what == "double":
            data[at:at] = data[at : at + value]
        else:
            del data[at:]
    return bytes(data[:LARGEST])


# reading --------------------------------------------------------------------------------------------------------------


class Reading:
    """The process that reads, started again where it ended."""

    def __init__(self, kind: str, folder: Path, intact: bytes) -> None:
        self.kind, self.folder = kind, folder
        for name in ("a.wav", "b.wav", "v_1.mp4"):  # what the rows name is there
            (folder / name).touch()
        self._warm = folder / f"intact.{kind}"
        self._warm.write_bytes(intact)
        self._process: subprocess.Popen[str] | None = None
        self.cpu = 0.0  # seconds of it

    def __call__(self, content: bytes) -> dict[str, Any]:
        path = self.folder / f"case.{self.kind}"
        path.write_bytes(content)
        process = self._started()
        assert process.stdin is not None
        print(path, file=process.stdin, flush=True)
        line = self._line(process)
        if line:
            answer = json.loads(line)
            self.cpu = answer.pop("cpu")
            if answer["grew"] > _fuzz_reading.MEGABYTES:
                return {"outcome": "memory", "error": f"{answer['grew']} MB", "place": ""}
            return answer
        process.kill()
        status, self._process, self.cpu = process.wait(), None, 0.0
        slow = status in (-signal.SIGPROF, -signal.SIGKILL)
        return {"outcome": "hang" if slow else "crash", "error": f"exit status {status}", "place": ""}

    def _started(self) -> subprocess.Popen[str]:
        if self._process is None:
            command = [sys.executable, "-P", str(Path(_fuzz_reading.__file__)), self.kind, str(self._warm)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
            line = self._line(self._process, 600)
            if not line:
                sys.exit(f"the process that reads {self.kind} did not start")
            self.cpu = json.loads(line)["cpu"]
        return self._process

    @staticmethod
    def _line(process: subprocess.Popen[str], seconds: float = WALL_SECONDS) -> str:
        assert process.stdout is not None
        there, _, _ = select.select([process.stdout], [], [], seconds)
        return process.stdout.readline() if there else ""

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process, self.cpu = None, 0.0


class Escaped(Exception):
    """A case that must not be; hypothesis shrinks it."""


def fuzz(kind: str, seconds: float, seed: int, folder: Path) -> dict[str, Any]:
    """Cases of a format until so many seconds of CPU are used, in rounds of 200; a find is shrunk and not looked for
    again."""
    before = _fuzz_reading.cpu_seconds()

    def used() -> float:
        return _fuzz_reading.cpu_seconds() + reading.cpu - before

    seeds = _seeds(kind, folder)
    reading = Reading(kind, folder, seeds[0])
    intact = [reading(content)["outcome"] for content in seeds]
    counts: Counter[str] = Counter()
    found: dict[str, dict[str, Any]] = {}
    began, rounds, slowest = time.monotonic(), 0, 0.0
    while used() < seconds:
        last: list[tuple[str, bytes, dict[str, Any]]] = []

        def one(content: bytes, edits: list[tuple[Any, ...]], last: list[Any] = last) -> None:
            nonlocal slowest
            if used() > seconds + 60:
                return
            case, start = edited(content, edits), time.monotonic()
            answer = reading(case)
            slowest = max(slowest, time.monotonic() - start)
            counts[answer["outcome"]] += 1
            if answer["outcome"] in ("read", "refused"):
                return
            key = "{} {} {}".format(answer["outcome"], answer.get("reader", ""), answer["place"])
            if key in found:
                return
            last.append((key, case, answer))
            if answer["outcome"] == "escaped":  # what takes long is not shrunk
                raise Escaped(key)

        @hypothesis.seed(seed * 1_000_003 + rounds)
        @hypothesis.settings(
            max_examples=200,
            database=None,
            deadline=None,
            phases=(hypothesis.Phase.generate, hypothesis.Phase.shrink),
            suppress_health_check=list(hypothesis.HealthCheck),
            verbosity=hypothesis.Verbosity.quiet,
            report_multiple_bugs=False,
        )
        @hypothesis.given(st.sampled_from(seeds), _edits(kind))
        def cases(content: bytes, edits: list[tuple[Any, ...]]) -> None:
            one(content, edits)

        try:
            cases()
        except Escaped:
            pass
        except Exception as error:  # one that does not come again
            print(f"{kind}: {type(error).__name__}: {error}", flush=True)
        for key, case, answer in last[-1:]:
            name = f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:8]}.{kind}"
            found[key] = {**answer, "file": name, "bytes": len(case)}
            (CORPUS / name).write_bytes(case)
            print(f"{kind}: {key}: {answer['error']} -> {name}", flush=True)
        rounds += 1
    reading.close()
    cpu, took = used(), time.monotonic() - began
    print(f"{kind}: {sum(counts.values()):,} cases in {cpu:.0f} s of CPU, {took:.0f} s: {dict(counts)}", flush=True)
    return {
        "format": kind,
        "seed": seed,
        "cases": sum(counts.values()),
        "cpu_seconds": round(cpu, 1),
        "seconds": round(took, 1),
        "outcomes": dict(counts),
        "slowest": round(slowest, 2),
        "intact": intact,
        "found": list(found.values()),
    }


def with_earlier(rows: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows after those of earlier runs; a format and seed that was run again has its new row."""
    again = {(row["format"], row["seed"]) for row in rows}
    return [row for row in earlier if (row["format"], row["seed"]) not in again] + rows


def sums(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Of all rows; CPU minutes of those that have them, the first runs did not look."""
    timed = [row for row in rows if row.get("cpu_seconds") is not None]
    return {
        "cpu_minutes": round(sum(row["cpu_seconds"] for row in timed) / 60, 1),
        "cases in them": sum(row["cases"] for row in timed),
        "cases": sum(row["cases"] for row in rows),
        "minutes": round(sum(row["seconds"] for row in rows) / 60, 1),
        "found": sum(len(row["found"]) for row in rows),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="of CPU, for all formats together")
    parser.add_argument("--formats", nargs="+", choices=sorted(SEEDS), default=list(SEEDS))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="fuzz", help="of the file in benchmarks/results")
    options = parser.parse_args()
    CORPUS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{options.name}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    rows: list[dict[str, Any]] = []
    for kind in options.formats:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(fuzz(kind, 60 * options.minutes / len(options.formats), options.seed, Path(folder)))
        every = with_earlier(rows, known.get("rows", []))
        most = {"cpu_seconds": _fuzz_reading.CPU_SECONDS, "megabytes": _fuzz_reading.MEGABYTES}
        notes = {"note": known["note"]} if "note" in known else {}
        write_result(options.name, {"total": sums(every), "most of a case": most, "rows": every, **notes})


if __name__ == "__main__":
    main()
