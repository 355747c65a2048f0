"""Block-sparse attention: each query, or block of queries, sees the keys of a few blocks that were chosen for it."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose_backend, register_backend
from ..triton_support import lazily, unusable
from .chunked import chunked_block_sparse
from .naive import naive_block_sparse
from .routing import block_means, block_sums, route

__all__ = ["block_means", "block_sparse_attention", "block_sums", "route"]

OP = "block_sparse"
register_backend(
    OP,
    "triton",
    lazily(".fused", "fused_block_sparse", __name__),
    note="one pass over the chosen keys, scores on the chip",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    devices=("cuda",),
    limits={"key": 256, "value": 256},
    interpretable=True,
    probe=unusable,
)
register_backend(OP, "chunked", chunked_block_sparse, note="no L x S tensor, no copies of keys that last")
register_backend(OP, "naive", naive_block_sparse, note="the formula, quadratic", portable=True)


def block_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    index: Tensor,
    *,
    q_block: int,
    k_block: int,
    weight: Tensor | None = None,
    q_position: Tensor | None = None,
    key_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention in which query block g sees the keys of the blocks index[g], jointly: (B, L, H, V).

    Sequences are cut into blocks of q_block queries and k_block keys, the last ones partial. With j in the chosen
    blocks, o_i = sum_j softmax_j(scale w q_i.k_j) w v_j, where w is the weight of j's block.

    q: (B, L, H, K). k: (B, S, H, K). v: (B, S, H, V).
    index: int64 (B, Hr, ceil(L / q_block), T), blocks in [0, ceil(S / k_block)), distinct for each query block, or -1
        for none. Hr = 1 routes all heads alike, Hr = H each its own way.
    weight: like index, None for 1.
    q_position: int64 (B, L): query i sees keys up to this place, None for all. Causal attention of a whole row has
        arange(L) here.
    key_mask: bool (B, S), True = real. scale: K ** -0.5 where None.
    backend: "auto", "triton", "chunked" or "naive" (the oracle, which also differentiates twice).

    The softmax is float32 or wider, under autocast too. A query that sees nothing gives 0 and zero gradient. With
    q_position, an output does not depend on later queries and their choices, bit by bit. Raises ValueError for shapes
    that do not go together and for a backend that cannot run.
    """
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if any(t.dim() != 4 for t in (q, k, v)) or k.shape[:3] != v.shape[:3]:
        raise ValueError(f"{OP}: {shapes} must be (B, L, H, K), (B, S, H, K), (B, S, H, V)")
    (batch, length, heads, width), source = q.shape, k.shape[1]
    if (k.shape[0], k.shape[2], k.shape[3]) != (batch, heads, width) or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"{OP}: {shapes} ({q.dtype}, {k.dtype}, {v.dtype}) do not go together")
    for name, value in (("q_block", q_block), ("k_block", k_block)):
        if value < 1:
            raise ValueError(f"{OP}: {name}={value} must be at least 1")
    groups = -(-length // q_block)
    if index.dim() != 4 or index.shape[::2] != (batch, groups) or index.shape[1] not in (1, heads):
        raise ValueError(
            f"{OP}: index {tuple(index.shape)} must be ({batch}, 1 or {heads}, {groups}, T) "
            f"for {length} queries in blocks of {q_block}"
        )
    if index.dtype != torch.int64:
        raise ValueError(f"{OP}: index is {index.dtype}, expected int64")
    if weight is not None and weight.shape != index.shape:
        raise ValueError(f"{OP}: weight {tuple(weight.shape)} must have the shape of index {tuple(index.shape)}")
    for name, given, kind, shape in (
        ("q_position", q_position, torch.int64, (batch, length)),
        ("key_mask", key_mask, torch.bool, (batch, source)),
    ):
        if given is not None and (given.dtype != kind or given.shape != shape):
            raise ValueError(f"{OP}: {name} is {given.dtype} {tuple(given.shape)}, expected {kind} {shape}")
    if 0 in (batch, length, source, index.shape[3]):
        return v.new_zeros(batch, length, heads, v.shape[3])
    sizes = {"key": width, "value": v.shape[3]}
    chosen = choose_backend(OP, backend, dtype=q.dtype, device=q.device, sizes=sizes)
    return chosen.run(
        q,
        k,
        v,
        index,
        weight,
        q_position,
        key_mask,
        q_block=q_block,
        k_block=k_block,
        scale=width**-0.5 if scale is None else scale,
    )
