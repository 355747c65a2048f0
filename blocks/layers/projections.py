"""What the projections of a mixer have in common: the width of a head, the initial weights."""

from __future__ import annotations

from torch import nn


def reset_linear(*layers: nn.Linear) -> None:
    """Xavier-uniform weights, zero biases."""
    for layer in layers:
        nn.init.xavier_uniform_(layer.weight)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def reset_normal(*layers: nn.Linear, std: float = 0.02, truncated: bool = False) -> None:
    """Weights N(0, std), truncated to [-2, 2] if asked for (as timm does), zero biases."""
    start = nn.init.trunc_normal_ if truncated else nn.init.normal_
    for layer in layers:
        start(layer.weight, std=std)
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)


def check_divides(name: str, value: int, total: int, of: str) -> None:
    """Raises ValueError when `name`=value does not divide `of`=total, naming the nearest that does."""
    if total % value:
        nearest = min((n for n in range(1, total + 1) if total % n == 0), key=lambda n: abs(n - value))
        raise ValueError(f"{name}={value} does not divide {of}={total}; nearest that does: {nearest}")


def head_width(dim: int, num_heads: int, num_kv_heads: int, head_dim: int | None) -> int:
    """Channels of a head. Raises ValueError for heads that do not divide, naming the nearest that do."""
    for name, value in (("num_heads", num_heads), ("num_kv_heads", num_kv_heads), ("head_dim", head_dim)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be a positive integer")
    for name, value, total, of in (
        ("num_heads", num_heads, dim if head_dim is None else num_heads, "dim"),
        ("num_kv_heads", num_kv_heads, num_heads, "num_heads"),
    ):
        check_divides(name, value, total, of)
    return dim // num_heads if head_dim is None else head_dim
