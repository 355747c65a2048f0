"""Which digit is said when, in ten minutes over other sounds: four mixers of equal size beside an energy detector.

    python benchmarks/audio_events.py --digits fsdd --backgrounds audio_long [--models softmax s4d gla mamba2]
    python benchmarks/audio_events.py ... --tiny --out /tmp/results     a test of this script, in a minute

The runs are those of `lightning fit experiment=audio/find` with other mixers: the same detector, whose feed-forward is
as wide as makes its parameters as many as those with softmax, the same --epochs of --steps batches of the same windows,
speakers and stretches of background held out for validation and test. The test plants the same digits of a speaker that
nobody has heard into the same ten minutes at 20, 10 and 0 dB. The best of the epochs by event F1 in validation is
tested. The energy detector has its margin from validation too and calls everything the most frequent label; `any` are
scores where labels are not looked at. Each run adds its rows to benchmarks/results/audio_events.json and .md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from _measure import hardware
from _report import markdown
from _runs import RESULTS, write_result

NAME = "audio_events"
MODELS = ("softmax", "s4d", "gla", "mamba2")
WITHIN = 0.05  # of the parameters of softmax
SETTINGS = ("epochs", "steps", "batch", "dim", "depth", "lr", "seed", "test_recordings", "tiny")
SCORES = ("event_f1", "miou", "segment_f1", "event_f1_any", "miou_any")
TINY = {"epochs": 1, "steps": 2, "batch": 2, "dim": 16, "depth": 1, "test_recordings": 1}


def mixer(name: str, dim: int) -> dict[str, Any]:
    """What mixes in the model of that name, in both directions."""
    heads = 4 if dim >= 64 else 2
    return {
        "softmax": {"num_heads": heads, "position": "rope"},
        "s4d": {},
        "gla": {"num_heads": heads, "d_conv": 4},  # with the short convolution that Mamba-2 has
        "mamba2": {"d_state": min(32, dim), "head_dim": min(32, dim), "expand": 1.0 if dim < 64 else 2.0},
    }[name]


def parameters(name: str, options: argparse.Namespace, mlp_ratio: float) -> int:
    from seqzoo.zoo import create_model

    net = create_model(
        "audio_detector_small",
        num_classes=10,
        sample_rate=8000,
        mixer={"name": name, **mixer(name, options.dim)},
        dim=options.dim,
        depth=options.depth,
        mlp_ratio=mlp_ratio,
        front_end={"name": "log_mel", "stack": 4, "norm": "fixed", "num_mels": 40},
    )
    return sum(p.numel() for p in net.parameters())


def equal_ratio(name: str, options: argparse.Namespace) -> tuple[float, int]:
    """The feed-forward's width over dim with which the model has as many parameters as with softmax and 2; and how
    many these are."""
    dim, usual = options.dim, 2 * options.dim
    wanted = parameters("softmax", options, 2.0)
    hidden = max(usual - round((parameters(name, options, 2.0) - wanted) / (2 * dim * options.depth)), 1)
    number = parameters(name, options, hidden / dim)
    if abs(number / wanted - 1) > WITHIN:
        sys.exit(f"{name} has {number:,} parameters, softmax {wanted:,}: more than {WITHIN:.0%} apart")
    return hidden / dim, number


def measure(name: str, options: argparse.Namespace, run_dir: Path) -> list[dict[str, Any]]:
    """The rows of a mixer, one for each SNR, with those of the energy detector and of chance."""
    from hydra import compose, initialize_config_module
    from omegaconf import OmegaConf

    from seqzoo.pipelines.run import execute

    ratio, number = equal_ratio(name, options)
    print(f"{name}: {number:,} parameters, feed-forward {ratio:.3f} of the width", flush=True)
    overrides = [
        "experiment=audio/find",
        f"mixer={name}",
        *(f"mixer.{key}={value}" for key, value in mixer(name, options.dim).items()),
        f"model.dim={options.dim}",
        f"model.depth={options.depth}",
        f"model.mlp_ratio={ratio}",
        "model.front_end.stack=4",
        "model.position=sinusoidal",
        # as long as those of training: neither positions reach further
        "task.window=null",
        "task.window_overlap=2",
        f"data.path='{options.digits}'",
        f"data.backgrounds='{options.backgrounds}'",
        f"data.batch_size={options.batch}",
        f"data.steps={options.steps}",
        f"data.test_recordings={options.test_recordings}",
        f"optimizer.lr={options.lr}",
        f"trainer.max_epochs={options.epochs}",
        f"seed={options.seed}",
        "logger.tensorboard=false",
        "callbacks.progress=plain",
        f"paths.runs='{run_dir}'",
    ]
    if options.tiny:
        overrides += ["data.test_minutes=0.5", "data.val_minutes=0.5", "data.val_recordings=1"]
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        # a mixer has none of the options of another
        node = compose("config", overrides=[*overrides, *EXTRA])
    cfg: Any = OmegaConf.to_container(node, resolve=True)
    if name != "softmax":
        cfg["mixer"] = {key: value for key, value in cfg["mixer"].items() if key in _options(name)}
        cfg["model"]["mixer"] = cfg["mixer"]
    begin, cpu = time.perf_counter(), time.process_time()
    found = execute("fit", cfg, run_dir / name)
    record = json.loads((run_dir / name / "scores.json").read_text(encoding="utf-8"))
    if record["parameters"] != number:
        sys.exit(f"{name}: {record['parameters']:,} parameters were trained, {number:,} were asked for")
    facts = {
        "parameters": number,
        "steps": found["steps"],
        "seconds": round(time.perf_counter() - begin, 1),
        "CPU seconds": round(time.process_time() - cpu, 1),
        "validation": round(found["val/event_f1"], 4),
        "threshold": record["threshold"],
    }
    rows = []
    for row in record["rows"]:
        baseline = row["method"].startswith(("energy", "chance"))
        own = {} if baseline else facts
        kept = {key: row[key] for key in (*SCORES, "events", "found")}
        rows.append({"method": row["method"] if baseline else name, "condition": row["condition"], **kept, **own})
    return rows


EXTRA = ["++model.front_end.num_mels=40"]


def _options(name: str) -> set[str]:
    from seqzoo.blocks.registry import mixer_info

    return {"name", *mixer_info(name).options}


def table(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A line for each method: its scores by SNR."""
    shown = {"event F1": "event_f1", "mIoU": "miou", "any F1": "event_f1_any"}
    conditions = list(dict.fromkeys(cell["condition"] for cell in cells))
    lines = {cell["method"]: {"method": cell["method"], "parameters": cell.get("parameters")} for cell in cells}
    for name, key in shown.items():
        for condition in conditions:
            for cell in cells:
                if cell["condition"] == condition:
                    value = cell[key]
                    lines[cell["method"]][f"{name}, {condition}"] = None if value is None else round(value, 3)
    return sorted(lines.values(), key=lambda line: MODELS.index(line["method"]) if line["method"] in MODELS else 99)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--digits", type=Path, required=True, help="folder of the Free Spoken Digit Dataset")
    parser.add_argument("--backgrounds", type=Path, required=True, help="folder of long recordings")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300, help="batches in an epoch")
    parser.add_argument("--batch", type=int, default=4, help="windows of ten seconds in a batch")
    parser.add_argument("--dim", type=int, default=96)
    parser.add_argument("--depth", type=int, default=3)
    parser.add_argument("--lr", type=float, default=1.5e-3)
    parser.add_argument("--test-recordings", type=int, default=2, help="of ten minutes for each SNR")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=None, help="folder of the results")
    parser.add_argument("--runs", type=Path, default=None, help="folder of the runs; a temporary one otherwise")
    parser.add_argument("--tiny", action="store_true", help="tiny models: a test of this script, not a measurement")
    options = parser.parse_args()
    if options.tiny:
        if options.out is None:
            parser.error("--tiny measures nothing that is worth keeping: give --out, a folder of its own")
        vars(options).update(TINY)
    torch.set_num_threads(options.threads)
    settings = {name: getattr(options, name) for name in SETTINGS}
    given = [
        f"--{key.replace('_', '-')} {value}"
        for key, value in settings.items()
        if key != "tiny" and value != parser.get_default(key)
    ]
    command = " ".join([f"python benchmarks/{NAME}.py --digits fsdd --backgrounds audio_long", *given])
    for name in options.models:
        with tempfile.TemporaryDirectory() as temporary:
            cells = measure(name, options, (options.runs or Path(temporary)).resolve())
        print(markdown(write(cells, settings, command, options.out or RESULTS)), flush=True)


def write(cells: list[dict[str, Any]], settings: dict[str, Any], command: str, folder: Path) -> list[dict[str, Any]]:
    """Both files with these scores beside earlier ones of other methods and the same settings; returns the table."""
    path = folder / f"{NAME}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    methods = {cell["method"] for cell in cells}
    if known.get("settings") == settings:
        cells = [cell for cell in known["cells"] if cell["method"] not in methods] + cells
    rows = table(cells)
    record = {"settings": settings, "hardware": hardware(torch.device("cpu")), "command": command}
    write_result(NAME, {**record, "rows": rows, "cells": cells}, folder)
    facts = [
        {key: cell.get(key) for key in ("method", "steps", "CPU seconds", "seconds", "validation", "threshold")}
        for cell in cells
        if cell["condition"] == cells[0]["condition"] and cell.get("steps")
    ]
    page = [
        "# Events in long recordings",
        f"`{command}`, on a CPU. {' '.join((__doc__ or '').split('    python')[0].split())} Speakers and stretches of "
        "background of the test are in neither training nor validation.",
        markdown(rows),
        "Event F1: onsets within 200 ms, ends within 200 ms or half of the length. mIoU: of the unions of spans, over "
        "labels and recordings. Any: where labels are not looked at. The training:",
        markdown(facts),
    ]
    path.with_suffix(".md").write_text("\n\n".join(page) + "\n", encoding="utf-8")
    return rows


if __name__ == "__main__":
    main()
