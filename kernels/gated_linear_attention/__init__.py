"""Gated linear attention: a matrix state that decays per head or per key channel before each token adds to it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..dispatch import choose_backend, register_backend
from ..linear_attention import accumulation_dtype
from ..triton_support import lazily, unusable
from .bidirectional import beyond, diagonal
from .chunked import chunked_gated_linear_attention
from .naive import naive_gated_linear_attention
from .portable import portable_gated_linear_attention
from .summary import gated_chunk_summary

__all__ = [
    "accumulation_dtype",
    "bidirectional_gated_linear_attention",
    "check_chunk_size",
    "gated_chunk_summary",
    "gated_linear_attention",
]

OP = "gated_linear_attention"
FEATURES = ("state", "lengths")
register_backend(
    OP,
    "triton",
    lazily(".fused", "fused_gated_linear_attention", __name__),
    note="one pass over chunks on a GPU",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    devices=("cuda",),
    features=FEATURES,
    limits={"key": 256, "value": 256},
    interpretable=True,
    probe=unusable,
)
register_backend(OP, "chunked", chunked_gated_linear_attention, note="linear in the length", features=FEATURES)
register_backend(OP, "naive", naive_gated_linear_attention, note="one token after another", features=FEATURES)
register_backend(
    OP,
    "portable",
    portable_gated_linear_attention,
    note="torch's operations, for exports",
    features=FEATURES,
    portable=True,
)


def gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    lengths: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """Causal linear attention whose state decays: S_t = exp(log_decay_t) S_{t-1} + k_t v_t^T, o_t = scale q_t^T S_t.

    One operation for constant decay (Lightning Attention, RetNet), a decay per token and head (Mamba-2) and one
    per token and key channel (GLA, arXiv:2312.06635). o_t includes token t, which has not decayed yet. The state
    and the decays stay in float32 (float64 for float64 inputs), under autocast too.

    q, k: (B, L, G, K); G divides H, head h reads group h // (H / G). v: (B, L, H, V), of the same dtype.
    log_decay: (H,) constant, (B, L, H) per token, or (B, L, H, K) per token and row of the state, with G = H; not
    positive, of any floating dtype. Below -100, where exp is 4e-44, it counts as -100.
    lengths: int64 (B,), tokens of each row, which come first; what lies beyond them does not reach the state, and
    o there is arbitrary. initial_state: (B, H, K, V).
    chunk_size: a power of two, positions that go through dense products together; None chooses.
    backend: "auto", "triton", "chunked" or "naive" (the oracle, which also differentiates twice).
    Returns o (B, L, H, V) and, with return_state, the state after each row's last token, (B, H, K, V), else None.
    Raises ValueError for shapes, dtypes or a backend that cannot serve.
    """
    log_decay = _checked(q, k, v, log_decay, lengths, initial_state, chunk_size)
    choice = choose_backend(
        OP,
        backend,
        dtype=q.dtype,
        device=q.device,
        sizes={"key": q.shape[3], "value": v.shape[3]},
        state=initial_state is not None or return_state,
        lengths=lengths is not None,
    )
    if lengths is not None:
        pads = beyond(lengths, q.shape[1])
        k, log_decay = k.masked_fill(pads, 0), log_decay.masked_fill(pads, 0)
    o, state = choice.run(q, k, v, log_decay, initial_state, scale=scale, chunk=chunk_size, return_state=return_state)
    return o, state if return_state else None


def bidirectional_gated_linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    *,
    scale: float = 1.0,
    lengths: Tensor | None = None,
    before: Tensor | None = None,
    behind: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Ours: the sum of a pass forwards and one backwards, each token counted once: o (B, L, H, V).

    Arguments as in `gated_linear_attention`. Token s < t reaches t through the decay of s+1 .. t, token s > t through
    that of t .. s-1; with a constant decay both are exp(log_decay |t - s|).
    before, behind: (B, H, K, V), the state that precedes the first token, and that of what follows the last, met from
    the end.
    """
    if lengths is not None:
        pads = beyond(lengths, q.shape[1])  # the pass backwards meets them first, with no state
        k = k.masked_fill(pads, 0)
        if log_decay.dim() > 1:
            log_decay = log_decay.masked_fill(pads if log_decay.dim() == 4 else pads.squeeze(3), 0)
    wide = accumulation_dtype(v.dtype)  # the two passes and the diagonal are added before they are rounded
    kind, q, k, v = v.dtype, q.to(wide), k.to(wide), v.to(wide)
    options: dict[str, Any] = {"scale": scale, "chunk_size": chunk_size, "backend": backend}
    ahead, _ = gated_linear_attention(q, k, v, log_decay, initial_state=before, **options)
    turned = log_decay if log_decay.dim() == 1 else log_decay.flip(1)
    back, _ = gated_linear_attention(q.flip(1), k.flip(1), v.flip(1), turned, initial_state=behind, **options)
    return (ahead + back.flip(1) - diagonal(q, k, v, scale)).to(kind)


def check_chunk_size(chunk_size: int | None) -> None:
    """Raises ValueError unless chunk_size is None or a power of two."""
    if chunk_size is None:
        return
    if not isinstance(chunk_size, int) or chunk_size < 1 or chunk_size & (chunk_size - 1):
        nearest = 1 << max(1, round(chunk_size)).bit_length()
        raise ValueError(f"chunk_size={chunk_size!r} must be a power of two, for example {nearest}")


def _checked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_decay: Tensor,
    lengths: Tensor | None,
    initial: Tensor | None,
    chunk: int | None,
) -> Tensor:
    """The log decay as (B or 1, L or 1, H, K or 1), once everything fits."""
    shapes = f"{OP}: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(t.dim() != 4 for t in (q, k, v)) or q.shape != k.shape or q.shape[:2] != v.shape[:2]:
        raise ValueError(f"{shapes} do not fit (B, L, G, K), (B, L, G, K), (B, L, H, V)")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{OP}: q, k, v must share a dtype, they are {q.dtype}, {k.dtype}, {v.dtype}")
    (batch, length, groups, key), (heads, value) = q.shape, v.shape[2:]
    if groups < 1 or heads % groups:
        raise ValueError(f"{shapes}: the {groups} groups of q and k must divide the {heads} heads of v")
    forms = [(heads,), (batch, length, heads), (batch, length, heads, key)]
    form = {len(known): known for known in forms}.get(log_decay.dim())
    if form is None or tuple(log_decay.shape) != form or not log_decay.is_floating_point():
        raise ValueError(
            f"{OP}: log_decay is {log_decay.dtype} {tuple(log_decay.shape)}, expected a float of shape "
            f"{forms[0]}, {forms[1]} or {forms[2]}"
        )
    if log_decay.dim() == 4 and groups != heads:
        raise ValueError(f"{OP}: a decay per key channel needs q and k per head, {heads}, they have {groups} groups")
    if lengths is not None and (tuple(lengths.shape) != (batch,) or lengths.is_floating_point()):
        raise ValueError(f"{OP}: lengths is {lengths.dtype} {tuple(lengths.shape)}, expected int64 ({batch},)")
    if initial is not None and tuple(initial.shape) != (batch, heads, key, value):
        raise ValueError(f"{OP}: initial_state has shape {tuple(initial.shape)}, expected {(batch, heads, key, value)}")
    check_chunk_size(chunk)
    if log_decay.dim() == 1:
        return log_decay.reshape(1, 1, heads, 1)
    return log_decay.unsqueeze(3) if log_decay.dim() == 3 else log_decay
