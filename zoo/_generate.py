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

from ..blocks.protocol import State, map_state, select_rows
from ..blocks.registry import list_mixers
from ._language import LanguageModel
from ._prompts import Ids, generators, is_integer, read_prompts, read_stops, room
from ._sampling import Sampling

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
    stop_when: Callable[[int, int], bool] | None = None,
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
    stop_when: called with every new token, as (number of the prompt, id); a row whose call returns True ends after that
        token: how to stop at a text that a tokenizer may cut in many ways.
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
        stop_when=stop_when,
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
    stop_when: Callable[[int, int], bool] | None = None,
    seed: int | Sequence[int] | None = None,
    prefill_chunk: int = 2048,
    max_len: int | None = None,
) -> Iterator[TokenStep]:
    """`generate` as a stream: a `TokenStep` for every new token, stops included, until no row runs.

    Arguments and errors as there; the errors come from this call, not from the first step.
    """
    sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    for name, value in (("max_new_tokens", max_new_tokens), ("prefill_chunk", prefill_chunk)):
        if not is_integer(value) or value < 1:
            raise ValueError(f"{name}={value!r} must be a positive integer")
    if max_len is not None and (not is_integer(max_len) or max_len < 1):
        raise ValueError(f"max_len={max_len!r} must be a positive integer, or None for no bound")
    _check_model(model)
    vocab_size: int = model.vocab_size  # type: ignore[assignment]
    tokens = read_prompts(prompts, vocab_size)
    stops = read_stops(stop, stop_tokens, vocab_size)
    bounds = room(model, [len(row) for row in tokens], max_len)
    tail = max((len(s) for s in stops), default=0)
    rows = [
        _Row(i, min(max_new_tokens, number), None if sampling.greedy else generator, deque(maxlen=tail))
        for i, (number, generator) in enumerate(zip(bounds, generators(seed, len(tokens)), strict=True))
    ]
    slots = max(len(row) for row in tokens) + max(row.left for row in rows) - 1
    state = model.init_state(  # type: ignore[operator]
        len(tokens), max_len=None if max_len is None else slots, device=_device(model)
    )
    return _stream(model, tokens, rows, state, sampling, stops, stop_when, prefill_chunk)


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
    stop_when: Callable[[int, int], bool] | None,
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
            ended = stop_when is not None and stop_when(row.index, token)
            running[row.index] = length == 0 and row.left > 0 and not ended
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
    if not is_integer(getattr(model, "vocab_size", None)) or not hasattr(model, "init_state"):
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


def _check_finite(logits: Tensor, rows: list[_Row]) -> None:
    largest = logits.amax(-1)  # nan wins, so one number per row tells
    if not bool(largest.isfinite().all()):
        row = rows[int((~largest.isfinite()).nonzero()[0])]
        raise ValueError(
            f"the model gives logits for prompt {row.index} that are not finite: its weights or its state overflowed"
        )
