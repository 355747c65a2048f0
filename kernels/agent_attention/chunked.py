"""Agent attention with a running softmax, chunk by chunk: the fast PyTorch form, and the backend for the CPU.

Weights within a chunk come from matrix products over halves, quarters, ... of it (README.md), so there is neither an
(L, M, V) tensor nor one of M numbers for each pair of a chunk. Every exponent is at most 0, and the reference that
makes it so is a maximum over the past: nothing overflows, and no rounding knows of later keys.

B batch, L length, H heads, K key width, V value width, M agents, N chunks, C chunk length.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .naive import ABSENT, RunningState

# Scores (row, head, agent, position) in a segment: a few such tensors stay in a processor's cache.
SEGMENT = 1 << 20


def _running_max(x: Tensor, first: Tensor) -> Tensor:
    """Maxima of `first` (..., M) and the leading entries of x (..., J, M): (..., J + 1, M). Ten times torch.cummax."""
    found = [first]
    for place in x.unbind(-2):
        found.append(torch.maximum(found[-1], place))
    return torch.stack(found, -2)


def _within(log_weight: Tensor, score: Tensor, top: Tensor) -> Tensor:
    """P_ts = sum_m exp(log_weight_tm + score_sm) for s <= t within each chunk: (..., C, M) x 2 to (..., C, C).

    top: (..., C, M), the running maximum of the scores. Blocks on the diagonal double from 1 to C; the quadrant below
    two of them is one product of the later queries and the earlier keys, both relative to the maximum between them.
    """
    size = log_weight.shape[-2]
    p = (log_weight + score).exp().sum(-1)[..., None, None]
    half = 1
    while half < size:
        split = size // (2 * half), 2, half
        reference = top.unflatten(-2, split)[..., 0, -1:, :]
        later = (log_weight.unflatten(-2, split)[..., 1, :, :] + reference).exp()
        earlier = (score.unflatten(-2, split)[..., 0, :, :] - reference).exp()
        below = later @ earlier.transpose(-1, -2)
        first, second = p.unflatten(-3, (-1, 2)).unbind(-3)
        upper = torch.cat((first, torch.zeros_like(below)), -1)
        p = torch.cat((upper, torch.cat((below, second), -1)), -2)
        half *= 2
    return p.squeeze(-3)


def running_chunked(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    initial: RunningState | None,
    *,
    scale: float,
    broadcast_scale: float,
    valid: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, RunningState]:
    """`running_naive` in time and memory linear in the length. chunk_size: C, a power of two.

    Longer rows go through in segments whose scores stay in cache. The backward pass makes the scores of a segment
    again, so that none are kept.
    """
    batch, length, heads, _ = q.shape
    if initial is None:
        num = q.new_zeros(batch, heads, agents.shape[0], v.shape[3])
        initial = RunningState(num.new_full(num.shape[:3], ABSENT), num[..., 0], num)
    chunk = min(chunk_size, 1 << max(length - 1, 0).bit_length())
    step = chunk * max(1, SEGMENT // (batch * heads * agents.shape[0] * chunk))
    if length <= step:
        return _segment(q, agents, k, v, valid, initial, scale, broadcast_scale, chunk)
    pieces, state = [], initial
    masks = [None] * -(-length // step) if valid is None else valid.split(step, 1)
    for q_part, k_part, v_part, mask in zip(*(t.split(step, 1) for t in (q, k, v)), masks, strict=True):
        part = q_part, agents, k_part, v_part, mask, state, scale, broadcast_scale, chunk
        if torch.is_grad_enabled():
            o, state = checkpoint(_segment, *part, use_reentrant=False, preserve_rng_state=False)
        else:
            o, state = _segment(*part)
        pieces.append(o)
    return torch.cat(pieces, 1), state


def _segment(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    valid: Tensor | None,
    initial: RunningState,
    scale: float,
    broadcast_scale: float,
    chunk: int,
) -> tuple[Tensor, RunningState]:
    """All chunks of a stretch of the rows at once, after the state `initial`."""
    batch, length = q.shape[:2]
    extra = -length % chunk
    if extra:
        if valid is None:
            valid = torch.ones(batch, length, dtype=torch.bool, device=q.device)
        valid = F.pad(valid, (0, extra))
        q, k, v = (F.pad(t, (0, 0, 0, 0, 0, extra)) for t in (q, k, v))
    # The last value column is 1, 0 where there is no key: its sum is the normaliser.
    v = torch.cat((v, torch.ones_like(v[..., :1])), -1)
    score = torch.einsum("mhk,blhk->bhlm", agents * scale, k)
    if valid is not None:
        v = v.masked_fill(~valid[:, :, None, None], 0.0)
        score = score.masked_fill(~valid[:, None, :, None], ABSENT)
    share = torch.einsum("blhk,mhk->bhlm", q * broadcast_scale, agents).log_softmax(-1)
    score, share, value = (t.unflatten(2, (-1, chunk)) for t in (score, share, v.transpose(1, 2)))  # (B, H, N, C, .)

    # Each chunk's own sums, then what stands before each chunk: sums relative to the maximum so far.
    highest = score.detach().amax(-2)
    tops = _running_max(highest, initial.m.detach())
    before, after = tops[..., :-1, :], tops[..., 1:, :]
    sums = (score - highest.unsqueeze(-2)).exp().transpose(-1, -2) @ value
    added = (sums * (highest - after).exp().unsqueeze(-1)).unbind(2)
    kept = (before - after).exp().unsqueeze(-1).unbind(2)
    totals = [torch.cat((initial.num, initial.z.unsqueeze(-1)), -1)]
    for own, factor in zip(added, kept, strict=True):
        totals.append(torch.addcmul(own, totals[-1], factor))
    carried = torch.stack(totals[:-1], 2)  # (B, H, N, M, V + 1)

    # The normaliser after every key, place by place in all chunks at once.
    top = _running_max(score.detach(), before)
    factor, own_weight = (top[..., :-1, :] - top[..., 1:, :]).exp(), (score - top[..., 1:, :]).exp()
    top = top[..., 1:, :]
    z, normalisers = carried[..., -1], []
    for own, shrunk in zip(own_weight.unbind(-2), factor.unbind(-2), strict=True):
        z = torch.addcmul(own, z, shrunk)
        normalisers.append(z)
    log_weight = share - top - torch.stack(normalisers, -2).log()

    o = (log_weight + before.unsqueeze(-2)).exp() @ carried[..., :-1]
    o = o + _within(log_weight, score, top) @ value[..., :-1]
    o = o.flatten(2, 3).transpose(1, 2)[:, :length]
    return o, RunningState(tops[..., -1, :], totals[-1][..., -1], totals[-1][..., :-1])
