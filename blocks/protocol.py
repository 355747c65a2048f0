"""The mixer contract: one method for training, prefill, chunked and single-step decoding.

Shape letters used throughout `blocks`: B batch, L length (queries), S source length (keys, values), D model width,
H heads, K key width per head, V value width per head, N sequences in a packed row.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor, nn

PATTERNS = ("self", "causal", "cross", "causal-cross")

# A state is a NamedTuple (possibly nested) whose tensors all have the batch as their first dimension.
State = Any
StateT = TypeVar("StateT")


class MixerOutput(NamedTuple):
    """What a mixer returns.

    y: (B, L, D). state: the carried state, None unless one was passed in. aux: scalar auxiliary losses by name.
    """

    y: Tensor
    state: State | None = None
    aux: dict[str, Tensor] = {}


class ChunkSummary(NamedTuple):
    """What a chunk of tokens does to a state that is linear in itself: after = transition * before + state.

    Both have the structure of the mixer's state. A part that the chunk fixes outright, as the last inputs of a
    convolution, has the transition 0.
    """

    transition: State
    state: State

    def apply(self, before: State) -> State:
        """The state after the chunk, given the one before it."""
        return map_state(lambda a, m, s: _scaled(a, s) + m, self.transition, self.state, before)

    def then(self, later: ChunkSummary) -> ChunkSummary:
        """The summary of this chunk followed by `later`: associative, so chunks may be joined in any grouping."""
        both = map_state(lambda a, b: a * b, later.transition, self.transition)
        return ChunkSummary(both, later.apply(self.state))


def _scaled(factor: Tensor, state: Tensor) -> Tensor:
    """factor * state; the state of a complex factor holds real and imaginary parts in its last dimension."""
    if not factor.is_complex() or state.is_complex():
        return factor * state
    return torch.view_as_real(factor * torch.view_as_complex(state.contiguous()))


class Exchange(Protocol):
    """What a mixer asks for while its tokens are one rank's part of a longer sequence; see `sequence_parallel`.

    lengths: tokens of every rank, in the order of the sequence. rank: whose part this is. start: the place of its first
    token. total: tokens of all. reversed: the same seen from the end, for rows that are flipped.
    """

    @property
    def lengths(self) -> tuple[int, ...]: ...
    @property
    def rank(self) -> int: ...
    @property
    def start(self) -> int: ...
    @property
    def total(self) -> int: ...
    @property
    def reversed(self) -> Exchange: ...

    def gather(self, x: Tensor, spans: Sequence[Sequence[tuple[int, int]]]) -> Tensor:
        """Tokens of the whole sequence: for every rank the spans (first, past the last) that it asks for, in that
        order. x: own tokens (B, L, ...). Returns own spans, joined, (B, M, ...)."""
        ...

    def everywhere(self, x: Tensor, *spans: tuple[int, int]) -> Tensor:
        """`gather` with the same spans on every rank; without any, the whole sequence."""
        ...

    def around(self, x: Tensor, before: int, after: int = 0, initial: Tensor | None = None) -> Tensor:
        """x (B, L, ...) with the `before` tokens that precede it and the `after` that follow, zeros beyond the ends;
        initial: (B, before, ...), what precedes the whole sequence."""
        ...

    def last(self, x: Tensor, number: int, initial: Tensor | None = None) -> Tensor:
        """The last `number` tokens of the whole sequence, (B, number, ...), on every rank; see `around`."""
        ...

    def prefix(
        self,
        transitions: Sequence[Tensor | None],
        states: Sequence[Tensor],
        initial: Sequence[Tensor] | None = None,
        *,
        return_last: bool = False,
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """The states before own tokens, and with return_last those after the whole sequence, on every rank.

        states: what own tokens add. transitions: factors of what was there before, None for 1. initial: before the
        whole sequence, the same on every rank."""
        ...

    def others(self, states: Sequence[Tensor]) -> list[Tensor]:
        """The sums of the other ranks' states."""
        ...


def pattern_name(causal: bool, cross: bool) -> str:
    """The name of the attention pattern: self, causal, cross or causal-cross."""
    return {
        (False, False): "self",
        (True, False): "causal",
        (False, True): "cross",
        (True, True): "causal-cross",
    }[(bool(causal), bool(cross))]


class Mixer(nn.Module):
    """Maps (B, L, D) to (B, L, D), moving information between positions.

    A subclass declares `patterns` (which of self, causal, cross, causal-cross it honours), `streaming` (whether the
    causal form carries a state) and `variants` (the option sets that the conformance suite runs at dim 16), and
    implements `forward`; a streaming one also `init_state`, `state_size` and `state_type`, the class of its states.

    - causal: output n depends on positions up to n only, with every decision it takes.
    - cross: keys and values come from `context`, all of it visible; causal-cross: output n depends on x_1..x_n and on
      all of the context.
    - `smooth` says that small changes of the input make small changes of the output; a mixer that selects tokens by
      rank sets it to False, and the suite then compares neither numeric gradients nor precisions.
    - `exact` says that the past is bitwise independent of the future; a form whose rounding mixes positions (an FFT)
      sets it to False, and the suite then allows rounding, no more.
    - `reads_residual` says that the output is gated against the residual stream, x + u * (h - x): forward also takes
      `residual` (B, L, D), the block's input before its norm, and returns what is to be added to it. Without one the
      mixer's own x stands in for it.
    - `linear_state` says that a chunk changes the state to transition * state + its own, so that chunks can be worked
      on before the state is known: `chunk_summary`, `apply_prefix`.
    - `shared_patterns` are those that also work with a part of the sequence on each of several ranks. The mixer then
      asks its `exchange`, which `sequence_parallel` sets and which is None otherwise, for what other ranks know.
    """

    patterns: ClassVar[frozenset[str]] = frozenset({"self"})
    streaming: ClassVar[bool] = False
    state_type: ClassVar[type | None] = None
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    exact: bool = True
    smooth: bool = True
    reads_residual: bool = False
    linear_state: ClassVar[bool] = False
    shared_patterns: ClassVar[frozenset[str]] = frozenset()
    exchange: Exchange | None = None
    _due: list[tuple[int, ...] | None] | None = None  # sizes of the parts of `init_state`
    num_prefix_tokens: int = 0  # tokens at the front that stand on no grid

    def __init__(self, dim: int, *, causal: bool = False, cross: bool = False) -> None:
        super().__init__()
        if not isinstance(dim, int) or dim < 1:
            raise ValueError(f"dim={dim!r} must be a positive integer")
        self.dim = dim
        self.causal = causal
        self.cross = cross
        if self.pattern not in self.patterns:
            raise ValueError(self._refusal())

    @property
    def pattern(self) -> str:
        return pattern_name(self.causal, self.cross)

    def _refusal(self) -> str:
        from .registry import list_mixers  # here, because the registry imports this module

        able = ", ".join(list_mixers(pattern=self.pattern))
        return (
            f"{type(self).__name__} does not support the pattern {self.pattern!r} (it supports "
            f"{', '.join(p for p in PATTERNS if p in self.patterns)}); mixers that do: {able}"
        )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        state: State | None = None,
    ) -> MixerOutput:
        """Mix.

        x: (B, L, D). context: (B, S, D), for cross patterns only. mask: bool (B, L), True for a real token; outputs at
        other positions are zero. context_mask: bool (B, S). cu_seqlens: int32 (N+1,), the bounds of N sequences packed
        into one row (B = 1); a state then has N rows. grid: (H, W) or (T, H, W) with product L. state: from
        `init_state` or an earlier call; the new one is returned, the old one left as it was.
        """
        raise NotImplementedError(f"{type(self).__name__} must define forward")

    def init_state(
        self,
        batch_size: int,
        *,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> State:
        """The state before the first token; max_len bounds the tokens that will be seen, where a cache grows."""
        raise ValueError(f"{type(self).__name__} (pattern {self.pattern!r}) carries no state")

    def state_size(self, length: int) -> int:
        """Floating-point elements of state per sequence after `length` tokens (a complex element counts twice)."""
        raise ValueError(f"{type(self).__name__} (pattern {self.pattern!r}) carries no state")

    def chunk_summary(self, x: Tensor, *, state: State | None = None) -> ChunkSummary:
        """What the tokens x (B, L, D) do to the state, whatever it is, for mixers with a `linear_state`.

        state: given, only its last inputs of a convolution are read. Costs the projections and the sums that the state
        is made of. `chunk_summary(x).apply(state)` is the state that forward returns; see `apply_prefix`.
        """
        raise ValueError(f"{type(self).__name__} (pattern {self.pattern!r}) has no state that is linear in itself")

    def apply_prefix(self, x: Tensor, state: State) -> MixerOutput:
        """Output and state for the tokens x (B, L, D) after `state`, which earlier chunks' summaries give."""
        return self(x, state=state)

    def refuse_sharing(self) -> str | None:
        """Why the sequence cannot be split over ranks, None where it can."""
        if self.pattern in self.shared_patterns:
            return None
        return f"the pattern {self.pattern!r} of {type(self).__name__} needs the whole sequence at once"

    def check_inputs(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        state: State | None = None,
    ) -> None:
        """Raise ValueError, naming the argument and what it holds, for inputs outside the contract."""
        name = type(self).__name__
        if x.dim() != 3 or x.shape[-1] != self.dim:
            raise ValueError(f"{name}: x has shape {tuple(x.shape)}, expected (B, L, {self.dim})")
        if not x.is_floating_point():
            raise ValueError(f"{name}: x is {x.dtype}, expected a floating dtype; tokens are embedded first")
        batch, length = x.shape[:2]
        if mask is not None and (mask.dtype != torch.bool or mask.shape != (batch, length)):
            raise ValueError(
                f"{name}: mask is {mask.dtype} {tuple(mask.shape)}, expected bool ({batch}, {length}), "
                "True = real token"
            )
        if self.cross:
            if context is None:
                raise ValueError(f"{name}: the pattern {self.pattern!r} needs a context")
            if context.dim() != 3 or context.shape[0] != batch or context.shape[2] != self.dim:
                raise ValueError(f"{name}: context has shape {tuple(context.shape)}, expected ({batch}, S, {self.dim})")
            if context_mask is not None and (
                context_mask.dtype != torch.bool or context_mask.shape != context.shape[:2]
            ):
                raise ValueError(
                    f"{name}: context_mask is {context_mask.dtype} {tuple(context_mask.shape)}, "
                    f"expected bool {tuple(context.shape[:2])}"
                )
            if cu_seqlens is not None or state is not None:
                raise ValueError(f"{name}: cu_seqlens and state are for self patterns, not {self.pattern!r}")
        elif context is not None or context_mask is not None:
            raise ValueError(f"{name}: a context was given, but the pattern is {self.pattern!r}")
        if state is not None and not (self.streaming and self.causal):
            raise ValueError(f"{name}: a state was given, but the pattern {self.pattern!r} carries none")
        if cu_seqlens is not None:
            if batch != 1:
                raise ValueError(f"{name}: cu_seqlens needs one packed row (B = 1), x has B = {batch}")
            if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
                raise ValueError(f"{name}: cu_seqlens must be an int32 vector (N+1,)")
            if mask is not None:
                raise ValueError(f"{name}: give either mask or cu_seqlens, not both")
        if self.exchange is not None:
            if mask is not None or cu_seqlens is not None:
                raise ValueError(
                    f"{name}: a sequence that is split over ranks takes no mask and no cu_seqlens; give rows of equal "
                    "length, cut or filled up before they are split"
                )
            if length != self.exchange.lengths[self.exchange.rank]:
                raise ValueError(
                    f"{name}: rank {self.exchange.rank} was given {length} tokens, its part of "
                    f"{self.exchange.total} has {self.exchange.lengths[self.exchange.rank]}"
                )
        places = length - self.num_prefix_tokens
        if grid is not None and (len(grid) not in (2, 3) or min(grid) < 1 or math.prod(grid) != places):
            raise ValueError(f"{name}: grid={tuple(grid)} holds {math.prod(grid)} tokens, x has {places}")
        if state is not None:
            self._check_state(state, batch if cu_seqlens is None else cu_seqlens.shape[0] - 1)

    def _check_state(self, state: State, rows: int) -> None:
        """Raise ValueError unless `state` is of `state_type` with `rows` rows, as `init_state(rows)` gives it."""
        name = type(self).__name__
        if self.state_type is not None and not isinstance(state, self.state_type):
            raise ValueError(
                f"{name}: state is a {type(state).__name__}, expected the {self.state_type.__name__} of init_state"
            )

        def check(tensor: Tensor) -> Tensor:
            if tensor.shape[:1] != (rows,):
                raise ValueError(f"{name}: state is of {tensor.shape[0]} rows, but there are {rows} sequences")
            return tensor

        map_state(check, state)

    def _check_sizes(self, state: State) -> None:
        """Raise ValueError unless the parts of `state` have the sizes that `init_state` gives them.

        A second dimension that is 0 there may have grown. For mixers whose kernels do not check it themselves."""
        if torch.compiler.is_compiling():
            return
        if self._due is None:  # asked once: a step of decoding is short
            self._due = _sizes(self.init_state(0))
        held = _sizes(state)
        if len(held) != len(self._due) or not all(map(_fits, held, self._due)):
            shown = [", ".join("none" if size is None else str(size) for size in sizes) for sizes in (held, self._due)]
            raise ValueError(
                f"{type(self).__name__}: state has parts of {shown[0]} in each row, expected {shown[1]}, as init_state "
                "gives it"
            )


@contextmanager
def exchanging(model: nn.Module, exchange: Exchange) -> Iterator[None]:
    """Within it every part of `model` that can ask an exchange has this one."""
    parts = [part for part in model.modules() if hasattr(part, "exchange")]
    before = [part.exchange for part in parts]
    try:
        for part in parts:
            part.exchange = exchange  # type: ignore[assignment]
        yield
    finally:
        for part, old in zip(parts, before, strict=True):
            part.exchange = old


def map_state(function: Any, *states: StateT) -> StateT:
    """Apply `function` to the tensors of one or more states of the same structure, keeping the structure."""
    first = states[0]
    if isinstance(first, Tensor):
        return function(*states)
    if first is None:
        return None  # type: ignore[return-value]
    if isinstance(first, tuple):
        parts = [map_state(function, *group) for group in zip(*states, strict=True)]
        return type(first)(*parts) if hasattr(first, "_fields") else tuple(parts)  # type: ignore[return-value]
    raise TypeError(f"a state holds tensors, None and (named) tuples, not {type(first).__name__}")


def _sizes(state: State) -> list[tuple[int, ...] | None]:
    """Of the tensors of a state in each row, and None where it could hold one, in order."""
    if isinstance(state, tuple):
        return [size for part in state for size in _sizes(part)]
    return [None if state is None else tuple(state.shape[1:])]


def _fits(size: tuple[int, ...] | None, due: tuple[int, ...] | None) -> bool:
    if size is None or due is None:
        return size is due or (size is not None and size[-1:] == (0,))  # room, see `KVState`
    fixed = 1 if due[:1] == (0,) else 0
    return len(size) == len(due) and size[fixed:] == due[fixed:]


def detach_state(state: StateT) -> StateT:
    """The state cut from the graph, for truncated backpropagation."""
    return map_state(lambda t: t.detach(), state)


def select_rows(state: StateT, index: Tensor) -> StateT:
    """Rows of the batch in the order of `index` (int64), for beams and for batches that shrink."""
    return map_state(lambda t: t.index_select(0, index), state)


def reset_rows(state: StateT, rows: Tensor, fresh: StateT) -> StateT:
    """Rows where `rows` (bool, (B,)) is True taken from `fresh`, a state of the same shapes, the others kept."""
    return map_state(lambda new, old: torch.where(rows.view(-1, *[1] * (old.dim() - 1)), new, old), fresh, state)


def state_elements(state: State) -> int:
    """Floating-point elements held per row of the batch."""
    count = 0

    def add(tensor: Tensor) -> Tensor:
        nonlocal count
        if tensor.is_floating_point() or tensor.is_complex():
            count += tensor[0].numel() * (2 if tensor.is_complex() else 1)
        return tensor

    map_state(add, state)
    return count
