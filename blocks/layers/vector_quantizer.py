"""Vector quantisation with codebooks that follow their tokens by running averages (arXiv:2309.16354, 1711.00937)."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...kernels.vq_attention import cell_sums
from ..registry import did_you_mean
from .ranks import num_ranks, sizes_of_ranks

REDUCTIONS = ("sum", "mean", "none")
COLLAPSE = 0.05  # of the codebook's size: a perplexity below it is warned of
CHECK_EVERY = 100  # updates between two looks at the perplexity, each of which waits for the device
TOKENS = 4096  # whose distances to all codewords are held at a time


class Quantized(NamedTuple):
    """x (B, L, H, K): the codewords, with the gradient of what was quantised. code: int64 (B, L, H). commitment: the
    loss, unweighted. codebook (H, M, K): as it was used, before any update; no gradient."""

    x: Tensor
    code: Tensor
    commitment: Tensor
    codebook: Tensor


class VectorQuantizer(nn.Module):
    """The nearest of M codewords for each vector of each head, and running averages that move the codewords.

    codeword s = sum_s / max(count_s, 0.01). In training, after its codewords were used,
    sum_s <- decay sum_s + (1 - decay) sum of the vectors whose nearest is s, and count_s the same of their number.
    Straight-through: the output is the codeword, its gradient goes to the vector. Commitment loss: the mean over
    tokens of the sum over heads and channels of (x - codeword)^2, the codeword constant; a mean over channels, as
    elsewhere, is K H times smaller. (Where processes share a codebook, each divides by their mean number of tokens, so
    that the mean of their losses is that over all tokens.) Sums start normal with standard deviation (H M)^-0.5, counts
    at 1.

    codebook_size: M. head_dim: K. num_heads: H, a codebook each. decay: of the averages.
    reduction: of one step's sums and counts over the processes of torch.distributed, where it is initialised: "sum"
        (as published), "mean", or "none", with which codebooks differ (those of rank 0 are saved).
    kmeans_init: the codewords start as `kmeans_steps` rounds of k-means over the first training batch.
    threshold_ema_dead_code: a codeword with a smaller count is moved to a vector of the batch, its count to 1; 0: none.

    The buffers `sum` and `count` are float32 at least, whatever the dtype of the module, and are saved. They change in
    training mode only, with or without gradients (a re-entrant checkpoint runs its first pass without), once per
    forward: what activation checkpointing recomputes within a backward pass uses the codewords of the last forward and
    updates nothing; so there, each forward must be followed by its backward pass before the next.
    Pads (`valid` False) enter neither sums nor loss. Random picks come from a generator of their own, seeded with the
    number of updates, so that a resumed run makes the same ones.

    A perplexity below 5 % of M is warned of once. Raises ValueError for values outside these.
    """

    sum: Tensor
    count: Tensor
    updates: Tensor

    def __init__(
        self,
        codebook_size: int,
        head_dim: int,
        *,
        num_heads: int = 1,
        decay: float = 0.99,
        reduction: Literal["sum", "mean", "none"] = "sum",
        kmeans_init: bool = False,
        kmeans_steps: int = 10,
        threshold_ema_dead_code: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        sizes = {"codebook_size": codebook_size, "head_dim": head_dim, "num_heads": num_heads}
        for name, value in {**sizes, "kmeans_steps": kmeans_steps}.items():
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if not 0 < decay < 1:
            raise ValueError(f"decay={decay} must be between 0 and 1")
        if threshold_ema_dead_code < 0:
            raise ValueError(f"threshold_ema_dead_code={threshold_ema_dead_code} must not be negative; 0 restarts none")
        if reduction not in REDUCTIONS:
            raise ValueError(f"reduction={reduction!r} is unknown.{did_you_mean(reduction, REDUCTIONS)}")
        self.codebook_size, self.head_dim, self.num_heads = codebook_size, head_dim, num_heads
        self.decay, self.reduction = decay, reduction
        self.kmeans_init, self.kmeans_steps = kmeans_init, kmeans_steps
        self.threshold_ema_dead_code = threshold_ema_dead_code
        wide = torch.promote_types(dtype or torch.get_default_dtype(), torch.float32)
        start = torch.randn(num_heads, codebook_size, head_dim, device=device, dtype=wide)
        self.register_buffer("sum", start * (num_heads * codebook_size) ** -0.5)
        self.register_buffer("count", start.new_ones(num_heads, codebook_size))
        self.register_buffer("updates", torch.zeros((), device=device, dtype=torch.int64))
        self._used: Tensor | None = None  # the codewords of the last training forward
        self._tokens: Tensor | None = None  # of one process in the mean, in the last training forward of several
        self._until_check, self._warned = CHECK_EVERY, False

    def codebook(self) -> Tensor:
        """The codewords (H, M, K)."""
        return self.sum / self.count.clamp(min=0.01).unsqueeze(-1)

    def perplexity(self) -> Tensor:
        """exp of the entropy of the running counts, the mean over heads: how many codewords are in use, 1 .. M."""
        share = self.count / self.count.sum(-1, keepdim=True).clamp(min=1e-30)
        return (-torch.xlogy(share, share).sum(-1)).exp().mean()

    def training_metrics(self) -> dict[str, Tensor]:
        """What a training logs of this codebook after every epoch."""
        return {"codebook_perplexity": self.perplexity()}

    def forward(self, x: Tensor, valid: Tensor | None = None) -> Quantized:
        """Quantise x (B, L, H, K); valid: bool (B, L), False for pads. In training, update the codebook."""
        with torch.autocast(x.device.type, enabled=False):
            work = x.to(torch.promote_types(x.dtype, self.sum.dtype))
            with torch.no_grad():
                book = self._codewords(work, valid).to(work.dtype)
                code = self._nearest(work.detach().movedim(2, 0).flatten(1, 2), book).view(x.shape[2], *x.shape[:2])
                if self.training and not _recomputing():
                    self._used = book
                    self._tokens = self._update(work.detach(), valid, code)
            code = code.movedim(0, -1)
            chosen = book[torch.arange(self.num_heads, device=x.device), code]
            distance = (work - chosen).square().sum((2, 3))
            if self.training and self._tokens is not None:
                kept = distance if valid is None else distance.masked_fill(~valid, 0)
                commitment = kept.sum() / self._tokens.to(kept.dtype).clamp(min=1)
            elif valid is None:
                commitment = distance.sum() / max(distance.numel(), 1)
            else:
                commitment = distance.masked_fill(~valid, 0).sum() / valid.sum().clamp(min=1)
            return Quantized(chosen + (work - work.detach()), code, commitment, book)

    def _codewords(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if self.training and _recomputing() and self._used is not None:
            return self._used
        if self.training and self.kmeans_init and int(self.updates) == 0:
            self._start_with_kmeans(_real(x, valid))
        return self.codebook()

    def _nearest(self, x: Tensor, book: Tensor) -> Tensor:
        """int64 (H, T): the nearest codeword of each x (H, T, K), the first of equals."""
        half = book.square().sum(-1).unsqueeze(1) * 0.5
        # The number of pieces would be a part of an exported program.
        pieces = (x,) if torch.compiler.is_exporting() else x.split(TOKENS, 1)
        parts = [torch.baddbmm(half, part, book.mT, alpha=-1).argmin(-1) for part in pieces]
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def _update(self, x: Tensor, valid: Tensor | None, code: Tensor) -> Tensor | None:
        """Move the codewords. Returns the tokens of a process in the mean over all of them, by which each of them
        divides its commitment; None where the books are its own."""
        heads_first = x.movedim(2, 0).flatten(1, 2).to(self.sum.dtype)
        keep = None if valid is None else valid.flatten().unsqueeze(0)
        if keep is not None:
            heads_first = heads_first.masked_fill(~keep.unsqueeze(-1), 0)
        count, total = self._reduce(*cell_sums(heads_first, code.flatten(1), keep, self.codebook_size))
        # Without any token nothing changes; or counts would fade that later tokens would have kept.
        any_token = count.sum() > 0
        fresh = any_token.to(count.dtype) * (1 - self.decay)
        self.sum.lerp_(total, fresh)
        self.count.lerp_(count, fresh)
        if self.threshold_ema_dead_code > 0:
            self._restart(_real(x, valid))
        self.updates += any_token
        if not torch.compiler.is_compiling():
            self._check_collapse()
        if not self._shared():
            return None
        return count[0].sum() / (num_ranks() if self.reduction == "sum" else 1)

    def _shared(self) -> bool:
        return self.reduction != "none" and num_ranks() > 1

    def _reduce(self, *parts: Tensor) -> tuple[Tensor, ...]:
        """Sums of this step over all processes, in one message."""
        if not self._shared():
            return parts
        flat = torch.cat([part.flatten() for part in parts])
        dist.all_reduce(flat)
        if self.reduction == "mean":
            flat /= dist.get_world_size()
        pieces = flat.split([part.numel() for part in parts])
        return tuple(piece.view_as(part) for piece, part in zip(pieces, parts, strict=True))

    def _sample(self, x: Tensor) -> Tensor:
        """(H, M, K): vectors of x (T, H, K) drawn for every codeword, without repetition while there are enough; of
        those of all ranks, one after the other, where codebooks are shared. Zeros where there are none."""
        sizes = sizes_of_ranks(len(x), x.device) if self._shared() else [len(x)]
        total, first = sum(sizes), sum(sizes[: dist.get_rank()]) if len(sizes) > 1 else 0
        picked = torch.zeros_like(self.sum)
        if not total:
            return picked
        source = torch.Generator().manual_seed(int(self.updates))
        rounds = -(-self.codebook_size // total)
        order = [torch.cat([torch.randperm(total, generator=source) for _ in range(rounds)])] * self.num_heads
        index = torch.stack(order)[:, : self.codebook_size].to(x.device) - first
        if len(x):
            own = (index >= 0) & (index < len(x))
            heads = torch.arange(self.num_heads, device=x.device).unsqueeze(1)
            found = x[index.clamp(0, len(x) - 1), heads].to(self.sum.dtype)
            picked = torch.where(own.unsqueeze(-1), found, picked)
        if len(sizes) > 1:
            dist.all_reduce(picked)
        return picked

    def _restart(self, x: Tensor) -> None:
        picked = self._sample(x)
        dead = (self.count < self.threshold_ema_dead_code) & (picked != 0).any(-1)
        self.sum.copy_(torch.where(dead.unsqueeze(-1), picked, self.sum))
        self.count.masked_fill_(dead, 1)

    def _start_with_kmeans(self, x: Tensor) -> None:
        (number,) = self._reduce(self.count.new_full((1,), len(x)))
        if number == 0:
            return
        centres, vectors = self._sample(x), x.movedim(1, 0).to(self.sum.dtype)
        for _ in range(self.kmeans_steps):
            sums = cell_sums(vectors, self._nearest(vectors, centres), None, self.codebook_size)
            count, total = self._reduce(*sums)
            centres = torch.where((count > 0).unsqueeze(-1), total / count.clamp(min=1).unsqueeze(-1), centres)
        self.count.copy_(torch.where(count > 0, count, 1))
        self.sum.copy_(centres * self.count.unsqueeze(-1))

    def _check_collapse(self) -> None:
        self._until_check -= 1
        if self._warned or self._until_check > 0:
            return
        self._until_check = CHECK_EVERY
        used = float(self.perplexity())
        if used < COLLAPSE * self.codebook_size:
            self._warned = True
            warnings.warn(
                f"the codebook has collapsed: a perplexity of {used:.1f} of {self.codebook_size} codewords; try a "
                "smaller codebook_size, kmeans_init or threshold_ema_dead_code",
                stacklevel=4,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> VectorQuantizer:
        """A running average in half precision would stand still: its buffers stay float32."""
        before = self.sum, self.count
        super()._apply(fn, recurse)
        for name, old in zip(("sum", "count"), before, strict=True):
            new: Tensor = getattr(self, name)
            if new.dtype in (torch.float16, torch.bfloat16):
                setattr(self, name, old.to(new.device, torch.float32))
        return self

    def extra_repr(self) -> str:
        return f"{self.codebook_size}, {self.head_dim}, num_heads={self.num_heads}, decay={self.decay}"


def _recomputing() -> bool:
    """Whether a backward pass is running in this thread, hence a checkpoint computing its forward again."""
    return not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1


def _real(x: Tensor, valid: Tensor | None) -> Tensor:
    """(T, H, K): the vectors that are no pads."""
    return x.flatten(0, 1) if valid is None else x[valid]
