"""Single-head attention inside chunks of the sequence, with MEGA's attention functions, and its cache.

Letters: R rows, M tokens of a row (real ones first), Z width of queries and keys, V width of values, C chunk size,
G chunks, S slots of the cache.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..protocol import Exchange
from ..registry import did_you_mean
from .relative_bias import RelativeBias, create_relative_bias
from .rows import take

ATTENTIONS = ("softmax", "laplace", "relu2")
# Mean and deviation with which the Laplace function comes nearest to the squared ReLU.
_MU, _SIGMA = math.sqrt(0.5), math.sqrt(0.25 / math.pi)


class ChunkState(NamedTuple):
    """Keys and values of the chunk that is not full yet; slot i holds its token i, what lies beyond is arbitrary.

    k: (B, S, Z), v: (B, S, V). S = C - 1, or without chunks as many as were seen. length: int64 (B,), tokens seen.
    """

    k: Tensor
    v: Tensor
    length: Tensor


def laplace(x: Tensor) -> Tensor:
    """(1 + erf((x - mu) / (sigma sqrt 2))) / 2, mu = sqrt(1/2), sigma = sqrt(1/(4 pi)) (arXiv:2209.10655, eq. 16)."""
    return 0.5 * torch.special.erfc((_MU - x) * (1 / (_SIGMA * math.sqrt(2))))


def relu2(x: Tensor) -> Tensor:
    """max(x, 0)^2 (arXiv:2109.08668)."""
    return x.relu().square()


class ChunkAttention(nn.Module):
    """Attention weights f(q k^T + bias) inside chunks of chunk_size tokens, block diagonal, or over the whole sequence.

    attention: "softmax" of q.k / sqrt(Z) + bias, or "laplace" or "relu2" of q.k / n + bias with n the keys that the
        query sees. relative_bias: "simple" or "rotary". max_len: of the simple bias without chunks and across.
    causal: a token sees itself and the earlier ones. attn_drop: of the weights.
    z_dim: Z. Scores and weights are float32 (float64 for float64). Raises ValueError for unknown names and sizes.
    """

    def __init__(
        self,
        z_dim: int,
        *,
        causal: bool = False,
        chunk_size: int | None = None,
        attention: str = "softmax",
        relative_bias: str = "simple",
        max_len: int = 1024,
        attn_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if attention not in ATTENTIONS:
            raise ValueError(f"attention={attention!r} is unknown.{did_you_mean(attention, ATTENTIONS)}")
        if z_dim < 1:
            raise ValueError(f"z_dim={z_dim} must be at least 1")
        if chunk_size is not None and chunk_size < 1:
            raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None for the whole sequence")
        self.z_dim, self.causal, self.chunk_size, self.attention = z_dim, causal, chunk_size, attention
        self.bias: RelativeBias = create_relative_bias(
            relative_bias, max_len=chunk_size or max_len, dim=z_dim, device=device, dtype=dtype
        )
        self.attn_drop = nn.Dropout(attn_drop)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        lengths: Tensor | None = None,
        state: ChunkState | None = None,
        return_state: bool = False,
        exchange: Exchange | None = None,
    ) -> tuple[Tensor, ChunkState | None]:
        """q, k: (R, M, Z), v: (R, M, V). lengths: int64 (R,), real tokens per row. state: causal only. exchange: of a
        mixer whose sequence is split over ranks. Returns (R, M, V), arbitrary beyond a row's tokens, and the next
        state or None."""
        if exchange is not None:
            return self._shared(q, k, v, state, return_state, exchange)
        rows, length = q.shape[:2]
        if state is None:
            return self._grid(q, k, v, lengths), None
        count = state.length if self.chunk_size is None else state.length % self.chunk_size
        slots = state.k.shape[1]
        joined_k = _join(state.k, k.to(state.k.dtype), count)
        joined_v = _join(state.v, v.to(state.v.dtype), count)
        if slots == 0:
            o = self._grid(q, k, v, None)
        elif self.chunk_size is None or length < self.chunk_size:
            o = self._step(q, joined_k.to(k.dtype), joined_v.to(v.dtype), count)
        else:
            aligned = _join(q.new_zeros(rows, slots, self.z_dim), q, count)
            o = self._grid(aligned, joined_k.to(k.dtype), joined_v.to(v.dtype), None)
            o = take(o, count.unsqueeze(1) + torch.arange(length, device=q.device))
        number = length if lengths is None else lengths
        if not return_state:
            return o, None
        if self.chunk_size is None:
            return o, ChunkState(joined_k, joined_v, state.length + number)
        start = (count + number) // self.chunk_size * self.chunk_size
        place = start.unsqueeze(1) + torch.arange(slots, device=q.device)
        place = place.clamp(max=joined_k.shape[1] - 1)
        return o, ChunkState(take(joined_k, place), take(joined_v, place), state.length + number)

    def across(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        """q: (R, M, Z) sees all of k: (R, S, Z), v: (R, S, V), of which `lengths` (R,) are real. Returns (R, M, V)."""
        source = k.shape[1]
        if q.shape[1] == 0:
            return q.new_zeros(*q.shape[:2], v.shape[2])
        visible = None
        if lengths is not None:
            visible = (torch.arange(source, device=q.device) < lengths.unsqueeze(1)).unsqueeze(1)
            v = v.masked_fill(~visible.transpose(1, 2), 0)
        number: Tensor | float = float(max(source, 1))
        if lengths is not None:
            number = lengths.clamp(min=1).view(-1, 1, 1)
        return self._attend(q, k, v, self.bias(q.shape[1], source), visible, number)

    def init_state(
        self,
        batch_size: int,
        value_dim: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> ChunkState:
        slots = 0 if self.chunk_size is None else self.chunk_size - 1
        k = torch.zeros(batch_size, slots, self.z_dim, device=device, dtype=dtype)
        length = torch.zeros(batch_size, device=device, dtype=torch.int64)
        return ChunkState(k, k.new_zeros(batch_size, slots, value_dim), length)

    def state_size(self, length: int, value_dim: int) -> int:
        slots = length if self.chunk_size is None else self.chunk_size - 1
        return slots * (self.z_dim + value_dim)

    def extra_repr(self) -> str:
        return f"{self.z_dim}, attention={self.attention}, chunk_size={self.chunk_size}, causal={self.causal}"

    def _shared(
        self, q: Tensor, k: Tensor, v: Tensor, state: ChunkState | None, return_state: bool, exchange: Exchange
    ) -> tuple[Tensor, ChunkState | None]:
        """One rank's part of the sequence: keys and values of the chunks that it shares with others come from them."""
        chunk, length = self.chunk_size, q.shape[1]
        start, total, width = exchange.start, exchange.total, self.z_dim
        starts = [sum(exchange.lengths[:i]) for i in range(len(exchange.lengths))]
        ends = [*starts[1:], total]
        if state is None and chunk is not None and all(place % chunk == 0 for place in starts):
            return self._grid(q, k, v, None), None  # chunks end where the parts do
        kv = torch.cat((k, v), 2)
        if chunk is None and not self.causal:
            kv = exchange.gather(kv, [((0, total),)] * len(starts))
            bias = self.bias.table(start + length, total - start).unfold(0, total, 1).flip(0)
            return self._attend(q, kv[..., :width], kv[..., width:], bias, None, float(total)), None
        if chunk is None:
            kv = exchange.gather(kv, [((0, total if return_state else end),) for end in ends])
            earlier, own = kv[:, :start], kv[:, start : start + length]
            seen = state.length if state is not None else q.new_zeros(q.shape[0], dtype=torch.int64)
            cached = kv[:, :0] if state is None else torch.cat((state.k, state.v), 2).to(kv.dtype)
            held = _join(cached, earlier, seen)
            before = ChunkState(held[..., :width], held[..., width:], seen + start)
            o, _ = self(q, own[..., :width], own[..., width:], state=before)
            if not return_state:
                return o, None
            held = _join(cached, kv, seen)
            return o, ChunkState(held[..., :width], held[..., width:], seen + total)
        if not self.causal:
            first = start - start % chunk
            bounds = zip(starts, ends, strict=True)
            kv = exchange.gather(kv, [((a - a % chunk, min(total, -(-b // chunk) * chunk)),) for a, b in bounds])
            q = F.pad(q, (0, 0, start - first, first + kv.shape[1] - start - length))
            o = self._grid(q, kv[..., :width], kv[..., width:], None)
            return o[:, start - first : start - first + length], None
        slots = chunk - 1
        seen = state.length if state is not None else torch.zeros(q.shape[0], device=q.device, dtype=torch.int64)

        def open_chunk(tokens: Tensor, number: Tensor) -> ChunkState:
            """The cache after `number` (R,) tokens, the last of which are `tokens` (R, C - 1, Z + V)."""
            place = slots - (number % chunk).unsqueeze(1) + torch.arange(slots, device=q.device)
            held = take(tokens, place.clamp(max=max(slots - 1, 0)))
            return ChunkState(held[..., :width], held[..., width:], number)

        past: Tensor | None = None
        if state is not None:  # its tokens, the last of them in the last slot
            place = torch.arange(slots, device=q.device) - slots + (seen % chunk).unsqueeze(1)
            past = take(torch.cat((state.k, state.v), 2), place.clamp(min=0))
        nearby = exchange.around(kv, slots, initial=past)
        before, own = open_chunk(nearby[:, :slots], seen + start), nearby[:, slots:]
        o, _ = self(q, own[..., :width], own[..., width:], state=before)
        if not return_state:
            return o, None
        return o, open_chunk(exchange.last(kv, slots, past), seen + total)

    def _grid(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> Tensor:
        """Rows that start with a chunk, cut into chunks."""
        rows, length = q.shape[:2]
        if length == 0:
            return q.new_zeros(rows, 0, v.shape[2])
        if self.chunk_size is None:
            chunk, groups = length, 1
        else:  # of a length that is not known, as in an export, every chunk is a whole one
            chunk = min(self.chunk_size, length) if isinstance(length, int) else self.chunk_size
            groups = (length + chunk - 1) // chunk
        bias = self.bias(chunk, chunk)
        place = torch.arange(1, chunk + 1, device=q.device)
        visible: Tensor | None = None
        number: Tensor | float = float(chunk)
        if self.causal:  # pads come last, where no real token sees them
            visible = place <= place.unsqueeze(1)
            number = place.unsqueeze(1)
        elif lengths is not None or groups * chunk != length:
            if lengths is None:
                lengths = torch.full((rows,), length, device=q.device)
            start = chunk * torch.arange(groups, device=q.device)
            held = (lengths.unsqueeze(1) - start).clamp(0, chunk).view(-1, 1, 1)  # (R G, 1, 1)
            visible, number = place <= held, held.clamp(min=1)

        def cut(x: Tensor) -> Tensor:
            return F.pad(x, (0, 0, 0, groups * chunk - length)).reshape(rows * groups, chunk, x.shape[2])

        q, k, v = cut(q), cut(k), cut(v)
        if visible is not None and not self.causal:
            v = v.masked_fill(~visible.transpose(1, 2), 0)
        o = self._attend(q, k, v, bias, visible, number)
        return o.reshape(rows, groups * chunk, o.shape[2])[:, :length]

    def _step(self, q: Tensor, k: Tensor, v: Tensor, count: Tensor) -> Tensor:
        """Fewer new tokens than a chunk (or no chunks), after `count` cached ones: k, v: (R, S + M, ...), joined."""
        total = k.shape[1]
        chunk = total if self.chunk_size is None else self.chunk_size
        from_ = count.unsqueeze(1) + torch.arange(q.shape[1], device=q.device)  # (R, M), places in the joined row
        to = torch.arange(total, device=q.device)
        offset = to - from_.unsqueeze(2)
        visible = (offset <= 0) & ((to // chunk) == (from_ // chunk).unsqueeze(2))
        reach = min(chunk, total)
        bias = self.bias.table(reach, 1)[(offset + reach - 1).clamp(0, reach - 1)]
        return self._attend(q, k, v, bias, visible, (from_ % chunk + 1).unsqueeze(2))

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, bias: Tensor, visible: Tensor | None, number: Tensor | float
    ) -> Tensor:
        """q: (R, M, Z), k: (R, S, Z), v: (R, S, V). bias, visible: broadcastable to (R, M, S). number: keys that a
        query sees, broadcastable to (R, M, 1). A row that sees nothing must meet values that are zero."""
        wide = torch.promote_types(q.dtype, torch.float32)
        bias = bias.to(wide)
        if self.attention == "softmax":
            q = q * self.z_dim**-0.5
        else:
            q = (q / number).to(q.dtype)
        scores = (q @ k.transpose(1, 2)).to(wide)
        if self.attention == "softmax":
            if visible is not None and visible.dim() == bias.dim():
                scores = scores + bias.masked_fill(~visible, torch.finfo(wide).min)
            else:
                scores = scores + bias
                if visible is not None:
                    scores = scores.masked_fill(~visible, torch.finfo(wide).min)
            weights = scores.softmax(-1)
        else:
            weights = (laplace if self.attention == "laplace" else relu2)(scores + bias)
            if visible is not None:
                weights = weights * visible
        return self.attn_drop(weights).to(v.dtype) @ v


def _join(cached: Tensor, new: Tensor, count: Tensor) -> Tensor:
    """The first `count` (R,) slots of `cached` (R, S, W), then `new` (R, M, W), then anything: (R, S + M, W)."""
    slots, total = cached.shape[1], cached.shape[1] + new.shape[1]
    place = torch.arange(total, device=new.device)
    after = slots + place - count.unsqueeze(1)
    return take(torch.cat((cached, new), 1), torch.where(place < count.unsqueeze(1), place, after).clamp(max=total - 1))
