"""MEGA's gated attention: single-head attention whose output is gated, then gated again against the residual.

Both layers return u * (h - residual), what a residual stream adds to itself to become (1 - u) * residual + u * h.
Letters: R rows, M tokens, D model width, Z width of queries and keys, V width of values.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..protocol import Exchange
from ..registry import did_you_mean
from .chunk_attention import ChunkAttention, ChunkState
from .projections import reset_normal
from .rows import Layout, lay_out

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "tanh": torch.tanh,
}


def with_residual(layout: Layout, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    """x and the residual it is gated against (x itself where there is none) as rows of `layout`, (R, M, D) each."""
    rows = layout.real(x)
    if residual is None:
        return rows, rows
    if residual.shape != x.shape:
        raise ValueError(f"residual has shape {tuple(residual.shape)}, x has {tuple(x.shape)}")
    return rows, layout.real(residual)


class SequenceDropout(nn.Module):
    """Dropout of single numbers, or with feature_drop of whole channels of a sequence; x: (R, M, C)."""

    def __init__(self, rate: float, feature_drop: bool) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"dropout of {rate} must be in [0, 1)")
        self.rate, self.feature_drop = rate, feature_drop

    def forward(self, x: Tensor) -> Tensor:
        if not self.feature_drop:
            return F.dropout(x, self.rate, self.training)
        return F.dropout1d(x.transpose(1, 2), self.rate, self.training).transpose(1, 2)

    def extra_repr(self) -> str:
        return f"{self.rate}, feature_drop={self.feature_drop}"


class _Gated(nn.Module):
    """What the layers over x itself and over a context share."""

    def __init__(
        self, dim: int, attention: ChunkAttention, activation: str, drop: float, hidden_drop: float, feature_drop: bool
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is unknown.{did_you_mean(activation, ACTIVATIONS)}")
        self.dim, self.z_dim, self.activation = dim, attention.z_dim, activation
        self.attention = attention
        self.drop = SequenceDropout(drop, feature_drop)
        self.hidden_drop = SequenceDropout(hidden_drop, feature_drop)

    def _act(self, x: Tensor) -> Tensor:
        return ACTIVATIONS[self.activation](x)

    def _update(self, u: Tensor, h: Tensor, residual: Tensor) -> Tensor:
        return torch.sigmoid(u) * (self.drop(self._act(h)) - residual)


class GatedAttention(_Gated):
    """Gated attention over the tokens themselves (arXiv:2209.10655, section 3.2 to 3.4).

    v = act(W_v x); (u, z, r, h0) = W m with z, r through silu; q, k = affine maps of z, entry by entry;
    h = act(h0 + W_h (r * attention(q, k, v))); y = sigmoid(u) * (h - residual).
    dim: D. attention: the attention, with Z. hidden_dim: V. activation: act. drop: of m and h. hidden_drop: of v.
    feature_drop: drop whole channels. Weights N(0, 0.02), biases 0; the maps of z start with N(0, 0.02) and 0.
    """

    def __init__(
        self,
        dim: int,
        attention: ChunkAttention,
        *,
        hidden_dim: int,
        activation: str = "silu",
        drop: float = 0.0,
        hidden_drop: float = 0.0,
        feature_drop: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, attention, activation, drop, hidden_drop, feature_drop)
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim={hidden_dim} must be at least 1")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.hidden_dim = hidden_dim
        self.v_proj = nn.Linear(dim, hidden_dim, **where)
        self.mx_proj = nn.Linear(dim, 2 * dim + self.z_dim + hidden_dim, **where)
        self.h_proj = nn.Linear(hidden_dim, dim, **where)
        self.qk_weight = nn.Parameter(torch.empty(2, self.z_dim, **where))
        self.qk_bias = nn.Parameter(torch.zeros(2, self.z_dim, **where))
        reset_normal(self.v_proj, self.mx_proj, self.h_proj)
        nn.init.normal_(self.qk_weight, std=0.02)

    def forward(
        self,
        x: Tensor,
        mixed: Tensor,
        residual: Tensor,
        *,
        lengths: Tensor | None = None,
        state: ChunkState | None = None,
        return_state: bool = False,
        exchange: Exchange | None = None,
    ) -> tuple[Tensor, ChunkState | None]:
        """x: the tokens, mixed: m, what is known of each token's surroundings, residual: all (R, M, D)."""
        v = self.hidden_drop(self._act(self.v_proj(x)))
        base = self.mx_proj(self.drop(mixed))
        u, zr, h = base.split((self.dim, self.z_dim + self.hidden_dim, self.dim), -1)
        z, r = F.silu(zr).split((self.z_dim, self.hidden_dim), -1)
        q, k = (torch.addcmul(shift, z, scale) for shift, scale in zip(self.qk_bias, self.qk_weight, strict=True))
        shared = {} if exchange is None else {"exchange": exchange}  # which not every attention can ask
        o, last = self.attention(q, k, v, lengths=lengths, state=state, return_state=return_state, **shared)
        return self._update(u, h + self.h_proj(o * r), residual), last


class GatedCrossAttention(_Gated):
    """Gated attention over a context (the decoder of arXiv:2209.10655; defined by its code).

    (u, r, q) = W x with r through silu; k = W_k c; v = act(W_v c); h = act(W_h (r * attention(q, k, v)));
    y = sigmoid(u) * (h - residual). Every query sees all of the context, whatever the other queries are.
    Arguments as `GatedAttention`.
    """

    def __init__(
        self,
        dim: int,
        attention: ChunkAttention,
        *,
        activation: str = "silu",
        drop: float = 0.0,
        hidden_drop: float = 0.0,
        feature_drop: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, attention, activation, drop, hidden_drop, feature_drop)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, 2 * dim + self.z_dim, **where)
        self.k_proj = nn.Linear(dim, self.z_dim, **where)
        self.v_proj = nn.Linear(dim, dim, **where)
        self.h_proj = nn.Linear(dim, dim, **where)
        reset_normal(self.q_proj, self.k_proj, self.v_proj, self.h_proj)

    def forward(self, x: Tensor, context: Tensor, residual: Tensor, *, context_mask: Tensor | None = None) -> Tensor:
        """x, residual: (R, M, D). context: (R, S, D), of which context_mask, bool (R, S), says what is real."""
        layout = lay_out(context_mask, None, context.shape[1])
        context = layout.real(context)
        u, r, q = self.q_proj(x).split((self.dim, self.dim, self.z_dim), -1)
        v = self.hidden_drop(self._act(self.v_proj(context)))
        o = self.attention.across(q, self.k_proj(context), v, layout.lengths)
        return self._update(u, self.h_proj(o * F.silu(r)), residual)
