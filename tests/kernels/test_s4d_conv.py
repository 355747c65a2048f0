"""The S4D convolution against a recurrent loop, a dense Toeplitz matrix and scipy."""

import numpy as np
import pytest
import torch

from seqzoo.kernels.s4d_conv import discretize, initialize, powers, s4d_conv, s4d_kernel, spans
from seqzoo.kernels.s4d_conv.fft import fast_length

torch.set_num_threads(1)
BACKENDS = ("naive", "chunked", "fft")
D, N = 5, 4
SPAN = spans.SPAN


@pytest.fixture(autouse=True)
def small_spans(monkeypatch):
    """Two chunks of one row each, so that short sequences have several; memory that nobody wrote shows up as NaN."""
    monkeypatch.setattr(spans, "SPAN", 2 * 32 * D)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def draw(batch, length, seed=0):
    """u, log_a, b, c, c_reverse, skip, state in fp64, log_a and b of a random stable system."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    def pair():
        return torch.complex(normal(D, N), normal(D, N))

    log_a = torch.complex(-0.3 * torch.rand(D, N, generator=generator, dtype=torch.float64), normal(D, N))
    values = [normal(batch, length, D), log_a, pair(), pair(), pair(), normal(D), normal(batch, D, N, 2)]
    return [v.requires_grad_() for v in values]


def loop(u, log_a, b, c, skip, state=None):
    """One step after another: y (B, L, D) and the last state, complex."""
    x = torch.zeros(u.shape[0], D, N, dtype=torch.complex128) if state is None else torch.view_as_complex(state)
    a, outputs = torch.exp(log_a), []
    for t in range(u.shape[1]):
        x = a * x + b * u[:, t, :, None]
        outputs.append(2 * (c * x).real.sum(-1) + skip * u[:, t])
    return torch.stack(outputs, 1), torch.view_as_real(x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 500])
@pytest.mark.parametrize("with_state", [False, True])
def test_equals_the_recurrence_with_gradients(backend, length, with_state):
    u, log_a, b, c, _, skip, state = draw(2, length)
    inputs = [u, log_a, b, c, skip] + ([state] if with_state else [])
    expected, last = loop(u, log_a, b, c, skip, state if with_state else None)
    y, final = s4d_conv(
        u, log_a, b, c, skip=skip, state=state if with_state else None, output_state=True, backend=backend
    )
    torch.testing.assert_close(y, expected, atol=1e-11, rtol=1e-12)
    torch.testing.assert_close(final, last, atol=1e-11, rtol=1e-12)
    generator = torch.Generator().manual_seed(1)
    g_y = torch.randn(y.shape, generator=generator, dtype=y.dtype)
    g_x = torch.randn(final.shape, generator=generator, dtype=y.dtype)
    ours = torch.autograd.grad((y * g_y).sum() + (final * g_x).sum(), inputs)
    theirs = torch.autograd.grad((expected * g_y).sum() + (last * g_x).sum(), inputs)
    for a, e in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, e, atol=1e-9, rtol=1e-10)


@pytest.mark.parametrize("span", [1, 4 * 32 * D, SPAN])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("length", [20, 64, 150])
def test_spans_equal_the_oracle(span, both, length, monkeypatch):
    """Rows together or one by one, one chunk at a time or all: outputs, the state where rows end, all gradients."""
    monkeypatch.setattr(spans, "SPAN", span)
    u, log_a, b, c, c_reverse, skip, state = draw(4, length)
    inputs, options = [u, log_a, b, c, skip], {"lengths": torch.tensor([length, 0, length // 2, 1])}
    if both:
        inputs, options = [*inputs, c_reverse], {**options, "c_reverse": c_reverse}
    else:
        inputs, options = [*inputs, state], {**options, "state": state, "output_state": True}
    outcome = []
    for backend in ("chunked", "naive"):
        y, last = s4d_conv(u, log_a, b, c, skip=skip, backend=backend, **options)
        outputs = [y] if last is None else [y, last]
        generator = torch.Generator().manual_seed(1)
        weights = [torch.randn(t.shape, generator=generator, dtype=t.dtype) for t in outputs]
        outcome.append([*outputs, *torch.autograd.grad(outputs, inputs, weights)])
    for got, want in zip(*outcome, strict=True):
        torch.testing.assert_close(got, want, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("both", [False, True])
def test_the_operator_keeps_torchs_rules(both):
    """Schema, fake tensors, autograd registration, and tracing, as torch checks them."""
    x, block, write, read, decay, start = (
        torch.randn(*shape, dtype=torch.float64).requires_grad_()
        for shape in ((2, 70, 3), (3, 32, 32), (3, 32, 4), (3, 4, 32), (3, 2, 2), (3, 2, 2, 2))
    )
    last = torch.tensor([2, 0])
    arguments = (x, None, write, read, decay, None, last[:0], True) if both else (
        x, block, write, read, decay, start, last, False)  # fmt: skip
    torch.library.opcheck(spans._forward, arguments)


def test_strides_do_not_matter():
    u, log_a, b, c, _, skip, _ = (t.detach() for t in draw(3, 80))
    want, _ = s4d_conv(u, log_a, b, c, skip=skip)
    for strided in (u.transpose(0, 1).contiguous().transpose(0, 1), u.mT.contiguous().mT):
        assert not strided.is_contiguous()
        torch.testing.assert_close(s4d_conv(strided, log_a, b, c, skip=skip)[0], want, atol=1e-13, rtol=1e-13)
    parts = (t.mT.contiguous().mT for t in (log_a, b, c))
    torch.testing.assert_close(s4d_conv(u, *parts, skip=skip)[0], want, atol=1e-13, rtol=1e-13)


def test_no_output_knows_of_later_inputs():
    u, log_a, b, c, _, skip, _ = (t.detach() for t in draw(2, 130))
    u, skip, log_a, b, c = u.float(), skip.float(), *(t.to(torch.complex64) for t in (log_a, b, c))
    want, _ = s4d_conv(u, log_a, b, c, skip=skip)
    for cut in (1, 31, 32, 33, 64, 129):
        changed = u.clone()
        changed[:, cut:] += 1e3
        y, _ = s4d_conv(changed, log_a, b, c, skip=skip)
        assert torch.equal(y[:, :cut], want[:, :cut]) and not torch.equal(y[:, cut:], want[:, cut:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 5, 64, 70])
def test_bidirectional_formula(backend, length):
    """y_t = sum_{j <= t} K_{t-j} u_j + sum_{j > t} K'_{j-t-1} u_j, written out as a matrix per channel."""
    u, log_a, b, c, c_reverse, *_ = draw(2, length)
    place = torch.arange(length)
    ahead, behind = (
        2 * ((b * weight).unsqueeze(-1) * torch.exp(log_a.unsqueeze(-1) * place)).real.sum(1)
        for weight in (c, c_reverse)
    )
    matrix = torch.zeros(D, length, length, dtype=torch.float64)
    for t in range(length):
        for j in range(length):
            matrix[:, t, j] = ahead[:, t - j] if j <= t else behind[:, j - t - 1]
    expected = torch.einsum("dtj,bjd->btd", matrix, u)
    y, final = s4d_conv(u, log_a, b, c, c_reverse=c_reverse, backend=backend)
    assert final is None
    torch.testing.assert_close(y, expected, atol=1e-11, rtol=1e-12)
    inputs = (u, log_a, b, c, c_reverse)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    ours, theirs = (torch.autograd.grad((t * cotangent).sum(), inputs, allow_unused=True) for t in (y, expected))
    for a, e, given in zip(ours, theirs, inputs, strict=True):
        zero = torch.zeros_like(given)  # at length 1 the reverse kernel touches nothing
        torch.testing.assert_close(zero if a is None else a, zero if e is None else e, atol=1e-9, rtol=1e-10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_chunks_with_a_carried_state_equal_the_whole(backend):
    u, log_a, b, c, _, skip, _ = draw(2, 150)
    whole, last = s4d_conv(u, log_a, b, c, skip=skip, output_state=True, backend=backend)
    state, parts = torch.zeros(2, D, N, 2, dtype=torch.float64), []
    for part in u.split([70, 1, 1, 64, 14], 1):
        y, state = s4d_conv(part, log_a, b, c, skip=skip, state=state, output_state=True, backend=backend)
        parts.append(y)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-11, rtol=1e-12)
    torch.testing.assert_close(state, last, atol=1e-11, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths_stop_each_row_where_it_ends(backend):
    lengths = [150, 128, 65, 64, 1, 0]
    u, log_a, b, c, _, skip, state = draw(len(lengths), 150)
    y, final = s4d_conv(
        u,
        log_a,
        b,
        c,
        skip=skip,
        state=state,
        lengths=torch.tensor(lengths),
        output_state=True,
        backend=backend,
    )
    for row, n in enumerate(lengths):
        one = slice(row, row + 1)
        alone, last = s4d_conv(u[one, :n], log_a, b, c, skip=skip, state=state[one], output_state=True, backend=backend)
        torch.testing.assert_close(y[one, :n], alone, atol=1e-11, rtol=1e-12)
        torch.testing.assert_close(final[one], last, atol=1e-11, rtol=1e-12)


@pytest.mark.parametrize("length", [1, 2, 3, 64, 100, 1000])
def test_two_level_kernel_equals_vandermonde_and_a_loop(length):
    _, log_a, b, c, *_ = draw(1, 1)
    weight = b * c
    power, taps = torch.ones_like(weight), []
    for _ in range(length):
        taps.append(2 * (weight * power).real.sum(1))
        power = power * torch.exp(log_a)
    for backend in ("naive", "chunked"):
        kernel = s4d_kernel(log_a, weight, length, backend=backend)
        torch.testing.assert_close(kernel, torch.stack(taps, 1), atol=1e-12, rtol=1e-12)
    two_level = s4d_kernel(log_a.to(torch.complex64), weight.to(torch.complex64), length)
    torch.testing.assert_close(two_level.double(), kernel, atol=1e-4, rtol=0)


@pytest.mark.parametrize("init", ["lin", "inv", "real", "legs"])
@pytest.mark.parametrize("backend", ["chunked", "fft"])
def test_fp32_stays_close_to_fp64_over_a_long_sequence(init, backend, monkeypatch):
    """The double-precision reference starts from the same rounded log Abar, so only our arithmetic is
    measured."""
    monkeypatch.setattr(spans, "SPAN", 6000)
    a, b = initialize(init, 64)
    log_a, b = discretize(a.to(torch.complex64), b.to(torch.complex64), torch.tensor([1e-3, 1e-2, 1e-1]), "zoh")
    generator = torch.Generator().manual_seed(0)
    c = torch.randn(log_a.shape, generator=generator, dtype=torch.complex64)
    u = torch.randn(1, 4000, 3, generator=generator)
    y, _ = s4d_conv(u, log_a, b, c, backend=backend)
    wide = [t.to(torch.complex128) for t in (log_a, b, c)]
    reference, _ = s4d_conv(u.double(), *wide, backend="chunked")
    assert y.dtype == torch.float32
    assert (y - reference).abs().max() < 2e-5 * reference.abs().max()


@pytest.mark.parametrize("method", ["zoh", "bilinear"])
@pytest.mark.parametrize("init", ["lin", "inv", "real", "legs"])
def test_impulse_response_of_scipy(method, init):
    """scipy discretises the real 2 x 2 form of every conjugate pair and runs it on an impulse."""
    signal = pytest.importorskip("scipy.signal")
    a, b = initialize(init, 8)
    c = torch.randn(4, generator=torch.Generator().manual_seed(0), dtype=torch.complex128)
    for dt in (0.001, 0.03, 0.4):
        log_a, b_bar = discretize(a, b, torch.tensor([dt], dtype=torch.float64), method)
        kernel = s4d_kernel(log_a, b_bar * c, 50)[0].numpy()
        expected = np.zeros(50)
        for a_n, b_n, c_n in zip(a.numpy(), b.numpy(), c.numpy(), strict=True):
            system = (
                np.array([[a_n.real, -a_n.imag], [a_n.imag, a_n.real]]),
                np.array([[b_n.real], [b_n.imag]]),
                np.array([[2 * c_n.real, -2 * c_n.imag]]),
                np.zeros((1, 1)),
            )
            a_d, b_d, *_ = signal.cont2discrete(system, dt, method=method)
            x = b_d  # scipy's impulse response reads the state before the input reaches it
            for step in range(50):
                expected[step] += (system[2] @ x).item()
                x = a_d @ x
        np.testing.assert_allclose(kernel, expected, atol=1e-12 * np.abs(expected).max(), rtol=1e-9)


def test_small_steps_keep_their_digits_in_fp32():
    a, b = initialize("lin", 64)
    dt = torch.tensor([1e-6, 1e-4])
    _, narrow = discretize(a.to(torch.complex64), b.to(torch.complex64), dt)
    _, wide = discretize(a, b, dt.double())
    assert ((narrow - wide).abs() / wide.abs()).max() < 1e-6


@pytest.mark.parametrize("count", [1, 2, 7, 64, 65])
def test_powers(count):
    _, log_a, *_ = draw(1, 1)
    expected = torch.exp(log_a).unsqueeze(-1) ** torch.arange(count)
    torch.testing.assert_close(powers(log_a, count), expected, atol=1e-13, rtol=1e-12)


def test_initial_values():
    n = np.arange(4)
    for name, real, imag in (
        ("lin", -0.5 + 0 * n, np.pi * n),
        ("inv", -0.5 + 0 * n, 8 / np.pi * (8 / (2 * n + 1) - 1)),
        ("real", -(n + 1.0), 0 * n),
    ):
        a, b = initialize(name, 8)
        np.testing.assert_allclose(a.numpy(), real + 1j * imag, atol=1e-14)
        assert (b == 1).all()
    with pytest.raises(ValueError, match="init='hippo'"):
        initialize("hippo", 8)


def test_legs_diagonalises_the_normal_part_of_hippo():
    """HiPPO-LegS entry by entry; its normal part through the diagonal form has the same impulse response."""
    size = 8
    hippo = np.zeros((size, size))
    for n in range(size):
        for k in range(n + 1):
            hippo[n, k] = -np.sqrt((2 * n + 1) * (2 * k + 1)) if n > k else -(n + 1)
    p = np.sqrt(np.arange(size) + 0.5)
    normal = hippo + np.outer(p, p)
    np.testing.assert_allclose(normal @ normal.T, normal.T @ normal, atol=1e-10)
    a, b = initialize("legs", size)
    expected = np.linalg.eigvals(normal)
    expected = expected[expected.imag > 0]
    np.testing.assert_allclose(a.numpy(), expected[np.argsort(expected.imag)], atol=1e-10)
    # |B| in the eigenbasis: sum over the pair of |b|^2 w^k are the moments B^T normal^k B.
    drive = np.sqrt(2 * np.arange(size) + 1)
    for k in range(5):
        moment = drive @ np.linalg.matrix_power(normal, k) @ drive
        np.testing.assert_allclose(2 * (np.abs(b.numpy()) ** 2 * a.numpy() ** k).sum().real, moment, rtol=1e-9)


def test_autocast_does_not_reach_inside():
    u, log_a, b, c, _, skip, _ = (t.detach() for t in draw(2, 80))
    u, skip = u.float(), skip.float()
    parts = [t.to(torch.complex64) for t in (log_a, b, c)]
    expected, _ = s4d_conv(u, *parts, skip=skip)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = s4d_conv(u, *parts, skip=skip)
    assert torch.equal(y, expected)
    half, _ = s4d_conv(u.bfloat16(), *parts, skip=skip)
    assert half.dtype == torch.bfloat16
    assert (half.float() - expected).norm() < 2e-2 * expected.norm()


def test_gradcheck():
    u, log_a, b, c, _, skip, state = draw(1, 3)

    def run(*tensors):
        return s4d_conv(*tensors[:4], skip=tensors[4], state=tensors[5], output_state=True)

    assert torch.autograd.gradcheck(run, (u, log_a, b, c, skip, state))


def test_fft_lengths():
    assert [fast_length(n) for n in (1, 2, 7, 9, 11, 17, 33, 200)] == [1, 2, 8, 10, 12, 20, 40, 256]
    assert all(n <= fast_length(n) <= 4 * n / 3 + 1 for n in range(1, 500))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"b": torch.ones(D, N + 1, dtype=torch.complex64)}, "b has shape"),
        ({"skip": torch.ones(D + 1)}, "skip has shape"),
        ({"lengths": torch.ones(3)}, "lengths has shape"),
        ({"state": torch.ones(2, D, N)}, "state has shape"),
        ({"c_reverse": torch.ones(D, N, dtype=torch.complex64), "output_state": True}, "looks ahead"),
        ({"backend": "triton"}, "backend='triton'"),
    ],
)
def test_bad_arguments(change, message):
    u, log_a, b, c, *_ = draw(2, 6)
    with pytest.raises(ValueError, match=message):
        s4d_conv(**{"u": u, "log_a": log_a, "b": b, "c": c, **change})
    with pytest.raises(ValueError, match="length=0"):
        s4d_kernel(log_a, b, 0)
    with pytest.raises(ValueError, match="discretization='euler'"):
        discretize(log_a, b, torch.ones(D), "euler")
