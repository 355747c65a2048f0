"""Agent attention with a running softmax of plain torch operations, for any length: what an exported model holds.

With m_t the largest score so far, the running sums of exp(score - m_t) are a recurrence whose decay is
exp(m_{t-1} - m_t): gated linear attention with the agents as key channels.

B batch, L length, H heads, K key width, V value width, M agents, C chunk length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gated_linear_attention.portable import CHANNEL_CHUNK, LOWEST, gated_chunk
from ..portable import Parts, chunk_scan, linear_steps, running_max
from .naive import ABSENT, RunningState


def running_portable(
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
    """As `running_naive`. `chunk_size` has no meaning here."""
    score_BLHM = torch.einsum("mhk,blhk->blhm", agents, k) * scale
    real = torch.ones_like(score_BLHM[..., :1])
    if valid is not None:
        real = real * valid[:, :, None, None]
    share = (torch.einsum("blhk,mhk->blhm", q, agents) * broadcast_scale).softmax(-1)
    if initial is None:
        num = q.new_zeros(q.shape[0], q.shape[2], agents.shape[0], v.shape[3])
        initial = RunningState(num.new_full(num.shape[:3], ABSENT), num[..., 0].clone(), num)
    state, o = chunk_scan(_chunk, tuple(initial), (share, score_BLHM, v, real), CHANNEL_CHUNK)
    return o, RunningState(*state)


def _chunk(carried: Parts, parts: Parts, _: Parts) -> tuple[Parts, Tensor]:
    (m, z, num), (share, score, v, real) = carried, parts
    score = score.masked_fill(real == 0, ABSENT)
    top = running_max(score.detach(), m.detach())
    before = torch.cat((m.detach().unsqueeze(1), top[:, :-1]), 1)
    log_decay = (before - top).clamp(min=LOWEST)
    own = (score - top).exp() * real
    sums = linear_steps(log_decay.exp(), own, z)
    share = share / sums.masked_fill(sums == 0, 1.0)
    o, num = gated_chunk(share, own, v, log_decay, num)
    return (top[:, -1], sums[:, -1], num), o
