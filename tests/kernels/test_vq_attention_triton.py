"""VQ attention in Triton, forwards: interpreted on tiny shapes here, and on a GPU on real ones."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from seqzoo.kernels.vq_attention import vq_attention

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here: see the tests marked gpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def draw(
    length, chunk, causal, *, codes=5, key=12, value=6, heads=2, batch=2, bias=False, lengths=False,
    source=None, dtype=torch.float32, device="cpu",
):  # fmt: skip
    """Arguments; codebook and codes such that the exact keys are codewords."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    source = source or length
    code = torch.randint(codes, (batch, source, heads), generator=generator).to(device)
    codebook = normal(heads, codes, key)
    k = None if chunk is None else codebook[torch.arange(heads, device=device), code]
    table = normal(heads, 2 * chunk if causal else 4 * chunk - 1) if bias else None
    real = torch.tensor([source // 3, source]).to(device) if lengths else None
    positional = normal(batch, length, heads, key), k, normal(batch, source, heads, value), code, codebook
    options = {"chunk_size": chunk, "causal": causal, "bias": table, "lengths": real, "scale": key**-0.5}
    return positional, options


def equals_naive(positional, options):
    def exact(x):
        return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x

    got, state = vq_attention(*positional, backend="triton", **options)
    backend = "naive" if got.shape[1] < 1000 else "chunked"
    want, _ = vq_attention(
        *map(exact, positional), backend=backend, **{name: exact(value) for name, value in options.items()}
    )
    assert state is None and got.dtype == positional[2].dtype
    real = slice(None) if options["lengths"] is None else slice(1, None)
    bound = TOLERANCE[got.dtype] * max(1.0, want.abs().max().item())
    torch.testing.assert_close(got[real].double(), want[real], atol=bound, rtol=0)
    if options["lengths"] is not None:
        n = min(int(options["lengths"][0]), got.shape[1])
        torch.testing.assert_close(got[0, :n].double(), want[0, :n], atol=bound, rtol=0)


# More blocks than a group of them, with a partial last one; blocks of one; one block.
@interpreted
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize(("length", "chunk", "codes"), [(33, 4, 9), (21, 3, 3), (7, 1, 4), (6, 9, 5)])
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_formula(causal, length, chunk, codes, everything):
    equals_naive(*draw(length, chunk, causal, codes=codes, bias=everything, lengths=everything, heads=1))


@interpreted
@pytest.mark.parametrize("lengths", [False, True])
def test_without_a_window(lengths):
    equals_naive(*draw(9, None, False, source=70, lengths=lengths))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    equals_naive(*draw(20, 5, True, dtype=dtype, key=16, bias=True, batch=1))


@interpreted
def test_any_stride_and_what_lies_behind_the_keys():
    positional, options = draw(14, 4, False, lengths=True)
    strided = [torch.stack((t, t), -1)[..., 0] for t in positional]
    strided[2][0, int(options["lengths"][0]) :] = float("nan")
    strided[1][0, int(options["lengths"][0]) :] = float("nan")
    got = vq_attention(*strided, backend="triton", **options)[0]
    want = vq_attention(*positional, backend="triton", **options)[0]
    assert torch.equal(got, want)


@interpreted
def test_a_row_without_keys_is_zero():
    positional, options = draw(6, 2, False, batch=2)
    options["lengths"] = torch.tensor([0, 6])
    o = vq_attention(*positional, backend="triton", **options)[0]
    assert (o[0] == 0).all() and (o[1] != 0).any()


@interpreted
def test_the_past_keeps_its_bits():
    positional, options = draw(24, 3, True, codes=3, batch=1, heads=1)
    later = [t.clone() for t in positional]
    for t in later[:3]:
        t[:, 13:] *= 1e3
    later[3][:, 13:] = 0
    got, want = (vq_attention(*p, backend="triton", **options)[0] for p in (later, positional))
    assert torch.equal(got[:, :13], want[:, :13]) and not torch.equal(got[:, 13:], want[:, 13:])


@interpreted
def test_compiles_into_one_graph():
    positional, options = draw(8, 3, True, bias=True, batch=1)

    def run(*arguments):
        return vq_attention(*arguments, backend="triton", **options)[0]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*positional), run(*positional), atol=0, rtol=0)


def test_what_it_cannot_do_is_refused():
    positional, options = draw(8, 3, True)
    with pytest.raises(ValueError, match="does not support state; backends that can: chunked, naive"):
        vq_attention(*positional, return_state=True, backend="triton", **options)
    positional[0].requires_grad_()
    with pytest.raises(ValueError, match="does not support gradient; backends that can: chunked, naive"):
        vq_attention(*positional, backend="triton", **options)
    with torch.no_grad():
        vq_attention(*positional, backend="naive", **options)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("length", "chunk", "codes", "key", "value"),
    [(4096, 64, 256, 32, 128), (2100, 50, 300, 65, 60), (2048, 512, 512, 128, 256)],
)
def test_equals_the_formula_on_a_gpu(length, chunk, codes, key, value, causal, dtype, everything):
    sizes = {"codes": codes, "key": key, "value": value}
    equals_naive(*draw(length, chunk, causal, dtype=dtype, bias=everything, lengths=everything, device="cuda", **sizes))


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_without_a_window_on_a_gpu(dtype):
    equals_naive(*draw(1500, None, False, source=4001, codes=512, key=64, value=64, dtype=dtype, device="cuda"))
