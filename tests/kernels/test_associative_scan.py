"""The linear recurrence of first order: its closed form, chunks against the oracle with gradients, broadcasts, ends."""

import pytest
import torch

from seqzoo.kernels.associative_scan import associative_scan, scan_
from seqzoo.kernels.associative_scan import chunked as chunked_module
from seqzoo.kernels.dispatch import backends

BACKENDS = ["chunked", "naive"]
KINDS = [(torch.float64, torch.float64), (torch.complex128, torch.complex128), (torch.complex128, torch.float64)]


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Reads of memory that nobody wrote show up as NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(shape, dim=1, a_shape=None, kinds=KINDS[0], grad=False):
    """a with |a| < 1 mostly, x, and an initial state."""
    generator = torch.Generator().manual_seed(sum(shape))
    a_kind, x_kind = kinds
    a = torch.randn(a_shape or shape, dtype=a_kind, generator=generator) * 0.6
    x = torch.randn(shape, dtype=x_kind, generator=generator)
    initial = torch.randn((*shape[:dim], *shape[dim + 1 :]), dtype=x_kind, generator=generator)
    return [t.requires_grad_(grad) for t in (a, x, initial)]


def close(got, want, tolerance=1e-12):
    assert (got.shape, got.dtype) == (want.shape, want.dtype)
    error = (got - want).abs().max().item() if want.numel() else 0.0
    assert error <= tolerance * max(1.0, want.abs().max().item() if want.numel() else 0.0), f"error {error:.2e}"


def run(tensors, **options):
    a, x, initial = tensors
    return associative_scan(a, x, initial_state=initial, **options)


def gradients(tensors, **options):
    """The result, and its gradients with random weights."""
    h = run(tensors, **options)
    wide = torch.promote_types(h.dtype, torch.float64)
    weight = torch.randn(h.shape, dtype=wide, generator=torch.Generator().manual_seed(9))
    loss = (h * weight.to(h.dtype)).sum()
    return [h, *torch.autograd.grad(loss.real if loss.is_complex() else loss, tensors)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_weighted_sum(backend):
    """h_t = sum_{s <= t} a_{s+1} ... a_t x_s, all pairs at once."""
    a, x, _ = inputs((2, 9, 3))
    weight = torch.zeros(2, 9, 9, 3, dtype=torch.float64)
    for t in range(9):
        for s in range(t + 1):
            weight[:, t, s] = a[:, s + 1 : t + 1].prod(1)
    close(associative_scan(a, x, backend=backend), torch.einsum("btsd,bsd->btd", weight, x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_constant_decay_is_a_convolution(backend):
    x = torch.randn(1, 300, 2, dtype=torch.float64)
    a = torch.tensor([0.9, -0.5], dtype=torch.float64)
    power = a ** torch.arange(300, dtype=torch.float64).unsqueeze(1)  # (L, 2)
    want = torch.stack([(power[: t + 1].flip(0) * x[0, : t + 1]).sum(0) for t in range(300)]).unsqueeze(0)
    close(associative_scan(a, x, backend=backend), want)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 500])
@pytest.mark.parametrize("buffer", [None, 30])
def test_chunks_equal_the_oracle(length, reverse, buffer, monkeypatch):
    if buffer is not None:  # chunks of five steps
        monkeypatch.setitem(chunked_module.BUFFER, "cpu", buffer)
    tensors = inputs((2, length, 3), grad=True)
    got, want = (gradients(tensors, reverse=reverse, backend=backend) for backend in BACKENDS)
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("a_shape", [None, (1,), (4, 5), (7, 1, 1), (1, 5), (2, 1, 4, 1)])
@pytest.mark.parametrize("kinds", KINDS)
def test_broadcasts_and_complex_numbers(kinds, a_shape, reverse):
    tensors = inputs((2, 7, 4, 5), a_shape=a_shape, kinds=kinds, grad=True)
    got, want = (gradients(tensors, reverse=reverse, backend=backend) for backend in BACKENDS)
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dim", [0, 2, -1])
def test_any_dimension_and_stride(dim, reverse):
    tensors = inputs((4, 5, 6), dim=dim % 3, grad=True)
    want = gradients(tensors, dim=dim, reverse=reverse, backend="naive")
    strided = [t.detach().mT.contiguous().mT.requires_grad_() for t in tensors]
    assert not strided[0].is_contiguous()
    kept = [t.clone() for t in strided]
    for got, other in zip(gradients(strided, dim=dim, reverse=reverse), want, strict=True):
        close(got, other)
    assert all(torch.equal(t, k) for t, k in zip(strided, kept, strict=True))


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("a_shape", [None, (1100,)])
def test_long_steps_go_one_by_one(a_shape, reverse):
    """At 4096 elements a step or more; the result is the tree's up to rounding."""
    tensors = inputs((4, 21, 1100), a_shape=a_shape, grad=True)
    assert tensors[2].numel() > chunked_module.LONG_STEP["cpu"]
    got, want = (gradients(tensors, reverse=reverse, backend=backend) for backend in BACKENDS)
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kinds", KINDS)
@pytest.mark.parametrize("reverse", [False, True])
def test_numeric_gradients(backend, kinds, reverse):
    tensors = inputs((2, 5, 2), kinds=kinds, grad=True)
    assert torch.autograd.gradcheck(lambda *t: run(t, backend=backend, reverse=reverse), tensors)


def test_a_broadcast_decay_has_second_derivatives():
    tensors = inputs((2, 4, 2), a_shape=(2,), grad=True)
    assert torch.autograd.gradgradcheck(lambda *t: run(t), tensors)


@pytest.mark.parametrize("step", [3, 5000])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 6, 8, 13, 33])
def test_in_place(length, reverse, step):
    """scan_ is the loop, by steps and by the tree; the a that meets no state may be NaN."""
    a, x = torch.rand(length, step, dtype=torch.float64), torch.randn(length, step, dtype=torch.float64)
    a[-1 if reverse else 0] = torch.nan
    want = x.clone()
    for t in range(1, length):
        here, before = (length - 1 - t, length - t) if reverse else (t, t - 1)
        want[here] = x[here] + a[here] * want[before]
    scan_(a.clone(), x, reverse=reverse)
    close(x, want)


@pytest.mark.parametrize("width", [3, 5000])
@pytest.mark.parametrize("reverse", [False, True])
def test_the_past_is_bitwise_independent_of_the_future(width, reverse):
    a, x, _ = (t.float() for t in inputs((1, 70, width)))
    want = associative_scan(a, x, reverse=reverse)
    for cut in (1, 16, 40, 69):
        future = torch.arange(70) < 70 - cut if reverse else torch.arange(70) >= cut
        a2, x2 = (torch.where(future[:, None], t + 1e3, t) for t in (a, x))
        got = associative_scan(a2, x2, reverse=reverse)
        assert torch.equal(got[:, ~future], want[:, ~future])
        assert not torch.equal(got[:, future], want[:, future])


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_computed_in_float32(backend):
    a, x, initial = (t.bfloat16() for t in inputs((2, 50, 3)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = run((a, x, initial), backend=backend)
    want = run((a.float(), x.float(), initial.float()), backend=backend)
    assert h.dtype == torch.bfloat16
    assert torch.equal(h, want.bfloat16())


def test_float32_stays_near_float64():
    tensors = [t.detach().float().requires_grad_() for t in inputs((1, 2000, 8))]
    wide = [t.detach().double().requires_grad_() for t in tensors]
    for got, want in zip(gradients(tensors), gradients(wide), strict=True):
        close(got, want.float(), 1e-5)


def test_a_sequence_in_pieces():
    a, x, h = inputs((2, 50, 3))
    whole = run((a, x, h))
    parts, start = [], 0
    for size in (20, 1, 1, 28):
        part = run((a[:, start : start + size], x[:, start : start + size], h))
        h, start = part[:, -1], start + size
        parts.append(part)
    close(torch.cat(parts, 1), whole)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(2, 0, 3), (0, 4, 3), (2, 4, 0)])
def test_nothing_to_scan(backend, shape):
    tensors = inputs(shape, grad=True)
    found = gradients(tensors, backend=backend) if shape[1] else [run(tensors, backend=backend)]
    assert found[0].shape == shape


def test_compiles_into_one_graph():
    tensors = inputs((2, 20, 3), grad=True)
    compiled = torch.compile(lambda *t: run(t, reverse=True), fullgraph=True, backend="aot_eager")
    close(compiled(*tensors), run(tensors, reverse=True))
    compiled(*tensors).sum().backward()
    got = [t.grad for t in tensors]
    for a, b in zip(got, torch.autograd.grad(run(tensors, reverse=True).sum(), tensors), strict=True):
        close(a, b)


def test_the_operator_is_registered_in_full():
    a, x, initial = inputs((2, 6, 3), grad=True)
    torch.library.opcheck(torch.ops.seqzoo.associative_scan.default, (a, x, initial, 1, False))


def test_backends_are_registered():
    assert {"chunked": "ok", "naive": "ok"}.items() <= backends()["associative_scan"].items()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dim": 3}, r"dim=3 is not a dimension of x \(2, 4, 3\)"),
        ({"dim": -4}, "dim=-4"),
        ({"a": torch.zeros(2, 3)}, r"a \(2, 3\) does not broadcast to x \(2, 4, 3\)"),
        ({"a": torch.zeros(1, 2, 4, 3)}, "does not broadcast"),
        ({"initial_state": torch.zeros(2, 4)}, r"initial_state has shape \(2, 4\), expected \(2, 3\)"),
        ({"x": torch.zeros(2, 4, 3, dtype=torch.int64), "a": torch.zeros(3, dtype=torch.int64)}, "torch.int64"),
        ({"backend": "chunkd"}, "backend='chunkd' is unknown"),
    ],
)
def test_bad_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        associative_scan(**{"a": torch.zeros(3), "x": torch.zeros(2, 4, 3), **change})
