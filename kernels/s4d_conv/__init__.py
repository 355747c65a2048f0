"""The S4D convolution: y = K * u with K the impulse response of a diagonal state space, and its carried
state."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..dispatch import choose_backend, register_backend
from ..triton_support import lazily, unusable
from .chunked import s4d_conv_chunked, s4d_kernel_chunked
from .discretize import discretize, powers
from .fft import s4d_conv_fft
from .initialize import INITS, initialize
from .naive import s4d_conv_naive, s4d_kernel_naive
from .portable import s4d_conv_portable

__all__ = ["INITS", "discretize", "initialize", "powers", "s4d_conv", "s4d_kernel"]

register_backend(
    "s4d_conv",
    "triton",
    lazily(".fused", "fused_s4d_conv", __name__),
    note="chunks, a program per channel",
    dtypes=(torch.float32,),  # of the states; u may be narrower
    devices=("cuda",),
    limits={"states": 64},
    interpretable=True,
    probe=unusable,
)
register_backend("s4d_conv", "chunked", s4d_conv_chunked, note="exact, matrix products only")
register_backend("s4d_conv", "fft", s4d_conv_fft, note="whole kernel and FFT")
register_backend("s4d_conv", "naive", s4d_conv_naive, note="the formula, quadratic")
register_backend("s4d_conv", "portable", s4d_conv_portable, note="torch's operations, for exports", portable=True)
register_backend("s4d_kernel", "chunked", s4d_kernel_chunked, note="two-level powers, one real product")
register_backend("s4d_kernel", "naive", s4d_kernel_naive, note="the Vandermonde matrix")


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.complex128 else torch.float32


def s4d_kernel(
    log_a: Tensor, weight: Tensor, length: int, *, backend: Literal["auto", "naive", "chunked"] = "auto"
) -> Tensor:
    """K_l = 2 Re sum_n weight_n exp(l log_a_n), real (D, length), arXiv:2206.11893.

    log_a, weight: complex (D, N); weight = Bbar C. Only one of each conjugate pair is given, hence 2 Re.
    """
    if log_a.shape != weight.shape or log_a.dim() != 2 or length < 1:
        raise ValueError(
            f"log_a {tuple(log_a.shape)} and weight {tuple(weight.shape)} must be (D, N), length={length} positive"
        )
    dtype = torch.promote_types(log_a.dtype, weight.dtype)
    run = choose_backend("s4d_kernel", backend, dtype=_real(dtype), device=log_a.device).run
    with torch.autocast(log_a.device.type, enabled=False):
        return run(log_a.to(dtype), weight.to(dtype), length)


def s4d_conv(
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    skip: Tensor | None = None,
    c_reverse: Tensor | None = None,
    lengths: Tensor | None = None,
    state: Tensor | None = None,
    output_state: bool = False,
    backend: Literal["auto", "triton", "naive", "chunked", "fft"] = "auto",
) -> tuple[Tensor, Tensor | None]:
    """The diagonal state space x_t = Abar x_{t-1} + Bbar u_t, y_t = 2 Re(C x_t) + D u_t over a sequence.

    u: (B, L, D). log_a, b, c: complex (D, N), log Abar, Bbar and C of one of each conjugate pair. skip: real
        (D,), D.
    c_reverse: complex (D, N), adds sum_{s > t} K'_{s-t-1} u_s with K' made of it; has no state.
    lengths: int64 (B,), real tokens per row, which stand first; the rest counts as zero and does not age the
        state.
    state: real (B, D, N, 2), before the first token. output_state: return the state after the last real token
    too. Returns y (B, L, D) in u's dtype and the state, in fp32 or fp64, or None.

    Computed in fp32 (fp64 for fp64 inputs) under autocast as well. "triton", "chunked" and "naive" are exactly
    causal; "fft" up to its rounding. Raises ValueError for shapes that do not go together.
    """
    batch, length, dim = u.shape
    for name, value in (("log_a", log_a), ("b", b), ("c", c), ("c_reverse", c_reverse)):
        if value is not None and (value.dim() != 2 or value.shape[0] != dim or value.shape != log_a.shape):
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected ({dim}, N) for u {tuple(u.shape)}")
    if skip is not None and skip.shape != (dim,):
        raise ValueError(f"skip has shape {tuple(skip.shape)}, expected ({dim},)")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected ({batch},)")
    if state is not None and state.shape != (batch, dim, log_a.shape[1], 2):
        raise ValueError(f"state has shape {tuple(state.shape)}, expected {(batch, dim, log_a.shape[1], 2)}")
    if c_reverse is not None and (state is not None or output_state):
        raise ValueError("c_reverse looks ahead: the bidirectional form carries no state")
    dtype = torch.promote_types(torch.promote_types(u.dtype, _real(log_a.dtype)), torch.float32)
    sizes = {"states": log_a.shape[1]}
    choice = choose_backend("s4d_conv", backend, dtype=dtype, device=u.device, sizes=sizes)
    if state is not None:
        state = state.to(dtype)
    if 0 in (batch, length):
        if output_state and state is None:
            state = u.new_zeros(batch, *log_a.shape, 2, dtype=dtype)
        return u, state if output_state else None
    work = u if choice.name == "triton" else u.to(dtype)  # that one reads u as it is
    if lengths is not None:
        beyond = torch.arange(length, device=u.device) >= lengths.unsqueeze(1)
        work = work.masked_fill(beyond.unsqueeze(2), 0)
    wide = torch.complex128 if dtype == torch.float64 else torch.complex64
    with torch.autocast(u.device.type, enabled=False):
        y, final = choice.run(
            work,
            log_a.to(wide),
            b.to(wide),
            c.to(wide),
            skip=None if skip is None else skip.to(dtype),
            c_reverse=None if c_reverse is None else c_reverse.to(wide),
            lengths=lengths,
            state=state,
            output_state=output_state,
        )
    return y.to(u.dtype), final
