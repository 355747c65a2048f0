"""The window of softmax_attention: the operator that walks along it, and its blocks, against the formula."""

from functools import partial

import pytest
import torch

from seqzoo.kernels.softmax import band, sdpa, softmax_attention
from seqzoo.kernels.softmax import window as window_module

torch.set_num_threads(1)


@pytest.fixture
def small(monkeypatch):
    """Runs and blocks of 4, so that short inputs have many."""
    for module, name in ((band, "_RUN"), (band, "_LONG_RUN"), (sdpa, "MIN_BLOCK"), (window_module, "MIN_BLOCK")):
        monkeypatch.setattr(module, name, 4)


def draw(length, source, heads=4, kv_heads=2, value=5, dtype=torch.float64):
    seed = torch.Generator().manual_seed(length + source)
    shapes = (2, length, heads, 6), (2, source, kv_heads, 6), (2, source, kv_heads, value)
    return [torch.randn(*shape, generator=seed, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


def with_gradients(y, inputs):
    weight = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y.dtype)
    return [y.detach(), *torch.autograd.grad((y * weight).sum(), inputs)]


def assert_same(got, want, tolerance=1e-12):
    for one, other in zip(got, want, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def blocked(q, k, v, *, window, mask=None, causal=False, scale=None):
    """What dropout and other devices take."""
    key_mask = None if mask is None else mask.expand(len(q), 1, 1, -1).flatten(0, 2)
    first = max(k.shape[1] - q.shape[1] - window[0], 0)
    parts = k[:, first:], v[:, first:], None if key_mask is None else key_mask[:, first:]
    attend = partial(softmax_attention, scale=scale)
    return window_module.blocked_attention(q, *parts, window[0], 0 if causal else window[1], attend)


@pytest.mark.parametrize("form", [softmax_attention, blocked], ids=["band", "blocks"])
@pytest.mark.parametrize("window", [(0, 0), (3, 0), (5, 2), (0, 4), (30, 30)])
@pytest.mark.parametrize(("length", "source"), [(5, 5), (16, 16), (21, 21), (9, 30), (21, 17)])
@pytest.mark.parametrize("masked", [False, True])
def test_is_the_formula_with_a_band(small, form, window, length, source, masked):
    inputs = draw(length, source)
    options = {"window": window, "scale": 0.6}
    if masked:
        options["mask"] = torch.rand(2, 1, 1, source, generator=torch.Generator().manual_seed(1)) < 0.5
        options["mask"][1, ..., source // 3 :] = False  # the later queries of this row see nothing
    want = softmax_attention(*inputs, **options, backend="naive")
    assert_same(with_gradients(form(*inputs, **options), inputs), with_gradients(want, inputs))


@pytest.mark.parametrize("length", [63, 64, 65, 500])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_any_length_and_stride(length, dtype, tolerance):
    inputs = draw(length, length, 3, 3, 6, dtype)
    options = {"window": (70, 70), "causal": True}
    want = with_gradients(softmax_attention(*inputs, **options, backend="naive"), inputs)
    assert_same(with_gradients(softmax_attention(*inputs, **options), inputs), want, tolerance)
    turned = [t.detach().transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for t in inputs]
    assert_same(with_gradients(softmax_attention(*turned, **options), turned), want, tolerance)


def test_a_wide_window_takes_long_runs(monkeypatch):
    inputs, options = draw(40, 40), {"window": (12, 0)}
    want = with_gradients(softmax_attention(*inputs, **options, backend="naive"), inputs)
    monkeypatch.setattr(sdpa, "MIN_BLOCK", 4)
    monkeypatch.setattr(band, "_WIDE", 10)
    monkeypatch.setattr(band, "_LONG_RUN", 16)
    sizes = []
    monkeypatch.setattr(
        band, "_attend", lambda q, *a, real=band._attend, **o: sizes.append(q.shape[2]) or real(q, *a, **o)
    )
    assert_same(with_gradients(softmax_attention(*inputs, **options), inputs), want)
    assert sizes == [16, 16, 8]


def test_half_precision_autocast_and_the_past():
    q, k, v = (t.detach() for t in draw(300, 300, 2, 2, 6, torch.float32))
    options = {"window": (40, 0)}
    want = softmax_attention(q, k, v, **options, backend="naive")
    low = softmax_attention(*(t.bfloat16() for t in (q, k, v)), **options)
    assert low.dtype == torch.bfloat16 and (low - want).norm() / want.norm() < 2e-2
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(softmax_attention(q, k, v, **options), low)
    got = softmax_attention(q, k, v, **options)
    for cut in (1, 63, 64, 170):
        changed = [torch.cat((t[:, :cut], t[:, cut:] * 1e3), 1) for t in (q, k, v)]
        other = softmax_attention(*changed, **options)
        assert torch.equal(other[:, :cut], got[:, :cut]) and not torch.equal(other[:, cut:], got[:, cut:])


def test_gradients_of_many_runs_are_summed_in_float32(small):
    """Every key is in up to 125 runs, each adding less to a sum that grows: in bfloat16 the later ones would vanish."""
    q, k, v = (t.detach() for t in draw(500, 500, 1, 1, 6, torch.float32))
    low = [(t * scale).bfloat16().requires_grad_() for t, scale in ((q, 0.1), (k, 0.1), (v, 1.0))]
    wide = [t.detach().double().requires_grad_() for t in low]
    options = {"window": (500, 0)}
    got, want = softmax_attention(*low, **options), softmax_attention(*wide, **options, backend="naive")
    found = torch.autograd.grad(got, low, torch.ones_like(got))
    for one, other in zip(found, torch.autograd.grad(want.sum(), wide), strict=True):
        assert one.dtype == torch.bfloat16
        assert (one - other).norm() < 2e-2 * other.norm() + 2e-2  # those of q and k nearly cancel


def test_dropout_goes_by_blocks():
    q, k, v = (t.detach() for t in draw(300, 300, 2, 2, 6, torch.float32))
    torch.manual_seed(0)
    many = torch.stack([softmax_attention(q, k, v, window=(40, 0), drop=0.5) for _ in range(200)])
    want = softmax_attention(q, k, v, window=(40, 0))
    assert not torch.equal(many[0], many[1]) and (many.mean(0) - want).abs().mean() < 0.05


def test_operator_is_registered_for_the_compiler():
    inputs = draw(9, 9, 2, 2, 6)
    mask = torch.rand(2, 9) < 0.6
    torch.library.opcheck(torch.ops.seqzoo.softmax_band.default, (*inputs, mask, 3, 1, 0.5))
    run = torch.compile(partial(softmax_attention, window=(70, 0)), fullgraph=True, backend="aot_eager")
    long = draw(130, 130, 2, 2, 6)
    assert_same(with_gradients(run(*long), long), with_gradients(softmax_attention(*long, window=(70, 0)), long))


def test_bad_windows():
    q, k, v = (t.detach() for t in draw(6, 6))
    for bad, word in (
        ({"window": (-1, 0)}, "negative"),
        ({"window": (2, 0), "bias": torch.zeros(6, 6)}, "without a bias"),
        ({"window": (2, 0), "mask": torch.ones(6, 6, dtype=torch.bool)}, "mask of keys"),
        ({"window": (2, 0), "mask": torch.ones(1, dtype=torch.bool)}, "mask of keys"),
    ):
        with pytest.raises(ValueError, match=word):
            softmax_attention(q, k, v, **bad)
