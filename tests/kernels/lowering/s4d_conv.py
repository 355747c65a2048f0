"""Calls that launch every kernel of the S4D convolution: one piece and several, both directions, with states."""

from functools import partial

import torch

from seqzoo.kernels.s4d_conv import s4d_conv


def call(dtype, shape, states, *, both):
    u = torch.zeros(shape, dtype=dtype, requires_grad=True)
    log_a, b, c, c_reverse = torch.zeros(4, shape[2], states, dtype=torch.complex64)
    if both:
        s4d_conv(u, log_a, b, c, c_reverse=c_reverse, backend="triton")[0].sum().backward()
        return
    state = torch.zeros(shape[0], shape[2], states, 2)
    y, last = s4d_conv(u, log_a, b, c, state=state, output_state=True, backend="triton")
    (y.sum() + last.sum()).backward()


def cases():
    yield "bfloat16, 32 states, pieces", partial(call, torch.bfloat16, (1, 2049, 8), 32, both=False)
    yield "float32, 32 states, both directions", partial(call, torch.float32, (1, 1025, 4), 32, both=True)
    yield "float32, 64 states", partial(call, torch.float32, (2, 1025, 256), 64, both=False)
