"""Agent attention with a running softmax by its formula, every weight of every step at once: the oracle.

B batch, L length, H heads, K key width, V value width, M agents.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

# The score of what is not there: so low that its weight is exactly zero, finite so that differences are numbers.
ABSENT = -1e30


class RunningState(NamedTuple):
    """The running softmax of each agent over the keys so far, float32 or float64.

    m: (B, H, M), the largest score; z: (B, H, M), sum_s exp(score_s - m); num: (B, H, M, V), the same sum with v_s. The
    derivative is taken with m held, which is exact: only num exp(m) and z exp(m) matter. Before the first key m is
    ABSENT, z and num are 0.
    """

    m: Tensor
    z: Tensor
    num: Tensor


def running_naive(
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
    """o_t = sum_m softmax_m(broadcast_scale q_t . a_m) sum_{s <= t} softmax_s(scale a_m . k_s) v_s.

    Arguments as `running_agent_attention` makes them; needs memory for L x L x M. `chunk_size` has no meaning here.
    """
    length = q.shape[1]
    score_BHML = torch.einsum("mhk,blhk->bhml", agents, k) * scale
    value_BHMLV = v.permute(0, 2, 1, 3).unsqueeze(2).expand(-1, -1, agents.shape[0], -1, -1)
    seen_BLS = torch.ones(length, length, dtype=torch.bool, device=q.device).tril().expand(q.shape[0], -1, -1)
    if valid is not None:
        seen_BLS = seen_BLS & valid.unsqueeze(1)
    if initial is not None:
        # What came before is one more key, of score m + log z and with the mean of the values.
        some = initial.z > 0
        z = initial.z.masked_fill(~some, 1.0)
        before = (initial.m + z.log()).masked_fill(~some, ABSENT)
        score_BHML = torch.cat((before.unsqueeze(-1), score_BHML), -1)
        value_BHMLV = torch.cat(((initial.num / z.unsqueeze(-1)).unsqueeze(3), value_BHMLV), 3)
        seen_BLS = torch.cat((seen_BLS.new_ones(*seen_BLS.shape[:2], 1), seen_BLS), -1)
    hidden = ~seen_BLS[:, None, None]
    weight_BHMLS = score_BHML.unsqueeze(3).masked_fill(hidden, ABSENT).softmax(-1).masked_fill(hidden, 0.0)
    mean_BHMLV = torch.einsum("bhmls,bhmsv->bhmlv", weight_BHMLS, value_BHMLV)
    share_BHLM = (torch.einsum("blhk,mhk->bhlm", q, agents) * broadcast_scale).softmax(-1)
    o = torch.einsum("bhlm,bhmlv->blhv", share_BHLM, mean_BHMLV)

    keys = score_BHML[..., score_BHML.shape[-1] - length :]
    if valid is not None:
        keys = keys.masked_fill(~valid[:, None, None], ABSENT)
    m = keys.detach().amax(-1)
    m = m if initial is None else torch.maximum(m, initial.m)
    e = (keys - m.unsqueeze(-1)).exp() * (keys > ABSENT)
    z, num = e.sum(-1), torch.einsum("bhml,blhv->bhmv", e, v)
    if initial is not None:
        kept = (initial.m - m).exp()
        z, num = z + kept * initial.z, num + kept.unsqueeze(-1) * initial.num
    return o, RunningState(m, z, num)
