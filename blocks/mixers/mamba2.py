"""Mamba-2: state space duality, SSD (arXiv:2405.21060): one decay per head, so that chunks are matrix products.

With E = expand dim channels in H heads of width P = head_dim, N = d_state, G groups of heads that share B and C
(sections 5 to 7, figure 6):

    (z, x, B, C, dt) = W_in u              (x, B, C) <- silu(conv(x, B, C)), depthwise and causal
    dt_t = softplus(dt_t + b_dt)           a_t = exp(dt_t A), A = -exp(a_log) < 0, a number per head
    h_t = a_t h_{t-1} + dt_t B_t x_t^T     y_t = h_t^T C_t + D x_t
    out = W_out RMSNorm(y silu(z))         the norm over each group's channels

The same as masked attention, y = (L * (C B^T)) (dt x) with L_ts = a_t ... a_{s+1}; `kernels.gated_linear_attention`
computes it, with q = C, k = B, v = dt x and the log decay dt A.

Ours: the pattern "self", which the paper does not have. A second scan runs over the reversed sequence and the two are
added before norm and gate: z, x, the norm and W_out are shared, while B, C and dt (their columns of W_in), the
convolution, b_dt, A and D are the direction's own (the sharing of Vim, arXiv:2401.09417).

Compared, with copied weights: in float32 transformers' Mamba2Mixer (outputs and gradients; its language model decoding
step by step), the largest relative difference 2e-6; in float64 the quadratic form above and mamba-ssm's minimal SSD
listing, 2e-14.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.dispatch import choose_backend
from ...kernels.gated_linear_attention import gated_chunk_summary, gated_linear_attention
from ..layers.conv import ShortConv
from ..layers.projections import check_divides
from ..layers.rows import lay_out, zero_pads
from ..layers.ssm import check_step_options, inner_width, step_bias
from ..parameters import tag_parameter
from ..protocol import ChunkSummary, Exchange, Mixer, MixerOutput, State
from ..registry import register_mixer


class Mamba2State(NamedTuple):
    """conv: (B, d_conv - 1, d_ssm + 2 G N), the last inputs of the convolution. h: (B, H, N, P), float32 or float64."""

    conv: Tensor
    h: Tensor


class _SSD(nn.Module):
    """Convolution and scan in one direction: x, B, C (R, M, ...) and dt (R, M, H) to y (R, M, H P)."""

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        num_groups: int,
        *,
        d_state: int,
        d_conv: int,
        a_min: float,
        a_max: float,
        d_has_hdim: bool,
        dt_min: float,
        dt_max: float,
        dt_init_floor: float,
        dt_limit: tuple[float, float | None],
        conv_bias: bool,
        conv_init: float | None,
        chunk_size: int | None,
        backend: str,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.num_groups, self.d_state = num_heads, head_dim, num_groups, d_state
        self.dt_limit, self.chunk_size, self.backend = dt_limit, chunk_size, backend
        channels = num_heads * head_dim
        self.conv = ShortConv(channels + 2 * num_groups * d_state, d_conv, bias=conv_bias, device=device, dtype=dtype)
        if conv_init is not None:
            nn.init.uniform_(self.conv.weight, -conv_init, conv_init)
        kind = dtype or torch.get_default_dtype()
        start = step_bias(num_heads, dt_min=dt_min, dt_max=dt_max, floor=dt_init_floor, device=device)
        self.dt_bias = nn.Parameter(start.to(kind))
        a = torch.empty(num_heads, device=device, dtype=torch.float32).uniform_(a_min, a_max)
        self.a_log = nn.Parameter(a.log().to(kind))
        self.d = nn.Parameter(torch.ones(channels if d_has_hdim else num_heads, device=device, dtype=dtype))
        for name in ("dt_bias", "a_log", "d"):
            tag_parameter(self, name, weight_decay=0.0)

    def forward(
        self,
        xbc: Tensor,
        dt: Tensor,
        lengths: Tensor | None,
        state: Mamba2State | None,
        exchange: Exchange | None = None,
    ) -> tuple[Tensor, Mamba2State | None]:
        carried = state is not None
        (x, b, c, dt, decay), tail = self._terms(xbc, dt, lengths, state, carried, exchange)
        v = x * dt.unsqueeze(-1)
        before, last = state.h if state else None, None
        if exchange is not None:
            factor, own = gated_chunk_summary(b, v, decay)
            (before,), last = exchange.prefix([factor], [own], [state.h] if state else None, return_last=carried)
        y, h = gated_linear_attention(
            c,
            b,
            v,
            decay,
            lengths=lengths,
            initial_state=before,
            return_state=carried and last is None,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        h = h if last is None else last[0]
        y = y + self.d.to(x.dtype).view(self.num_heads, -1) * x
        return y.flatten(2), None if tail is None or h is None else Mamba2State(tail, h)

    def summary(self, xbc: Tensor, dt: Tensor, state: Mamba2State | None) -> ChunkSummary:
        """See `Mixer.chunk_summary`; arguments as forward's."""
        (x, b, _, dt, decay), tail = self._terms(xbc, dt, None, state, True, None)
        factor, h = gated_chunk_summary(b, x * dt.unsqueeze(-1), decay)
        if tail is None:
            raise RuntimeError("the convolution returned no state")
        return ChunkSummary(Mamba2State(torch.zeros_like(tail), factor), Mamba2State(tail, h))

    def _terms(
        self,
        xbc: Tensor,
        dt: Tensor,
        lengths: Tensor | None,
        state: Mamba2State | None,
        return_tail: bool,
        exchange: Exchange | None,
    ) -> tuple[tuple[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor | None]:
        """x (R, M, H, P), B and C (R, M, G, N), dt and log decay (R, M, H), and the convolution's last inputs."""
        xbc, tail = self.conv(
            xbc, lengths=lengths, state=state.conv if state else None, return_state=return_tail, exchange=exchange
        )
        wide = torch.promote_types(dt.dtype, torch.float32)
        shared = self.num_groups * self.d_state
        x, b, c = xbc.to(wide).split([self.num_heads * self.head_dim, shared, shared], -1)
        x = x.unflatten(-1, (self.num_heads, self.head_dim))
        b, c = (t.unflatten(-1, (self.num_groups, self.d_state)) for t in (b, c))
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        low, high = self.dt_limit
        if low > 0 or high is not None:
            dt = dt.clamp(low, high)
        return (x, b, c, dt, dt * -torch.exp(self.a_log.to(wide))), tail


class _GatedRMSNorm(nn.Module):
    """RMSNorm over each group of channels, of y silu(z), or of y, then times silu(z) (norm_before_gate)."""

    def __init__(
        self,
        channels: int,
        num_groups: int,
        *,
        norm_before_gate: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.num_groups, self.norm_before_gate, self.eps = num_groups, norm_before_gate, eps
        self.weight = nn.Parameter(torch.ones(channels, device=device, dtype=dtype))

    def forward(self, y: Tensor, gate: Tensor) -> Tensor:
        """y: (B, L, E) in float32 or float64, gate: the same after its silu."""
        if not self.norm_before_gate:
            y = y * gate
        y = y.unflatten(-1, (self.num_groups, -1))
        y = F.rms_norm(y, y.shape[-1:], eps=self.eps).flatten(-2) * self.weight.to(y.dtype)
        return y * gate if self.norm_before_gate else y


@register_mixer(
    "mamba2",
    paper="arXiv:2405.21060",
    cost="L E (C + N)",
    kernels=("gated_linear_attention", "short_conv"),
    ours=("self",),
)
class Mamba2(Mixer):
    """The Mamba-2 layer: state space duality behind a short convolution, gated and normalised.

    dim: model width D. d_state: N. d_conv: taps of the convolution. expand: E / dim. head_dim: P. num_groups: G,
    groups of heads that share B and C. d_ssm: channels of the scan, None for all E; the others become a gated unit,
    silu(z0) * x0.
    a_min, a_max: -A starts uniform between them. d_has_hdim: D per channel instead of per head. dt_min, dt_max: the
    time step starts log-uniform between them, but not below dt_init_floor; it is always clamped to dt_limit_low and
    dt_limit_high (None: no limit).
    rmsnorm: the norm before W_out, for the gate comes first unless norm_before_gate. conv_init: the convolution starts
    uniform within this bound, None for the usual one. conv_bias, proj_bias: biases of the convolution; of the
    projections in and out.
    chunk_size: tokens per step of the scan, None for what suits the sizes (256 in the paper); it changes the speed
    only. backend: of `kernels.gated_linear_attention`.

    dt_bias, a_log and d get no weight decay. The state is a `Mamba2State`, of constant size. Scan, time steps and
    norm are computed in float32 (float64), under autocast too. Raises ValueError for values outside these.
    """

    patterns = frozenset({"self", "causal"})
    streaming = True
    linear_state = True
    shared_patterns = patterns
    state_type = Mamba2State
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "causal": {"causal": True, "d_state": 5, "head_dim": 8, "chunk_size": 4},
        "self": {"d_state": 3, "head_dim": 16, "num_groups": 2, "chunk_size": 8},
        "groups": {
            "causal": True,
            "d_state": 4,
            "head_dim": 8,
            "num_groups": 2,
            "norm_before_gate": True,
            "d_has_hdim": True,
            "d_conv": 3,
            "conv_bias": False,
            "proj_bias": True,
        },
        "steps": {
            "causal": True,
            "d_state": 4,
            "head_dim": 16,
            "rmsnorm": False,
            "dt_min": 0.01,
            "dt_max": 0.5,
            "dt_init_floor": 0.02,
            "dt_limit_low": 0.05,
            "dt_limit_high": 2.0,
            "a_min": 0.5,
            "a_max": 2.0,
            "conv_init": 0.3,
        },
        "d_ssm": {"causal": True, "d_state": 3, "head_dim": 8, "d_ssm": 16, "expand": 1.5},
        "naive": {"causal": True, "d_state": 3, "head_dim": 8, "expand": 1, "backend": "naive"},
    }

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 128,
        d_conv: int = 4,
        expand: float = 2.0,
        head_dim: int = 64,
        num_groups: int = 1,
        d_ssm: int | None = None,
        causal: bool = False,
        cross: bool = False,
        a_min: float = 1.0,
        a_max: float = 16.0,
        d_has_hdim: bool = False,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        dt_limit_low: float = 0.0,
        dt_limit_high: float | None = None,
        rmsnorm: bool = True,
        norm_before_gate: bool = False,
        conv_init: float | None = None,
        conv_bias: bool = True,
        proj_bias: bool = False,
        chunk_size: int | None = None,
        backend: Literal["auto", "triton", "chunked", "naive"] = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, causal=causal, cross=cross)
        inner = inner_width(dim, expand)
        width = inner if d_ssm is None else d_ssm
        for name, value in (
            ("d_state", d_state),
            ("d_conv", d_conv),
            ("head_dim", head_dim),
            ("num_groups", num_groups),
            ("d_ssm", width),
        ):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if width > inner:
            raise ValueError(f"d_ssm={d_ssm} is more than the {inner} inner channels")
        check_divides("head_dim", head_dim, width, "int(expand * dim)" if d_ssm is None else "d_ssm")
        heads = width // head_dim
        check_divides("num_groups", num_groups, heads, "the number of heads")
        if not 0 < a_min <= a_max:
            raise ValueError(f"a_min={a_min} and a_max={a_max} must satisfy 0 < a_min <= a_max")
        if dt_limit_low < 0 or (dt_limit_high is not None and not dt_limit_low < dt_limit_high):
            raise ValueError(f"dt_limit_low={dt_limit_low} must be at least 0 and below dt_limit_high={dt_limit_high}")
        check_step_options(dt_min, dt_max, dt_init_floor)
        if conv_init is not None and not conv_init > 0:
            raise ValueError(f"conv_init={conv_init} must be positive, or None")
        if chunk_size is not None and (chunk_size < 1 or chunk_size & (chunk_size - 1)):
            raise ValueError(f"chunk_size={chunk_size} must be a power of two, or None")
        if norm_before_gate and not rmsnorm:
            raise ValueError("norm_before_gate=True needs rmsnorm=True")
        if backend != "auto":
            choose_backend("gated_linear_attention", backend)  # a wrong name fails here, not in the first batch
        options: dict[str, Any] = {
            "d_state": d_state,
            "d_conv": d_conv,
            "a_min": a_min,
            "a_max": a_max,
            "d_has_hdim": d_has_hdim,
            "dt_min": dt_min,
            "dt_max": dt_max,
            "dt_init_floor": dt_init_floor,
            "dt_limit": (dt_limit_low, dt_limit_high),
            "conv_bias": conv_bias,
            "conv_init": conv_init,
            "chunk_size": chunk_size,
            "backend": backend,
        }
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        shared = 2 * num_groups * d_state + heads  # B, C and dt
        # The columns of W_in: z0 and x0 of the gated unit, z, x, B, C, dt.
        self.widths = [inner - width, inner - width, width, width + shared]
        self.in_proj = nn.Linear(dim, sum(self.widths), bias=proj_bias, **factory)
        self.scan = _SSD(heads, head_dim, num_groups, **options, **factory)
        self.in_proj_reverse, self.scan_reverse = None, None
        if not causal:
            self.in_proj_reverse = nn.Linear(dim, shared, bias=proj_bias, **factory)
            self.scan_reverse = _SSD(heads, head_dim, num_groups, **options, **factory)
        self.norm = None
        if rmsnorm:
            self.norm = _GatedRMSNorm(width, num_groups, norm_before_gate=norm_before_gate, **factory)
        self.out_proj = nn.Linear(inner, dim, bias=proj_bias, **factory)

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
        z0, x0, gate, inputs = self.in_proj(x).split(self.widths, -1)
        heads = self.scan.num_heads
        xbc, dt = layout.place(inputs).split([inputs.shape[-1] - heads, heads], -1)
        y, state = self.scan(xbc, dt, layout.lengths, state, self.exchange)
        if self.in_proj_reverse is not None and self.scan_reverse is not None:
            own = torch.cat((inputs[..., : gate.shape[-1]], self.in_proj_reverse(x)), -1)
            xbc, dt = layout.reverse(layout.place(own)).split([inputs.shape[-1] - heads, heads], -1)
            exchange = None if self.exchange is None else self.exchange.reversed
            back, _ = self.scan_reverse(xbc, dt, layout.lengths, None, exchange)
            y = y + layout.reverse(back)
        y = layout.restore(y)
        gate = F.silu(gate.to(y.dtype))
        y = (y * gate if self.norm is None else self.norm(y, gate)).to(inputs.dtype)
        if self.widths[0]:
            y = torch.cat((F.silu(z0) * x0, y), -1)
        y = self.out_proj(y)
        if mask is not None:
            y = y.masked_fill(~mask.unsqueeze(2), 0)
        return MixerOutput(y, state)

    def chunk_summary(self, x: Tensor, *, state: State | None = None) -> ChunkSummary:
        """See `Mixer.chunk_summary`."""
        if not self.causal:
            return super().chunk_summary(x)
        inputs = self.in_proj(x).split(self.widths, -1)[3]
        heads = self.scan.num_heads
        xbc, dt = inputs.split([inputs.shape[-1] - heads, heads], -1)
        return self.scan.summary(xbc, dt, state)

    def init_state(
        self,
        batch_size: int,
        *,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> Mamba2State:
        """Zeros. max_len does not matter; h is float32, or float64 for that dtype."""
        if not self.causal:
            return super().init_state(batch_size)
        conv = self.scan.conv.init_state(batch_size, device=device, dtype=dtype)
        shape = batch_size, self.scan.num_heads, self.scan.d_state, self.scan.head_dim
        return Mamba2State(conv, conv.new_zeros(shape, dtype=torch.promote_types(conv.dtype, torch.float32)))

    def state_size(self, length: int) -> int:
        """H P N + (d_conv - 1) (H P + 2 G N), whatever the length."""
        if not self.causal:
            return super().state_size(length)
        scan = self.scan
        return scan.num_heads * scan.head_dim * scan.d_state + (scan.conv.kernel_size - 1) * scan.conv.channels
