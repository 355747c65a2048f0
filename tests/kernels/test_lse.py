"""attention_with_lse against the formula, and the merge of attention over disjoint sets of keys."""

import pytest
import torch

from seqzoo.kernels.lse import attention_with_lse, merge_lse

torch.set_num_threads(1)


def draw(length, source, kv_heads=4, dtype=torch.float64, value=6):
    source_ = torch.Generator().manual_seed(length)
    shapes = (2, length, 4, 6), (2, source, kv_heads, 6), (2, source, kv_heads, value)
    return [torch.randn(*shape, generator=source_, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def with_gradients(o, lse, inputs):
    """Under random cotangents of both; a row that sees nothing has no lse to differentiate."""
    seed = torch.Generator().manual_seed(7)
    objective = (o * torch.randn(o.shape, generator=seed, dtype=torch.float64).to(o.dtype)).sum()
    weight = torch.randn(lse.shape, generator=seed, dtype=torch.float64).to(lse.dtype)
    objective = objective + (lse.masked_fill(lse == float("-inf"), 0.0) * weight).sum()
    return [o.detach(), lse.detach(), *torch.autograd.grad(objective, inputs)]


def assert_same(got, want, tolerance):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), [
    ("flash", torch.float64, 1e-12), ("naive", torch.float64, 1e-12), ("flash", torch.float32, 1e-5),
])  # fmt: skip
@pytest.mark.parametrize("form", ["plain", "causal", "mask", "causal mask", "grouped"])
@pytest.mark.parametrize(("length", "source"), [(1, 9), (7, 7), (65, 70), (5, 3)])
def test_is_the_formula(backend, dtype, tolerance, form, length, source):
    q, k, v = inputs = draw(length, source, 2 if form == "grouped" else 4, dtype, value=5 if form == "mask" else 6)
    seen = torch.ones(2, 1, length, source, dtype=torch.bool)
    options = {"causal": "causal" in form, "scale": 0.3}
    if options["causal"]:
        seen = seen.tril(source - length)
    if "mask" in form:
        options["mask"] = torch.rand(2, 1, length, source, generator=torch.Generator().manual_seed(3)) < 0.5
        options["mask"][0, :, 0] = False
        seen = seen & options["mask"]
    got = with_gradients(*attention_with_lse(*inputs, **options, backend=backend), inputs)
    groups = 4 // k.shape[2]
    wide = [t.transpose(1, 2).repeat_interleave(n, 1) for t, n in ((q, 1), (k, groups), (v, groups))]
    scores = (wide[0] @ wide[1].mT * 0.3).exp() * seen
    total = scores.sum(-1)
    o = (scores / total.masked_fill(total == 0, 1.0)[..., None]) @ wide[2]
    lse = torch.where(total == 0, float("-inf"), total.masked_fill(total == 0, 1.0).log())
    assert_same(got, with_gradients(o.transpose(1, 2), lse, inputs), tolerance)


@pytest.mark.parametrize(("backend", "dtype", "tolerance"), [
    ("naive", torch.float64, 1e-12), ("flash", torch.float64, 1e-12), ("flash", torch.float32, 1e-5),
])  # fmt: skip
@pytest.mark.parametrize("cuts", [[20], [7, 20], [0, 1, 2, 19, 20]])
def test_merged_over_a_split_of_the_keys_is_attention_over_all(backend, dtype, tolerance, cuts):
    q, k, v = inputs = draw(9, 20, dtype=dtype)
    mask = torch.rand(2, 1, 9, 20, generator=torch.Generator().manual_seed(5)) < 0.3
    mask[0, :, 4] = False  # this query sees no key in any part
    mask[1, :, 2, 7:] = False  # this one only in the first parts
    parts, first = [], 0
    for end in cuts:
        part = slice(first, end)
        options = {"mask": mask[..., part], "backend": backend}
        parts.append(attention_with_lse(q, k[:, part], v[:, part], **options))
        first = end
    got = with_gradients(*merge_lse(parts), inputs)
    assert_same(got, with_gradients(*attention_with_lse(*inputs, mask=mask, backend="naive"), inputs), tolerance)
    assert (got[0][0, 4] == 0).all() and (got[1][0, :, 4] == float("-inf")).all()


def test_merge_neither_overflows_nor_reads_what_is_not_there():
    o = torch.randn(3, 1, 2, 1, 4)
    lse = torch.tensor([1000.0, 1001.0]).view(2, 1, 1, 1).expand(2, 1, 1, 2)
    absent = torch.full_like(o[2], float("nan")), torch.full((1, 1, 2), float("-inf"))
    got, total = merge_lse([(o[0], lse[0]), absent, (o[1], lse[1])])
    share = torch.tensor([0.0, 1.0]).softmax(0)
    torch.testing.assert_close(got, share[0] * o[0] + share[1] * o[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(total, torch.full((1, 1, 2), 1000.0) + torch.tensor([0.0, 1.0]).logsumexp(0))


def test_merge_in_any_grouping_is_the_same():
    parts = [(torch.randn(2, 5, 3, 4, dtype=torch.float64), torch.randn(2, 3, 5, dtype=torch.float64)) for _ in "abc"]
    want = merge_lse(parts)
    assert_same(merge_lse([merge_lse(parts[:2]), parts[2]]), want, 1e-12)
    low = merge_lse([(o.bfloat16(), lse.float()) for o, lse in parts])
    assert low[0].dtype == torch.bfloat16 and low[1].dtype == torch.float32


def test_strides_and_half_precision():
    q, k, v = (t.detach() for t in draw(33, 40))
    want = attention_with_lse(q, k, v, backend="naive")
    turned = [t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v)]  # channels are not next to each other
    assert_same(attention_with_lse(*turned, backend="flash"), want, 1e-12)
    o, lse = attention_with_lse(*(t.bfloat16() for t in (q, k, v)))
    assert o.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert (o - want[0]).norm() / want[0].norm() < 2e-2 and (lse - want[1]).abs().max() < 5e-2


def test_no_keys_or_no_queries():
    for length, source in ((3, 0), (0, 4)):
        o, lse = attention_with_lse(*draw(length, source))
        assert o.shape == (2, length, 4, 6) and (o == 0).all()
        assert lse.shape == (2, 4, length) and (lse == float("-inf")).all()


def test_operator_is_registered_for_the_compiler():
    q, k, v = draw(5, 7)
    mask = torch.rand(2, 1, 5, 7) < 0.7
    torch.library.opcheck(torch.ops.seqzoo.attention_with_lse.default, (q, k, v, mask, False, 0.5))


def test_bad_arguments():
    q, k, v = (t.detach() for t in draw(3, 5))
    for bad, word in (
        ({"k": k[:, :4]}, "do not go together"),
        ({"q": q[:1]}, "do not go together"),
        ({"q": q[..., :5]}, "do not go together"),
        ({"q": q[:, :, :3]}, "do not go together"),
        ({"v": torch.zeros(2, 5, 4, 7)}, "wider than the keys"),
        ({"mask": torch.ones(3, 5)}, "expected bool"),
        ({"backend": "cudnn"}, "cudnn"),
    ):
        with pytest.raises(ValueError, match=word):
            attention_with_lse(**{"q": q, "k": k, "v": v, **bad})
    with pytest.raises(ValueError, match="no parts"):
        merge_lse([])
    with pytest.raises(ValueError, match="must be"):
        merge_lse([(q, torch.zeros(2, 3, 4))])
