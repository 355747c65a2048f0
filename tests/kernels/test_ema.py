"""The damped EMA: the recurrence, the kernel's matrix, truncation, carried states, gradients."""

from __future__ import annotations

import math

import pytest
import torch

from seqzoo.kernels.ema import Coefficients, EmaState, ema, ema_coefficients, ema_kernel, initialize_ema
from seqzoo.kernels.s4d_conv import spans

torch.set_num_threads(1)
BACKENDS = ("naive", "chunked", "fft")
D, N = 5, 4


@pytest.fixture(autouse=True)
def small_spans(monkeypatch):
    """Two chunks of one row each, so that short sequences have several; memory that nobody wrote shows up as NaN."""
    monkeypatch.setattr(spans, "SPAN", 2 * 32 * D)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def parameters(seed=0):
    """delta, alpha, beta, gamma (D, N) in fp64."""
    return [normal(D, N, seed=10 * seed + i).requires_grad_() for i in range(4)]


def taps(raw, length):
    """The kernel by the published formula, one entry after another."""
    delta, alpha, beta, gamma = raw
    p = 1 / (1 + torch.exp(-delta))
    q = 1 - p / (1 + torch.exp(-alpha))
    return torch.stack([(gamma * p * beta * q**lag).sum(1) / math.sqrt(N) for lag in range(length)], 1)


def dense(x, ahead, behind=None, skip=None, truncation=None, before=None):
    """y_t = sum_j k_{t-j} x_j + sum_j k'_{j-t} x_j as a matrix per channel; `before`: inputs that precede x."""
    full = x if before is None else torch.cat((before, x), 1)
    length, past = full.shape[1], full.shape[1] - x.shape[1]
    place = torch.arange(length)
    lag = place[:, None] - place  # of output t and input j
    matrix = torch.zeros(D, length, length, dtype=x.dtype)
    reach = length if truncation is None else truncation
    for raw, distance in ((ahead, lag), (behind, -lag)):
        if raw is not None:
            seen = (distance >= 0) & (distance < reach)
            matrix = matrix + torch.where(seen, taps(raw, length)[:, distance.clamp(min=0)], 0)
    y = torch.einsum("dtj,bjd->btd", matrix, full)[:, past:]
    return y if skip is None else y + skip * x


def weights(raw):
    return Coefficients(*ema_coefficients(*raw))


def same(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("truncation", [None, 1, 6, 40])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 500])
def test_the_matrix_of_the_kernel(backend, both, truncation, length):
    x, skip = normal(2, length, D, seed=7), normal(D, seed=8)
    ahead, behind = parameters(1), parameters(2) if both else None
    with torch.no_grad():
        want = dense(x, ahead, behind, skip, truncation)
        second = weights(behind) if both else None
        y, state = ema(x, weights(ahead), second, skip=skip, truncation=truncation, backend=backend)
    assert state is None
    same(y, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("truncation", [None, 6])
@pytest.mark.parametrize("length", [1, 20, 70, 150])
def test_gradients_are_those_of_the_matrix(backend, both, truncation, length):
    x, skip = normal(2, length, D, seed=7).requires_grad_(), normal(D, seed=8).requires_grad_()
    ahead, behind = parameters(1), parameters(2) if both else None
    inputs = [x, skip, *ahead, *(behind or [])]
    cotangent = normal(2, length, D, seed=9)
    second = weights(behind) if both else None
    y, _ = ema(x, weights(ahead), second, skip=skip, truncation=truncation, backend=backend)
    got = torch.autograd.grad((y * cotangent).sum(), inputs)
    want = torch.autograd.grad((dense(x, ahead, behind, skip, truncation) * cotangent).sum(), inputs)
    for a, b in zip(got, want, strict=True):
        same(a, b, 1e-10)


@pytest.mark.parametrize("span", [1, 4 * 32 * D, 1 << 18])
@pytest.mark.parametrize("both", [False, True])
def test_spans_equal_the_oracle(span, both, monkeypatch):
    """Rows together or one by one, one chunk at a time or all: outputs, the state where rows end, all gradients."""
    monkeypatch.setattr(spans, "SPAN", span)
    raw, second, x = parameters(1), parameters(2) if both else None, normal(4, 150, D, seed=7).requires_grad_()
    inputs, options = [x, *raw, *(second or [])], {"lengths": torch.tensor([150, 0, 75, 1])}
    if not both:
        h = normal(4, D, N, seed=3).requires_grad_()
        inputs, options = [*inputs, h], {**options, "initial_state": EmaState(h), "return_state": True}
    outcome = []
    for backend in ("chunked", "naive"):
        y, last = ema(x, weights(raw), weights(second) if second else None, backend=backend, **options)
        y = y * (torch.arange(150) < options["lengths"][:, None])[..., None]  # arbitrary beyond a row's end
        outputs = [y] if last is None else [y, last.h]
        cotangents = [normal(*t.shape, seed=i) for i, t in enumerate(outputs)]
        outcome.append([*outputs, *torch.autograd.grad(outputs, inputs, cotangents)])
    for got, want in zip(*outcome, strict=True):
        same(got, want, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("truncation", [None, 6, 70])
@pytest.mark.parametrize("length", [1, 64, 65, 130])
def test_the_state_and_its_gradient_are_those_of_the_recurrence(backend, truncation, length):
    """The state after `before` inputs, then x: as one sequence, with the gradient through the state."""
    before, x = normal(2, 75, D, seed=5).requires_grad_(), normal(2, length, D, seed=7).requires_grad_()
    raw = parameters(1)
    inputs = [before, x, *raw]
    _, state = ema(before, weights(raw), truncation=truncation, return_state=True, backend=backend)
    y, last = ema(x, weights(raw), truncation=truncation, initial_state=state, return_state=True, backend=backend)
    cotangent, on_h = normal(2, length, D, seed=9), normal(2, D, N, seed=11)
    want = dense(x, raw, truncation=truncation, before=before)
    same(y, want)
    # h by its definition: the last W inputs, each decayed by its distance from the end.
    log_q, b, _ = weights(raw)
    full = torch.cat((before, x), 1)
    distance = torch.arange(full.shape[1] - 1, -1, -1)
    seen = distance < (full.shape[1] if truncation is None else truncation)
    h = torch.einsum("dnt,dn,btd->bdn", torch.exp(log_q[..., None] * distance) * seen, b, full)
    same(last.h, h)
    got = torch.autograd.grad((y * cotangent).sum() + (last.h * on_h).sum(), inputs)
    for a, b in zip(got, torch.autograd.grad((want * cotangent).sum() + (h * on_h).sum(), inputs), strict=True):
        same(a, b, 1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("truncation", [None, 6, 100])
def test_chunks_with_a_carried_state_equal_the_whole(backend, truncation):
    x, ahead = normal(2, 150, D, seed=7), [p.detach() for p in parameters(1)]
    options = {"truncation": truncation, "return_state": True, "backend": backend}
    whole, last = ema(x, weights(ahead), **options)
    state, pieces = ema(x[:, :0], weights(ahead), **options)[1], []
    for part in x.split([70, 1, 1, 64, 14], 1):
        y, state = ema(part, weights(ahead), initial_state=state, **options)
        pieces.append(y)
    same(torch.cat(pieces, 1), whole)
    for a, b in zip(state, last, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            same(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("truncation", [None, 9])
def test_lengths_stop_each_row_where_it_ends(backend, truncation):
    lengths = [150, 128, 65, 64, 5, 1, 0]
    x, ahead = normal(len(lengths), 150, D, seed=7), [p.detach() for p in parameters(1)]
    options = {"truncation": truncation, "return_state": True, "backend": backend}
    _, start = ema(normal(len(lengths), 20, D, seed=3), weights(ahead), **options)
    y, last = ema(x, weights(ahead), initial_state=start, lengths=torch.tensor(lengths), **options)
    for row, n in enumerate(lengths):
        one = slice(row, row + 1)
        alone = EmaState(*(None if part is None else part[one] for part in start))
        want, end = ema(x[one, :n], weights(ahead), initial_state=alone, **options)
        same(y[one, :n], want)
        for a, b in zip(last, end, strict=True):
            if a is not None:
                same(a[one], b)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_lies_beyond_a_row_does_not_come_back_from_the_end(backend):
    ahead, behind = ([p.detach() for p in parameters(i)] for i in (1, 2))
    x = normal(2, 90, D, seed=7)
    x[1, 40:] = 1e6
    lengths = torch.tensor([90, 40])
    y, _ = ema(x, weights(ahead), weights(behind), lengths=lengths, truncation=30, backend=backend)
    same(y[1:, :40], ema(x[1:, :40], weights(ahead), weights(behind), truncation=30, backend=backend)[0], 1e-9)


@pytest.mark.parametrize("length", [1, 2, 3, 64, 100, 1000])
def test_the_kernel_from_two_levels_of_powers(length):
    raw = [p.detach() for p in parameters(1)]
    same(ema_kernel(weights(raw), length), taps(raw, length))


def test_an_average_of_ones_approaches_its_sum():
    """Closed form: with p = a = 1/2, beta = gamma = 1 and one dimension, k_l = (1/2) (3/4)^l, which sums to 2."""
    zero, one = torch.zeros(D, 1, dtype=torch.float64), torch.ones(D, 1, dtype=torch.float64)
    y, _ = ema(torch.ones(1, 200, D, dtype=torch.float64), Coefficients(*ema_coefficients(zero, zero, one, one)))
    want = 2 * (1 - 0.75 ** torch.arange(1, 201, dtype=torch.float64))
    same(y, want.view(1, -1, 1).expand_as(y))


def test_published_initial_values():
    torch.manual_seed(0)
    delta, alpha, beta, gamma = initialize_ema(4000, 6)
    for values, mean, std in ((delta, 0.0, 0.2), (alpha, 0.0, 0.2), (gamma, 0.0, 1.0)):
        assert abs(values.mean() - mean) < 0.02 and abs(values.std() / (std or 1) - 1) < 0.02
    sign = torch.tensor([1.0, -1.0] * 3)
    torch.testing.assert_close(beta.mean(0), sign, atol=2e-3, rtol=0)
    assert abs((beta - sign).std() - 0.02) < 1e-3


@pytest.mark.parametrize("backend", ["chunked", "fft"])
def test_fp32_stays_close_to_fp64_over_a_long_sequence(backend, monkeypatch):
    monkeypatch.setattr(spans, "SPAN", 10000)
    torch.manual_seed(0)
    narrow = weights(initialize_ema(D, 16))
    x = normal(1, 8000, D, seed=7).float()
    for truncation in (None, 1000):
        y, _ = ema(x, narrow, narrow, truncation=truncation, backend=backend)
        wide = Coefficients(*(part.double() for part in narrow))
        want, _ = ema(x.double(), wide, wide, truncation=truncation, backend="chunked")
        assert y.dtype == torch.float32
        assert (y - want).abs().max() < 1e-5 * want.abs().max()


@pytest.mark.parametrize("truncation", [None, 5])
def test_no_output_knows_of_later_inputs(truncation):
    x, ahead = normal(1, 130, D, seed=7), weights([p.detach() for p in parameters(1)])
    want, _ = ema(x, ahead, truncation=truncation)
    for cut in (1, 63, 64, 65, 129):
        changed = x.clone()
        changed[:, cut:] += 1e6
        assert torch.equal(ema(changed, ahead, truncation=truncation)[0][:, :cut], want[:, :cut])


def test_autocast_and_half_types_stay_out():
    x, ahead = normal(2, 80, D, seed=7).float(), weights([p.detach().float() for p in parameters(1)])
    want, _ = ema(x, ahead)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ema(x, ahead)[0], want)
    y, state = ema(x.bfloat16(), ahead, return_state=True)
    assert y.dtype == torch.bfloat16 and state.h.dtype == torch.float32


def test_gradcheck():
    """In fp64 on the recurrence, as on the chunks."""
    raw, x = parameters(1), normal(1, 3, D, seed=7).requires_grad_()
    for backend in ("naive", "chunked"):

        def run(x, *raw, backend=backend):
            y, state = ema(x, weights(raw), truncation=2, return_state=True, backend=backend)
            return y, state.h

        assert torch.autograd.gradcheck(run, (x, *raw), fast_mode=True)


def test_strides_do_not_matter():
    x, ahead = normal(2, 80, D, seed=7), weights([p.detach() for p in parameters(1)])
    strided = x.transpose(0, 1).contiguous().transpose(0, 1)
    assert not strided.is_contiguous()
    same(ema(strided, ahead)[0], ema(x, ahead)[0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"skip": torch.ones(D + 1)}, "skip has shape"),
        ({"truncation": 0}, "truncation=0 must be at least 1"),
        ({"lengths": torch.ones(3)}, "lengths has shape"),
        ({"initial_state": EmaState(torch.ones(1, D, N))}, "initial_state has shapes"),
        ({"initial_state": EmaState(torch.ones(2, D, N)), "truncation": 3}, "initial_state has shapes"),
        ({"behind": [torch.ones(D, N + 1)] * 3}, "behind holds"),
        ({"ahead": [torch.ones(D + 1, N)] * 3}, "ahead holds"),
        ({"ahead": [torch.ones(D)] * 3}, "ahead holds"),
        ({"return_state": True, "behind": [torch.ones(D, N)] * 3}, "looks ahead"),
        ({"backend": "triton"}, "backend='triton'"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        ema(**{"x": torch.ones(2, 6, D), "ahead": weights(parameters(1)), **change})
