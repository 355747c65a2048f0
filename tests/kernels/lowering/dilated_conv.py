"""Calls that launch every kernel of the dilated convolution: causal with a tail, centred, few and many taps."""

from functools import partial

import torch

from seqzoo.kernels.dilated_conv import dilated_conv


def call(dtype, taps, *, causal):
    x = torch.zeros(2, 4096, 512, dtype=dtype, requires_grad=True)
    tail = torch.zeros(2, (taps - 1) * 16, 512) if causal else None
    weight = torch.zeros(512, 1, taps)
    dilated_conv(x, weight, dilation=16, causal=causal, tail=tail, backend="triton")[0].sum().backward()


def cases():
    yield "bfloat16, causal", partial(call, torch.bfloat16, 17, causal=True)
    yield "float32, centred", partial(call, torch.float32, 7, causal=False)
