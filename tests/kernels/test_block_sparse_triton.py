"""Block-sparse attention in Triton: interpreted on tiny shapes here, and on a GPU on real ones."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from seqzoo.kernels.block_sparse import block_sparse_attention
from seqzoo.kernels.block_sparse.fused_tiles import sorted_pairs

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here: see the tests marked gpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}


def draw(
    length,
    source,
    q_block,
    k_block,
    *,
    slots=2,
    routing_heads=1,
    heads=2,
    key=20,
    value=12,
    dtype=torch.float32,
    weighted=False,
    placed=False,
    masked=False,
    batch=2,
    device="cpu",
    seed=0,
):
    """Leaves (q, k, v and perhaps weights) and the other arguments, in which some of the choices are -1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype).requires_grad_()

    blocks = -(-source // k_block)
    shape = batch, routing_heads, -(-length // q_block), blocks
    index = torch.rand(shape, generator=generator).argsort(-1)[..., : min(slots, blocks)]
    index = torch.where(torch.rand(index.shape, generator=generator) < 0.1, -1, index)
    leaves = [normal(batch, length, heads, key), normal(batch, source, heads, key), normal(batch, source, heads, value)]
    if weighted:
        leaves.append(torch.rand(index.shape, generator=generator).to(device).requires_grad_())
    place = torch.randint(source, (batch, length), generator=generator)
    seen = torch.rand(batch, source, generator=generator) > 0.2
    options = {
        "index": index.to(device),
        "q_block": q_block,
        "k_block": k_block,
        "q_position": place.to(device) if placed else None,
        "key_mask": seen.to(device) if masked else None,
    }
    return leaves, options


def results(leaves, options, backend, cotangent):
    weight = leaves[3] if len(leaves) > 3 else None
    o = block_sparse_attention(*leaves[:3], weight=weight, backend=backend, **options)
    return o, *torch.autograd.grad((o * cotangent.to(o)).sum(), leaves, materialize_grads=True)


def equals_naive(leaves, options):
    dtype, shape = leaves[0].dtype, (*leaves[0].shape[:3], leaves[2].shape[3])
    cotangent = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(leaves[0])
    got = results(leaves, options, "triton", cotangent)
    exact = [t.detach().double().requires_grad_() for t in leaves]
    want = results(exact, options, "naive", cotangent)
    for a, b in zip(got, want, strict=True):
        bound = TOLERANCE[dtype] * max(1.0, b.abs().max().item())
        torch.testing.assert_close(a.double(), b, atol=bound, rtol=0)


# L, S, q_block, k_block: blocks with partial last ones, blocks of whole tiles, single queries fewer than a tile,
# enough to be sorted
SHAPES = [(11, 21, 4, 8), (34, 40, 17, 17), (130, 40, 64, 10), (3, 9, 1, 4), (33, 23, 1, 10)]


@interpreted
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_formula(shape, everything):
    heads = {"routing_heads": 2 if everything else 1, "batch": 1}
    equals_naive(*draw(*shape, weighted=everything, placed=everything, masked=everything, **heads))


@interpreted
@pytest.mark.parametrize("shape", [(20, 20, 10, 10), (32, 32, 1, 32)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(shape, dtype):
    equals_naive(*draw(*shape, dtype=dtype, key=16, value=16, batch=1, weighted=True))


@interpreted
@pytest.mark.parametrize("length", [8, 34])
def test_any_stride(length):
    leaves, options = draw(length, 12, 1, 6, batch=1)
    strided = [torch.stack((t, t), -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0].detach() for t in leaves]
    assert not any(t.is_contiguous() for t in strided)
    equals_naive([t.requires_grad_() for t in strided], options)


@interpreted
def test_the_past_keeps_its_bits_whatever_later_queries_choose():
    length, cut = 40, 21
    leaves, options = draw(length, length, 1, 8, slots=3, batch=1)
    others, more = draw(length, length, 1, 8, slots=3, batch=1, seed=1)
    options["q_position"] = more["q_position"] = torch.arange(length).expand(1, -1)
    more["index"] = torch.cat((options["index"][:, :, :cut], more["index"][:, :, cut:]), 2)
    mixed = [torch.cat((a[:, :cut], 1e3 * b[:, cut:]), 1) for a, b in zip(leaves, others, strict=True)]
    want = block_sparse_attention(*leaves, backend="triton", **options)
    got = block_sparse_attention(*mixed, backend="triton", **more)
    assert torch.equal(got[:, :cut], want[:, :cut])
    assert not torch.equal(got[:, cut:], want[:, cut:])


@interpreted
@pytest.mark.parametrize("length", [1, 33])
def test_a_query_that_sees_nothing_gives_zero(length):
    leaves, options = draw(length, 12, 1, 4, batch=1, weighted=True)
    options["index"][:, :, 0] = -1
    o = block_sparse_attention(*leaves[:3], weight=leaves[3], backend="triton", **options)
    assert (o[:, 0] == 0).all()
    grads = torch.autograd.grad(1e3 * o[:, 0].sum() + 0 * o.sum(), leaves)
    assert all(bool((g == 0).all()) for g in grads)


@interpreted
def test_compiles_into_one_graph():
    leaves, options = draw(33, 12, 1, 6, batch=1)

    def run(q, k, v):
        return block_sparse_attention(q, k, v, backend="triton", **options)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves)
    expected = run(*leaves)
    torch.testing.assert_close(compiled, expected, atol=0, rtol=0)
    grads = (torch.autograd.grad(o.square().sum(), leaves) for o in (compiled, expected))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("alike", [False, True])
def test_sorted_pairs_by_hand(alike):
    """Every choice once, and for each slot tiles that hold each query once, all with one block."""
    groups, slots, blocks, rows = 40, 3, 5, 16
    index = torch.randint(-1, blocks, (2, 1, groups, slots), generator=torch.Generator().manual_seed(0))
    index = torch.full_like(index, 2) if alike else index
    pairs = sorted_pairs(index, blocks, rows)
    for n, chosen in enumerate(index.flatten(0, 1).tolist()):
        by_block = [[[g for g in range(groups) if chosen[g][t] == r] for t in range(slots)] for r in [*range(5), -1]]
        assert pairs.order[n].tolist() == [g * slots + t for r in by_block for t, held in enumerate(r) for g in held]
        assert pairs.starts[n].diff().tolist() == [len(held) for r in by_block for held in r]
        for t in range(slots):
            tiles = []
            for block, first in zip(pairs.tile_block[n, t].tolist(), pairs.tile_first[n, t].tolist(), strict=True):
                if block <= blocks:
                    last = min(first + rows, int(pairs.starts[n, block * slots + t + 1]))
                    assert last > first
                    tiles += [(block, pair // slots, pair % slots) for pair in pairs.order[n, first:last].tolist()]
            assert sorted(tiles) == sorted((chosen[g][t] % (blocks + 1), g, t) for g in range(groups))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"dtype": torch.float64}, "does not take torch.float64"), ({"key": 257}, "takes key sizes up to 256, not 257")],
)
def test_what_it_cannot_do_is_refused(change, message):
    leaves, options = draw(4, 4, 1, 4, **change)
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(*leaves, backend="triton", **options)


def test_needs_a_gpu_or_the_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    leaves, options = draw(4, 4, 1, 4)
    with pytest.raises(ValueError, match="backend='triton' does not run on cpu; backends that can: chunked, naive"):
        block_sparse_attention(*leaves, backend="triton", **options)


GPU_SHAPES = [(2048, 2048, 256, 256), (2100, 1999, 49, 70), (4096, 4096, 1, 64), (2500, 2100, 1, 49), (1, 3000, 1, 64)]


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", GPU_SHAPES)
def test_equals_the_formula_on_a_gpu(shape, dtype, everything):
    flags = dict.fromkeys(("weighted", "placed", "masked"), everything)
    sizes = {"routing_heads": 2 if everything else 1, "key": 64, "value": 128, "slots": 4}
    equals_naive(*draw(*shape, dtype=dtype, device="cuda", **sizes, **flags))


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("q_block", [1, 128])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("key", "value"), [(16, 16), (33, 60), (96, 80), (128, 128), (250, 256), (256, 64)])
def test_head_sizes_on_a_gpu(key, value, dtype, q_block):
    equals_naive(*draw(1000, 1000, q_block, 64, dtype=dtype, key=key, value=value, slots=4, device="cuda"))


@gpu
@pytest.mark.gpu
def test_the_same_bits_twice_on_a_gpu():
    leaves, options = draw(2048, 2048, 1, 64, slots=6, dtype=torch.bfloat16, device="cuda", weighted=True)
    cotangent = torch.randn(*leaves[0].shape[:3], 12)
    first, second = (results(leaves, options, "auto", cotangent) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
