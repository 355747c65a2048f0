"""The dilated convolution against torch's own, its tail, gradients, and what its taps read."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch.nn import functional as F

from seqzoo.kernels.dilated_conv import dilated_conv, direct, shifted
from seqzoo.kernels.dilated_conv.shifted import _forward

torch.set_num_threads(1)
BACKENDS = ("naive", "shifted")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def draw(length, out, groups, size):
    return normal(2, length, 6), normal(out, 6 // groups, size, seed=1), normal(out, seed=2)


def torchs(x, weight, bias, dilation, causal, before=None):
    past = (weight.shape[2] - 1) * dilation
    x = x.transpose(1, 2)
    if before is not None:
        x = torch.cat((before.transpose(1, 2), x), 2)
    elif causal:
        x = F.pad(x, (past, 0))
    else:
        x = F.pad(x, (past // 2, past // 2))
    return F.conv1d(x, weight, bias, dilation=dilation, groups=6 // weight.shape[1]).transpose(1, 2)


def same(got, want, tolerance=1e-12):
    torch.testing.assert_close(got, want, atol=tolerance, rtol=tolerance)


@pytest.fixture(params=[64, shifted.BLOCK], ids=["small_blocks", "blocks"])
def block(request, monkeypatch):
    monkeypatch.setattr(shifted, "_block", lambda rows: request.param)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("out", "groups"), [(6, 6), (6, 1), (6, 2), (12, 3), (12, 6)])
def test_torchs_convolution_with_gradients(backend, causal, out, groups, block):
    for length, size, dilation in itertools.product((1, 5, 130), (1, 3, 5), (1, 3, 50)):
        if backend == "naive" and length == 130:
            continue  # slow, and nothing new
        inputs = [t.requires_grad_() for t in draw(length, out, groups, size)]
        y, tail = dilated_conv(*inputs, dilation=dilation, causal=causal, backend=backend)
        want = torchs(*inputs, dilation, causal)
        assert tail is None
        same(y, want)
        cotangent = normal(*y.shape, seed=3)
        got = torch.autograd.grad((y * cotangent).sum(), inputs)
        for a, b in zip(got, torch.autograd.grad((want * cotangent).sum(), inputs), strict=True):
            same(a, b, 1e-11)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize(("length", "dilation"), [(1, 4), (7, 4), (7, 1), (130, 20)])
def test_the_inputs_before_the_first(backend, groups, length, dilation, block):
    x, weight, bias = draw(length, 6, groups, 3)
    tail = normal(2, 2 * dilation, 6, seed=4)
    inputs = [t.requires_grad_() for t in (x, weight, bias, tail)]
    y, after = dilated_conv(x, weight, bias, dilation=dilation, tail=tail, return_tail=True, backend=backend)
    want, full = torchs(x, weight, bias, dilation, True, tail), torch.cat((tail, x), 1)
    same(y, want)
    same(after, full[:, length:])
    on_y, on_tail = normal(*y.shape, seed=5), normal(*after.shape, seed=6)
    got = torch.autograd.grad((y * on_y).sum() + (after * on_tail).sum(), inputs)
    objective = (want * on_y).sum() + (full[:, length:] * on_tail).sum()
    for a, b in zip(got, torch.autograd.grad(objective, inputs), strict=True):
        same(a, b, 1e-11)


def test_chunks_with_a_carried_tail_equal_the_whole():
    x, weight, bias = draw(60, 6, 6, 4)
    whole, _ = dilated_conv(x, weight, bias, dilation=5)
    tail, pieces = None, []
    for part in x.split([7, 1, 1, 30, 21], 1):
        y, tail = dilated_conv(part, weight, bias, dilation=5, tail=tail, return_tail=True)
        pieces.append(y)
    same(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("causal", [True, False])
def test_lengths_stop_each_row_where_it_ends(causal):
    lengths = [20, 13, 3, 0]
    x, weight, bias = normal(4, 20, 6), normal(6, 1, 3, seed=1), normal(6, seed=2)
    start = normal(4, 8, 6, seed=3) if causal else None
    options = {"dilation": 4, "causal": causal, "return_tail": causal}
    y, tail = dilated_conv(x, weight, bias, tail=start, lengths=torch.tensor(lengths), **options)
    for row, n in enumerate(lengths):
        one = slice(row, row + 1)
        want, end = dilated_conv(x[one, :n], weight, bias, tail=None if start is None else start[one], **options)
        same(y[one, :n], want)
        if causal:
            same(tail[one], end)


@pytest.fixture
def unwritten_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("size", [100, direct.BLOCK])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 500])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_pass_in_float32_equals_the_oracle(size, causal, length, dtype, monkeypatch, unwritten_is_nan):
    """All taps at once, in blocks of a row or of rows, outputs and every gradient; the oracle in float64."""
    monkeypatch.setattr(direct, "BLOCK", size)
    for taps, dilation, rows in ((1, 1, 3), (3, 50, 1), (5, 3, 3), (3, 300, 2)):
        raw = [normal(rows, length, 6), normal(6, 1, taps, seed=1), normal(6, seed=2)]
        if causal:
            raw.append(normal(rows, (taps - 1) * dilation, 6, seed=3))
        outcome = []
        for kind, backend in ((dtype, "shifted"), (torch.float64, "naive")):
            inputs = [t.to(dtype).to(kind).requires_grad_() for t in raw]
            tail = {"tail": inputs[3]} if causal else {}
            if backend == "naive" and length == 500:  # too slow token by token; float64 never takes the one pass
                backend = "shifted"
            y, _ = dilated_conv(*inputs[:3], dilation=dilation, causal=causal, backend=backend, **tail)
            cotangent = normal(*y.shape, seed=4).to(dtype).to(kind)
            outcome.append([y, *torch.autograd.grad((y * cotangent).sum(), inputs)])
        for got, want in zip(*outcome, strict=True):
            assert got.dtype == dtype
            error = (got.double() - want).norm() / want.norm().clamp(min=1e-30)
            assert error < (1e-5 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_an_output_reads_its_taps_and_nothing_else(causal, dtype, monkeypatch):
    """Bitwise: 1e6 added anywhere else leaves an output as it was."""
    monkeypatch.setattr(direct, "BLOCK", 100)
    x, weight, _ = (t.to(dtype) for t in draw(40, 6, 6, 3))
    want, _ = dilated_conv(x, weight, dilation=7, causal=causal)
    for place in (0, 17, 39):
        changed = x.clone()
        changed[:, place] += 1e6
        y, _ = dilated_conv(changed, weight, dilation=7, causal=causal)
        moved = [t for t in range(40) if not torch.equal(y[:, t], want[:, t])]
        reach = (0, 7, 14) if causal else (-7, 0, 7)
        assert moved == [place + r for r in reach if 0 <= place + r < 40]


@pytest.mark.parametrize("groups", [6, 2])
def test_gradcheck(groups):
    x, weight, bias = (t.requires_grad_() for t in draw(5, 6, groups, 3))
    tail = normal(2, 4, 6, seed=4).requires_grad_()
    for backend in BACKENDS:

        def run(x, weight, bias, tail, backend=backend):
            return dilated_conv(x, weight, bias, dilation=2, tail=tail, return_tail=True, backend=backend)

        assert torch.autograd.gradcheck(run, (x, weight, bias, tail), fast_mode=True)


@pytest.mark.parametrize("groups", [6, 2])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_operator_keeps_torchs_rules(groups, dtype):
    """Schema, fake tensors, autograd registration, and tracing, as torch checks them."""
    x, weight, bias = (t.to(dtype).requires_grad_() for t in draw(9, 6, groups, 3))
    torch.library.opcheck(_forward, (x, weight, bias, x.new_zeros(2, 4, 6), 2, True))


def test_strides_do_not_matter():
    for dtype in (torch.float64, torch.float32):
        x, weight, bias = (t.to(dtype) for t in draw(50, 6, 6, 3))
        want, _ = dilated_conv(x, weight, bias, dilation=2)
        for strided in (x.transpose(0, 1).contiguous().transpose(0, 1), x.mT.contiguous().mT):
            assert not strided.is_contiguous()
            same(dilated_conv(strided, weight.mT.contiguous().mT, bias, dilation=2)[0], want, 1e-6)


def test_autocast_and_half_types():
    x, weight, bias = (t.float() for t in draw(50, 6, 6, 3))
    want, _ = dilated_conv(x, weight, bias, dilation=2)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(dilated_conv(x, weight, bias, dilation=2)[0], want)
    half, tail = dilated_conv(x.bfloat16(), weight, bias, dilation=2, return_tail=True)
    assert half.dtype == tail.dtype == torch.bfloat16
    assert (half.float() - want).norm() < 2e-2 * want.norm()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(6, 4, 3)}, "are not"),
        ({"weight": torch.ones(5, 2, 3)}, "3 groups do not divide 5"),
        ({"dilation": 0}, "dilation=0"),
        ({"causal": False, "weight": torch.ones(6, 1, 4)}, "odd number of taps, got 4; nearest: 5"),
        ({"causal": False, "return_tail": True}, "carries no tail"),
        ({"bias": torch.ones(5)}, "bias has shape"),
        ({"lengths": torch.ones(3)}, "lengths has shape"),
        ({"tail": torch.ones(2, 3, 6)}, r"expected \(2, 2, 6\)"),
        ({"backend": "fft"}, "backend='fft'"),
    ],
)
def test_bad_arguments(change, message):
    with pytest.raises(ValueError, match=message):
        dilated_conv(**{"x": torch.ones(2, 7, 6), "weight": torch.ones(6, 1, 3), **change})
