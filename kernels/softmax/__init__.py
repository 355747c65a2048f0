"""Softmax attention: torch's SDPA behind one function, and a sliding window linear in the length."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..dispatch import choose_backend, register_backend
from .naive import softmax_naive
from .portable import softmax_portable
from .sdpa import softmax_sdpa
from .window import Sinks, visible, window_attention

__all__ = ["Sinks", "softmax_attention", "visible", "window_attention"]

register_backend("softmax", "sdpa", softmax_sdpa, note="torch's fused attention where one fits")
register_backend("softmax", "naive", softmax_naive, note="the formula, quadratic in memory")
register_backend("softmax", "portable", softmax_portable, note="torch's own, also in windows", portable=True)


def softmax_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    window: tuple[int, int] | None = None,
    scale: float | None = None,
    drop: float = 0.0,
    backend: Literal["auto", "sdpa", "naive"] = "auto",
) -> Tensor:
    """Softmax attention (arXiv:1706.03762, eq. 1): o_i = sum_j softmax_j(scale q_i.k_j + bias_ij) v_j.

    q: (B, L, H, K). k: (B, S, Hkv, K). v: (B, S, Hkv, V), V <= K. Hkv divides H; query head h reads key head
    h // (H / Hkv) (GQA, arXiv:2305.13245). Returns (B, L, H, V).
    causal: query t sees keys up to S - L + t (the last query sees all).
    mask: bool, broadcastable to (B, H, L, S), True where j is visible. A row that sees nothing gives 0 and
        zero gradient.
    bias: floating, broadcastable to (B, H, L, S).
    window: (before, after): query t sees keys no further than that from key S - L + t, its own, in time and memory
        O(L (before + after)). A mask must then be one of keys, (B or 1, 1, 1, S), and there is no bias.
    scale: K ** -0.5 where None. drop: dropout of the weights.

    The softmax is float32 or wider, whatever the dtype. Raises ValueError for shapes that do not go
    together and for a backend that cannot run.
    """
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3]:
        raise ValueError(f"shapes of q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not go together")
    if q.shape[2] % k.shape[2]:
        raise ValueError(f"{k.shape[2]} key heads do not divide {q.shape[2]} query heads")
    if v.shape[3] > q.shape[3]:
        raise ValueError(f"values of width {v.shape[3]} are wider than the keys ({q.shape[3]})")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}, expected bool, True = visible")
    if window is not None:
        if len(window) != 2 or min(window) < 0:
            raise ValueError(f"window={window!r} must be (keys before, keys after), neither negative")
        rows = None if mask is None else (1,) * (4 - mask.dim()) + tuple(mask.shape)
        if bias is not None or (rows is not None and (rows[1:3] != (1, 1) or rows[3] != k.shape[1])):
            raise ValueError("window goes with a mask of keys, (B or 1, 1, 1, S), and without a bias")
    if not 0.0 <= drop < 1.0:
        raise ValueError(f"drop={drop!r} must be within [0, 1)")
    if q.shape[1] == 0 or k.shape[1] == 0:
        return q.new_zeros(*q.shape[:3], v.shape[3])
    scale = q.shape[3] ** -0.5 if scale is None else scale
    chosen = choose_backend("softmax", backend, dtype=q.dtype, device=q.device)
    return chosen.run(q, k, v, causal=causal, mask=mask, bias=bias, window=window, scale=scale, drop=drop)
