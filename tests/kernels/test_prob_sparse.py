"""ProbSparse attention against NumPy, dense softmax and transformers, and what it allocates."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.kernels.prob_sparse import prob_sparse_attention
from seqzoo.kernels.prob_sparse.sampling import KeySample, budget, budgets

torch.set_num_threads(1)
BACKENDS = ("naive", "chunked")


def draw(batch, length, source=None, heads=2, width=4, value=3, dtype=torch.float64, seed=0, grad=False):
    generator = torch.Generator().manual_seed(seed)
    source = length if source is None else source
    shapes = ((batch, length, heads, width), (batch, source, heads, width), (batch, source, heads, value))
    return [torch.randn(s, generator=generator, dtype=dtype).requires_grad_(grad) for s in shapes]


def dense(q, k, v, masked=False):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if masked:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
    return (scores.softmax(-1) @ v).transpose(1, 2)


def in_numpy(q, k, v, index, factor, divisor, masked, lazy):
    """The published procedure, one query at a time."""
    q, k, v = (t.detach().numpy() for t in (q, k, v))
    (batch, length, heads, width), source = q.shape, k.shape[1]
    kept = min(factor * math.ceil(math.log(length)), length)
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for b in range(batch):
        for h in range(heads):
            measure = np.zeros(length)
            for i in range(length):
                sampled = np.array([q[b, i, h] @ k[b, j, h] for j in index[i]])
                measure[i] = sampled.max() - sampled.sum() / (source if divisor == "keys" else len(sampled))
            active = set(np.argsort(-measure)[:kept])
            for i in range(length):
                seen = i + 1 if masked else source
                if i in active:
                    score = k[b, :seen, h] @ q[b, i, h] / math.sqrt(width)
                    weight = np.exp(score - score.max())
                    out[b, i, h] = weight / weight.sum() @ v[b, :seen, h]
                else:
                    total = v[b, :seen, h].sum(0)
                    out[b, i, h] = total if masked and lazy == "sum" else total / seen
    return torch.from_numpy(out)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked, lazy", [(False, "sum"), (True, "sum"), (True, "mean")])
@pytest.mark.parametrize("divisor", ["keys", "samples"])
def test_a_fixed_sample_gives_the_published_procedure(backend, masked, lazy, divisor):
    q, k, v = draw(2, 33, None if masked else 41)
    index = torch.randint(0, k.shape[1], (33, 8), generator=torch.Generator().manual_seed(1))
    y = prob_sparse_attention(
        q,
        k,
        v,
        factor=2,
        measure_divisor=divisor,
        masked=masked,
        lazy=lazy,
        sample_index=index,
        backend=backend,
    )
    torch.testing.assert_close(y, in_numpy(q, k, v, index.numpy(), 2, divisor, masked, lazy), atol=1e-12, rtol=0)


def test_the_two_divisors_choose_different_queries():
    q, k, v = draw(2, 64)
    first, second = (
        prob_sparse_attention(q, k + 2, v, factor=1, measure_divisor=d, seed=0) for d in ("keys", "samples")
    )
    assert not torch.equal(first, second)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampling", ["query", "block"])
@pytest.mark.parametrize("masked", [False, True])
def test_all_queries_kept_is_dense_attention(backend, sampling, masked):
    q, k, v = draw(2, 150, grad=True)
    y = prob_sparse_attention(q, k, v, factor=50, masked=masked, sampling=sampling, seed=0, backend=backend)
    reference = dense(q, k, v, masked)
    torch.testing.assert_close(y, reference, atol=1e-12, rtol=0)
    cotangent = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(2))
    ours, theirs = (torch.autograd.grad((t * cotangent).sum(), (q, k, v)) for t in (y, reference))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=0)


@pytest.mark.parametrize("masked, lazy", [(False, "sum"), (True, "sum"), (True, "mean")])
def test_lazy_rows(masked, lazy):
    q, k, v = draw(3, 60)
    y = prob_sparse_attention(q, k, v, factor=1, masked=masked, lazy=lazy, seed=0)
    expected = v.cumsum(1) if masked else v.mean(1, keepdim=True).expand_as(v)
    if masked and lazy == "mean":
        expected = expected / torch.arange(1, 61).view(-1, 1, 1)
    lazy_rows = (y - expected).abs().amax(-1) < 1e-12
    kept = budget(60, 1)
    # Position 0 of the cumulative mean equals its softmax, so one row more may agree.
    assert ((lazy_rows.sum(1) >= 60 - kept) & (lazy_rows.sum(1) <= 61 - kept)).all()


@pytest.mark.parametrize("sampling", ["query", "block"])
@pytest.mark.parametrize("divisor", ["keys", "samples"])
@pytest.mark.parametrize("masked, lazy", [(False, "sum"), (True, "sum"), (True, "mean")])
@pytest.mark.parametrize("padded", [False, True])
def test_backends_agree_with_gradients(sampling, divisor, masked, lazy, padded):
    q, k, v = draw(2, 290, grad=True)
    mask = None
    if padded:
        mask = torch.ones(2, 290, dtype=torch.bool)
        mask[0, 200:] = False
        mask[1, :37] = mask[1, 50:60] = False
    results = []
    cotangent = torch.randn(v.shape, dtype=v.dtype, generator=torch.Generator().manual_seed(2))
    for backend in BACKENDS:
        y = prob_sparse_attention(
            q, k, v, factor=2, measure_divisor=divisor, key_mask=mask, query_mask=mask, masked=masked,
            lazy=lazy, sampling=sampling, seed=1, backend=backend,
        )  # fmt: skip
        results.append((y, *torch.autograd.grad((y * cotangent).sum(), (q, k, v))))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sampling", ["query", "block"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("side", ["left", "right"])
def test_pads_are_as_if_absent(backend, sampling, masked, side):
    q, k, v = draw(2, 300)
    real = slice(170, None) if side == "left" else slice(0, 130)
    mask = torch.zeros(2, 300, dtype=torch.bool)
    mask[:, real] = True
    options = {"factor": 1, "masked": masked, "sampling": sampling, "seed": 4, "backend": backend}
    y = prob_sparse_attention(q, k, v, key_mask=mask, query_mask=mask, **options)
    alone = prob_sparse_attention(q[:, real], k[:, real], v[:, real], **options)
    torch.testing.assert_close(y[:, real], alone, atol=1e-12, rtol=0)
    assert (y[~mask] == 0).all()
    assert not torch.equal(alone, dense(q[:, real], k[:, real], v[:, real], masked))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("masked", [False, True])
def test_a_row_without_keys_is_zero_and_has_finite_gradients(backend, masked):
    q, k, v = draw(2, 12, grad=True)
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0] = False
    y = prob_sparse_attention(q, k, v, key_mask=mask, masked=masked, seed=0, backend=backend)
    assert (y[0] == 0).all() and (y[1] != 0).any()
    assert all(g.isfinite().all() for g in torch.autograd.grad(y.square().sum(), (q, k, v)))


@pytest.mark.parametrize("length", [1, 2, 3])
def test_short_sequences(length):
    q, k, v = draw(2, length)
    torch.testing.assert_close(prob_sparse_attention(q, k, v), dense(q, k, v), atol=1e-12, rtol=0)


def test_gradcheck_with_lazy_rows():
    q, k, v = draw(1, 9, heads=1, width=2, value=2, grad=True)
    assert torch.autograd.gradcheck(lambda *t: prob_sparse_attention(*t, factor=1, seed=0), (q, k, v))


def test_the_sample_is_uniform_reproducible_and_its_own_for_each_query():
    keys = torch.tensor([37])
    seed = torch.tensor(5)
    sample = KeySample(seed, None, 64, 16)
    ranks, _ = sample.rows(0, 2000, keys)
    counts = torch.bincount(ranks.flatten(), minlength=37)
    expected = 2000 * 64 / 37
    assert len(counts) == 37 and ((counts - expected) ** 2 / expected).sum() < 70  # chi-square, 36 degrees: p = 6e-4
    assert not torch.equal(ranks[0, 0], ranks[0, 1])
    torch.testing.assert_close(sample.rows(500, 700, keys)[0], ranks[:, 500:700])
    assert not torch.equal(KeySample(torch.tensor(6), None, 64, 16).rows(0, 9, keys)[0], ranks[:, :9])
    # A row with fewer keys uses fewer columns of the same sample.
    wide, used = KeySample(seed, None, budget(1000, 5), 5).rows(0, 3, torch.tensor([1000, 30]))
    assert used.sum(2)[:, 0].tolist() == [budget(1000, 5), budget(30, 5)] and wide[1].max() < 30


def test_budgets_follow_the_published_formula():
    lengths = torch.arange(0, 3000)
    assert budgets(lengths, 5).tolist() == [budget(n, 5) for n in range(3000)]
    assert [budget(n, 5) for n in (0, 1, 2, 15, 16, 96, 720)] == [0, 1, 2, 15, 15, 25, 35]


def test_generator_and_seed():
    q, k, v = draw(1, 200)

    def run(**options):
        return prob_sparse_attention(q, k, v, factor=1, **options)

    torch.testing.assert_close(
        run(generator=torch.Generator().manual_seed(3)), run(generator=torch.Generator().manual_seed(3))
    )
    assert not torch.equal(
        run(generator=torch.Generator().manual_seed(3)), run(generator=torch.Generator().manual_seed(4))
    )
    assert torch.equal(run(seed=7), run(seed=torch.tensor(7)))
    generator = torch.Generator().manual_seed(3)
    assert not torch.equal(run(generator=generator), run(generator=generator))


class Largest(TorchDispatchMode):
    """The most elements any tensor has, views included."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("sampling", ["query", "block"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_nothing_of_size_l_by_l(sampling, masked, padded):
    length, heads = 4096, 2
    q, k, v = draw(1, length, heads=heads, width=8, value=8, dtype=torch.float32, grad=True)
    mask = torch.ones(1, length, dtype=torch.bool) if padded else None
    with Largest() as seen:
        y = prob_sparse_attention(q, k, v, sampling=sampling, masked=masked, key_mask=mask, query_mask=mask, seed=0)
        y.sum().backward()
    gathered = 1 << 19  # the fixed bound of what the per-query form gathers at a time
    assert seen.elements <= max(1.25 * heads * length * budget(length, 5), gathered) < length * length / 8
    with Largest() as seen:
        prob_sparse_attention(q, k, v, seed=0, backend="naive")
    assert seen.elements >= length * length  # the recorder does see a quadratic form


@pytest.mark.parametrize("length", [24, 40])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("factor", [50, 2])
def test_transformers_informer(length, masked, factor, monkeypatch):
    """Theirs shares a sample of S keys among all queries; given that sample, ours agrees, lazy rows included.

    The lengths are those at which ceil(ln L), ours, equals ceil(ln(1 + L)), theirs.
    """
    # `python -m pytest` puts the working folder on the path: transformers takes our kernels/ for a package.
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != Path.cwd()])
    modeling = pytest.importorskip("transformers.models.informer.modeling_informer")
    torch.manual_seed(0)
    theirs = modeling.InformerProbSparseAttention(16, 2, is_decoder=masked, sampling_factor=factor)
    theirs = theirs.eval().double()
    x = torch.randn(3, length, 16, dtype=torch.float64)
    shared = torch.randint(0, length, (length,), generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: shared)
    bias = torch.full((length, length), -torch.inf, dtype=torch.float64).triu(1).expand(3, 1, -1, -1)
    expected = theirs(x, attention_mask=bias if masked else None)[0]
    monkeypatch.undo()
    q, k, v = (p(x).unflatten(-1, (2, 8)) for p in (theirs.q_proj, theirs.k_proj, theirs.v_proj))
    # Theirs scales the queries before the measure, which does not change who is selected.
    y = prob_sparse_attention(
        q, k, v, factor=factor, masked=masked, sample_index=shared.expand(length, -1).contiguous()
    )
    tolerance = 1e-5 if masked else 1e-12  # theirs accumulates V in fp32
    torch.testing.assert_close(theirs.out_proj(y.flatten(2)), expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"factor": 0}, "factor=0"),
        ({"measure_divisor": "key"}, "measure_divisor='key'"),
        ({"sampling": "queries"}, "sampling='queries'"),
        ({"lazy": "max"}, "lazy='max'"),
        ({"backend": "cuda"}, "backend='cuda'"),
        ({"masked": True}, "L=6 and S=7"),
        ({"key_mask": torch.ones(1, 6, dtype=torch.bool)}, "key_mask"),
        ({"query_mask": torch.ones(1, 6)}, "query_mask"),
        ({"sample_index": torch.zeros(7, 2, dtype=torch.int64)}, "sample_index"),
        ({"sample_index": torch.full((6, 2), 7)}, r"\[0, 7\)"),
    ],
)
def test_bad_arguments(options, message):
    q, k, v = draw(1, 6, 7)
    with pytest.raises(ValueError, match=message):
        prob_sparse_attention(q, k, v, **options)


def test_mismatched_shapes():
    q, k, v = draw(1, 6, 7)
    with pytest.raises(ValueError, match="do not go together"):
        prob_sparse_attention(q, k, v[:, :5])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shared", [True, False])
def test_products_at_sampled_places(monkeypatch, dtype, shared):
    """The CPU's operator, a few queries at a time, with keys drawn twice and keys that do not count."""
    from seqzoo.kernels.prob_sparse import sampled

    monkeypatch.setattr(sampled, "_ROWS", 4)
    q, k = torch.randn(2, 11, 3, 5).to(dtype), torch.randn(2, 9, 3, 5).to(dtype)
    place = torch.randint(0, 9, (1 if shared else 2, 11, 6), dtype=torch.int32)
    valid = torch.rand(place.shape) < 0.6
    valid[..., 0] = True
    drawn = torch.stack([row[at] for row, at in zip(k, place.long().expand(2, -1, -1), strict=True)])
    s = torch.einsum("blhk,bluhk->blhu", *(t.to(torch.promote_types(dtype, torch.float32)) for t in (q, drawn)))
    real = valid.unsqueeze(2)
    for mask, seen in ((None, torch.ones_like(real)), (valid, real)):
        most, total = sampled.sampled_extent(q, k, place, mask, 6)
        tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype != torch.float64 else {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(most, s.masked_fill(~seen, -torch.inf).amax(3), **tolerance)
        torch.testing.assert_close(total, s.masked_fill(~seen, 0).sum(3), **tolerance)
    torch.library.opcheck(torch.ops.seqzoo.prob_sparse_sampled.default, (q, k, place, valid, 6))
