"""VQ attention block by block: a window of blocks as they are, the rest as the cells of a codebook.

Blocks go through in groups, so that memory beyond inputs and outputs is that of one group; in training a group is
computed again in the backward pass, if there are several. B batch, L queries, S keys, H heads, K key width, V value
width, M codes, C block length, N blocks, G blocks of a group, W keys in a window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from .state import MASKED, VQState, accumulation_dtype, advance, extend, gather_rows, leaving

# Tokens (of all rows and heads) in a group. On a CPU, its scores and cells then stay near the caches.
TOKENS = 2048


def cell_sums(v: Tensor, code: Tensor, valid: Tensor | None, size: int) -> tuple[Tensor, Tensor]:
    """Tokens in each cell and the sums of their values: (..., size) and (..., size, V).

    v: (..., C, V), zero where `valid` (..., C) is False. code: int64 (..., C).
    """
    lead = code.shape[:-1]
    groups = lead.numel()
    base = torch.arange(groups, device=v.device).unsqueeze(1) * size
    index = (code.reshape(groups, -1) + base).flatten()
    one = torch.ones(code.shape, device=v.device, dtype=v.dtype) if valid is None else valid.expand(code.shape).to(v)
    count = v.new_zeros(groups * size).scatter_add_(0, index, one.flatten())
    total = v.new_zeros(groups * size, v.shape[-1])
    total = total.scatter_add(0, index.unsqueeze(1).expand(-1, v.shape[-1]), v.reshape(-1, v.shape[-1]))
    return count.view(*lead, size), total.view(*lead, size, v.shape[-1])


def means(count: Tensor, total: Tensor) -> Tensor:
    return total / count.clamp(min=1).unsqueeze(-1)


def log_count(count: Tensor) -> Tensor:
    return count.log().clamp(min=MASKED)


def attend(
    q: Tensor,
    near: tuple[Tensor, Tensor, Tensor] | None,
    far: tuple[Tensor, Tensor] | None,
    codebook: Tensor,
) -> Tensor:
    """One softmax over a window and cells: q (H, B, G, C, K) to (H, B, G, C, V).

    near: k (H, B, G, W, K), v (H, B, G, W, V) and what is added to the scores. far: count (H, B, G, M) and mean
    (H, B, G, M, V), the cells of the codebook (H, M, K).
    """
    scores, values = [], []
    if near is not None:
        k, v, local = near
        scores.append(q @ k.mT + local)
        values.append(v)
    if far is not None:
        count, mean = far
        cells = (q.flatten(1, 3) @ codebook.mT).view(*q.shape[:-1], -1)
        scores.append(cells + log_count(count).unsqueeze(-2))
        values.append(mean)
    weight = (torch.cat(scores, -1) if len(scores) > 1 else scores[0]).softmax(-1)
    parts = weight.split([part.shape[-1] for part in scores], -1)
    terms = [part @ value for part, value in zip(parts, values, strict=True)]
    return terms[0] + terms[1] if len(terms) > 1 else terms[0]


def window(x: Tensor, blocks: int) -> Tensor:
    """(..., G + blocks - 1, C, K) to (..., G, blocks C, K): each block with those around it, in order."""
    if blocks == 1:
        return x
    size = x.shape[-3] - blocks + 1
    return torch.cat([x.narrow(-3, i, size) for i in range(blocks)], -2)


def _group(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    code: Tensor,
    valid: Tensor | None,
    local: Tensor,
    codebook: Tensor,
    before: tuple[Tensor, Tensor] | None,
    after: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, tuple[Tensor, Tensor] | None]:
    """o (H, B, G, C, V) of G blocks, and `before` for the blocks that follow them.

    k, v, code, valid: of these blocks and their neighbours: one before, and one behind unless causal (none where
    there is one block in all). before, after: count and total of the blocks beyond the neighbours, on either side;
    None where no block lies beyond a window.
    """
    wide = k.shape[2] - q.shape[2] + 1
    far = carry = None
    if before is not None:
        number, total = cell_sums(v, code, valid, codebook.shape[1])
        size = q.shape[2]
        # Block g sees what lies two and more before it: entries 0 .. g - 1 of its group, and `before`.
        numbers, totals = (
            torch.cat((start.unsqueeze(2), part[:, :, :size]), 2).cumsum(2)
            for start, part in zip(before, (number, total), strict=True)
        )
        carry = numbers[:, :, size], totals[:, :, size]
        count, total_seen = numbers[:, :, :size], totals[:, :, :size]
        if after is not None:
            numbers, totals = (
                torch.cat((part[:, :, 3:], end.unsqueeze(2)), 2).flip(2).cumsum(2).flip(2)
                for end, part in zip(after, (number, total), strict=True)
            )
            count, total_seen = count + numbers, total_seen + totals
        far = count, means(count, total_seen)
    if valid is not None:
        hidden = valid.new_zeros(valid.shape, dtype=q.dtype).masked_fill(~valid, MASKED)
        local = local + window(hidden.unsqueeze(-1), wide).mT
    return attend(q, (window(k, wide), window(v, wide), local), far, codebook), carry


def _run(
    q: Tensor,
    keys: tuple[Tensor, Tensor, Tensor, Tensor | None],
    local: Tensor,
    codebook: Tensor,
    before: tuple[Tensor, Tensor] | None,
    behind: int,
) -> Tensor:
    """All blocks q (H, B, N, C, K), group by group. keys: k, v, code, valid with the neighbours of all of them.
    behind: 1 where blocks to come are seen too, else 0."""
    k, v, code, valid = keys
    heads, batch, blocks, length = q.shape[:4]
    step = min(blocks, max(1, TOKENS // (heads * batch * length)))
    wide = k.shape[2] - blocks + 1
    firsts = range(0, blocks, step)
    after: list[tuple[Tensor, Tensor]] | None = None
    if before is not None and behind:
        # Group i of these holds blocks i step + 1 .. (i + 1) step, so that those behind group g are i > g.
        pad = len(firsts) * step + 2 - k.shape[2]
        rest = [F.pad(t[:, :, 2:], (0, 0) * (t.dim() - 3) + (0, pad)) for t in (v, code, valid) if t is not None]
        rest = [t.unflatten(2, (-1, step)).flatten(3, 4) for t in rest]
        sums = cell_sums(rest[0], rest[1], rest[2] if valid is not None else None, codebook.shape[1])
        ends = [t.flip(2).cumsum(2).flip(2) for t in sums]
        ends = [torch.cat((t[:, :, 1:], torch.zeros_like(t[:, :, :1])), 2) for t in ends]
        after = list(zip(ends[0].unbind(2), ends[1].unbind(2), strict=True))
    again = torch.is_grad_enabled() and len(firsts) > 1
    outputs = []
    for index, first in enumerate(firsts):
        last = min(first + step, blocks)
        part = slice(first, last + wide - 1)
        arguments: Any = (
            q[:, :, first:last],
            k[:, :, part],
            v[:, :, part],
            code[:, :, part],
            None if valid is None else valid[:, :, part],
            local,
            codebook,
            before,
            None if after is None else after[index],
        )
        if again:
            o, before = checkpoint(_group, *arguments, use_reentrant=False, preserve_rng_state=False)
        else:
            o, before = _group(*arguments)
        outputs.append(o)
    return torch.cat(outputs, 2) if len(outputs) > 1 else outputs[0]


def _local(bias: Tensor | None, distance: Tensor, causal: bool, chunk: int, dtype: torch.dtype) -> Tensor:
    """What is added to the scores of a window: the table's entries (H or 1, *distance.shape), the future hidden."""
    if bias is None:
        table = torch.zeros_like(distance, dtype=dtype).unsqueeze(0)
    else:
        index = distance if causal else distance + 2 * chunk - 1
        table = bias.to(dtype)[:, index.clamp(0, bias.shape[1] - 1)]
    return table.masked_fill(distance < 0, MASKED) if causal else table


def _blocks(x: Tensor, front: int, count: int, size: int) -> Tensor:
    """(H, B, T, ...) to (H, B, count, size, ...), zeros before (`front` blocks) and behind."""
    end = (count - front) * size - x.shape[2]
    return F.pad(x, (0, 0) * (x.dim() - 3) + (front * size, end)).unflatten(2, (count, size))


def _heads_first(x: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """(B, T, H, ...) to (H, B, T, ...)."""
    return x.to(dtype or x.dtype).movedim(2, 0)


def _fresh(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    code: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    chunk: int,
    causal: bool,
    lengths: Tensor | None,
) -> Tensor:
    """From the first token. Heads come first: q (H, B, L, K) and so on."""
    length = q.shape[2]
    size = min(chunk, length)  # a row within one block is one block, however long blocks are
    blocks = -(-length // size)
    front = int(blocks > 1)
    behind = int(front and not causal)
    every = blocks + front + behind
    at = torch.arange(-front * size, (every - front) * size, device=q.device)
    valid = None
    if lengths is not None or every * size != length:
        end = q.new_full((1,), length, dtype=torch.int64) if lengths is None else lengths
        valid = ((at >= 0) & (at < end.unsqueeze(1))).unflatten(1, (every, size)).unsqueeze(0)
        if lengths is not None:
            v = v.masked_fill((at[front * size :][:length] >= end.unsqueeze(1))[None, ..., None], 0)
    k, v, code = (_blocks(t, front, every, size) for t in (k, v, code))
    i = torch.arange(size, device=q.device).unsqueeze(1)
    distance = front * size + i - torch.arange((1 + front + behind) * size, device=q.device)
    local = _local(bias, distance, causal, chunk, q.dtype)[:, None, None]
    before = None
    if blocks > 2:
        count = q.new_zeros(*q.shape[:2], codebook.shape[1])
        before = (count, count.new_zeros(*count.shape, v.shape[-1]))
    o = _run(_blocks(q, 0, blocks, size), (k, v, code, valid), local, codebook, before, behind)
    return o.flatten(2, 3)[:, :, :length]


def _continued(
    q: Tensor,
    joined: tuple[Tensor, Tensor, Tensor],
    codebook: Tensor,
    bias: Tensor | None,
    chunk: int,
    new: Tensor,
    state: VQState,
) -> Tensor:
    """After a state, whose window comes before the new keys in `joined`. q (H, B, L, K), the rest (B, T + L, H, ..).

    Blocks are counted from each row's first token, so the rows are shifted until their blocks lie below each other:
    slot i of the shifted row is token (b - 1) C + i, b the block that the first new token falls into.
    """
    seen, length = state.length, q.shape[2]
    cells = state.number.transpose(0, 1), state.mean.transpose(0, 1)
    first = ((seen.div(chunk, rounding_mode="floor") - 1) * chunk).clamp(min=0)
    if length == 1:  # one query at the end of the window, which needs no blocks
        at = torch.arange(-2 * chunk + 1, 1, device=q.device) + seen.unsqueeze(1)
        visible = (at >= first.unsqueeze(1)) & (at < (seen + new).unsqueeze(1))
        table = _local(bias, torch.arange(2 * chunk - 1, -1, -1, device=q.device), True, chunk, q.dtype)
        local = (
            table[:, None, None, None]
            + torch.zeros_like(visible, dtype=q.dtype).masked_fill_(~visible, MASKED)[None, :, None, None]
        )
        k, v = (_heads_first(t, q.dtype).unsqueeze(2) for t in joined[:2])
        o = attend(q.unsqueeze(2), (k, v, local), (cells[0].unsqueeze(2), cells[1].unsqueeze(2)), codebook)
        return o.squeeze(2)
    phase = (seen % chunk).unsqueeze(1)
    every = -(-(2 * chunk - 1 + length) // chunk)
    slot = torch.arange(every * chunk, device=q.device)
    at = slot + (seen.unsqueeze(1) - phase - chunk)
    valid = (at >= 0) & (at < (seen + new).unsqueeze(1))
    place = (slot + chunk - 1 - phase).clamp(max=joined[0].shape[1] - 1)
    k, v, code = (_heads_first(gather_rows(t, place)) for t in joined)
    k, v = k.to(q.dtype), v.to(q.dtype).masked_fill(~valid[None, ..., None], 0)
    k, v, code = (t.unflatten(2, (every, chunk)) for t in (k, v, code))
    keys = k, v, code, valid.unflatten(1, (every, chunk)).unsqueeze(0)
    place = (slot[chunk:] - chunk - phase).clamp(0, length - 1)
    q = q.gather(2, place[None, :, :, None].expand(q.shape[0], -1, -1, q.shape[3])).unflatten(2, (every - 1, chunk))
    i = torch.arange(chunk, device=q.device).unsqueeze(1)
    local = _local(bias, chunk + i - torch.arange(2 * chunk, device=q.device), True, chunk, q.dtype)[:, None, None]
    before = cells[0], cells[1] * cells[0].unsqueeze(-1)
    o = _run(q, keys, local, codebook, before, 0).flatten(2, 3)
    place = phase + torch.arange(length, device=q.device)
    return o.gather(2, place[None, :, :, None].expand(o.shape[0], -1, -1, o.shape[3]))


def chunked_vq_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    code: Tensor,
    codebook: Tensor,
    bias: Tensor | None,
    *,
    chunk: int | None,
    causal: bool,
    lengths: Tensor | None,
    scale: float,
    state: VQState | None,
    return_state: bool,
) -> tuple[Tensor, VQState | None]:
    """`naive_vq_attention` in time L (M + W) and in memory linear in L."""
    acc = accumulation_dtype(q.dtype)
    with torch.autocast(q.device.type, enabled=False):
        book = codebook.detach().to(acc)
        queries = _heads_first(q, acc) * scale
        if chunk is None or k is None:
            values, valid = _heads_first(v, acc), None
            if lengths is not None:
                valid = (torch.arange(v.shape[1], device=v.device) < lengths.unsqueeze(1)).unsqueeze(0)
                values = values.masked_fill(~valid.unsqueeze(-1), 0)
            count, total = (t.unsqueeze(2) for t in cell_sums(values, _heads_first(code), valid, book.shape[1]))
            o = attend(queries.unsqueeze(2), None, (count, means(count, total)), book).squeeze(2)
            return o.movedim(0, 2).to(v.dtype), None
        if state is None:
            keys = _heads_first(k, acc), _heads_first(v, acc), _heads_first(code)
            o = _fresh(queries, *keys, book, bias, chunk, causal, lengths)
            return o.movedim(0, 2).to(v.dtype), None
        new = torch.full_like(state.length, v.shape[1]) if lengths is None else lengths
        joined = extend(state, k, v, code)
        o = _continued(queries, joined, book, bias, chunk, new, state).movedim(0, 2).to(v.dtype)
        if not return_state:
            return o, None
        old = leaving(state, chunk, new, joined[0].shape[1])
        gone = joined[1].to(acc).masked_fill(~old[..., None, None], 0).transpose(1, 2)
        count, total = cell_sums(gone, joined[2].transpose(1, 2), old.unsqueeze(1), book.shape[1])
        return o, advance(state, joined, new, count, total)
