"""Checks of who may see whom: causality by Jacobian and by perturbation, the cross patterns, the batch."""

from __future__ import annotations

import torch
from torch import Tensor

from .subject import CLOSE, Subject, expect, expect_close, expect_same

# Short lengths in full; the long one, past the usual chunk of 64, at the positions where chunks meet.
SHORT, LONG, LONG_ROWS = (2, 5, 13), 67, (0, 1, 15, 16, 31, 32, 47, 63, 64, 65)


def jacobian_row(y: Tensor, n: int, wrt: Tensor, weight: Tensor) -> Tensor:
    """(B, M, D): gradient of a random combination of the channels of y_n; a random one cancels nothing."""
    (gradient,) = torch.autograd.grad((y[:, n] * weight).sum(), wrt, retain_graph=True, allow_unused=True)
    return torch.zeros_like(wrt) if gradient is None else gradient


def check_causality_jacobian(s: Subject) -> None:
    """dy_n/dx_m is exactly 0 for m > n (rounding only where `exact` is False), not 0 everywhere for m < n."""
    mixer = s.mixer()
    past_matters = False
    for length in (1, *SHORT, LONG):
        x, context = s.tensor(2, length, seed=length).requires_grad_(), s.context(2)
        y = mixer(x, context).y
        weight = s.tensor(2, seed=9)
        for n in LONG_ROWS if length == LONG else range(length):
            row = jacobian_row(y, n, x, weight)
            future = row[:, n + 1 :].abs().max().item() if n + 1 < length else 0.0
            allowed = 0.0 if mixer.exact else 1e-9 * row.abs().max().item()
            expect(
                future <= allowed,
                f"L={length}: expected dy_{n}/dx_m = 0 for m > {n}, got a magnitude of {future:.3g}",
            )
            past_matters |= bool((row[:, :n] != 0).any())
    if s.pattern == "causal":
        expect(past_matters, "positive control: expected some y_n to depend on an x_m with m < n, none does")


def perturbed_past(s: Subject, what: str) -> None:
    """Add 1e3, and random +-1e3, to all queries after a cut: the outputs before it keep their bits."""
    mixer = s.mixer()
    changed = False
    with torch.no_grad():
        for length in (*SHORT, LONG):
            x, context = s.tensor(2, length, seed=length), s.context(2)
            want = mixer(x, context).y
            cuts = range(1, length) if length != LONG else [n + 1 for n in LONG_ROWS]
            for cut in cuts:
                for kind in ("up", "signs"):
                    tail = x[:, cut:]
                    step = torch.ones_like(tail) if kind == "up" else s.tensor(2, length - cut, seed=cut).sign()
                    y = mixer(torch.cat([x[:, :cut], tail + 1e3 * step], dim=1), context).y
                    message = f"L={length}: outputs before {cut} after adding 1e3 ({kind}) to {what} from {cut} on"
                    if mixer.exact:
                        expect_same(y[:, :cut], want[:, :cut], message)
                    else:
                        expect_close(y[:, :cut], want[:, :cut], 1e3 * CLOSE[torch.float64], message)
                    changed |= not torch.equal(y[:, cut:], want[:, cut:])
    expect(
        changed,
        f"positive control: expected 1e3 added to {what} to change the outputs there, it changed none",
    )


def check_causality_perturbation(s: Subject) -> None:
    """The past keeps its bits under 1e3 added to the future: sees leaks through discrete choices as well."""
    perturbed_past(s, "x")


def check_causal_cross(s: Subject) -> None:
    """Causal cross: y_n keeps its bits when query m > n changes, for every choice of the context."""
    perturbed_past(s, "the queries")


def check_context_visible(s: Subject) -> None:
    """All of the context is seen: every position of it reaches some output, the last one the first output."""
    mixer, x = s.mixer(), s.tensor(2, 7)
    context = s.context(2)
    if context is None:
        return
    context.requires_grad_()
    y = mixer(x, context).y
    (gradient,) = torch.autograd.grad((y * s.tensor(2, 7, seed=3)).sum(), context)
    unseen = [m for m in range(context.shape[1]) if not bool((gradient[:, m] != 0).any())]
    expect(not unseen, f"expected every context position to reach the output, positions {unseen} do not")
    with torch.no_grad():
        changed = context.clone()
        changed[:, -1] += 3.0 * s.tensor(2, seed=4)
        first = mixer(x, changed).y[:, 0]
    expect(not torch.equal(first, y[:, 0]), "expected y_0 to depend on the last context position, it does not")


def check_future_visible(s: Subject) -> None:
    """Without `causal`, some output depends on a later position: the mixer is not causal unasked."""
    mixer, x = s.mixer(), s.tensor(2, 13).requires_grad_()
    y, weight = mixer(x).y, s.tensor(2, seed=9)
    seen = any(bool((jacobian_row(y, n, x, weight)[:, n + 1 :] != 0).any()) for n in range(12))
    expect(seen, "expected some y_n to depend on an x_m with m > n in the pattern 'self', none does")


def check_batch_independence(s: Subject) -> None:
    """A row gives the same output alone, in a batch, and beside other mates."""
    mixer, x, context = s.mixer(), s.tensor(4, 13), s.context(4)
    with torch.no_grad():
        want = mixer(x, context).y
        for row in range(4):
            alone = mixer(x[row : row + 1], None if context is None else context[row : row + 1]).y
            expect_close(want[row : row + 1], alone, CLOSE[torch.float64], f"row {row} in a batch against alone")
        mates = torch.cat([x[:1], 1e3 * s.tensor(3, 13, seed=8)])
        other = None if context is None else torch.cat([context[:1], 1e3 * s.tensor(3, context.shape[1], seed=9)])
        expect_close(mixer(mates, other).y[:1], want[:1], CLOSE[torch.float64], "row 0 beside other batch mates")
    x.requires_grad_()
    (gradient,) = torch.autograd.grad(mixer(x, context).y[0].sum(), x)
    expect(
        not bool((gradient[1:] != 0).any()),
        "expected no gradient of row 0's output in other rows, there is one",
    )
