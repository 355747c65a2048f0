"""Calls that launch every kernel of the associative scan: over a middle and the last axis, one chunk and several."""

from functools import partial

import torch

from seqzoo.kernels.associative_scan import associative_scan


def call(dtype, shape, *, dim, reverse, broadcast=False):
    a = torch.zeros(shape[-1:] if broadcast else shape, dtype=dtype, requires_grad=True)
    x = torch.zeros(shape, dtype=dtype, requires_grad=True)
    associative_scan(a, x, dim=dim, reverse=reverse, backend="triton").sum().backward()


def cases():
    yield "bfloat16, chunks", partial(call, torch.bfloat16, (1, 4096, 512), dim=1, reverse=False)
    yield "float32, one chunk", partial(call, torch.float32, (32, 64, 1024), dim=1, reverse=True, broadcast=True)
    yield "bfloat16, last axis", partial(call, torch.bfloat16, (512, 2048), dim=1, reverse=False)
