"""LongVQ: a state space memory feeds attention whose keys are codewords, and a local window beside them.

Reconstruction of LongVQ (arXiv:2404.11163), which has no public code, from its published description, on the parts
that it builds on: the gated layer of MEGA (arXiv:2209.10655) and the attention of Transformer-VQ (arXiv:2309.16354,
theorem 3.7). x is the normalised input and `residual` the input as it was:

    m = silu(EMA(x) + omega x), or the same of S4D       v = silu(W_v x)
    (u, z, r, h0) = W m, z and r through silu            q, k = norm of an affine map of z
    o = softmax over window and codewords, of v          (kernels/vq_attention)
    h = silu(h0 + W_h (r * o))                           y = sigmoid(u) * (h - residual)

Ours: the norm of queries and keys (that of Transformer-VQ; the keys of MEGA start so small that one codeword would take
them all: `qk_norm=False` has those), and with it the weights of z from N(0, 1/D) and the gains of q and k from N(0, 1):
a norm enlarges what a step does to small numbers, and the keys of all tokens would soon be one; the window of whole
blocks, the own one and the one before, without causality the one after too; the cross patterns, MEGA's gated cross
attention over a quantised context, without memory and window.

Compared with the public code of Transformer-VQ (JAX 0.10, float32; causal, six blocks, positional terms 0): outputs
within 5e-7, cells 3e-7, gradient of the input 6e-7, codebook averages 2e-7, commitment loss equal; with
vector-quantize-pytorch 1.32.0 over 100 updates: codes equal, sums within 1e-6, counts equal.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.vq_attention import VQState
from ..layers.ema import DampedEMA
from ..layers.gated_attention import GatedAttention, GatedCrossAttention
from ..layers.kv_cache import KVState
from ..layers.projections import check_divides
from ..layers.rows import Layout, lay_out
from ..layers.vq_attention import Carried, VQAttention
from ..protocol import Mixer, MixerOutput, State
from ..registry import did_you_mean, register_mixer
from .s4d import S4D

_TINY: dict[str, Any] = {"z_dim": 8, "hidden_dim": 12, "codebook_size": 6, "chunk_size": 3, "d_state": 4}


class LongVQState(NamedTuple):
    """memory: of the EMA or S4D. attention: a `VQState`, of constant size; unquantised, a `KVState` that grows."""

    memory: State
    attention: VQState | KVState


class _GatedAcross(GatedCrossAttention):
    """Also returns what comes with the attention's output."""

    attention: Any

    def forward(  # type: ignore[override]
        self, x: Tensor, context: Tensor, residual: Tensor, *, context_lengths: Tensor | None = None
    ) -> tuple[Tensor, Carried]:
        u, r, q = self.q_proj(x).split((self.dim, self.dim, self.z_dim), -1)
        v = self.hidden_drop(self._act(self.v_proj(context)))
        o, carried = self.attention.across(q, self.k_proj(context), v, context_lengths)
        return self._update(u, self.h_proj(o * F.silu(r)), residual), carried


@register_mixer(
    "long_vq",
    paper="arXiv:2404.11163",
    origin="reconstruction",
    cost="L D (M + C)",
    kernels=("vq_attention", "ema"),
    ours=("cross", "causal-cross"),
)
class LongVQ(Mixer):
    """Gated attention over a codebook of keys and a local window, on top of a state space memory; see the module.

    z_dim: width of queries and keys (default dim / 2), hidden_dim: of values (default 2 dim), over all num_heads.
    codebook_size: codewords of a head. chunk_size: C, tokens of a block of the window, which has a learned bias.
    memory: "ema" or "s4d", with d_state states per channel.
    qk_norm: RMS norm of queries and keys. quantize: False keeps the keys: exact softmax attention over all of them with
        the same bias, L^2 in time, a state that grows.
    decay, kmeans_init, threshold_ema_dead_code, reduction: of the codebook, see `layers.vector_quantizer`; it learns in
        training mode only. commitment_weight: of the auxiliary loss "commitment", which is a sum over channels and a
        mean over tokens.
    backend: of `kernels.vq_attention`. drop: dropout of m and h. hidden_drop: of the values.

    In the cross patterns chunk_size, memory, d_state and hidden_dim have nothing to act on, and values are dim wide.
    Time L (codebook_size + 3 C). The state is a `LongVQState`, of constant size if quantised. Raises ValueError for
    values outside these.
    """

    patterns: ClassVar[frozenset[str]] = frozenset({"self", "causal", "cross", "causal-cross"})
    streaming: ClassVar[bool] = True
    state_type = LongVQState
    reads_residual = True
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "self": _TINY,
        "causal": {"causal": True, **_TINY},
        "heads": {"causal": True, **_TINY, "num_heads": 2, "chunk_size": 4, "drop": 0.2, "decay": 0.9},
        "heads_self": {**_TINY, "num_heads": 4, "chunk_size": 5, "hidden_drop": 0.2},
        "s4d": {"causal": True, **_TINY, "memory": "s4d", "commitment_weight": 0.5},
        "s4d_self": {**_TINY, "memory": "s4d", "reduction": "none"},
        "raw_keys": {**_TINY, "qk_norm": False, "kmeans_init": True},
        "restarts": {"causal": True, **_TINY, "kmeans_init": True, "threshold_ema_dead_code": 0.5},
        "exact": {"causal": True, **_TINY, "quantize": False},
        "exact_self": {**_TINY, "quantize": False, "num_heads": 2},
        "naive": {"causal": True, **_TINY, "backend": "naive"},
        "cross": {"cross": True, **_TINY, "num_heads": 2},
        "causal_cross": {"causal": True, "cross": True, **_TINY},
        "exact_cross": {"cross": True, **_TINY, "quantize": False},
    }

    def __init__(
        self,
        dim: int,
        *,
        z_dim: int | None = None,
        hidden_dim: int | None = None,
        num_heads: int = 1,
        codebook_size: int = 256,
        chunk_size: int = 64,
        causal: bool = False,
        cross: bool = False,
        memory: Literal["ema", "s4d"] = "ema",
        d_state: int = 16,
        qk_norm: bool = True,
        quantize: bool = True,
        decay: float = 0.99,
        commitment_weight: float = 1e-4,
        kmeans_init: bool = False,
        threshold_ema_dead_code: float = 0.0,
        reduction: Literal["sum", "mean", "none"] = "sum",
        backend: Literal["auto", "triton", "chunked", "naive"] = "auto",
        drop: float = 0.0,
        hidden_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, causal=causal, cross=cross)
        if memory not in ("ema", "s4d"):
            raise ValueError(f"memory={memory!r} is unknown.{did_you_mean(memory, ('ema', 's4d'))}")
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.smooth = not quantize
        self.value_dim = dim if cross else 2 * dim if hidden_dim is None else hidden_dim
        scores: Any = VQAttention(
            max(dim // 2, 1) if z_dim is None else z_dim,
            num_heads=num_heads,
            codebook_size=codebook_size,
            chunk_size=None if cross else chunk_size,
            causal=causal and not cross,
            qk_norm=qk_norm,
            quantize=quantize,
            commitment_weight=commitment_weight,
            backend=backend,
            quantizer_options={
                "decay": decay,
                "kmeans_init": kmeans_init,
                "threshold_ema_dead_code": threshold_ema_dead_code,
                "reduction": reduction,
            },
            **where,
        )
        check_divides("num_heads", num_heads, self.value_dim, "dim" if cross else "hidden_dim")
        drops: dict[str, Any] = {"drop": drop, "hidden_drop": hidden_drop}
        self.memory: DampedEMA | S4D | None = None
        self.gated: GatedAttention | _GatedAcross
        if cross:
            self.gated = _GatedAcross(dim, scores, **drops, **where)
            if qk_norm:
                with torch.no_grad():
                    for weight in (self.gated.k_proj.weight, self.gated.q_proj.weight[-scores.z_dim :]):
                        nn.init.normal_(weight, std=dim**-0.5)
            return
        if memory == "ema":
            self.memory = DampedEMA(dim, d_state=d_state, bidirectional=not causal, **where)
        else:
            self.memory = S4D(dim, d_state=d_state, causal=causal, activation="silu", output="none", **where)
        self.gated = GatedAttention(dim, scores, hidden_dim=self.value_dim, **drops, **where)
        if qk_norm:
            with torch.no_grad():
                nn.init.normal_(self.gated.qk_weight)
                rows = slice(dim, dim + scores.z_dim)  # those of z
                nn.init.normal_(self.gated.mx_proj.weight[rows], std=dim**-0.5)

    @property
    def attention(self) -> VQAttention:
        return self.gated.attention  # type: ignore[return-value]

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        state: LongVQState | None = None,
        residual: Tensor | None = None,
    ) -> MixerOutput:
        """As `Mixer.forward`; `grid` is not used. residual: (B, L, D), x before its norm, default x."""
        self.check_inputs(
            x, context, mask=mask, context_mask=context_mask, cu_seqlens=cu_seqlens, grid=grid, state=state
        )
        if residual is not None and residual.shape != x.shape:
            raise ValueError(f"LongVQ: residual has shape {tuple(residual.shape)}, x has {tuple(x.shape)}")
        layout = lay_out(mask, cu_seqlens, x.shape[1])
        rows = layout.real(x)
        before = rows if residual is None else layout.real(residual)
        carried: Carried
        if context is not None:
            source = lay_out(context_mask, None, context.shape[1])
            y, carried = self.gated(rows, source.real(context), before, context_lengths=source.lengths)
            return MixerOutput(layout.restore(y), None, carried.aux)
        streams = state is not None
        m, memory = self._remember(rows, layout, state)
        cache = None if state is None else state.attention
        y, carried = self.gated(rows, m, before, lengths=layout.lengths, state=cache, return_state=streams)
        after = None if carried.state is None else LongVQState(memory, carried.state)
        return MixerOutput(layout.restore(y), after, carried.aux)

    def _remember(self, x: Tensor, layout: Layout, state: LongVQState | None) -> tuple[Tensor, State | None]:
        memory = None if state is None else state.memory
        if isinstance(self.memory, S4D):
            out = self.memory(x, mask=layout.valid, state=memory)
            return out.y, out.state
        if self.memory is None:
            raise RuntimeError("the cross patterns have no memory")
        return self.memory(x, lengths=layout.lengths, state=memory, return_state=state is not None)

    def _check_state(self, state: State, rows: int) -> None:
        super()._check_state(state, rows)
        for name, part, fresh in zip(state._fields, state, self.init_state(0), strict=True):
            if type(part) is not type(fresh):
                raise ValueError(f"LongVQ: state.{name} is a {type(part).__name__}, expected a {type(fresh).__name__}")
        if self.attention.quantizer is None:  # else the kernel does
            self._check_sizes(state)

    def init_state(
        self,
        batch_size: int,
        *,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LongVQState:
        """No token seen. max_len bounds the tokens with quantize=False only. Memory and cells are float32 at least."""
        if self.memory is None or not self.causal:
            return super().init_state(batch_size)
        weight = self.gated.v_proj.weight
        where: dict[str, Any] = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        attention = self.attention.init_state(batch_size, self.value_dim, max_len=max_len, **where)
        return LongVQState(self.memory.init_state(batch_size, **where), attention)

    def state_size(self, length: int) -> int:
        if self.memory is None or not self.causal:
            return super().state_size(length)
        memory = self.memory.state_size(length) if isinstance(self.memory, S4D) else self.memory.state_size()
        return memory + self.attention.state_size(length, self.value_dim)
