"""Block-sparse attention: against SDPA with the expanded mask, and what it reads, keeps and lets through."""

import itertools

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.kernels.block_sparse import block_means, block_sparse_attention, block_sums, chunked, route
from seqzoo.kernels.block_sparse.plan import TILE, plan

torch.set_num_threads(1)
BACKENDS = ("naive", "chunked")
# L, S, q_block, k_block: single queries fewer and more than a tile, partial blocks on either side, one query
SHAPES = [(5, 9, 1, 4), (70, 70, 1, 16), (130, 61, 1, 7), (1, 1, 1, 3), (1, 70, 1, 8), (70, 45, 7, 5), (64, 64, 64, 64)]


def draw(length, source, q_block, k_block, *, routing_heads=1, slots=3, weighted=False, seed=0, heads=2):
    """q, k, v and perhaps weights, all with gradients, and an index with some -1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    blocks = -(-source // k_block)
    shape = 2, routing_heads, -(-length // q_block), blocks
    index = torch.rand(shape, generator=generator).argsort(-1)[..., : min(slots, blocks)]
    index = torch.where(torch.rand(index.shape, generator=generator) < 0.2, -1, index)
    tensors = [normal(2, length, heads, 3), normal(2, source, heads, 3), normal(2, source, heads, 4)]
    if weighted:
        tensors.append(torch.rand(index.shape, generator=generator, dtype=torch.float64).requires_grad_())
    return index, tensors


def by_sdpa(index, tensors, q_block, k_block, q_position=None, key_mask=None, scale=None):
    """Torch's attention under a mask that is written out query by query; weights multiply keys and values."""
    q, k, v = tensors[:3]
    mask = torch.zeros(2, q.shape[2], q.shape[1], k.shape[1], dtype=torch.bool)
    gain = torch.ones(mask.shape, dtype=q.dtype)
    for b, h, i in itertools.product(range(2), range(q.shape[2]), range(q.shape[1])):
        route_head = h if index.shape[1] > 1 else 0
        for slot, block in enumerate(index[b, route_head, i // q_block].tolist()):
            if block >= 0:
                mask[b, h, i, block * k_block : (block + 1) * k_block] = True
                if len(tensors) > 3:
                    gain[b, h, i, block * k_block : (block + 1) * k_block] = tensors[3][
                        b, route_head, i // q_block, slot
                    ]
        if q_position is not None:
            mask[b, h, i, q_position[b, i] + 1 :] = False
    if key_mask is not None:
        mask &= key_mask[:, None, None]
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    seeing = mask.any(-1, keepdim=True)
    if len(tensors) > 3:
        s = (q @ k.transpose(2, 3)) * (q.shape[-1] ** -0.5 if scale is None else scale) * gain
        p = s.masked_fill(~mask, -torch.inf).masked_fill(~seeing, 0).softmax(-1)
        o = (p * gain) @ v
    else:
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask | ~seeing, scale=scale)
    return o.masked_fill(~seeing, 0).transpose(1, 2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("routing_heads", [1, 2])
def test_equals_sdpa_with_the_expanded_mask(shape, routing_heads, backend):
    length, source, q_block, k_block = shape
    generator = torch.Generator().manual_seed(1)
    place = torch.randint(source, (2, length), generator=generator)
    seen = torch.rand(2, source, generator=generator) > 0.3
    for weighted, q_position, key_mask in itertools.product((False, True), (None, place), (None, seen)):
        index, tensors = draw(*shape, routing_heads=routing_heads, weighted=weighted)
        want = by_sdpa(index, tensors, q_block, k_block, q_position, key_mask, scale=0.7)
        got = block_sparse_attention(
            *tensors[:3],
            index,
            q_block=q_block,
            k_block=k_block,
            weight=tensors[3] if weighted else None,
            q_position=q_position,
            key_mask=key_mask,
            scale=0.7,
            backend=backend,
        )
        torch.testing.assert_close(got, want, atol=1e-12, rtol=1e-12)
        cotangent = torch.randn(got.shape, generator=generator, dtype=got.dtype)
        ours = torch.autograd.grad((got * cotangent).sum(), tensors)
        theirs = torch.autograd.grad((want * cotangent).sum(), tensors, materialize_grads=True)
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("q_block", [1, 3])
def test_gradcheck(backend, q_block):
    index, tensors = draw(5, 7, q_block, 2, weighted=True, slots=2)

    def run(q, k, v, weight):
        return block_sparse_attention(q, k, v, index, q_block=q_block, k_block=2, weight=weight, backend=backend)

    assert torch.autograd.gradcheck(run, tensors)


@pytest.mark.parametrize("length", [63, 64, 65, 500])
def test_any_length_any_stride_default_scale(length):
    index, tensors = draw(length, length, 1, 64, slots=4)
    strided = [torch.stack((t, t), -1).transpose(0, 1).contiguous().transpose(0, 1)[..., 0].detach() for t in tensors]
    assert not any(t.is_contiguous() for t in strided)
    got = block_sparse_attention(*strided, index, q_block=1, k_block=64)
    want = block_sparse_attention(*tensors, index, q_block=1, k_block=64, scale=3**-0.5, backend="naive")
    torch.testing.assert_close(got, want.detach(), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("length", [20, 100])
def test_the_past_keeps_its_bits_whatever_later_queries_choose(length):
    """Sorting queries by the block they chose moves them between tiles, but not those before the change."""
    position = torch.arange(length).expand(2, -1)
    index, (q, k, v) = draw(length, length, 1, 8, slots=5)
    want = block_sparse_attention(q, k, v, index, q_block=1, k_block=8, q_position=position)
    for seed, cut in enumerate(range(3, length, 9)):
        other, tensors = draw(length, length, 1, 8, slots=5, seed=seed + 1)
        other = torch.cat((index[:, :, :cut], other[:, :, cut:]), 2)
        q2, k2, v2 = (torch.cat((a[:, :cut], 1e3 * b[:, cut:]), 1) for a, b in zip((q, k, v), tensors, strict=True))
        got = block_sparse_attention(q2, k2, v2, other, q_block=1, k_block=8, q_position=position)
        assert torch.equal(got[:, :cut], want[:, :cut])
        assert not torch.equal(got[:, cut:], want[:, cut:])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 40])
def test_a_query_that_sees_nothing_gives_zero(length, backend):
    index, (q, k, v) = draw(length, 12, 1, 4)
    index[:, :, 0] = -1
    o = block_sparse_attention(q, k, v, index, q_block=1, k_block=4, backend=backend)
    assert (o[:, 0] == 0).all()
    grads = torch.autograd.grad((o[:, :1] * 1e3).sum() + 0 * o.sum(), (q, k, v))
    assert all(bool((g == 0).all()) for g in grads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_and_autocast(dtype):
    """Scores of a few hundred, whose bf16 rounding would move the softmax by a factor."""
    index, tensors = draw(70, 70, 1, 16)
    low = [(4 * t).detach().to(dtype) for t in tensors]
    want = block_sparse_attention(*(t.double() for t in low), index, q_block=1, k_block=16, scale=3.0)
    with torch.autocast("cpu", torch.bfloat16):
        got = block_sparse_attention(*low, index, q_block=1, k_block=16, scale=3.0)
    assert got.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 4e-3 * float(want.abs().max())
    torch.testing.assert_close(got.double(), want, atol=tolerance, rtol=1e-5)


class _Largest(TorchDispatchMode):
    """The most elements of any tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize("q_block", [1, 16])
def test_no_copy_of_the_chosen_keys_outgrows_a_step(q_block, monkeypatch):
    """Four chosen blocks would be four times the keys; nothing larger than the inputs and a step is made."""
    monkeypatch.setitem(chunked._STEP, "cpu", 1 << 12)
    index, tensors = draw(2048, 2048, q_block, 16, slots=4)
    arguments = [t.detach() for t in tensors] + [index, None, None, None, q_block, 16, 1.0]
    with _Largest() as forward:
        o, lse = chunked._forward._init_fn(*arguments)
    with _Largest() as backward:
        chunked._backward._init_fn(torch.ones_like(o), *arguments[:7], o, lse, *arguments[7:])
    biggest = max(t.numel() for t in (*tensors, index))
    assert 0 < forward.elements <= 1.01 * biggest and 0 < backward.elements <= 1.01 * biggest


def test_operators_are_registered_for_the_compiler():
    index, tensors = draw(40, 40, 1, 8)
    arguments = (*tensors, index, None, None, None, 1, 8, 1.0)
    torch.library.opcheck(chunked._forward, arguments, test_utils=("test_schema", "test_faketensor"))
    weighted, tensors = draw(40, 40, 8, 8, weighted=True)
    arguments = (*tensors[:3], weighted, tensors[3], None, None, 8, 8, 1.0)
    torch.library.opcheck(chunked._forward, arguments, test_utils=("test_schema", "test_faketensor"))

    def run(q, k, v):
        return block_sparse_attention(q, k, v, index, q_block=1, k_block=8)

    tensors = tensors[:3]
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), run(*tensors), atol=0, rtol=0)


@pytest.mark.parametrize(("length", "q_block"), [(100, 1), (64, 8), (20, 1)])
def test_tiles_hold_every_query_and_choice_once(length, q_block):
    index, _ = draw(length, 70, q_block, 8, routing_heads=2, slots=4)
    found = []
    for tiles in plan(index.flatten(0, 1), length, 9, q_block, 300, whole=False):
        for way, rows, blocks in zip(*(t.tolist() for t in tiles[:3]), strict=True):
            found += [(way, row, block) for row in rows for block in blocks if row >= 0 and block >= 0]
    flat = index.flatten(0, 1).tolist()
    want = [(way, i, block) for way in range(4) for i in range(length) for block in flat[way][i // q_block]]
    assert sorted(found) == sorted(choice for choice in want if choice[2] >= 0)


def test_sorted_tiles_are_few():
    """However uneven the choices, at most one tile per block is not full."""
    for index in (torch.zeros(1, 512, 1, dtype=torch.int64), torch.arange(512).view(1, -1, 1) % 10):
        assert sum(len(t.rows) for t in plan(index, 512, 10, 1, 1 << 20, whole=False)) <= 512 // TILE + 10


def test_steps_and_places_do_not_depend_on_later_choices():
    """All steps hold as many tiles, and a query stands in the same row of its tile, so that rounding cannot tell."""

    def laid_out(index):
        steps = list(plan(index, 200, 9, 1, 1 << 20, whole=False))
        rows = torch.cat([t.rows for t in steps])
        places = (rows.unsqueeze(0) == torch.arange(60).view(-1, 1, 1)).nonzero()  # of the first 60 queries
        return {len(t.rows) for t in steps}, places[:, [0, 2]].tolist()

    first = torch.randint(9, (1, 200, 1), generator=torch.Generator().manual_seed(0))
    want = laid_out(first)
    for choice in (-1, 0, 4, 8):
        assert laid_out(torch.cat((first[:, :60], torch.full((1, 140, 1), choice)), 1)) == want


def test_route_takes_the_largest_and_of_equals_the_lowest():
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randint(-2, 3, (2, 30, 2, 3), generator=generator).double() for _ in range(2))  # many ties
    exists, before = torch.rand(2, 30, generator=generator) > 0.3, torch.randint(0, 30, (2, 30), generator=generator)
    got = route(q, k, 6, exists=exists, before=before)
    assert got.shape == (2, 2, 30, 6)
    for b, h, i in itertools.product(range(2), range(2), range(30)):
        able = [j for j in range(30) if exists[b, j] and j < before[b, i]]
        ranked = sorted(able, key=lambda j: (-float(q[b, i, h] @ k[b, j, h]), j))[:6]
        assert got[b, h, i].tolist() == ranked + [-1] * (6 - len(ranked))


def test_route_in_steps_and_all_blocks(monkeypatch):
    from seqzoo.kernels.block_sparse import routing

    q, k = torch.randn(2, 9, 1, 4), torch.randn(2, 5, 1, 4)
    whole = route(q, k, 3)
    monkeypatch.setitem(routing._STEP, "cpu", 12)
    assert torch.equal(route(q, k, 3), whole)
    assert torch.equal(route(q, k, 99).sort(-1).values, torch.arange(5).expand(2, 1, 9, 5))
    assert route(q, k, 0).shape == (2, 1, 9, 0)
    assert not route(q.requires_grad_(), k.requires_grad_(), 2).requires_grad


@pytest.mark.parametrize("blocks", [5, 63, 200, 257])
@pytest.mark.parametrize("number", [1, 3, 5])
def test_route_among_many_blocks_is_a_stable_sort(monkeypatch, blocks, number):
    """Small integers: many affinities are equal, and all are exact."""
    from seqzoo.kernels.block_sparse import routing

    monkeypatch.setattr(routing, "_GROUP", 8)
    monkeypatch.setitem(routing._STEP, "cpu", 11 * blocks)  # steps whose queries do not all see the same blocks
    source = torch.Generator().manual_seed(blocks)
    q, k = (torch.randint(-2, 3, (2, n, 2, 3), generator=source).float() for n in (40, blocks))
    before = (torch.arange(40) * blocks // 39).expand(2, 40)
    exists = torch.rand(2, blocks, generator=source) < 0.3
    exists[1, 8:] = False  # in most groups none may be chosen
    affinity = torch.einsum("bghk,brhk->bhgr", q, k)
    seen = exists[:, None, None] & (torch.arange(blocks) < before[:, None, :, None])
    affinity = affinity.masked_fill(~seen, float("-inf"))
    value, place = affinity.sort(dim=-1, descending=True, stable=True)
    want = torch.where(value > float("-inf"), place, -1)[..., :number]
    assert torch.equal(route(q, k, number, exists=exists, before=before), want)


def test_block_means_count_real_tokens():
    x = torch.randn(2, 10, 3, dtype=torch.float64)
    mask = torch.ones(2, 10, dtype=torch.bool)
    mask[0, 2], mask[1, 4:8] = False, False
    means, number = block_means(x, 4, mask)
    assert number.tolist() == [[3, 4, 2], [4, 0, 2]]
    torch.testing.assert_close(means[0, 0], x[0, [0, 1, 3]].mean(0))
    torch.testing.assert_close(means[1, 2], x[1, 8:].mean(0))
    assert (means[1, 1] == 0).all()
    assert block_sums(x.bfloat16(), 4)[0].dtype == torch.float32
    torch.testing.assert_close(block_sums(x, 4)[0][:, 1], x[:, 4:8].sum(1))


def test_empty_inputs_give_zeros():
    index, (q, k, v) = draw(5, 9, 1, 4)
    assert block_sparse_attention(q, k[:, :0], v[:, :0], index[..., :0], q_block=1, k_block=4).eq(0).all()
    assert block_sparse_attention(q[:, :0], k, v, index[:, :, :0], q_block=1, k_block=4).shape == (2, 0, 2, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q_block": 0}, "q_block=0"),
        ({"q_block": 2}, r"index \(2, 1, 5, 3\) must be \(2, 1 or 2, 3, T\)"),
        ({"index": torch.zeros(2, 3, 5, 1, dtype=torch.int64)}, "1 or 2"),
        ({"index": torch.zeros(2, 1, 5, 1)}, "expected int64"),
        ({"weight": torch.ones(2, 1, 5, 2)}, "weight"),
        ({"q_position": torch.zeros(2, 4, dtype=torch.int64)}, "q_position"),
        ({"key_mask": torch.ones(2, 9)}, "key_mask is torch.float32"),
        ({"v": torch.zeros(2, 8, 2, 4, dtype=torch.float64)}, "must be"),
        ({"k": torch.zeros(2, 9, 2, 5, dtype=torch.float64)}, "do not go together"),
        ({"backend": "flash"}, "choose from auto, triton, chunked, naive"),
    ],
)
def test_bad_arguments(change, message):
    index, (q, k, v) = draw(5, 9, 1, 4)
    arguments = {"q": q, "k": k, "v": v, "index": index, "q_block": 1, "k_block": 4, **change}
    with pytest.raises(ValueError, match=message):
        block_sparse_attention(**arguments)
