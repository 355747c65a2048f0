"""A depthwise convolution over time through torch's direct convolution of the CPU (oneDNN), without its transposes.

(R, M, C) is a picture of one row in channels-last memory, which oneDNN reads as it lies: one pass through all taps
instead of one per tap. No output knows of an input that its taps do not read, not even by rounding.

R rows, M places, C channels, K taps, n places of a block.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Numbers of a block: 1 MiB of float32, so that a block's outputs are still in cache for what follows.
BLOCK = 1 << 18


def serves(x: Tensor) -> bool:
    """Whether `correlate` may be called: its own gradient is taken by the callers, float64 is left to plain torch."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and torch.backends.mkldnn.is_available()


def blocks(rows: int, first: int, last: int, channels: int) -> list[tuple[slice, int, int]]:
    """(rows, first place, last place): whole rows together where they are short, else a row in pieces."""
    length = max(1, last - first)
    together = max(1, BLOCK // max(1, length * channels))
    piece = max(64, BLOCK // max(1, together * channels))
    return [
        (slice(row, min(row + together, rows)), place, min(place + piece, last))
        for row in range(0, rows, together)
        for place in range(first, last, piece)
    ]


def correlate(
    source: Tensor, weight: Tensor, bias: Tensor | None, *, dilation: int, shift: int, first: int, last: int
) -> Tensor:
    """y_t = bias + sum_k weight_k source_{t - shift + k dilation} for first <= t < last; zeros beyond the source.

    source: (R, M, C) float32. weight: (K, C). bias: (C,). Returns (R, last - first, C).
    """
    length, taps = source.shape[1], weight.shape[0]
    # Tap k reads first - shift + k dilation .. last - 1 - shift + k dilation: leave out what reads zeros only.
    low = max(0, -((last - 1 - shift) // dilation))
    high = min(taps, (length - 1 - first + shift) // dilation + 1)
    if low >= high or length == 0:
        y = source.new_zeros(source.shape[0], last - first, source.shape[2])
        return y if bias is None else y.add_(bias)
    start, stop = first - shift + low * dilation, last - shift + (high - 1) * dilation
    part = source[:, max(0, start) : min(length, stop)]
    if start < 0 or stop > length:
        part = F.pad(part, (0, 0, max(0, -start), max(0, stop - length)))
    picture = part.transpose(1, 2).unsqueeze(2)
    kernel = weight[low:high].t().contiguous().view(-1, 1, 1, high - low)
    with torch.autocast("cpu", enabled=False):
        y = torch.conv2d(picture, kernel, bias, dilation=(1, dilation), groups=source.shape[2])
    return y.squeeze(2).transpose(1, 2)
