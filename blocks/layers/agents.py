"""Agents pooled from tokens, and the bias tables that tell each agent where tokens stand.

Tokens stand on `height` rows of the same width, or on one row per sequence, of its own length. R rows of the batch,
D channels, H heads, M agents.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..parameters import tag_parameter


def bins(length: Tensor, width: int, count: int) -> Tensor:
    """Which places each bin of adaptive average pooling holds: length int64 (R,) to bool (R, count, width).

    Bin i holds the places from floor(i length / count) to ceil((i + 1) length / count), as `nn.AdaptiveAvgPool1d`.
    """
    edge = torch.arange(count + 1, device=length.device)
    first = edge[:-1] * length.unsqueeze(1) // count
    end = -(-edge[1:] * length.unsqueeze(1) // count)
    place = torch.arange(width, device=length.device)
    return (place >= first.unsqueeze(2)) & (place < end.unsqueeze(2))


def interpolation(length: Tensor, width: int, size: int, dtype: torch.dtype) -> Tensor:
    """Weights (R, width, size) that stretch a table of `size` entries over `length` (R,) places.

    As `F.interpolate(mode="linear", align_corners=False)`, so the identity where both are equal.
    """
    place = torch.arange(width, device=length.device, dtype=dtype) + 0.5
    at = place * size / length.clamp(min=1).to(dtype).unsqueeze(1) - 0.5
    entry = torch.arange(size, device=length.device, dtype=dtype)
    return (1 - (at.clamp(0, size - 1).unsqueeze(2) - entry).abs()).clamp(min=0)


def pool_agents(
    x: Tensor, shape: tuple[int, int], *, height: int = 1, lengths: Tensor | None = None, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Means of x over the bins of a grid of agents: (R, height * width, D) to (R, M, D), and bool (R or 1, M).

    shape: agents along the height and the width, M their product. lengths: int64 (R,), the width of each row, None
    when full. mask: bool (R, height * width), tokens that count. A bin without one gives zeros and False.
    Summed in float32 (float64 for float64 input).
    """
    wide, (down, across) = torch.promote_types(x.dtype, torch.float32), shape
    width = x.shape[1] // height
    with torch.autocast(x.device.type, enabled=False):
        full = torch.full((1,), width, device=x.device)
        rows = bins(torch.full_like(full, height), height, down).to(wide)  # (1, M1, height)
        columns = bins(full if lengths is None else lengths, width, across).to(wide).unsqueeze(1)  # (R, 1, M2, width)
        seen = torch.ones(1, height * width, device=x.device, dtype=wide)
        source = x.to(wide)
        if mask is not None:
            seen, source = mask.to(wide), source.masked_fill(~mask.unsqueeze(-1), 0.0)

        def total(values: Tensor) -> Tensor:
            values = columns @ values.unflatten(1, (height, width))  # (R, height, M2, D)
            return (rows @ values.flatten(2)).unflatten(2, (across, -1)).flatten(1, 2)

        number = total(seen.unsqueeze(-1))
        return (total(source) / number.clamp(min=1)).to(x.dtype), number.squeeze(-1) > 0


class AgentBias(nn.Module):
    """A bias for every head, agent and token: (R or 1, H, M, tokens), of Agent Attention (arXiv:2312.08874).

    A coarse table, interpolated over the tokens, of `size` entries, or of size x size with `grid_size` (height, width);
    then a table over the rows and one over the columns of that grid are added (interpolated where tokens stand on
    another grid: ours). num_prefix: tokens before them, each with a number of its own per head and agent.
    Truncated normal of deviation 0.02; without weight decay (the published code decays the tables).
    """

    def __init__(
        self,
        num_heads: int,
        num_agents: int,
        *,
        size: int = 7,
        grid_size: tuple[int, int] | None = None,
        num_prefix: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        shapes: dict[str, tuple[int, ...]] = {"table": (size,) if grid_size is None else (size, size)}
        if grid_size is not None:
            shapes.update(rows=grid_size[:1], columns=grid_size[1:])
        if num_prefix:
            shapes["prefix"] = (num_prefix,)

        def table(name: str) -> nn.Parameter:
            values = torch.empty(num_heads, num_agents, *shapes[name], device=device, dtype=dtype)
            return nn.Parameter(nn.init.trunc_normal_(values, std=0.02))

        self.table = table("table")
        self.rows = table("rows") if "rows" in shapes else None
        self.columns = table("columns") if "columns" in shapes else None
        self.prefix = table("prefix") if num_prefix else None
        for name in shapes:
            tag_parameter(self, name, weight_decay=0.0)

    def forward(self, tokens: int, *, height: int = 1, lengths: Tensor | None = None) -> Tensor:
        """tokens: number per row, the prefix included. height, lengths: as `pool_agents`, of those after the prefix."""
        table, rows, columns, prefix = self.table, self.rows, self.columns, self.prefix
        first = 0 if prefix is None else min(prefix.shape[-1], tokens)
        wide = torch.promote_types(table.dtype, torch.float32)
        width = (tokens - first) // height
        with torch.autocast(table.device.type, enabled=False):
            tall = torch.full((1,), height, device=table.device)
            across = torch.full_like(tall, width) if lengths is None else lengths

            def stretched(values: Tensor, length: Tensor, number: int) -> Tensor:
                """The last axis over `number` places: (..., size) to (R or 1, ..., number)."""
                weight = interpolation(length, number, values.shape[-1], wide)
                return torch.einsum("rpt,hmt->rhmp", weight, values.to(wide))

            if rows is None or columns is None:
                bias = stretched(table, across, width)
            else:
                down = interpolation(tall, height, table.shape[-2], wide)[0]
                side = interpolation(across, width, table.shape[-1], wide)
                grid = torch.einsum("rxt,hmyt->rhmyx", side, torch.einsum("ys,hmst->hmyt", down, table.to(wide)))
                grid = grid + stretched(rows, tall, height).unsqueeze(-1)
                bias = (grid + stretched(columns, across, width).unsqueeze(-2)).flatten(-2)
            if prefix is not None:
                bias = torch.cat((prefix[..., :first].to(wide).expand(bias.shape[0], -1, -1, -1), bias), -1)
        return bias
