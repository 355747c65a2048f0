"""How far windows are from the whole recording, for a trained detector that hears both ways.

    python benchmarks/audio_windows.py runs/audio_events/<run>/checkpoints/best.ckpt [--minutes 10] [--context 1 5 20]

A recording of the test's voice and backgrounds is heard once as a whole, and in windows of which a minute is
kept, with --context seconds more on either side. A row compares the probabilities of all tokens and labels:
the largest and the mean difference, the share that differs by more than 0.01 and 0.05, and the event F1 of what is
decoded from windows against what is decoded from the whole. SEQZOO_DATA is the folder of fsdd and audio_long.
Writes benchmarks/results/audio_windows.{json,md}.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import torch
from _measure import hardware
from _report import markdown
from _runs import RESULTS, write_result
from audio_stream import data_folder

from seqzoo.pipelines.audio.backgrounds import cut_backgrounds
from seqzoo.pipelines.audio.composer import compose_recording
from seqzoo.pipelines.audio.events.scores import EventSums
from seqzoo.pipelines.audio.events.task import load_module
from seqzoo.pipelines.audio.known import digit_clips
from seqzoo.pipelines.audio.reader import AudioReader
from seqzoo.pipelines.audio.streaming import FileSource, stream
from seqzoo.pipelines.checkpoints import load_checkpoint

NAME = "audio_windows"
WINDOW = 60.0  # seconds that a window keeps


def recording(path: Path, minutes: float, data: Path, rate: int) -> Path:
    """A WAV file with digits of the voice that neither training nor validation had."""
    parts = cut_backgrounds(data / "audio_long", rate, (0.7, 0.15, 0.15))
    clips = [clip for clip in digit_clips(data / "fsdd", "speakers") if clip.split == "test"]
    compose_recording(path, clips, parts["test"], minutes=minutes, sample_rate=rate, snr_db=10.0)
    return path


def probabilities(module: Any, path: Path, piece: float, context: float) -> torch.Tensor:
    """(L, C), float64."""
    source = FileSource(AudioReader(path, sample_rate=module.schema["sample_rate"]))
    pieces = stream(
        module.net.encoder, module.net.answer, source, piece_seconds=piece, context_seconds=context, batch_size=4
    )
    return torch.cat([found.values for found in pieces]).double().sigmoid()


def compared(module: Any, whole: torch.Tensor, windows: torch.Tensor, minutes: float) -> dict[str, Any]:
    apart = (whole - windows).abs()
    truth, found = (
        [(s.start, s.end, s.label) for s in module.decode(module._placed(values.logit()))]
        for values in (whole, windows)
    )
    sums = EventSums(whole.shape[1])
    sums.update(truth, found, minutes * 60)
    return {
        "mean": round(float(apart.mean()), 5),
        "above 0.01": f"{float((apart > 0.01).double().mean()):.2%}",
        "above 0.05": f"{float((apart > 0.05).double().mean()):.2%}",
        "largest": round(float(apart.max()), 4),
        "event F1 against the whole": round(sums.compute()["event_f1"], 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of lightning fit experiment=audio/find")
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--context", type=float, nargs="+", default=[1.0, 5.0, 10.0, 20.0, 30.0, 60.0])
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    data = data_folder()
    module = load_module(load_checkpoint(given.checkpoint), given.checkpoint, {}).eval()
    model = {key: module.hparams["model"][key] for key in ("name", "mixer", "position", "dim", "depth")}
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = recording(Path(folder) / "talk.wav", given.minutes, data, module.schema["sample_rate"])
        whole = probabilities(module, path, 60 * given.minutes + 1, 0.0)
        for context in given.context:
            windows = probabilities(module, path, WINDOW, context)
            rows.append({"context, s": context, **compared(module, whole, windows, given.minutes)})
            print(rows[-1], flush=True)
    settings = {"minutes": given.minutes, "window": WINDOW, "model": model}
    command = f"python benchmarks/{NAME}.py CHECKPOINT --minutes {given.minutes:g}"
    record = {"settings": settings, "command": command, "hardware": hardware(torch.device("cpu")), "rows": rows}
    written = write_result(NAME, record, given.out)
    page = [
        "# Windows against the whole",
        f"`{command}`, with the best checkpoint of "
        f"`lightning fit experiment=audio/find` ({model['name']}, {model['mixer']['name']} both ways, positions: "
        f"{model['position']}): probabilities of {len(whole):,} tokens and {whole.shape[1]} labels, heard in windows "
        f"that keep {WINDOW:g} seconds and hear so many more on either side, against hearing all at once.",
        markdown(rows),
    ]
    written.with_suffix(".md").write_text("\n\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
