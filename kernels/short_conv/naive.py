"""The short causal convolution by its formula, differentiated by autograd: the oracle of the other backends.

R rows, M places, C channels, K taps.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def naive_short_conv(x: Tensor, state: Tensor, weight: Tensor, bias: Tensor, *, silu: bool) -> Tensor:
    """y_t = act(bias + sum_k weight_k x_{t-K+1+k}), arguments as in `short_conv`; weight (K, C), in the sums' dtype."""
    source = torch.cat((state, x), 1).to(weight.dtype)
    y = bias + sum(source[:, k : k + x.shape[1]] * tap for k, tap in enumerate(weight))
    return F.silu(y) if silu else y
