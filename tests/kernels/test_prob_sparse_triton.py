"""ProbSparse attention with its measure in Triton: interpreted on tiny shapes here, and on a GPU on real ones."""

import itertools

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from seqzoo.kernels.prob_sparse import KeySample, budget, prob_sparse_attention
from seqzoo.kernels.prob_sparse.chunked import _measure, _order
from seqzoo.kernels.prob_sparse.fused import fused_measure

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here: see the tests marked gpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def draw(length, source, *, heads=2, key=20, value=6, batch=2, dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = ((batch, length, heads, key), (batch, source, heads, key), (batch, source, heads, value))
    return [torch.randn(s, generator=generator).to(device, dtype).requires_grad_() for s in shapes]


def padded(source, batch=2):
    mask = torch.rand(batch, source, generator=torch.Generator().manual_seed(1)) > 0.4
    mask[0] = True
    return mask


def check_measure(q, k, mask, block, divide_by_keys, index=None, factor=2):
    order, count = _order(mask)
    source = k.shape[1]
    keys = torch.full((1,), source, device=q.device) if count is None else count
    width = budget(source, factor) if index is None else index.shape[1]
    sample = KeySample(torch.tensor(77, device=q.device), index, width, factor)
    got = fused_measure(q, k, order, keys, sample, divide_by_keys, block)
    want = _measure(q.double(), k.double(), order, keys, sample, divide_by_keys, block)
    assert got.dtype == torch.float32
    # Products of low-precision inputs are exact in float32.
    torch.testing.assert_close(got.double(), want, atol=1e-5 * max(1.0, want.abs().max().item()), rtol=0)


@interpreted
@pytest.mark.parametrize("block", [1, 128])
@pytest.mark.parametrize("masked", [False, True])
def test_measure_equals_the_gathered_one(masked, block):
    """The hash must agree bit by bit: another key gives another score."""
    q, k, _ = (t.detach() for t in draw(133, 41))
    for divide_by_keys in (False, True):
        check_measure(q[:, : 133 if block > 1 else 21], k, padded(41) if masked else None, block, divide_by_keys)


@interpreted
@pytest.mark.parametrize("block", [1, 128])
def test_measure_with_a_given_sample_and_strides(block):
    q, k, _ = (t.detach() for t in draw(19, 23, key=3))
    q, k = (torch.stack((t, t), -1)[..., 0] for t in (q, k))
    assert not q.is_contiguous()
    index = torch.randint(23, (19 if block == 1 else 1, 5), generator=torch.Generator().manual_seed(2))
    check_measure(q, k, padded(23), block, True, index)


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 128])
def test_measure_of_low_precision(block, dtype):
    q, k, _ = (t.detach() for t in draw(20, 23, key=16, batch=1, dtype=dtype))
    check_measure(q, k, None, block, True)


def compared(tensors, backend, **options):
    o = prob_sparse_attention(*tensors, factor=1, seed=3, backend=backend, **options)
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(9)).to(o)
    return o, *torch.autograd.grad((o * cotangent).sum(), tensors)


@interpreted
@pytest.mark.parametrize("sampling", ["query", "block"])
def test_attention_equals_the_formula(sampling):
    tensors, mask = draw(25, 25, batch=2), padded(25)
    for masked, pads in itertools.product((False, True), (None, mask)):
        options = {"sampling": sampling, "masked": masked, "key_mask": pads, "query_mask": pads}
        got = compared(tensors, "triton", **options)
        exact = [t.detach().double().requires_grad_() for t in tensors]
        for a, b in zip(got, compared(exact, "naive", **options), strict=True):
            torch.testing.assert_close(a.double(), b, atol=1e-5, rtol=1e-5)


@interpreted
def test_a_row_without_keys_is_zero():
    mask = torch.tensor([[False] * 9, [True] * 9])
    o = prob_sparse_attention(*draw(9, 9), key_mask=mask, factor=1, seed=0, backend="triton")
    assert (o[0] == 0).all() and (o[1] != 0).any()


@interpreted
def test_compiles_into_one_graph():
    tensors = [t.detach() for t in draw(12, 12, batch=1)]
    seed = torch.tensor(3)

    def run(q, k, v):
        return prob_sparse_attention(q, k, v, factor=1, seed=seed, backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), run(*tensors), atol=0, rtol=0)


def test_what_it_cannot_do_is_refused(monkeypatch):
    with pytest.raises(ValueError, match="takes key sizes up to 256, not 257"):
        prob_sparse_attention(*draw(4, 4, key=257), backend="triton")
    with pytest.raises(ValueError, match="does not take"):
        prob_sparse_attention(*draw(4, 4, dtype=torch.float64), backend="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    with pytest.raises(ValueError, match="backend='triton' does not run on cpu; backends that can: chunked, naive"):
        prob_sparse_attention(*draw(4, 4), backend="triton")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block", [1, 128])
@pytest.mark.parametrize(
    ("length", "source", "key"), [(2048, 2048, 64), (2100, 4001, 33), (3000, 2500, 128), (500, 500, 256)]
)
def test_measure_on_a_gpu(length, source, key, block, dtype):
    q, k, _ = (t.detach() for t in draw(length, source, key=key, dtype=dtype, device="cuda"))
    for mask in (None, padded(source).cuda()):
        check_measure(q, k, mask, block, True, factor=5)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("sampling", ["query", "block"])
def test_attention_on_a_gpu(sampling):
    tensors = draw(2100, 2100, key=64, device="cuda")
    exact = [t.detach().double().requires_grad_() for t in tensors]
    got, want = compared(tensors, "auto", sampling=sampling), compared(exact, "chunked", sampling=sampling)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, atol=1e-5 * max(1.0, b.abs().max().item()), rtol=0)
