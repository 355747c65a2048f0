"""Agent attention with a running softmax of plain torch operations, for any length: what an exported model holds.

With m_t the largest score so far, the running sums of exp(score - m_t) are a recurrence whose decay is
exp(m_{t-1} - m_t): gated linear attention with the agents as key channels.

B batch, L length, H heads, K key width, V value width, M agents.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..gated_linear_attention.portable import LOWEST, portable_gated_linear_attention
from ..portable import linear_scan, running_max
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
    if valid is not None:
        score_BLHM = score_BLHM.masked_fill(~valid[:, :, None, None], ABSENT)
    m = initial.m if initial is not None else torch.full_like(score_BLHM[:, 0], ABSENT)
    top_BLHM = running_max(torch.cat((m.unsqueeze(1), score_BLHM.detach()), 1))
    before, top_BLHM = top_BLHM[:, :-1], top_BLHM[:, 1:]
    log_decay = (before - top_BLHM).clamp(min=LOWEST)
    own = (score_BLHM - top_BLHM).exp()
    if valid is not None:
        own = own.masked_fill(~valid[:, :, None, None], 0.0)
    decay, sums = log_decay.exp(), own
    if initial is not None:
        first = torch.addcmul(own[:, :1], decay[:, :1], initial.z.unsqueeze(1))
        sums = torch.cat((first, own[:, 1:]), 1)
    z_BLHM = linear_scan(decay, sums)
    share = (torch.einsum("blhk,mhk->blhm", q, agents) * broadcast_scale).softmax(-1)
    share = share / z_BLHM.masked_fill(z_BLHM == 0, 1.0)
    num = None if initial is None else initial.num
    o, num = portable_gated_linear_attention(share, own, v, log_decay, num, scale=1.0)
    return o, RunningState(top_BLHM[:, -1], z_BLHM[:, -1], num)
