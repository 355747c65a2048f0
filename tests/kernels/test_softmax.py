"""softmax_attention and window_attention against the naive formula with dense masks."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.kernels.softmax import Sinks, softmax_attention, window_attention
from seqzoo.kernels.softmax import sdpa as sdpa_module
from seqzoo.kernels.softmax import window as window_module

F64 = torch.float64


def heads(*shapes, dtype=F64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes]


def with_gradients(y, inputs):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=y.dtype)
    return y.detach(), *torch.autograd.grad((y * weight).sum(), inputs)


def by_hand(q, k, v, seen, bias=0.0):
    """One query, one head at a time: no code in common with the library. seen: bool (B, L, S)."""
    batch, length, num_heads, width = q.shape
    group = num_heads // k.shape[2]
    out = []
    for b in range(batch):
        for h in range(num_heads):
            scores = q[b, :, h] @ k[b, :, h // group].T * width**-0.5
            scores = scores + (bias[b, h] if torch.is_tensor(bias) else bias)
            for i in range(length):
                js = seen[b, i].nonzero()[:, 0]
                weights = torch.exp(scores[i, js] - (scores[i, js].max() if len(js) else 0.0))
                total = weights.sum() if len(js) else 1.0
                out.append((weights / total) @ v[b, js, h // group])
    return torch.stack(out).view(batch, num_heads, length, -1).transpose(1, 2)


def assert_same(got, want, tolerance=1e-12):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("backend", ["sdpa", "naive"])
@pytest.mark.parametrize(("num_heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("length", "source"), [(7, 7), (1, 9), (3, 8), (5, 3)])
@pytest.mark.parametrize("form", ["plain", "causal", "mask", "bias", "causal mask bias"])
def test_attention_is_its_formula(backend, num_heads, kv_heads, length, source, form):
    q, k, v = heads((2, length, num_heads, 6), (2, source, kv_heads, 6), (2, source, kv_heads, 5))
    seen = torch.ones(2, length, source, dtype=torch.bool)
    options = {"backend": backend, "causal": "causal" in form}
    inputs = [q, k, v]
    if "causal" in form:
        seen = seen.tril(source - length)
    if "mask" in form:
        mask = torch.rand(2, 1, length, source, generator=torch.Generator().manual_seed(3)) < 0.6
        mask[1, :, 0] = False  # a row that sees nothing
        options["mask"], seen = mask, seen & mask[:, 0]
    if "bias" in form:
        inputs += heads((2, num_heads, length, source), seed=5)
        options["bias"] = inputs[-1]
    got = with_gradients(softmax_attention(q, k, v, **options), inputs)
    want = with_gradients(by_hand(q, k, v, seen, inputs[3] if len(inputs) > 3 else 0.0), inputs)
    assert_same(got, want)


@pytest.mark.parametrize("backend", ["sdpa", "naive"])
@pytest.mark.parametrize("biased", [False, True])
def test_rows_that_see_nothing_give_zero_and_zero_gradients(backend, biased):
    q, k, v = heads((2, 3, 2, 4), (2, 5, 2, 4), (2, 5, 2, 4), dtype=torch.float32)
    mask = torch.tensor([True, False])[:, None, None, None].expand(2, 1, 1, 5)
    bias = torch.randn(1, 2, 3, 5) if biased else None
    y, *grads = with_gradients(softmax_attention(q, k, v, mask=mask, bias=bias, backend=backend), [q, k, v])
    assert (y[1] == 0).all() and (y[0] != 0).any()
    for grad in grads:
        assert (grad[1] == 0).all() and grad.isfinite().all() and (grad[0] != 0).any()


def test_groups_equal_repeated_heads():
    q, k, v = heads((2, 9, 6, 4), (2, 9, 2, 4), (2, 9, 2, 4))
    repeated = [t.repeat_interleave(3, 2) for t in (k, v)]
    got = with_gradients(softmax_attention(q, k, v, causal=True), [q, k, v])
    assert_same(got, with_gradients(softmax_attention(q, *repeated, causal=True), [q, k, v]))


def test_half_precision_softmax_is_float32():
    q, k, v = (t.detach() for t in heads(*[(1, 300, 2, 16)] * 3, dtype=torch.float32))
    low = [t.bfloat16() for t in (q, k, v)]
    for backend in ("sdpa", "naive"):
        got = softmax_attention(*low, causal=True, backend=backend)
        want = softmax_attention(*(t.float() for t in low), causal=True, backend="naive")
        assert got.dtype == torch.bfloat16
        assert ((got.float() - want).norm() / want.norm()) < 5e-3


def test_attention_refuses():
    q, k, v = (t.detach() for t in heads((2, 3, 4, 4), (2, 5, 4, 4), (2, 5, 4, 4)))
    for bad, word in (
        ({"k": k[:, :4]}, "shapes"),
        ({"k": k[:, :, :3], "v": v[:, :, :3]}, "divide"),
        ({"mask": torch.ones(3, 5)}, "mask"),
        ({"drop": 1.0}, "drop"),
        ({"backend": "flash"}, "flash"),
    ):
        with pytest.raises(ValueError, match=word):
            softmax_attention(**{"q": q, "k": k, "v": v, **bad})


# --- the window


def windowed(q, k, v, *, window_size, causal, num_sinks=0, bias=None, padded=None, backend="auto"):
    """window_attention without a cache; padded: real tokens of each row."""
    place = torch.arange(q.shape[1]).expand(q.shape[0], -1)
    position = place if padded is None else torch.where(place < padded[:, None], place, -1)
    first = slice(0, num_sinks)
    return window_attention(
        q,
        k,
        v,
        q_position=position,
        k_position=position,
        window_size=window_size,
        causal=causal,
        attend=lambda *qkv, **options: softmax_attention(*qkv, **options, backend=backend),
        sinks=Sinks(k[:, first], v[:, first], position[:, first]) if num_sinks else None,
        bias=bias,
    )


def dense_window(length, window_size, causal, num_sinks=0):
    i, j = torch.arange(length)[:, None], torch.arange(length)
    near = (i - j >= 0) & (i - j < window_size) if causal else (i - j).abs() < window_size
    return near | ((j < num_sinks) & ((j <= i) | (not causal)))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_sinks", [0, 3])
@pytest.mark.parametrize("window_size", [1, 2, 4, 5, 9, 40])
@pytest.mark.parametrize("length", [1, 3, 4, 16, 21])
def test_window_is_a_dense_mask(monkeypatch, causal, num_sinks, window_size, length):
    monkeypatch.setattr(window_module, "MIN_BLOCK", 4)
    q, k, v = heads((2, length, 4, 6), (2, length, 2, 6), (2, length, 2, 6))
    options = {"window_size": window_size, "causal": causal, "num_sinks": num_sinks}
    mask = dense_window(length, **options)
    got = with_gradients(windowed(q, k, v, **options), [q, k, v])
    want = softmax_attention(q, k, v, mask=mask[None, None], backend="naive")
    assert_same(got, with_gradients(want, [q, k, v]))


@pytest.mark.parametrize("causal", [True, False])
def test_window_with_bias_and_pads(monkeypatch, causal):
    monkeypatch.setattr(window_module, "MIN_BLOCK", 4)
    q, k, v = heads(*[(3, 21, 2, 6)] * 3)
    padded = torch.tensor([21, 6, 0])

    def bias(q_position, k_position):
        distance = q_position[:, None, :, None] - k_position[:, None, None, :]
        return -distance.abs().double() * torch.tensor([0.5, 0.1], dtype=F64).view(1, 2, 1, 1)

    got = windowed(q, k, v, window_size=6, causal=causal, num_sinks=2, bias=bias, padded=padded)
    place, real = torch.arange(21)[None], torch.arange(21) < padded[:, None]
    seen = dense_window(21, 6, causal, 2) & real[:, None, :] & real[:, :, None]
    want = softmax_attention(q, k, v, mask=seen[:, None], bias=bias(place, place), backend="naive")
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    assert (got[2] == 0).all()


def test_window_refuses_keys_that_do_not_align():
    q, k = torch.zeros(1, 4, 1, 2), torch.zeros(1, 6, 1, 2)
    with pytest.raises(ValueError, match="2 keys precede"):
        window_attention(
            q,
            k,
            k,
            q_position=torch.arange(4)[None],
            k_position=torch.arange(6)[None],
            window_size=5,
            causal=True,
            attend=softmax_attention,
        )


class Largest(TorchDispatchMode):
    """Notes the largest tensor that any operation returns."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


@pytest.mark.parametrize(("num_heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("length", "source"), [(2, 3), (3, 8), (5, 40), (7, 8)])
def test_the_last_of_many_queries_in_two_parts(num_heads, kv_heads, length, source, monkeypatch):
    monkeypatch.setattr(sdpa_module, "_MASK", 0)
    q, k, v = inputs = heads((2, length, num_heads, 6), (2, source, kv_heads, 6), (2, source, kv_heads, 5))
    seen = torch.ones(2, length, source, dtype=torch.bool).tril(source - length)
    got = with_gradients(softmax_attention(q, k, v, causal=True, backend="sdpa"), inputs)
    assert_same(got, with_gradients(by_hand(q, k, v, seen), inputs))


def test_the_last_of_many_queries_make_no_tensor_of_all_scores(monkeypatch):
    """As on a process that holds the end of a long row."""
    inputs = heads((1, 2048, 1, 8), *[(1, 6144, 1, 8)] * 2, dtype=torch.float32)
    with Largest() as noted:
        softmax_attention(*inputs, causal=True).sum().backward()
    assert noted.elements <= 6144 * 2 * 16
    monkeypatch.setattr(sdpa_module, "_MASK", 1 << 40)  # the control
    with Largest() as dense:
        softmax_attention(*inputs, causal=True)
    assert dense.elements >= 2048 * 6144


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_sinks", [0, 4])
def test_window_makes_no_tensor_of_length_squared(causal, num_sinks):
    length, window_size = 4096, 64
    q, k, v = heads(*[(1, length, 1, 8)] * 3, dtype=torch.float32)
    options = {"window_size": window_size, "causal": causal, "num_sinks": num_sinks}
    with Largest() as noted:
        windowed(q, k, v, **options).sum().backward()
    assert noted.elements <= length * (3 * 64 + num_sinks) * 8  # keys of width 8, laid out for blocks of 64
    with Largest() as dense:  # the control: the tracer sees what it should
        softmax_attention(q, k, v, mask=dense_window(length, **options)[None, None])
    assert dense.elements >= length**2
