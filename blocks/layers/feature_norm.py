"""Normalisation of features over time: by fixed statistics, a learned map, or each recording's own statistics."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from ..registry import did_you_mean

KINDS = ("fixed", "affine", "utterance")


class FeatureNorm(nn.Module):
    """y = (x - mean) / std for each of the D features.

    dim: D. kind: "fixed" takes mean and std as given, numbers or D of them, or from `measure`; they are saved with the
    model. "affine" learns weight and bias, y = weight x + bias, from the same statistics (1 and 0 without any).
    "utterance" takes them over the frames of each recording, so it needs the whole of it (`whole` is True then).
    eps: added to the variance of "utterance". Raises ValueError for other kinds, shapes, and a std that is not above 0.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        dim: int,
        kind: str = "fixed",
        *,
        mean: float | Sequence[float] = 0.0,
        std: float | Sequence[float] = 1.0,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if kind not in KINDS:
            raise ValueError(f"norm={kind!r} is unknown.{did_you_mean(kind, KINDS)}")
        self.dim, self.kind, self.eps = dim, kind, eps
        loc = _vector("mean", mean, dim, device=device, dtype=dtype)
        scale = _vector("std", std, dim, device=device, dtype=dtype)
        if not bool((scale > 0).all()):
            raise ValueError(f"std={std!r} must be above 0")
        if kind == "fixed":
            self.register_buffer("mean", loc)
            self.register_buffer("std", scale)
        elif kind == "affine":
            self.weight, self.bias = nn.Parameter(1 / scale), nn.Parameter(-loc / scale)

    @property
    def whole(self) -> bool:
        """Whether it needs whole recordings."""
        return self.kind == "utterance"

    def forward(self, x: Tensor, *, lengths: Tensor | None = None) -> Tensor:
        """x: (B, L, D). lengths: int64 (B,), frames of each row, None when all are real; frames beyond become 0."""
        if self.kind == "affine":
            y = x * self.weight + self.bias
        elif self.kind == "fixed":
            y = (x - self.mean) / self.std
        else:
            y = self._by_row(x, lengths)
        if lengths is None:
            return y
        return y.masked_fill((torch.arange(x.shape[1], device=x.device) >= lengths.unsqueeze(1)).unsqueeze(-1), 0)

    @torch.no_grad()
    def measure(self, batches: Iterable[tuple[Tensor, Tensor | None]]) -> FeatureNorm:
        """Take mean and standard deviation (kinds "fixed" and "affine") from batches of features (B, L, D) as they are
        before this norm, with their lengths; summed in float64. Raises ValueError for fewer than two frames."""
        if self.whole:
            raise ValueError('the norm "utterance" has no statistics to measure; norms that have: "fixed", "affine"')
        count, mean, spread = 0, torch.zeros(self.dim).double(), torch.zeros(self.dim).double()
        for x, lengths in batches:
            rows = x if lengths is None else x[torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)]
            rows = rows.reshape(-1, self.dim).double().cpu()
            if not len(rows):
                continue
            # Chan's update of mean and sum of squares, doi:10.1080/00031305.1983.10483115
            own, total = rows.mean(0), count + len(rows)
            spread += (rows - own).square().sum(0) + (own - mean).square() * (count * len(rows) / total)
            mean += (own - mean) * (len(rows) / total)
            count = total
        if count < 2:
            raise ValueError(f"{count} frames are too few to measure mean and standard deviation")
        # A feature that never changes keeps its scale.
        std = torch.where(spread > 0, (spread / count).sqrt(), 1.0)
        if self.kind == "fixed":
            self.mean.copy_(mean)
            self.std.copy_(std)
        else:
            self.weight.copy_(1 / std)
            self.bias.copy_(-mean / std)
        return self

    def _by_row(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        if lengths is None:
            real = x.new_ones(x.shape[0], x.shape[1], 1)
        else:
            real = (torch.arange(x.shape[1], device=x.device) < lengths.unsqueeze(1)).unsqueeze(-1).to(x.dtype)
        count = real.sum(1, keepdim=True).clamp_min(1)
        mean = (x * real).sum(1, keepdim=True) / count
        var = ((x - mean).square() * real).sum(1, keepdim=True) / count
        return (x - mean) / (var + self.eps).sqrt()

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.kind}"


def _vector(
    name: str,
    value: float | Sequence[float],
    dim: int,
    *,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
) -> Tensor:
    vector = torch.as_tensor(value, device=device, dtype=dtype or torch.get_default_dtype())
    if vector.dim() > 1 or (vector.dim() == 1 and len(vector) != dim):
        raise ValueError(f"{name} has the shape {tuple(vector.shape)}, expected one number or {dim}")
    return vector.expand(dim).clone()
