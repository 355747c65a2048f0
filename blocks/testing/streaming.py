"""Checks of the carried state: prefill, chunks and steps give what one forward gives; states are values."""

from __future__ import annotations

import torch
from torch import Tensor

from ..protocol import Mixer, State, map_state, reset_rows, select_rows, state_elements
from .subject import (
    CLOSE,
    EQUAL64,
    Subject,
    converted,
    expect,
    expect_close,
    expect_gradients,
    expect_same,
    expect_zero,
    gradients,
    run_chunks,
)


def fresh(mixer: Mixer, x: Tensor, *, max_len: int | None = None) -> State:
    return mixer.init_state(x.shape[0], max_len=max_len, device=x.device, dtype=x.dtype)


def shapes(state: State) -> list[torch.Size]:
    found: list[torch.Size] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor.shape)
        return tensor

    map_state(note, state)
    return found


def check_streaming(s: Subject) -> None:
    """Prefill + chunks + steps equal one forward, for several splits and precisions, any max_len."""
    mixer = s.mixer()
    for length, splits in (
        (13, ([13], [5, 1, 7], [1] * 13, [12, 1], [1, 12], [2, 2, 2, 2, 2, 3])),
        (67, ([40, 1, 26], [64, 1, 1, 1], [1, 66])),
    ):
        x = s.tensor(2, length)
        with torch.no_grad():
            want = mixer(x).y
            for sizes in splits:
                for max_len in (None, length):
                    got, _ = run_chunks(mixer, x, sizes, fresh(mixer, x, max_len=max_len))
                    name = "steps of 1" if sizes == [1] * length else f"chunks {sizes}"
                    expect_close(got, want, EQUAL64, f"{name} (max_len={max_len}) against the full forward")
            expect_same(mixer(x).y, want, "a forward without state after ones with state")
    single = s.mixer(torch.float32)
    half = converted(single, torch.bfloat16)
    for low, high, dtype in (
        (single, converted(single, torch.float64), torch.float32),
        (half, converted(half, torch.float32), torch.bfloat16),
    ):
        x = s.tensor(2, 13, dtype=dtype)
        with torch.no_grad():
            got, _ = run_chunks(low, x, [5, 1, 7], fresh(low, x))
            want = high(x.to(next(high.parameters()).dtype)).y
        expect(got.dtype == dtype, f"expected {dtype} out of a stream in {dtype}, got {got.dtype}")
        value = ((got - want).norm() / want.norm()).item()
        expect(
            value <= CLOSE[dtype],
            f"chunks in {dtype}: expected within {CLOSE[dtype]:g} (rms), got {value:.3g}",
        )


def check_streaming_masks(s: Subject) -> None:
    """Rows of mixed lengths, chunks padded left or right: each row streams as if it were alone."""
    mixer = s.mixer()
    counts = [[6, 1, 5], [3, 0, 5], [0, 1, 2], [4, 1, 0]]  # real tokens of each row in each chunk
    widths = [6, 1, 5]
    rows = [s.tensor(sum(row) + 1, seed=20 + i) for i, row in enumerate(counts)]
    for sides in (
        ("right", "right", "right"),
        ("left", "left", "left"),
        ("right", "left", "left"),
        ("left", "right", "right"),
    ):
        for max_len in (None, sum(widths) + 1):
            state = fresh(mixer, torch.zeros(len(rows), 1, s.dim, dtype=torch.float64), max_len=max_len)
            seen: list[list[Tensor]] = [[] for _ in rows]
            position = [0] * len(rows)
            for chunk, (width, side) in enumerate(zip(widths, sides, strict=True)):
                x = torch.full((len(rows), width, s.dim), 37.0, dtype=torch.float64)
                mask = torch.zeros(len(rows), width, dtype=torch.bool)
                for i, row in enumerate(rows):
                    n = counts[i][chunk]
                    part = slice(0, n) if side == "right" else slice(width - n, width)
                    x[i, part], mask[i, part] = row[position[i] : position[i] + n], True
                    position[i] += n
                with torch.no_grad():
                    out = mixer(x, mask=mask, state=state)
                state = out.state
                expect_zero(out.y[~mask], f"outputs at pads of chunk {chunk} (padded {side})")
                for i in range(len(rows)):
                    seen[i].append(out.y[i, mask[i]])
            with torch.no_grad():
                last = mixer(torch.stack([row[-1:] for row in rows]), state=state).y
                for i, row in enumerate(rows):
                    got = torch.cat([*seen[i], last[i]])
                    what = f"row {i}, {counts[i]} tokens, padded {'/'.join(sides)} (max_len={max_len})"
                    expect_close(got, mixer(row[None]).y[0], EQUAL64, f"{what} against alone")


def check_state_is_a_value(s: Subject) -> None:
    """A call leaves the state passed in as it was; the tensors of a state have the batch first."""
    mixer, x = s.mixer(), s.tensor(3, 13)

    def unchanged(now: Tensor, then: Tensor) -> Tensor:
        expect_same(now, then, "the state passed in, after the call")
        return now

    def batch_first(tensor: Tensor) -> Tensor:
        shape = tuple(tensor.shape)
        expect(shape[:1] == (3,), f"expected state tensors of shape (B=3, ...), got {shape}")
        return tensor

    with torch.no_grad():
        for max_len in (None, 13):
            state, start = fresh(mixer, x, max_len=max_len), 0
            for size in (5, 1, 4, 1):
                part = x[:, start : start + size]
                kept = map_state(torch.clone, state)
                out = mixer(part, state=state)
                map_state(unchanged, state, kept)
                expect_same(mixer(part, state=state).y, out.y, "a second call from one state")
                kinds = type(state).__name__, type(out.state).__name__
                expect(kinds[0] == kinds[1], f"expected a {kinds[0]} back, got {kinds[1]}")
                map_state(batch_first, out.state)
                state, start = out.state, start + size


def check_state_size(s: Subject) -> None:
    """state_size(L) is what a state holds per sequence after L tokens; max_len may reserve more."""
    mixer = s.mixer()
    for length in (0, 1, 5, 13, 30):
        x = s.tensor(2, max(length, 1))
        for max_len in (None, max(length, 1)):
            state = fresh(mixer, x, max_len=max_len)
            if length:
                with torch.no_grad():
                    state = mixer(x, state=state).state
            held, said = state_elements(state), mixer.state_size(length)
            if max_len is None:
                expect(
                    held == said,
                    f"after {length} tokens: state_size says {said} elements, the state holds {held}",
                )
            else:
                expect(
                    held >= said,
                    f"after {length} tokens (max_len={max_len}): state_size says {said}, held {held}",
                )


def check_state_rows(s: Subject) -> None:
    """Rows of a state can be reordered and repeated (beams) and reset (a new sequence in an old slot)."""
    mixer, x = s.mixer(), s.tensor(3, 13)
    order = torch.tensor([2, 0, 0, 1])
    with torch.no_grad():
        want = mixer(x).y
        for max_len in (None, 13):
            state = run_chunks(mixer, x[:, :6], [5, 1], fresh(mixer, x, max_len=max_len))[1]
            got, _ = run_chunks(mixer, x[order, 6:], [1, 6], select_rows(state, order))
            expect_close(got, want[order, 6:], EQUAL64, f"stream continued from reordered rows (max_len={max_len})")
        state = run_chunks(mixer, x[:, :6], [5, 1], fresh(mixer, x, max_len=13))[1]
        rows = torch.tensor([False, True, False])
        empty = fresh(mixer, x, max_len=13)
        if shapes(empty) != shapes(state):  # a cache that grows: as many slots, none of them holding a token
            pads = torch.zeros(3, 6, dtype=torch.bool)
            empty = run_chunks(mixer, x[:, :6], [5, 1], empty, mask=pads)[1]
        state = reset_rows(state, rows, empty)
        got, _ = run_chunks(mixer, x[:, 6:], [1, 6], state)
        expect_close(got[~rows], want[~rows, 6:], EQUAL64, "rows kept by reset_rows")
        expect_close(got[rows], mixer(x[rows, 6:]).y, EQUAL64, "the row cleared by reset_rows against a new sequence")


def check_streaming_gradient(s: Subject) -> None:
    """The gradient through the carried state is that of the full forward."""
    mixer, x, weight = s.mixer(), s.tensor(2, 13).requires_grad_(), s.tensor(2, 13, seed=5)
    want, names = gradients((mixer(x).y * weight).sum(), mixer, x)
    for max_len in (None, 13):
        y, _ = run_chunks(mixer, x, [5, 1, 7], fresh(mixer, x, max_len=max_len))
        expect_gradients(
            gradients((y * weight).sum(), mixer, x)[0],
            want,
            names,
            f"chunks (max_len={max_len}) against full",
        )
