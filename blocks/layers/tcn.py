"""A temporal convolutional network: residual blocks of dilated convolutions (arXiv:1803.01271)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.dilated_conv import dilated_conv
from ..protocol import Exchange
from ..registry import did_you_mean
from .projections import check_divides

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "none": lambda x: x,
}


class DilatedConv(nn.Module):
    """`kernels.dilated_conv` with its parameters: weight (C, C / groups, kernel_size) and bias, as `nn.Conv1d` starts.

    weight_norm: the kernel of an output channel is gain * weight / |weight| (arXiv:1602.07868), gain starting at
    |weight|. pointwise: a linear map of the channels after it (a depthwise-separable convolution).
    """

    def __init__(
        self,
        channels: int,
        kernel_size: int,
        *,
        dilation: int,
        groups: int,
        causal: bool,
        weight_norm: bool,
        pointwise: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dilation, self.causal = dilation, causal
        bound = 1 / math.sqrt(kernel_size * channels // groups)
        self.weight = nn.Parameter(torch.empty(channels, channels // groups, kernel_size, **where))
        self.bias = nn.Parameter(torch.empty(channels, **where))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)
        self.gain = nn.Parameter(self.weight.detach().flatten(1).norm(dim=1)) if weight_norm else None
        self.pointwise = nn.Linear(channels, channels, **where) if pointwise else None

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None,
        tail: Tensor | None,
        return_tail: bool,
        exchange: Exchange | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        if exchange is not None and self.past:
            return self._shared(x, tail, return_tail, exchange)
        weight = self.weight
        if self.gain is not None:
            weight = weight * (self.gain / weight.flatten(1).norm(dim=1)).view(-1, 1, 1)
        y, last = dilated_conv(
            x,
            weight,
            self.bias,
            dilation=self.dilation,
            causal=self.causal,
            lengths=lengths,
            tail=tail,
            return_tail=return_tail,
        )
        return y if self.pointwise is None else self.pointwise(y), last

    def _shared(
        self, x: Tensor, tail: Tensor | None, return_tail: bool, exchange: Exchange
    ) -> tuple[Tensor, Tensor | None]:
        """x: one rank's part of the sequence; what the taps read beyond it comes from the ranks that have it."""
        alone: dict[str, Any] = {"lengths": None, "return_tail": False}
        if not self.causal:
            reach = self.past // 2
            y, _ = self(exchange.around(x, reach, reach), tail=None, **alone)
            return y[:, reach : reach + x.shape[1]], None
        last = exchange.last(x, self.past, tail) if return_tail else None
        y, _ = self(x, tail=exchange.around(x, self.past, initial=tail)[:, : self.past], **alone)
        return y, last

    @property
    def past(self) -> int:
        """Inputs before the current one that the convolution reads."""
        return (self.weight.shape[2] - 1) * self.dilation

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, kernel_size={self.weight.shape[2]}, dilation={self.dilation}"


class TemporalConvNet(nn.Module):
    """x <- x + drop(act(conv(x))), conv and what follows num_convs times, in blocks of dilation factor^i.

    dim: channels. depth: blocks, i = 0 .. depth - 1. kernel_size: taps, odd unless causal. dilation_factor: of one
    block over the one before. groups: of the convolutions, None for depthwise ones. Ours, for want of public code:
    activation "silu", "gelu", "relu" or "none"; the options of `DilatedConv`.
    With a dilation factor above kernel_size some inputs within the receptive field are never read.
    """

    def __init__(
        self,
        dim: int,
        *,
        depth: int,
        kernel_size: int,
        dilation_factor: int,
        num_convs: int = 1,
        groups: int | None = None,
        causal: bool = False,
        pointwise: bool = False,
        weight_norm: bool = False,
        activation: str = "silu",
        drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("tcn_depth", depth),
            ("kernel_size", kernel_size),
            ("dilation_factor", dilation_factor),
            ("num_convs", num_convs),
            ("groups", 1 if groups is None else groups),
        ):
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if not causal and kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size} must be odd unless causal; nearest: {kernel_size + 1}")
        groups = dim if groups is None else groups
        check_divides("groups", groups, dim, "dim")
        if activation not in _ACTIVATIONS:
            raise ValueError(f"tcn_activation={activation!r} is unknown.{did_you_mean(activation, _ACTIVATIONS)}")
        self.dim, self.num_convs, self.activation = dim, num_convs, activation
        self.convs = nn.ModuleList(
            DilatedConv(
                dim,
                kernel_size,
                dilation=dilation_factor**i,
                groups=groups,
                causal=causal,
                weight_norm=weight_norm,
                pointwise=pointwise,
                device=device,
                dtype=dtype,
            )
            for i in range(depth)
            for _ in range(num_convs)
        )
        self.drop = nn.Dropout(drop)

    @property
    def receptive_field(self) -> int:
        """Inputs from the first to the last that an output reads, R = 1 + num_convs (K - 1) sum_i factor^i."""
        return 1 + sum(conv.past for conv in self._convs())

    def forward(
        self,
        x: Tensor,
        *,
        lengths: Tensor | None = None,
        state: tuple[Tensor, ...] | None = None,
        return_state: bool = False,
        exchange: Exchange | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...] | None]:
        """x: (R, M, D), real tokens first. state: the inputs before the first of every convolution, (R, past, D) each.
        exchange: of a mixer whose sequence is split over ranks. Returns y, arbitrary beyond a row's tokens, and the
        next state or None."""
        act = _ACTIVATIONS[self.activation]
        tails: list[Tensor] = []
        branch = x
        for i, conv in enumerate(self._convs()):
            if i % self.num_convs == 0:
                branch = x
            tail = None if state is None else state[i]
            branch, last = conv(branch, lengths=lengths, tail=tail, return_tail=return_state, exchange=exchange)
            branch = self.drop(act(branch))
            if last is not None:
                tails.append(last)
            if (i + 1) % self.num_convs == 0:
                x = x + branch
        return x, tuple(tails) if return_state else None

    def init_state(
        self, batch_size: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> tuple[Tensor, ...]:
        weight = self._convs()[0].weight
        where: dict[str, Any] = {"device": device or weight.device, "dtype": dtype or weight.dtype}
        return tuple(torch.zeros(batch_size, conv.past, self.dim, **where) for conv in self._convs())

    def state_size(self) -> int:
        return self.dim * (self.receptive_field - 1)

    def _convs(self) -> list[DilatedConv]:
        return [conv for conv in self.convs if isinstance(conv, DilatedConv)]
