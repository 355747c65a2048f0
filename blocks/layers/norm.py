"""Normalisation over the channels of a token."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..registry import did_you_mean


class LayerNorm(nn.Module):
    """Layer normalisation of the last axis (arXiv:1607.06450): (x - mean) / sqrt(var + eps) * weight + bias.

    Statistics are taken in float32 whatever the dtype of x; the result has the dtype of x.
    dim: channels. eps: added to the variance.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        # The kernels of torch keep their sums in float32 for half types. With weights of another dtype than x
        # (autocast over float32 weights) they refuse or change the dtype, so that case is cast by hand.
        if x.dtype == self.weight.dtype:
            return F.layer_norm(x, (self.dim,), self.weight, self.bias, self.eps)
        wide = torch.promote_types(x.dtype, self.weight.dtype)
        y = F.layer_norm(x.to(wide), (self.dim,), self.weight.to(wide), self.bias.to(wide), self.eps)
        return y.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class RMSNorm(nn.Module):
    """Root-mean-square normalisation of the last axis (arXiv:1910.07467): x / sqrt(mean(x^2) + eps) * weight.

    The mean square is taken in float32 (float64 for float64 input); the result has the dtype of x.
    dim: channels. eps: added to the mean square.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.weight = nn.Parameter(torch.ones(dim, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), (self.dim,), self.weight.to(wide), self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class SimpleRMSNorm(nn.Module):
    """RMSNorm without a gain (TransNormerLLM, arXiv:2307.14995): x / sqrt(mean(x^2) + eps).

    The mean square is taken in float32 (float64 for float64 input). dim: channels. eps: added to the mean square.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), (self.dim,), None, self.eps).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


class ScaleNorm(SimpleRMSNorm):
    """RMSNorm with one gain for all channels: g * x / sqrt(mean(x^2) + eps) (arXiv:1910.05895, in the form of MEGA).

    Nguyen and Salazar divide by the norm |x|; MEGA (arXiv:2209.10655) by |x| / sqrt(dim), which only rescales g.
    Arguments as `SimpleRMSNorm`.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-6,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps)
        self.weight = nn.Parameter(torch.ones(1, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        return (super().forward(x.to(wide)) * self.weight.to(wide)).to(x.dtype)


class BatchNorm(nn.Module):
    """Batch normalisation (arXiv:1502.03167) of every channel over all real tokens of the batch.

    Statistics are of the tokens that `mask` (bool (B, L)) says are real, and running ones in eval mode, as
    `nn.BatchNorm1d`, which is inside (so `nn.SyncBatchNorm.convert_sync_batchnorm` finds it). In training an output
    depends on the whole batch, on later tokens too. dim: channels. eps: added to the variance.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.dim, self.eps = dim, eps
        self.norm = nn.BatchNorm1d(dim, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """x: (B, L, D). Outputs where mask is False are 0."""
        if mask is None:
            return self.norm(x.flatten(0, -2)).view_as(x)
        y = self.norm(x[mask]) if not self.training or bool(mask.any()) else x[mask]
        return x.new_zeros(x.shape).index_put((mask,), y.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.dim}, eps={self.eps}"


NORMS: dict[str, Callable[..., nn.Module]] = {
    "layernorm": LayerNorm,
    "rmsnorm": RMSNorm,
    "srmsnorm": SimpleRMSNorm,
    "scalenorm": ScaleNorm,
    "batchnorm": BatchNorm,
}


def normalize(norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
    """norm(x), with the mask of real tokens (bool (B, L)) for a norm whose statistics run over tokens."""
    return norm(x, mask) if isinstance(norm, BatchNorm) else norm(x)


def create_norm(norm: str | Callable[..., nn.Module], dim: int, eps: float | None = None) -> nn.Module:
    """Build a norm of width `dim` from a name of `NORMS` or a factory called as `norm(dim[, eps=])`.

    eps None keeps the default of the norm. Raises ValueError for an unknown name.
    """
    if isinstance(norm, str):
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}.{did_you_mean(norm, NORMS)}")
        norm = NORMS[norm]
    return norm(dim) if eps is None else norm(dim, eps=eps)
