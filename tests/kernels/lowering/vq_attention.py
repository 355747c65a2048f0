"""Calls that launch all kernels of VQ attention: causal or not, without a window, after a state, backwards."""

from functools import partial

import torch

from seqzoo.kernels.vq_attention import empty_state, vq_attention


def call(dtype, width, chunk, *, causal=False, special=False, state=False, length=1024):
    """special: a bias and lengths."""
    batch, heads, codes = 1, 2, 256
    q = torch.zeros(batch, length, heads, width, dtype=dtype, requires_grad=True)
    start = empty_state(batch, chunk, codes, heads, width, width, dtype=dtype) if state else None
    bias = torch.zeros(heads, 2 * chunk if causal else 4 * chunk - 1, requires_grad=True) if special else None
    o, _ = vq_attention(
        q,
        None if chunk is None else q,
        q,
        torch.zeros(batch, length, heads, dtype=torch.int64),
        torch.zeros(heads, codes, width, dtype=dtype),
        chunk_size=chunk,
        causal=causal,
        bias=bias,
        lengths=torch.ones(batch, dtype=torch.int64) if special else None,
        initial_state=start,
        return_state=state,
        backend="triton",
    )
    o.sum().backward()


def cases():
    for width in (64, 128, 256):
        for dtype in (torch.bfloat16, torch.float32):
            yield f"{dtype} width {width}", partial(call, dtype, width, 64, causal=True, special=width == 128)
    yield "both ways", partial(call, torch.bfloat16, 128, 64)
    yield "everything, both ways", partial(call, torch.float16, 60, 64, special=True)
    yield "no window", partial(call, torch.bfloat16, 64, None)
    yield "after a state", partial(call, torch.bfloat16, 64, 64, causal=True, state=True, special=True)
    yield "one token, blocks of one", partial(call, torch.float32, 64, 1, causal=True, state=True, length=1)
