"""Mamba: the selective state space S6 (arXiv:2312.00752), whose step, input and output vectors depend on the token.

With E = expand dim channels and N = d_state states in each (section 3.2, algorithm 2, and figure 3):

    (x, z) = W_in u                        x <- silu(conv(x)), depthwise and causal
    (r, B_t, C_t) = W_x x                  dt_t = softplus(W_dt r + b_dt), of rank dt_rank
    h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t        y_t = C_t h_t + D x_t        A = -exp(a_log) < 0
    out = W_out (y silu(z))

Ours: the pattern "self", which the paper does not have. A second scan runs over the reversed sequence and the two are
added before the gate: W_in, W_out and the gate z are shared, while the convolution, W_x, W_dt, b_dt, A and D are the
direction's own (as in Vim, arXiv:2401.09417).

Compared, with copied weights: in float32 transformers' MambaMixer (outputs and gradients; its language model decoding
step by step) and mamba-ssm's reference scan, the largest relative difference 3e-7; mambapy in float64, 2e-11 (it takes
A in float32).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.dispatch import choose_backend
from ...kernels.selective_scan import selective_scan, selective_scan_summary
from ..layers.conv import ShortConv
from ..layers.rows import lay_out, zero_pads
from ..layers.ssm import check_step_options, inner_width, step_bias
from ..parameters import tag_parameter
from ..protocol import ChunkSummary, Exchange, Mixer, MixerOutput, State
from ..registry import did_you_mean, register_mixer


class MambaState(NamedTuple):
    """conv: (B, d_conv - 1, E), the last inputs of the convolution. h: (B, E, N), in float32 or float64."""

    conv: Tensor
    h: Tensor


class _SelectiveSSM(nn.Module):
    """Convolution and scan in one direction: x (R, M, E) to y (R, M, E) before the gate."""

    def __init__(
        self,
        channels: int,
        *,
        d_state: int,
        d_conv: int,
        dt_rank: int,
        dt_min: float,
        dt_max: float,
        dt_init: str,
        dt_scale: float,
        dt_init_floor: float,
        conv_bias: bool,
        chunk_size: int | None,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.d_state, self.dt_rank, self.chunk_size, self.backend = d_state, dt_rank, chunk_size, backend
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.conv = ShortConv(channels, d_conv, bias=conv_bias, **factory)
        self.x_proj = nn.Linear(channels, dt_rank + 2 * d_state, bias=False, **factory)
        self.dt_proj = nn.Linear(dt_rank, channels, **factory)
        states = torch.arange(1, d_state + 1, device=device, dtype=torch.float32)
        kind = dtype or torch.get_default_dtype()
        self.a_log = nn.Parameter(states.log().to(kind).expand(channels, -1).contiguous())
        self.d = nn.Parameter(torch.ones(channels, **factory))
        with torch.no_grad():
            bound = dt_rank**-0.5 * dt_scale  # keeps the variance of dt's input
            if dt_init == "constant":
                self.dt_proj.weight.fill_(bound)
            else:
                self.dt_proj.weight.uniform_(-bound, bound)
            start = step_bias(channels, dt_min=dt_min, dt_max=dt_max, floor=dt_init_floor, device=device)
            self.dt_proj.bias.copy_(start)
        tag_parameter(self, "a_log", weight_decay=0.0)
        tag_parameter(self, "d", weight_decay=0.0)
        tag_parameter(self.dt_proj, "bias", weight_decay=0.0)

    def forward(
        self, x: Tensor, lengths: Tensor | None, state: MambaState | None, exchange: Exchange | None = None
    ) -> tuple[Tensor, MambaState | None]:
        carried = state is not None
        terms, tail = self._terms(x, lengths, state, carried, exchange)
        u, dt, a, b, c = terms
        before: Tensor | None = None if state is None else state.h
        last: list[Tensor] | None = None
        if exchange is not None:
            decay, own = self._summary(u, dt, a, b)
            (before,), last = exchange.prefix([decay], [own], None if state is None else [state.h], return_last=carried)
        y, h = selective_scan(
            u,
            dt,
            a,
            b,
            c,
            skip=self.d,
            lengths=lengths,
            initial_state=before,
            return_state=carried and last is None,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        h = h if last is None else last[0]
        return y, None if tail is None or h is None else MambaState(tail, h)

    def summary(self, x: Tensor, state: MambaState | None) -> ChunkSummary:
        """See `Mixer.chunk_summary`; x (B, L, E)."""
        (u, dt, a, b, _), tail = self._terms(x, None, state, True, None)
        decay, h = self._summary(u, dt, a, b)
        if tail is None:
            raise RuntimeError("the convolution returned no state")
        return ChunkSummary(MambaState(torch.zeros_like(tail), decay), MambaState(tail, h))

    def _summary(self, u: Tensor, dt: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return selective_scan_summary(u, dt, a, b, chunk_size=self.chunk_size, backend=self.backend)

    def _terms(
        self,
        x: Tensor,
        lengths: Tensor | None,
        state: MambaState | None,
        return_tail: bool,
        exchange: Exchange | None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor | None]:
        """u, dt, A, B and C of the scan, and the last inputs of the convolution."""
        x, tail = self.conv(
            x, lengths=lengths, state=state.conv if state else None, return_state=return_tail, exchange=exchange
        )
        low, b, c = self.x_proj(x).split([self.dt_rank, self.d_state, self.d_state], -1)
        dt = F.linear(low, self.dt_proj.weight)
        wide = torch.promote_types(dt.dtype, torch.float32)
        dt = F.softplus(dt.to(wide) + self.dt_proj.bias.to(wide))
        return (x, dt, -torch.exp(self.a_log.to(wide)), b, c), tail


@register_mixer(
    "mamba",
    paper="arXiv:2312.00752",
    cost="L E N",
    kernels=("selective_scan", "short_conv"),
    ours=("self",),
)
class Mamba(Mixer):
    """The Mamba layer: gated selective state space behind a short convolution.

    dim: model width D. d_state: N, states per channel. d_conv: taps of the convolution. expand: E / dim.
    dt_rank: rank of the map to the time steps, "auto" for dim / 16 rounded up. dt_min, dt_max: the time step starts
    log-uniform between them, but not below dt_init_floor. dt_init: start of the map to the time steps, "random"
    (uniform within dt_scale / sqrt(dt_rank)) or "constant" (that bound).
    conv_bias, proj_bias: biases of the convolution; of the projections in and out.
    chunk_size: tokens per step of the scan, None for what suits the sizes; it changes the speed only. backend: of
    `kernels.selective_scan`.

    a_log, d and the bias of dt_proj get no weight decay. The state is a `MambaState`, of constant size. Scan and time
    steps are computed in float32 (float64), under autocast too. Raises ValueError for values outside these.
    """

    patterns = frozenset({"self", "causal"})
    streaming = True
    linear_state = True
    shared_patterns = patterns
    state_type = MambaState
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "causal": {"causal": True, "d_state": 4, "chunk_size": 4},
        "self": {"d_state": 3, "chunk_size": 5},
        "dt": {
            "causal": True,
            "d_state": 2,
            "dt_rank": 3,
            "dt_min": 0.01,
            "dt_max": 0.5,
            "dt_init": "constant",
            "dt_scale": 0.5,
            "dt_init_floor": 0.02,
        },
        "biases": {"causal": True, "d_state": 2, "d_conv": 3, "conv_bias": False, "proj_bias": True, "expand": 1},
        "no_conv": {"causal": True, "d_state": 2, "d_conv": 1, "expand": 1.5},
        "naive": {"causal": True, "d_state": 2, "backend": "naive", "expand": 1},
    }

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2.0,
        causal: bool = False,
        cross: bool = False,
        dt_rank: int | Literal["auto"] = "auto",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init: Literal["random", "constant"] = "random",
        dt_scale: float = 1.0,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        proj_bias: bool = False,
        chunk_size: int | None = None,
        backend: Literal["auto", "triton", "chunked", "naive", "compiled"] = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, causal=causal, cross=cross)
        rank = math.ceil(dim / 16) if dt_rank == "auto" else dt_rank
        for name, value in (("d_state", d_state), ("d_conv", d_conv), ("dt_rank", rank)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if dt_init not in ("random", "constant"):
            raise ValueError(f"dt_init={dt_init!r} is unknown.{did_you_mean(dt_init, ('random', 'constant'))}")
        if not dt_scale > 0:
            raise ValueError(f"dt_scale={dt_scale} must be positive")
        check_step_options(dt_min, dt_max, dt_init_floor)
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None")
        if backend != "auto":
            choose_backend("selective_scan", backend)  # a wrong name fails here, not in the first batch
        inner = inner_width(dim, expand)
        options: dict[str, Any] = {
            "d_state": d_state,
            "d_conv": d_conv,
            "dt_rank": rank,
            "dt_min": dt_min,
            "dt_max": dt_max,
            "dt_init": dt_init,
            "dt_scale": dt_scale,
            "dt_init_floor": dt_init_floor,
            "conv_bias": conv_bias,
            "chunk_size": chunk_size,
            "backend": backend,
            "device": device,
            "dtype": dtype,
        }
        self.inner, self.d_state = inner, d_state
        self.in_proj = nn.Linear(dim, 2 * inner, bias=proj_bias, device=device, dtype=dtype)
        self.scan = _SelectiveSSM(inner, **options)
        self.scan_reverse = None if causal else _SelectiveSSM(inner, **options)
        self.out_proj = nn.Linear(inner, dim, bias=proj_bias, device=device, dtype=dtype)

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
        u, gate = self.in_proj(x).chunk(2, -1)
        u = layout.place(u)
        y, state = self.scan(u, layout.lengths, state, self.exchange)
        if self.scan_reverse is not None:
            exchange = None if self.exchange is None else self.exchange.reversed
            back, _ = self.scan_reverse(layout.reverse(u), layout.lengths, None, exchange)
            y = y + layout.reverse(back)
        y = self.out_proj(layout.restore(y) * F.silu(gate))
        if mask is not None:
            y = y.masked_fill(~mask.unsqueeze(2), 0)
        return MixerOutput(y, state)

    def chunk_summary(self, x: Tensor, *, state: State | None = None) -> ChunkSummary:
        """See `Mixer.chunk_summary`."""
        if not self.causal:
            return super().chunk_summary(x)
        return self.scan.summary(self.in_proj(x).chunk(2, -1)[0], state)

    def init_state(
        self,
        batch_size: int,
        *,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> MambaState:
        """Zeros. max_len does not matter; h is float32, or float64 for that dtype."""
        if not self.causal:
            return super().init_state(batch_size)
        conv = self.scan.conv.init_state(batch_size, device=device, dtype=dtype)
        wide = torch.promote_types(conv.dtype, torch.float32)
        return MambaState(conv, conv.new_zeros(batch_size, self.inner, self.d_state, dtype=wide))

    def state_size(self, length: int) -> int:
        """E (N + d_conv - 1), whatever the length."""
        if not self.causal:
            return super().state_size(length)
        return self.inner * (self.d_state + self.scan.conv.kernel_size - 1)
