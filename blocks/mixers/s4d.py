"""S4D: the diagonal state space layer (arXiv:2206.11893, NeurIPS 2022)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from ...kernels.s4d_conv import INITS, discretize, initialize, s4d_conv
from ..layers.rows import packed_groups
from ..parameters import tag_parameter
from ..protocol import ChunkSummary, Mixer, MixerOutput, State
from ..registry import did_you_mean, register_mixer

_ACTIVATIONS = {"gelu": nn.GELU, "silu": nn.SiLU, "relu": nn.ReLU, "none": nn.Identity}
_BACKENDS = ("auto", "triton", "chunked", "fft", "naive")


class S4DState(NamedTuple):
    """x: real (B, D, d_state / 2, 2), the real and imaginary parts after the last token, fp32 or fp64."""

    x: Tensor


@register_mixer("s4d", paper="arXiv:2206.11893", cost="L D N", kernels=("s4d_conv",))
class S4D(Mixer):
    """y = output(drop(activation(K * u + D u))), a state space of its own in every channel.

    x' = A x + B u, y = 2 Re(C x) + D u with diagonal A, Re A = -exp(log_a_real), discretised with the learned
    step dt = rate * exp(log_dt). Causal: y_t = sum_{j <= t} K_{t-j} u_j. Bidirectional: a second kernel K'
    from a second C, y_t += sum_{j > t} K'_{j-t-1} u_j, so the centre tap counts once.

    d_state: N, even; N / 2 complex states, one of each conjugate pair. init: A at the start, "lin", "inv",
    "real" or "legs" (which also sets B). discretization: "zoh" or "bilinear". dt_min, dt_max: log dt starts
    uniform between their logarithms. train_b: learn B, which is otherwise fixed (B = 1 except for legs; C
    absorbs it).
    activation: "gelu", "silu", "relu" or "none". output: "glu", a linear map to 2 dim and a gated linear
    unit, "linear", or "none". drop: of whole channels, before the output map.
    rate: multiplies dt, for input sampled `rate` times more coarsely than in training.
    lr_max: cap of the learning rate of log_dt, A and B, which also get no weight decay; without it accuracy
        drops.
    backend: of `s4d_conv`. "chunked" (and "auto") is exactly causal and takes matrix products only; "fft" is
    the published way and equal up to its rounding.

    No input projection and no normalisation, as in the minimal published layer. Computed in fp32 under
    autocast. The state does not age at padded positions.
    """

    patterns = frozenset({"self", "causal"})
    streaming = True
    linear_state = True
    shared_patterns = patterns
    state_type = S4DState
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "causal": {"causal": True, "d_state": 8},
        "self": {"d_state": 8},
        "inv_bilinear": {"causal": True, "init": "inv", "discretization": "bilinear", "d_state": 4},
        "legs_train_b": {"init": "legs", "train_b": True, "dt_min": 0.01, "dt_max": 0.5, "d_state": 8},
        "legs_causal": {"causal": True, "init": "legs", "lr_max": 1e-4, "d_state": 6},
        "real_linear": {
            "causal": True,
            "init": "real",
            "output": "linear",
            "activation": "silu",
            "d_state": 4,
        },
        "fft": {"causal": True, "backend": "fft", "drop": 0.1, "d_state": 8},
        "fft_self": {"backend": "fft", "rate": 2.0, "activation": "none", "d_state": 8},
        "naive": {"causal": True, "backend": "naive", "activation": "relu", "train_b": True, "d_state": 4},
        "no_output": {"output": "none", "d_state": 4},
    }

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 64,
        init: Literal["lin", "inv", "real", "legs"] = "lin",
        discretization: Literal["zoh", "bilinear"] = "zoh",
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        train_b: bool = False,
        activation: Literal["gelu", "silu", "relu", "none"] = "gelu",
        output: Literal["glu", "linear", "none"] = "glu",
        drop: float = 0.0,
        causal: bool = False,
        cross: bool = False,
        rate: float = 1.0,
        lr_max: float | None = 1e-3,
        backend: Literal["auto", "triton", "chunked", "fft", "naive"] = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, causal=causal, cross=cross)
        if d_state < 2 or d_state % 2:
            raise ValueError(f"d_state={d_state!r} must be even and at least 2")
        for name, value, known in (
            ("init", init, INITS),
            ("discretization", discretization, ("zoh", "bilinear")),
            ("activation", activation, tuple(_ACTIVATIONS)),
            ("output", output, ("glu", "linear", "none")),
            ("backend", backend, _BACKENDS),
        ):
            if value not in known:
                raise ValueError(f"{name}={value!r} is unknown.{did_you_mean(value, known)}")
        if not 0 < dt_min <= dt_max:
            raise ValueError(f"dt_min={dt_min} and dt_max={dt_max} must satisfy 0 < dt_min <= dt_max")
        if not rate > 0:
            raise ValueError(f"rate={rate} must be positive")
        if lr_max is not None and not lr_max > 0:
            raise ValueError(f"lr_max={lr_max} must be positive, or None for no cap")
        self.d_state, self.discretization, self.rate, self.backend = d_state, discretization, rate, backend
        self.exact = backend != "fft"
        factory: dict[str, Any] = {"device": device, "dtype": dtype or torch.get_default_dtype()}
        a, b = initialize(init, d_state)
        rows = (dim, d_state // 2)

        low, high = math.log(dt_min), math.log(dt_max)
        self.log_dt = nn.Parameter((torch.rand(dim) * (high - low) + low).to(**factory))
        self.log_a_real = nn.Parameter(torch.log(-a.real).expand(rows).contiguous().to(**factory))
        self.a_imag = nn.Parameter(a.imag.expand(rows).contiguous().to(**factory))
        pair = torch.view_as_real(b)
        if train_b:
            self.b = nn.Parameter(pair.expand(*rows, 2).contiguous().to(**factory))
        else:
            self.register_buffer("b", pair.to(**factory))
        for name in ("log_dt", "log_a_real", "a_imag", *(("b",) if train_b else ())):
            tag_parameter(self, name, weight_decay=0.0, max_lr=lr_max)
        # Complex normal of variance 1, so 1/2 in each part. (1 or 2 kernels, D, N / 2, 2)
        self.c = nn.Parameter(torch.randn(1 if causal else 2, *rows, 2, **factory) * 0.5**0.5)
        self.d = nn.Parameter(torch.randn(dim, **factory))
        self.activation = _ACTIVATIONS[activation]()
        self.drop = nn.Dropout1d(drop)
        self.out_proj = (
            nn.Identity() if output == "none" else nn.Linear(dim, 2 * dim if output == "glu" else dim, **factory)
        )
        self.gate = nn.GLU(-1) if output == "glu" else nn.Identity()

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
        self.check_inputs(
            x, context, mask=mask, context_mask=context_mask, cu_seqlens=cu_seqlens, grid=grid, state=state
        )
        index = lengths = None  # where the tokens of each row lie in x, real ones first
        if cu_seqlens is not None:
            index, valid = next(packed_groups(cu_seqlens, x.shape[1], together=True))
            lengths = valid.sum(1)
            u = x[0, index]
        elif mask is not None:
            index, lengths = mask.logical_not().to(torch.uint8).sort(dim=1, stable=True).indices, mask.sum(1)
            u = x.gather(1, index.unsqueeze(2).expand_as(x))
        else:
            u = x
        y, last = self._convolve(u, lengths, state)
        # Whole channels of a sequence are dropped, hence (B, D, L) and before the rows are packed again.
        y = self.drop(self.activation(y).transpose(1, 2)).transpose(1, 2)
        if lengths is not None:
            real = torch.arange(y.shape[1], device=y.device) < lengths.unsqueeze(1)
            if mask is None:
                y = y[real].unsqueeze(0)
            else:
                place = (mask.cumsum(1) - 1).clamp(min=0)
                y = y.gather(1, place.unsqueeze(2).expand_as(y))
        y = self.gate(self.out_proj(y))
        if mask is not None:
            y = y.masked_fill(~mask.unsqueeze(2), 0)
        return MixerOutput(y, None if last is None else S4DState(last))

    def _convolve(self, u: Tensor, lengths: Tensor | None, state: S4DState | None) -> tuple[Tensor, Tensor | None]:
        """The state space alone: (B, L, D) to (B, L, D), and the state after each row's last token."""
        if self.exchange is not None:
            return self._shared(u, state)
        log_a, b, c = self._discretized(u)
        return s4d_conv(
            u,
            log_a,
            b,
            c[0],
            skip=self.d,
            c_reverse=None if self.causal else c[1],
            lengths=lengths,
            state=None if state is None else state.x,
            output_state=state is not None,
            backend=self.backend,
        )

    def _discretized(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """log Abar and Bbar, complex (D, N / 2), and C, complex (1 or 2, D, N / 2)."""
        dtype = torch.promote_types(self.c.dtype, torch.float32)
        with torch.autocast(u.device.type, enabled=False):
            a = torch.complex(-torch.exp(self.log_a_real.to(dtype)), self.a_imag.to(dtype))
            b, c = (torch.view_as_complex(t.to(dtype).contiguous()) for t in (self.b, self.c))
            log_a, b = discretize(a, b, torch.exp(self.log_dt.to(dtype)) * self.rate, self.discretization)
        return log_a, b, c

    def _summary(self, u: Tensor, log_a: Tensor, b: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        """Abar^L, complex (D, N / 2), and the state that u leaves, real (B, D, N / 2, 2)."""
        _, own = s4d_conv(u, log_a, b, c[0], output_state=True, backend=self.backend)
        if own is None:
            raise RuntimeError(f"s4d_conv with backend={self.backend!r} returned no state")
        return torch.exp(log_a * u.shape[1]), own

    def _shared(self, u: Tensor, state: S4DState | None) -> tuple[Tensor, Tensor | None]:
        """As `_convolve`, u being one rank's part of the sequence."""
        if self.exchange is None:
            raise RuntimeError("S4D: no exchange is set")
        terms = log_a, b, c = self._discretized(u)
        decay, own = self._summary(u, *terms)
        start = None if state is None else [torch.view_as_complex(state.x.contiguous())]
        found, last = self.exchange.prefix([decay], [torch.view_as_complex(own)], start, return_last=state is not None)
        before = torch.view_as_real(found[0])
        y, _ = s4d_conv(u, log_a, b, c[0], skip=self.d, state=before, backend=self.backend)
        if self.causal:
            return y, None if last is None else torch.view_as_real(last[0])
        # The kernel from the end starts with the token after: one step behind that of the flipped sequence.
        turned = u.flip(1)
        decay, own = self._summary(turned, *terms)
        (behind,), _ = self.exchange.reversed.prefix([decay], [torch.view_as_complex(own)])
        z, _ = s4d_conv(turned, log_a, b, c[1], state=torch.view_as_real(behind), backend=self.backend)
        first = 2 * (c[1] * behind).real.sum(-1).unsqueeze(1)
        return y + torch.cat((first.to(z.dtype), z[:, :-1]), 1).flip(1), None

    def chunk_summary(self, x: Tensor, *, state: State | None = None) -> ChunkSummary:
        """See `Mixer.chunk_summary`; the transition is complex."""
        if not self.causal:
            return super().chunk_summary(x)
        decay, own = self._summary(x, *self._discretized(x))
        return ChunkSummary(S4DState(decay), S4DState(own))

    def init_state(
        self,
        batch_size: int,
        *,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> S4DState:
        if not self.causal:
            return super().init_state(batch_size)
        wide = torch.promote_types(dtype or self.c.dtype, torch.float32)
        shape = (batch_size, self.dim, self.d_state // 2, 2)
        return S4DState(torch.zeros(shape, device=device or self.c.device, dtype=wide))

    def state_size(self, length: int) -> int:
        return self.dim * self.d_state if self.causal else super().state_size(length)
