"""The mixer contract: one method for training, prefill, chunked and single-step decoding.

Shape letters used throughout `blocks`: B batch, L length (queries), S source length (keys, values), D model width,
H heads, K key width per head, V value width per head, N sequences in a packed row.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, TypeVar

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
    """

    patterns: ClassVar[frozenset[str]] = frozenset({"self"})
    streaming: ClassVar[bool] = False
    state_type: ClassVar[type | None] = None
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {"default": {}}
    exact: bool = True
    smooth: bool = True
    reads_residual: bool = False
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
