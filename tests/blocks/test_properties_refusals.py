"""Wrong inputs of every registered mixer, drawn: each is one clear ValueError, never an error from deep inside.

See `mixer_strategies` for what is drawn.
"""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from mixer_strategies import Setup, build, setups, tensor

from examples import forall
from seqzoo.blocks.registry import list_mixers
from seqzoo.blocks.testing.streaming import shapes


@dataclass(frozen=True)
class Mistakes:
    """A call, and what is wrong in its place: shapes of arguments, bounds of packed rows, grids."""

    setup: Setup
    batch: int
    length: int
    source: int
    shapes: dict[str, tuple[int, ...]]
    bounds: tuple[int, ...]
    grid: tuple[int, ...]


@st.composite
def wrong_shapes(draw: st.DrawFn, right: tuple[int, ...], places: tuple[int, ...]) -> tuple[int, ...]:
    """Of another rank, or of another size in one of the dimensions `places`."""
    kind = draw(st.sampled_from(("size", "fewer", "more")))
    if kind == "fewer":
        return right[1:]
    if kind == "more":
        return (*right, draw(st.integers(1, 3)))
    place = draw(st.sampled_from(places))
    return (*right[:place], right[place] + draw(st.integers(1, 3)), *right[place + 1 :])


def wrong_bounds(total: int) -> st.SearchStrategy[tuple[int, ...]]:
    """cu_seqlens that do not rise from 0 to `total`."""

    def bad(values: tuple[int, ...]) -> bool:
        return len(values) < 2 or values[0] != 0 or values[-1] != total or sorted(values) != list(values)

    return st.lists(st.integers(-2, total + 2), max_size=5).map(tuple).filter(bad)


@st.composite
def mistakes(draw: st.DrawFn, name: str) -> Mistakes:
    setup = draw(setups(name))
    mixer, crossed = build(setup), "cross" in setup.pattern
    batch, length, source = draw(st.integers(1, 3)), draw(st.integers(0, 9)), draw(st.integers(0, 9))
    shapes = {"x": ((batch, length, setup.dim), (2,)), "mask": ((batch, length), (0, 1))}
    if crossed:
        shapes |= {"context": ((batch, source, setup.dim), (0, 2)), "context_mask": ((batch, source), (0, 1))}
    if mixer.reads_residual:
        shapes["residual"] = ((batch, length, setup.dim), (0, 1, 2))
    places = length - mixer.num_prefix_tokens
    grids = st.lists(st.integers(-1, 5), max_size=4).map(tuple)
    return Mistakes(
        setup,
        batch,
        length,
        source,
        {key: draw(wrong_shapes(*right)) for key, right in shapes.items()},
        draw(wrong_bounds(length)),
        draw(grids.filter(lambda g: len(g) not in (2, 3) or min(g) < 1 or math.prod(g) != places)),
    )


@pytest.mark.parametrize("name", list_mixers())
def test_wrong_inputs_are_refused_by_name(name: str) -> None:
    """A wrong rank, size or dtype is a ValueError that names the mixer or the argument."""

    def holds(case: Mistakes) -> None:
        mixer, width = build(case.setup), case.setup.dim
        inputs = {"x": tensor(case.batch, case.length, width, seed=0)}
        row, rows = tensor(1, case.length, width, seed=1), tensor(2, 4, width, seed=1)
        wrong: dict[str, dict[str, Any]] = {
            key: {key: torch.ones(shape, dtype=torch.bool if "mask" in key else torch.float64)}
            for key, shape in case.shapes.items()
        }
        wrong["x dtype"] = {"x": inputs["x"].long()}
        wrong["mask dtype"] = {"mask": torch.ones(case.batch, case.length)}
        wrong["grid"] = {"grid": case.grid}
        wrong["state"] = {"state": (torch.zeros(case.batch + 1, 2),)}
        if "cross" in case.setup.pattern:
            inputs["context"] = tensor(case.batch, case.source, width, seed=2)
            wrong["no context"] = {"context": None}
            wrong["packed"] = {"cu_seqlens": torch.tensor([0, case.length])}
        else:
            wrong["a context"] = {"context": inputs["x"]}
            wrong["bounds"] = {"x": row, "cu_seqlens": torch.tensor(case.bounds, dtype=torch.int32)}
            wrong["bounds of another rank"] = {"x": row, "cu_seqlens": torch.tensor([[0, case.length]])}
            wrong["bounds of floats"] = {"x": row, "cu_seqlens": torch.tensor([0.0, case.length])}
            wrong["two packed rows"] = {"x": rows, "cu_seqlens": torch.tensor([0, 4])}
        for what, given in wrong.items():
            try:
                mixer(**{**inputs, **given})
            except ValueError as refusal:
                said = str(refusal)
                assert type(mixer).__name__ in said or "cu_seqlens" in said or "residual" in said, f"{what}: {said}"
            else:
                pytest.fail(f"{what} was accepted: {given}")

    forall(mistakes(name), holds, few=4)


@pytest.mark.parametrize("name", list_mixers(streaming=True))
def test_a_state_of_another_build_is_refused(name: str) -> None:
    """Where a part has other sizes, but for a cache's slots, it is a ValueError."""

    def holds(case: tuple[Setup, Setup]) -> None:
        mine, other = (build(setup) for setup in case)
        state, own = other.init_state(2), shapes(mine.init_state(2))
        fits = len(shapes(state)) == len(own) and all(
            theirs == ours or (len(theirs) == len(ours) and ours[1:2] == (0,) and theirs[2:] == ours[2:])
            for theirs, ours in zip(shapes(state), own, strict=True)
        )
        if shapes(state) == own:
            mine(tensor(2, 3, mine.dim, seed=1), state=state)
            return
        # an axis that is empty at first may grow, as a cache's, or be of a convolution of one tap
        with contextlib.suppress(ValueError) if fits else pytest.raises(ValueError, match=r"state(\.\w+)? (has|is) "):
            mine(tensor(2, 3, mine.dim, seed=1), state=state)

    one = setups(name, ["causal"])
    forall(st.tuples(one, one), holds, few=6)
