"""The selective scan in Triton: interpreted on tiny shapes against the oracle; on a GPU, real ones."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from seqzoo.kernels.selective_scan import fused, selective_scan

INTERPRETED = not torch.cuda.is_available()
DEVICE = "cpu" if INTERPRETED else "cuda"
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def inputs(batch, length, channels, states, dtype=torch.float32):
    """u, dt > 0, a < 0, b, c, skip and an initial state, in the dtype but in double precision."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype).double()

    step = torch.nn.functional.softplus(draw(batch, length, channels)).to(dtype).double()
    tokens = [draw(batch, length, channels), step, -draw(channels, states).exp().to(dtype).double()]
    tokens += [draw(batch, length, states), draw(batch, length, states), draw(channels)]
    return [*tokens, draw(batch, channels, states)]


def gradients(tensors, dtype, device, *, plain=False, **options):
    """y, the last state and the gradients of random weights on both; plain: no skip and no initial state."""
    tensors = [t.to(device, dtype).requires_grad_() for t in tensors]
    *scan, skip, initial = tensors
    extra = {} if plain else {"skip": skip, "initial_state": initial}
    y, h = selective_scan(*scan, return_state=True, **extra, **options)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t) for t in (y, h)]
    loss = (y * weights[0]).sum() + (h * weights[1]).sum()
    wanted = scan if plain else tensors
    return [y, h, *torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)]


def compare(tensors, dtype, tolerance=None, *, device=DEVICE, backend="naive", **options):
    got = gradients(tensors, dtype, device, backend="triton", **options)
    want = gradients(tensors, torch.float64, "cpu" if backend == "naive" else device, backend=backend, **options)
    assert got[0].dtype == dtype
    assert got[1].dtype == torch.float32
    for found, expected in zip(got, want, strict=True):
        error = (found.double().cpu() - expected.cpu()).abs().max().item()
        scale = max(1.0, expected.abs().max().item())
        assert error <= (tolerance or TOLERANCE[dtype]) * scale, f"error {error:.2e} of {scale:.2e}"


@pytest.fixture
def short_chunks(monkeypatch):
    """Chunks of 16 tokens, so that a few tokens are several chunks."""
    monkeypatch.setattr(
        fused, "forward_launch", lambda *shape: fused.Launch(fused.width_of(shape[3]), 8, 16, -(-shape[1] // 16))
    )
    launch = fused.backward_launch
    monkeypatch.setattr(
        fused,
        "backward_launch",
        lambda *shape: (launch(*shape)[0]._replace(tile=4, chunk=16, number=-(-shape[1] // 16)), 2),
    )


@pytest.mark.parametrize(("length", "channels", "states"), [(1, 3, 1), (19, 5, 3), (16, 20, 16)])
def test_outputs_and_gradients_of_one_chunk(length, channels, states):
    compare(inputs(2 if length == 1 else 1, length, channels, states), torch.float32)


def test_outputs_and_gradients_of_several_chunks_and_tiles(short_chunks):
    """Two rows of two chunks, the last a token long; two groups of channels, the first of two tiles."""
    compare(inputs(2, 17, 9, 4), torch.float32)


def test_without_skip_and_initial_state():
    compare(inputs(1, 3, 4, 4), torch.float32, plain=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    compare(inputs(1, 5, 4, 4, dtype), dtype)


def test_lengths_and_strides():
    """Beyond a row's length the state stays; a transposed input gives what a contiguous one does."""
    tensors = [t.to(DEVICE, torch.float32) for t in inputs(3, 9, 4, 4)]
    lengths = torch.tensor([9, 4, 0], device=DEVICE)
    strided = [t.mT.contiguous().mT if t.dim() == 3 else t for t in tensors[:5]]
    extra = {"lengths": lengths, "initial_state": tensors[6], "return_state": True}
    y, h = selective_scan(*strided, backend="triton", **extra)
    for row, n in enumerate(lengths.tolist()):
        alone = [t if t is tensors[2] else t[row : row + 1, :n] for t in tensors[:5]]
        extra = {"initial_state": tensors[6][row : row + 1], "return_state": True}
        want_y, want_h = selective_scan(*alone, backend="naive", **extra)
        torch.testing.assert_close(y[row, :n], want_y[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(h[row], want_h[0], rtol=1e-5, atol=1e-5)


def test_decays_that_underflow_do_no_harm():
    u, dt, a, b, c, skip, initial = inputs(1, 5, 3, 4)
    compare([u, torch.full_like(dt, 1e3), a - 1, b, c, skip, initial], torch.float32)


def test_the_past_is_bitwise_independent_of_the_future():
    u, dt, a, b, c, _, _ = (t.to(DEVICE, torch.float32) for t in inputs(1, 12, 4, 4))
    want, _ = selective_scan(u, dt, a, b, c, backend="triton")
    for cut in (5, 9):  # within a group of tokens and beyond the last whole one
        changed = [torch.cat([t[:, :cut], t[:, cut:] + 1e3], 1) for t in (u, dt, b, c)]
        got, _ = selective_scan(*changed[:2], a, *changed[2:], backend="triton")
        assert torch.equal(got[:, :cut], want[:, :cut])
        assert not torch.equal(got[:, cut:], want[:, cut:])


def test_empty_sequences_keep_the_state():
    u, dt, a, b, c, skip, initial = (t.to(DEVICE, torch.float32).requires_grad_() for t in inputs(2, 0, 3, 4))
    y, h = selective_scan(u, dt, a, b, c, skip=skip, initial_state=initial, return_state=True, backend="triton")
    assert y.shape == (2, 0, 3)
    assert torch.equal(h, initial)
    (gradient,) = torch.autograd.grad(h.sum(), initial)
    assert torch.equal(gradient, torch.ones_like(initial))


def test_only_training_keeps_states():
    u, dt, a, b, c, skip, initial = (t.to(DEVICE, torch.float32) for t in inputs(1, 2, 3, 4))
    for save, number in ((False, 0), (True, 1 * 1 * 3 * 4)):
        _, saved, _ = torch.ops.seqzoo.selective_scan_triton(u, dt, a, b, c, skip, initial, save)
        assert saved.numel() == number


def test_a_compiler_sees_one_node():
    u, dt, a, b, c, _, _ = (t.to(DEVICE, torch.float32).requires_grad_() for t in inputs(1, 3, 3, 4))

    def loss(*tensors):
        return selective_scan(*tensors, backend="triton")[0].square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    tensors = (u, dt, a, b, c)
    want = torch.autograd.grad(loss(*tensors), tensors)
    for got, expected in zip(torch.autograd.grad(compiled(*tensors), tensors), want, strict=True):
        assert torch.equal(got, expected)


def test_launches_fill_a_gpu_and_cover_the_sequence():
    for shape in ((1, 4096, 1536, 16), (8, 4096, 4096, 16), (1, 65537, 256, 16), (1, 1, 7, 1), (2, 500, 33, 64)):
        batch, length, channels, states = shape
        backward, tiles = fused.backward_launch(*shape)
        for launch in (fused.forward_launch(*shape), backward):
            assert launch.chunk % fused.KEPT == 0
            assert (launch.number - 1) * launch.chunk < length <= launch.number * launch.chunk
            assert launch.width >= states
            if length >= 4096:
                assert batch * -(-channels // launch.tile) * launch.number >= fused.WARPS // 2
        assert -(-channels // (backward.tile * tiles)) <= max(1, channels // 32)
    assert fused.forward_launch(8, 4096, 4096, 16).number == 1


def test_what_it_cannot_do_is_refused(monkeypatch):
    tensors = inputs(1, 2, 3, 65)[:5]
    with pytest.raises(ValueError, match="takes states sizes up to 64, not 65"):
        selective_scan(*(t.float().to(DEVICE) for t in tensors), backend="triton")
    tensors = [t.to(DEVICE) for t in inputs(1, 2, 3, 4)[:5]]
    with pytest.raises(ValueError, match="does not take torch"):
        selective_scan(*tensors, backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend='triton' does not run on cpu; backends that can"):
        selective_scan(*(t.float().cpu() for t in tensors), backend="triton")


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("batch", "length", "channels", "states"),
    [(1, 2049, 1536, 16), (4, 4096, 2048, 16), (1, 4000, 200, 16), (2, 1000, 65, 5), (1, 500, 128, 64), (3, 17, 7, 1)],
)
def test_real_shapes_on_a_gpu(batch, length, channels, states, dtype):
    compare(inputs(batch, length, channels, states, dtype), dtype, device="cuda", backend="chunked")
