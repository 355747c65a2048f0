"""A sequence of which every rank holds a part: what a mixer can ask of the other ranks, with gradients.

The objective is the sum of what the ranks backpropagate. So the gradient of a parameter, or of anything else that every
rank holds a copy of (an initial state), is the sum of the ranks' gradients.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .transport import Transport

Spans = Sequence[Sequence[tuple[int, int]]]


def even_lengths(total: int, size: int) -> tuple[int, ...]:
    """`total` tokens over `size` ranks, the first ones a token longer where it does not come out even.

    Raises ValueError when a rank would have none."""
    if total < size:
        raise ValueError(f"{total} tokens cannot be split over {size} ranks; each needs at least one")
    return tuple(total // size + (rank < total % size) for rank in range(size))


class SharedSequence:
    """The `Exchange` of mixers over a `Transport`: rank r holds lengths[r] tokens, in the order of the ranks.

    lengths: tokens of every rank, the same on all. Raises ValueError unless there is one per rank, none below 1.
    """

    def __init__(self, transport: Transport, lengths: Sequence[int], *, from_end: bool = False) -> None:
        if len(lengths) != transport.size or min(lengths) < 1:
            raise ValueError(
                f"lengths={list(lengths)} must give every one of the {transport.size} ranks at least one token"
            )
        self.transport, self.from_end = transport, from_end
        self.lengths = tuple(lengths[::-1] if from_end else lengths)
        self.rank = transport.size - 1 - transport.rank if from_end else transport.rank
        self.size, self.total = transport.size, sum(lengths)
        self.starts = tuple(accumulate(self.lengths, initial=0))[:-1]
        self.start = self.starts[self.rank]

    def __repr__(self) -> str:
        return f"{type(self).__name__}(rank={self.rank}, lengths={self.lengths}, from_end={self.from_end})"

    @property
    def reversed(self) -> SharedSequence:
        forward = self.lengths[::-1] if self.from_end else self.lengths
        return SharedSequence(self.transport, forward, from_end=not self.from_end)

    # --- flat collectives in the order of the sequence

    def all_gather(self, x: Tensor) -> list[Tensor]:
        return self._ordered(self.transport.all_gather(x))

    def all_to_all(self, parts: list[Tensor], sizes: list[int]) -> list[Tensor]:
        return self._ordered(self.transport.all_to_all(self._ordered(parts), self._ordered(sizes)))

    def _ordered(self, parts: list[Any]) -> list[Any]:
        return parts[::-1] if self.from_end else parts

    # --- tokens

    def split(self, x: Tensor) -> Tensor:
        """Own part of x (B, total, ...), which every rank holds. Raises ValueError for another length."""
        if x.dim() < 2 or x.shape[1] != self.total:
            raise ValueError(f"x has shape {tuple(x.shape)}, expected (B, {self.total}, ...), the tokens of all ranks")
        return x[:, self.start : self.start + self.lengths[self.rank]]

    def join(self, x: Tensor) -> Tensor:
        """The whole sequence (B, total, ...) on every rank, from own part x (B, L, ...)."""
        return self.everywhere(x)

    def gather(self, x: Tensor, spans: Spans) -> Tensor:
        """See `Exchange.gather`. Raises ValueError for spans outside of the sequence."""
        if len(spans) != self.size or any(not 0 <= a <= b <= self.total for part in spans for a, b in part):
            raise ValueError(f"spans {spans} must be within the {self.total} tokens, for each of {self.size} ranks")
        return _Gather.apply(x, self, spans)

    def everywhere(self, x: Tensor, *spans: tuple[int, int]) -> Tensor:
        """The same spans on every rank; without any, the whole sequence."""
        return self.gather(x, [spans or ((0, self.total),)] * self.size)

    def around(self, x: Tensor, before: int, after: int = 0, initial: Tensor | None = None) -> Tensor:
        """See `Exchange.around`."""
        if before == after == 0:
            return x
        ends = [start + length for start, length in zip(self.starts, self.lengths, strict=True)]
        spans = [
            ((max(0, start - before), min(self.total, end + after)),)
            for start, end in zip(self.starts, ends, strict=True)
        ]
        found = self.gather(x, spans)
        front = max(0, before - self.start)
        back = before + x.shape[1] + after - front - found.shape[1]
        return _extended(found, front, back, None if initial is None else initial[:, before - front :])

    def last(self, x: Tensor, number: int, initial: Tensor | None = None) -> Tensor:
        """See `Exchange.last`."""
        first = max(0, self.total - number)
        found = self.everywhere(x, (first, self.total))
        front = number - found.shape[1]
        return _extended(found, front, 0, None if initial is None else initial[:, initial.shape[1] - front :])

    # --- states

    def prefix(
        self,
        transitions: Sequence[Tensor | None],
        states: Sequence[Tensor],
        initial: Sequence[Tensor] | None = None,
        *,
        return_last: bool = False,
    ) -> tuple[list[Tensor], list[Tensor] | None]:
        """See `Exchange.prefix`: one all-gather of transitions and states; one of the gradients in the backward."""
        factors = [t for t in transitions if t is not None]
        plan = _Plan(self, tuple(t is not None for t in transitions), initial is not None, return_last, True)
        found = _States.apply(plan, *factors, *states, *(initial or ()))
        return list(found[: len(states)]), list(found[len(states) :]) if return_last else None

    def others(self, states: Sequence[Tensor]) -> list[Tensor]:
        """See `Exchange.others`: one all-gather, and one of the gradients in the backward."""
        plan = _Plan(self, (False,) * len(states), False, False, False)
        return list(_States.apply(plan, *states))


def _extended(x: Tensor, front: int, back: int, before: Tensor | None) -> Tensor:
    """x (B, L, ...) with `front` tokens before it, `before` (B, front, ...) or zeros, and `back` zeros behind it."""
    pieces = [x]
    if front:
        zeros = x.new_zeros(x.shape[0], front, *x.shape[2:])
        pieces.insert(0, zeros if before is None else before.to(x.dtype))
    if back:
        pieces.append(x.new_zeros(x.shape[0], back, *x.shape[2:]))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, 1)


class _Gather(torch.autograd.Function):
    """Tokens from other ranks; the backward sends their gradients home, where they are added."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: SharedSequence, spans: Spans) -> Tensor:
        ctx.exchange, ctx.spans, ctx.shape = exchange, spans, x.shape
        width = x[:, :1].numel()
        sent = [_flat([x[:, a:b] for a, b in _overlaps(exchange, exchange.rank, part)], x) for part in spans]
        pieces = _pieces(exchange, spans[exchange.rank])
        sizes = [width * sum(n for source, n in pieces if source == rank) for rank in range(exchange.size)]
        received = [iter(_unflat(t, x, [n for s, n in pieces if s == rank]))
                    for rank, t in enumerate(exchange.all_to_all(sent, sizes))]  # fmt: skip
        found = [next(received[source]) for source, _ in pieces]
        return torch.cat(found, 1) if found else x.new_zeros(x.shape[0], 0, *x.shape[2:])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        exchange, spans = ctx.exchange, ctx.spans
        pieces = _pieces(exchange, spans[exchange.rank])
        cut = grad.split([n for _, n in pieces], 1) if pieces else ()
        sent = [
            _flat([part for part, (source, _) in zip(cut, pieces, strict=True) if source == rank], grad)
            for rank in range(exchange.size)
        ]
        wanted = [_overlaps(exchange, exchange.rank, part) for part in spans]
        width = grad.new_empty(ctx.shape[0], 1, *ctx.shape[2:]).numel()
        sizes = [width * sum(b - a for a, b in part) for part in wanted]
        total = grad.new_zeros(ctx.shape)
        for part, flat in zip(wanted, exchange.all_to_all(sent, sizes), strict=True):
            for (a, b), piece in zip(part, _unflat(flat, grad, [b - a for a, b in part]), strict=True):
                total[:, a:b] += piece
        return total, None, None


def _overlaps(exchange: SharedSequence, rank: int, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The parts of `spans` that `rank` holds, counted from its first token."""
    start, length = exchange.starts[rank], exchange.lengths[rank]
    found = [(max(a - start, 0), min(b - start, length)) for a, b in spans]
    return [(a, b) for a, b in found if a < b]


def _pieces(exchange: SharedSequence, spans: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """(rank that holds it, tokens) of what `spans` consist of, in their order."""
    return [
        (rank, b - a) for span in spans for rank in range(exchange.size) for a, b in _overlaps(exchange, rank, [span])
    ]


def _flat(parts: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([part.reshape(-1) for part in parts]) if parts else like.new_empty(0)


def _unflat(flat: Tensor, like: Tensor, lengths: list[int]) -> list[Tensor]:
    """`flat` as tensors (B, n, ...) for n of `lengths`; B and ... of `like`."""
    width = like[:, :1].numel() if like.shape[1] else like.shape[0] * like.new_empty(like.shape[2:]).numel()
    return [
        part.reshape(like.shape[0], n, *like.shape[2:])
        for part, n in zip(flat.split([width * n for n in lengths]), lengths, strict=True)
    ]


class _Plan:
    """What `_States` computes: which states have a transition, whether an initial state is given, what is asked for."""

    def __init__(
        self, exchange: SharedSequence, moving: tuple[bool, ...], started: bool, last: bool, ordered: bool
    ) -> None:
        self.exchange, self.moving, self.started, self.last, self.ordered = exchange, moving, started, last, ordered

    def outputs(self, steps: list[list[Tensor]], initial: list[Tensor]) -> tuple[list[list[Tensor]], list[Tensor]]:
        """What every rank is given, and the state after all of them. steps: the tensors of every rank."""
        count = len(self.moving)
        if not self.ordered:
            given = [
                [sum_of([step[i] for s, step in enumerate(steps) if s != rank], steps[rank][i]) for i in range(count)]
                for rank in range(len(steps))
            ]
            return given, []
        state = initial or [torch.zeros_like(t) for t in steps[0][-count:]]
        given = []
        for step in steps:
            given.append(state)
            factors = iter(step[:-count])
            state = [
                (next(factors) * old if moves else old) + new
                for moves, old, new in zip(self.moving, state, step[-count:], strict=True)
            ]
        return given, state


def sum_of(tensors: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(tensors).sum(0) if tensors else torch.zeros_like(like)


class _States(torch.autograd.Function):
    """The affine maps of all ranks, gathered once, and composed up to each rank; see `SharedSequence.prefix`.

    The backward gathers the gradients of what the ranks were given, once, and every rank runs the composition backwards
    for its own map. Their size does not depend on the number of tokens.
    """

    @staticmethod
    def forward(ctx: Any, plan: _Plan, *tensors: Tensor) -> tuple[Tensor, ...]:
        count = len(plan.moving)
        own = list(tensors[: -count or None] if plan.started else tensors)
        initial = list(tensors[-count:]) if plan.started else []
        steps = [_unpack(flat, own) for flat in plan.exchange.all_gather(_pack(own))]
        given, last = plan.outputs(steps, initial)
        ctx.plan, ctx.number = plan, len(own)
        ctx.save_for_backward(*(t for step in steps for t in step), *initial)
        mine = given[plan.exchange.rank]
        return tuple(t.clone() for t in (*mine, *last)) if plan.last else tuple(t.clone() for t in mine)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        plan, number = ctx.plan, ctx.number
        rank, size = plan.exchange.rank, plan.exchange.size
        saved = list(ctx.saved_tensors)
        steps = [saved[i * number : (i + 1) * number] for i in range(size)]
        everyone = [_unpack(flat, list(grads)) for flat in plan.exchange.all_gather(_pack(list(grads)))]
        with torch.enable_grad():
            own = steps[rank] = [t.detach().requires_grad_() for t in steps[rank]]
            initial = [t.detach().requires_grad_() for t in saved[size * number :]]
            given, last = plan.outputs(steps, initial)

            def pull(ranks: range | list[int], leaves: list[Tensor]) -> list[Tensor]:
                outputs = [t for r in ranks for t in (*given[r], *(last if plan.last else ()))]
                pulled = [g for r in ranks for g in everyone[r]]
                pairs = [(t, g) for t, g in zip(outputs, pulled, strict=True) if t.requires_grad]
                if not pairs or not leaves:
                    return [torch.zeros_like(t) for t in leaves]
                found = torch.autograd.grad(
                    [t for t, _ in pairs], leaves, [g for _, g in pairs], retain_graph=True, allow_unused=True
                )
                return [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, found, strict=True)]

            mine, start = pull(range(size), own), pull([rank], initial)
        return None, *mine, *start


def _pack(tensors: list[Tensor]) -> Tensor:
    """One real vector of all, of the widest dtype among them."""
    parts = [(torch.view_as_real(t.resolve_conj()) if t.is_complex() else t).reshape(-1) for t in tensors]
    wide = parts[0].dtype
    for part in parts:
        wide = torch.promote_types(wide, part.dtype)
    return torch.cat([part.to(wide) for part in parts])


def _unpack(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    found = []
    parts = flat.split([t.numel() * (2 if t.is_complex() else 1) for t in like])
    for part, t in zip(parts, like, strict=True):
        if t.is_complex():
            found.append(torch.view_as_complex(part.reshape(*t.shape, 2)).to(t.dtype))
        else:
            found.append(part.reshape(t.shape).to(t.dtype))
    return found
