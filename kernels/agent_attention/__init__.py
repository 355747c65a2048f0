"""Agent attention: a few agents gather the values by one softmax, and queries read the agents by another."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from ..dispatch import choose_backend, register_backend
from ..softmax import softmax_attention
from .chunked import running_chunked
from .naive import ABSENT, RunningState, running_naive
from .portable import running_portable
from .tiled import agent_tiled

__all__ = ["ABSENT", "RunningState", "agent_attention", "running_agent_attention"]

OP = "agent_attention"
register_backend(OP, "chunked", running_chunked, note="linear in the length")
register_backend(OP, "naive", running_naive, note="the formula, quadratic")
register_backend(OP, "portable", running_portable, note="torch's operations, for exports", portable=True)


def _two_softmaxes(
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
    backend: Literal["sdpa", "naive"],
) -> Tensor:
    gathered = softmax_attention(
        agents,
        k,
        v,
        mask=None if key_mask is None else key_mask[:, None, None, :],
        bias=aggregate_bias,
        scale=scale,
        drop=drop,
        backend=backend,
    )
    return softmax_attention(
        q,
        agents,
        gathered,
        mask=None if agent_mask is None else agent_mask[:, None, None, :],
        bias=broadcast_bias,
        scale=broadcast_scale,
        drop=drop,
        backend=backend,
    )


def _sdpa(*tensors: Tensor, **options: Any) -> Tensor:
    return _two_softmaxes(*tensors, **options, backend="sdpa")


def _naive(*tensors: Tensor, **options: Any) -> Tensor:
    return _two_softmaxes(*tensors, **options, backend="naive")


PLAIN = "agent_attention_plain"
register_backend(PLAIN, "tiled", agent_tiled, note="both softmaxes in cache", devices=("cpu",))
register_backend(PLAIN, "sdpa", _sdpa, note="two calls of torch's fused attention", features=("drop",), portable=True)
register_backend(PLAIN, "naive", _naive, note="the formula", features=("drop",))


def agent_attention(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    broadcast_scale: float | None = None,
    aggregate_bias: Tensor | None = None,
    broadcast_bias: Tensor | None = None,
    key_mask: Tensor | None = None,
    agent_mask: Tensor | None = None,
    drop: float = 0.0,
    backend: Literal["auto", "tiled", "sdpa", "naive"] = "auto",
) -> Tensor:
    """o = softmax(broadcast_scale q a^T + bias2) softmax(scale a k^T + bias1) v (arXiv:2312.08874, eq. 5 and 6).

    q: (B, L, H, K). agents: (B, M, H, K). k: (B, S, H, K). v: (B, S, H, V), V <= K. Returns (B, L, H, V).
    scale: K ** -0.5 where None; broadcast_scale: `scale` where None.
    aggregate_bias: bias1, broadcastable to (B, H, M, S). broadcast_bias: bias2, to (B, H, L, M).
    key_mask: bool (B, S), True for a real key; agent_mask: bool, broadcastable to (B, M), True for a real agent.
    Without any, the output is 0. drop: dropout of both kinds of weights.
    backend: "tiled" (CPU, no dropout), or the two calls of `softmax_attention` with its "sdpa" or "naive".
    Raises ValueError for a backend that cannot run, and as `softmax_attention` does.
    """
    scale = q.shape[3] ** -0.5 if scale is None else scale
    chosen = choose_backend(PLAIN, backend, dtype=q.dtype, device=q.device, drop=drop > 0)
    return chosen.run(
        q,
        agents,
        k,
        v,
        scale=scale,
        broadcast_scale=scale if broadcast_scale is None else broadcast_scale,
        aggregate_bias=aggregate_bias,
        broadcast_bias=broadcast_bias,
        key_mask=key_mask,
        agent_mask=agent_mask,
        drop=drop,
    )


def running_agent_attention(
    q: Tensor,
    agents: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scale: float | None = None,
    broadcast_scale: float | None = None,
    lengths: Tensor | None = None,
    initial_state: RunningState | None = None,
    return_state: bool = False,
    chunk_size: int = 32,
    backend: Literal["auto", "chunked", "naive"] = "auto",
) -> tuple[Tensor, RunningState | None]:
    """The causal form, with agents that do not depend on the queries: both softmaxes see keys up to t only.

    o_t = sum_m softmax_m(broadcast_scale q_t . a_m) sum_{s <= t} softmax_s(scale a_m . k_s) v_s. Ours, not the paper's.

    q, k: (B, L, H, K). v: (B, L, H, V). agents: (M, H, K). Returns o (B, L, H, V) in q's dtype and, with return_state,
    the `RunningState` after each row's last key, else None.
    scale: K ** -0.5 where None; broadcast_scale: `scale` where None.
    lengths: int64 (B,), real tokens per row, which stand first; the rest adds no keys, o is arbitrary there.
    initial_state: after earlier keys. No gradient is taken for its m. chunk_size: a power of two.
    Computed in float32 (float64 for float64 inputs), under autocast too. Raises ValueError for shapes or a backend that
    cannot serve.
    """
    shapes = f"q {tuple(q.shape)}, agents {tuple(agents.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    batch, length, heads, _ = q.shape
    if k.shape != q.shape or v.shape[:3] != q.shape[:3] or agents.dim() != 3 or agents.shape[1:] != q.shape[2:]:
        raise ValueError(f"{OP}: {shapes} do not fit (B, L, H, K), (M, H, K), (B, L, H, K), (B, L, H, V)")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"{OP}: lengths has shape {tuple(lengths.shape)}, expected ({batch},)")
    if chunk_size < 1 or chunk_size & (chunk_size - 1):
        near = 1 << max(chunk_size, 1).bit_length() - 1
        raise ValueError(f"{OP}: chunk_size={chunk_size} must be a power of two, such as {near}")
    if initial_state is not None:
        rows = (batch, heads, agents.shape[0])
        found, expected = tuple(tuple(t.shape) for t in initial_state), (rows, rows, (*rows, v.shape[3]))
        if found != expected:
            raise ValueError(f"{OP}: initial_state has shapes {found}, expected {expected}")
    scale = q.shape[3] ** -0.5 if scale is None else scale
    wide = torch.promote_types(q.dtype, torch.float32)
    chosen = choose_backend(OP, backend, dtype=wide, device=q.device)
    valid = None if lengths is None else torch.arange(length, device=q.device) < lengths.unsqueeze(1)
    state = None if initial_state is None else RunningState(*(t.to(wide) for t in initial_state))
    if 0 in (batch, length):
        if return_state and state is None:
            num = v.new_zeros(batch, heads, agents.shape[0], v.shape[3], dtype=wide)
            state = RunningState(num.new_full(num.shape[:3], ABSENT), num.new_zeros(num.shape[:3]), num)
        return q.new_zeros(*q.shape[:3], v.shape[3]), state if return_state else None
    with torch.autocast(q.device.type, enabled=False):
        o, state = chosen.run(
            *(t.to(wide) for t in (q, agents, k, v)),
            state,
            scale=scale,
            broadcast_scale=scale if broadcast_scale is None else broadcast_scale,
            valid=valid,
            chunk_size=chunk_size,
        )
    return o.to(q.dtype), state if return_state else None
