"""The associative scan in Triton: interpreted on tiny shapes against the oracle; on a GPU, real ones."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from seqzoo.kernels.associative_scan import associative_scan, fused

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def outputs(a_shape, shape, dim, reverse, dtype, device, backend, *, given, initial):
    """h and the gradients of random weights on it, of inputs that are exact in the dtype `given`."""
    generator = torch.Generator().manual_seed(shape[dim])

    def draw(*size):
        t = torch.randn(size, dtype=torch.float64, generator=generator)
        return t.to(given).to(device, dtype)

    a = draw(*a_shape).sigmoid().to(given).to(dtype).requires_grad_()
    x, weights = draw(*shape).requires_grad_(), draw(*shape)
    before = draw(*shape[:dim], *shape[dim + 1 :]).requires_grad_() if initial else None
    h = associative_scan(a, x, dim=dim, reverse=reverse, initial_state=before, backend=backend)
    inputs = [a, x] if before is None else [a, x, before]
    return [h, *torch.autograd.grad((h * weights).sum(), inputs)]


def compare(a_shape, shape, dim=1, *, reverse=False, dtype=torch.float32, initial=True, device=DEVICE, backend="naive"):
    options = {"given": dtype, "initial": initial}
    got = outputs(a_shape, shape, dim, reverse, dtype, device, "triton", **options)
    want = outputs(a_shape, shape, dim, reverse, torch.float64, device, backend, **options)
    assert got[0].dtype == dtype
    for found, expected in zip(got, want, strict=True):
        error = (found.double() - expected).abs().max().item()
        scale = max(1.0, expected.abs().max().item())
        assert error <= TOLERANCE[dtype] * scale, f"error {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("a_shape", "shape", "dim"), [((2, 11, 5), (2, 11, 5), 1), ((5,), (2, 9, 5), 1), ((7, 3, 1), (7, 3, 2), 0)]
)
def test_outputs_and_gradients(a_shape, shape, dim, reverse):
    compare(a_shape, shape, dim, reverse=reverse)


@pytest.mark.parametrize("reverse", [False, True])
def test_several_chunks(reverse, monkeypatch):
    """Three chunks of two blocks each, the last a step long; the recurrence over the chunks has one."""
    small = lambda outer, length, inner: fused.Launch(4, 4, 8, -(-length // 8))  # noqa: E731
    monkeypatch.setattr(fused, "plan", small)
    compare((2, 17, 3), (2, 17, 3), reverse=reverse)


def test_the_last_axis_and_one_step():
    compare((3, 37), (3, 37))
    compare((2, 1, 3), (2, 1, 3), initial=False)


def test_half_precision():
    compare((1, 9, 3), (1, 9, 3), dtype=torch.bfloat16)


def test_strided_and_empty_inputs():
    a, x = (torch.rand(2, 3, 7, device=DEVICE).mT for _ in range(2))
    got, want = (associative_scan(a, x, backend=backend) for backend in ("triton", "naive"))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    assert associative_scan(a[:, :0], x[:, :0], backend="triton").shape == (2, 0, 3)


def test_the_past_is_bitwise_independent_of_the_future():
    a, x = torch.rand(1, 12, 3, device=DEVICE), torch.randn(1, 12, 3, device=DEVICE)
    want = associative_scan(a, x, backend="triton")
    got = associative_scan(*(torch.cat((t[:, :9], t[:, 9:] + 1e3), 1) for t in (a, x)), backend="triton")
    assert torch.equal(got[:, :9], want[:, :9])
    assert not torch.equal(got[:, 9:], want[:, 9:])


def test_plans_cover_the_sequence_and_fill_a_gpu():
    for outer, length, inner in ((1, 65536, 256), (8, 4096, 4096), (4096, 8192, 1), (1, 1000000, 1), (2, 3, 5)):
        rows, columns, chunk, number = fused.plan(outer, length, inner)
        assert chunk % rows == 0
        assert (number - 1) * chunk < length <= number * chunk
        if outer * length * inner >= 1 << 24:
            assert outer * number * -(-inner // columns) >= fused.WARPS // 4


def test_what_it_cannot_do_is_refused(monkeypatch):
    x = torch.zeros(1, 3, 2, device=DEVICE)
    with pytest.raises(ValueError, match="'triton' does not take torch"):
        associative_scan(x + 0j, x, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend='triton' does not run on cpu"):
        associative_scan(x.cpu(), x.cpu(), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(
    ("a_shape", "shape", "dim"),
    [
        ((2, 4096, 512), (2, 4096, 512), 1),
        ((1, 2049, 100), (1, 2049, 100), 1),
        ((100,), (4, 2049, 100), 1),
        ((16, 5000), (16, 5000), 1),
        ((3000, 4, 33), (3000, 4, 33), 0),
    ],
)
def test_real_shapes_on_a_gpu(a_shape, shape, dim, reverse, dtype):
    compare(a_shape, shape, dim, reverse=reverse, dtype=dtype, device="cuda", backend="chunked")
