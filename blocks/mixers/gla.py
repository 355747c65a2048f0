"""Gated linear attention: a linear attention state that forgets by a gate per token and key channel.

Yang et al., "Gated Linear Attention Transformers with Hardware-Efficient Training", arXiv:2312.06635, section 4.
Per head, with K key and V value channels:

    S_t = diag(alpha_t) S_{t-1} + k_t v_t^T,  o_t = (q_t K^-1/2)^T S_t
    alpha_t = sigmoid(W_2 W_1 x_t + b)^(1/16)
    y_t = W_o (norm(o_t) * silu(W_r x_t)), the norm over each head

The layer is that of flash-linear-attention (RMSNorm per head, where the paper's first code has a LayerNorm without
weights). Weights start as in the paper's code: q, k and the gate Xavier-uniform with gain 2^-2.5, the others as
`nn.Linear`. Ours: the bidirectional form, the sum of a pass forwards and one backwards with the same gates, each token
counted once (its short convolution, if any, looks back in both); gates do not advance over padded positions.

Compared with flash-linear-attention 0.6.0: the operation with `naive_recurrent_gla` and `naive_recurrent_simple_gla`
(outputs and states within 3e-7 of the largest value in float32), the layer with its `GatedLinearAttention` of copied
weights over the naive operation (2e-6).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.dispatch import choose_backend
from ...kernels.gated_linear_attention import (
    accumulation_dtype,
    check_chunk_size,
    gated_chunk_summary,
)
from ..layers.conv import ShortConv
from ..layers.decayed import decayed_attention
from ..layers.norm import RMSNorm, SimpleRMSNorm
from ..layers.projections import head_width
from ..layers.rows import Layout, lay_out, zero_pads
from ..protocol import ChunkSummary, Mixer, MixerOutput, State
from ..registry import did_you_mean, register_mixer
from .linear import FEATURE_MAPS

_GATES: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "sigmoid": torch.sigmoid}


class GLAState(NamedTuple):
    """s: (B, H, K, V), float32 or float64. conv: (B, d_conv - 1, q, k and v channels), the last inputs of the short
    convolution; None without one."""

    s: Tensor
    conv: Tensor | None = None


@register_mixer(
    "gla",
    paper="arXiv:2312.06635",
    cost="L D (C + K)",
    kernels=("gated_linear_attention", "short_conv"),
    ours=("self",),
)
class GatedLinearAttention(Mixer):
    """Linear attention with data-dependent decay; the equations are at the top of this file.

    num_heads: H. num_kv_heads: heads of k, v and the decay, a divisor of H (default all).
    expand_k, expand_v: all key and all value channels, over dim.
    feature_map: of q and k: None, "elu+1" or "relu".
    d_conv: taps of a causal convolution and silu on q, k and v; 0 for none (4 is usual). conv_bias: its bias.
    gate_low_rank_dim: width of W_1. gate_logit_normalizer: the 16. clamp_min: the lowest log alpha.
    output_gate: multiply by act(W_r x). gate_fn: act, "silu" or "sigmoid".
    norm_affine: the norm has weights; norm_eps: its eps.
    chunk_size, backend: of `gated_linear_attention`. proj_drop: dropout of the output.

    The state is a `GLAState` of constant size. Raises ValueError for values outside these.
    """

    patterns: ClassVar[frozenset[str]] = frozenset({"self", "causal"})
    streaming: ClassVar[bool] = True
    linear_state: ClassVar[bool] = True
    shared_patterns: ClassVar[frozenset[str]] = frozenset({"self", "causal"})
    state_type = GLAState
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "causal": {"causal": True, "chunk_size": 8},
        "self": {"chunk_size": 8},
        "conv": {"causal": True, "d_conv": 4, "conv_bias": True, "num_heads": 2, "num_kv_heads": 1, "chunk_size": 4},
        "conv_self": {"d_conv": 3, "feature_map": "elu+1", "num_heads": 2, "proj_drop": 0.2},
        "wide": {
            "causal": True,
            "num_heads": 2,
            "expand_k": 1.0,
            "expand_v": 1.5,
            "feature_map": "relu",
            "gate_low_rank_dim": 4,
            "gate_logit_normalizer": 1.0,
            "clamp_min": -2.0,
            "gate_fn": "sigmoid",
        },
        "plain": {"causal": True, "output_gate": False, "norm_affine": False, "norm_eps": 1e-6},
        "naive": {"causal": True, "backend": "naive"},
    }

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 4,
        num_kv_heads: int | None = None,
        expand_k: float = 0.5,
        expand_v: float = 1.0,
        causal: bool = False,
        cross: bool = False,
        feature_map: Literal["elu+1", "relu"] | None = None,
        d_conv: int = 0,
        conv_bias: bool = False,
        gate_low_rank_dim: int = 16,
        gate_logit_normalizer: float = 16.0,
        clamp_min: float | None = None,
        output_gate: bool = True,
        gate_fn: Literal["silu", "sigmoid"] = "silu",
        norm_affine: bool = True,
        norm_eps: float = 1e-5,
        chunk_size: int | None = None,
        backend: str = "auto",
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, causal=causal, cross=cross)
        kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        widths = {}
        for name, ratio in (("expand_k", expand_k), ("expand_v", expand_v)):
            width = round(dim * ratio)
            if width < 1 or not math.isclose(width, dim * ratio):
                raise ValueError(f"{name}={ratio} times dim={dim} is not a positive integer; nearest {width / dim:g}")
            widths[name] = head_width(width, num_heads, kv_heads, None)
        if feature_map is not None and feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map={feature_map!r} is unknown.{did_you_mean(feature_map, FEATURE_MAPS)}")
        if gate_fn not in _GATES:
            raise ValueError(f"gate_fn={gate_fn!r} is unknown.{did_you_mean(gate_fn, _GATES)}")
        for name, value in (("gate_low_rank_dim", gate_low_rank_dim), ("d_conv", d_conv)):
            if not isinstance(value, int) or value < (name != "d_conv"):
                raise ValueError(f"{name}={value!r} must be a {'positive integer' if name != 'd_conv' else 'count'}")
        for name, size in (("gate_logit_normalizer", gate_logit_normalizer), ("norm_eps", norm_eps)):
            if not size > 0:
                raise ValueError(f"{name}={size} must be positive")
        if clamp_min is not None and not clamp_min < 0:
            raise ValueError(f"clamp_min={clamp_min} must be negative, a log decay, or None for no bound")
        if not 0 <= proj_drop < 1:
            raise ValueError(f"proj_drop={proj_drop} must be in [0, 1)")
        check_chunk_size(chunk_size)
        if backend != "auto":
            choose_backend("gated_linear_attention", backend)  # a wrong name fails here, not in the first batch
        self.num_heads, self.num_kv_heads = num_heads, kv_heads
        self.key_dim, self.value_dim = widths["expand_k"], widths["expand_v"]
        self.feature_map, self.gate_fn = feature_map, gate_fn
        self.gate_logit_normalizer, self.clamp_min = gate_logit_normalizer, clamp_min
        self.chunk_size, self.backend = chunk_size, backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        keys, shared, values = num_heads * self.key_dim, kv_heads * self.key_dim, kv_heads * self.value_dim
        inner = num_heads * self.value_dim
        self.widths = [keys, shared, values]
        self.q_proj = nn.Linear(dim, keys, bias=False, **factory)
        self.k_proj = nn.Linear(dim, shared, bias=False, **factory)
        self.v_proj = nn.Linear(dim, values, bias=False, **factory)
        self.decay_proj = nn.Sequential(
            nn.Linear(dim, gate_low_rank_dim, bias=False, **factory),
            nn.Linear(gate_low_rank_dim, shared, **factory),
        )
        self.conv = ShortConv(sum(self.widths), d_conv, bias=conv_bias, **factory) if d_conv else None
        self.norm = (RMSNorm if norm_affine else SimpleRMSNorm)(self.value_dim, norm_eps, **factory)
        self.gate_proj = nn.Linear(dim, inner, bias=False, **factory) if output_gate else None
        self.out_proj = nn.Linear(inner, dim, bias=False, **factory)
        self.proj_drop = nn.Dropout(proj_drop)
        for layer in (self.q_proj, self.k_proj, *self.decay_proj):
            nn.init.xavier_uniform_(layer.weight, gain=2**-2.5)

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
    ) -> MixerOutput:
        """As `Mixer.forward`; `grid` is not used."""
        self.check_inputs(
            x, context, mask=mask, context_mask=context_mask, cu_seqlens=cu_seqlens, grid=grid, state=state
        )
        x = zero_pads(x, mask)
        layout = lay_out(mask, cu_seqlens, x.shape[1])
        (q, k, v, decay), tail = self._project(x, layout, None if state is None else state.conv, state is not None)
        o, s = decayed_attention(
            q,
            k,
            v,
            decay,
            causal=self.causal,
            initial_state=None if state is None else state.s,
            return_state=state is not None,
            exchange=self.exchange,
            scale=self.key_dim**-0.5,
            lengths=layout.lengths,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        y = self.norm(layout.restore(o)).flatten(2)
        if self.gate_proj is not None:
            y = y * _GATES[self.gate_fn](self.gate_proj(x))
        y = self.proj_drop(self.out_proj(y))
        if mask is not None:
            y = y.masked_fill(~mask.unsqueeze(2), 0)
        return MixerOutput(y, None if s is None else GLAState(s, tail))

    def _project(
        self, x: Tensor, layout: Layout, before: Tensor | None, return_tail: bool
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor], Tensor | None]:
        """q, k, v and log decay as rows of `layout`, and the last inputs of the convolution, which read `before`."""
        joint = layout.place(torch.cat((self.q_proj(x), self.k_proj(x), self.v_proj(x)), -1))
        tail = None
        if self.conv is not None:
            joint, tail = self.conv(
                joint, lengths=layout.lengths, state=before, return_state=return_tail, exchange=self.exchange
            )
        q, k, v = joint.split(self.widths, -1)
        q, k, v = q.unflatten(-1, (self.num_heads, -1)), self._heads(k), self._heads(v)
        if self.feature_map is not None:
            q, k = FEATURE_MAPS[self.feature_map](q), FEATURE_MAPS[self.feature_map](k)
        logits = layout.place(self.decay_proj(x))
        decay = F.logsigmoid(logits.to(accumulation_dtype(logits.dtype))) / self.gate_logit_normalizer
        decay = self._heads(decay if self.clamp_min is None else decay.clamp(min=self.clamp_min))
        return (q, k, v, decay), tail

    def chunk_summary(self, x: Tensor, *, state: State | None = None) -> ChunkSummary:
        """See `Mixer.chunk_summary`."""
        if not self.causal:
            return super().chunk_summary(x)
        before = None if state is None else state.conv
        (_, k, v, decay), tail = self._project(x, lay_out(None, None, x.shape[1]), before, True)
        factor, s = gated_chunk_summary(k, v, decay)
        return ChunkSummary(GLAState(factor, None if tail is None else torch.zeros_like(tail)), GLAState(s, tail))

    def _heads(self, x: Tensor) -> Tensor:
        """(R, M, Hkv K) to (R, M, H, K)."""
        x = x.unflatten(-1, (self.num_kv_heads, -1))
        repeats = self.num_heads // self.num_kv_heads
        return x if repeats == 1 else x.repeat_interleave(repeats, 2)

    def _check_state(self, state: State, rows: int) -> None:
        fresh = self.init_state(0)
        if not isinstance(state, GLAState) or (state.conv is None) != (fresh.conv is None):
            held = type(state).__name__
            raise ValueError(f"GatedLinearAttention: state is a {held} of another mixer, expected that of init_state")
        if state.s.shape != (rows, *fresh.s.shape[1:]):
            expected = (rows, *fresh.s.shape[1:])
            raise ValueError(f"GatedLinearAttention: state has shape {tuple(state.s.shape)}, expected {expected}")

    def init_state(
        self,
        batch_size: int,
        *,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> GLAState:
        """Zeros. max_len does not matter; s is float64 for dtype float64, otherwise float32."""
        if not self.causal:
            return super().init_state(batch_size)
        weight = self.q_proj.weight
        kind, place = accumulation_dtype(dtype or weight.dtype), device or weight.device
        s = torch.zeros(batch_size, self.num_heads, self.key_dim, self.value_dim, device=place, dtype=kind)
        conv = None if self.conv is None else self.conv.init_state(batch_size, device=place, dtype=dtype)
        return GLAState(s, conv)

    def state_size(self, length: int) -> int:
        """H K V, and the tail of the convolution, whatever the length."""
        if not self.causal:
            return super().state_size(length)
        tail = 0 if self.conv is None else (self.conv.kernel_size - 1) * sum(self.widths)
        return self.num_heads * self.key_dim * self.value_dim + tail
