"""Calls that launch every kernel of the damped EMA: one chunk and several, one direction and both."""

from functools import partial

import torch

from seqzoo.kernels.ema import Coefficients, ema


def call(dtype, batch, dim, averages, *, both):
    x = torch.zeros(batch, 512, dim, dtype=dtype, requires_grad=True)
    ahead, behind = (Coefficients(*torch.zeros(3, dim, averages)) for _ in range(2))
    ema(x, ahead, behind if both else None, backend="triton")[0].sum().backward()


def cases():
    yield "bfloat16, several chunks, both directions", partial(call, torch.bfloat16, 1, 512, 16, both=True)
    yield "float32, one chunk", partial(call, torch.float32, 16, 1000, 3, both=False)
