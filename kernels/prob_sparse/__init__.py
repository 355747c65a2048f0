"""ProbSparse attention (Informer): only the queries that a sample of keys shows to be peaked attend."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from ..dispatch import choose_backend, register_backend
from ..triton_support import lazily, unusable
from .chunked import prob_sparse_chunked
from .naive import prob_sparse_naive
from .portable import prob_sparse_portable
from .sampling import BLOCK, KeySample, budget

__all__ = ["BLOCK", "KeySample", "budget", "prob_sparse_attention"]

register_backend(
    "prob_sparse",
    "triton",
    lazily(".fused", "fused_prob_sparse", __name__),
    note="no copy of the sampled keys",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    devices=("cuda",),
    limits={"key": 256},
    interpretable=True,
    probe=unusable,
)
register_backend("prob_sparse", "chunked", prob_sparse_chunked, note="no L x S tensor")
register_backend("prob_sparse", "naive", prob_sparse_naive, note="the formula, quadratic")
register_backend("prob_sparse", "portable", prob_sparse_portable, note="dense, for exports", portable=True)


def prob_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    factor: int = 5,
    measure_divisor: Literal["keys", "samples"] = "keys",
    key_mask: Tensor | None = None,
    query_mask: Tensor | None = None,
    masked: bool = False,
    lazy: Literal["sum", "mean"] = "sum",
    sample_index: Tensor | None = None,
    sampling: Literal["query", "block"] = "query",
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    scale: float | None = None,
    backend: Literal["auto", "triton", "chunked", "naive"] = "auto",
) -> Tensor:
    """ProbSparse attention, arXiv:2012.07436, in O(L log L) time and memory.

    With U = min(factor * ceil(ln S), S) keys sampled per query, with replacement, the measure of query i is
    M_i = max_j s_ij - sum_j s_ij / divisor over its sample, s = q k^T. The u = min(factor * ceil(ln L), L)
    queries of largest M (of equals the first; a GPU and compiled code leave that open), per row and head, attend to all
    keys; every other query is lazy and takes the mean of V.

    q: (B, L, H, K). k: (B, S, H, K). v: (B, S, H, V). Returns (B, L, H, V).
    measure_divisor: "keys" divides the sum by S, as the published code does; "samples" by U, as its text
        says.
    key_mask, query_mask: bool (B, S), (B, L), True = real. u and U then come from each row's own counts, pads
        are neither sampled nor selected nor averaged, and outputs at padded queries are zero.
    masked: the mode of Informer's decoder, for L == S: selected queries see the keys up to their own
        position, lazy ones take V accumulated up to it, as a sum (published) or a mean (`lazy`). This is NOT
        causal: which queries are selected, and the keys sampled to decide it, depend on the future.
    sampling: "query" draws a sample for each query (published); "block" one for every 128 consecutive
        queries, which leaves each query's estimate unbiased, makes neighbours share its error, and turns the
        gather into a product.
    sample_index: the sample itself, int64 (L, U), or (ceil(L / 128), U) for blocks; entries count the row's
        real keys.
    generator, seed: where the sample comes from: the seed (an int or a scalar tensor), else a draw from the
        generator, else from torch's own.
    scale: K ** -0.5 where None; it does not enter the measure.

    The sample is shared by batch and heads, as published. The selection is discrete and carries no gradient;
    gradients flow through the selected scores and V. Differs from the published code in that one position
    keeps one query. Raises ValueError for a bad option or shape.
    """
    batch, length, heads, _ = q.shape
    source = k.shape[1]
    if k.shape[:3] != v.shape[:3] or k.shape[0] != batch or k.shape[2:] != q.shape[2:]:
        raise ValueError(f"shapes of q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not go together")
    for name, value, choices in (
        ("measure_divisor", measure_divisor, ("keys", "samples")),
        ("lazy", lazy, ("sum", "mean")),
        ("sampling", sampling, ("query", "block")),
    ):
        if value not in choices:
            raise ValueError(f"{name}={value!r}: choose from {', '.join(choices)}")
    if factor < 1:
        raise ValueError(f"factor={factor!r} must be at least 1")
    if masked and length != source:
        raise ValueError(f"masked=True needs as many queries as keys, got L={length} and S={source}")
    for name, mask, size in (("key_mask", key_mask, source), ("query_mask", query_mask, length)):
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, size)):
            raise ValueError(f"{name} is {mask.dtype} {tuple(mask.shape)}, expected bool ({batch}, {size})")
    if 0 in (batch, length, source):
        return q.new_zeros(batch, length, heads, v.shape[-1])
    sample = _key_sample(q, source, factor, sampling, sample_index, generator, seed)
    sizes = {"key": q.shape[-1]}
    return choose_backend("prob_sparse", backend, dtype=q.dtype, device=q.device, sizes=sizes).run(
        q,
        k,
        v,
        sample=sample,
        factor=factor,
        divide_by_keys=measure_divisor == "keys",
        key_mask=key_mask,
        query_mask=query_mask,
        masked=masked,
        lazy_mean=lazy == "mean",
        block=BLOCK if sampling == "block" else 1,
        scale=q.shape[-1] ** -0.5 if scale is None else scale,
    )


def _key_sample(
    q: Tensor,
    source: int,
    factor: int,
    sampling: str,
    index: Tensor | None,
    generator: torch.Generator | None,
    seed: int | Tensor | None,
) -> KeySample:
    if index is not None:
        rows = q.shape[1] if sampling == "query" else -(-q.shape[1] // BLOCK)
        if index.dtype != torch.int64 or index.dim() != 2 or index.shape[0] != rows or index.shape[1] == 0:
            raise ValueError(f"sample_index is {index.dtype} {tuple(index.shape)}, expected int64 ({rows}, U)")
        if int(index.min()) < 0 or int(index.max()) >= source:
            raise ValueError(f"sample_index must lie in [0, {source}), it spans {int(index.min())}..{int(index.max())}")
        return KeySample(index.new_zeros(()), index.to(q.device), index.shape[1], factor)
    if isinstance(seed, Tensor):
        start = seed.to(q.device, torch.int64) & 0x7FFFFFFF
    elif seed is not None:
        start = torch.full((), seed & 0x7FFFFFFF, dtype=torch.int64, device=q.device)
    else:
        device = q.device if generator is None else generator.device
        start = torch.randint(0, 2**31 - 1, (), generator=generator, device=device).to(q.device)
    return KeySample(start, None, budget(source, factor), factor)
