"""Associative scan: the linear recurrence of first order, h_t = a_t h_{t-1} + x_t."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import FLOATS, choose_backend, register_backend
from ..triton_support import lazily, unusable
from .chunked import chunked_associative_scan, scan_
from .naive import naive_associative_scan

__all__ = ["associative_scan", "scan_"]

OP = "associative_scan"
DTYPES = (*FLOATS, torch.complex64, torch.complex128)
register_backend(
    OP,
    "triton",
    lazily(".fused", "fused_associative_scan", __name__),
    note="one pass, a block of steps at a time",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    devices=("cuda",),
    interpretable=True,
    probe=unusable,
)
register_backend(OP, "chunked", chunked_associative_scan, note="a tree scan within chunks", dtypes=DTYPES)
register_backend(OP, "naive", naive_associative_scan, note="step after step", dtypes=DTYPES)


def associative_scan(
    a: Tensor,
    x: Tensor,
    *,
    dim: int = 1,
    initial_state: Tensor | None = None,
    reverse: bool = False,
    backend: str = "auto",
) -> Tensor:
    """h_t = a_t h_{t-1} + x_t along `dim`, as a scan of (a_2, x_2) o (a_1, x_1) = (a_1 a_2, a_2 x_1 + x_2).

    x: any shape. a: broadcasts to x. Both real or complex. initial_state: h before the first step, x without
    `dim`; None for zeros. reverse: from the end, h_t = a_t h_{t+1} + x_t, initial_state after the last step.
    backend: "auto", "triton", "chunked" or "naive". Computed in float32 (complex64) at least, under autocast too.
    Returns h in the shape of x and the dtype that a, x and the initial state promote to.
    Raises ValueError for shapes, dtypes or a backend that cannot serve.
    """
    if x.dim() == 0 or not -x.dim() <= dim < x.dim():
        raise ValueError(f"{OP}: dim={dim} is not a dimension of x {tuple(x.shape)}")
    dim %= x.dim()
    sizes = zip(reversed(a.shape), reversed(x.shape), strict=False)
    if a.dim() > x.dim() or any(n not in (1, m) for n, m in sizes):
        raise ValueError(f"{OP}: a {tuple(a.shape)} does not broadcast to x {tuple(x.shape)}")
    before = (*x.shape[:dim], *x.shape[dim + 1 :])
    if initial_state is not None and initial_state.shape != before:
        raise ValueError(f"{OP}: initial_state has shape {tuple(initial_state.shape)}, expected {before}")
    dtype = torch.promote_types(a.dtype, x.dtype)
    if initial_state is not None:
        dtype = torch.promote_types(dtype, initial_state.dtype)
    choice = choose_backend(OP, backend, dtype=dtype, device=x.device)
    wide = torch.promote_types(dtype, torch.float32)
    initial = x.new_zeros(before, dtype=wide) if initial_state is None else initial_state.to(wide)
    a = a.reshape((1,) * (x.dim() - a.dim()) + a.shape)
    if choice.name == "triton":  # reads a and x as they are
        return choice.run(a, x.to(dtype), initial, dim, reverse)
    return choice.run(a.to(wide), x.to(wide), initial, dim, reverse).to(dtype)
