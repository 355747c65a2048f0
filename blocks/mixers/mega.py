"""MEGA: a damped moving average, and gated single-head attention in chunks over it (arXiv:2209.10655, ICLR 2023).

    m = silu(EMA(x) + omega x)            EMA(x)_t = sum_n gamma_n h_{t,n} / sqrt(N)
    v = act(W_v x)                        h_t = (1 - p a) h_{t-1} + p beta x_t, p = sigmoid(delta), a = sigmoid(alpha)
    (u, z, r, h0) = W m                   q, k = affine maps of silu(z)
    o = f(q k^T + bias) v                 inside chunks of C tokens
    h = act(h0 + W_h (silu(r) * o))       y = sigmoid(u) * (h - residual)

x is the normalised input and `residual` the input as it was: a block that adds y to it gets the published
(1 - u) * residual + u * h. With `cross` the gated cross attention of the published decoder, which has no average.

Ours: any length (the published code takes multiples of the chunk); the truncated average streams as it is computed in
training (there the streaming form drops the truncation); mu and sigma of the Laplace function are not rounded to six
digits; feature_drop drops channels with chunks too (there, of the values, whole chunks); fully padded rows give 0.
`chunk_size` is 128 by default, the MEGA-chunk of the paper's tables; None, its default in the code, is the attention
over the whole sequence.

Compared with facebookresearch/mega on copied weights in float64, its FFT taken in float64 and its Laplace function with
exact mu and sigma: outputs of the self, causal and cross layers with the simple bias, all attention functions, norms
before and after, truncation, pads and single steps within 3e-14 (rotary bias 3e-7, whose table is float32 there; with
the rounded constants Laplace 2e-6); the eight-layer image encoder in training and eval mode within 2e-15. With
transformers 4.57.1, whose FFT is float32, outputs within 1e-5 (tests/blocks/test_mega.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from ...kernels.ema import EmaState
from ..layers.chunk_attention import ChunkAttention, ChunkState
from ..layers.ema import DampedEMA
from ..layers.gated_attention import GatedAttention, GatedCrossAttention, with_residual
from ..layers.rows import lay_out
from ..protocol import Mixer, MixerOutput, State
from ..registry import register_mixer

_CHUNK = {"causal": True, "chunk_size": 4}


class MegaState(NamedTuple):
    """ema: of the moving average. attention: keys and values of the open chunk, emptied at its border."""

    ema: EmaState
    attention: ChunkState


@register_mixer("mega", paper="arXiv:2209.10655", cost="L D (C + N)", kernels=("ema",))
class Mega(Mixer):
    """Moving average equipped gated attention; see the module.

    z_dim: width of queries and keys (default dim / 2). hidden_dim: of values (default 2 dim). d_state: N, averages per
        channel. chunk_size: C, tokens that attend to each other, None for the whole sequence.
    attention: f, "softmax", "laplace" or "relu2". relative_bias: "simple", a number per offset, or "rotary".
    max_len: longest sequence of the simple bias with chunk_size=None or cross.
    truncation: taps of the average's kernels, None for all. activation: act, "silu", "gelu", "relu" or "tanh".
    backend: of `kernels.ema`; "fft" is the published way, equal up to its rounding, "chunked" exactly causal.
    drop: dropout of m and h. attn_drop: of the weights. hidden_drop: of the values. feature_drop: drop and hidden_drop
        drop whole channels of a sequence.

    Self: the average runs from both ends. In the cross patterns d_state, chunk_size, truncation, hidden_dim and backend
    have nothing to act on, and values are dim wide. The state is a `MegaState`, of constant size with chunks.
    The published training knows no parameter groups, so nothing is tagged. Raises ValueError for unknown names, sizes
    below 1 and sequences longer than max_len where that bounds them.
    """

    ema: DampedEMA  # the self patterns only
    patterns: ClassVar[frozenset[str]] = frozenset({"self", "causal", "cross", "causal-cross"})
    streaming: ClassVar[bool] = True
    shared_patterns: ClassVar[frozenset[str]] = frozenset({"self", "causal"})
    state_type = MegaState
    reads_residual = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "self": {"chunk_size": 4, "d_state": 4},
        "causal": {**_CHUNK, "d_state": 4, "z_dim": 6, "hidden_dim": 10},
        "causal_full": {"causal": True, "chunk_size": None, "max_len": 70, "d_state": 2},
        "laplace": {**_CHUNK, "attention": "laplace", "relative_bias": "rotary", "d_state": 2},
        "laplace_self": {"chunk_size": 5, "attention": "laplace", "activation": "gelu", "d_state": 2},
        "relu2_full": {"causal": True, "chunk_size": None, "attention": "relu2", "relative_bias": "rotary"},
        "truncation": {**_CHUNK, "truncation": 3, "d_state": 2, "attn_drop": 0.1, "hidden_drop": 0.1},
        "truncation_self": {"truncation": 6, "chunk_size": None, "d_state": 2, "drop": 0.1, "feature_drop": True},
        "fft": {**_CHUNK, "backend": "fft", "d_state": 2, "activation": "tanh"},
        "naive": {**_CHUNK, "backend": "naive", "d_state": 2, "truncation": 5},
        "cross": {"cross": True, "z_dim": 6},
        "causal_cross": {"cross": True, "causal": True, "attention": "laplace", "relative_bias": "rotary"},
    }

    def __init__(
        self,
        dim: int,
        *,
        z_dim: int | None = None,
        hidden_dim: int | None = None,
        d_state: int = 16,
        chunk_size: int | None = 128,
        causal: bool = False,
        cross: bool = False,
        attention: Literal["softmax", "laplace", "relu2"] = "softmax",
        relative_bias: Literal["simple", "rotary"] = "simple",
        max_len: int = 1024,
        truncation: int | None = None,
        activation: Literal["silu", "gelu", "relu", "tanh"] = "silu",
        backend: Literal["auto", "triton", "chunked", "fft", "naive"] = "auto",
        drop: float = 0.0,
        attn_drop: float = 0.0,
        hidden_drop: float = 0.0,
        feature_drop: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, causal=causal, cross=cross)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.exact = cross or backend != "fft"
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
        shared: dict[str, Any] = {
            "activation": activation,
            "drop": drop,
            "hidden_drop": hidden_drop,
            "feature_drop": feature_drop,
        }
        self.gated: GatedAttention | GatedCrossAttention
        if cross:
            self.gated = GatedCrossAttention(dim, scores, **shared, **where)
            return
        self.ema = DampedEMA(
            dim, d_state=d_state, bidirectional=not causal, truncation=truncation, backend=backend, **where
        )
        width = 2 * dim if hidden_dim is None else hidden_dim
        self.gated = GatedAttention(dim, scores, hidden_dim=width, **shared, **where)

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
        if isinstance(self.gated, GatedCrossAttention):
            return MixerOutput(layout.restore(self.gated(rows, context, before, context_mask=context_mask)))
        ema, cache = (None, None) if state is None else state
        streams = state is not None
        mixed, ema = self.ema(rows, lengths=layout.lengths, state=ema, return_state=streams, exchange=self.exchange)
        shared: dict[str, Any] = {"return_state": streams, "exchange": self.exchange}
        y, cache = self.gated(rows, mixed, before, lengths=layout.lengths, state=cache, **shared)
        return MixerOutput(layout.restore(y), MegaState(ema, cache) if streams else None)

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
    ) -> MegaState:
        """Zeros and an empty cache; the average is fp32 unless dtype is float64. max_len does not matter."""
        if isinstance(self.gated, GatedCrossAttention) or not self.causal:
            return super().init_state(batch_size)
        weight = self.gated.v_proj.weight
        where: dict[str, Any] = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        cache = self.gated.attention.init_state(batch_size, self.gated.hidden_dim, **where)
        return MegaState(self.ema.init_state(batch_size, **where), cache)

    def state_size(self, length: int) -> int:
        if isinstance(self.gated, GatedCrossAttention) or not self.causal:
            return super().state_size(length)
        return self.ema.state_size() + self.gated.attention.state_size(length, self.gated.hidden_dim)
