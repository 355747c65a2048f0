"""Sums of a language model's losses: bits per byte, perplexity, and the loss by position in the document."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .rows import IGNORED

BINS = 40  # of positions: [0, 1), [1, 2), [2, 4), [4, 8) ...


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """-ln p of each asked target, float32 of the targets' shape; 0 where nothing is asked. logits: (B, L, V)."""
    losses = F.cross_entropy(logits.float().flatten(0, -2), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return losses.view(targets.shape)


def positions(batch: dict[str, Tensor]) -> Tensor:
    """Position of each token in its document, int64 of the tokens' shape."""
    tokens, start = batch["tokens"], batch["start"]
    if "cu_seqlens" not in batch:
        return start.unsqueeze(1) + torch.arange(tokens.shape[1], device=tokens.device)
    lengths = batch["cu_seqlens"].diff().long()
    first = (start - batch["cu_seqlens"][:-1]).repeat_interleave(lengths)
    return (first + torch.arange(tokens.shape[1], device=tokens.device)).unsqueeze(0)


class LossSums:
    """Sums over asked predictions, in float64 on the CPU: exact whatever the batches."""

    def __init__(self) -> None:
        self.nats = torch.zeros(BINS, dtype=torch.float64)
        self.count = torch.zeros(BINS, dtype=torch.float64)

    def update(self, losses: Tensor, batch: dict[str, Tensor]) -> None:
        """losses: of `token_losses`."""
        asked = batch["targets"] != IGNORED
        place = positions(batch)[asked]
        bins = torch.where(place == 0, 0, place.clamp(min=1).double().log2().floor().long() + 1).cpu()
        self.nats.index_add_(0, bins, losses[asked].double().cpu())
        self.count.index_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))

    @property
    def flat(self) -> Tensor:
        return torch.cat((self.nats, self.count))

    @flat.setter
    def flat(self, values: Tensor) -> None:
        self.nats, self.count = values.chunk(2)

    def compute(self, num_bytes: int, predictions: int) -> dict[str, Any]:
        """loss (nats per token), perplexity (per token), bits_per_byte of documents that hold so many bytes and ask for
        so many predictions; by_position: rows of first and last position, bits per token, tokens. Where only a part was
        asked, its mean stands for all. The end of a document is a prediction too, not a byte."""
        nats, count = float(self.nats.sum()), float(self.count.sum())
        if not count:
            return {"loss": math.nan, "perplexity": math.nan, "bits_per_byte": math.nan, "by_position": []}
        rows = [
            {
                "from": 0 if i == 0 else 1 << (i - 1),
                "to": 0 if i == 0 else (1 << i) - 1,
                "bits_per_token": float(self.nats[i] / self.count[i]) / math.log(2),
                "tokens": int(self.count[i]),
            }
            for i in range(BINS)
            if self.count[i]
        ]
        return {
            "loss": nats / count,
            "perplexity": math.exp(min(nats / count, 700.0)),
            "bits_per_byte": nats / count * predictions / math.log(2) / max(num_bytes, 1),
            "by_position": rows,
        }
