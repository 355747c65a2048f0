"""The multi-dimensional damped EMA of MEGA: N moving averages per channel, their weighted sum, a carried state."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..dispatch import choose_backend, register_backend
from ..triton_support import lazily, unusable
from .chunked import ema_chunked
from .coefficients import ema_coefficients, initialize_ema
from .fft import ema_fft, ema_kernel
from .naive import Coefficients, EmaState, ema_naive
from .portable import ema_portable

__all__ = ["Coefficients", "EmaState", "ema", "ema_coefficients", "ema_kernel", "initialize_ema"]

register_backend(
    "ema",
    "triton",
    lazily(".fused", "fused_ema", __name__),
    note="the recurrence, averages in registers",
    dtypes=(torch.float32,),  # of the averages; x may be narrower
    devices=("cuda",),
    limits={"averages": 64},
    interpretable=True,
    probe=unusable,
)
EVERYTHING = ("truncation", "ragged_state")
register_backend("ema", "chunked", ema_chunked, note="exact, matrix products only", features=EVERYTHING)
register_backend("ema", "fft", ema_fft, note="whole kernel and FFT", features=EVERYTHING)
register_backend("ema", "naive", ema_naive, note="the recurrence, token by token", features=EVERYTHING)
register_backend(
    "ema", "portable", ema_portable, note="torch's operations, for exports", features=EVERYTHING, portable=True
)


def ema(
    x: Tensor,
    ahead: Coefficients,
    behind: Coefficients | None = None,
    *,
    skip: Tensor | None = None,
    truncation: int | None = None,
    lengths: Tensor | None = None,
    initial_state: EmaState | None = None,
    return_state: bool = False,
    backend: Literal["auto", "triton", "naive", "chunked", "fft"] = "auto",
) -> tuple[Tensor, EmaState | None]:
    """h_t = q h_{t-1} + b x_t, y_t = sum_n c_n h_{t,n} + skip x_t per channel (arXiv:2209.10655, eq. 5 to 7).

    x: (B, L, D). ahead: (log_q, b, c), each (D, N), as `ema_coefficients` gives them. behind: the same of a second
    average that runs from the end; the input of a token itself counts in both. skip: (D,).
    truncation: W, the kernels have W taps: y_t reaches back to x_{t-W+1} (and ahead to x_{t+W-1}).
    lengths: int64 (B,), real tokens per row, which stand first; the rest counts as zero and does not age the state.
    initial_state: before the first token. return_state: return the state after each row's last token too.
    Returns y (B, L, D) in x's dtype and the state in fp32 (fp64 for fp64), or None.

    Computed in fp32 (fp64 for fp64) under autocast as well. "chunked" and "naive" are exactly causal; "fft" up to its
    rounding. Raises ValueError for shapes that do not go together.
    """
    batch, length, dim = x.shape
    for name, group in (("ahead", ahead), ("behind", behind)):
        for part in group or ():
            if part.dim() != 2 or part.shape[0] != dim or part.shape != ahead[0].shape:
                raise ValueError(f"{name} holds {tuple(part.shape)}, expected ({dim}, N) for x {tuple(x.shape)}")
    if skip is not None and skip.shape != (dim,):
        raise ValueError(f"skip has shape {tuple(skip.shape)}, expected ({dim},)")
    if truncation is not None and truncation < 1:
        raise ValueError(f"truncation={truncation} must be at least 1, or None for the whole kernel")
    if lengths is not None and lengths.shape != (batch,):
        raise ValueError(f"lengths has shape {tuple(lengths.shape)}, expected ({batch},)")
    if behind is not None and (initial_state is not None or return_state):
        raise ValueError("the average from the end looks ahead: the two-sided form carries no state")
    num_dims = ahead[0].shape[1]
    if initial_state is not None:
        got = [None if part is None else tuple(part.shape) for part in initial_state]
        wanted = [(batch, dim, num_dims), None if truncation is None else (batch, truncation, dim)]
        if got != wanted:
            raise ValueError(f"initial_state has shapes {got}, expected {wanted}")
    any_length = torch.compiler.is_exporting() and not isinstance(length, int)
    if truncation is not None and initial_state is None and not return_state and not any_length:
        truncation = None if truncation >= length else truncation  # no tap of the kernel is cut off
    dtype = torch.promote_types(torch.promote_types(x.dtype, ahead[0].dtype), torch.float32)
    choice = choose_backend(
        "ema",
        backend,
        dtype=dtype,
        device=x.device,
        sizes={"averages": num_dims},
        truncation=truncation is not None,
        ragged_state=return_state and lengths is not None,
    )
    if initial_state is not None:
        h, tail = initial_state
        initial_state = EmaState(h.to(dtype), None if tail is None else tail.to(dtype))
    if 0 in (batch, length):
        return x, _empty(x, ahead, truncation, initial_state, dtype) if return_state else None
    work = x if choice.name == "triton" else x.to(dtype)  # that one reads x as it is
    if lengths is not None:
        beyond = torch.arange(length, device=x.device) >= lengths.unsqueeze(1)
        work = work.masked_fill(beyond.unsqueeze(2), 0)
    with torch.autocast(x.device.type, enabled=False):
        y, final = choice.run(
            work,
            Coefficients(*(part.to(dtype) for part in ahead)),
            None if behind is None else Coefficients(*(part.to(dtype) for part in behind)),
            skip=None if skip is None else skip.to(dtype),
            truncation=truncation,
            lengths=lengths,
            state=initial_state,
            output_state=return_state,
        )
    return y.to(x.dtype), final


def _empty(
    x: Tensor, ahead: Coefficients, truncation: int | None, state: EmaState | None, dtype: torch.dtype
) -> EmaState:
    if state is not None:
        return state
    batch, _, dim = x.shape
    tail = None if truncation is None else x.new_zeros(batch, truncation, dim, dtype=dtype)
    return EmaState(x.new_zeros(batch, *ahead[0].shape, dtype=dtype), tail)
