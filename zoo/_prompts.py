"""What `generate` is given, checked before any work: prompts, stops, seeds, and the room a model has for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks.layers.chunk_attention import ChunkAttention
from ..blocks.layers.positions import LearnedPosition
from ..blocks.layers.relative_bias import SimpleRelativeBias

Ids = Tensor | Sequence[int]


def read_prompts(prompts: Any, vocab_size: int) -> list[Tensor]:
    """One prompt or several as int64 (L,) each."""
    if isinstance(prompts, str):
        raise ValueError("prompts is text; encode it first: text.encode() for a model over bytes")
    if not isinstance(prompts, Iterable) or (isinstance(prompts, Tensor) and prompts.dim() == 0):
        raise ValueError(f"prompts={prompts!r} is one id; give a sequence of ids, or a list of such")
    single = prompts.dim() == 1 if isinstance(prompts, Tensor) else _is_ids(prompts)
    rows = [prompts] if single else list(prompts)
    if not rows:
        raise ValueError("prompts is an empty list; give at least one prompt")
    return [_read_ids(row, f"prompt {i}", vocab_size) for i, row in enumerate(rows)]


def read_stops(stop: Iterable[Any], stop_tokens: Iterable[int], vocab_size: int) -> list[tuple[int, ...]]:
    """Sequences of ids and single ones as tuples."""
    if isinstance(stop, (bytes, str)):
        raise ValueError(f"stop={stop!r} is one sequence; give a list of sequences of ids")
    found: list[tuple[int, ...]] = []
    for i, sequence in enumerate(stop):
        if isinstance(sequence, int):
            raise ValueError(f"stop[{i}]={sequence} is a single id, which goes into stop_tokens; stop has sequences")
        found.append(tuple(_read_ids(sequence, f"stop[{i}]", vocab_size).tolist()))
    single = [stop_tokens] if isinstance(stop_tokens, int) else list(stop_tokens)
    return found + [(t,) for t in (_read_ids(single, "stop_tokens", vocab_size).tolist() if single else ())]


def _is_ids(values: Any) -> bool:
    """One prompt rather than a list of them. An empty sequence of ids looks like an empty list of prompts."""
    return isinstance(values, bytes) or any(not hasattr(value, "__len__") for value in values)


def _read_ids(values: Any, what: str, vocab_size: int) -> Tensor:
    """int64 (L,) on the CPU. Raises ValueError for anything else, for none and for ids outside the vocabulary."""
    if isinstance(values, str):
        raise ValueError(f"{what} is text; encode it first: text.encode() for a model over bytes")
    try:
        ids = torch.as_tensor(list(values) if isinstance(values, bytes) else values).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{what} is no sequence of ids: {error}") from error
    if ids.numel() == 0:
        raise ValueError(f"{what} is empty; give at least one token, such as the separator that documents start with")
    if ids.dim() != 1 or ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{what} is {ids.dtype} {tuple(ids.shape)}, expected integers (L,)")
    ids = ids.long()
    outside = ids[(ids < 0) | (ids >= vocab_size)]
    if outside.numel():
        raise ValueError(f"{what} has the id {int(outside[0])}, outside the vocabulary 0 .. {vocab_size - 1}")
    return ids


def room(model: nn.Module, lengths: list[int], max_len: int | None) -> list[int]:
    """New tokens that each row may get: those read, its prompt and all new ones but the last, fit into every bound.

    Raises ValueError for a prompt that does not fit.
    """
    bounds = [] if max_len is None else [(max_len, "max_len={}", False)]
    for part in model.modules():
        if isinstance(part, LearnedPosition):
            bounds.append((part.max_len, "the model's learned positions end at max_len={}", False))
        elif isinstance(part, ChunkAttention) and part.chunk_size is None and isinstance(part.bias, SimpleRelativeBias):
            # Its cache, pads included, has to fit: the longest prompt counts for all.
            bounds.append((part.bias.max_len, "the model's relative bias ends at max_len={}", True))
    found = [2**62] * len(lengths)
    for bound, what, shared in bounds:
        for i, length in enumerate(lengths):
            if length > bound:
                raise ValueError(
                    f"prompt {i} has {length} tokens, but {what.format(bound)}; keep its last {bound} or fewer"
                )
            found[i] = min(found[i], bound + 1 - (max(lengths) if shared else length))
    return found


def generators(seed: int | Sequence[int] | None, number: int) -> list[torch.Generator]:
    """One per prompt, seeded with seed + i, or with the prompt's own entry."""
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    seeds: list[Any] = list(seed) if isinstance(seed, (list, tuple)) else [seed]
    for value in seeds:
        if not is_integer(value) or not 0 <= value < 2**62:
            raise ValueError(f"seed={value!r} must be an integer from 0 to 2**62 - 1, or a list with one per prompt")
    if not isinstance(seed, (list, tuple)):
        seeds = [seeds[0] + i for i in range(number)]
    if len(seeds) != number:
        raise ValueError(f"seed has {len(seeds)} entries for {number} prompts; give one per prompt, or one integer")
    return [torch.Generator().manual_seed(value) for value in seeds]


def is_integer(value: object) -> bool:
    """An int that is no bool."""
    return isinstance(value, int) and not isinstance(value, bool)
