"""Generation by any causal language model, through the state contract: prefill in chunks, then one token at a time.

B prompts, R of them still running, V tokens of the vocabulary, D model width.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks.layers.chunk_attention import ChunkAttention
from ..blocks.layers.positions import LearnedPosition
from ..blocks.layers.relative_bias import SimpleRelativeBias
from ..blocks.protocol import State, map_state, select_rows
from ..blocks.registry import list_mixers
from ._language import LanguageModel
from ._sampling import Sampling

Ids = Tensor | Sequence[int]
NO_TOKEN = -1


class TokenStep(NamedTuple):
    """One new token for every row that runs; all but `logits` on the CPU.

    tokens: int64 (B,), -1 for rows that ended at an earlier step. running: bool (B,), rows that go on after this step.
    stop_len: int64 (B,), for a row that met a stop in this step how many of its last tokens are the stop, else 0.
    logits: float32 (R, V), as the model gave them, for the rows with a token in this step, in their order.
    """

    tokens: Tensor
    running: Tensor
    stop_len: Tensor
    logits: Tensor


def generate(
    model: nn.Module,
    prompts: Ids | Sequence[Ids],
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Iterable[Ids] = (),
    stop_tokens: Iterable[int] = (),
    seed: int | Sequence[int] | None = None,
    prefill_chunk: int = 2048,
    max_len: int | None = None,
) -> list[Tensor]:
    """Continue every prompt; the new tokens of each, int64, on the CPU, without the stop that ended them.

    The prompts are read in chunks. A row of a batch gets what it gets alone, up to the rounding of its logits; one that
    ended leaves the batch. The model runs in eval mode without gradients and is left in the mode it was in; tokens are
    chosen in float32.

    model: gives the logits of the next token and carries a state, such as `create_model("hybrid_tiny")`; any module
        with `vocab_size`, `init_state` and the call of `LanguageModel`.
    prompts: one prompt, a 1-D tensor or sequence of ids (bytes are one), or a list of them of any lengths. A prompt
        has at least one token: to start from nothing, give the separator that documents start with, [0] for bytes.
    max_new_tokens: a row ends after so many, at a stop, or when the next token would need more than `max_len`.
    temperature: logits are divided by it; 0 takes the likeliest token, and the filters do nothing.
    top_k, top_p, min_p, repetition_penalty: see `Sampling`, which applies them in the order of transformers: penalty
        (to tokens of prompt and answer), temperature, top_k, top_p, min_p.
    stop: sequences of ids that end a row, looked for in its new tokens; where two end together the longer is cut.
    stop_tokens: single ids that do.
    seed: row i draws from a generator of its own with seed + i, on the CPU, so that neither the other rows nor the
        device matter; or one seed per row. None takes a seed from torch's own generator.
    prefill_chunk: tokens of a prompt read in one call; it bounds the memory of prefill.
    max_len: tokens of one row that the model may read (the last new one is not read). A table of learned positions
        bounds them too.

    Raises ValueError, before any work, for a model without a state, an empty prompt, ids outside the vocabulary, a
    prompt longer than max_len or the table of positions, and values outside their ranges; later for logits that are
    not finite.
    """
    steps = generate_tokens(
        model,
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repetition_penalty=repetition_penalty,
        stop=stop,
        stop_tokens=stop_tokens,
        seed=seed,
        prefill_chunk=prefill_chunk,
        max_len=max_len,
    )
    rows: list[list[int]] = []
    for step in steps:
        rows = rows or [[] for _ in step.tokens]
        for row, token, cut in zip(rows, step.tokens.tolist(), step.stop_len.tolist(), strict=True):
            if token != NO_TOKEN:
                row.append(token)
            del row[len(row) - cut :]
    return [torch.tensor(row, dtype=torch.int64) for row in rows]


def generate_tokens(
    model: nn.Module,
    prompts: Ids | Sequence[Ids],
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    repetition_penalty: float = 1.0,
    stop: Iterable[Ids] = (),
    stop_tokens: Iterable[int] = (),
    seed: int | Sequence[int] | None = None,
    prefill_chunk: int = 2048,
    max_len: int | None = None,
) -> Iterator[TokenStep]:
    """`generate` as a stream: a `TokenStep` for every new token, stops included, until no row runs.

    Arguments and errors as there; the errors come from this call, not from the first step.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if not _is_integer(value) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    if max_len is not None and (not _is_integer(max_len) or max_len < 1):
        raise ValueError(f"max_len={max_len!r} must be a positive integer, or None for no bound")
    _check_model(model)
    vocab_size: int = model.vocab_size  # type: ignore[assignment]
    tokens = _read_prompts(prompts, vocab_size)
    stops = _read_stops(stop, stop_tokens, vocab_size)
    room = _room(model, [len(row) for row in tokens], max_len)
    tail = max((len(s) for s in stops), default=0)
    rows = [
        _Row(i, min(max_new_tokens, number), None if sampling.greedy else generator, deque(maxlen=tail))
        for i, (number, generator) in enumerate(zip(room, _generators(seed, len(tokens)), strict=True))
    ]
    slots = max(len(row) for row in tokens) + max(row.left for row in rows) - 1
    state = model.init_state(  # type: ignore[operator]
        len(tokens), max_len=None if max_len is None else slots, device=_device(model)
    )
    return _stream(model, tokens, rows, state, sampling, stops, prefill_chunk)


@dataclass
class _Row:
    """A row that runs. left: tokens it may still get. tail: its newest tokens, as many as the longest stop has."""

    index: int
    left: int
    generator: torch.Generator | None
    tail: deque[int]

    def uniform(self) -> Tensor:
        return torch.rand((), generator=self.generator)

    def stopped(self, token: int, stops: list[tuple[int, ...]]) -> int:
        """Take a token; the length of the longest stop that it completes, 0 for none."""
        self.left -= 1
        self.tail.append(token)
        newest = tuple(self.tail)
        return max((len(s) for s in stops if newest[-len(s) :] == s), default=0)


@torch.no_grad()
def _stream(
    model: nn.Module,
    prompts: list[Tensor],
    rows: list[_Row],
    state: State,
    sampling: Sampling,
    stops: list[tuple[int, ...]],
    chunk: int,
) -> Iterator[TokenStep]:
    batch, device = len(prompts), _device(model)
    with _evaluating(model):
        logits, state = _prefill(model, prompts, state, chunk)
    seen: Tensor | None = None
    if sampling.repetition_penalty != 1:
        seen = torch.zeros_like(logits, dtype=torch.bool)
        for i, prompt in enumerate(prompts):
            seen[i, prompt.to(device)] = True
    while True:
        _check_finite(logits, rows)
        uniform = None if sampling.greedy else torch.stack([row.uniform() for row in rows]).to(device)
        chosen = sampling.choose(logits, uniform, seen)
        tokens = torch.full((batch,), NO_TOKEN, dtype=torch.int64)
        running, stop_len = torch.zeros(batch, dtype=torch.bool), torch.zeros(batch, dtype=torch.int64)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            tokens[row.index] = token
            stop_len[row.index] = length = row.stopped(token, stops)
            running[row.index] = length == 0 and row.left > 0
        going = running[[row.index for row in rows]]
        yield TokenStep(tokens, running, stop_len, logits)
        if not going.any():
            return
        if seen is not None:
            seen = seen.scatter(1, chosen.unsqueeze(1), True)
        if not going.all():  # rows that ended cost nothing from here on
            kept = going.nonzero().squeeze(1)
            rows, kept = [rows[i] for i in kept.tolist()], kept.to(device)
            chosen, state = chosen[kept], select_rows(state, kept)
            seen = None if seen is None else seen[kept]
        with _evaluating(model):
            out = model(chosen.unsqueeze(1), state=state)
        logits, state = out.y[:, -1].float(), out.state


# --- the prompts


def _prefill(model: nn.Module, prompts: list[Tensor], state: State, chunk: int) -> tuple[Tensor, State]:
    """Logits (B, V) after the last token of each prompt, and the state there.

    Prompts are laid out from the left, and chunks are padded on the right. A prompt that ended is left out of the
    chunks that follow where the state is of one size; one that grows takes its pads along.
    """
    device, longest = _device(model), max(len(prompt) for prompt in prompts)
    features, head = _parts(model)
    size: Callable[[int], int] | None = getattr(model, "state_size", None)
    fixed = size is not None and size(1) == size(longest)
    last: list[Tensor | None] = [None] * len(prompts)
    for start in range(0, longest, chunk):
        width = min(chunk, longest - start)
        rows = [i for i, prompt in enumerate(prompts) if len(prompt) > start or not fixed]
        tokens = torch.zeros(len(rows), width, dtype=torch.int64)
        mask = torch.zeros(len(rows), width, dtype=torch.bool)
        for place, i in enumerate(rows):
            part = prompts[i][start : start + width]
            tokens[place, : len(part)], mask[place, : len(part)] = part, True
        index = None if len(rows) == len(prompts) else torch.tensor(rows, device=device)
        out = features(
            tokens.to(device),
            mask=None if bool(mask.all()) else mask.to(device),
            state=state if index is None else select_rows(state, index),
        )
        state = out.state if index is None else _put_rows(state, index, out.state)
        for place, i in enumerate(rows):
            if start < len(prompts[i]) <= start + width:
                last[i] = out.y[place, len(prompts[i]) - 1 - start].clone()  # a view would keep the whole chunk
    ends = torch.stack([row for row in last if row is not None]).unsqueeze(1)
    return head(ends).squeeze(1).float(), state


def _put_rows(state: State, index: Tensor, part: State) -> State:
    return map_state(lambda old, new: old.index_copy(0, index, new), state, part)


def _parts(model: nn.Module) -> tuple[Callable[..., Any], Callable[[Tensor], Tensor]]:
    """What reads tokens, and the map from its output to logits: so the head sees last tokens alone where it can."""
    if type(model).forward is LanguageModel.forward:
        inner: Any = model.model
        return inner.forward_features, inner.head
    return model, lambda y: y


def _device(model: nn.Module) -> torch.device:
    first = next(model.parameters(), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode for one call, so that the model is as its owner left it whenever a stream pauses."""
    if not model.training:
        yield
        return
    modes = [(part, part.training) for part in model.modules()]
    model.eval()
    try:
        yield
    finally:
        model.train()
        for part, mode in modes:
            part.training = mode


# --- what is wrong, before any work


def _check_model(model: nn.Module) -> None:
    if not _is_integer(getattr(model, "vocab_size", None)) or not hasattr(model, "init_state"):
        raise ValueError(
            f"{type(model).__name__} is no language model: generate needs `vocab_size`, `init_state` and logits of the "
            'next token, as create_model("hybrid_tiny") has them'
        )
    backbone: Any = getattr(model, "backbone", None)
    for i, block in enumerate(getattr(backbone, "blocks", ())):
        if not (block.mixer.streaming and block.mixer.causal and block.cross_mixer is None):
            raise ValueError(
                f"generate needs a causal model that carries a state, but block {i} of this {type(model).__name__} is "
                f"{type(block.mixer).__name__} with the pattern {block.mixer.pattern!r}, which carries no state; "
                f"mixers that do: {', '.join(list_mixers(pattern='causal', streaming=True))}"
            )


def _read_prompts(prompts: Any, vocab_size: int) -> list[Tensor]:
    if isinstance(prompts, str):
        raise ValueError("prompts is text; encode it first: text.encode() for a model over bytes")
    if not isinstance(prompts, Iterable) or (isinstance(prompts, Tensor) and prompts.dim() == 0):
        raise ValueError(f"prompts={prompts!r} is one id; give a sequence of ids, or a list of such")
    single = prompts.dim() == 1 if isinstance(prompts, Tensor) else _is_ids(prompts)
    rows = [prompts] if single else list(prompts)
    if not rows:
        raise ValueError("prompts is an empty list; give at least one prompt")
    return [_read_ids(row, f"prompt {i}", vocab_size) for i, row in enumerate(rows)]


def _read_stops(stop: Iterable[Any], stop_tokens: Iterable[int], vocab_size: int) -> list[tuple[int, ...]]:
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


def _room(model: nn.Module, lengths: list[int], max_len: int | None) -> list[int]:
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
    room = [2**62] * len(lengths)
    for bound, what, shared in bounds:
        for i, length in enumerate(lengths):
            if length > bound:
                raise ValueError(
                    f"prompt {i} has {length} tokens, but {what.format(bound)}; keep its last {bound} or fewer"
                )
            room[i] = min(room[i], bound + 1 - (max(lengths) if shared else length))
    return room


def _generators(seed: int | Sequence[int] | None, number: int) -> list[torch.Generator]:
    if seed is None:
        seed = int(torch.randint(2**62, ()))
    seeds: list[Any] = list(seed) if isinstance(seed, (list, tuple)) else [seed]
    for value in seeds:
        if not _is_integer(value) or not 0 <= value < 2**62:
            raise ValueError(f"seed={value!r} must be an integer from 0 to 2**62 - 1, or a list with one per prompt")
    if not isinstance(seed, (list, tuple)):
        seeds = [seeds[0] + i for i in range(number)]
    if len(seeds) != number:
        raise ValueError(f"seed has {len(seeds)} entries for {number} prompts; give one per prompt, or one integer")
    return [torch.Generator().manual_seed(value) for value in seeds]


def _is_integer(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _check_finite(logits: Tensor, rows: list[_Row]) -> None:
    largest = logits.amax(-1)  # nan wins, so one number per row tells
    if not bool(largest.isfinite().all()):
        row = rows[int((~largest.isfinite()).nonzero()[0])]
        raise ValueError(
            f"the model gives logits for prompt {row.index} that are not finite: its weights or its state overflowed"
        )
