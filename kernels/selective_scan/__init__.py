"""Selective scan: the diagonal recurrence of Mamba, whose step, input and output vectors depend on the token."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose_backend, register_backend
from ..triton_support import lazily, unusable
from .chunked import chunked_selective_scan
from .compiled import compiled_selective_scan, refusal_here
from .naive import naive_selective_scan
from .portable import portable_selective_scan

__all__ = ["selective_scan", "selective_scan_summary"]

OP = "selective_scan"
register_backend(
    OP,
    "triton",
    lazily(".fused", "fused_selective_scan", __name__),
    note="states in registers, one warp per few channels",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    devices=("cuda",),
    features=("state", "lengths"),
    limits={"states": 64},
    interpretable=True,
    probe=unusable,
)
register_backend(OP, "chunked", chunked_selective_scan, note="a tree scan within chunks", features=("state", "lengths"))
register_backend(OP, "naive", naive_selective_scan, note="token after token", features=("state", "lengths"))
register_backend(
    OP,
    "portable",
    portable_selective_scan,
    note="torch's operations, for exports",
    features=("state", "lengths"),
    portable=True,
)
register_backend(  # last: `auto` never builds anything
    OP,
    "compiled",
    compiled_selective_scan,
    note="C++, built when first asked for",
    devices=("cpu",),
    features=("state", "lengths"),
    probe=refusal_here,
)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    skip: Tensor | None = None,
    lengths: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_state: bool = False,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor | None]:
    """h_t = exp(dt_t a) h_{t-1} + dt_t u_t b_t, y_t = h_t c_t + skip u_t (Mamba, arXiv:2312.00752, section 3.2).

    A is discretised by zero-order hold and B by Euler's rule, as published.

    u, dt: (B, L, E), dt >= 0 (after softplus). a: (E, N), negative. b, c: (B, L, N). skip: (E,), D of the paper.
    lengths: int64 (B,), real tokens of each right-padded row; beyond them dt = 0, so that the state stays as it is
    (y there is arbitrary). initial_state: (B, E, N), before the first token.
    chunk_size: tokens per step of "chunked" and "compiled", None for what suits the sizes. backend: "auto", "triton",
    "chunked", "naive" or, only when named, "compiled", which needs a C++ compiler once.
    Computed in float32 (float64 if u is), under autocast too.
    Returns y (B, L, E) in the dtype of u and, with return_state, the last h (B, E, N) in float32 (float64), else None.
    Raises ValueError for shapes, dtypes or a backend that cannot serve.
    """
    _check(u, dt, a, b, c, skip, lengths, initial_state, chunk_size)
    choice = choose_backend(
        OP,
        backend,
        dtype=u.dtype,
        device=u.device,
        sizes={"states": a.shape[1]},
        state=initial_state is not None or return_state,
        lengths=lengths is not None,
    )
    wide = torch.promote_types(u.dtype, torch.float32)
    if lengths is not None:
        beyond = torch.arange(u.shape[1], device=u.device) >= lengths.unsqueeze(1)
        dt = dt.masked_fill(beyond.unsqueeze(2), 0)
    if initial_state is None:
        initial = torch.zeros(u.shape[0], *a.shape, device=u.device, dtype=wide)
    else:
        initial = initial_state.to(wide)
    if choice.name == "triton":  # adds skip u itself
        y, last = choice.run(u, dt, a, b, c, initial, skip=skip)
        return y, last if return_state else None
    y, last = choice.run(u, dt, a, b, c, initial, chunk_size=chunk_size)
    if skip is not None:
        y = y.addcmul_(u.to(wide), skip.to(wide))
    return y.to(u.dtype), last if return_state else None


def selective_scan_summary(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, *, chunk_size: int | None = None, backend: str = "auto"
) -> tuple[Tensor, Tensor]:
    """(decay, state), both (B, E, N), with which the h after the tokens is decay * (h before them) + state.

    Arguments as in `selective_scan`. decay = exp(a sum_t dt_t); the state costs one scan, whose y is not used.
    """
    _, state = selective_scan(u, dt, a, b, b, return_state=True, chunk_size=chunk_size, backend=backend)
    if state is None:
        raise RuntimeError(f"{OP}: backend={backend!r} returned no state")
    total = dt.to(state.dtype).sum(1)
    return torch.exp(total.unsqueeze(2) * a.to(state.dtype)), state


def _check(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    skip: Tensor | None,
    lengths: Tensor | None,
    initial: Tensor | None,
    chunk_size: int | None,
) -> None:
    shapes = f"u {tuple(u.shape)}, dt {tuple(dt.shape)}, a {tuple(a.shape)}, b {tuple(b.shape)}, c {tuple(c.shape)}"
    if u.dim() != 3 or a.dim() != 2:
        raise ValueError(f"{OP}: {shapes} must be (B, L, E), (B, L, E), (E, N), (B, L, N), (B, L, N)")
    batch, length, channels = u.shape
    states = a.shape[1]
    if dt.shape != u.shape or a.shape[0] != channels or not b.shape == c.shape == (batch, length, states):
        raise ValueError(f"{OP}: {shapes} do not fit (B, L, E), (B, L, E), (E, N), (B, L, N), (B, L, N)")
    if skip is not None and skip.shape != (channels,):
        raise ValueError(f"{OP}: skip has shape {tuple(skip.shape)}, expected {(channels,)}")
    if lengths is not None and (lengths.shape != (batch,) or lengths.is_floating_point()):
        raise ValueError(f"{OP}: lengths is {lengths.dtype} {tuple(lengths.shape)}, expected int64 {(batch,)}")
    if initial is not None and initial.shape != (batch, channels, states):
        raise ValueError(f"{OP}: initial_state has shape {tuple(initial.shape)}, expected {(batch, channels, states)}")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"{OP}: chunk_size={chunk_size} must be at least 1, or None")
