"""Properties of every mixer that streams: any history of chunks, steps, packed chunks and reordered rows.

See `test_properties`, and `mixer_strategies` for what is drawn.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from mixer_strategies import FILLERS, Setup, build, close, gradients, lengths, mask_of, masks, setups, tensor
from torch import Tensor

from examples import forall
from seqzoo.blocks.protocol import ChunkSummary, Mixer, State, map_state, reset_rows, select_rows, state_elements
from seqzoo.blocks.registry import list_mixers, mixer_info
from seqzoo.blocks.testing.streaming import shapes

STREAMING = list_mixers(streaming=True)


@dataclass(frozen=True)
class Chunk:
    """The next tokens of every row: a mask word per row, or None where all are real."""

    width: int
    mask: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Together:
    """The next tokens of every row, packed into one row without pads."""

    sizes: tuple[int, ...]


@dataclass(frozen=True)
class Rows:
    """Rows of the state reordered, repeated, dropped."""

    order: tuple[int, ...]


@dataclass(frozen=True)
class Reset:
    """Rows that start anew."""

    rows: tuple[bool, ...]


@dataclass(frozen=True)
class Stream:
    """What happens to a state, from `rows` fresh rows on. bounded: it is told how many tokens come."""

    setup: Setup
    rows: int
    steps: tuple[Chunk | Together | Rows | Reset, ...]
    bounded: bool = False
    residual: bool = False
    filler: float = 0.0


@st.composite
def streams(draw: st.DrawFn, name: str) -> Stream:
    setup = draw(setups(name, ["causal"]))
    rows = now = draw(st.integers(1, 3))
    steps: list[Chunk | Together | Rows | Reset] = []
    for _ in range(draw(st.integers(1, 7))):
        kind = draw(st.sampled_from(("chunk", "step", "masked", "packed", "rows", "reset")))
        width = draw(lengths(setup, most=17))
        if kind in ("chunk", "step"):
            steps.append(Chunk(1 if kind == "step" else width))
        elif kind == "masked":
            steps.append(Chunk(width, draw(masks(now, width))))
        elif kind == "packed":
            steps.append(Together(tuple(draw(lengths(setup, most=9)) for _ in range(now))))
        elif kind == "rows":
            steps.append(Rows(tuple(draw(st.lists(st.integers(0, now - 1), min_size=1, max_size=4)))))
            now = len(steps[-1].order)
        else:
            steps.append(Reset(tuple(draw(st.lists(st.booleans(), min_size=now, max_size=now)))))
    residual = build(setup).reads_residual and draw(st.booleans())
    return Stream(setup, rows, tuple(steps), draw(st.booleans()), residual, draw(st.sampled_from(FILLERS)))


@dataclass
class History:
    """The real tokens of a row so far, its outputs, and (as a mixer may gate against it) its residual."""

    x: list[Tensor] = field(default_factory=list)
    y: list[Tensor] = field(default_factory=list)
    residual: list[Tensor] = field(default_factory=list)


def slots(case: Stream) -> int:
    """Tokens, pads included, that a row's cache comes to hold."""
    return sum(s.width if isinstance(s, Chunk) else max(s.sizes) if isinstance(s, Together) else 0 for s in case.steps)


def run(mixer: Mixer, case: Stream) -> tuple[list[History], State]:
    state = mixer.init_state(case.rows, max_len=slots(case) if case.bounded else None)
    rows, width = [History() for _ in range(case.rows)], case.setup.dim
    for number, step in enumerate(case.steps):
        if isinstance(step, Rows):
            state = select_rows(state, torch.tensor(step.order))
            rows = [History(*(list(part) for part in vars(rows[r]).values())) for r in step.order]
            continue
        if isinstance(step, Reset):
            fresh = mixer.init_state(len(rows), max_len=slots(case) if case.bounded else None)
            if shapes(fresh) != shapes(state):
                continue  # a cache that grows has other slots: no rows are reset in it
            state = reset_rows(state, torch.tensor(step.rows), fresh)
            rows = [History() if again else row for row, again in zip(rows, step.rows, strict=True)]
            continue
        packed = isinstance(step, Together)
        shape = (1, sum(step.sizes), width) if packed else (len(rows), step.width, width)
        numbers: dict[str, Any] = {"x": tensor(*shape, seed=10 * number)}
        if case.residual:
            numbers["residual"] = tensor(*shape, seed=10 * number + 1)
        before = map_state(torch.clone, state)
        if packed:
            bounds = torch.tensor([0, *step.sizes]).cumsum(0).int()
            out = mixer(**numbers, cu_seqlens=bounds, state=state)
            parts = {k: v[0].split(step.sizes) for k, v in {**numbers, "y": out.y}.items()}
        else:
            mask = mask_of(step.mask, step.width)
            filled = {
                k: v if mask is None else v.masked_fill(~mask.unsqueeze(2), case.filler) for k, v in numbers.items()
            }
            out = mixer(**filled, mask=mask, state=state)
            real = [slice(None)] * len(rows) if mask is None else list(mask)
            assert mask is None or not bool(out.y[~mask].any()), "an output at a pad is not zero"
            parts = {k: [v[i, r] for i, r in enumerate(real)] for k, v in {**numbers, "y": out.y}.items()}
        map_state(lambda now, then: _unchanged(now, then), state, before)
        state = out.state
        for i, row in enumerate(rows):
            for key, part in parts.items():
                getattr(row, key).append(part[i])
    return rows, state


def _unchanged(now: Tensor, then: Tensor) -> Tensor:
    assert torch.equal(now, then), "the state that was passed in was written to"
    return now


@pytest.mark.parametrize("name", STREAMING)
def test_any_history_gives_what_one_forward_gives(name: str) -> None:
    """Chunks and steps of any length, padded anywhere or packed, rows reordered, repeated and reset between them."""

    def holds(case: Stream) -> None:
        mixer = build(case.setup)
        with torch.no_grad():
            rows, state = run(mixer, case)
            for i, row in enumerate(rows):
                x = torch.cat([*row.x, tensor(0, case.setup.dim, seed=0)])[None]
                residual = {"residual": torch.cat(row.residual)[None]} if row.residual else {}
                if x.shape[1]:
                    close(torch.cat(row.y)[None], mixer(x, **residual).y, f"row {i} of {x.shape[1]} tokens")
        whole = all(isinstance(s, Rows) or (isinstance(s, Chunk) and s.mask is None) for s in case.steps)
        if whole and not case.bounded:
            said = mixer.state_size(slots(case))
            assert state_elements(state) == said, f"state_size says {said}, the state holds {state_elements(state)}"

    forall(streams(name), holds, few=8)


@pytest.mark.parametrize("name", STREAMING)
def test_the_gradient_goes_through_any_chunks(name: str) -> None:
    """Of the tokens and of the first state's: as in one forward."""

    def holds(case: Stream) -> None:
        mixer = build(case.setup)
        sizes = [s.width for s in case.steps if isinstance(s, Chunk)] or [1, 0, 2]
        x = tensor(case.rows, sum(sizes), case.setup.dim, seed=1).requires_grad_()
        weight = tensor(*x.shape, seed=2)
        state, pieces = mixer.init_state(case.rows, max_len=sum(sizes) if case.bounded else None), []
        for part in x.split(sizes, 1):
            out = mixer(part, state=state)
            pieces.append(out.y)
            state = out.state
        got, want = (gradients((y * weight).sum(), [x])[0] for y in (torch.cat(pieces, 1), mixer(x).y))
        close(got, want, f"gradient through chunks of {sizes}")

    forall(streams(name), holds, few=4)


@dataclass(frozen=True)
class Grouping:
    """Chunks of a sequence, and in which order neighbours' summaries are joined."""

    setup: Setup
    sizes: tuple[int, ...]
    joins: tuple[int, ...]


@st.composite
def groupings(draw: st.DrawFn, name: str) -> Grouping:
    setup = draw(setups(name, ["causal"]))
    sizes = tuple(draw(st.lists(lengths(setup, most=17), min_size=1, max_size=6)))
    return Grouping(setup, sizes, tuple(draw(st.integers(0, n - 1)) for n in range(len(sizes) - 1, 0, -1)))


def _near(got: Tensor, want: Tensor) -> Tensor:
    close(got.to(want.dtype), want, "the state of the joined summaries")
    return got


@pytest.mark.parametrize("name", [n for n in STREAMING if mixer_info(n).cls.linear_state])
def test_summaries_join_in_any_grouping(name: str) -> None:
    """The state after the chunks, and each chunk's output after the prefix, as streaming them gives."""

    def holds(case: Grouping) -> None:
        mixer, width = build(case.setup), case.setup.dim
        x, start = tensor(2, sum(case.sizes), width, seed=1), mixer.init_state(2)
        start = mixer(tensor(2, 3, width, seed=2), state=start).state
        state, summaries, outputs = start, [], []
        for part in x.split(case.sizes, 1):
            summaries.append(mixer.chunk_summary(part, state=state))
            out = mixer.apply_prefix(part, state)
            state = out.state
            outputs.append(out.y)
        joined: list[ChunkSummary] = list(summaries)
        for at in case.joins:
            joined[at : at + 2] = [joined[at].then(joined[at + 1])]
        map_state(
            lambda a, b: close(a.to(b.dtype), b, "the state of the joined summaries") or a,
            joined[0].apply(start),
            state,
        )
        close(torch.cat(outputs, 1), mixer(x, state=start).y, "outputs after the prefixes")

    forall(groupings(name), holds, few=4)
