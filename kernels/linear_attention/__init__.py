"""Linear attention: a product of feature maps replaces the softmax, so that the past sums into a state."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose_backend, register_backend
from ..triton_support import lazily, unusable
from .chunked import chunked_linear_attention
from .naive import LinearState, accumulation_dtype, naive_linear_attention
from .portable import portable_linear_attention

__all__ = ["LinearState", "accumulation_dtype", "linear_attention", "linear_summary"]

OP = "linear_attention"
FEATURES = ("state", "mask", "varlen")
register_backend(
    OP,
    "triton",
    lazily(".fused", "fused_linear_attention", __name__),
    note="one pass over chunks on a GPU",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    devices=("cuda",),
    features=FEATURES,
    limits={"key": 256, "value": 256},
    interpretable=True,
    probe=unusable,
)
register_backend(OP, "chunked", chunked_linear_attention, note="linear in the length", features=FEATURES)
register_backend(OP, "naive", naive_linear_attention, note="dense kernel matrix", features=FEATURES)
register_backend(
    OP,
    "portable",
    portable_linear_attention,
    note="torch's operations, for exports",
    features=("state", "mask"),
    portable=True,
)


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    normalize: bool = True,
    eps: float = 1e-6,
    key_mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    initial_state: LinearState | None = None,
    return_state: bool = False,
    scale: float = 1.0,
    backend: str = "auto",
) -> tuple[Tensor, LinearState | None]:
    """Linear attention of q and k that already went through their feature map.

    o_i = sum_j w_ij v_j / (sum_j w_ij + eps), w_ij = scale q_i . k_j, over all j or, if causal, over j <= i
    (arXiv:2006.16236, sections 3.2 and 3.3; eps is ours, it makes rows without any key zero). With
    normalize=False the sum is not divided. Sums are kept in float32 (float64 for float64 inputs), under
    autocast too.

    q: (B, L, H, K). k: (B, S, H, K), S = L if causal. v: (B, S, H, V), of the same dtype.
    key_mask: bool (B, S), False for keys that do not exist.
    cu_seqlens: int32 (N+1,), bounds of N sequences packed into one row (B = 1, S = L).
    initial_state: sums over keys before the first, as an earlier call returned them, with N rows if packed.
    backend: "auto", "triton", "chunked" or "naive" (the oracle, which also differentiates twice).
    Returns o (B, L, H, V) and, with return_state, the sums over all keys so far, else None.
    Raises ValueError for shapes, dtypes or a backend that cannot serve.
    """
    _check(q, k, v, causal, normalize, eps, key_mask, cu_seqlens, initial_state)
    choice = choose_backend(
        OP,
        backend,
        dtype=q.dtype,
        device=q.device,
        sizes={"key": q.shape[3], "value": v.shape[3]},
        state=initial_state is not None or return_state,
        mask=key_mask is not None,
        varlen=cu_seqlens is not None,
    )
    if key_mask is not None:
        k = k.masked_fill(~key_mask[:, :, None, None], 0)
    o, state = choice.run(
        q,
        k,
        v,
        initial_state,
        causal=causal,
        normalize=normalize,
        eps=eps,
        scale=scale,
        cu_seqlens=cu_seqlens,
        return_state=return_state,
    )
    return o, state if return_state else None


def linear_summary(k: Tensor, v: Tensor) -> LinearState:
    """What the tokens add to the sums: k (B, S, H, K), through its feature map, and v (B, S, H, V)."""
    wide = accumulation_dtype(v.dtype)
    with torch.autocast(v.device.type, enabled=False):
        k = k.to(wide)
        return LinearState(torch.einsum("bshk,bshv->bhkv", k, v.to(wide)), k.sum(1))


def _check(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    causal: bool,
    normalize: bool,
    eps: float,
    key_mask: Tensor | None,
    cu_seqlens: Tensor | None,
    initial: LinearState | None,
) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(t.dim() != 4 for t in (q, k, v)):
        raise ValueError(f"linear_attention: {shapes} must be (B, L, H, K), (B, S, H, K), (B, S, H, V)")
    batch, length, heads, key = q.shape
    source, value = v.shape[1], v.shape[3]
    if k.shape != (batch, source, heads, key) or v.shape != (batch, source, heads, value):
        raise ValueError(f"linear_attention: {shapes} do not fit (B, L, H, K), (B, S, H, K), (B, S, H, V)")
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"linear_attention: q, k, v must share a dtype, they are {q.dtype}, {k.dtype}, {v.dtype}")
    if eps < 0:
        raise ValueError(f"linear_attention: eps={eps} must not be negative")
    if (causal or cu_seqlens is not None) and source != length:
        raise ValueError(f"linear_attention: causal or packed attention needs S = L, got {shapes}")
    if key_mask is not None and (key_mask.dtype != torch.bool or key_mask.shape != (batch, source)):
        raise ValueError(
            f"linear_attention: key_mask is {key_mask.dtype} {tuple(key_mask.shape)}, expected bool {(batch, source)}"
        )
    rows = batch
    if cu_seqlens is not None:
        if batch != 1 or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
            raise ValueError(
                f"linear_attention: cu_seqlens {tuple(cu_seqlens.shape)} must be (N+1,), "
                f"for one packed row, B = {batch}"
            )
        rows = cu_seqlens.shape[0] - 1
    if initial is not None:
        got = tuple(initial.s.shape), None if initial.z is None else tuple(initial.z.shape)
        expected = (rows, heads, key, value), (rows, heads, key) if normalize else None
        if got != expected:
            raise ValueError(f"linear_attention: initial_state has shapes {got}, expected {expected}")
