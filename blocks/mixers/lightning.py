"""Lightning Attention: linear attention with a constant decay per head, normalised after the product.

Qin et al., "Lightning Attention-2", arXiv:2401.04658, for TransNormerLLM, arXiv:2307.14995; MiniMax-01,
arXiv:2501.08313, uses it too. With lam_h = exp(-s_h), per head:

    o_t = sum_{j <= t} lam^(t-j) (q_t . k_j) v_j   or   S_t = lam S_{t-1} + k_t v_t^T,  o_t = q_t^T S_t
    y = W_o (norm(o) * gate(x)),  q = silu(W_q x), k = silu(W_k x), v = silu(W_v x)

There is no scale and no denominator; the norm is over the channels of all heads together. Published forms, which
differ around the product only:

    authors' module (the default)  norm="layernorm", gate="low_rank", value_act=True,  schedule="alibi"
    TransNormerLLM                 norm="srmsnorm",  gate="linear",   value_act=False, lrpe=True in the first layer
    MiniMax-01                     norm="rmsnorm",   gate="full",     value_act=True,  schedule="minimax"

Ours: the bidirectional form o_t = sum_j lam^|t-j| (q_t . k_j) v_j, and the factor 1 instead of 0 / 0 in the schedules
of a model of one layer. The decay does not advance over padded positions.

Compared with transformers' MiniMaxLightningAttention (copied weights: outputs and carried state within 1e-6 in
float32) and with the authors' module over its dense reference product (outputs 4e-7, gradients 1.1e-6).
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
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
from ..layers.decayed import decayed_attention
from ..layers.norm import NORMS, create_norm
from ..layers.positions import alibi_slopes
from ..layers.projections import head_width
from ..layers.rows import Layout, lay_out, zero_pads
from ..parameters import tag_parameter
from ..protocol import ChunkSummary, Mixer, MixerOutput, State
from ..registry import did_you_mean, register_mixer

SCHEDULES = ("alibi", "minimax", "paper")
GATES = ("low_rank", "full", "linear", "none")
_NORMS = ("layernorm", "rmsnorm", "srmsnorm")


def decay_slopes(num_heads: int, schedule: str = "alibi", *, layer_index: int = 0, num_layers: int = 1) -> Tensor:
    """s_h of each head in float64, (H,); the decay per token is exp(-s_h). Deeper layers forget less.

    With h = 1..H, l = layer_index = 0..n-1, n = num_layers:
    "alibi", the authors' code: the slopes of ALiBi, 2^(-8h/H) for H a power of two, times 1 - l / (n-1) + 1e-5.
    "minimax", MiniMax-01: 2^(-8h/H) for every H, times 1 - l / (n-1 + 1e-5) + 1e-5.
    "paper", TransNormerLLM: (8h/H) (1 - (l+1)/n); the last layer does not decay.
    With n = 1 the factor of the layer is 1 (+ 1e-5).
    """
    heads = torch.arange(1, num_heads + 1, dtype=torch.float64)
    if schedule == "paper":
        return 8 * heads / num_heads * (1 - (layer_index + 1) / num_layers if num_layers > 1 else 1)
    if schedule == "minimax":
        return 2 ** (-8 * heads / num_heads) * (1 - layer_index / (num_layers - 1 + 1e-5) + 1e-5)
    return alibi_slopes(num_heads, dtype=torch.float64) * (1 - layer_index / max(1, num_layers - 1) + 1e-5)


class LightningState(NamedTuple):
    """s: (B, H, K, V), float32 or float64. position: int64 (B,), tokens seen; None without lrpe."""

    s: Tensor
    position: Tensor | None = None


class _Lrpe(nn.Module):
    """Linearised relative position (arXiv:2307.09270): x to [x cos(theta t), x sin(theta t)], so that q . k gets
    cos(theta (t - j)) in every channel; theta is learned and starts at 10000^(-2i / D), i over all channels."""

    def __init__(
        self, num_heads: int, head_dim: int, *, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> None:
        super().__init__()
        inner = num_heads * head_dim
        start = 10000.0 ** (-2 / inner * torch.arange(inner, device=device, dtype=torch.float32))
        self.theta = nn.Parameter(start.view(num_heads, head_dim).to(dtype or torch.get_default_dtype()))
        tag_parameter(self, "theta", weight_decay=0.0)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x: (R, M, H, K). positions: int64 (R or 1, M). Returns (R, M, H, 2 K)."""
        wide = torch.promote_types(self.theta.dtype, torch.float32)
        angle = positions[:, :, None, None].to(wide) * self.theta.to(wide)
        return torch.cat((x * angle.cos(), x * angle.sin()), -1).to(x.dtype)


@register_mixer(
    "lightning",
    paper="arXiv:2401.04658",
    cost="L D (C + K)",
    kernels=("gated_linear_attention",),
    ours=("self",),
)
class LightningAttention(Mixer):
    """Linear attention with a constant decay per head; the equations are at the top of this file.

    num_heads: H. head_dim: K = V (default dim / num_heads).
    schedule, layer_index, num_layers: the decay of each head, see `decay_slopes`; layer_index counts from 0.
    norm: "layernorm", "rmsnorm" or "srmsnorm" (without a gain), with norm_eps (None: the norm's own).
    gate: "low_rank", sigmoid of a linear map dim -> head_dim -> H head_dim; "full", sigmoid of a map dim -> H
        head_dim; "linear", that map alone; "none".
    value_act: silu on the values too. lrpe: relative position, doubles the key width.
    chunk_size, backend: of `gated_linear_attention`.
    qkv_bias, proj_bias: biases of the projections into (the gate's too) and out of the product.
    proj_drop: dropout of the output.

    The state is a `LightningState` of constant size. Raises ValueError for values outside these.
    """

    patterns: ClassVar[frozenset[str]] = frozenset({"self", "causal"})
    streaming: ClassVar[bool] = True
    linear_state: ClassVar[bool] = True
    shared_patterns: ClassVar[frozenset[str]] = frozenset({"self", "causal"})
    state_type = LightningState
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "causal": {"causal": True, "num_heads": 4, "chunk_size": 8},
        "self": {"num_heads": 4, "chunk_size": 8},
        "minimax": {
            "causal": True,
            "num_heads": 2,
            "norm": "rmsnorm",
            "norm_eps": 1e-5,
            "gate": "full",
            "schedule": "minimax",
            "layer_index": 2,
            "num_layers": 4,
        },
        "transnormer": {
            "causal": True,
            "num_heads": 2,
            "norm": "srmsnorm",
            "gate": "linear",
            "value_act": False,
            "lrpe": True,
            "schedule": "paper",
            "num_layers": 24,
            "chunk_size": 4,
        },
        "lrpe_self": {"num_heads": 2, "lrpe": True, "chunk_size": 4, "proj_drop": 0.3},
        "plain": {"causal": True, "num_heads": 3, "head_dim": 5, "gate": "none", "qkv_bias": True, "proj_bias": True},
        "naive": {"causal": True, "num_heads": 4, "backend": "naive"},
    }

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        cross: bool = False,
        schedule: Literal["alibi", "minimax", "paper"] = "alibi",
        layer_index: int = 0,
        num_layers: int = 1,
        norm: Literal["layernorm", "rmsnorm", "srmsnorm"] = "layernorm",
        norm_eps: float | None = None,
        gate: Literal["low_rank", "full", "linear", "none"] = "low_rank",
        value_act: bool = True,
        lrpe: bool = False,
        chunk_size: int | None = None,
        backend: str = "auto",
        qkv_bias: bool = False,
        proj_bias: bool = False,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, causal=causal, cross=cross)
        self.num_heads, self.head_dim = num_heads, head_width(dim, num_heads, num_heads, head_dim)
        for name, value, known in (("schedule", schedule, SCHEDULES), ("norm", norm, _NORMS), ("gate", gate, GATES)):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown.{did_you_mean(value, known)}")
        if not 0 <= layer_index < num_layers:
            raise ValueError(
                f"layer_index={layer_index} must be at least 0 and below num_layers={num_layers}; "
                f"the last layer is {max(1, num_layers) - 1}"
            )
        if norm_eps is not None and not norm_eps > 0:
            raise ValueError(f"norm_eps={norm_eps} must be positive, or None for that of the norm")
        if not 0 <= proj_drop < 1:
            raise ValueError(f"proj_drop={proj_drop} must be in [0, 1)")
        check_chunk_size(chunk_size)
        if backend != "auto":
            choose_backend("gated_linear_attention", backend)  # a wrong name fails here, not in the first batch
        self.gate, self.value_act, self.chunk_size, self.backend = gate, value_act, chunk_size, backend
        # Numbers, not a buffer: the decay keeps its digits when the module is moved to half precision.
        slopes = decay_slopes(num_heads, schedule, layer_index=layer_index, num_layers=num_layers)
        self.log_decay: tuple[float, ...] = tuple((-slopes).tolist())
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = num_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=qkv_bias, **factory)
        self.k_proj = nn.Linear(dim, inner, bias=qkv_bias, **factory)
        self.v_proj = nn.Linear(dim, inner, bias=qkv_bias, **factory)
        self.lrpe = _Lrpe(num_heads, self.head_dim, **factory) if lrpe else None
        self.norm = create_norm(partial(NORMS[norm], **factory), inner, norm_eps)
        self.gate_proj: nn.Module | None = None
        if gate == "low_rank":
            self.gate_proj = nn.Sequential(
                nn.Linear(dim, self.head_dim, bias=qkv_bias, **factory),
                nn.Linear(self.head_dim, inner, bias=qkv_bias, **factory),
            )
        elif gate != "none":
            self.gate_proj = nn.Linear(dim, inner, bias=qkv_bias, **factory)
        self.out_proj = nn.Linear(inner, dim, bias=proj_bias, **factory)
        self.proj_drop = nn.Dropout(proj_drop)

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
        before = None if state is None else state.position
        q, k, v = self._project(x, layout, before)
        position: Tensor | None = None
        if before is not None:
            seen = q.shape[1] if self.exchange is None else self.exchange.total
            position = before + (seen if layout.lengths is None else layout.lengths)
        o, s = decayed_attention(
            q,
            k,
            v,
            self._decay(v),
            causal=self.causal,
            initial_state=None if state is None else state.s,
            return_state=state is not None,
            exchange=self.exchange,
            lengths=layout.lengths,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        y = self.norm(layout.restore(o).flatten(2))
        if self.gate_proj is not None:
            gate = self.gate_proj(x)
            y = y * (gate if self.gate == "linear" else torch.sigmoid(gate))
        y = self.proj_drop(self.out_proj(y))
        if mask is not None:
            y = y.masked_fill(~mask.unsqueeze(2), 0)
        return MixerOutput(y, None if s is None else LightningState(s, position))

    def _project(self, x: Tensor, layout: Layout, before: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v as rows of `layout`. before: int64 (R,), tokens seen, None for none."""
        q, k, v = F.silu(self.q_proj(x)), F.silu(self.k_proj(x)), self.v_proj(x)
        v = F.silu(v) if self.value_act else v
        q, k, v = (layout.place(t.unflatten(-1, (self.num_heads, self.head_dim))) for t in (q, k, v))
        if self.lrpe is not None:
            before = q.new_zeros(1, dtype=torch.int64) if before is None else before
            start = 0 if self.exchange is None else self.exchange.start
            places = before.unsqueeze(1) + torch.arange(start, start + q.shape[1], device=q.device)
            q, k = self.lrpe(q, places), self.lrpe(k, places)
        return q, k, v

    def _decay(self, v: Tensor) -> Tensor:
        return torch.tensor(self.log_decay, device=v.device, dtype=accumulation_dtype(v.dtype))

    def chunk_summary(self, x: Tensor, *, state: State | None = None) -> ChunkSummary:
        """See `Mixer.chunk_summary`; with lrpe, of tokens that follow those that `state` counts."""
        if not self.causal:
            return super().chunk_summary(x)
        before = None if state is None else state.position
        _, k, v = self._project(x, lay_out(None, None, x.shape[1]), before)
        decay, s = gated_chunk_summary(k, v, self._decay(v))
        if self.lrpe is None:
            return ChunkSummary(LightningState(decay), LightningState(s))
        count = torch.full((x.shape[0],), x.shape[1], device=x.device)
        return ChunkSummary(LightningState(decay, torch.ones_like(count)), LightningState(s, count))

    def _check_state(self, state: State, rows: int) -> None:
        fresh = self.init_state(0)
        if not isinstance(state, LightningState) or (state.position is None) != (fresh.position is None):
            held = type(state).__name__
            raise ValueError(f"LightningAttention: state is a {held} of another mixer, expected that of init_state")
        if state.s.shape != (rows, *fresh.s.shape[1:]):
            expected = (rows, *fresh.s.shape[1:])
            raise ValueError(f"LightningAttention: state has shape {tuple(state.s.shape)}, expected {expected}")

    def init_state(
        self,
        batch_size: int,
        *,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LightningState:
        """Zeros. max_len does not matter; dtype float64 gives a float64 state, any other a float32 one."""
        if not self.causal:
            return super().init_state(batch_size)
        weight = self.q_proj.weight
        key = self.head_dim * (1 if self.lrpe is None else 2)
        kind, place = accumulation_dtype(dtype or weight.dtype), device or weight.device
        s = torch.zeros(batch_size, self.num_heads, key, self.head_dim, device=place, dtype=kind)
        position = None if self.lrpe is None else torch.zeros(batch_size, device=place, dtype=torch.int64)
        return LightningState(s, position)

    def state_size(self, length: int) -> int:
        """H K V, whatever the length; K is twice the head with lrpe."""
        if not self.causal:
            return super().state_size(length)
        return self.num_heads * self.head_dim**2 * (1 if self.lrpe is None else 2)
