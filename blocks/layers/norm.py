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


NORMS: dict[str, Callable[..., nn.Module]] = {"layernorm": LayerNorm, "rmsnorm": RMSNorm}


def create_norm(norm: str | Callable[..., nn.Module], dim: int, eps: float | None = None) -> nn.Module:
    """Build a norm of width `dim` from "layernorm", "rmsnorm" or a factory called as `norm(dim[, eps=])`.

    eps None keeps the default of the norm. Raises ValueError for an unknown name.
    """
    if isinstance(norm, str):
        if norm not in NORMS:
            raise ValueError(f"unknown norm {norm!r}.{did_you_mean(norm, NORMS)}")
        norm = NORMS[norm]
    return norm(dim) if eps is None else norm(dim, eps=eps)
