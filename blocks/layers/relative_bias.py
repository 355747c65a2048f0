"""Biases of attention scores that depend on the offset j - i of key and query alone, as MEGA has them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..registry import did_you_mean
from .positions import rotary_angles


class RelativeBias(nn.Module):
    """A value for every offset j - i; a subclass defines `table`."""

    def table(self, before: int, after: int) -> Tensor:
        """Values of the offsets -(before - 1) .. after - 1, (before + after - 1,)."""
        raise NotImplementedError(f"{type(self).__name__} must define table")

    def forward(self, rows: int, columns: int) -> Tensor:
        """(rows, columns) for the queries 0 .. rows - 1 and the keys 0 .. columns - 1."""
        return self.table(rows, columns).unfold(0, columns, 1).flip(0)


class SimpleRelativeBias(RelativeBias):
    """A learned number per offset (arXiv:2209.10655, appendix C), N(0, 0.02) at the start.

    max_len: offsets below it have a number. `table` raises ValueError beyond.
    """

    def __init__(
        self, max_len: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if max_len < 1:
            raise ValueError(f"max_len={max_len} must be at least 1")
        self.max_len = max_len
        self.weight = nn.Parameter(torch.empty(2 * max_len - 1, device=device, dtype=dtype))
        nn.init.normal_(self.weight, std=0.02)

    def table(self, before: int, after: int) -> Tensor:
        if max(before, after) > self.max_len:
            raise ValueError(
                f"{max(before, after)} positions exceed max_len={self.max_len} of the relative bias; give a larger "
                "max_len, a chunk_size or relative_bias='rotary'"
            )
        return self.weight[self.max_len - before : self.max_len + after - 1]

    def extra_repr(self) -> str:
        return f"max_len={self.max_len}"


class RotaryRelativeBias(RelativeBias):
    """<R_i a, R_j b> with learned vectors a, b and the rotations R of arXiv:2104.09864 (halves paired, base 10000).

    R_i^T R_j = R_{j-i}, so it is sum_k (a1 b1 + a2 b2)_k cos(w_k (j - i)) + (a2 b1 - a1 b2)_k sin(w_k (j - i)).
    dim: of a and b, even. N(0, 0.02) at the start.
    """

    def __init__(self, dim: int, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        if dim < 2 or dim % 2:
            raise ValueError(f"relative_bias='rotary' needs an even width, got {dim}; nearest: {max(2, dim // 2 * 2)}")
        self.dim = dim
        self.a = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        self.b = nn.Parameter(torch.empty(dim, device=device, dtype=dtype))
        nn.init.normal_(self.a, std=0.02)
        nn.init.normal_(self.b, std=0.02)

    def table(self, before: int, after: int) -> Tensor:
        wide = torch.promote_types(self.a.dtype, torch.float32)
        with torch.autocast(self.a.device.type, enabled=False):
            a1, a2 = self.a.to(wide).chunk(2)
            b1, b2 = self.b.to(wide).chunk(2)
            offset = torch.arange(1 - before, after, device=self.a.device)
            angle = rotary_angles(offset, self.dim, self.dim, 10000.0, wide)
            return angle.cos() @ (a1 * b1 + a2 * b2) + angle.sin() @ (a2 * b1 - a1 * b2)

    def extra_repr(self) -> str:
        return f"{self.dim}"


def create_relative_bias(
    name: str,
    *,
    max_len: int,
    dim: int,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
) -> RelativeBias:
    """By name: "simple" has numbers for max_len offsets, "rotary" vectors of width dim. Raises ValueError."""
    if name == "simple":
        return SimpleRelativeBias(max_len, device=device, dtype=dtype)
    if name == "rotary":
        return RotaryRelativeBias(dim, device=device, dtype=dtype)
    raise ValueError(f"relative_bias={name!r} is unknown.{did_you_mean(name, ('simple', 'rotary'))}")
