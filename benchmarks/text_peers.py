"""Bits per byte after the same time: the model of text/stdlib_bytes beside x-transformers with as many parameters.

    python benchmarks/text_peers.py [--seconds 600] [--threads 2]

Both read the same rows of the standard library's sources in the same order, in bf16 autocast, for the same processor
time; the learning rate follows the share of it that is over (5 % up, the last 40 % down). Ours has the model and
optimizer of experiment=text/stdlib_bytes; x-transformers is a decoder with rotary positions, RMSNorm and SwiGLU (its
documented options), AdamW, at the best of --rates by the validation rows, each of which gets the whole time. The score
is of the test documents in rows of seq_len tokens, each from nothing. `pip install x-transformers` for the peer.
Writes benchmarks/results/text_peers.json.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from _runs import write_result
from hydra import compose, initialize_config_module
from omegaconf import OmegaConf
from torch import Tensor, nn

from seqzoo.pipelines.text.data import TextData
from seqzoo.pipelines.text.rows import PackedRows
from seqzoo.pipelines.text.scores import token_losses
from seqzoo.pipelines.training import create_optimizer
from seqzoo.zoo import create_model

Logits = Callable[[dict[str, Tensor]], Tensor]


def experiment() -> dict[str, Any]:
    with initialize_config_module("seqzoo.conf", version_base="1.3"):
        cfg = compose("config", overrides=["experiment=text/stdlib_bytes"])
    return OmegaConf.to_container(cfg, resolve=True)  # type: ignore[return-value]


def full_rows(data: TextData, stage: str) -> tuple[PackedRows, np.ndarray]:
    """Rows of one whole piece each: the peer has no packing."""
    rows = PackedRows(data.corpus, data.corpus.documents(stage), data.seq_len)
    return rows, np.arange(int((rows.length == rows.seq_len).sum()))


def train(net: nn.Module, logits: Logits, optimizer: Any, data: TextData, seconds: float) -> int:
    """Train for so many seconds of processor time over all threads; returns the tokens read."""
    rows, order = full_rows(data, "train")
    np.random.default_rng(0).shuffle(order)
    base = [group["lr"] for group in optimizer.param_groups]
    start, step, size = time.process_time(), 0, data.batch_size
    net.train()
    while (done := (time.process_time() - start) / seconds) < 1:
        factor = min(1.0, done / 0.05 + 0.01, (1 - done) / 0.4 + 0.01)
        for group, lr in zip(optimizer.param_groups, base, strict=True):
            group["lr"] = lr * factor
        batch = rows[order[np.arange(step * size, (step + 1) * size) % len(order)]]
        with torch.autocast("cpu", torch.bfloat16):
            y = logits(batch)
        optimizer.zero_grad()
        token_losses(y, batch["targets"]).mean().backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        step += 1
    return step * size * data.seq_len


@torch.no_grad()
def score(net: nn.Module, logits: Logits, data: TextData, stage: str) -> float:
    """Bits per byte over the whole rows of a stage."""
    rows, order = full_rows(data, stage)
    net.eval()
    nats = 0.0
    for first in range(0, len(order), data.eval_batch_size):
        batch = rows[order[first : first + data.eval_batch_size]]
        with torch.autocast("cpu", torch.bfloat16):
            y = logits(batch)
        nats += float(token_losses(y, batch["targets"]).sum())
    return nats / math.log(2) / (len(order) * data.seq_len)


def peer(parameters: int, seq_len: int) -> nn.Module:
    """A decoder of x-transformers with the nearest number of parameters, a width of 64 times its heads."""
    from x_transformers import Decoder, TransformerWrapper

    def build(dim: int, depth: int) -> nn.Module:
        layers = Decoder(
            dim=dim,
            depth=depth,
            heads=max(dim // 64, 1),
            rotary_pos_emb=True,
            use_rmsnorm=True,
            ff_swish=True,
            ff_glu=True,
            attn_flash=True,
        )
        return TransformerWrapper(num_tokens=256, max_seq_len=seq_len, attn_layers=layers, use_abs_pos_emb=False)

    def size(net: nn.Module) -> int:
        return sum(p.numel() for p in net.parameters())

    choices = [(dim, depth) for dim in (192, 256, 320, 384) for depth in (4, 6, 8)]
    return build(*min(choices, key=lambda c: abs(size(build(*c)) - parameters)))


def _peer_logits(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return net(batch["tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=600, help="of processor time for each model and thread")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rates", type=float, nargs="+", default=[2e-3])
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    cfg = experiment()
    data = TextData(**cfg["data"])
    budget, rows = options.seconds * options.threads, []

    def measure(name: str, net: nn.Module, logits: Logits, optimizer: Any) -> dict[str, Any]:
        tokens = train(net, logits, optimizer, data, budget)
        row = {
            "model": name,
            "parameters": sum(p.numel() for p in net.parameters()),
            "tokens": tokens,
            "validation bits per byte": score(net, logits, data, "val"),
            "test bits per byte": score(net, logits, data, "test"),
        }
        print(row, flush=True)
        return row

    torch.manual_seed(0)
    ours = create_model(cfg["model"]["name"], **{k: v for k, v in cfg["model"].items() if k != "name"})
    optimizer = create_optimizer(ours, cfg["optimizer"])
    rows.append(measure("seqzoo text/stdlib_bytes", ours, lambda batch: ours(batch["tokens"]).y, optimizer))
    found = []
    for rate in options.rates:
        torch.manual_seed(0)
        net = peer(rows[0]["parameters"], data.seq_len)
        adamw = torch.optim.AdamW(net.parameters(), lr=rate, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
        found.append(measure(f"x-transformers, AdamW {rate:g}", net, partial(_peer_logits, net), adamw))
    rows.append(min(found, key=lambda row: row["validation bits per byte"]))
    rows += [{"model": name, "test bits per byte": value} for name, value in data.compressors().items()]
    settings = {"seconds": options.seconds, "threads": options.threads, "rates": options.rates}
    print(write_result("text_peers", {"settings": settings, "rows": rows}))


if __name__ == "__main__":
    main()
