"""Needles and recall after the same training: softmax, Mamba-2, gated linear attention and a hybrid.

    python benchmarks/long_context.py [--models softmax mamba2 gla hybrid] [--steps 4000] [--minutes 4]
    for m in softmax mamba2 gla hybrid; do    # the four side by side on one GPU, in a process each ...
        python benchmarks/long_context.py --models $m --minutes 3.7 --out runs/$m > runs/$m.log &
    done; wait
    python benchmarks/long_context.py --merge runs/softmax runs/mamba2 runs/gla runs/hybrid  # ... then one table
    python benchmarks/long_context.py --device cpu --tiny --out /tmp/results     a test of this script, in seconds

The four are the same language model over bytes (zoo: language_small, at --width and --depth) with other mixers; the
feed-forward of each is as wide as makes its parameters as many as those of softmax, printed. All read the same stream
(see _probe_stream.py: source text, passkeys and needles at random depths, MQAR and induction rows, of --seq-len tokens
at most) in the same order for the same --steps; --minutes ends the training earlier, and a table says so. The tests are
other draws: (a) passkeys and needles by depth and length, up to eight times the length of training, whole answers;
(b) MQAR by number of pairs, up to more than in training, and induction by length. Writes
benchmarks/results/long_context.json and long_context.md and, with matplotlib, docs/pictures/long_context_<model>.png.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from _measure import hardware, versions
from _probe_stream import SHORTEST, ProbeStream, text_rows
from _report import markdown
from _runs import RESULTS, ROOT, write_result
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from seqzoo.pipelines.muon import create_muon
from seqzoo.pipelines.text.probes.heatmap import plot_accuracy_grid
from seqzoo.pipelines.text.probes.token_grid import TokenCell
from seqzoo.pipelines.text.probing import run_text_probes, run_token_probes
from seqzoo.pipelines.text.tokenizer import ByteTokenizer
from seqzoo.zoo import LanguageModel, create_model

NAME = "long_context"
MODELS = ("softmax", "mamba2", "gla", "hybrid")
WITHIN = 0.03  # of the parameters of softmax
SETTINGS = ("steps", "minutes", "seq_len", "width", "depth", "batch", "lr", "adam_lr", "samples", "seed", "backend")
FACTS = ("model", "parameters", "steps", "tokens", "seconds", "source text, bits per byte")
WARMUP, DECAY = 0.03, 0.3  # of the budget: the rate goes up, and in the end down
NEEDLES = ("passkey", "needle")
TINY = {"steps": 2, "width": 32, "depth": 2, "seq_len": SHORTEST, "batch": 8, "samples": 1}


def mixers(name: str, width: int, backend: str = "auto") -> Any:
    """What mixes in the model of that name, heads of 64; repeated to the depth. backend: of gated linear attention."""
    heads: dict[str, Any] = {"num_heads": max(1, width // 64)}
    recurrent = {"name": "mamba2", "d_state": min(64, width // 2), "head_dim": min(64, width), "backend": backend}
    window = {"name": "softmax", **heads, "position": "rope", "window_size": 128}
    return {
        "softmax": {"name": "softmax", **heads, "position": "rope"},
        "mamba2": recurrent,
        "gla": {"name": "gla", **heads, "d_conv": 4, "backend": backend},  # with the short convolution that Mamba-2 has
        "hybrid": [recurrent, window],
    }[name]


def size(net: nn.Module) -> int:
    return sum(p.numel() for p in net.parameters())


def build(name: str, width: int, depth: int, seed: int, backend: str = "auto") -> LanguageModel:
    """The model, its feed-forward such that it has as many parameters as softmax with the usual one."""

    def made(mixer: str, hidden: int) -> LanguageModel:
        torch.manual_seed(seed)
        return create_model(
            "language_small", mixer=mixers(mixer, width, backend), dim=width, depth=depth, mlp_ratio=hidden / width
        )

    wanted, usual = size(made("softmax", width * 8 // 3)), width * 8 // 3
    hidden = usual - round((size(made(name, usual)) - wanted) / (3 * width * depth))
    net = made(name, max(hidden, 1))
    if abs(size(net) / wanted - 1) > WITHIN:
        raise SystemExit(f"{name} has {size(net):,} parameters, softmax {wanted:,}: more than {WITHIN:.0%} apart")
    return net


def precision(device: torch.device) -> Any:
    return torch.autocast("cuda", torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()


def train(net: LanguageModel, options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Train on the stream; returns the steps and tokens read and the seconds."""
    stream = ProbeStream(options.steps, options.batch, options.seq_len, options.seed)
    loader = DataLoader(
        stream,
        None,
        num_workers=options.workers,
        pin_memory=device.type == "cuda",
        prefetch_factor=8 if options.workers else None,
    )
    optimizer = create_muon(
        net, lr=options.lr, weight_decay=0.1, adam_lr=options.adam_lr, momentum=0.95, betas=(0.9, 0.95), fused=True
    )
    base = [group["lr"] for group in optimizer.param_groups]
    begin, limit, step, done, reported = time.perf_counter(), 60 * options.minutes, 0, 0.0, 0
    net.train()
    for tokens, targets, weights in loader:
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * min(1.0, done / WARMUP + 0.01, (1 - done) / DECAY + 0.01)
        tokens, targets, weights = (part.to(device, non_blocking=True) for part in (tokens, targets, weights))
        with precision(device):
            logits = net(tokens.long()).y
        losses = F.cross_entropy(logits.float().flatten(0, 1), targets.long().flatten(), reduction="none")
        loss = losses @ weights.flatten()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        step += 1
        passed = time.perf_counter() - begin
        done = max(step / options.steps, passed / limit)
        if done >= (reported + 1) / 10 or step == 1:
            reported = int(10 * done)
            if not math.isfinite(value := loss.item()):
                raise SystemExit(f"the loss is {value} at step {step}")
            print(f"  step {step:6}  {passed:6.0f} s  loss {value:6.3f}  {glance(net, options, device)}", flush=True)
        if done >= 1:
            break
    if device.type == "cuda":
        torch.cuda.synchronize()
    return {
        "steps": step,
        "tokens": step * options.batch * options.seq_len,
        "seconds": round(time.perf_counter() - begin, 1),
    }


def glance(net: LanguageModel, options: argparse.Namespace, device: torch.device) -> str:
    """Accuracies of a few validation rows, which cost little beside the steps between."""
    net.eval()
    with precision(device):
        cells = [mqar_cell(16, 256), TokenCell("induction", 256, {"vocab_size": 16})]
        found = run_token_probes(net, cells, rows=16, seed=options.seed + 1)
        found += run_text_probes(net, ByteTokenizer(), NEEDLES, [SHORTEST], samples=4, seed=options.seed + 1)
    net.train()
    means = {task: [row["mean"] for row in found if row["task"] == task] for task in (*NEEDLES, "mqar", "induction")}
    return ", ".join(f"{task} {sum(values) / len(values):.2f}" for task, values in means.items())


def mqar_cell(pairs: int, length: int) -> TokenCell:
    return TokenCell("mqar", length, {"num_pairs": pairs, "vocab_size": 256})


def evaluate(net: LanguageModel, options: argparse.Namespace, device: torch.device) -> list[dict[str, Any]]:
    """Rows of both tables; text bits per byte is a row too."""
    net.eval()
    samples, top = options.samples, 3 if not options.tiny else 1
    lengths = sorted({SHORTEST, *(options.seq_len << i for i in range(top + 1))})
    powers = [2**i for i in range(6, (options.seq_len << top).bit_length())]
    with precision(device), torch.no_grad():
        rows = run_text_probes(net, ByteTokenizer(), NEEDLES, lengths, samples=samples, seed=options.seed)
        cells = [mqar_cell(n, options.seq_len) for n in (4, 8, 16, 32, 64, 96, 120) if 4 * n < options.seq_len]
        rows += run_token_probes(net, cells, rows=5 * samples, seed=options.seed)
        cells = [TokenCell("induction", length, {"vocab_size": 16}) for length in powers]
        rows += run_token_probes(net, cells, rows=10 * samples, seed=options.seed)
    return rows


@torch.no_grad()
def text_bits(net: LanguageModel, options: argparse.Namespace, device: torch.device) -> float:
    """Bits per byte of held-out source text in rows of seq_len, each from nothing."""
    nats, number = 0.0, 8 if options.tiny else 128
    for first in range(0, number, 8):
        rng = np.random.default_rng([options.seed, 1, first])
        arrays = text_rows(rng, 8, options.seq_len, held_out=True)
        tokens, targets = (torch.from_numpy(part).to(device) for part in arrays)
        with precision(device):
            logits = net(tokens).y
        nats += float(F.cross_entropy(logits.float().flatten(0, 1), targets.flatten()))
    return nats / (number / 8) / math.log(2)


def measure(
    name: str, options: argparse.Namespace, device: torch.device
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """What was trained with a few of its scores, and all of them."""
    net = build(name, options.width, options.depth, options.seed, options.backend)
    print(f"{name}: {size(net):,} parameters", flush=True)
    net.to(device)
    row = {"model": name, "parameters": size(net), **train(net, options, device)}
    begin = time.perf_counter()
    cells = [{"model": name, **cell} for cell in evaluate(net, options, device)]
    row |= {"source text, bits per byte": text_bits(net, options, device), **extract(cells, options.seq_len)}
    print(f"  {row}; evaluated in {time.perf_counter() - begin:.0f} s", flush=True)
    return row, cells


def extract(cells: Sequence[dict[str, Any]], seq_len: int) -> dict[str, float]:
    """The scores for one line: MQAR by pairs; the others (needles: mean over depths) at the longest length of training
    and of the test."""
    found = {f"{cell['items']} pairs": cell["mean"] for cell in cells if cell["task"] == "mqar"}
    for task in (*NEEDLES, "induction"):
        mine = [cell for cell in cells if cell["task"] == task]
        lengths = _values(mine, "length")
        for length in (max(n for n in lengths if n <= seq_len), max(lengths)):
            means = [cell["mean"] for cell in mine if cell["length"] == length]
            found[f"{task} {length}"] = sum(means) / len(means)
    return found


def tables(record: dict[str, Any]) -> list[tuple[str, list[dict[str, Any]]]]:
    """(title, rows) of the two tables, as they are printed, beside what was trained."""
    rows, trained = record["cells"], record["settings"]["seq_len"]
    found = [
        (
            "Trained",
            [{k: round(v, 3) if isinstance(v := row[k], float) else v for k in FACTS} for row in record["rows"]],
        )
    ]
    for task in NEEDLES:
        title = f"(a) {task}: whole answers right, %, by depth and length in bytes (trained up to {trained})"
        mine = [row for row in rows if row["task"] == task]
        places = [(m, d) for m in _values(mine, "model") for d in sorted(_values(mine, "depth"))]
        lines = [
            {"model": m, "depth": f"{100 * d:.0f} %", **_cells(r for r in mine if (r["model"], r["depth"]) == (m, d))}
            for m, d in places
        ]
        found.append((title, lines))
    for task, key, title in (
        ("mqar", "items", f"(b) MQAR: asked values right, %, by pairs, at {trained} tokens (trained up to 64 pairs)"),
        ("induction", "length", f"(b) Induction: asked tokens right, %, by length (trained up to {trained})"),
    ):
        mine = [row for row in rows if row["task"] == task]
        groups = {m: [row for row in mine if row["model"] == m] for m in _values(mine, "model")}
        lines = [{"model": m, **_cells(group, key)} for m, group in groups.items()]
        guess = {"model": "chance", **_cells(next(iter(groups.values())), key, "chance")}
        found.append((title, [*lines, guess]))
    return found


def _values(rows: Iterable[dict[str, Any]], key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _cells(rows: Iterable[dict[str, Any]], key: str = "length", value: str = "mean") -> dict[str, str]:
    return {f"{row[key]:,}": f"{100 * row[value]:.1f}" for row in rows}


def write(parts: Sequence[dict[str, Any]], folder: Path, pictures: Path | None) -> dict[str, Any]:
    """The models of all parts, the later ones replacing earlier ones, as JSON, page and pictures."""
    settings = parts[-1]["settings"]
    rows: dict[str, dict[str, Any]] = {}
    cells: dict[str, list[dict[str, Any]]] = {}
    for part in parts:
        if part["settings"] != settings:
            other = {k: (v, settings.get(k)) for k, v in part["settings"].items() if settings.get(k) != v}
            raise SystemExit(f"runs with other settings cannot share a table: {other}")
        for row in part["rows"]:
            rows[row["model"]] = row
            cells[row["model"]] = [cell for cell in part["cells"] if cell["model"] == row["model"]]
    order = sorted(rows, key=MODELS.index)
    record = {
        "settings": settings,
        "hardware": parts[-1]["hardware"],
        "packages": parts[-1]["packages"],
        "command": parts[-1]["command"],
        "rows": [rows[name] for name in order],
        "cells": [cell for name in order for cell in cells[name]],
    }
    path = write_result(NAME, record, folder)
    found = tables(record)
    facts = "; ".join(f"{k} {v}" for k, v in {**settings, **record["hardware"], **record["packages"]}.items())
    sections = [f"## {title}\n\n{markdown(lines)}" for title, lines in found]
    head = "# Needles and recall after the same training", f"`{record['command']}`", f"{facts}."
    page = "\n\n".join([*head, *sections])
    path.with_suffix(".md").write_text(page + "\n", encoding="utf-8")
    for name in order if pictures is not None else ():
        grid = [cell for cell in cells[name] if cell["task"] in NEEDLES]
        title = f"{name}: answers right to the last digit, trained up to {settings['seq_len']} bytes"
        plot_accuracy_grid(grid, pictures / f"{NAME}_{name}.png", title=title)
    return record


def earlier(folder: Path, settings: dict[str, Any]) -> list[dict[str, Any]]:
    """The result in the folder, if it has the same settings."""
    path = folder / f"{NAME}.json"
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return [known] if known.get("settings") == settings else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    gpu = torch.cuda.is_available()
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if gpu else "cpu")
    parser.add_argument("--steps", type=int, default=4000, help="the budget, the same for all")
    parser.add_argument("--minutes", type=float, default=math.inf, help="of training a model, at most")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--depth", type=int, default=4)
    parser.add_argument("--batch", type=int, default=64, help="rows of seq-len, a multiple of four")
    parser.add_argument("--lr", type=float, default=0.02, help="of Muon, for the matrices")
    parser.add_argument("--adam-lr", type=float, default=1e-2, help="of everything else")
    parser.add_argument("--samples", type=int, default=20, help="probes of each depth and length")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--backend", default="auto", help="of the kernel of gla and mamba2")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--workers", type=int, default=2 if gpu else 0, help="processes that make batches")
    parser.add_argument("--out", type=Path, default=None, help="folder of the results, and of the pictures")
    parser.add_argument("--merge", type=Path, nargs="+", default=None, metavar="DIR", help="join these results")
    parser.add_argument("--tiny", action="store_true", help="tiny models: a test of this script, not a measurement")
    options = parser.parse_args()
    folder, pictures = options.out or RESULTS, options.out or ROOT / "docs" / "pictures"
    if options.merge:
        parts = [json.loads((part / f"{NAME}.json").read_text(encoding="utf-8")) for part in options.merge]
        show(write(parts, folder, pictures))
        return
    if options.device == "cuda" and not gpu:
        sys.exit("no CUDA device; --device cpu")
    if options.tiny:
        if options.out is None:
            parser.error("--tiny measures nothing that is worth keeping: give --out, a folder of its own")
        vars(options).update(TINY)
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    settings = {name: getattr(options, name) for name in SETTINGS if getattr(options, name) != math.inf}
    settings |= {"device": device.type, "tiny": options.tiny}
    for name in options.models:
        row, cells = measure(name, options, device)
        part = {
            "settings": settings,
            "hardware": hardware(device),
            "packages": versions("triton"),
            "command": command(parser, options),
            "rows": [row],
            "cells": cells,
        }
        record = write([*earlier(folder, settings), part], folder, pictures)
    show(record)


def command(parser: argparse.ArgumentParser, options: argparse.Namespace) -> str:
    """What trains these models anywhere: the options that are not the default, without folders."""
    given = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in vars(options).items()
        if name in SETTINGS and value != parser.get_default(name)
    ]
    return " ".join([f"python benchmarks/{NAME}.py --device {options.device}", *given])


def show(record: dict[str, Any]) -> None:
    for title, rows in tables(record):
        print(f"\n{title}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()
