"""The short causal convolution over time that state space and gated layers put before their scan."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ...kernels.short_conv import short_conv
from ..protocol import Exchange
from ..registry import did_you_mean
from .rows import take

_ACTIVATIONS = ("silu",)


class ShortConv(nn.Module):
    """Depthwise causal convolution: y_t = act(bias + sum_k weight_k x_{t - kernel_size + 1 + k}), per channel.

    channels: C. kernel_size: taps. bias: add one. activation: "silu" or None. The weight has the shape
    (C, 1, kernel_size) and the start of `nn.Conv1d`, so published ones load as they are.

    Rows hold their real tokens first (`rows.lay_out`). Computed by `kernels.short_conv`, in float32 (float64 for
    float64). Raises ValueError for sizes below 1 and an unknown activation.
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        bias: bool = True,
        activation: str | None = "silu",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("channels", channels), ("kernel_size", kernel_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if activation is not None and activation not in _ACTIVATIONS:
            raise ValueError(f"activation={activation!r} is unknown.{did_you_mean(activation, _ACTIVATIONS)}")
        self.channels, self.kernel_size, self.activation = channels, kernel_size, activation
        self.weight = nn.Parameter(torch.empty(channels, 1, kernel_size, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.empty(channels, device=device, dtype=dtype)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = 1 / math.sqrt(self.kernel_size)
        nn.init.uniform_(self.weight, -bound, bound)
        if self.bias is not None:
            nn.init.uniform_(self.bias, -bound, bound)

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        state: Tensor | None = None,
        return_state: bool = False,
        exchange: Exchange | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """x: (R, M, C). lengths: int64 (R,), real tokens of each row, None when all are. state: (R, kernel_size - 1,
        C), the inputs before the first. exchange: of a mixer whose sequence is split over ranks; the inputs before own
        first come from the rank before, state and what is returned are those of the whole sequence.
        Returns y (R, M, C), arbitrary beyond a row's tokens, and with return_state the last kernel_size - 1 inputs of
        each row, else None. Raises ValueError for shapes outside these."""
        length, past = x.shape[1], self.kernel_size - 1
        if x.dim() != 3 or x.shape[2] != self.channels:
            raise ValueError(f"ShortConv: x has shape {tuple(x.shape)}, expected (R, M, {self.channels})")
        if state is not None and state.shape != (x.shape[0], past, self.channels):
            expected = (x.shape[0], past, self.channels)
            raise ValueError(f"ShortConv: state has shape {tuple(state.shape)}, expected {expected}")
        if exchange is not None and past:
            following = exchange.last(x, past, state) if return_state else None
            state = exchange.around(x, past, initial=state)[:, :past]
            y, _ = self(x, state=state)
            return y, following
        y = short_conv(x, self.weight[:, 0], bias=self.bias, silu=self.activation == "silu", initial_state=state)
        if not return_state:
            return y, None
        before = self.init_state(x.shape[0], device=x.device, dtype=x.dtype) if state is None else state
        if lengths is None:
            tail = x[:, max(0, length - past) :].to(before.dtype)
            return y, torch.cat((before[:, length:], tail), 1)
        place = lengths.unsqueeze(1) + torch.arange(past, device=x.device)
        return y, take(torch.cat((before, x.to(before.dtype)), 1), place)

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """Zeros (B, kernel_size - 1, C): no inputs yet."""
        shape = batch_size, self.kernel_size - 1, self.channels
        return torch.zeros(shape, device=device or self.weight.device, dtype=dtype or self.weight.dtype)

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, activation={self.activation}"
