"""Products of each query with its own sample of keys on the CPU: a product of matrices at chosen places only.

The keys are read in place, so no sample is ever gathered. B batch, L queries, S keys, H heads, K width, U keys sampled.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

# Queries in one product: its (rows, U) values stay in a processor's cache.
_ROWS = 4096


@torch.library.custom_op("seqzoo::prob_sparse_sampled", mutates_args=(), device_types="cpu")
def sampled_extent(q: Tensor, k: Tensor, place: Tensor, valid: Tensor | None, width: int) -> tuple[Tensor, Tensor]:
    """The largest of q_i . k_j over the sample of query i, and their sum: (B, L, H) both, float32 or wider.

    q: (B, L, H, K). k: (B, S, H, K). place: int32 (B or 1, L, U), the sampled keys of each query. valid: bool, the
    same shape: which of them count; None for all. No gradient.
    """
    batch, length, heads, _ = q.shape
    dtype = torch.promote_types(q.dtype, torch.float32)
    source = k.shape[1]
    most, total = (q.new_empty(batch, length, heads, dtype=dtype) for _ in range(2))
    start = torch.arange(0, (min(_ROWS, length) + 1) * width, width, dtype=place.dtype)
    blank = q.new_zeros(min(_ROWS, length) * width, dtype=dtype)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support")
        for b in range(batch):
            columns = place[min(b, len(place) - 1)]
            real = None if valid is None else valid[min(b, len(valid) - 1)]
            for h in range(heads):
                queries, keys = q[b, :, h].to(dtype), k[b, :, h].to(dtype).contiguous().T
                for first in range(0, length, _ROWS):
                    rows = slice(first, min(first + _ROWS, length))
                    number = rows.stop - first
                    at = torch.sparse_csr_tensor(
                        start[: number + 1],
                        columns[rows].flatten(),
                        blank[: number * width],
                        (number, source),
                        check_invariants=False,
                    )
                    found = torch.sparse.sampled_addmm(at, queries[rows], keys, beta=0.0)
                    s = found.values().view(number, width)
                    if real is None:
                        most[b, rows, h], total[b, rows, h] = s.amax(1), s.sum(1)
                    else:
                        most[b, rows, h] = s.masked_fill(~real[rows], -torch.inf).amax(1)
                        total[b, rows, h] = s.masked_fill(~real[rows], 0.0).sum(1)
    return most, total


@sampled_extent.register_fake
def _(q, k, place, valid, width):
    shape, dtype = q.shape[:3], torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(shape, dtype=dtype), q.new_empty(shape, dtype=dtype)
