"""Position schemes: what is added to embeddings, what rotates queries and keys, what is added to scores.

Every function takes explicit integer positions, so that packed rows, padding and streaming need no special
case. Letters: B batch, L length (queries), S source length (keys), H heads, K key width per head, D model
width.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..registry import did_you_mean


class LearnedPosition(nn.Module):
    """A learned vector per position (arXiv:1706.03762, section 3.5, as BERT and GPT-2 use it).

    dim: channels. max_len: number of positions. Initialised from N(0, 0.02^2). Negative positions (pads) read
    row 0.
    """

    def __init__(
        self,
        dim: int,
        max_len: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if max_len is None or max_len < 1:
            raise ValueError(f"max_len={max_len!r} must be a positive integer for learned positions")
        self.max_len = max_len
        self.table = nn.Embedding(max_len, dim, device=device, dtype=dtype)
        nn.init.normal_(self.table.weight, std=0.02)

    def forward(self, positions: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """positions: int64 (B, L). Returns (B, L, D). Raises ValueError for a position beyond the table."""
        # One row may hold many packed sequences, so its length says nothing. On an accelerator values have to be
        # fetched to be looked at: of several rows only the length is.
        last, single = positions.shape[-1] - 1, positions.shape[0] == 1
        if torch.compiler.is_compiling():
            last = -1 if single else last
        elif positions.numel() and (single or positions.device.type == "cpu"):
            last = int(positions.max())
        if last >= self.max_len:
            raise ValueError(f"position {last} is beyond max_len={self.max_len} of the learned positions")
        y = self.table(positions.clamp(min=0))
        return y if dtype is None else y.to(dtype)


class SinusoidalPosition(nn.Module):
    """Fixed sines and cosines (arXiv:1706.03762, section 3.5): channels 2i, 2i+1 = sin, cos(p / base^(2i/D)).

    dim: channels; with an odd number the last cosine is left out.
    """

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.dim, self.base = dim, base

    def forward(self, positions: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """positions: int64 (B, L). Returns (B, L, D) in dtype (default float32)."""
        dtype = dtype or torch.float32
        angle = rotary_angles(positions, 2 * ((self.dim + 1) // 2), self.dim, self.base, _wide(dtype))
        return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)[..., : self.dim].to(dtype)

    def extra_repr(self) -> str:
        return f"{self.dim}, base={self.base}"


POSITIONS = ("none", "learned", "sinusoidal")


def create_position(name: str | None, dim: int, max_len: int | None = None) -> nn.Module | None:
    """An additive position module, called with positions (B, L) for (B, L, D); None for "none" and None.

    max_len: rows of the table of "learned". Raises ValueError for an unknown name or a missing max_len.
    """
    if name is None or name == "none":
        return None
    if name == "sinusoidal":
        return SinusoidalPosition(dim)
    if name == "learned":
        if max_len is None:
            raise ValueError("position='learned' needs max_len, the number of positions of its table")
        return LearnedPosition(dim, max_len)
    raise ValueError(f"unknown position {name!r}.{did_you_mean(name, POSITIONS)}")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def rotary_angles(
    positions: Tensor,
    channels: int,
    dim: int,
    base: float,
    dtype: torch.dtype,
    scaling: Mapping[str, Any] | None = None,
) -> Tensor:
    """positions (..., L) times base^(-2i/dim), i = 0 .. channels/2 - 1: (..., L, channels/2) in dtype.

    From integer positions, because positions in bfloat16 stop being exact at 256. scaling: see `scale_frequencies`.
    """
    exponent = torch.arange(0, channels, 2, device=positions.device, dtype=dtype) / dim
    frequency = 1.0 / base**exponent
    if scaling is not None:
        frequency = scale_frequencies(frequency, scaling)
    return positions.to(dtype).unsqueeze(-1) * frequency


ROPE_SCALINGS: dict[str, dict[str, float]] = {
    "linear": {"factor": 1.0},
    "llama3": {"factor": 1.0, "low": 1.0, "high": 4.0, "length": 8192},
}


def scale_frequencies(frequency: Tensor, scaling: Mapping[str, Any]) -> Tensor:
    """Frequencies of rotary positions for texts that are longer than those of the training.

    scaling: {"kind": "linear", "factor"} divides all by the factor (positional interpolation, arXiv:2306.15595);
    {"kind": "llama3", "factor", "low", "high", "length"} (Llama 3.1, arXiv:2407.21783, section 3.4.2, and its code)
    those whose waves turn less than `low` times within `length` tokens, none that turn more than `high` times, and
    between f -> f ((1 - s) / factor + s), s = (turns - low) / (high - low).
    """
    given = {**ROPE_SCALINGS[scaling["kind"]], **scaling}
    if scaling["kind"] == "linear":
        return frequency / given["factor"]
    turns = given["length"] * frequency / (2 * math.pi)
    kept = ((turns - given["low"]) / (given["high"] - given["low"])).clamp(0, 1)
    return frequency * ((1 - kept) / given["factor"] + kept)


def check_rope_scaling(scaling: Mapping[str, Any] | None) -> None:
    """Raise ValueError unless `scaling` is None or what `scale_frequencies` takes, naming the nearest valid choice."""
    if scaling is None:
        return
    if not isinstance(scaling, Mapping) or scaling.get("kind") not in ROPE_SCALINGS:
        kind = scaling.get("kind") if isinstance(scaling, Mapping) else scaling
        raise ValueError(f"rope_scaling of the kind {kind!r} is unknown.{did_you_mean(str(kind), ROPE_SCALINGS)}")
    known = ROPE_SCALINGS[scaling["kind"]]
    for key, value in scaling.items():
        if key != "kind" and key not in known:
            raise ValueError(f"rope_scaling={dict(scaling)} has no use for {key!r}.{did_you_mean(key, known)}")
        if key != "kind" and (isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0):
            raise ValueError(f"rope_scaling has {key}={value!r}, which must be a positive number")
    given = {**known, **scaling}
    if "low" in given and not given["low"] < given["high"]:
        raise ValueError(f"rope_scaling has low={given['low']}, which must be below high={given['high']}")


def rope(
    x: Tensor,
    positions: Tensor,
    base: float = 10000.0,
    rotary_dim: int | None = None,
    interleaved: bool = False,
    scaling: Mapping[str, Any] | None = None,
) -> Tensor:
    """Rotary positions (arXiv:2104.09864, eq. 34): channel pair i turned by position * base^(-2i/rotary_dim).

    x: (B, L, H, K), queries or keys. positions: int64 (B, L) or (1, L). base: of the wavelengths. rotary_dim:
    the first channels that turn (default all K), even. interleaved: False pairs channel i with i +
    rotary_dim/2 (GPT-NeoX, Llama), True pairs 2i with 2i+1 (the paper, GPT-J); one is a fixed permutation of
    channels of the other. Angles and products are float32 (float64 for float64 x); the result has the dtype
    of x. scaling: see `scale_frequencies`. Raises ValueError for a rotary_dim that is odd or larger than K.
    """
    width = x.shape[-1]
    rotary_dim = width if rotary_dim is None else rotary_dim
    check_rotary_dim(rotary_dim, width)
    wide = _wide(x.dtype)
    angle = rotary_angles(positions, rotary_dim, rotary_dim, base, wide, scaling)
    angle = angle.unsqueeze(-2)  # (B, L, 1, rotary_dim/2)
    cos, sin = angle.cos(), angle.sin()
    turned, kept = x[..., :rotary_dim].to(wide), x[..., rotary_dim:]
    if interleaved:
        a, b = turned[..., 0::2], turned[..., 1::2]
        turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
    else:
        a, b = turned.chunk(2, -1)
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
    turned = turned.to(x.dtype)
    return turned if rotary_dim == width else torch.cat((turned, kept), -1)


def check_rotary_dim(rotary_dim: int, head_dim: int) -> None:
    """Raise ValueError unless rotary_dim is even and within 2 .. head_dim."""
    if rotary_dim % 2 or not 2 <= rotary_dim <= head_dim:
        nearest = max(2, min(rotary_dim, head_dim) // 2 * 2)
        raise ValueError(
            f"rotary_dim={rotary_dim} must be even and within 2 .. head_dim={head_dim}; nearest: {nearest}"
        )


def alibi_slopes(
    num_heads: int, *, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Slopes of ALiBi (arXiv:2108.12409): 2^(-8h/H), h = 1..H, for H a power of two. Returns (H,).

    For other H, as the authors' code: the slopes of the power of two P below H, then every other slope of 2P.
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2.0 ** (-8.0 * h / power) for h in range(1, power + 1)]
    slopes += [2.0 ** (-8.0 * h / (2 * power)) for h in range(1, 2 * power + 1, 2)][: num_heads - power]
    return torch.tensor(slopes, device=device, dtype=dtype)


def alibi_bias(
    q_positions: Tensor,
    k_positions: Tensor,
    num_heads: int,
    causal: bool,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """Score bias of ALiBi (arXiv:2108.12409): -slope_h * (i - j). Returns (B, H, L, S).

    q_positions: (B, L), k_positions: (B, S), int64; B may be 1. causal: keys ahead of the query, which the
    caller masks, get 0. Otherwise -slope_h * |i - j|, a convention that is not in the paper.
    """
    distance = q_positions.unsqueeze(-1) - k_positions.unsqueeze(-2)  # (B, L, S)
    distance = (distance.clamp(min=0) if causal else distance.abs()).unsqueeze(-3)
    wide = _wide(dtype)
    slopes = alibi_slopes(num_heads, device=distance.device, dtype=wide)
    return (-slopes.view(-1, 1, 1) * distance.to(wide)).to(dtype)


class T5RelativeBias(nn.Module):
    """Learned score bias per bucket of distances (arXiv:1910.10683, section 2.1).

    With E exact buckets and n the distance: bucket n below E, then E + floor(log(n/E) / log(max_distance/E) *
    (T - E)), at most T - 1, T the buckets of a direction. causal: one direction, T = num_buckets; otherwise
    half of the buckets for each sign. E = T/2. Deviation: T5 shares the table of the first layer with all;
    here every layer that has one owns it. The table (num_buckets, H) starts from N(0, 0.02^2). Raises
    ValueError for sizes that leave no bucket.
    """

    def __init__(
        self,
        num_heads: int,
        num_buckets: int = 32,
        max_distance: int = 128,
        causal: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        least = 2 if causal else 4
        if num_buckets < least or num_buckets % least:
            raise ValueError(f"num_buckets={num_buckets} must be a multiple of {least} with causal={causal}")
        if max_distance <= num_buckets // least:
            raise ValueError(
                f"max_distance={max_distance} must exceed the number of exact buckets, {num_buckets // least}"
            )
        self.num_buckets, self.max_distance, self.causal = num_buckets, max_distance, causal
        self.table = nn.Embedding(num_buckets, num_heads, device=device, dtype=dtype)
        nn.init.normal_(self.table.weight, std=0.02)

    def buckets(self, q_positions: Tensor, k_positions: Tensor) -> Tensor:
        """Bucket of every pair. q_positions: (B, L), k_positions: (B, S), int64. Returns int64 (B, L, S)."""
        ahead = k_positions.unsqueeze(-2) - q_positions.unsqueeze(-1)
        if self.causal:
            total, n = self.num_buckets, (-ahead).clamp(min=0)
            offset = torch.zeros_like(n)
        else:
            total, n = self.num_buckets // 2, ahead.abs()
            offset = (ahead > 0).long() * total
        exact = total // 2
        # Distances below `exact` never read the logarithm; the clamp keeps it finite for them.
        ratio = torch.log(n.clamp(min=exact).float() / exact) / math.log(self.max_distance / exact)
        far = (exact + (ratio * (total - exact)).long()).clamp(max=total - 1)
        return offset + torch.where(n < exact, n, far)

    def forward(self, q_positions: Tensor, k_positions: Tensor, *, dtype: torch.dtype | None = None) -> Tensor:
        """q_positions: (B, L), k_positions: (B, S), int64. Returns (B, H, L, S)."""
        bias = self.table(self.buckets(q_positions, k_positions)).movedim(-1, -3)
        return bias if dtype is None else bias.to(dtype)
