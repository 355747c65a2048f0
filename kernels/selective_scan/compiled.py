"""The selective scan in C++ (compiled.cpp), for a CPU: optional, built when first asked for by name.

Token after token with the channels in the lanes of vectors: of the states only the one before each chunk reaches
memory, and the exponential is a polynomial. The backward pass walks the chunks from the end (README.md).

B batch, L length, E channels, N states, T tokens of a chunk, G chunks, K blocks of W lanes.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..compiled import library, refusal
from ..tracing import constant_result

SOURCE = Path(__file__).with_suffix(".cpp")
VECTOR_BYTES = 64  # of the widest vectors of the source: narrower ones need no more room
CHUNK_STATES = 1024  # T N: four buffers of as many vectors fit in the second cache of a core
TASK = 1 << 15  # updates of a state that are worth a thread


@constant_result
def refusal_here() -> str | None:
    """Why this form cannot run here, or None; a compiler that traces a choice asks once (a path it could not pass)."""
    return refusal(SOURCE)


def default_chunk(length: int, states: int) -> int:
    """Tokens per chunk: between them a state is kept, so at least N, as far as the cache lets them."""
    return max(1, min(max(16, CHUNK_STATES // max(1, states)), length))


def _lanes_last(t: Tensor, dtype: torch.dtype) -> Tensor:
    """In this dtype, its last dimension dense; the other strides are free."""
    t = t.to(dtype).resolve_neg()
    return t if t.stride(-1) == 1 else t.contiguous()


def _call(name: str, sizes: Sequence[int], strided: Sequence[Tensor], tensors: Sequence[Tensor]) -> None:
    """strided: those of any stride of rows and tokens. tensors: in the order of the source, all of one dtype."""
    strides = [t.stride(i) for t in strided for i in (0, 1)]
    kind = "double" if tensors[0].dtype == torch.float64 else "float"
    function = getattr(library(SOURCE), f"{name}_{kind}")
    function(
        (ctypes.c_int64 * len(sizes))(*sizes),
        (ctypes.c_int64 * len(strides))(*strides),
        (ctypes.c_void_p * len(tensors))(*[t.data_ptr() for t in tensors]),
    )


def _split(u: Tensor, states: int) -> tuple[int, int, int]:
    """Threads, and what each gets: ranges of rows, and where those are too few, groups of channels."""
    batch, length, channels = u.shape
    threads = max(1, min(torch.get_num_threads(), batch * length * channels * states // TASK))
    rows = min(batch, threads)
    return threads, rows, max(1, min(threads // max(1, rows), _blocks(channels, u.element_size())))


def _blocks(channels: int, bytes_each: int) -> int:
    return -(-channels * bytes_each // VECTOR_BYTES)


def _saved_shape(u: Tensor, initial: Tensor, chunk: int) -> tuple[int, int, int]:
    """(B, G, K N W): the states before each chunk, packed."""
    size = _blocks(u.shape[2], initial.element_size()) * VECTOR_BYTES // initial.element_size()
    return u.shape[0], -(-u.shape[1] // chunk), size * initial.shape[2]


@torch.library.custom_op("seqzoo::selective_scan_compiled", mutates_args=())
def _forward(
    u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, initial: Tensor, chunk: int
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, L, E), the states before each chunk (packed) and after the last token (B, E, N)."""
    kind = initial.dtype
    u, dt, b, c = (_lanes_last(t, kind) for t in (u, dt, b, c))
    rate, initial = (a.to(kind) / math.log(2)).contiguous(), initial.contiguous()
    y, last = u.new_empty(u.shape), torch.empty_like(initial)
    saved = u.new_empty(_saved_shape(u, initial, chunk))
    threads, _, groups = _split(u, a.shape[1])
    sizes = (*u.shape, a.shape[1], chunk, threads, groups)
    _call("forward", sizes, (u, dt, b, c), (u, dt, rate, b, c, initial, y, saved, last))
    return y, saved, last


@torch.library.custom_op("seqzoo::selective_scan_compiled_backward", mutates_args=())
def _backward(
    dy: Tensor,
    dlast: Tensor,
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    saved: Tensor,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, a, b, c and the initial state."""
    kind, wanted = saved.dtype, [t.dtype for t in (u, dt, a, b, c)]
    u, dt, b, c, dy = (_lanes_last(t, kind) for t in (u, dt, b, c, dy))
    rate, dlast = (a.to(kind) / math.log(2)).contiguous(), dlast.contiguous()
    threads, rows, groups = _split(u, a.shape[1])
    du, ddt, dinitial = u.new_empty(u.shape), u.new_empty(u.shape), torch.empty_like(dlast)
    da = u.new_empty(rows, *a.shape)  # in parts, one per task, so that no two threads write to one place
    db, dc = (u.new_empty(groups, *b.shape) for _ in range(2))
    sizes = (*u.shape, a.shape[1], chunk, threads, groups)
    tensors = (dy, dlast, u, dt, rate, b, c, saved, du, ddt, da, db, dc, dinitial)
    _call("backward", sizes, (u, dt, b, c, dy), tensors)
    da, db, dc = (t[0] if t.shape[0] == 1 else t.sum(0) for t in (da, db, dc))
    du, ddt, da, db, dc = (t.to(dtype) for t, dtype in zip((du, ddt, da, db, dc), wanted, strict=True))
    return du, ddt, da, db, dc, dinitial


@_forward.register_fake
def _(u, dt, a, b, c, initial, chunk):
    y = u.new_empty(u.shape, dtype=initial.dtype)
    return y, y.new_empty(_saved_shape(u, initial, chunk)), initial.new_empty(initial.shape)


@_backward.register_fake
def _(dy, dlast, u, dt, a, b, c, saved, chunk):
    return (*(t.new_empty(t.shape) for t in (u, dt, a, b, c)), dlast.new_empty(dlast.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, _, chunk = inputs
    ctx.save_for_backward(*tensors, output[1])
    ctx.chunk = chunk


def _gradient(ctx: Any, dy: Tensor, dsaved: Tensor, dlast: Tensor) -> tuple[Tensor | None, ...]:
    return (*_backward(dy, dlast, *ctx.saved_tensors, ctx.chunk), None)


_forward.register_autograd(_gradient, setup_context=_setup_context)


def compiled_selective_scan(
    u: Tensor,
    dt: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    initial: Tensor,
    *,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive_selective_scan` in one pass; no second derivatives."""
    length = u.shape[1]
    chunk = chunk_size or default_chunk(length, a.shape[1])
    y, _, last = _forward(u, dt, a, b, c, initial, max(1, min(chunk, length)))
    return y, last
