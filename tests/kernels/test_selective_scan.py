"""The selective scan: its formula, closed forms, chunks against the oracle with gradients, lengths, states, memory."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.kernels.dispatch import backends, choose_backend
from seqzoo.kernels.selective_scan import chunked as chunked_module
from seqzoo.kernels.selective_scan import compiled as compiled_module
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.kernels.selective_scan.chunked import _backward, _forward, default_chunk

REFUSAL = compiled_module.refusal_here()
COMPILED = pytest.param("compiled", marks=pytest.mark.skipif(REFUSAL is not None, reason=f"compiled {REFUSAL}"))
FAST = ["chunked", COMPILED]
BACKENDS = [*FAST, "naive"]


def inputs(batch, length, channels=5, states=3, dtype=torch.float64, grad=False):
    """u, dt > 0, a < 0, b, c, skip and an initial state."""
    generator = torch.Generator().manual_seed(length)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    tensors = [
        draw(batch, length, channels),
        torch.nn.functional.softplus(draw(batch, length, channels)),
        -draw(channels, states).exp(),
        draw(batch, length, states),
        draw(batch, length, states),
        draw(channels),
        draw(batch, channels, states),
    ]
    return [t.to(dtype).requires_grad_(grad) for t in tensors]


def run(tensors, **options):
    *scan, skip, initial = tensors
    return selective_scan(*scan, skip=skip, initial_state=initial, return_state=True, **options)


def close(got, want, tolerance=1e-12):
    assert got.shape == want.shape
    error = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
    assert error <= tolerance * max(1.0, want.abs().max().item() if want.numel() else 0.0), f"error {error:.2e}"


def gradients(tensors, **options):
    """Of random weights on the outputs and on the final state, for every input."""
    y, h = run(tensors, **options)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(t.shape, dtype=torch.float64, generator=generator).to(t.dtype) for t in (y, h)]
    loss = (y * weights[0]).sum() + (h * weights[1]).sum()
    return [y, h, *torch.autograd.grad(loss, tensors)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_decayed_sum(backend):
    """y_t = sum_{s <= t} (sum_n c_tn b_sn exp(a_n (dt_{s+1} + ... + dt_t))) dt_s u_s + skip u_t, all pairs at once."""
    u, dt, a, b, c, skip, _ = inputs(2, 37)
    y, h = selective_scan(u, dt, a, b, c, skip=skip, return_state=True, backend=backend)
    total = dt.cumsum(1)
    between = (total[:, :, None] - total[:, None]).clamp(min=0)  # (B, t, s, E)
    seen = torch.ones(37, 37, dtype=torch.bool).tril()[None, :, :, None]
    weight = torch.einsum("btn,bsn,btsen->btse", c, b, torch.exp(between[..., None] * a)) * seen
    close(y, torch.einsum("btse,bse->bte", weight, dt * u) + skip * u)
    decay = torch.exp((total[:, -1:] - total)[..., None] * a)
    close(h, torch.einsum("bsen,bse,bsn->ben", decay, dt * u, b))


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize("length", [1, 2, 3, 63, 64, 65, 500])
@pytest.mark.parametrize("chunk_size", [None, 1, 5, 64])
def test_chunks_equal_the_oracle(length, chunk_size, backend):
    tensors = inputs(2, length, grad=True)
    for got, want in zip(
        gradients(tensors, backend=backend, chunk_size=chunk_size), gradients(tensors, backend="naive"), strict=True
    ):
        close(got, want)


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("channels", "states"), [(1, 1), (8, 16), (16, 3), (17, 33), (64, 16)])
def test_any_width(channels, states, backend):
    """Whole and broken vectors of channels, in both precisions."""
    tensors = inputs(2, 20, channels=channels, states=states, grad=True)
    want = gradients(tensors, backend="naive")
    for got, other in zip(gradients(tensors, backend=backend), want, strict=True):
        close(got, other)
    narrow = [t.detach().float().requires_grad_() for t in tensors]
    for got, other in zip(gradients(narrow, backend=backend), want, strict=True):
        close(got, other, 1e-5)


@pytest.mark.parametrize("channels", [5, 1400])  # a step of all rows: below and above 4096 elements
def test_blocks_of_rows(channels, monkeypatch):
    """Rows that do not fit into one buffer go in blocks, the last one smaller."""
    tensors = inputs(5, 9, channels=channels, grad=True)
    want = gradients(tensors, backend="naive")
    monkeypatch.setitem(chunked_module.BUFFER, "cpu", 2 * 4 * channels * 3)
    assert len(chunked_module._blocks(5, 4, channels * 3, "cpu")) == 3
    for got, other in zip(gradients(tensors, backend="chunked", chunk_size=4), want, strict=True):
        close(got, other)


@pytest.mark.skipif(REFUSAL is not None, reason=f"compiled {REFUSAL}")
@pytest.mark.parametrize("batch", [1, 2, 5])
def test_threads_share_rows_and_channels(batch, monkeypatch):
    tensors = inputs(batch, 30, channels=40, grad=True)
    want = gradients(tensors, backend="naive")
    monkeypatch.setattr(compiled_module, "TASK", 1)
    torch.set_num_threads(3)
    try:
        assert compiled_module._split(tensors[0], 3) == (3, min(batch, 3), 3 // min(batch, 3))
        found = gradients(tensors, backend="compiled")
    finally:
        torch.set_num_threads(1)
    for got, other in zip(found, want, strict=True):
        close(got, other)


@pytest.mark.skipif(REFUSAL is not None, reason=f"compiled {REFUSAL}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_compiled_exponential(dtype):
    """The decay of a state of one: near exp everywhere, and exact at the ends of the numbers."""
    ends = torch.tensor([0.0, -1e4, 1e4, torch.inf, -torch.inf, torch.nan])
    step = torch.cat([torch.linspace(-80, 80, 4001), torch.linspace(-1e-3, 1e-3, 101), ends]).to(dtype)
    u, b, one = torch.zeros(1, 1, len(step), dtype=dtype), torch.zeros(1, 1, 1, dtype=dtype), torch.ones_like(step)
    state = one.view(1, -1, 1)
    _, h = selective_scan(
        u, one.view(1, 1, -1), step.view(-1, 1), b, b, initial_state=state, return_state=True, backend="compiled"
    )
    got, want = h.flatten(), step.double().exp()
    bad = ~(torch.isfinite(want) & (want < torch.finfo(dtype).max))
    torch.testing.assert_close(got[bad], step.exp()[bad], equal_nan=True, rtol=0, atol=0)
    error = ((got.double() - want) / want)[~bad & (step > -1e3)].abs()
    near = (step.abs() < 1)[~bad & (step > -1e3)]
    assert error.max() < 80 * torch.finfo(dtype).eps  # the rounding of dt a, 80 at most
    assert error[near].max() < 2 * torch.finfo(dtype).eps


@pytest.mark.skipif(REFUSAL is not None, reason=f"compiled {REFUSAL}")
def test_auto_never_takes_the_compiled_form():
    assert choose_backend("selective_scan", dtype=torch.float32, device="cpu").name == "chunked"


@pytest.mark.parametrize("backend", FAST)
def test_float32_stays_near_float64(backend):
    tensors = inputs(1, 2000, channels=8, states=16, dtype=torch.float32, grad=True)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    for got, want in zip(gradients(tensors, backend=backend), gradients(wide), strict=True):
        assert got.dtype == torch.float32
        close(got, want, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_numeric_gradients(backend):
    tensors = inputs(2, 5, channels=2, states=2, grad=True)
    assert torch.autograd.gradcheck(lambda *t: run(t, backend=backend, chunk_size=2), tensors)


@pytest.mark.parametrize("backend", FAST)
def test_decays_that_underflow_do_no_harm(backend):
    """exp(dt a) = 0: every state is its own input, forwards and backwards."""
    u, _, a, b, c, skip, initial = inputs(1, 40, dtype=torch.float32, grad=True)
    dt = torch.full_like(u, 1e3).requires_grad_()
    a = (a.detach() - 1).requires_grad_()
    found = gradients([u, dt, a, b, c, skip, initial], chunk_size=16, backend=backend)
    assert all(bool(torch.isfinite(t).all()) for t in found)
    close(found[0], 1e3 * u * (b * c).sum(-1, keepdim=True) + skip * u, 1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_lengths(backend):
    """Rows stop at their lengths: outputs before, the state and all gradients are those of the rows alone."""
    tensors = inputs(4, 21, grad=True)
    lengths = torch.tensor([21, 8, 1, 0])
    y, h = run(tensors, lengths=lengths, backend=backend, chunk_size=8)
    real = torch.arange(21) < lengths[:, None]
    weight = torch.randn_like(y)
    got = torch.autograd.grad((y * weight * real[..., None]).sum() + h.sum(), tensors)
    assert all(bool((g[~real] == 0).all()) for g in (got[1], got[4]))  # of dt and c
    loss = 0
    for row, n in enumerate(lengths.tolist()):
        part = [t[row : row + 1, :n] if t.dim() == 3 and t.shape[1] == 21 else t for t in tensors[:6]]
        alone, state = run([*part, tensors[6][row : row + 1]], backend=backend, chunk_size=8)
        close(y[row, :n], alone[0])
        close(h[row], state[0])
        loss = loss + (alone * weight[row, :n]).sum() + state.sum()
    for a, b in zip(got, torch.autograd.grad(loss, tensors), strict=True):
        close(a, b)


@pytest.mark.parametrize("backend", FAST)
def test_a_sequence_in_pieces(backend):
    u, dt, a, b, c, skip, h = inputs(2, 50)
    whole = run((u, dt, a, b, c, skip, h), chunk_size=16, backend=backend)
    parts, start = [], 0
    for size in (20, 1, 1, 28):
        at = slice(start, start + size)
        y, h = run((u[:, at], dt[:, at], a, b[:, at], c[:, at], skip, h), chunk_size=8, backend=backend)
        parts.append(y)
        start += size
    close(torch.cat(parts, 1), whole[0])
    close(h, whole[1])


@pytest.mark.parametrize("backend", FAST)
def test_any_stride_and_an_untouched_input(backend):
    tensors = inputs(2, 30, grad=True)
    want = gradients(tensors, chunk_size=7, backend="naive")

    def framed(t):
        return torch.cat([torch.full_like(t, torch.nan), t], -1)[..., t.shape[-1] :]

    for lay in (lambda t: t.mT.contiguous().mT if t.dim() > 1 else t, framed):
        strided = [lay(t.detach()).requires_grad_() for t in tensors]
        kept = [t.clone() for t in strided]
        for got, other in zip(gradients(strided, chunk_size=7, backend=backend), want, strict=True):
            close(got, other)
        assert all(torch.equal(a, b) for a, b in zip(strided, kept, strict=True))


@pytest.mark.parametrize("backend", FAST)
def test_inputs_and_cotangents_that_are_expanded_or_negated(backend):
    u, dt, a, b, c, _, _ = inputs(2, 30, grad=True)
    _, *others = (t.detach() for t in (u, dt, a, b, c))
    row = others[0][:1].expand(2, -1, -1)
    negated = torch.complex(torch.zeros_like(u), -u).conj().imag  # a real view that carries a negation
    assert negated.is_neg()

    def loss(backend, u):
        return selective_scan(u, row, *others[1:], backend=backend)[0].sum()  # its cotangent has stride 0

    got = torch.autograd.grad(loss(backend, negated), u)[0]
    close(got, torch.autograd.grad(loss("naive", u), u)[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_computed_in_float32(backend):
    tensors = inputs(2, 40, dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, h = run(tensors, backend=backend)
    want, last = run([t.float() for t in tensors], backend=backend)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    close(h, last, 1e-6)
    assert torch.equal(y, want.bfloat16())


@pytest.mark.parametrize("channels", [5, 1400])
@pytest.mark.parametrize("backend", FAST)
def test_the_past_is_bitwise_independent_of_the_future(backend, channels):
    u, dt, a, b, c, _, _ = inputs(2, 70, channels=channels, dtype=torch.float32)
    want, _ = selective_scan(u, dt, a, b, c, chunk_size=16, backend=backend)
    for cut in (1, 15, 16, 17, 40, 69):
        u2, dt2, b2, c2 = (torch.cat([t[:, :cut], t[:, cut:] + 1e3], 1) for t in (u, dt, b, c))
        got, _ = selective_scan(u2, dt2, a, b2, c2, chunk_size=16, backend=backend)
        assert torch.equal(got[:, :cut], want[:, :cut])
        assert not torch.equal(got[:, cut:], want[:, cut:])


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, those inside our custom operators too."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "seqzoo":
            body = {"selective_scan": _forward, "selective_scan_backward": _backward}
            with self:
                return body[function._schema.name.split("::")[1]]._init_fn(*args)
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


def test_memory_is_linear_and_has_no_state_per_token():
    """Nothing as large as (L, E, N); what grows is a state per chunk, at most as large as the input."""
    tensors = inputs(1, 4096, channels=32, states=16, dtype=torch.float32, grad=True)
    with LargestTensor() as seen:
        y, _ = run(tensors)
        y.sum().backward()
    assert 0 < seen.largest <= 1.1 * 4096 * 32  # a chunk's buffers are about as large here
    with LargestTensor() as seen, torch.no_grad():  # positive control: one chunk is (L, E, N)
        run([t[:, :512] if t.dim() == 3 and t.shape[1] == 4096 else t for t in tensors], chunk_size=512)
    assert seen.largest >= 512 * 32 * 16


def test_default_chunks_follow_the_sizes():
    assert default_chunk(4096, 128, 16, "cpu") == 128
    assert default_chunk(4096, 1536, 16, "cpu") == 16  # never so short that states outgrow the inputs
    assert default_chunk(5, 128, 16, "cpu") == 5
    assert default_chunk(4096, 1, 1, "cpu") == 256


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_empty_sequence_keeps_the_state(backend):
    tensors = inputs(2, 0)
    y, h = run(tensors, backend=backend)
    assert y.shape == (2, 0, 5)
    assert torch.equal(h, tensors[6])


@pytest.mark.parametrize("backend", FAST)
@pytest.mark.parametrize(("batch", "length"), [(0, 4), (2, 0)])
def test_nothing_to_scan_has_gradients(batch, length, backend):
    *scan, _, initial = inputs(batch, length, grad=True)
    y, h = selective_scan(*scan, initial_state=initial, return_state=True, backend=backend)
    found = torch.autograd.grad(y.sum() + h.sum(), [*scan, initial])
    assert all(bool((t == 0).all()) for t in found[:-1])
    assert bool((found[-1] == 1).all())


@pytest.mark.parametrize("backend", FAST)
def test_compiles_into_one_graph(backend):
    tensors = inputs(2, 20, grad=True)
    compiled = torch.compile(lambda *t: run(t, backend=backend), fullgraph=True, backend="aot_eager")
    y, h = compiled(*tensors)
    got = torch.autograd.grad(y.sum() + h.sum(), tensors)
    y, h = run(tensors, backend="naive")
    for one, other in zip(got, torch.autograd.grad(y.sum() + h.sum(), tensors), strict=True):
        close(one, other)


@pytest.mark.skipif(REFUSAL is not None, reason=f"compiled {REFUSAL}")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_compiled_operators_are_registered_in_full(dtype):
    *scan, _, initial = inputs(2, 6, dtype=dtype, grad=True)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    operators = torch.ops.seqzoo
    initial = initial.detach().float().requires_grad_()
    torch.library.opcheck(operators.selective_scan_compiled.default, (*scan, initial, 4), test_utils=checks)
    y, saved, last = (t.detach() for t in operators.selective_scan_compiled(*scan, initial, 4))
    given = (y, last, *(t.detach() for t in scan), saved, 4)
    torch.library.opcheck(operators.selective_scan_compiled_backward.default, given, test_utils=checks)


def test_backends_are_registered():
    known = backends()["selective_scan"]
    assert (known["chunked"], known["naive"], known["compiled"]) == ("ok", "ok", REFUSAL or "ok")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"u": torch.zeros(2, 3)}, "must be"),
        ({"dt": torch.zeros(2, 6, 4)}, r"dt \(2, 6, 4\)"),
        ({"a": torch.zeros(3, 5)}, r"a \(3, 5\)"),
        ({"c": torch.zeros(2, 6, 4)}, r"c \(2, 6, 4\)"),
        ({"skip": torch.zeros(3)}, r"skip has shape \(3,\), expected \(5,\)"),
        ({"lengths": torch.zeros(3, dtype=torch.int64)}, r"lengths is torch.int64 \(3,\)"),
        ({"lengths": torch.zeros(2)}, "lengths is torch.float32"),
        ({"initial_state": torch.zeros(2, 3, 5)}, r"initial_state has shape \(2, 3, 5\), expected \(2, 5, 3\)"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"backend": "chunkd"}, "backend='chunkd' is unknown; choose from auto, .*chunked, naive, portable, compiled"),
    ],
)
def test_bad_values_are_refused(change, message):
    names = ("u", "dt", "a", "b", "c")
    given = dict(zip(names, inputs(2, 6, dtype=torch.float32)[:5], strict=True))
    with pytest.raises(ValueError, match=message):
        selective_scan(**{**given, **change})
