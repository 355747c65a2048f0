"""Multi-query associative recall: what each causal mixer remembers, against the number of pairs and its state.

    python benchmarks/recall.py [--mixers softmax mamba2] [--steps 1500] [--rates 1e-3 3e-3]

The task (MQAR, Arora et al., arXiv:2312.04927, recipe of their public code at a smaller vocabulary): a row holds n
pairs (key, value), keys and values drawn without replacement from two halves of the vocabulary; each key comes once
more at a place drawn with p(gap g) ~ g^(a-1), a = 0.01, and the model must then give its value. Other places hold
random keys that are not of the row, or 0 (the public recipe lets them collide, which is label noise; the probes of
pipelines/text/probes/token_tasks.py put values there too: another distribution than that of the results here).

Every mixer sits in the same model (a causal convolution of three taps after the embedding, as in the public hybrids,
then two blocks of width 64 with a GELU feed-forward; no positions) and sees the same batches for the same number of
steps on one thread, at each learning rate of --rates, of which the best on validation rows is kept. Test rows are
others; those of 256 tokens are twice as long as any in training. recall_causes.py asks why some learn little. Writes
benchmarks/results/recall.json and, with matplotlib, docs/pictures/recall.png.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from _runs import ROOT, earlier_rows, write_result
from torch import Tensor, nn

import seqzoo
from seqzoo.blocks.layers.conv import ShortConv

VOCAB = 256
TRAINING = ((64, 4), (64, 8), (128, 16), (128, 32))  # (length, pairs), in turn
TESTS = ((64, 4), (64, 8), (128, 16), (128, 32), (256, 64))
# Two heads of 32 instead of eight of 8, and chunks that are shorter than a row.
OPTIONS: dict[str, dict[str, Any]] = {
    "agent": {"num_heads": 2},
    "bi_level_routing": {"num_heads": 2, "region_size": 16},
    "gla": {"num_heads": 2},
    "lightning": {"num_heads": 2},
    "linear": {"num_heads": 2},
    # With the defaults the codebook collapses here, and warns of it.
    "long_vq": {"chunk_size": 16, "kmeans_init": True, "threshold_ema_dead_code": 1.0},
    "mamba2": {"head_dim": 32, "d_state": 64},
    "mega": {"chunk_size": 32},
    "softmax": {"num_heads": 2},
    "tcnca": {"chunk_size": 32},
}


def recall_batch(rng: np.random.Generator, rows: int, length: int, pairs: int) -> tuple[Tensor, Tensor]:
    """tokens int64 (B, L) and targets int64 (B, L), -100 where nothing is asked."""
    half, context = VOCAB // 2, 2 * pairs
    slots = (length - context) // 2
    order = rng.permuted(np.tile(np.arange(1, VOCAB), (rows, 1)), axis=1)
    # the first tokens of a random order that are keys, and those that are values
    keys = order[order < half].reshape(rows, half - 1)
    values = order[order >= half].reshape(rows, VOCAB - half)[:, :pairs]
    weights = np.arange(1, slots + 1) ** (0.01 - 1)
    # without replacement with these weights: the smallest of exponential variables divided by them
    slot = np.argsort(rng.exponential(size=(rows, slots)) / weights, axis=1)[:, :pairs]
    fillers = np.concatenate([keys[:, pairs:], np.zeros((rows, 1), np.int64)], axis=1)
    tokens = np.take_along_axis(fillers, rng.integers(0, fillers.shape[1], (rows, length)), axis=1)
    tokens[:, 0:context:2], tokens[:, 1:context:2] = keys[:, :pairs], values
    targets = np.full((rows, length), -100)
    place = context + 2 * slot
    np.put_along_axis(tokens, place, keys[:, :pairs], axis=1)
    np.put_along_axis(targets, place, values, axis=1)
    return torch.from_numpy(tokens), torch.from_numpy(targets)


class Recaller(nn.Module):
    """Embedding, short convolution, two blocks, a linear head."""

    def __init__(self, mixer: dict[str, Any], dim: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, dim)
        self.conv = ShortConv(dim, 3, activation=None)
        self.backbone = seqzoo.Backbone(dim, 2, mixer=mixer, causal=True, mlp_ratio=2.0)
        self.head = nn.Linear(dim, VOCAB, bias=False)

    def forward(self, tokens: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Logits of the asked places (n, VOCAB), their targets (n,), the sum of the auxiliary losses."""
        x = self.embed(tokens)
        out = self.backbone(x + self.conv(x)[0])
        asked = targets >= 0
        return self.head(out.y[asked]), targets[asked], sum(out.aux.values(), torch.zeros(()))


def train(
    mixer: dict[str, Any],
    dim: int,
    lr: float,
    steps: int,
    batch: int,
    seed: int,
    tasks: tuple[tuple[int, int], ...] = TRAINING,
) -> Recaller:
    from seqzoo.blocks.parameters import parameter_groups

    torch.manual_seed(seed)
    model = Recaller(mixer, dim).train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=lr, weight_decay=0.1), fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [g["lr"] for g in optimizer.param_groups], steps, pct_start=0.1
    )
    for step, (tokens, targets) in enumerate(batches(seed, steps, batch, tasks)):
        logits, wanted, aux = model(tokens, targets)
        loss = nn.functional.cross_entropy(logits, wanted) + aux
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if not torch.isfinite(loss):
            raise SystemExit(f"{mixer}: the loss is {loss.item()} at step {step}")
    return model.eval()


def batches(seed: int, steps: int, rows: int, tasks: tuple[tuple[int, int], ...]) -> Iterator[tuple[Tensor, Tensor]]:
    rng = np.random.default_rng(seed)
    for step in range(steps):
        yield recall_batch(rng, rows, *tasks[step % len(tasks)])


@torch.no_grad()
def accuracy(model: Recaller, length: int, pairs: int, seed: int, rows: int = 512) -> float:
    right = total = 0
    rng = np.random.default_rng(seed)
    for _ in range(rows // 64):
        logits, wanted, _ = model(*recall_batch(rng, 64, length, pairs))
        right += int((logits.argmax(-1) == wanted).sum())
        total += len(wanted)
    return right / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mixers", nargs="+", default=None, help="by default all that support the pattern causal")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--rates", type=float, nargs="+", default=[3e-3])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    settings = {k: v for k, v in vars(options).items() if k != "mixers"}
    settings |= {"vocabulary": VOCAB, "training": [list(pair) for pair in TRAINING]}
    rows = earlier_rows("recall", settings)
    for name in options.mixers or seqzoo.list_mixers(pattern="causal"):
        row = measure({"name": name, **OPTIONS.get(name, {})}, options)
        rows = sorted([*(r for r in rows if r["mixer"] != name), row], key=lambda r: r["mixer"])
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)
        write_result("recall", {"settings": settings, "rows": rows})  # each takes minutes
    draw(rows)


def measure(mixer: dict[str, Any], options: argparse.Namespace) -> dict[str, Any]:
    start, best = time.process_time(), (-1.0, None, 0.0)
    for lr in options.rates:
        model = train(mixer, options.dim, lr, options.steps, options.batch, seed=0)
        score = sum(accuracy(model, *test, seed=1) for test in TESTS)
        best = max(best, (score, model, lr), key=lambda entry: entry[0])
    _, model, lr = best
    layer = model.backbone.blocks[0].mixer
    row: dict[str, Any] = {"mixer": mixer["name"], "parameters": sum(p.numel() for p in model.parameters())}
    for length in (64, 256):
        row[f"state at {length}"] = 2 * layer.state_size(length) if layer.streaming else None
    row |= {f"{pairs} pairs in {length}": accuracy(model, length, pairs, seed=2) for length, pairs in TESTS}
    return {**row, "lr": lr, "CPU seconds": round(time.process_time() - start)}


def draw(rows: list[dict[str, Any]]) -> None:
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib: no picture")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import NullFormatter

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), layout="constrained")
    colours = pyplot.get_cmap("tab20").colors
    pairs = [pairs for _, pairs in TESTS]
    hardest = "{1} pairs in {0}".format(*TESTS[-2])
    for number, row in enumerate(rows):
        scores = [row[f"{n} pairs in {length}"] for length, n in TESTS]
        left.plot(pairs, scores, marker="o", markersize=4, label=row["mixer"], color=colours[number % 20])
        if row["state at 256"] is not None:
            right.scatter(row["state at 256"], row[hardest], color=colours[number % 20])
            right.annotate(
                row["mixer"], (row["state at 256"], row[hardest]), fontsize=8, xytext=(4, 4), textcoords="offset points"
            )
    left.set(xscale="log", xlabel="pairs", ylabel="accuracy", ylim=(-0.02, 1.02))
    left.set_xticks(pairs, [str(n) for n in pairs])
    left.minorticks_off()
    right.set(xscale="log", xlabel="state after 256 tokens, numbers", ylabel=f"accuracy, {hardest}", ylim=(-0.02, 1.05))
    right.xaxis.set_minor_formatter(NullFormatter())
    for axis in (left, right):
        axis.grid(alpha=0.3)
    figure.legend(*left.get_legend_handles_labels(), loc="outside right upper", fontsize=8)
    path = ROOT / "docs" / "pictures" / "recall.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=100)
    print(path)


if __name__ == "__main__":
    main()
