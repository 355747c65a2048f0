"""The forms of plain torch operations, which exported models hold, against the formulas: outputs, states, gradients."""

import pytest
import torch

from seqzoo.kernels import dispatch
from seqzoo.kernels.agent_attention import RunningState, running_agent_attention
from seqzoo.kernels.dilated_conv import dilated_conv
from seqzoo.kernels.ema import Coefficients, ema, ema_coefficients, initialize_ema
from seqzoo.kernels.gated_linear_attention import gated_linear_attention
from seqzoo.kernels.linear_attention import LinearState, linear_attention
from seqzoo.kernels.portable import chunk_scan, delayed, linear_steps, running_max
from seqzoo.kernels.prob_sparse import prob_sparse_attention
from seqzoo.kernels.s4d_conv import s4d_conv
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.kernels.softmax import softmax_attention

LENGTHS = (1, 17, 130)
F64 = torch.float64


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def rand(*shape):
    return torch.randn(*shape, dtype=F64)


def flat(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if result is None:
        return []
    return [t for part in result for t in flat(part)]


def compare(function, inputs, *, backends=("portable", "naive")):
    """function(backend, *inputs) twice: all its tensors, and the gradients of all inputs by random cotangents."""
    results = []
    for backend in backends:
        leaves = [t.clone().requires_grad_(t.is_floating_point() or t.is_complex()) for t in inputs]
        outputs = flat(function(backend, *leaves))
        torch.manual_seed(1)
        total = sum((o * torch.randn(o.shape, dtype=o.dtype)).sum() for o in outputs if o.requires_grad)
        wanted = [t for t in leaves if t.requires_grad]
        gradients = torch.autograd.grad(total, wanted, allow_unused=True)
        results.append([*(o.detach() for o in outputs), *gradients])
    for found, expected in zip(*results, strict=True):
        if expected is None:
            assert found is None or not found.any()
            continue
        assert found.shape == expected.shape
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("length", (1, 2, 15, 16, 17, 64))
def test_steps_of_a_chunk_are_the_recurrence(length):
    a, x, before = torch.rand(2, length, 4, 3, dtype=F64), rand(2, length, 4, 3), rand(2, 4, 3)
    h, steps = before, []
    for t in range(length):
        h = a[:, t] * h + x[:, t]
        steps.append(h)
    torch.testing.assert_close(linear_steps(a, x, before), torch.stack(steps, 1), rtol=1e-12, atol=1e-12)
    with_first = torch.cat((before.unsqueeze(1), x), 1)
    assert torch.equal(running_max(x, before), with_first.cummax(1).values[:, 1:])


@pytest.mark.parametrize("length", (1, 3, 4, 5, 8, 9))
def test_a_walk_over_chunks_meets_every_step_once(length):
    x = rand(2, length, 3)

    def body(carried, parts, given):
        sums = (parts[0] * given[0]).cumsum(1) + carried[0].unsqueeze(1)
        return (sums[:, -1],), sums

    (last,), y = chunk_scan(body, (torch.ones(2, 3, dtype=F64),), (x,), 4, (torch.full((), 2.0, dtype=F64),))
    torch.testing.assert_close(y, 1 + 2 * x.cumsum(1), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(last, 1 + 2 * x.sum(1), rtol=1e-12, atol=1e-12)


def test_an_export_takes_the_portable_forms_unless_another_is_named(monkeypatch):
    dispatch.backends()
    assert dispatch.choose_backend("linear_attention", dtype=torch.float32, device="cpu").name == "chunked"
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    taken = {op: dispatch.choose_backend(op, dtype=torch.float32, device="cpu") for op in dispatch._BACKENDS}
    no_model_has = {"associative_scan", "attention_with_lse", "s4d_kernel"}
    assert {op for op, backend in taken.items() if not backend.portable} == no_model_has & set(taken)
    assert dispatch.choose_backend("linear_attention", "chunked").name == "chunked"
    packed = dispatch.choose_backend("linear_attention", dtype=torch.float32, device="cpu", varlen=True)
    assert packed.name == "chunked"  # the portable one has no packing


def test_the_forms_that_an_export_takes():
    dispatch.backends()  # imports every operation
    marked = {(op, name) for op, known in dispatch._BACKENDS.items() for name, b in known.items() if b.portable}
    plain = {
        ("agent_attention_plain", "sdpa"),
        *((op, "naive") for op in ("block_sparse", "short_conv", "vq_attention")),
    }
    assert marked - plain == {
        (op, name) for op, known in dispatch._BACKENDS.items() for name in known if name == "portable"
    }
    assert plain < marked and len(marked) == 13


def test_delayed_keeps_the_length():
    x = torch.arange(5.0).view(1, 5)
    assert delayed(x, 2, fill=-1).tolist() == [[-1, -1, 0, 1, 2]]


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("normalize", [True, False])
def test_linear_attention(length, normalize):
    q, k, v = rand(2, length, 2, 5).exp(), rand(2, length, 2, 5).exp(), rand(2, length, 2, 3)
    mask = torch.rand(2, length) > 0.3
    s, z = rand(2, 2, 5, 3), rand(2, 2, 5).exp()

    def run(causal, masked, start):
        def call(backend, q, k, v, s, z):
            return linear_attention(
                q,
                k,
                v,
                causal=causal,
                normalize=normalize,
                scale=0.5,
                key_mask=mask if masked else None,
                initial_state=LinearState(s, z if normalize else None) if start else None,
                return_state=True,
                backend=backend,
            )

        return call

    for causal, masked, start in ((True, False, False), (True, True, True), (False, True, False), (False, False, True)):
        compare(run(causal, masked, start), (q, k, v, s, z))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("form", ["constant", "head", "channel"])
def test_gated_linear_attention(length, form):
    groups = 4 if form == "channel" else 2
    q, k, v = rand(2, length, groups, 5), rand(2, length, groups, 5), rand(2, length, 4, 3)
    shape = {"constant": (4,), "head": (2, length, 4), "channel": (2, length, 4, 5)}[form]
    decay = -torch.rand(*shape, dtype=F64) * 3
    initial = rand(2, 4, 5, 3)
    lengths = torch.tensor([length, max(1, length - 5)])

    def call(backend, q, k, v, decay, initial, start=True):
        given = initial if start else None
        o, state = gated_linear_attention(
            q, k, v, decay, scale=0.3, lengths=lengths, initial_state=given, return_state=True, backend=backend
        )
        real = torch.arange(length) < lengths[:, None]
        return o * real[..., None, None], state

    compare(call, (q, k, v, decay, initial))
    compare(lambda *a: call(*a, initial, start=False), (q, k, v, decay))


@pytest.mark.parametrize("length", LENGTHS)
def test_selective_scan(length):
    u, dt, a = rand(2, length, 3), torch.rand(2, length, 3, dtype=F64), -torch.rand(3, 4, dtype=F64) * 4
    b, c, skip, h = rand(2, length, 4), rand(2, length, 4), rand(3), rand(2, 3, 4)
    lengths = torch.tensor([length, max(1, length - 5)])

    def call(backend, u, dt, a, b, c, skip, h):
        y, last = selective_scan(
            u, dt, a, b, c, skip=skip, lengths=lengths, initial_state=h, return_state=True, backend=backend
        )
        return y * (torch.arange(length) < lengths[:, None])[..., None], last

    compare(call, (u, dt, a, b, c, skip, h))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("truncation", [None, 1, 20])
@pytest.mark.parametrize("both", [False, True])
def test_ema(length, truncation, both):
    x, skip = rand(2, length, 3), rand(3)
    ahead, behind = (
        [t.detach() for t in ema_coefficients(*(p.double() for p in initialize_ema(3, 4)))] for _ in range(2)
    )
    lengths = torch.tensor([length, max(1, length - 5)])

    def call(backend, x, skip, *parts):
        back = Coefficients(*parts[3:]) if both else None
        options = {"skip": skip, "truncation": truncation, "lengths": lengths, "backend": backend}
        y, _ = ema(x, Coefficients(*parts[:3]), back, **options)
        return y * (torch.arange(length) < lengths[:, None])[..., None]

    compare(call, (x, skip, *ahead, *(behind if both else ())))


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("both", [False, True])
def test_s4d_conv(length, both):
    u, skip = rand(2, length, 3), rand(3)
    log_a = torch.complex(-torch.rand(3, 4, dtype=F64), rand(3, 4))
    b, c, back = (torch.complex(rand(3, 4), rand(3, 4)) for _ in range(3))
    lengths = torch.tensor([length, max(1, length - 5)])

    def call(backend, u, skip, log_a, b, c, back):
        return s4d_conv(u, log_a, b, c, skip=skip, c_reverse=back if both else None, lengths=lengths, backend=backend)

    compare(call, (u, skip, log_a, b, c, back))


@pytest.mark.parametrize("length", LENGTHS)
def test_running_agent_attention(length):
    q, k, v, agents = rand(2, length, 2, 4), 3 * rand(2, length, 2, 4), rand(2, length, 2, 3), rand(5, 2, 4)
    lengths = torch.tensor([length, max(1, length - 5)])
    z, num = torch.rand(2, 2, 5, dtype=F64) + 0.1, rand(2, 2, 5, 3)

    def call(backend, q, agents, k, v, z, num, start=True):
        state = RunningState(torch.full_like(z.detach(), 0.5), z, num) if start else None
        o, last = running_agent_attention(
            q, agents, k, v, lengths=lengths, initial_state=state, return_state=True, backend=backend
        )
        return o * (torch.arange(length) < lengths[:, None])[..., None, None], last.z, last.num

    compare(call, (q, agents, k, v, z, num))
    compare(lambda *a: call(*a, z, num, start=False), (q, agents, k, v))


@pytest.mark.parametrize("length", (1, 7, 40))
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_dilated_conv(length, causal, groups):
    x, weight, bias = rand(2, length, 4), rand(4, 4 // groups, 3), rand(4)
    tail = rand(2, 6, 4)
    lengths = torch.tensor([length, max(1, length - 5)])

    def call(backend, x, weight, bias, tail=None):
        options = {"dilation": 3, "causal": causal, "lengths": lengths, "tail": tail}
        return dilated_conv(x, weight, bias, backend=backend, **options)

    compare(call, (x, weight, bias))
    if causal:
        compare(call, (x, weight, bias, tail))


@pytest.mark.parametrize("length", (1, 5, 129, 200))
@pytest.mark.parametrize("window", [(3, 0), (2, 5), (0, 0), (64, 4)])
@pytest.mark.parametrize("masked", [True, False])
def test_attention_within_a_window(length, window, masked):
    q, k, v = rand(2, length, 4, 5), rand(2, length, 2, 5), rand(2, length, 2, 3)
    mask = (torch.rand(2, 1, 1, length) > 0.3) if masked else None

    def call(backend, q, k, v):
        return softmax_attention(q, k, v, window=window, mask=mask, backend=backend)

    compare(call, (q, k, v))


def test_attention_within_a_window_after_a_cache():
    q, k, v = rand(2, 4, 2, 5), rand(2, 9, 2, 5), rand(2, 9, 2, 5)
    compare(lambda backend, *t: softmax_attention(*t, window=(5, 0), backend=backend), (q, k, v))


@pytest.mark.parametrize("length", (1, 20, 150))
@pytest.mark.parametrize("sampling", ["query", "block"])
@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("padded", [True, False])
def test_prob_sparse(length, sampling, masked, padded):
    q, k, v = rand(2, length, 3, 4), rand(2, length, 3, 4), rand(2, length, 3, 5)
    mask = torch.rand(2, length) > 0.3 if padded else None

    def call(backend, q, k, v):
        options = {"sampling": sampling, "masked": masked, "query_mask": mask, "key_mask": mask, "seed": 3}
        return prob_sparse_attention(q, k, v, factor=1, backend=backend, **options)

    compare(call, (q, k, v))
