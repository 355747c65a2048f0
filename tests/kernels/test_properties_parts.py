"""Properties of the kernels that join parts or look both ways: packed rows, summaries, scans, short convolutions.

Every backend that runs here, over drawn sizes and cuts; see `mixer_strategies`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import strategies as st
from mixer_strategies import LAYOUTS, LENGTHS, close, gradients, laid_out, tensor, usable_backends
from torch import Tensor

from examples import forall
from seqzoo.kernels.associative_scan import associative_scan
from seqzoo.kernels.ema import Coefficients, ema
from seqzoo.kernels.gated_linear_attention import (
    bidirectional_gated_linear_attention,
    gated_chunk_summary,
    gated_linear_attention,
)
from seqzoo.kernels.linear_attention import LinearState, linear_attention
from seqzoo.kernels.s4d_conv import s4d_conv
from seqzoo.kernels.short_conv import short_conv

SIZES = st.one_of(st.integers(0, 12), st.sampled_from(LENGTHS))


@dataclass(frozen=True)
class Pack:
    """Sequences packed into one row."""

    lengths: tuple[int, ...]
    heads: int
    backend: str
    option: int
    layout: str


@pytest.mark.parametrize("causal", [False, True], ids=["all", "causal"])
def test_packed_sequences_of_linear_attention_are_each_alone(causal: bool) -> None:
    """Of any length, with a state per sequence in and out, and the gradients of all."""

    def holds(case: Pack) -> None:
        total, number, normalize = sum(case.lengths), len(case.lengths), case.option % 2 == 0
        leaves = [tensor(1, total, case.heads, 3, seed=i).abs().requires_grad_() for i in range(2)]
        leaves.append(tensor(1, total, case.heads, 2, seed=2).requires_grad_())
        first = None
        if case.option > 1:
            s = tensor(number, case.heads, 3, 2, seed=3).requires_grad_()
            first = LinearState(s, tensor(number, case.heads, 3, seed=4).abs() if normalize else None)
        options: dict[str, Any] = {"causal": causal, "normalize": normalize, "return_state": True}
        y, state = linear_attention(
            *(laid_out(t, case.layout) for t in leaves),
            cu_seqlens=torch.tensor([0, *case.lengths]).cumsum(0).int(),
            initial_state=first,
            backend=case.backend,
            **options,
        )
        pieces, sums = [], []
        for row, parts in enumerate(zip(*(t.split(case.lengths, 1) for t in leaves), strict=True)):
            before = None if first is None else LinearState(*(None if p is None else p[row : row + 1] for p in first))
            one, last = linear_attention(*parts, initial_state=before, backend="naive", **options)
            assert last is not None
            pieces.append(one)
            sums.append(last.s)
        assert state is not None
        want, ends = torch.cat(pieces, 1), torch.cat(sums)
        close(y, want, "against the sequences alone")
        close(state.s, ends, "states")
        inputs = leaves if first is None else [*leaves, first.s]
        a, b = tensor(*y.shape, seed=7), tensor(*ends.shape, seed=8)
        found = [gradients((o * a).sum() + (s * b).sum(), inputs) for o, s in ((y, state.s), (want, ends))]
        for ours, theirs in zip(*found, strict=True):
            close(ours, theirs, "gradients")

    packs = st.builds(
        Pack,
        st.lists(SIZES, min_size=1, max_size=5).map(tuple),
        st.integers(1, 3),
        st.sampled_from([name for name in usable_backends("linear_attention") if name != "portable"]),
        st.integers(0, 3),
        st.sampled_from(LAYOUTS),
    )
    forall(packs, holds, few=20)


@dataclass(frozen=True)
class Rows:
    """Padded rows of an operation that looks both ways."""

    lengths: tuple[int, ...]
    more: int
    chunk: int
    option: int
    filler: float


ROWS = st.builds(
    Rows,
    st.lists(SIZES, min_size=1, max_size=4).map(tuple),
    st.integers(0, 3),
    st.sampled_from((1, 2, 4, 16)),
    st.integers(0, 5),
    st.sampled_from((0.0, 7.0, -1e6)),
)


@pytest.mark.parametrize("op", ["gated_linear_attention", "ema", "s4d_conv"])
def test_a_padded_row_looks_back_from_its_own_end(op: str) -> None:
    """The two-sided forms: nothing beyond the last real token comes in from behind."""

    def holds(case: Rows) -> None:
        batch, length = len(case.lengths), max(case.lengths) + case.more
        lengths = torch.tensor(case.lengths)
        beyond = (torch.arange(length) >= lengths.unsqueeze(1)).view(batch, length, 1)
        x = tensor(batch, length, 2, seed=1)
        backend = usable_backends(op)[case.option % len(usable_backends(op))]

        def run(x: Tensor, lengths: Tensor | None, backend: str) -> Tensor:
            if op == "gated_linear_attention":
                q, k, v = (tensor(1, 1, 2, seed=i) * x for i in (2, 3, 4))
                decay = -tensor(2, seed=5).abs() if case.option % 2 else -x.abs()
                return bidirectional_gated_linear_attention(
                    *(t.unsqueeze(3) for t in (q, k, v)), decay, lengths=lengths, chunk_size=case.chunk, backend=backend
                ).flatten(2)
            shape = 2, 3
            if op == "ema":
                log_q, b, c = ([tensor(*shape, seed=i + j) for i in (5, 8)] for j in (0, 1, 2))
                ways = [Coefficients(-q.abs(), w, r) for q, w, r in zip(log_q, b, c, strict=True)]
                truncation = case.chunk if case.option > 3 else None
                return ema(x, *ways, truncation=truncation, lengths=lengths, backend=backend)[0]
            log_a = torch.complex(-tensor(*shape, seed=5).abs(), tensor(*shape, seed=6))
            b, c, back = (torch.complex(tensor(*shape, seed=i), tensor(*shape, seed=i + 1)) for i in (7, 9, 11))
            return s4d_conv(x, log_a, b, c, c_reverse=back, lengths=lengths, backend=backend)[0]

        y = run(x.masked_fill(beyond, case.filler), lengths, backend)
        for row, number in enumerate(case.lengths):
            close(y[row, :number], run(x[row : row + 1, :number], None, "naive")[0], f"row {row} of {number}")

    forall(ROWS, holds, few=10)


def test_summaries_of_decayed_attention_compose() -> None:
    """S = decay S_0 + state of each part, one after another, is the state after all."""

    def holds(case: Rows) -> None:
        total, heads = sum(case.lengths), 2
        k, v = tensor(2, total, heads, 3, seed=1), tensor(2, total, heads, 2, seed=2)
        form = case.option % 3
        shape = (heads,) if form == 0 else (2, total, heads, *([3] if form == 2 else []))
        decay = -tensor(*shape, seed=3).abs() * (200.0 if case.option > 3 else 1.0)
        state = first = tensor(2, heads, 3, 2, seed=4)
        at = 0
        for number in case.lengths:
            part = slice(at, at + number)
            factor, own = gated_chunk_summary(k[:, part], v[:, part], decay if form == 0 else decay[:, part])
            state, at = factor * state + own, at + number
        _, last = gated_linear_attention(k, k, v, decay, initial_state=first, return_state=True, backend="naive")
        assert last is not None
        close(state, last, "the state")

    forall(ROWS, holds, few=10)


@dataclass(frozen=True)
class Scan:
    """Recurrences along one dimension, in parts."""

    shape: tuple[int, ...]
    dim: int
    shared: tuple[bool, ...]
    cuts: tuple[int, ...]
    reverse: bool
    is_complex: bool
    backend: str


@st.composite
def scans(draw: st.DrawFn) -> Scan:
    shape = tuple(draw(st.lists(st.integers(0, 4), min_size=1, max_size=3)))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    cuts = tuple(draw(st.lists(SIZES, min_size=1, max_size=4)))
    shape = tuple(sum(cuts) if i == dim % len(shape) else n for i, n in enumerate(shape))
    shared = tuple(draw(st.lists(st.booleans(), min_size=len(shape), max_size=len(shape))))
    return Scan(
        shape,
        dim,
        shared,
        cuts,
        draw(st.booleans()),
        draw(st.booleans()),
        draw(st.sampled_from(usable_backends("associative_scan"))),
    )


def test_a_scan_is_its_recurrence_in_any_parts() -> None:
    """Along any dimension, both ways, real and complex, with a factor that broadcasts."""

    def holds(case: Scan) -> None:
        def numbers(shape: tuple[int, ...], seed: int) -> Tensor:
            real = tensor(*shape, seed=seed)
            return torch.complex(real, tensor(*shape, seed=seed + 1)) if case.is_complex else real

        axis = case.dim % len(case.shape)
        a = 0.6 * numbers(tuple(1 if one else n for one, n in zip(case.shared, case.shape, strict=True)), 1)
        x, h = numbers(case.shape, 3), numbers((*case.shape[:axis], *case.shape[axis + 1 :]), 5)
        steps, wide, state = [], a.expand(case.shape), h
        order = range(case.shape[axis])
        for t in reversed(order) if case.reverse else order:
            state = wide.select(axis, t) * state + x.select(axis, t)
            steps.append(state)
        want = torch.stack(steps[::-1] if case.reverse else steps, axis) if steps else x
        parts = list(zip(wide.split(case.cuts, axis), x.split(case.cuts, axis), strict=True))
        found, state = [], h
        for factor, part in reversed(parts) if case.reverse else parts:
            factor = a if case.shared[axis] else factor
            y = associative_scan(
                factor, part, dim=case.dim, initial_state=state, reverse=case.reverse, backend=case.backend
            )
            found.append(y)
            if y.shape[axis]:
                state = y.select(axis, 0 if case.reverse else -1)
        got = torch.cat(found[::-1] if case.reverse else found, axis)
        close(*(torch.view_as_real(t) if case.is_complex else t for t in (got, want)), "the recurrence")

    forall(scans(), holds, few=20)


def test_a_short_convolution_goes_on_where_it_stopped() -> None:
    def holds(case: Rows) -> None:
        taps, past = 1 + case.option, case.option
        x, weight = tensor(2, sum(case.lengths), 3, seed=1), tensor(3, taps, seed=2)
        state = tensor(2, past, 3, seed=3)
        options: dict[str, Any] = {"bias": tensor(3, seed=4), "silu": bool(case.more % 2)}
        source = torch.cat((state, x), 1)
        want = options["bias"] + sum(weight[:, i] * source[:, i : i + x.shape[1]] for i in range(taps))
        want = torch.nn.functional.silu(want) if options["silu"] else want
        pieces = []
        backend = usable_backends("short_conv")[case.chunk % len(usable_backends("short_conv"))]
        for part in x.split(case.lengths, 1):
            pieces.append(short_conv(part, weight, initial_state=state, backend=backend, **options))
            state = torch.cat((state, part), 1)[:, part.shape[1] :]
        close(torch.cat(pieces, 1), want, f"parts of {case.lengths}")

    forall(ROWS, holds, few=15)
