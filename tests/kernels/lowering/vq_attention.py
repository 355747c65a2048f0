"""Calls that launch both kernels of VQ attention: with a window, causal or not, and without one."""

from functools import partial

import torch

from seqzoo.kernels.vq_attention import vq_attention


def call(dtype, width, chunk, *, causal=False, special=False):
    batch, length, heads, codes = 1, 1024, 2, 256
    q = torch.zeros(batch, length, heads, width, dtype=dtype)
    vq_attention(
        q,
        None if chunk is None else q,
        q,
        torch.zeros(batch, length, heads, dtype=torch.int64),
        torch.zeros(heads, codes, width, dtype=dtype),
        chunk_size=chunk,
        causal=causal,
        bias=torch.zeros(heads, 2 * chunk if causal else 4 * chunk - 1) if special else None,
        lengths=torch.ones(batch, dtype=torch.int64) if special else None,
        backend="triton",
    )


def cases():
    for width in (64, 128, 256):
        for dtype in (torch.bfloat16, torch.float32):
            yield f"{dtype} width {width}", partial(call, dtype, width, 64, causal=True, special=width == 128)
    yield "both ways", partial(call, torch.bfloat16, 128, 64)
    yield "everything, both ways", partial(call, torch.float16, 60, 64, special=True)
    yield "no window", partial(call, torch.bfloat16, 64, None)
