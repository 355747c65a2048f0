"""The short convolution: torch's own, slabs against the oracle with gradients, states, precision, causality, errors."""

import pytest
import torch
from torch.nn import functional as F

from seqzoo.kernels.dispatch import backends
from seqzoo.kernels.short_conv import chunked, short_conv

BACKENDS = ["chunked", "naive"]


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    """Slabs of 16 places, so that short sequences have several; memory that nobody wrote shows up as NaN."""
    monkeypatch.setattr(chunked, "SLAB", 1)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(rows, length, channels=5, taps=4, dtype=torch.float64, grad=False):
    """x, weight, bias, state."""
    shapes = (rows, length, channels), (channels, taps), (channels,), (rows, taps - 1, channels)
    return [torch.randn(s, dtype=torch.float64).to(dtype).requires_grad_(grad) for s in shapes]


def run(tensors, **options):
    x, weight, bias, state = tensors
    return short_conv(x, weight, bias=bias, initial_state=state, **options)


def close(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_torchs_convolution(backend, silu, taps):
    x, weight, bias, _ = inputs(2, 37, taps=taps)
    want = F.conv1d(x.mT, weight[:, None], bias, padding=taps - 1, groups=5)[..., :37].mT
    close(short_conv(x, weight, bias=bias, silu=silu, backend=backend), F.silu(want) if silu else want)
    want = want - bias
    close(short_conv(x, weight, silu=silu, backend=backend), F.silu(want) if silu else want)


@pytest.mark.parametrize("length", [0, 1, 2, 15, 16, 17, 18, 33, 70])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("taps", [1, 4, 20])
def test_slabs_equal_the_oracle(length, silu, taps):
    """Outputs and all gradients; 20 taps reach back over more than a slab."""
    tensors = inputs(2, length, taps=taps, grad=True)
    y, want = (run(tensors, silu=silu, backend=backend) for backend in BACKENDS)
    close(y, want)
    weight = torch.randn_like(y)
    got, expected = (torch.autograd.grad((t * weight).sum(), tensors) for t in (y, want))
    for a, b in zip(got, expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("slab", [1, 700, 1 << 19])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [0, 1, 21, 63, 64, 65, 500])
def test_float32_slabs_equal_the_oracle(length, dtype, slab, monkeypatch):
    """All taps in one pass, a row in slabs or several rows together; the oracle in float64."""
    monkeypatch.setattr(chunked, "SLAB", slab)
    for taps in (1, 4, 20):
        tensors = inputs(5, length, taps=taps, dtype=dtype, grad=True)
        wide = [t.detach().double().requires_grad_() for t in tensors]
        y, want = run(tensors, silu=True, backend="chunked"), run(wide, silu=True, backend="naive")
        weight = torch.randn_like(want).to(dtype)
        got = [y, *torch.autograd.grad((y * weight).sum(), tensors)]
        expected = [want, *torch.autograd.grad((want * weight.double()).sum(), wide)]
        for a, b in zip(got, expected, strict=True):
            assert a.dtype == dtype
            error = (a.double() - b).norm() / b.norm().clamp(min=1e-30)
            assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_operator_keeps_torchs_rules(dtype):
    """Schema, fake tensors, autograd registration, and tracing, as torch checks them."""
    x, weight, bias, state = inputs(2, 18, taps=3, dtype=dtype, grad=True)
    torch.library.opcheck(chunked._forward, (x, state, weight.T.detach().clone().requires_grad_(), bias, True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_numeric_gradients(backend):
    tensors = inputs(2, 18, channels=2, taps=3, grad=True)
    assert torch.autograd.gradcheck(lambda *t: run(t, silu=True, backend=backend), tensors)


def test_the_state_stands_before_the_first_input():
    x, weight, bias, state = inputs(2, 40)
    whole = short_conv(torch.cat([state, x], 1), weight, bias=bias)[:, 3:]
    close(run((x, weight, bias, state)), whole)
    second = short_conv(x[:, 17:], weight, bias=bias, initial_state=x[:, 14:17])
    close(second, whole[:, 17:])


def test_half_precision_is_computed_in_float32():
    tensors = inputs(2, 40, dtype=torch.bfloat16, grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = run(tensors, silu=True)
    wide = [t.detach().float().requires_grad_() for t in tensors]
    want = run(wide, silu=True)
    assert torch.equal(y, want.bfloat16())
    got = torch.autograd.grad(y.sum(), tensors)
    for a, b in zip(got, torch.autograd.grad(want.sum(), wide), strict=True):
        assert a.dtype == torch.bfloat16 and torch.equal(a, b.bfloat16())


def test_the_past_is_bitwise_independent_of_the_future():
    x, weight, bias, state = inputs(2, 50, dtype=torch.float32)
    want = run((x, weight, bias, state), silu=True)
    for cut in (1, 15, 16, 17, 49):
        got = run((torch.cat([x[:, :cut], x[:, cut:] + 1e3], 1), weight, bias, state), silu=True)
        assert torch.equal(got[:, :cut], want[:, :cut])
        assert not torch.equal(got[:, cut:], want[:, cut:])


def test_any_stride_and_an_untouched_input():
    x, weight, bias, state = inputs(3, 40)
    kept = [t.clone() for t in (x, weight, bias, state)]
    want = run((x, weight, bias, state), silu=True)
    got = run((x.mT.contiguous().mT, weight.T.contiguous().T, bias, state), silu=True)
    close(got, want)
    assert all(torch.equal(a, b) for a, b in zip((x, weight, bias, state), kept, strict=True))


def test_backends_are_registered():
    assert {"chunked": "ok", "naive": "ok"}.items() <= backends()["short_conv"].items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(2, 3)}, r"x \(2, 3\), weight \(5, 4\)"),
        ({"weight": torch.zeros(4, 5)}, r"weight \(4, 5\) must be"),
        ({"weight": torch.zeros(5, 0)}, r"weight \(5, 0\) must be"),
        ({"bias": torch.zeros(4)}, r"bias has shape \(4,\), expected \(5,\)"),
        ({"initial_state": torch.zeros(2, 4, 5)}, r"initial_state has shape \(2, 4, 5\), expected \(2, 3, 5\)"),
        ({"backend": "fft"}, "backend='fft' is unknown; choose from auto, triton, chunked, naive"),
    ],
)
def test_bad_values_are_refused(change, message):
    given = {"x": torch.zeros(2, 6, 5), "weight": torch.zeros(5, 4)}
    with pytest.raises(ValueError, match=message):
        short_conv(**{**given, **change})
