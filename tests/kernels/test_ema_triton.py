"""The damped EMA in Triton: interpreted on tiny shapes against the oracle; on a GPU, real ones."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from seqzoo.kernels.ema import Coefficients, EmaState, ema, fused

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def outputs(shape, dtype, device, backend, *, given, both=False, state=True):
    """y, the last state and the gradients of random weights on them; x is exact in the dtype `given`."""
    batch, length, dim, averages = shape
    generator = torch.Generator().manual_seed(length)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*size, exact=torch.float32, to=wide):
        return torch.randn(size, dtype=torch.float64, generator=generator).to(exact).to(device, to)

    x, skip, weights = draw(batch, length, dim, exact=given, to=dtype), draw(dim), draw(batch, length, dim)
    ahead, behind = (
        Coefficients(-draw(dim, averages).exp().clamp(max=3), draw(dim, averages), draw(dim, averages))
        for _ in range(2)
    )
    before = draw(batch, dim, averages)
    inputs = [t.requires_grad_() for t in (x, skip, *ahead, *(behind if both else ()), *(() if both else (before,)))]
    options = {"behind": behind} if both else {"initial_state": EmaState(before), "return_state": state}
    y, last = ema(x, ahead, skip=skip, backend=backend, **options)
    loss = (y * weights).sum() + (0 if last is None else (last.h * torch.arange(averages, device=device)).sum())
    return [y, *([] if last is None else [last.h]), *torch.autograd.grad(loss, inputs)]


def compare(shape, dtype=torch.float32, *, device=DEVICE, backend="naive", **given):
    got = outputs(shape, dtype, device, "triton", given=dtype, **given)
    want = outputs(shape, torch.float64, device, backend, given=dtype, **given)
    assert got[0].dtype == dtype
    for found, expected in zip(got, want, strict=True):
        error = (found.double() - expected).abs().max().item()
        scale = max(1.0, expected.abs().max().item())
        assert error <= TOLERANCE[dtype] * scale, f"error {error:.2e} of {scale:.2e}"


@pytest.mark.parametrize("shape", [(2, 1, 3, 1), (1, 19, 5, 3), (1, 8, 20, 16)])
def test_outputs_and_gradients_of_one_chunk(shape):
    compare(shape)


@pytest.mark.parametrize("both", [False, True])
def test_several_chunks(both, monkeypatch):
    """Two rows of three chunks, the last a token long."""
    chunks = lambda batch, length, *rest: fused.Launch(4, 8, 8, -(-length // 8))  # noqa: E731
    monkeypatch.setattr(fused, "plan", chunks)
    compare((1 if both else 2, 17, 9, 4), both=both)


def test_half_precision():
    compare((1, 9, 5, 4), torch.bfloat16)


def test_lengths_and_strides():
    x = torch.randn(2, 3, 7, device=DEVICE).mT
    weights = Coefficients(*(-torch.rand(3, 2, device=DEVICE) for _ in range(3)))
    lengths = torch.tensor([7, 4], device=DEVICE)
    both = Coefficients(*(-torch.rand(3, 2, device=DEVICE) for _ in range(3)))
    got = ema(x, weights, both, lengths=lengths, backend="triton")[0]
    for row, n in enumerate(lengths.tolist()):
        alone = ema(x[row : row + 1, :n], weights, both, backend="naive")[0]
        torch.testing.assert_close(got[row, :n], alone[0], rtol=1e-5, atol=1e-5)


def test_the_past_is_bitwise_independent_of_the_future():
    x = torch.randn(1, 12, 3, device=DEVICE)
    weights = Coefficients(*(-torch.rand(3, 2, device=DEVICE) for _ in range(3)))
    later = torch.cat((x[:, :9], x[:, 9:] + 1e3), 1)
    want, got = (ema(t, weights, backend="triton")[0] for t in (x, later))
    assert torch.equal(got[:, :9], want[:, :9])
    assert not torch.equal(got[:, 9:], want[:, 9:])


def test_a_plan_covers_the_sequence_and_fills_a_gpu():
    for batch, length, dim, averages in ((1, 65536, 256, 16), (8, 4096, 4096, 16), (1, 5, 3, 2)):
        launch = fused.plan(batch, length, dim, averages)
        assert launch.chunk % fused.KEPT == 0
        assert (launch.number - 1) * launch.chunk < length <= launch.number * launch.chunk
        if length >= 4096:
            assert batch * -(-dim // launch.tile) * launch.number >= fused.WARPS // 2


def test_what_it_cannot_do_is_refused(monkeypatch):
    x, weights = torch.zeros(1, 9, 3, device=DEVICE), Coefficients(*torch.zeros(3, 3, 2, device=DEVICE))
    with pytest.raises(ValueError, match="'triton' does not support truncation; backends that can: chunked"):
        ema(x, weights, truncation=4, backend="triton")
    with pytest.raises(ValueError, match="'triton' does not support ragged_state"):
        ema(x, weights, lengths=torch.tensor([4], device=DEVICE), return_state=True, backend="triton")
    with pytest.raises(ValueError, match="takes averages sizes up to 64, not 65"):
        ema(x, Coefficients(*torch.zeros(3, 3, 65, device=DEVICE)), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend='triton' does not run on cpu"):
        ema(x.cpu(), Coefficients(*torch.zeros(3, 3, 2)), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("shape", [(2, 4096, 512, 16), (1, 2049, 100, 3), (1, 4000, 2048, 2)])
def test_real_shapes_on_a_gpu(shape, both, dtype):
    compare(shape, dtype, device="cuda", backend="chunked", both=both)
