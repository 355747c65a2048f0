"""MEGA's moving average as a layer, for the mixers that attend to smoothed tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.dispatch import choose_backend
from ...kernels.ema import Coefficients, EmaState, ema, ema_coefficients, initialize_ema

_NAMES = ("delta", "alpha", "beta", "gamma")


class DampedEMA(nn.Module):
    """silu(EMA(x) + omega x), N damped moving averages per channel (arXiv:2209.10655, section 3.1).

    dim: channels. d_state: N. bidirectional: a second average from the end, the input of a token counting in both.
    truncation: taps of the kernels, None for all. backend: of `kernels.ema`.
    delta, alpha, beta, gamma are (directions, dim, N), omega (dim,), and start as published. The published training
    gives them the learning rate and weight decay of every other matrix, so they carry no tag.
    """

    delta: nn.Parameter
    alpha: nn.Parameter
    beta: nn.Parameter
    gamma: nn.Parameter

    def __init__(
        self,
        dim: int,
        *,
        d_state: int = 16,
        bidirectional: bool = False,
        truncation: int | None = None,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if d_state < 1:
            raise ValueError(f"d_state={d_state} must be at least 1")
        if truncation is not None and truncation < 1:
            raise ValueError(f"truncation={truncation} must be at least 1, or None for the whole kernel")
        if backend != "auto":
            choose_backend("ema", backend)  # a wrong name fails here, not in the first batch
        self.dim, self.d_state, self.truncation, self.backend = dim, d_state, truncation, backend
        directions = 2 if bidirectional else 1
        for name, start in zip(_NAMES, initialize_ema(directions * dim, d_state), strict=True):
            start = start.unflatten(0, (directions, dim))
            setattr(self, name, nn.Parameter(start.to(device=device, dtype=dtype or torch.get_default_dtype())))
        self.omega = nn.Parameter(torch.randn(dim, device=device, dtype=dtype))

    def coefficients(self, direction: int) -> Coefficients:
        return Coefficients(*ema_coefficients(*(getattr(self, name)[direction] for name in _NAMES)))

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        state: EmaState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, EmaState | None]:
        """x: (R, M, D), rows with their `lengths` (R,) real tokens first. Returns y, arbitrary beyond them, and the
        state after each row's last token or None."""
        y, last = ema(
            x,
            self.coefficients(0),
            self.coefficients(1) if self.delta.shape[0] == 2 else None,
            skip=self.omega,
            truncation=self.truncation,
            lengths=lengths,
            initial_state=state,
            return_state=return_state,
            backend=self.backend,  # type: ignore[arg-type]
        )
        return F.silu(y), last

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> EmaState:
        """Zeros: no input yet. fp64 for float64, else fp32."""
        h = torch.zeros(
            (batch_size, self.dim, self.d_state),
            device=device or self.omega.device,
            dtype=torch.promote_types(dtype or self.omega.dtype, torch.float32),
        )
        return EmaState(h, None if self.truncation is None else h.new_zeros(batch_size, self.truncation, self.dim))

    def state_size(self) -> int:
        return self.dim * (self.d_state + (self.truncation or 0))

    def extra_repr(self) -> str:
        directions = "both" if self.delta.shape[0] == 2 else "causal"
        return f"{self.dim}, d_state={self.d_state}, {directions}, truncation={self.truncation}"
