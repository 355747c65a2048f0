"""TCNCA: MEGA with its moving average replaced by a dilated convolutional network (arXiv:2312.05605, 2023).

    m = silu(T(x) + omega x), T a `TemporalConvNet`, then the gated chunked attention of MEGA over m:
    u, z, r, h0 from m, v from x, y = sigmoid(u) * (h - residual) (`layers.gated_attention`)
    simple: y = W_o attention(q, k, v), q, k, v linear maps of LayerNorm(residual + T(x)), without gates

A reconstruction: the paper has no public code. From its abstract: the recurrence of MEGA becomes a network of few
dilated layers with a large receptive field, linear in the length; the attention stays chunked; a simplified form has
no gates. As its text is remembered, and not checked: residual blocks as in arXiv:1803.01271, dilations growing by a
factor from layer to layer, 17 taps and a factor of 8 in 4 layers on enwik8 (our defaults).
Ours: depthwise convolutions, silu, the skip omega x as in MEGA's average, the LayerNorm inside the simple form, centred
convolutions for the pattern self, chunks of 128 by default, MEGA's gated cross attention for the cross patterns.

Compared with torch's dilated convolutions block by block (1e-12 in float64, gradients 1e-11) and, given the same m,
with our MEGA (1e-12), which is compared with the public code.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..layers.chunk_attention import ChunkAttention, ChunkState
from ..layers.gated_attention import GatedAttention, GatedCrossAttention, with_residual
from ..layers.norm import LayerNorm
from ..layers.projections import reset_normal
from ..layers.rows import lay_out
from ..layers.tcn import TemporalConvNet
from ..protocol import Exchange, Mixer, MixerOutput, State
from ..registry import did_you_mean, register_mixer

_SMALL = {"causal": True, "chunk_size": 4, "tcn_depth": 2, "kernel_size": 3, "dilation_factor": 2}
_SELF = {**_SMALL, "causal": False}


class TcncaState(NamedTuple):
    """tails: the last inputs of every convolution, (B, (K - 1) dilation, D) each. attention: the open chunk."""

    tails: tuple[Tensor, ...]
    attention: ChunkState


class ChunkedSelfAttention(nn.Module):
    """Chunked attention with plain projections: W_o attention(W_q x, W_k x, W_v x). Weights N(0, 0.02), biases 0."""

    def __init__(self, dim: int, attention: ChunkAttention, *, hidden_dim: int, drop: float, **where: Any) -> None:
        super().__init__()
        self.attention, self.hidden_dim = attention, hidden_dim
        self.q_proj = nn.Linear(dim, attention.z_dim, **where)
        self.k_proj = nn.Linear(dim, attention.z_dim, **where)
        self.v_proj = nn.Linear(dim, hidden_dim, **where)
        self.out_proj = nn.Linear(hidden_dim, dim, **where)
        self.drop = nn.Dropout(drop)
        reset_normal(self.q_proj, self.k_proj, self.v_proj, self.out_proj)

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None,
        state: ChunkState | None,
        return_state: bool,
        exchange: Exchange | None,
    ) -> tuple[Tensor, ChunkState | None]:
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        o, last = self.attention(q, k, v, lengths=lengths, state=state, return_state=return_state, exchange=exchange)
        return self.drop(self.out_proj(o)), last


@register_mixer(
    "tcnca",
    paper="arXiv:2312.05605",
    origin="reconstruction",
    cost="L D (C + K T)",
    kernels=("dilated_conv",),
    ours=("cross", "causal-cross"),
)
class TCNCA(Mixer):
    """Temporal convolutional network and chunked attention; see the module.

    variant: "gated" or "simple". tcn_depth, kernel_size, dilation_factor, num_convs, groups, pointwise, weight_norm,
        tcn_activation: of the `TemporalConvNet`. skip: the learned skip omega x (gated only).
    z_dim, hidden_dim, chunk_size, attention, relative_bias, max_len, activation: as in `Mega`.
    drop: dropout of m and h, or of the simple form's output. tcn_drop: inside the convolutional blocks.
    attn_drop: of the attention weights. hidden_drop: of the values (gated only).

    In the cross patterns it is MEGA's gated cross attention, and the options of the network and of chunks have nothing
    to act on. The state is a `TcncaState` of (receptive field - 1) dim numbers and the open chunk. Raises ValueError
    for unknown names, sizes below 1, an even kernel_size unless causal, groups that do not divide dim.
    """

    tcn: TemporalConvNet  # the self patterns only
    norm: LayerNorm  # the simple variant only
    patterns: ClassVar[frozenset[str]] = frozenset({"self", "causal", "cross", "causal-cross"})
    streaming: ClassVar[bool] = True
    shared_patterns: ClassVar[frozenset[str]] = frozenset({"self", "causal"})
    state_type = TcncaState
    reads_residual = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "self": _SELF,
        "causal": {**_SMALL, "z_dim": 6, "hidden_dim": 10, "skip": False},
        "two_convs": {**_SMALL, "num_convs": 2, "groups": 4, "attention": "laplace", "relative_bias": "rotary"},
        "dense": {**_SMALL, "groups": 1, "tcn_activation": "gelu", "weight_norm": True, "activation": "relu"},
        "separable": {**_SELF, "pointwise": True, "tcn_drop": 0.1, "drop": 0.1, "attn_drop": 0.1, "hidden_drop": 0.1},
        "simple": {**_SMALL, "variant": "simple", "attention": "relu2"},
        "simple_self": {**_SELF, "variant": "simple", "drop": 0.1},
        "full": {**_SMALL, "chunk_size": None, "max_len": 70},
        "cross": {"cross": True, "z_dim": 6},
        "causal_cross": {"cross": True, "causal": True, "variant": "simple", "attention": "laplace"},
    }

    def __init__(
        self,
        dim: int,
        *,
        variant: Literal["gated", "simple"] = "gated",
        tcn_depth: int = 4,
        kernel_size: int = 17,
        dilation_factor: int = 8,
        num_convs: int = 1,
        groups: int | None = None,
        pointwise: bool = False,
        weight_norm: bool = False,
        tcn_activation: Literal["silu", "gelu", "relu", "none"] = "silu",
        skip: bool = True,
        z_dim: int | None = None,
        hidden_dim: int | None = None,
        chunk_size: int | None = 128,
        causal: bool = False,
        cross: bool = False,
        attention: Literal["softmax", "laplace", "relu2"] = "softmax",
        relative_bias: Literal["simple", "rotary"] = "simple",
        max_len: int = 1024,
        activation: Literal["silu", "gelu", "relu", "tanh"] = "silu",
        drop: float = 0.0,
        tcn_drop: float = 0.0,
        attn_drop: float = 0.0,
        hidden_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, causal=causal, cross=cross)
        if variant not in ("gated", "simple"):
            raise ValueError(f"variant={variant!r} is unknown.{did_you_mean(variant, ('gated', 'simple'))}")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.variant = variant
        scores = ChunkAttention(
            max(dim // 2, 1) if z_dim is None else z_dim,
            causal=causal and not cross,
            chunk_size=None if cross else chunk_size,
            attention=attention,
            relative_bias=relative_bias,
            max_len=max_len,
            attn_drop=attn_drop,
            **where,
        )
        gates: dict[str, Any] = {"activation": activation, "drop": drop, "hidden_drop": hidden_drop, **where}
        self.omega: nn.Parameter | None = None
        self.mixing: GatedAttention | GatedCrossAttention | ChunkedSelfAttention
        if cross:
            self.mixing = GatedCrossAttention(dim, scores, **gates)
            return
        self.tcn = TemporalConvNet(
            dim,
            depth=tcn_depth,
            kernel_size=kernel_size,
            dilation_factor=dilation_factor,
            num_convs=num_convs,
            groups=groups,
            causal=causal,
            pointwise=pointwise,
            weight_norm=weight_norm,
            activation=tcn_activation,
            drop=tcn_drop,
            **where,
        )
        width = 2 * dim if hidden_dim is None else hidden_dim
        if variant == "gated":
            self.omega = nn.Parameter(torch.randn(dim, **where)) if skip else None
            self.mixing = GatedAttention(dim, scores, hidden_dim=width, **gates)
        else:
            self.norm = LayerNorm(dim, **where)
            self.mixing = ChunkedSelfAttention(dim, scores, hidden_dim=width, drop=drop, **where)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        state: State | None = None,
        residual: Tensor | None = None,
    ) -> MixerOutput:
        """As `Mixer.forward`; `grid` is not used. residual: (B, L, D), x before its norm, default x."""
        self.check_inputs(
            x, context, mask=mask, context_mask=context_mask, cu_seqlens=cu_seqlens, grid=grid, state=state
        )
        layout = lay_out(mask, cu_seqlens, x.shape[1])
        rows, before = with_residual(layout, x, residual)
        if isinstance(self.mixing, GatedCrossAttention):
            return MixerOutput(layout.restore(self.mixing(rows, context, before, context_mask=context_mask)))
        tails, cache = (None, None) if state is None else state
        streams = state is not None
        shared: dict[str, Any] = {"lengths": layout.lengths, "return_state": streams, "exchange": self.exchange}
        mixed, tails = self.tcn(rows, state=tails, **shared)
        cached: dict[str, Any] = {"state": cache, **shared}
        if isinstance(self.mixing, ChunkedSelfAttention):
            y, cache = self.mixing(self.norm(before + mixed), **cached)
        else:
            if self.omega is not None:
                mixed = torch.addcmul(mixed, rows, self.omega.to(rows.dtype))
            y, cache = self.mixing(rows, F.silu(mixed), before, **cached)
        return MixerOutput(layout.restore(y), TcncaState(tails, cache) if streams else None)

    def _check_state(self, state: State, rows: int) -> None:
        super()._check_state(state, rows)
        self._check_sizes(state)

    def init_state(
        self,
        batch_size: int,
        *,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> TcncaState:
        """Zeros and an empty cache, of the parameters' dtype by default. max_len does not matter."""
        if isinstance(self.mixing, GatedCrossAttention) or not self.causal:
            return super().init_state(batch_size)
        weight = self.mixing.v_proj.weight
        where: dict[str, Any] = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        cache = self.mixing.attention.init_state(batch_size, self.mixing.hidden_dim, **where)
        return TcncaState(self.tcn.init_state(batch_size, **where), cache)

    def state_size(self, length: int) -> int:
        if isinstance(self.mixing, GatedCrossAttention) or not self.causal:
            return super().state_size(length)
        return self.tcn.state_size() + self.mixing.attention.state_size(length, self.mixing.hidden_dim)
