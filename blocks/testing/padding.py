"""Checks of sequences of different lengths in one batch: padded left or right, or packed without padding."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .streaming import fresh
from .subject import (
    EQUAL64,
    Subject,
    expect_close,
    expect_finite,
    expect_gradients,
    expect_zero,
    gradients,
)


def pad(rows: list[Tensor], width: int, side: str, filler: float) -> tuple[Tensor, Tensor]:
    """Rows (n_i, D) as (B, width, D) with `filler` at the pads, and the mask."""
    x = torch.full((len(rows), width, rows[0].shape[-1]), filler, dtype=rows[0].dtype)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        part = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        x[i, part], mask[i, part] = row, True
    return x, mask


def check_padding(s: Subject) -> None:
    """Outputs and gradients of real tokens do not know what pads on either side hold; outputs at pads are 0."""
    mixer, lengths = s.mixer(), [13, 9, 4, 1, 0]
    rows = [s.tensor(n, seed=30 + n).requires_grad_() for n in lengths]
    weights = [s.tensor(n, seed=60 + n) for n in lengths]
    context = s.context(len(rows))
    alone = [
        mixer(row[None], None if context is None else context[i : i + 1]).y[0] if len(row) else row
        for i, row in enumerate(rows)
    ]
    objective = torch.stack([(y * w).sum() for y, w in zip(alone, weights, strict=True)]).sum()
    want, names = gradients(objective, mixer, *rows)
    for side in ("right", "left"):
        for width, filler in ((13, 0.0), (13, 1e3), (18, -1e3), (15, math.nan)):
            what = f"padded {side} to {width} with {filler:g}"
            x, mask = pad([row.detach() for row in rows], width, side, filler)
            x.requires_grad_()
            y = mixer(x, context, mask=mask).y
            expect_finite(y, what)
            expect_zero(y[~mask], f"{what}: outputs at pads (and of the row that is all pads)")
            for i, single in enumerate(alone):
                expect_close(y[i, mask[i]], single, EQUAL64, f"{what}: row of {lengths[i]} tokens against unpadded")
            # The cotangent at pads is large: it must meet outputs that are constant.
            cotangent, _ = pad(weights, width, side, 1e3)
            got, _ = gradients((y * cotangent).sum(), mixer, x)
            expect_finite(got[0], f"{what}: gradient of x")
            expect_zero(got[0][~mask], f"{what}: gradient at pads")
            split = [got[0][i, mask[i]] for i in range(len(rows))]
            expect_gradients([*split, *got[1:]], want, names, what)


def check_context_padding(s: Subject) -> None:
    """The same of a padded context; a context that is all pads gives finite outputs and gradients."""
    mixer, lengths = s.mixer(), [6, 3, 1]
    x = s.tensor(3, 7).requires_grad_()
    contexts = [s.tensor(n, seed=40 + n).requires_grad_() for n in lengths]
    weight = s.tensor(3, 7, seed=5)
    alone = torch.cat([mixer(x[i : i + 1], c[None]).y for i, c in enumerate(contexts)])
    want, names = gradients((alone * weight).sum(), mixer, x, *contexts)
    for side in ("right", "left"):
        for width, filler in ((6, 0.0), (9, 1e3), (8, math.nan)):
            what = f"context padded {side} to {width} with {filler:g}"
            context, mask = pad([c.detach() for c in contexts], width, side, filler)
            context.requires_grad_()
            y = mixer(x, context, context_mask=mask).y
            expect_close(y, alone, EQUAL64, f"{what} against unpadded")
            got, _ = gradients((y * weight).sum(), mixer, x, context)
            expect_zero(got[1][~mask], f"{what}: gradient at pads")
            split = [got[1][i, mask[i]] for i in range(len(contexts))]
            expect_gradients([got[0], *split, *got[2:]], want, names, what)
    context, mask = pad([c.detach() for c in contexts], 6, "right", 1e3)
    mask[2] = False
    context.requires_grad_()
    y = mixer(x, context, context_mask=mask).y
    expect_finite(y, "output with a context that is all pads")
    expect_close(y[:2], alone[:2], EQUAL64, "rows beside one whose context is all pads")
    got, names = gradients((y * weight).sum(), mixer, x, context)
    for gradient, name in zip(got, names, strict=True):
        expect_finite(gradient, f"gradient of {name} with a context that is all pads")
    expect_zero(got[1][2], "gradient of a context that is all pads")


def bounds(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def check_packed(s: Subject) -> None:
    """Sequences packed into one row by cu_seqlens give the outputs and gradients of separate ones."""
    mixer = s.mixer()
    for lengths in ([5, 1, 7], [1, 1], [13], [2, 33, 1, 31]):
        x, weight = s.tensor(1, sum(lengths)).requires_grad_(), s.tensor(1, sum(lengths), seed=5)
        what = f"packed sequences of {lengths} tokens"
        alone = torch.cat([mixer(part).y for part in x.split(lengths, dim=1)], dim=1)
        packed = mixer(x, cu_seqlens=bounds(lengths)).y
        expect_close(packed, alone, EQUAL64, f"{what} against separate")
        want, names = gradients((alone * weight).sum(), mixer, x)
        expect_gradients(gradients((packed * weight).sum(), mixer, x)[0], want, names, what)


def check_packed_states(s: Subject) -> None:
    """A packed row returns one state per sequence, that of the sequence alone, and goes on packed."""
    mixer, first, second = s.mixer(), [5, 1, 7], [2, 6, 1]
    rows = [s.tensor(a + b + 1, seed=70 + i) for i, (a, b) in enumerate(zip(first, second, strict=True))]
    probe = torch.zeros(len(rows), 1, s.dim, dtype=torch.float64)
    pieces: list[list[Tensor]] = [[] for _ in rows]
    with torch.no_grad():
        for max_len in (None, 16):
            state, position = fresh(mixer, probe, max_len=max_len), [0] * len(rows)
            pieces = [[] for _ in rows]
            for lengths in (first, second):
                parts = [row[p : p + n] for row, p, n in zip(rows, position, lengths, strict=True)]
                out = mixer(torch.cat(parts)[None], cu_seqlens=bounds(lengths), state=state)
                for i, part in enumerate(out.y[0].split(lengths)):
                    pieces[i].append(part)
                state, position = out.state, [p + n for p, n in zip(position, lengths, strict=True)]
            last = mixer(torch.stack([row[-1:] for row in rows]), state=state).y
            for i, row in enumerate(rows):
                got = torch.cat([*pieces[i], last[i]])
                what = f"sequence {i} streamed packed, then in a batch (max_len={max_len}), against alone"
                expect_close(got, mixer(row[None]).y[0], EQUAL64, what)
