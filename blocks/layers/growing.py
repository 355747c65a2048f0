"""Tensors that grow along their second dimension, a few entries at a time, without copying what they hold."""

from __future__ import annotations

from threading import Lock

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary


class _Buffer:
    """tensor: (B, capacity, ...), of which the first `filled` entries belong to somebody."""

    __slots__ = ("filled", "tensor")

    def __init__(self, tensor: Tensor, filled: int) -> None:
        self.tensor, self.filled = tensor, filled


# The buffer behind a tensor that `grown` gave; a copy, or one that went through any other function, has none.
_buffers = WeakTensorKeyDictionary()
_lock = Lock()


def grown(old: Tensor, new: Tensor, *, most: int | None = None) -> Tensor:
    """torch.cat((old, new), 1) in the dtype of `old`, as a value: nothing that `old` or another tensor holds changes.

    old: (B, S, ...). new: (B, L, ...). most: S + L never gets above this. Where no gradient is recorded the result is
    the front of a buffer with room for a quarter more, which the next call writes to, so that a token costs the same
    after any number of them; the first of several calls with one `old` takes the room, the others copy. With
    gradients, and in compiled code, this is torch.cat.
    """
    new = new.to(old.dtype)
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or type(old) is not Tensor or _captured(old):
        return torch.cat((old, new), 1)
    begin, end = old.shape[1], old.shape[1] + new.shape[1]
    with _lock:
        buffer: _Buffer | None = _buffers.get(old)
        if buffer is not None and buffer.filled == begin and buffer.tensor.shape[1] >= end:
            buffer.filled = end
        else:
            buffer = None
    if buffer is None:
        capacity = end + max(end // 4, 64)
        if most is not None:
            capacity = max(min(capacity, most), end)
        buffer = _Buffer(old.new_empty(old.shape[0], capacity, *old.shape[2:]), end)
        buffer.tensor[:, :begin] = old
    # Past what anybody holds, so unseen by what autograd has kept of it for a backward pass.
    buffer.tensor.data[:, begin:end] = new
    found = buffer.tensor[:, :end]
    with _lock:
        _buffers[found] = buffer
    return found


def _captured(tensor: Tensor) -> bool:
    """Inside a CUDA graph, whose replays would not see how far a buffer is filled."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
