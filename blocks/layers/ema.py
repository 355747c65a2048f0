"""MEGA's moving average as a layer, for the mixers that attend to smoothed tokens."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.dispatch import choose_backend
from ...kernels.ema import Coefficients, EmaState, ema, ema_coefficients, initialize_ema
from ..protocol import Exchange

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
        exchange: Exchange | None = None,
    ) -> tuple[Tensor, EmaState | None]:
        """x: (R, M, D), rows with their `lengths` (R,) real tokens first. exchange: of a mixer whose sequence is split
        over ranks. Returns y, arbitrary beyond them, and the state after each row's last token or None."""
        if exchange is not None:
            y, last = self._shared(x, 0, state, return_state, exchange)
            if self.delta.shape[0] == 2:
                y = y + self._shared(x.flip(1), 1, None, False, exchange.reversed)[0].flip(1)
            return F.silu(y), last
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

    def _shared(
        self, x: Tensor, direction: int, state: EmaState | None, return_state: bool, exchange: Exchange
    ) -> tuple[Tensor, EmaState | None]:
        """One direction's average over the part x of a sequence, with omega x in the first; see forward."""
        taps, weights = self.truncation, self.coefficients(direction)
        following: EmaState | None = None
        if taps is None:
            _, own = self._run(x, weights, None)
            start = None if state is None else [state.h]
            decay = torch.exp(weights.log_q * x.shape[1])
            (h,), last = exchange.prefix([decay], [own.h], start, return_last=return_state)
            before = EmaState(h)
            following = None if last is None else EmaState(last[0])
        else:  # the last inputs say all
            tail = None if state is None else state.tail
            _, before = self._run(exchange.around(x, taps, initial=tail)[:, :taps], weights, None)
            if return_state:
                _, following = self._run(exchange.last(x, taps, tail), weights, None)
        return self._run(x, weights, before, self.omega if direction == 0 else None)[0], following

    def _run(
        self, x: Tensor, weights: Coefficients, state: EmaState | None, skip: Tensor | None = None
    ) -> tuple[Tensor, EmaState]:
        y, last = ema(
            x,
            weights,
            skip=skip,
            truncation=self.truncation,
            initial_state=state,
            return_state=True,
            backend=self.backend,  # type: ignore[arg-type]
        )
        if last is None:
            raise RuntimeError("ema returned no state")
        return y, last

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
