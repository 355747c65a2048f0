"""Keys and values of softmax attention over a sequence that is split over ranks (LASP-2H, arXiv:2502.07563, section 4).

Each rank receives what its queries can see and nothing more: without causality everything, with it what comes before,
in a window its halo and the sinks. Keys are turned by their positions before they travel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...kernels.softmax import Sinks
from ..protocol import Exchange
from .kv_cache import KVState, append, with_window


def all_keys(
    exchange: Exchange, k: Tensor, v: Tensor, *, causal: bool, state: KVState | None
) -> tuple[Tensor, Tensor, Tensor, KVState | None]:
    """k, v (B, S, Hkv, K) and their positions that own queries may see, and the next cache, the same on every rank.

    Without a state causal keys end with own ones, so that query t sees those up to S - L + t.
    """
    total, width = exchange.total, k.shape[3]
    ends = [sum(exchange.lengths[: i + 1]) for i in range(len(exchange.lengths))]
    spans = [((0, end if causal and state is None else total),) for end in ends]
    both = exchange.gather(torch.cat((k, v), 3), spans)
    k, v = both[..., :width], both[..., width:]
    position = torch.arange(both.shape[1], device=k.device).unsqueeze(0)
    if state is None:
        return k, v, position, None
    state = append(state, k, v, state.length.unsqueeze(1) + position)
    return state.k, state.v, state.position, state


def window_keys(
    exchange: Exchange, k: Tensor, v: Tensor, *, window: int, num_sinks: int, causal: bool, state: KVState | None
) -> tuple[Tensor, Tensor, Tensor, Sinks | None, KVState | None]:
    """Keys and values from window - 1 before own first (and, unless causal, to window - 1 after own last), their
    positions, -1 where there is no token, the sinks, and the next cache, the same on every rank."""
    reach, length, width = window - 1, k.shape[1], k.shape[3]
    start, total = exchange.start, exchange.total
    both = torch.cat((k, v), 3)
    place = torch.arange(total, device=k.device).unsqueeze(0)
    first = exchange.everywhere(both, (0, min(num_sinks, total))) if num_sinks else both[:, :0]
    if state is None:
        past = None
        position = torch.cat((place.new_full((1, reach), -1), place, place.new_full((1, reach), -1)), 1)
        sinks = Sinks(first[..., :width], first[..., width:], place[:, :num_sinks])
    else:
        past = torch.cat((state.k, state.v), 3)[:, num_sinks:].to(both.dtype)
        position = torch.cat((state.position[:, num_sinks:], state.length.unsqueeze(1) + place), 1)
        seen = (state.length.unsqueeze(1) + place)[:, :num_sinks]
        held, _ = with_window(state, first[..., :width], first[..., width:], seen, num_sinks)
        sinks = Sinks(held.k, held.v, held.position)
        last = exchange.last(both, reach, past).to(state.k.dtype)
        state = state._replace(
            k=torch.cat((held.k, last[..., :width]), 1),
            v=torch.cat((held.v, last[..., width:]), 1),
            position=torch.cat((held.position, position[:, position.shape[1] - reach :]), 1),
            length=state.length + total,
        )
    nearby = exchange.around(both, reach, 0 if causal else reach, past)
    position = position[:, start : start + reach + length + (0 if causal else reach)]
    return nearby[..., :width], nearby[..., width:], position, sinks if num_sinks else None, state
