"""Properties of the kernels over drawn sizes: padded rows are rows alone, parts joined by a state are the whole.

For every operation and every backend that runs here, against the backend called naive of a row alone. Sizes, lengths,
cuts, strides and the values beyond a row's end are drawn; see `mixer_strategies`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from mixer_strategies import LAYOUTS, LENGTHS, close, gradients, laid_out, tensor, usable_backends
from torch import Tensor

from examples import forall
from seqzoo.kernels.agent_attention import running_agent_attention
from seqzoo.kernels.dilated_conv import dilated_conv
from seqzoo.kernels.ema import Coefficients, ema
from seqzoo.kernels.gated_linear_attention import (
    gated_linear_attention,
)
from seqzoo.kernels.s4d_conv import s4d_conv
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.kernels.vq_attention import vq_attention

Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class Sizes:
    """What is drawn for a call. lengths: real tokens of each row of `length`. cuts: sizes of the parts of a stream."""

    lengths: tuple[int, ...]
    length: int
    heads: int = 1
    key: int = 3
    value: int = 2
    chunk: int = 4
    backend: str = "auto"
    option: int = 0
    layout: str = "contiguous"
    filler: float = 0.0
    cuts: tuple[int, ...] = ()
    seed: int = 0


@st.composite
def sizes(draw: st.DrawFn, op: str) -> Sizes:
    number = st.one_of(st.integers(0, 20), st.sampled_from(LENGTHS))
    rows = tuple(draw(st.lists(number, min_size=1, max_size=4)))
    length = max(rows) + draw(st.integers(0, 3))
    cuts, left = [], length
    while left and len(cuts) < 5:
        cuts.append(draw(st.integers(0, left)))
        left -= cuts[-1]
    return Sizes(
        rows,
        length,
        draw(st.integers(1, 3)),
        draw(st.integers(1, 5)),
        draw(st.integers(1, 5)),
        draw(st.sampled_from((1, 2, 4, 8, 16))),
        draw(st.sampled_from(usable_backends(op))),
        draw(st.integers(0, 5)),
        draw(st.sampled_from(LAYOUTS)),
        draw(st.sampled_from((0.0, 7.0, -1e6))),
        (*cuts, left),
        draw(st.integers(0, 99)),
    )


def _decay(case: Sizes, *shape: int) -> Tensor:
    return -tensor(*shape, seed=case.seed + 50).abs()


# What every operation is given: tensors along the rows and tokens, and how it is called with them.

Call = Callable[..., tuple[Tensor, Any]]


def _gated(case: Sizes) -> tuple[Tensors, Call]:
    batch, form = len(case.lengths), case.option % 3
    groups = case.heads if form == 2 or case.option > 2 else 1
    rows = {
        "q": tensor(batch, case.length, groups, case.key, seed=case.seed),
        "k": tensor(batch, case.length, groups, case.key, seed=case.seed + 1),
        "v": tensor(batch, case.length, case.heads, case.value, seed=case.seed + 2),
    }
    options: dict[str, Any] = {"scale": 0.7, "chunk_size": case.chunk}
    if form == 0:
        options["log_decay"] = _decay(case, case.heads)
    else:
        rows["log_decay"] = _decay(case, batch, case.length, case.heads, *([case.key] if form == 2 else []))
    return rows, partial(gated_linear_attention, **options)


def _selective(case: Sizes) -> tuple[Tensors, Call]:
    batch, width = len(case.lengths), 2 * case.value
    rows = {
        "u": tensor(batch, case.length, width, seed=case.seed),
        "dt": tensor(batch, case.length, width, seed=case.seed + 1).abs(),
        "b": tensor(batch, case.length, case.key, seed=case.seed + 2),
        "c": tensor(batch, case.length, case.key, seed=case.seed + 3),
    }
    fixed = {"a": _decay(case, width, case.key), "chunk_size": None if case.option == 0 else case.chunk}
    fixed["skip"] = tensor(width, seed=case.seed + 4) if case.option % 2 else None
    return rows, partial(selective_scan, **fixed)


def _ema(case: Sizes) -> tuple[Tensors, Call]:
    def coefficients(seed: int) -> Coefficients:
        b, c = (tensor(case.value, case.key, seed=case.seed + seed + i) for i in (1, 2))
        return Coefficients(_decay(case, case.value, case.key), b, c)

    fixed: dict[str, Any] = {
        "ahead": coefficients(10),
        "skip": tensor(case.value, seed=case.seed + 5) if case.option % 2 else None,
        "truncation": case.chunk if case.option > 2 else None,
    }
    return {"x": tensor(len(case.lengths), case.length, case.value, seed=case.seed)}, partial(ema, **fixed)


def _s4d(case: Sizes) -> tuple[Tensors, Call]:
    shape = case.value, case.key
    log_a = torch.complex(_decay(case, *shape), tensor(*shape, seed=case.seed + 1))
    b, c = (torch.complex(*(tensor(*shape, seed=case.seed + 2 * i + j) for j in (0, 1))) for i in (1, 2))
    skip = tensor(case.value, seed=case.seed + 7) if case.option % 2 else None
    call = partial(s4d_conv, log_a=log_a, b=b, c=c, skip=skip)

    def run(u: Tensor, *, initial_state: Any = None, return_state: bool = False, **more: Any) -> tuple[Tensor, Any]:
        return call(u, state=initial_state, output_state=return_state, **more)

    return {"u": tensor(len(case.lengths), case.length, case.value, seed=case.seed)}, run


def _dilated(case: Sizes) -> tuple[Tensors, Call]:
    grouped = case.option % 2 == 1 and case.backend in ("auto", "naive", "shifted", "portable")
    weight = tensor(case.value, case.value if grouped else 1, case.key, seed=case.seed + 1)
    call = partial(dilated_conv, weight=weight, bias=tensor(case.value, seed=case.seed + 2), dilation=case.chunk)

    def run(x: Tensor, *, initial_state: Any = None, return_state: bool = False, **more: Any) -> tuple[Tensor, Any]:
        return call(x, tail=initial_state, return_tail=return_state, **more)

    return {"x": tensor(len(case.lengths), case.length, case.value, seed=case.seed)}, run


def _running(case: Sizes) -> tuple[Tensors, Call]:
    batch = len(case.lengths)
    widths = {"q": case.key, "k": case.key, "v": case.value}
    rows = {
        name: tensor(batch, case.length, case.heads, width, seed=case.seed + i)
        for i, (name, width) in enumerate(widths.items())
    }
    agents = tensor(case.option + 1, case.heads, case.key, seed=case.seed + 9)
    return rows, partial(running_agent_attention, agents=agents, chunk_size=case.chunk, broadcast_scale=0.4)


def _vq(case: Sizes) -> tuple[Tensors, Call]:
    batch, codes = len(case.lengths), case.option + 1
    shape = batch, case.length, case.heads
    rows = {
        "q": tensor(*shape, case.key, seed=case.seed),
        "k": tensor(*shape, case.key, seed=case.seed + 1),
        "v": tensor(*shape, case.value, seed=case.seed + 2),
        "code": torch.randint(codes, shape, generator=torch.Generator().manual_seed(case.seed)),
    }
    fixed: dict[str, Any] = {
        "codebook": tensor(case.heads, codes, case.key, seed=case.seed + 3),
        "bias": tensor(case.heads, 2 * case.chunk, seed=case.seed + 4) if case.option % 2 else None,
        "scale": 0.6,
        "chunk_size": case.chunk,
        "causal": True,
    }
    return rows, partial(vq_attention, **fixed)


RECURRENT: Mapping[str, Callable[[Sizes], tuple[Tensors, Call]]] = {
    "gated_linear_attention": _gated,
    "selective_scan": _selective,
    "ema": _ema,
    "s4d_conv": _s4d,
    "dilated_conv": _dilated,
    "agent_attention": _running,
    "vq_attention": _vq,
}


def _parts(state: Any) -> list[Tensor]:
    if isinstance(state, Tensor):
        return [state]
    return [] if state is None else [part for inner in state for part in _parts(inner)]


def same_state(got: Any, want: Any, what: str) -> None:
    ours, theirs = _parts(got), _parts(want)
    assert len(ours) == len(theirs), f"{what}: {len(ours)} parts instead of {len(theirs)}"
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype, f"{what}: {a.dtype} instead of {b.dtype}"
        close(a.double(), b.double(), what)


def _gradients(y: Tensor, ends: list[Tensor], leaves: list[Tensor]) -> list[Tensor]:
    """Of the outputs and, each under another cotangent, of the last states."""
    objective = y.sum()
    for number, end in enumerate(ends):
        if end.is_floating_point():
            objective = objective + (end * tensor(*end.shape, seed=number + 71)).sum()
    return gradients(objective, leaves)


def filled(x: Tensor, case: Sizes) -> Tensor:
    """With other values beyond the end of each row."""
    beyond = torch.arange(case.length) >= torch.tensor(case.lengths).unsqueeze(1)
    value = 0 if not x.is_floating_point() else case.filler
    return x.masked_fill(beyond.reshape(*beyond.shape, *[1] * (x.dim() - 2)), value)


@pytest.mark.parametrize("op", list(RECURRENT))
def test_a_padded_row_is_that_row_alone(op: str) -> None:
    """Outputs at real tokens, the state after the last of them, and the gradients of what is real."""

    def holds(case: Sizes) -> None:
        rows, call = RECURRENT[op](case)
        leaves = {k: filled(v, case) for k, v in rows.items()}
        leaves = {k: v.requires_grad_() if v.is_floating_point() else v for k, v in leaves.items()}
        given = {k: laid_out(v, case.layout) for k, v in leaves.items()}
        lengths = torch.tensor(case.lengths)
        y, state = call(**given, lengths=lengths, return_state=True, backend=case.backend)
        assert state is not None, "no state came back"
        real = torch.arange(case.length) < lengths.unsqueeze(1)
        want, states = torch.zeros_like(y), []
        single = {k: v.detach().requires_grad_() if v.is_floating_point() else v for k, v in leaves.items()}
        pieces = []
        for row, length in enumerate(case.lengths):
            tokens = {k: v[row : row + 1, :length] for k, v in single.items()}
            alone, last = call(**tokens, return_state=True, backend="naive")
            pieces.append(torch.cat((alone[0], want[row, length:])))
            states.append(last)
        want = torch.stack(pieces)
        close(y[real], want[real], "against rows alone")
        ends = [torch.cat(part) for part in zip(*map(_parts, states), strict=True)]
        same_state(state, ends, "the state")
        weight = tensor(*y.shape, seed=case.seed + 70) * real.reshape(*real.shape, *[1] * (y.dim() - 2))
        keys = [k for k, v in leaves.items() if v.requires_grad]
        got = _gradients(y * weight, _parts(state), [leaves[k] for k in keys])
        wanted = _gradients(want * weight, ends, [single[k] for k in keys])
        scale = max((g.abs().max().item() for g in wanted if g.numel()), default=0.0)
        for key, ours, theirs in zip(keys, got, wanted, strict=True):
            close(ours, theirs, f"gradient of {key}", floor=max(1e-3 * scale, 1e-3))

    forall(sizes(op), holds, few=8)


@pytest.mark.parametrize("op", list(RECURRENT))
def test_parts_joined_by_a_state_are_the_whole(op: str) -> None:
    """Parts of any length, none too, each with another backend's state going in."""

    def holds(case: Sizes) -> None:
        rows, call = RECURRENT[op](case)
        want, last = call(**rows, return_state=True, backend="naive")
        state, pieces = None, []
        for number, part in enumerate(zip(*(v.split(case.cuts, 1) for v in rows.values()), strict=True)):
            backend = "naive" if number == case.option else case.backend
            given = dict(zip(rows, (laid_out(p, case.layout) for p in part), strict=True))
            y, state = call(**given, initial_state=state, return_state=True, backend=backend)
            assert state is not None, "no state came back"
            pieces.append(y)
        close(torch.cat(pieces, 1), want, f"parts of {case.cuts}")
        same_state(state, last, f"the state after parts of {case.cuts}")

    forall(sizes(op), holds, few=8)
