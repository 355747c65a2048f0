"""Any words as a query: how well spans of a digit are found by its name, in other words, and by what is not said.

    python benchmarks/audio_words.py runs/audio_events/<run>/checkpoints/best.ckpt     of experiment=audio/find_text

The test recordings of `audio/find_text` (a voice that nobody has heard, 20, 10 and 0 dB) are asked for each digit in
several ways; training knew its name alone ("seven"). The threshold is that of validation. mIoU is over digits and
recordings, R@x the share of them with an IoU of at least x; the last row asks for things that are not there;
`of the time` is how much of a recording is taken for what was asked. SEQZOO_DATA is the folder of fsdd and audio_long.
Writes benchmarks/results/audio_words.{json,md}.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import hardware
from _report import markdown
from _runs import RESULTS, write_result
from audio_stream import data_folder

from seqzoo.pipelines.audio.events.module import label_text
from seqzoo.pipelines.audio.events.task import build_data, load_module
from seqzoo.pipelines.checkpoints import load_checkpoint
from seqzoo.pipelines.spans import span_iou, total, union

NAME = "audio_words"
WAYS = {
    "its name": "{word}",
    "the number ...": "the number {word}",
    "someone says ...": "someone says {word}",
    "the digit as a sign": "{sign}",
}
ABSENT = ("a dog barks", "rain on a roof", "a violin", "hello world", "thank you")
AT = (0.3, 0.5, 0.7)


def found_spans(module: Any, recording: Any, texts: list[str]) -> list[list[tuple[float, float]]]:
    """The spans of each text."""
    spans = module.decode(module.query(recording, texts))
    return [[(s.start, s.end) for s in spans if s.label == number] for number in range(len(texts))]


def measured(module: Any, recordings: list[Any], labels: list[str]) -> list[dict[str, Any]]:
    rows = []
    for way, form in WAYS.items():
        texts = [form.format(word=label_text(label), sign=label) for label in labels]
        scores, shares = [], []
        for recording in recordings:
            found = found_spans(module, recording, texts)
            shares += [total(union(spans)) / recording.seconds for spans in found]
            for number, spans in enumerate(found):
                truth = [(start, end) for start, end, own in recording.truth if own == number]
                if truth:
                    scores.append(span_iou(truth, spans))
        known = np.array(scores)
        hits = {f"R@{least}": round(float((known >= least).mean()), 3) for least in AT}
        asked = {"asked": way, "such as": texts[7], "queries": len(known), "of the time": f"{np.mean(shares):.2%}"}
        rows.append({**asked, "mIoU": round(float(known.mean()), 3), **hits})
    taken = [
        total(union(spans)) / recording.seconds
        for recording in recordings
        for spans in found_spans(module, recording, list(ABSENT))
    ]
    absent = {"asked": "what is not there", "such as": ABSENT[0], "queries": len(taken)}
    return [*rows, {**absent, "of the time": f"{np.mean(taken):.2%}"}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="of lightning fit experiment=audio/find_text")
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    folder = data_folder()
    places = [f"data.path='{folder / 'fsdd'}'", f"data.backgrounds='{folder / 'audio_long'}'"]
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        node = compose("config", overrides=["experiment=audio/find_text", *places])
    cfg: Any = OmegaConf.to_container(node, resolve=True)
    data = build_data(cfg)
    data.setup("test")
    module = load_module(load_checkpoint(given.checkpoint), given.checkpoint, cfg).eval()
    with torch.inference_mode():
        rows = measured(module, data.recordings["test"], module.schema["labels"])
    settings = {"model": module.hparams["model"]["name"], "threshold": round(float(module.threshold), 3)}
    command = f"python benchmarks/{NAME}.py CHECKPOINT"
    record = {"settings": settings, "command": command, "hardware": hardware(torch.device("cpu")), "rows": rows}
    written = write_result(NAME, record, given.out)
    page = [
        "# Any words as a query",
        f"`{command}`, with the best checkpoint of `lightning fit experiment=audio/find_text`, whose labels are the "
        "MiniLM vectors of ten digits' names. Ten minutes each at 20, 10 and 0 dB, a voice that nobody has heard.",
        markdown(rows),
    ]
    written.with_suffix(".md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    print(markdown(rows))


if __name__ == "__main__":
    main()
