"""Selective S4: ViS4mer over the tokens that a mask generator keeps (arXiv:2303.14526, CVPR 2023).

Wang et al. call it S5; it is not the S5 of Smith et al. (arXiv:2208.04933). No code is public: this is a reconstruction
from the paper's text, and its numbers are ours.

A momentum copy of the first S4 layer, theta_m <- mu theta_m + (1 - mu) theta, reads all L tokens without gradients,
f = x + S4_m(norm_m(x)). The generator has u = MLP(norm(f)) of each token, v = the mean of u over them, and
logits = MLP([u, v]), keep and drop. In training Gumbel noise is added to the logits; kept are the K = ceil(rho L)
tokens with the largest p = softmax(logits)_keep, in their order, and with them alone the trainable layers go on, x p /
sg(p) written as x (1 + p - sg(p)): values are as they are, and the gradient of p is the straight-through one. In eval
mode there is no noise.

Ours, where the paper is silent: a fixed number of tokens (the largest of the noisy p) and not one decision for each, so
that memory is bounded; one generator, before the first stage; the copy is of the first stage's norm and S4, whose
tokens are still L; it is updated by every forward pass in training, as MoCo's (arXiv:1911.05722). With rho = 1 nothing
is chosen and the model is ViS4mer bit for bit.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ..blocks.layers.norm import LayerNorm
from ..blocks.layers.ranks import own_rows, rows_of_ranks
from ..blocks.layers.rows import take
from ._registry import register_sizes
from .vis4mer import SIZES, ViS4mer

PAPER = "arXiv:2303.14526"


class Kept(NamedTuple):
    """x: (B, K, D), the tokens that are kept, in their order. mask: bool (B, K), True = real, None when all are.
    places: int64 (B, K), where they stood."""

    x: Tensor
    mask: Tensor | None
    places: Tensor


class MaskGenerator(nn.Module):
    """Logits (B, L, 2), keep and drop, of tokens from features (B, L, D): MLP([u, mean of u]), u = MLP(norm(f))."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.norm = LayerNorm(dim)
        self.local = nn.Sequential(nn.Linear(dim, hidden), nn.GELU())
        self.out = nn.Sequential(nn.Linear(2 * hidden, hidden), nn.GELU(), nn.Linear(hidden, 2))

    def forward(self, f: Tensor, mask: Tensor | None = None) -> Tensor:
        u = self.local(self.norm(f))
        if mask is None:
            v = u.mean(1, keepdim=True)
        else:
            number = mask.sum(1).clamp_min(1)[:, None, None]
            v = u.masked_fill(~mask.unsqueeze(-1), 0).sum(1, keepdim=True) / number
        return self.out(torch.cat((u, v.expand_as(u)), -1))


class SelectiveS4(ViS4mer):
    """Features (B, L, F) or frames to logits (B, num_classes), from the share keep_ratio of the tokens.

    keep_ratio: rho, in (0, 1]. momentum: mu. mask_dim: width of the generator. temperature: of the Gumbel softmax. All
    other options are those of `ViS4mer`; parity drops nothing but what its stages drop. config: set by `create_model`.
    Raises ValueError as `ViS4mer` does, and for options outside their ranges.
    """

    def __init__(
        self,
        *,
        num_classes: int = 2,
        encoder: str | Mapping[str, Any] = "features",
        dim: int = 1024,
        num_stages: int = 3,
        d_state: int = 64,
        init: str = "legs",
        causal: bool = True,
        drop: float = 0.2,
        keep_ratio: float = 0.5,
        momentum: float = 0.99,
        mask_dim: int = 64,
        temperature: float = 1.0,
        parity: bool = False,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            encoder=encoder,
            dim=dim,
            num_stages=num_stages,
            d_state=d_state,
            init=init,
            causal=causal,
            drop=drop,
            parity=parity,
        )
        if not 0 < keep_ratio <= 1:
            raise ValueError(f"keep_ratio={keep_ratio} must be in (0, 1]")
        if not 0 <= momentum <= 1:
            raise ValueError(f"momentum={momentum} must be in [0, 1]")
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        if mask_dim < 1:
            raise ValueError(f"mask_dim={mask_dim} must be at least 1")
        self.keep_ratio, self.momentum, self.temperature = keep_ratio, momentum, temperature
        self.mask_generator: MaskGenerator | None = None
        if keep_ratio < 1:
            self.mask_generator = MaskGenerator(dim, mask_dim)
            self.momentum_norm = momentum_copy(self.first.norm)
            self.momentum_mixer = momentum_copy(self.first.mixer)

    def encode(self, x: Tensor, mask: Tensor | None) -> Tensor:
        if self.mask_generator is None:
            return super().encode(x, mask)
        kept = self.select(x, mask)
        return super().encode(kept.x, kept.mask)

    def select(self, x: Tensor, mask: Tensor | None = None) -> Kept:
        """The tokens that are kept of x (B, L, dim), what `tokens` gives. Raises ValueError with keep_ratio=1."""
        if self.mask_generator is None:
            raise ValueError("keep_ratio=1 keeps all tokens: there is nothing to select")
        if self.training:
            update_momentum(self.momentum_norm, self.first.norm, self.momentum)
            update_momentum(self.momentum_mixer, self.first.mixer, self.momentum)
        with torch.no_grad():
            f = x + self.momentum_mixer(self.momentum_norm(x), mask=mask).y
        if self.training and torch.is_grad_enabled():
            # L tokens go through the generator and half of them or less through the rest: it must not keep them all
            logits = checkpoint(self.mask_generator, f, mask, use_reentrant=False)
        else:
            logits = self.mask_generator(f, mask)
        if self.training:
            # -log of an exponential variable is a Gumbel variable
            logits = logits - torch.empty_like(logits).exponential_().log()
        keep = torch.softmax(logits / self.temperature, -1)[..., 0]
        places, real = top_in_order(keep, mask, self.keep_ratio)
        chosen = take(x, places)
        if self.training:
            p = keep.gather(1, places)
            chosen = chosen * (1 + (p - p.detach())).unsqueeze(-1)
        if real is not None:
            chosen = chosen.masked_fill(~real.unsqueeze(-1), 0)
        return Kept(chosen, real, places)


def top_in_order(scores: Tensor, mask: Tensor | None, ratio: float) -> tuple[Tensor, Tensor | None]:
    """The ceil(ratio n) largest of the n real scores of each row, in the order in which they stand, the earlier of
    equals first. scores: (B, L). mask: bool (B, L), None: all are real. Returns places, int64 (B, K), and which are
    real, bool (B, K), the others behind them; None without a mask."""
    length = scores.shape[1]
    if mask is None:
        number = _share(length, ratio)
        ranked = scores.sort(dim=1, descending=True, stable=True).indices[:, :number]
        return ranked.sort(1).values, None
    ranked = scores.masked_fill(~mask, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    counts = torch.tensor([_share(n, ratio) for n in mask.sum(1).tolist()], device=scores.device)
    width = max(int(counts.max()), 1)
    real = torch.arange(width, device=scores.device) < counts.unsqueeze(1)
    places = torch.where(real, ranked[:, :width], length).sort(1).values
    return places.clamp_max(length - 1), real


def _share(number: int, ratio: float) -> int:
    # the product of 0.7 and 10 is a little above 7
    return math.ceil(round(ratio * number, 9))


def momentum_copy(module: nn.Module) -> Any:
    """A copy that no optimiser trains."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def update_momentum(target: nn.Module, source: nn.Module, momentum: float) -> None:
    """theta_m <- mu theta_m + (1 - mu) theta for all parameters; buffers are copied."""
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.lerp_(new.to(old.dtype), 1 - momentum)
    for kept, given in zip(target.buffers(), source.buffers(), strict=True):
        kept.copy_(given)


class LongShortContrast(nn.Module):
    """LSMCL, long-short masked contrastive learning (arXiv:2303.14526), of any model with `embed`.

    Of each video a long and a short clip come, a random share of the tokens of both is left out; the model, and its
    momentum copy, which is in eval mode, make vectors of them, projected to length 1. InfoNCE pulls the short clip of a
    video to its long one and the long one to the short, with the other videos of the batch as negatives, in training
    those of all processes. A reconstruction, as above.

    model: with `embed(frames, mask)`, whose y is (B, width). width: of y. embed_dim: of the projections.
    temperature: t of the loss. momentum: mu. mask_ratio: from .. to, of the frames that are left out.
    """

    def __init__(
        self,
        model: nn.Module,
        width: int,
        *,
        embed_dim: int = 128,
        temperature: float = 0.2,
        momentum: float = 0.99,
        mask_ratio: tuple[float, float] = (0.25, 0.5),
    ) -> None:
        super().__init__()
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        if not 0 <= mask_ratio[0] <= mask_ratio[1] < 1:
            raise ValueError(f"mask_ratio={tuple(mask_ratio)} must be two rising shares in [0, 1)")
        self.model, self.temperature, self.momentum = model, temperature, momentum
        self.mask_ratio = (float(mask_ratio[0]), float(mask_ratio[1]))
        self.projector = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, embed_dim))
        self.momentum_model, self.momentum_projector = momentum_copy(model), momentum_copy(self.projector)

    def train(self, mode: bool = True) -> LongShortContrast:
        super().train(mode)
        self.momentum_model.eval()
        self.momentum_projector.eval()
        return self

    def forward(
        self,
        long: Tensor,
        short: Tensor,
        *,
        long_mask: Tensor | None = None,
        short_mask: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """long, short: two clips of each video, (B, T, ...) and (B, T', ...), as the model takes them. Returns the loss
        and the share of videos whose short clip is nearest to its own long one, and the model's auxiliary losses."""
        views = [
            (clip, random_tokens(clip, mask, self.mask_ratio, generator, shared=self.training))
            for clip, mask in ((long, long_mask), (short, short_mask))
        ]
        if self.training:
            update_momentum(self.momentum_model, self.model, self.momentum)
            update_momentum(self.momentum_projector, self.projector, self.momentum)
        found = [self.model.embed(*view) for view in views]  # type: ignore[operator]
        queries = [F.normalize(self.projector(out.y), dim=-1) for out in found]
        with torch.no_grad():
            keys = [F.normalize(self.momentum_projector(self.momentum_model.embed(*view).y), dim=-1) for view in views]
        if self.training:
            queries, keys = [rows_of_ranks(x) for x in queries], [rows_of_ranks(x) for x in keys]
        loss = long_short_loss(queries[0], queries[1], keys[0], keys[1], self.temperature)
        right = (queries[1] @ keys[0].mT).argmax(1) == torch.arange(len(keys[0]), device=long.device)
        aux = {key: found[0].aux[key] + found[1].aux[key] for key in found[0].aux}
        return loss, {"right": right.float().mean(), **aux}


def long_short_loss(
    long_query: Tensor, short_query: Tensor, long_key: Tensor, short_key: Tensor, temperature: float
) -> Tensor:
    """The mean of InfoNCE from short queries to long keys and from long queries to short keys; vectors (B, E) of length
    1, row b of each being of video b: -log exp(q_b k_b / t) / sum_c exp(q_b k_c / t)."""
    own = torch.arange(len(long_query), device=long_query.device)
    forth = F.cross_entropy(short_query @ long_key.mT / temperature, own)
    back = F.cross_entropy(long_query @ short_key.mT / temperature, own)
    return (forth + back) / 2


def random_tokens(
    frames: Tensor,
    mask: Tensor | None,
    ratio: tuple[float, float],
    generator: torch.Generator | None = None,
    *,
    shared: bool = False,
) -> Tensor:
    """What is left when of each row's real frames a random share, from ratio[0] to ratio[1], is left out: bool (B, T),
    at least one of each row that has any. shared: see `own_rows`, of a generator that all processes have."""
    device = "cpu" if generator is None else generator.device
    real = torch.ones(frames.shape[:2], dtype=torch.bool) if mask is None else mask
    number = real.sum(1).to(device)
    batch, length = frames.shape[:2]
    part = own_rows(batch, lambda n: torch.rand(n, generator=generator, device=device), shared=shared)
    share = ratio[0] + (ratio[1] - ratio[0]) * part
    left = torch.maximum(number - (share * number).round().long(), number.clamp_max(1))
    noise = own_rows(batch, lambda n: torch.rand(n, length, generator=generator, device=device), shared=shared)
    noise = noise.to(frames.device)
    rank = noise.masked_fill(~real.to(frames.device), 2.0).argsort(1).argsort(1)
    return rank < left.to(frames.device).unsqueeze(1)


register_sizes(
    "selective_s4",
    SelectiveS4,
    {
        size: (f"Selective S4: ViS4mer over half of the tokens, {shape}.", options)
        for size, (shape, options) in SIZES.items()
    },
    module=__name__,
    task="video_classify",
    paper=PAPER,
    encoder={"name": "features", "dim": 1024},
)
