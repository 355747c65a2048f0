"""Calls that launch the measure of ProbSparse attention: samples by query or block, hashed or given, with pads."""

from functools import partial

import torch

from seqzoo.kernels.prob_sparse import prob_sparse_attention


def call(dtype, width, sampling, *, special=False):
    q = torch.zeros(2, 512, 2, width, dtype=dtype)
    index = torch.zeros(512 if sampling == "query" else 4, 30, dtype=torch.int64)
    prob_sparse_attention(
        q,
        q,
        q,
        sampling=sampling,
        seed=0,
        sample_index=index if special else None,
        key_mask=torch.ones(2, 512, dtype=torch.bool) if special else None,
        measure_divisor="samples" if special else "keys",
        backend="triton",
    )


def cases():
    for dtype in (torch.bfloat16, torch.float32):
        for width in (64, 128, 256):
            for sampling in ("query", "block"):
                yield f"{dtype} width {width} by {sampling}", partial(call, dtype, width, sampling)
    for sampling in ("query", "block"):
        yield f"given sample, pads, by {sampling}", partial(call, torch.float16, 60, sampling, special=True)
