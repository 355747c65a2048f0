"""The dilated convolution in Triton: interpreted on tiny shapes against the oracle; on a GPU, real ones."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from seqzoo.kernels.dilated_conv import dilated_conv
from seqzoo.kernels.dilated_conv.fused import GROUP, plan

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def outputs(shape, dtype, device, backend, *, given, causal=True, tail=True, bias=True):
    """y, the last inputs and the gradients of random weights on both, of inputs that are exact in `given`."""
    batch, length, dim, taps, dilation = shape
    generator = torch.Generator().manual_seed(length)

    def draw(*size):
        t = torch.randn(size, dtype=torch.float64, generator=generator)
        return t.to(given).to(device, dtype).requires_grad_()

    x, weight, offset = draw(batch, length, dim), draw(dim, 1, taps), draw(dim)
    before, weights = draw(batch, (taps - 1) * dilation, dim), draw(batch, length, dim)
    options = {"bias": offset if bias else None, "tail": before if tail and causal else None}
    y, last = dilated_conv(x, weight, dilation=dilation, causal=causal, return_tail=causal, backend=backend, **options)
    loss = (y * weights.detach()).sum() + (0 if last is None else last.square().sum())
    inputs = [x, weight, *(t for t in options.values() if t is not None)]
    return [y, *torch.autograd.grad(loss, inputs)]


def compare(shape, dtype=torch.float32, *, device=DEVICE, backend="naive", **given):
    got = outputs(shape, dtype, device, "triton", given=dtype, **given)
    want = outputs(shape, torch.float64, device, backend, given=dtype, **given)
    assert got[0].dtype == dtype
    for found, expected in zip(got, want, strict=True):
        error = (found.double() - expected).abs().max().item()
        scale = max(1.0, expected.abs().max().item())
        assert error <= TOLERANCE[dtype] * scale, f"error {error:.2e} of {scale:.2e}"


SHAPES = [(2, 11, 5, 5, 3), (1, 6, 4, 3, 20), (1, 1, 2, 2, 1), (1, 70, 33, 3, 2), (2, 5, 32, 3, 2)]


@pytest.mark.parametrize("shape", SHAPES)
def test_outputs_and_gradients(shape):
    """Classes of unequal lengths; a dilation beyond the sequence; one token; several pieces and blocks; full blocks."""
    compare(shape)


def test_without_a_tail_and_many_taps():
    compare((1, 20, 3, 17, 2), tail=False, bias=False)


def test_centred():
    compare((2, 9, 4, 5, 2), causal=False)


def test_half_precision():
    compare((1, 9, 5, 3, 2), torch.bfloat16)


def test_lengths():
    x, weight = torch.randn(3, 8, 2, device=DEVICE), torch.randn(2, 1, 3, device=DEVICE)
    lengths = torch.tensor([8, 3, 0], device=DEVICE)
    y, tail = dilated_conv(x, weight, dilation=2, lengths=lengths, return_tail=True, backend="triton")
    for row, n in enumerate(lengths.tolist()[:2]):
        alone = dilated_conv(x[row : row + 1, :n], weight, dilation=2, return_tail=True, backend="naive")
        torch.testing.assert_close(y[row, :n], alone[0][0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(tail[row], alone[1][0], rtol=1e-5, atol=1e-5)
    assert not tail[2].any()


def test_the_past_is_bitwise_independent_of_the_future():
    x, weight = torch.randn(1, 12, 3, device=DEVICE), torch.randn(3, 1, 4, device=DEVICE)
    later = torch.cat((x[:, :9], x[:, 9:] + 1e3), 1)
    want, got = (dilated_conv(t, weight, dilation=2, backend="triton")[0] for t in (x, later))
    assert torch.equal(got[:, :9], want[:, :9])
    assert not torch.equal(got[:, 9:], want[:, 9:])


def test_plans_cover_the_sequence_and_fill_a_gpu():
    for batch, length, channels, taps, dilation in ((1, 65536, 64, 17, 16), (8, 4096, 4096, 4, 1), (1, 64, 8, 17, 512)):
        block, piece, pieces, together = plan(batch, length, channels, taps, dilation)
        places = -(-length // dilation)
        assert (pieces - 1) * piece < places <= pieces * piece
        assert piece % GROUP == 0
        assert 1 <= together <= dilation
        if length >= 4096:
            assert batch * dilation * pieces * -(-channels // block) >= 1024


def test_what_it_cannot_do_is_refused(monkeypatch):
    x = torch.zeros(1, 3, 4, device=DEVICE)
    with pytest.raises(ValueError, match="'triton' does not support grouped; backends that can: shifted"):
        dilated_conv(x, torch.zeros(4, 2, 3, device=DEVICE), backend="triton")
    with pytest.raises(ValueError, match="takes taps sizes up to 32, not 33"):
        dilated_conv(x, torch.zeros(4, 1, 33, device=DEVICE), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend='triton' does not run on cpu"):
        dilated_conv(x.cpu(), torch.zeros(4, 1, 3), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(2, 4096, 512, 17, 16), (1, 2049, 100, 17, 512), (1, 131072, 64, 17, 4096)])
@pytest.mark.parametrize("causal", [True, False])
def test_real_shapes_on_a_gpu(shape, dtype, causal):
    compare(shape, dtype, device="cuda", backend="shifted", causal=causal)
