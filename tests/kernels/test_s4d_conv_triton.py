"""The S4D convolution in Triton: interpreted on tiny shapes against the oracle; on a GPU, real ones."""

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from seqzoo.kernels.s4d_conv import fused, s4d_conv

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def scan_by_rows(self, tensors):
    """The scan of Triton's interpreter, row after row of 2-D tensors: its own calls `combine` for every number."""
    lines = [np.moveaxis(t.handle.data, self.axis, 0) for t in tensors]
    done = [[line[0] for line in lines]]
    for row in zip(*(line[1:] for line in lines), strict=True):
        parts = [self.to_tensor(part, t.dtype) for part, t in zip((*done[-1], *row), (*tensors, *tensors), strict=True)]
        done.append([part.handle.data for part in self.combine_fn.fn(*parts)])
    stacked = [np.moveaxis(np.stack(column), 0, self.axis) for column in zip(*done, strict=True)]
    return [self.to_tensor(part, t.dtype) for part, t in zip(stacked, tensors, strict=True)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    if INTERPRETED:
        monkeypatch.setattr("triton.runtime.interpreter.ScanOps.generic_scan", scan_by_rows)


@pytest.fixture(autouse=True)
def poisoned():
    """Memory that nobody wrote shows up as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


def outputs(shape, dtype, device, backend, *, given, both=False, state=True, lengths=None):
    """y, the last state and the gradients of random weights on them; u is exact in the dtype `given`, all else fp32."""
    batch, length, dim, states = shape
    generator = torch.Generator().manual_seed(length)
    wide = torch.promote_types(dtype, torch.float32)

    def draw(*size):
        return torch.randn(size, dtype=torch.float64, generator=generator)

    def numbers(real, imag):
        return torch.complex(real.float(), imag.float()).to(device, torch.promote_types(wide, torch.complex64))

    u = draw(batch, length, dim).to(given).to(device, dtype)
    weights, skip, before = (
        draw(*size).float().to(device, wide) for size in ((batch, length, dim), (dim,), (batch, dim, states, 2))
    )
    # The first state outlives a piece of 1024 tokens.
    log_a = numbers(-0.005 - 0.1 * draw(dim, states).abs() * (torch.arange(states) > 0), 2 * draw(dim, states))
    b, c, c_reverse = (numbers(draw(dim, states), draw(dim, states)) for _ in range(3))
    options, inputs = {}, [u, log_a, b, c, skip]
    if both:
        options, inputs = {"c_reverse": c_reverse}, [*inputs, c_reverse]
    elif state:
        options, inputs = {"state": before, "output_state": True}, [*inputs, before]
    if lengths is not None:
        options["lengths"] = torch.tensor(lengths, device=device)
    for t in inputs:
        t.requires_grad_()
    y, last = s4d_conv(u, log_a, b, c, skip=skip, backend=backend, **options)
    loss = (y * weights).sum()
    if last is not None:
        loss = loss + (last * draw(*last.shape).to(device)).sum()
    return [y, *([] if last is None else [last]), *torch.autograd.grad(loss, inputs)]


def compare(shape, dtype=torch.float32, *, device=DEVICE, backend="naive", **given):
    got = outputs(shape, dtype, device, "triton", given=dtype, **given)
    want = outputs(shape, torch.float64, device, backend, given=dtype, **given)
    assert got[0].dtype == dtype
    for number, (found, expected) in enumerate(zip(got, want, strict=True)):
        error = (found.to(expected.dtype) - expected).abs().max().item()
        scale = max(1.0, expected.abs().max().item())
        assert error <= TOLERANCE[dtype] * scale, f"tensor {number}: error {error:.2e} of {scale:.2e}"


def pieces(monkeypatch, number):
    """Segments of 16 chunks, that many to a piece."""
    launch = lambda batch, length, dim: fused.Launch(16, 512 * number, -(-length // (512 * number)))  # noqa: E731
    monkeypatch.setattr(fused, "plan", launch)


@pytest.mark.parametrize(("shape", "state"), [((2, 1, 2, 1), True), ((1, 70, 2, 3), True), ((1, 33, 1, 17), False)])
def test_outputs_and_gradients_of_one_segment(shape, state):
    compare(shape, state=state)


@pytest.mark.parametrize("lengths", [[1030], [513]])
def test_pieces_of_two_segments_and_one(lengths, monkeypatch):
    """The final state stands in the second piece, or before the first chunk of the second segment."""
    pieces(monkeypatch, 2)
    compare((1, 1030, 1, 2), lengths=lengths)


def test_the_final_state_where_a_piece_begins(monkeypatch):
    """Rows end in the first chunk of the second piece, and empty."""
    pieces(monkeypatch, 1)
    compare((2, 520, 1, 2), lengths=[520, 0])


def test_final_states_of_rows_of_unequal_lengths():
    compare((2, 70, 1, 2), lengths=[33, 70])


@pytest.mark.parametrize(("length", "number"), [(70, 2), (1030, 2), (520, 1)])
def test_both_directions(length, number, monkeypatch):
    pieces(monkeypatch, number)
    compare((1, length, 1, 3), both=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    compare((1, 70, 1, 4), dtype)


def test_lengths_and_strides():
    """Rows, tokens or channels lie together, in the input and in the gradient of the output."""
    log_a, b, c, c_reverse = torch.complex(-torch.rand(4, 2, 3), torch.randn(4, 2, 3)).to(DEVICE)
    u, lengths = torch.randn(2, 40, 2, device=DEVICE), torch.tensor([40, 33], device=DEVICE)
    want = s4d_conv(u, log_a, b, c, c_reverse=c_reverse, lengths=lengths, backend="naive")[0]
    for order in ((0, 1, 2), (1, 0, 2), (2, 0, 1)):
        back = [order.index(k) for k in range(3)]
        strided = u.permute(order).contiguous().permute(back).requires_grad_()
        y = s4d_conv(strided, log_a, b, c, c_reverse=c_reverse, lengths=lengths, backend="triton")[0]
        torch.testing.assert_close(y, want, rtol=1e-5, atol=1e-5)
        cotangent = want.permute(order).contiguous().permute(back)
        (got,) = torch.autograd.grad(y, strided, cotangent)
        plain = u.clone().requires_grad_()
        alone = s4d_conv(plain, log_a, b, c, c_reverse=c_reverse, lengths=lengths, backend="naive")[0]
        torch.testing.assert_close(got, torch.autograd.grad(alone, plain, want)[0], rtol=1e-5, atol=1e-5)


def test_the_past_is_bitwise_independent_of_the_future():
    u = torch.randn(1, 80, 1, device=DEVICE)
    log_a, b, c = torch.complex(-torch.rand(3, 1, 2), torch.randn(3, 1, 2)).to(DEVICE)
    later = torch.cat((u[:, :50], u[:, 50:] + 1e3), 1)
    want, got = (s4d_conv(t, log_a, b, c, backend="triton")[0] for t in (u, later))
    assert torch.equal(got[:, :50], want[:, :50])
    assert not torch.equal(got[:, 50:], want[:, 50:])


def test_no_tokens():
    state = torch.randn(2, 3, 2, 2, device=DEVICE)
    tables = torch.zeros(3, 3, 2, dtype=torch.complex64, device=DEVICE)
    y, last = s4d_conv(torch.zeros(2, 0, 3, device=DEVICE), *tables, state=state, output_state=True, backend="triton")
    assert y.shape == (2, 0, 3)
    assert torch.equal(last, state)


def test_the_operators_keep_torchs_rules():
    x, block, write, read, decay, start = (
        torch.randn(shape, device=DEVICE).requires_grad_()
        for shape in ((1, 40, 1), (1, 32, 32), (1, 32, 2), (1, 2, 32), (1, 1, 2), (1, 1, 1, 2))
    )
    last = torch.tensor([1], device=DEVICE)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(fused._forward, (x, block, write, read, decay, start, last, False, True), test_utils=checks)
    with torch.no_grad():
        y, wanted, kept = fused._forward(x, block, write, read, decay, start, last, False, True)
    arguments = (y, wanted, x, block, write, read, decay, kept, last, False)
    torch.library.opcheck(fused._backward, [t.detach() if torch.is_tensor(t) else t for t in arguments],
                          test_utils=("test_schema", "test_faketensor"))  # fmt: skip


@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")
def test_compiles_as_one_graph():
    u = torch.randn(1, 40, 1, device=DEVICE)
    log_a, b, c = torch.complex(-torch.rand(3, 1, 2), torch.randn(3, 1, 2)).to(DEVICE)
    u.requires_grad_()

    def run(u):
        return s4d_conv(u, log_a, b, c, backend="triton", output_state=True)

    got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(u), run(u)
    for found, expected in zip(got, want, strict=True):
        assert torch.equal(found, expected)
    gradients = [torch.autograd.grad(y.square().sum() + last.sum(), u)[0] for y, last in (got, want)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


def test_a_plan_covers_the_sequence_and_fills_a_gpu():
    for batch, length, dim in ((1, 65536, 256), (8, 4096, 4096), (1, 5, 3), (2, 2049, 100)):
        launch = fused.plan(batch, length, dim)
        assert launch.piece % (launch.rows * fused.CHUNK) == 0
        assert (launch.number - 1) * launch.piece < length <= launch.number * launch.piece
        if length >= 4096:
            assert batch * dim * launch.number >= fused.PROGRAMS // 2


def test_what_it_cannot_do_is_refused(monkeypatch):
    u, tables = torch.zeros(1, 9, 3, device=DEVICE), torch.zeros(3, 3, 65, dtype=torch.complex64, device=DEVICE)
    with pytest.raises(ValueError, match="takes states sizes up to 64, not 65; backends that can: chunked"):
        s4d_conv(u, *tables, backend="triton")
    with pytest.raises(ValueError, match=r"'triton' does not take torch.float64"):
        s4d_conv(u.double(), *tables[:, :, :2], backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend='triton' does not run on cpu"):
        s4d_conv(u.cpu(), *tables[:, :, :2].cpu(), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("both", [False, True])
@pytest.mark.parametrize("shape", [(2, 4096, 256, 32), (1, 2049, 100, 3), (3, 4000, 33, 64), (16, 96, 512, 32)])
def test_real_shapes_on_a_gpu(shape, both, dtype):
    lengths = [shape[1] - 37 * row for row in range(shape[0])] if shape[0] < 10 else None
    compare(shape, dtype, device="cuda", backend="chunked", both=both, lengths=lengths)
