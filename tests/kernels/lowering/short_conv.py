"""Calls that launch every kernel of the short convolution, in the dtypes and numbers of taps in use."""

from functools import partial

import torch

from seqzoo.kernels.short_conv import short_conv


def call(dtype, taps, *, silu):
    x = torch.zeros(2, 4096, 1536, dtype=dtype, requires_grad=True)
    bias = torch.zeros(1536) if silu else None
    short_conv(x, torch.zeros(1536, taps), bias=bias, silu=silu, backend="triton").sum().backward()


def cases():
    yield "bfloat16, 4 taps", partial(call, torch.bfloat16, 4, silu=True)
    yield "float32, 4 taps", partial(call, torch.float32, 4, silu=True)
    yield "float16, 8 taps", partial(call, torch.float16, 8, silu=False)
