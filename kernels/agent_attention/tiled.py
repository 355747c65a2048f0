"""Both softmaxes of agent attention on the CPU, tile by tile: no scores but those of a tile, forwards and backwards.

B rows, L queries, S keys, H heads, K key width, V value width, M agents; n rows and C tokens of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .naive import ABSENT

# Scores of a tile: as float32 they fill a second cache of 1 MiB.
_TILE = 1 << 18


def _tiles(batch: int, length: int, scores: int) -> Iterator[tuple[slice, slice]]:
    """Rows and tokens; scores: of one token."""
    rows = min(max(_TILE // (scores * length), 1), batch)
    step = min(max(_TILE // scores, 64), length)
    for row in range(0, batch, rows):
        for first in range(0, length, step):
            yield slice(row, min(row + rows, batch)), slice(first, min(first + step, length))


def _part(x: Tensor | None, rows: slice) -> Tensor | None:
    """These rows of what may be one for all."""
    return x if x is None or x.shape[0] == 1 else x[rows]


class _Two:
    """The inputs with heads before tokens, and the scores of a tile of either softmax."""

    def __init__(self, q: Tensor, agents: Tensor, k: Tensor, v: Tensor, *added: Tensor | None) -> None:
        self.q, self.agents, self.k, self.v = (t.transpose(1, 2) for t in (q, agents, k, v))
        self.bias1, self.bias2, self.key_mask, self.agent_mask = added
        self.wide = torch.promote_types(q.dtype, torch.float32)
        self.batch, self.heads, self.number, _ = self.agents.shape

    def read(self, x: Tensor, rows: slice, tokens: slice) -> Tensor:
        """(n, H, C, K) in the dtype of the sums."""
        return x[rows, :, tokens].to(self.wide)

    def gathering(self) -> Iterator[tuple[slice, slice]]:
        return _tiles(self.batch, self.k.shape[2], self.heads * self.number)

    def reading(self) -> Iterator[tuple[slice, slice]]:
        return _tiles(self.batch, self.q.shape[2], self.heads * self.number)

    def gather_scores(self, rows: slice, tokens: slice, k: Tensor, scale: float) -> Tensor:
        """(n, H, M, C) of agents and keys."""
        s = (self.agents[rows].to(self.wide) * scale) @ k.transpose(2, 3)
        bias, mask = _part(self.bias1, rows), _part(self.key_mask, rows)
        if bias is not None:
            s = s.add_(bias[..., tokens]).clamp_(min=ABSENT)
        return s if mask is None else s.masked_fill_(~mask[:, None, None, tokens], ABSENT)

    def shares(self, rows: slice, tokens: slice, q: Tensor, scale: float) -> Tensor:
        """(n, H, C, M): the second softmax, of queries and agents."""
        s = q @ (self.agents[rows].to(self.wide) * scale).transpose(2, 3)
        bias, mask = _part(self.bias2, rows), _part(self.agent_mask, rows)
        if bias is not None:
            s = s.add_(bias[..., tokens, :]).clamp_(min=ABSENT)
        if mask is not None:
            s = s.masked_fill_(~mask[:, None, None, :], ABSENT)
        return torch.softmax(s, -1)

    def real_agents(self, x: Tensor) -> Tensor:
        """(B, H, M, ...) with zeros for absent agents, so that where there is none, the even weights are over zeros."""
        return x if self.agent_mask is None else x.masked_fill(~self.agent_mask[:, None, :, None], 0.0)


@torch.library.custom_op("seqzoo::agent_attention", mutates_args=(), device_types="cpu")
def _forward(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    bias1: Tensor | None,
    bias2: Tensor | None,
    key_mask: Tensor | None,
    agent_mask: Tensor | None,
    scale: float,
    broadcast_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """o (B, L, H, V), what the agents gathered (B, H, M, V), and the log-sum-exp of their scores (B, H, M)."""
    with torch.autocast("cpu", enabled=False):
        two = _Two(q, agents, k, v, bias1, bias2, key_mask, agent_mask)
        shape = two.batch, two.heads, two.number
        gathered = q.new_zeros(*shape, v.shape[3], dtype=two.wide)
        lse = q.new_full(shape, float("-inf"), dtype=two.wide)
        for rows, tokens in two.gathering():
            s = two.gather_scores(rows, tokens, two.read(two.k, rows, tokens), scale)
            p = torch.softmax(s, -1)
            # The largest weight of a softmax is exp(0) / sum.
            own = s.amax(-1) - p.amax(-1).log_()
            together = torch.logaddexp(lse[rows], own)
            mixed = (p @ two.read(two.v, rows, tokens)).mul_((own - together).exp_().unsqueeze(3))
            gathered[rows] = mixed.addcmul_(gathered[rows], (lse[rows] - together).exp_().unsqueeze(3))
            lse[rows] = together
        if key_mask is not None:
            gathered.masked_fill_(~key_mask.any(1)[:, None, None, None], 0.0)
        values = two.real_agents(gathered)
        o = v.new_empty(two.batch, q.shape[1], two.heads, v.shape[3])
        for rows, tokens in two.reading():
            share = two.shares(rows, tokens, two.read(two.q, rows, tokens), broadcast_scale)
            o[rows, tokens] = (share @ values[rows]).transpose(1, 2)
        return o, gathered, lse


def _add(total: Tensor | None, part: Tensor, rows: slice, *tokens: slice) -> None:
    """Add (n, H, ...) to the gradient of a bias, which may be one for all rows or heads."""
    if total is None:
        return
    if total.shape[0] == 1:
        part = part.sum(0, keepdim=True)
    if total.shape[1] == 1:
        part = part.sum(1, keepdim=True)
    here = total if total.shape[0] == 1 else total[rows]
    here[(slice(None), slice(None), *tokens)] += part


@torch.library.custom_op("seqzoo::agent_attention_backward", mutates_args=(), device_types="cpu")
def _backward(
    do: Tensor,
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    bias1: Tensor | None,
    bias2: Tensor | None,
    key_mask: Tensor | None,
    agent_mask: Tensor | None,
    gathered: Tensor,
    lse: Tensor,
    scale: float,
    broadcast_scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, agents, k, v and of the biases (empty without)."""
    with torch.autocast("cpu", enabled=False):
        two = _Two(q, agents, k, v, bias1, bias2, key_mask, agent_mask)
        do, values = do.transpose(1, 2), two.real_agents(gathered)
        dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
        dagents, dgathered = torch.zeros_like(two.agents, dtype=two.wide), torch.zeros_like(gathered)
        dbias = [None if t is None else t.new_zeros(t.shape, dtype=two.wide) for t in (bias1, bias2)]
        for rows, tokens in two.reading():
            queries, g = two.read(two.q, rows, tokens), two.read(do, rows, tokens)
            share = two.shares(rows, tokens, queries, broadcast_scale)
            dgathered[rows] += share.transpose(2, 3) @ g
            ds = g @ values[rows].transpose(2, 3)
            ds = ds.sub_((share * ds).sum(-1, keepdim=True)).mul_(share)
            _add(dbias[1], ds, rows, tokens)
            ds.mul_(broadcast_scale)
            dq[rows, tokens] = (ds @ two.agents[rows].to(two.wide)).transpose(1, 2)
            dagents[rows] += ds.transpose(2, 3) @ queries
        dgathered = two.real_agents(dgathered)
        if key_mask is not None:
            dgathered.masked_fill_(~key_mask.any(1)[:, None, None, None], 0.0)
        delta = (dgathered * gathered).sum(-1, keepdim=True)
        for rows, tokens in two.gathering():
            keys, g = two.read(two.k, rows, tokens), dgathered[rows]
            p = two.gather_scores(rows, tokens, keys, scale).sub_(lse[rows].unsqueeze(3)).exp_()
            dv[rows, tokens] = (p.transpose(2, 3) @ g).transpose(1, 2)
            ds = (g @ two.read(two.v, rows, tokens).transpose(2, 3)).sub_(delta[rows]).mul_(p)
            _add(dbias[0], ds, rows, slice(None), tokens)
            ds.mul_(scale)
            dk[rows, tokens] = (ds.transpose(2, 3) @ two.agents[rows].to(two.wide)).transpose(1, 2)
            dagents[rows] += ds @ keys
        d1, d2 = (lse.new_empty(0) if t is None else t for t in dbias)
        return dq, dagents.transpose(1, 2).contiguous().to(agents.dtype), dk, dv, d1, d2


@_forward.register_fake
def _(q, agents, k, v, bias1, bias2, key_mask, agent_mask, scale, broadcast_scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    batch, number, heads, _ = agents.shape
    gathered = q.new_empty(batch, heads, number, v.shape[3], dtype=wide)
    return v.new_empty(batch, q.shape[1], heads, v.shape[3]), gathered, gathered.new_empty(batch, heads, number)


@_backward.register_fake
def _(do, q, agents, k, v, bias1, bias2, key_mask, agent_mask, gathered, lse, scale, broadcast_scale):
    biases = (lse.new_empty(0) if t is None else t.new_empty(t.shape, dtype=lse.dtype) for t in (bias1, bias2))
    return *(t.new_empty(t.shape) for t in (q, agents, k, v)), *biases


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:8], *output[1:])
    ctx.options = inputs[8:]


def _gradient(ctx: Any, do: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
    saved = ctx.saved_tensors  # read once: gradient checkpointing gives them once
    grads = _backward(do, *saved, *ctx.options)
    biases = (None if t is None else g.to(t.dtype) for t, g in zip(saved[4:6], grads[4:], strict=True))
    return *grads[:4], *biases, None, None, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)


def agent_tiled(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float,
    broadcast_scale: float,
    aggregate_bias: Tensor | None,
    broadcast_bias: Tensor | None,
    key_mask: Tensor | None,
    agent_mask: Tensor | None,
    drop: float,
) -> Tensor:
    """`agent_attention` with all its options but dropout, on a CPU."""
    if torch.is_autocast_enabled("cpu"):  # as SDPA does
        low = torch.get_autocast_dtype("cpu")
        q, agents, k, v = (t if t.dtype == torch.float64 else t.to(low) for t in (q, agents, k, v))
    if 0 in (q.shape[0], q.shape[1], k.shape[1]):
        return v.new_zeros(*q.shape[:3], v.shape[3])
    number = agents.shape[1]
    biases = [
        None if bias is None else bias[(None,) * (4 - bias.dim())].expand(-1, -1, *ends)
        for bias, ends in ((aggregate_bias, (number, k.shape[1])), (broadcast_bias, (q.shape[1], number)))
    ]
    masks = [
        None if mask is None else mask.expand(q.shape[0], size)
        for mask, size in ((key_mask, k.shape[1]), (agent_mask, number))
    ]
    return _forward(q, agents, k, v, *biases, *masks, scale, broadcast_scale)[0]
