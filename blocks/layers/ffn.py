"""Feed-forward layers: the part of a block that works on each token alone."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..registry import did_you_mean
from .projections import reset_linear, reset_normal


def _hidden_width(dim: int, mlp_ratio: float, multiple_of: int) -> int:
    if not mlp_ratio > 0:
        raise ValueError(f"mlp_ratio={mlp_ratio!r} must be positive")
    if multiple_of < 1:
        raise ValueError(f"multiple_of={multiple_of!r} must be a positive integer")
    # Rounded down to a whole channel (as x-transformers and timm do), then up to the multiple (as Llama
    # does).
    hidden = int(dim * mlp_ratio + 1e-6)  # 1e-6: a ratio such as 8/3 must not lose a channel to its own rounding
    return max(1, math.ceil(hidden / multiple_of)) * multiple_of


class GeluMLP(nn.Module):
    """Two-layer perceptron (arXiv:1706.03762 with the GELU of arXiv:1606.08415): y = W2 gelu(W1 x + b1) + b2.

    dim: channels in and out. mlp_ratio: hidden channels per channel (dim * mlp_ratio, rounded down). drop:
    dropout after the activation and after the output. bias: on both layers. approximate: "none", the exact GELU
    (erf), or "tanh", as GPT-2 computes it. Weights are Xavier-uniform, biases zero. Raises ValueError for a ratio that
    is not positive and for another form of GELU.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 4.0,
        drop: float = 0.0,
        bias: bool = True,
        *,
        approximate: str = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if approximate not in ("none", "tanh"):
            raise ValueError(f"approximate={approximate!r} is unknown.{did_you_mean(approximate, ('none', 'tanh'))}")
        self.approximate = approximate
        hidden = _hidden_width(dim, mlp_ratio, 1)
        self.up_proj = nn.Linear(dim, hidden, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden, dim, bias=bias, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)
        reset_linear(self.up_proj, self.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down_proj(self.drop(F.gelu(self.up_proj(x), approximate=self.approximate))))


class SiluMLP(GeluMLP):
    """y = W2 silu(W1 x + b1) + b2, the feed-forward layer of MEGA (arXiv:2209.10655).

    Arguments as `GeluMLP`. hidden_drop: dropout after the activation, where it is not that of the output, `drop`.
    Weights are N(0, 0.02), biases zero.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 2.0,
        drop: float = 0.0,
        bias: bool = True,
        *,
        hidden_drop: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, mlp_ratio, drop, bias, device=device, dtype=dtype)
        self.hidden_drop = nn.Dropout(drop if hidden_drop is None else hidden_drop)
        reset_normal(self.up_proj, self.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down_proj(self.hidden_drop(F.silu(self.up_proj(x)))))


class SwiGLU(nn.Module):
    """Gated feed-forward (arXiv:2002.05202, eq. 6): y = W_down (silu(W_gate x) * W_up x).

    dim: channels in and out. mlp_ratio: hidden channels per channel; 8/3 has as many weights as GeluMLP at 4.
    multiple_of: the hidden width is rounded up to a multiple of it (256 in Llama). drop: dropout after the
    gate and after the output. bias: on the three layers. Weights are Xavier-uniform, biases zero. Raises
    ValueError for a ratio or a multiple that is not positive.
    """

    def __init__(
        self,
        dim: int,
        mlp_ratio: float = 8 / 3,
        multiple_of: int = 1,
        drop: float = 0.0,
        bias: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        hidden = _hidden_width(dim, mlp_ratio, multiple_of)
        self.gate_proj = nn.Linear(dim, hidden, bias=bias, device=device, dtype=dtype)
        self.up_proj = nn.Linear(dim, hidden, bias=bias, device=device, dtype=dtype)
        self.down_proj = nn.Linear(hidden, dim, bias=bias, device=device, dtype=dtype)
        self.drop = nn.Dropout(drop)
        reset_linear(self.gate_proj, self.up_proj, self.down_proj)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.down_proj(self.drop(self.gate(self.gate_proj(x)) * self.up_proj(x))))

    @staticmethod
    def gate(x: Tensor) -> Tensor:
        return F.silu(x)


class SGLU(SwiGLU):
    """Gated feed-forward without an activation, of TransNormerLLM (arXiv:2307.14995): y = W_down (W_gate x * W_up x).

    Arguments as `SwiGLU`.
    """

    @staticmethod
    def gate(x: Tensor) -> Tensor:
        return x


FFNS: dict[str, Callable[..., nn.Module]] = {"gelu": GeluMLP, "silu": SiluMLP, "swiglu": SwiGLU, "sglu": SGLU}
FFNChoice = str | dict[str, Any] | Callable[..., nn.Module] | None


def create_ffn(ffn: FFNChoice, dim: int, mlp_ratio: float | None = None, drop: float = 0.0) -> nn.Module | None:
    """Build a feed-forward layer of width `dim`; None for "none" and None, a block without one.

    ffn: a name of `FFNS`, `{"name": ..., **options}` ("bias", say), "none", None, or a class or factory called as
    `ffn(dim[, mlp_ratio=], drop=)`. mlp_ratio None keeps the default of the layer. Raises ValueError for an unknown
    name or option.
    """
    choice: Any = ffn
    options: dict[str, Any] = {}
    if isinstance(choice, dict):
        options = {key: value for key, value in choice.items() if key != "name"}
        if "name" not in choice:
            raise ValueError(f"a feed-forward layer given as a dict needs the key 'name', got {sorted(choice)}")
        choice = choice["name"]
    if choice is None or choice == "none":
        return None
    if isinstance(choice, str):
        if choice not in FFNS:
            raise ValueError(f"unknown feed-forward layer {choice!r}.{did_you_mean(choice, [*FFNS, 'none'])}")
        valid = set(inspect.signature(FFNS[choice]).parameters) - {"dim"}
        for key in options:
            if key not in valid:
                raise ValueError(f"feed-forward layer {choice!r} has no option {key!r}.{did_you_mean(key, valid)}")
        choice = FFNS[choice]
    ratio = {} if mlp_ratio is None else {"mlp_ratio": mlp_ratio}
    return choice(dim, **{"drop": drop, **ratio, **options})
