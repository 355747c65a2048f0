"""S4D in chunks: a dense Toeplitz block inside each chunk and a carried state between them. Exact, all
products GEMMs.

Letters: D channels, N complex states per channel, T chunk, G chunks, M = B * G. Complex numbers travel
through the products as interleaved real pairs (2N).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .discretize import powers
from .spans import chunk_recurrence

CHUNK = 32
Recurrence = Callable[..., tuple[Tensor, Tensor]]


class Tables(NamedTuple):
    """Powers of the transition and what is made of them, all per channel.

    power: complex (D, N, T + 1). write: (D, T, 2N), a chunk's input to the state at its end. read: (D, 2N,
    T), the state before a chunk to its outputs.
    """

    power: Tensor
    write: Tensor
    read: Tensor


def pairs(table: Tensor) -> Tensor:
    """complex (D, N, T) to real (D, 2N, T), parts interleaved."""
    return torch.view_as_real(table).transpose(2, 3).flatten(1, 2)


def readout(table: Tensor) -> Tensor:
    """complex (D, N, T) g to real (D, 2N, T) with [Re x, Im x] @ readout = 2 Re sum_n g_n x_n."""
    return pairs(2 * table.conj())


def make_tables(log_a: Tensor, b: Tensor, c: Tensor, chunk: int) -> Tables:
    power = powers(log_a, chunk + 1)
    write = pairs(power[..., :chunk].flip(-1) * b.unsqueeze(-1)).transpose(1, 2)
    return Tables(power, write, readout(power[..., 1:] * c.unsqueeze(-1)))


def s4d_kernel_chunked(log_a: Tensor, weight: Tensor, length: int) -> Tensor:
    """K_l = 2 Re sum_n weight_n a_n^l, (D, length): a^(i + T j) = a^i a^(T j), one real product instead of D
    N L exps."""
    inner = max(1, round(length**0.5))
    outer = -(-length // inner)
    low = powers(log_a, inner) * weight.unsqueeze(-1)
    high = powers(log_a.to(torch.complex128) * inner, outer).to(log_a.dtype)
    return (pairs(high).transpose(1, 2) @ readout(low)).flatten(1)[:, :length]


def to_channels(u: Tensor) -> Tensor:
    """(B, L, D) to (D, B, L)."""
    return u.reshape(-1, u.shape[2]).t().contiguous().view(u.shape[2], u.shape[0], u.shape[1])


def from_channels(y: Tensor) -> Tensor:
    """(D, B, L) to (B, L, D), as a view: a linear map that follows takes it as it lies."""
    return y.permute(1, 2, 0)


def scan(local: Tensor, decay: Tensor, start: Tensor | None) -> Tensor:
    """States before each chunk, (D, B, G, N): s_0 = start, s_g+1 = decay s_g + local_g, complex or real.

    local: (D, B, G, N), what each chunk adds. decay: (D, N). start: (D, B, N) or None for zero.
    """
    decay = decay.unsqueeze(1)
    state = torch.zeros_like(local[:, :, 0]) if start is None else start
    states = [state]
    for added in local.unbind(2)[:-1]:  # unbind: a select per chunk would make backward quadratic in chunks
        state = torch.addcmul(added, decay, state)
        states.append(state)
    return torch.stack(states, 2)


def toeplitz(kernel: Tensor, reverse: Tensor | None) -> Tensor:
    """(D, T, T) with [s, t] = kernel_{t-s} for s <= t and reverse_{s-t-1} (or 0) for s > t."""
    chunk = kernel.shape[1]
    ahead = kernel.new_zeros(kernel.shape[0], chunk - 1) if reverse is None else reverse[:, : chunk - 1].flip(1)
    return torch.cat((ahead, kernel), 1).unfold(1, chunk, 1).flip(1)


def last_chunk(u: Tensor, lengths: Tensor, chunk: int) -> tuple[Tensor, Tensor, Tensor]:
    """The last chunk of each row with its real tokens moved to its end, zeros before them: (D, B, T).

    u: (B, L, D). lengths: int64 (B,). Returns also that chunk's index and its number of tokens, int64 (B,).
    """
    last = (lengths - 1).clamp(min=0) // chunk
    rest = lengths - last * chunk
    place = torch.arange(chunk, device=u.device) - (chunk - rest).unsqueeze(1)  # within the chunk, < 0: empty
    index = (place.clamp(min=0) + (last * chunk).unsqueeze(1)).unsqueeze(2).expand(-1, -1, u.shape[2])
    return (u.gather(1, index) * (place >= 0).unsqueeze(2)).permute(2, 0, 1), last, rest


def final_state(u: Tensor, tables: Tables, before: Tensor, lengths: Tensor) -> Tensor:
    """The state after the last real token of each row, real (B, D, N, 2); before: complex (D, B, N), the state before
    each row's last chunk.

    The tokens of a row's last chunk are moved to its end, so one `write` serves every length and pads change
    nothing.
    """
    tokens, _, rest = last_chunk(u, lengths, tables.write.shape[1])
    added = (tokens.to(tables.write.dtype) @ tables.write).unflatten(2, (-1, 2))  # (D, B, N, 2)
    decay = tables.power.index_select(2, rest).transpose(1, 2)  # (D, B, N)
    return (torch.view_as_real(decay * before) + added).transpose(0, 1)


def s4d_conv_in_chunks(
    recurrence: Recurrence,
    chunk: int,
    u: Tensor,
    log_a: Tensor,
    b: Tensor,
    c: Tensor,
    *,
    skip: Tensor | None,
    c_reverse: Tensor | None,
    lengths: Tensor | None,
    state: Tensor | None,
    output_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """`s4d_conv` with checked arguments, u with zeros beyond `lengths`, in any dtype that `recurrence` takes."""
    batch, length, _ = u.shape
    tables = make_tables(log_a, b, c, chunk)
    power, decay = tables.power[..., :chunk], torch.view_as_real(tables.power[..., chunk])
    kernel = 2 * (power * (b * c).unsqueeze(-1)).real.sum(1)
    if skip is not None:
        kernel = torch.cat((kernel[:, :1] + skip.unsqueeze(1), kernel[:, 1:]), 1)
    reverse = None
    if c_reverse is not None:
        reverse = 2 * (power * (b * c_reverse).unsqueeze(-1)).real.sum(1)
    if output_state and lengths is None:
        lengths = torch.full((batch,), length, device=u.device)
    start = None if state is None else state.transpose(0, 1)
    last = (lengths - 1).clamp(min=0) // chunk if output_state and lengths is not None else None
    y, before = recurrence(u, toeplitz(kernel, reverse), tables.write, tables.read, decay, start=start, last=last)
    if c_reverse is not None and length > chunk:
        write = pairs(power * b.unsqueeze(-1)).transpose(1, 2)
        read = readout(power.flip(-1) * c_reverse.unsqueeze(-1))
        y = y.add_(recurrence(u, None, write, read, decay, reverse=True)[0])
    if lengths is None or last is None:
        return y, None
    return y, final_state(u, tables, torch.view_as_complex(before), lengths)


def s4d_conv_chunked(u: Tensor, log_a: Tensor, b: Tensor, c: Tensor, **options: Any) -> tuple[Tensor, Tensor | None]:
    """`s4d_conv` with checked arguments, u in fp32 or fp64 with zeros beyond `lengths`."""
    return s4d_conv_in_chunks(chunk_recurrence, min(CHUNK, u.shape[1]), u, log_a, b, c, **options)
