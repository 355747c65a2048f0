"""Embeddings: tokens; for series Informer's (value + position + time) and patches with an instance norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .dropout import Dropout
from .positions import SinusoidalPosition

# rows of the lookup tables of Informer's "fixed" and "learned" time embeddings: month, day, weekday, hour, quarter hour
_CALENDAR_SIZES = (("month", 13), ("day", 32), ("weekday", 7), ("hour", 24), ("minute", 4))


class TokenEmbedding(nn.Embedding):
    """A table of vectors: tokens (B, L) int64 -> (B, L, D).

    num_tokens: size of the vocabulary. std: of the normal start. scale: what the vectors are multiplied by (a head
    tied to the table reads it unscaled). drop: dropout. Raises ValueError for tokens that are not integers (B, L).
    """

    def __init__(self, num_tokens: int, dim: int, *, std: float = 0.02, scale: float = 1.0, drop: float = 0.0) -> None:
        if num_tokens < 1:
            raise ValueError(f"num_tokens={num_tokens} must be at least 1")
        super().__init__(num_tokens, dim)
        self.dim, self.scale = dim, scale
        self.drop = nn.Dropout(drop)
        nn.init.normal_(self.weight, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        if tokens.dim() != 2 or tokens.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"tokens are {tokens.dtype} {tuple(tokens.shape)}, expected int64 (B, L)")
        x = super().forward(tokens)
        return self.drop(x if self.scale == 1.0 else x * self.scale)


class CircularConv(nn.Module):
    """Conv1d over time with circular padding, kernel 3: (B, L, in) -> (B, L, out) (Informer, arXiv:2012.07436).

    Kaiming-normal weights (fan in, leaky ReLU) when `kaiming`, else torch's default for a convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, *, bias: bool = True, kaiming: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv1d(in_channels, out_channels, 3, padding=1, padding_mode="circular", bias=bias)
        if kaiming:
            nn.init.kaiming_normal_(self.conv.weight, mode="fan_in", nonlinearity="leaky_relu")

    def forward(self, x: Tensor) -> Tensor:
        # One product of (before, here, after): faster than a convolution, and channels stay last.
        taps = torch.cat((x.roll(1, 1), x, x.roll(-1, 1)), -1)
        return F.linear(taps, self.conv.weight.transpose(1, 2).flatten(1), self.conv.bias)


class CalendarTables(nn.Module):
    """Sum of lookup tables over calendar parts (Informer's `fixed`, sinusoidal and frozen, or `learned`).

    Takes integer parts (B, L, 4 or 5): month 1-12, day 1-31, weekday 0-6, hour 0-23 and, with five, the quarter hour.
    """

    def __init__(self, dim: int, *, num_parts: int = 4, learned: bool = False) -> None:
        super().__init__()
        if num_parts not in (4, 5):
            raise ValueError(f"num_parts={num_parts} must be 4 (hourly) or 5 (with quarter hours)")
        self.tables = nn.ModuleList(nn.Embedding(size, dim) for _, size in _CALENDAR_SIZES[:num_parts])
        if not learned:
            position = SinusoidalPosition(dim)
            for table, (_, size) in zip(self.tables, _CALENDAR_SIZES, strict=False):
                rows = torch.arange(size).unsqueeze(0)
                table.weight = nn.Parameter(position(rows)[0].detach(), requires_grad=False)

    def forward(self, parts: Tensor) -> Tensor:
        if parts.shape[-1] < len(self.tables):
            raise ValueError(f"{len(self.tables)} calendar parts are needed, got {parts.shape[-1]}")
        return sum((table(parts[..., i].long()) for i, table in enumerate(self.tables)), start=torch.zeros(()))


class SeriesEmbedding(nn.Module):
    """Informer's embedding: circular convolution of the values + sinusoidal position + time features, then dropout.

    Informer, arXiv:2012.07436, appendix B. in_channels: values per step; num_time_features: width of the calendar
    features (0 leaves them out); time_embedding: "timeF" (a linear map of features in [-0.5, 0.5]), "fixed" or
    "learned" (lookup tables on integer calendar parts). bias: the original has it, some later versions do not.
    """

    def __init__(
        self,
        in_channels: int,
        dim: int,
        *,
        num_time_features: int = 4,
        time_embedding: str = "timeF",
        drop: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if time_embedding not in ("timeF", "fixed", "learned"):
            raise ValueError(f"time_embedding={time_embedding!r} must be timeF, fixed or learned")
        self.dim = dim
        self.value = CircularConv(in_channels, dim, bias=bias)
        self.position = SinusoidalPosition(dim)
        self.time: nn.Module | None = None
        if num_time_features:
            if time_embedding == "timeF":
                self.time = nn.Linear(num_time_features, dim, bias=bias)
            else:
                self.time = CalendarTables(dim, num_parts=num_time_features, learned=time_embedding == "learned")
        self.drop = Dropout(drop)

    def forward(self, values: Tensor, time: Tensor | None = None) -> Tensor:
        """values: (B, L, in_channels); time: (B, L, num_time_features). Returns (B, L, D)."""
        positions = torch.arange(values.shape[1], device=values.device).unsqueeze(0)
        x = self.value(values)
        x = x + self.position(positions).to(x.dtype)
        if self.time is not None:
            if time is None:
                raise ValueError("this embedding was built with time features; pass them")
            x = x + self.time(time)
        return self.drop(x)


class InstanceNorm(nn.Module):
    """RevIN (ICLR 2022): removes mean and standard deviation of each window and channel, and gives them back.

    Statistics are over the observed steps only; a learned affine map per channel follows when `affine`.
    """

    def __init__(self, num_channels: int, *, affine: bool = True, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(num_channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(num_channels)) if affine else None

    def forward(self, x: Tensor, observed: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """x: (B, L, C), observed: bool (B, L, C). Returns the normed x (0 where missing) and (loc, scale), (B, 1, C),
        with x = loc + scale * normed."""
        known = torch.ones_like(x) if observed is None else observed.to(x.dtype)
        count = known.sum(1, keepdim=True).clamp_min(1)
        mean = (x * known).sum(1, keepdim=True) / count
        var = ((x - mean).square() * known).sum(1, keepdim=True) / count
        mean, std = mean.detach(), (var + self.eps).sqrt().detach()
        if self.weight is None or self.bias is None:
            return (x - mean) / std * known, mean, std
        scale = std / self.weight
        loc = mean - self.bias * scale
        return (x - loc) / scale * known, loc, scale


class PatchEmbedding(nn.Module):
    """Overlapping patches of a series as tokens: (N, L, F) -> (N, number of patches, D) (PatchTST, arXiv:2211.14730).

    in_features: values per step (one target, its mask, covariates ...). The end is padded by `stride` repeats of the
    last step, as published, so that a patch holds the newest value whatever the length.
    """

    def __init__(self, seq_len: int, in_features: int, dim: int, *, patch_len: int, stride: int) -> None:
        super().__init__()
        if not 1 <= stride <= patch_len:
            raise ValueError(f"stride={stride} must be between 1 and patch_len={patch_len}")
        if patch_len > seq_len:
            raise ValueError(f"patch_len={patch_len} is longer than seq_len={seq_len}")
        self.dim, self.patch_len, self.stride = dim, patch_len, stride
        self.num_patches = (seq_len + stride - patch_len) // stride + 1
        self.proj = nn.Linear(patch_len * in_features, dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.pad(x.transpose(1, 2), (0, self.stride), mode="replicate").transpose(1, 2)
        patches = x.unfold(1, self.patch_len, self.stride)  # (N, patches, F, patch_len)
        return self.proj(patches.flatten(2))
