"""Calls that launch every kernel of the selective scan: one chunk and several, with and without what is optional."""

from functools import partial

import torch

from seqzoo.kernels.selective_scan import selective_scan


def call(dtype, batch, channels, states, *, grad, extra):
    length = 512
    u, dt = (torch.zeros(batch, length, channels, dtype=dtype, requires_grad=grad) for _ in range(2))
    b, c = (torch.zeros(batch, length, states, dtype=dtype) for _ in range(2))
    skip = torch.ones(channels) if extra else None
    initial = torch.zeros(batch, channels, states) if extra else None
    y, h = selective_scan(
        u, dt, -torch.ones(channels, states), b, c,
        skip=skip, initial_state=initial, return_state=True, backend="triton",
    )  # fmt: skip
    if grad:
        (y.sum() + h.sum()).backward()


def cases():
    yield "bfloat16, several chunks", partial(call, torch.bfloat16, 1, 1536, 16, grad=True, extra=True)
    yield "float32, several chunks", partial(call, torch.float32, 1, 200, 16, grad=True, extra=False)
    yield "bfloat16, one chunk, inference", partial(call, torch.bfloat16, 16, 2048, 16, grad=False, extra=True)
    yield "float16, 64 states", partial(call, torch.float16, 1, 130, 64, grad=True, extra=True)
