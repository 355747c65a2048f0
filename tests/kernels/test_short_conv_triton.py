"""The short convolution in Triton: interpreted on tiny shapes against the oracle; on a GPU, real ones."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from seqzoo.kernels.short_conv import short_conv

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def outputs(shape, dtype, device, backend, *, silu, given, bias=True, state=True):
    """y and the gradients of random weights on it, of inputs that are exact in the dtype `given`."""
    rows, length, channels, taps = shape
    generator = torch.Generator().manual_seed(length)

    def draw(*size):
        t = torch.randn(size, dtype=torch.float64, generator=generator)
        return t.to(given).to(device, dtype).requires_grad_()

    x, weight, offset = draw(rows, length, channels), draw(channels, taps), draw(channels)
    before, weights = draw(rows, taps - 1, channels), draw(rows, length, channels)
    options = {"bias": offset if bias else None, "initial_state": before if state else None}
    y = short_conv(x, weight, silu=silu, backend=backend, **options)
    inputs = [x, weight, *(t for t in options.values() if t is not None)]
    return [y, *torch.autograd.grad((y * weights.detach()).sum(), inputs)]


def compare(shape, dtype=torch.float32, *, silu=True, device=DEVICE, backend="naive", **given):
    got = outputs(shape, dtype, device, "triton", silu=silu, given=dtype, **given)
    want = outputs(shape, torch.float64, device, backend, silu=silu, given=dtype, **given)
    assert got[0].dtype == dtype
    for found, expected in zip(got, want, strict=True):
        error = (found.double() - expected).abs().max().item() if found.numel() else 0.0
        scale = max(1.0, expected.abs().max().item() if found.numel() else 0.0)
        assert error <= TOLERANCE[dtype] * scale, f"error {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("shape", [(2, 1, 3, 4), (1, 11, 5, 2), (1, 40, 33, 4), (1, 5, 2, 1), (1, 9, 3, 8)])
def test_outputs_and_gradients(shape):
    """One token, more tokens than a piece has, more channels than a block has, one tap."""
    compare(shape)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    compare((1, 7, 5, 3), dtype)


def test_without_activation_bias_and_state():
    compare((2, 6, 3, 3), silu=False, bias=False, state=False)


def test_strided_and_empty_inputs():
    x = torch.randn(2, 3, 7, device=DEVICE).mT
    weight = torch.randn(3, 2, device=DEVICE)
    torch.testing.assert_close(
        short_conv(x, weight, backend="triton"), short_conv(x, weight, backend="naive"), rtol=1e-5, atol=1e-5
    )
    assert short_conv(x[:, :0], weight, backend="triton").shape == (2, 0, 3)


def test_the_past_is_bitwise_independent_of_the_future():
    x, weight = torch.randn(1, 12, 3, device=DEVICE), torch.randn(3, 4, device=DEVICE)
    later = torch.cat((x[:, :9], x[:, 9:] + 1e3), 1)
    want, got = (short_conv(t, weight, silu=True, backend="triton") for t in (x, later))
    assert torch.equal(got[:, :9], want[:, :9])
    assert not torch.equal(got[:, 9:], want[:, 9:])


def test_a_compiler_sees_one_node():
    x, weight = torch.randn(1, 5, 3, device=DEVICE), torch.randn(3, 2, device=DEVICE, requires_grad=True)

    def loss(weight):
        return short_conv(x, weight, silu=True, backend="triton").square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    got, want = (torch.autograd.grad(function(weight), weight)[0] for function in (compiled, loss))
    assert torch.equal(got, want)


def test_what_it_cannot_do_is_refused(monkeypatch):
    x = torch.zeros(1, 3, 2, device=DEVICE)
    with pytest.raises(ValueError, match="takes taps sizes up to 16, not 17"):
        short_conv(x, torch.zeros(2, 17, device=DEVICE), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend='triton' does not run on cpu"):
        short_conv(x.cpu(), torch.zeros(2, 4), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 4096, 1536, 4), (1, 2049, 1000, 4), (3, 500, 65, 8), (8, 2048, 64, 16)])
def test_real_shapes_on_a_gpu(shape, dtype):
    compare(shape, dtype, device="cuda", backend="chunked")
