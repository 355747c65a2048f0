"""The damped EMA in chunks: a dense Toeplitz block inside each chunk and a carried state between them. Exact.

A real diagonal state space, so the layout, the Toeplitz blocks and the scan are those of `s4d_conv`. A truncated
average also reads the inputs that leave its window, x_{t-W}, with the weight -q^W: to a chunk they are further inputs.
Letters: D channels, N EMA dimensions, T chunk, G chunks, W truncation, V inputs of a chunk: T, 2 T or 3 T.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from ..s4d_conv.chunked import from_channels, last_chunk, scan, to_channels, toeplitz
from ..s4d_conv.spans import chunk_recurrence
from .naive import Coefficients, EmaState

CHUNK = 32


class Tables(NamedTuple):
    """What one average needs in a chunk, per channel. The leaving inputs, where there are any, come before the others.

    power: (D, N, T + 1), q^0 .. q^T. blocks: (D, T, T) each, inputs to outputs. write: (D, V, N), inputs to the state
    at the chunk's end. read: (D, N, T), the state before the chunk to its outputs.
    """

    power: Tensor
    blocks: list[Tensor]
    write: Tensor
    read: Tensor


def make_tables(
    weights: Coefficients,
    chunk: int,
    truncation: int | None,
    *,
    skip: Tensor | None = None,
    mirrored: bool = False,
) -> Tables:
    """mirrored: for an average that runs from the end, so that the leaving inputs come after the others."""
    log_q, b, c = weights
    power = torch.exp(log_q.unsqueeze(-1) * torch.arange(chunk + 1, device=b.device, dtype=b.dtype))
    drives = [b] if truncation is None else [-b * torch.exp(log_q * truncation), b]
    kernels = [((c * drive).unsqueeze(1) @ power[..., :chunk]).squeeze(1) for drive in drives]
    if skip is not None:
        kernels[-1] = torch.cat((kernels[-1][:, :1] + skip.unsqueeze(1), kernels[-1][:, 1:]), 1)
    blocks = [toeplitz(kernel, None) for kernel in kernels]
    backwards = power[..., :chunk].flip(-1)
    write = torch.cat([(backwards * drive.unsqueeze(-1)).transpose(1, 2) for drive in drives], 1)
    read = power[..., 1:] * c.unsqueeze(-1)
    if not mirrored:
        return Tables(power, blocks, write, read)
    return Tables(power, [block.flip(1, 2) for block in blocks][::-1], write.flip(1), read.flip(2))


def split(channels: Tensor, chunk: int) -> Tensor:
    """(D, B, L) to (D, B, G, T), padded with zeros."""
    groups = -(-channels.shape[2] // chunk)
    return F.pad(channels, (0, groups * chunk - channels.shape[2])).unflatten(2, (groups, chunk))


def with_tail(channels: Tensor, truncation: int, state: EmaState | None) -> Tensor:
    """The input (D, B, L) after the W inputs before it, (D, B, W + L); its first L entries are x_{t-W}."""
    if state is None or state.tail is None:
        return F.pad(channels, (truncation, 0))
    return torch.cat((state.tail.permute(2, 0, 1), channels), 2)


def advance(drive: Tensor, tables: Tables, state: EmaState | None) -> Tensor:
    """States before each chunk, (D, B, G, N); drive: (D, B, G, V)."""
    start = None if state is None else state.h.transpose(0, 1)
    local = (drive.flatten(1, 2) @ tables.write).unflatten(1, drive.shape[1:3])
    return scan(local, tables.power[..., -1], start)


def final_state(
    drive: Tensor, full: Tensor | None, tables: Tables, states: Tensor, lengths: Tensor | None, length: int
) -> EmaState:
    """The state after the last real token of each row. drive: (D, B, G, V). full: `with_tail`, or None."""
    dim, batch = drive.shape[:2]
    chunk = tables.read.shape[2]
    if lengths is None:
        lengths = torch.full((batch,), length, device=drive.device)
    ends = [last_chunk(part.flatten(2).permute(1, 2, 0), lengths, chunk) for part in drive.split(chunk, 3)]
    _, last, rest = ends[0]
    added = torch.cat([tokens for tokens, _, _ in ends], 2) @ tables.write  # (D, B, N)
    before = states.gather(2, last.view(1, -1, 1, 1).expand(dim, -1, 1, states.shape[3])).squeeze(2)
    h = (tables.power.index_select(2, rest).transpose(1, 2) * before + added).transpose(0, 1)
    if full is None:
        return EmaState(h)
    place = lengths.unsqueeze(1) + torch.arange(full.shape[2] - length, device=full.device)
    return EmaState(h, full.gather(2, place.expand(dim, -1, -1)).permute(1, 2, 0))


def ema_chunked(
    x: Tensor,
    ahead: Coefficients,
    behind: Coefficients | None,
    *,
    skip: Tensor | None,
    truncation: int | None,
    lengths: Tensor | None,
    state: EmaState | None,
    output_state: bool,
) -> tuple[Tensor, EmaState | None]:
    """`ema` with checked arguments, x in fp32 or fp64 with zeros beyond `lengths`."""
    if output_state and lengths is None:
        lengths = torch.full((x.shape[0],), x.shape[1], device=x.device)
    if truncation is not None:
        return _truncated(x, ahead, behind, skip, truncation, lengths, state, output_state)
    chunk = min(CHUNK, x.shape[1])
    first, second = make_tables(ahead, chunk, None, skip=skip), None
    block = first.blocks[0]
    if behind is not None:
        second = make_tables(behind, chunk, None, mirrored=True)
        block = block + second.blocks[0]
    start = None if state is None else state.h.transpose(0, 1).unsqueeze(-1)
    last = (lengths - 1).clamp(min=0) // chunk if output_state and lengths is not None else None
    decay = first.power[..., -1:]
    y, before = chunk_recurrence(x, block, first.write, first.read, decay, start=start, last=last)
    if second is not None and x.shape[1] > chunk:
        decay = second.power[..., -1:]
        y = y.add_(chunk_recurrence(x, None, second.write, second.read, decay, reverse=True)[0])
    if lengths is None or last is None:
        return y, None
    tokens, _, rest = last_chunk(x, lengths, chunk)
    aged = first.power.index_select(2, rest).transpose(1, 2) * before.squeeze(-1)
    return y, EmaState((aged + tokens @ first.write).transpose(0, 1))


def _truncated(
    x: Tensor,
    ahead: Coefficients,
    behind: Coefficients | None,
    skip: Tensor | None,
    truncation: int,
    lengths: Tensor | None,
    state: EmaState | None,
    output_state: bool,
) -> tuple[Tensor, EmaState | None]:
    """Averages over the last (and next) W inputs: all chunks at once, with the inputs that leave the window."""
    batch, length, dim = x.shape
    chunk = min(CHUNK, length)
    channels = to_channels(x)
    full = with_tail(channels, truncation, state)
    parts = [full[..., :length], channels]
    if behind is not None:
        parts.append(F.pad(channels, (0, truncation))[..., -length:])
    drive = torch.cat([split(part, chunk) for part in parts], 3)
    groups = drive.shape[2]
    first = make_tables(ahead, chunk, truncation, skip=skip)
    blocks = first.blocks
    reach = drive[..., : first.write.shape[1]]  # what the average from the start reads
    second = None if behind is None else make_tables(behind, chunk, truncation, mirrored=True)
    if second is not None:
        blocks = [*blocks[:-1], blocks[-1] + second.blocks[0], *second.blocks[1:]]
    y = drive.flatten(1, 2) @ torch.cat(blocks, 1)
    states = None
    if groups > 1 or state is not None or output_state:
        states = advance(reach, first, state)
        y = y.baddbmm_(states.flatten(1, 2), first.read)
    if second is not None and groups > 1:
        later = advance(drive[..., -second.write.shape[1] :].flip(2), second, None).flip(2)
        y = y.baddbmm_(later.flatten(1, 2), second.read)
    y = y.view(dim, batch, groups * chunk)[..., :length]
    if not output_state or states is None:
        return from_channels(y), None
    return from_channels(y), final_state(reach, full, first, states, lengths, length)
