"""The linear attention kernel against a loop over positions, its oracle and numeric gradients."""

import itertools

import pytest
import torch
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.kernels.linear_attention import LinearState, linear_attention
from seqzoo.kernels.linear_attention.chunked import _backward, _forward, chunked_linear_attention

BACKENDS = ("chunked", "naive")
# Relative to the largest magnitude expected: sums in fp64, sums in fp32, outputs rounded to half precision.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Reads of memory that nobody wrote show up as NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(batch, length, source=None, heads=2, key=3, value=4, dtype=torch.float64, grad=False):
    """Positive q and k, as after a feature map, and v."""
    shapes = (length, key), (source or length, key), (source or length, value)
    q, k, v = (torch.randn(batch, n, heads, width, dtype=torch.float64) for n, width in shapes)
    return [t.to(dtype).requires_grad_(grad) for t in (q.exp(), k.exp(), v)]


def close(got, want, dtype=torch.float64):
    error = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    assert got.shape == want.shape
    assert error <= TOLERANCE[dtype] * scale, f"error {error:.2e} at a scale of {scale:.2e}"


def by_loop(q, k, v, *, normalize=True, eps=1e-6, scale=1.0, initial=None):
    """The recurrence, one position at a time: S += k v^T, z += k, o = q S / (q z + eps)."""
    s = q.new_zeros(q.shape[0], q.shape[2], q.shape[3], v.shape[3])
    z = q.new_zeros(q.shape[0], q.shape[2], q.shape[3])
    if initial is not None:
        s, z = initial.s, initial.z if normalize else z
    rows = []
    for n in range(q.shape[1]):
        s = s + k[:, n, :, :, None] * v[:, n, :, None, :]
        z = z + k[:, n]
        o = scale * (q[:, n, :, :, None] * s).sum(-2)
        rows.append(o / (scale * (q[:, n] * z).sum(-1, keepdim=True) + eps) if normalize else o)
    return torch.stack(rows, 1), LinearState(s, z if normalize else None)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 200])
@pytest.mark.parametrize("normalize", [True, False])
def test_causal_equals_the_recurrence(backend, length, normalize):
    q, k, v = inputs(2, length)
    initial = LinearState(torch.randn(2, 2, 3, 4).double(), torch.rand(2, 2, 3).double() if normalize else None)
    for start in (None, initial):
        options = {"normalize": normalize, "eps": 1e-3, "scale": 0.7}
        o, state = linear_attention(
            q, k, v, causal=True, initial_state=start, return_state=True, backend=backend, **options
        )
        want, want_state = by_loop(q, k, v, initial=start, **options)
        close(o, want)
        close(state.s, want_state.s)
        assert (state.z is None) == (not normalize)
        if normalize:
            close(state.z, want_state.z)


@pytest.mark.parametrize("backend", BACKENDS)
def test_not_causal_equals_two_products(backend):
    q, k, v = inputs(2, 7, 130)
    o, state = linear_attention(q, k, v, causal=False, eps=1e-3, return_state=True, backend=backend)
    s, z = torch.einsum("bshk,bshv->bhkv", k, v), k.sum(1)
    close(state.s, s)
    close(state.z, z)
    den = torch.einsum("blhk,bhk->blh", q, z) + 1e-3
    close(o, torch.einsum("blhk,bhkv->blhv", q, s) / den[..., None])
    halves = linear_attention(q, k[:, :50], v[:, :50], causal=False, return_state=True, backend=backend)[1]
    again, _ = linear_attention(q, k[:, 50:], v[:, 50:], causal=False, eps=1e-3, initial_state=halves)
    close(again, o)


def objective(function, tensors, cotangents):
    outputs = function(*tensors)
    return torch.autograd.grad(sum((o * c).sum() for o, c in zip(outputs, cotangents, strict=True)), tensors)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients(causal, normalize, packed):
    """Of q, k, v and the initial state, through outputs and the final state: numeric, and the oracle's."""
    q, k, v = inputs(1 if packed else 2, 7, key=2, value=3, grad=True)
    rows, cu_seqlens = (3, torch.tensor([0, 3, 3, 7], dtype=torch.int32)) if packed else (2, None)
    s = torch.randn(rows, 2, 2, 3, dtype=torch.float64, requires_grad=True)
    z = torch.rand(rows, 2, 2, dtype=torch.float64, requires_grad=True)
    tensors = (q, k, v, s, z) if normalize else (q, k, v, s)

    def run(chunk=None):
        def function(q, k, v, s, z=None):
            options = {"causal": causal, "normalize": normalize, "scale": 0.7, "cu_seqlens": cu_seqlens}
            if chunk is None:
                o, state = linear_attention(
                    q, k, v, initial_state=LinearState(s, z), return_state=True, backend="naive", **options
                )
            else:
                o, state = chunked_linear_attention(q, k, v, LinearState(s, z), eps=1e-6, chunk=chunk, **options)
            return tuple(t for t in (o, *state) if t is not None)

        return function

    assert torch.autograd.gradcheck(run(4), tensors)
    cotangents = [torch.randn_like(o) for o in run()(*tensors)]
    want = objective(run(), tensors, cotangents)
    for chunk in (1, 4, 64):
        for got, expected in zip(objective(run(chunk), tensors, cotangents), want, strict=True):
            close(got, expected)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("length", "key", "value"), [(1, 60, 40), (63, 64, 40), (64, 60, 64), (65, 64, 60), (500, 60, 64)]
)
def test_single_precision_on_the_grid(normalize, length, key, value):
    """Outputs, last state and all gradients, of inputs in any stride, against the oracle in float64."""
    tensors = [
        t.transpose(1, 3).contiguous().transpose(1, 3).requires_grad_()
        for t in inputs(1, length, key=key, value=value, dtype=torch.float32)
    ]
    tensors.append(torch.randn(1, 2, value, key).mT.requires_grad_())
    if normalize:
        tensors.append(torch.rand(1, 2, key).requires_grad_())
    doubles = [t.detach().double().requires_grad_() for t in tensors]

    def run(q, k, v, s, z=None, *, backend):
        options = {"causal": True, "normalize": normalize, "scale": 0.3, "return_state": True, "backend": backend}
        o, state = linear_attention(q, k, v, initial_state=LinearState(s, z), **options)
        return [t for t in (o, *state) if t is not None]

    outputs, want = run(*tensors, backend="chunked"), run(*doubles, backend="naive")
    cotangents = [torch.randn(o.shape) for o in outputs]
    gradients = torch.autograd.grad(outputs, tensors, cotangents)
    expected = torch.autograd.grad(want, doubles, [c.double() for c in cotangents])
    for a, b in zip((*outputs, *gradients), (*want, *expected), strict=True):
        close(a, b, torch.float32)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("rows", "length"), [(1, 21), (3, 21), (1, 70)])
def test_states_that_matter_and_that_do_not(normalize, rows, length):
    """Wanted or not, in a single chunk and in several."""
    tensors = inputs(rows, length, grad=True)
    weight, final = torch.randn(rows, length, 2, 4).double(), torch.randn(rows, 2, 3, 4).double()
    for wanted in (False, True):
        results = []
        for backend in BACKENDS:
            options = {"causal": True, "normalize": normalize, "return_state": wanted, "backend": backend}
            o, state = linear_attention(*tensors, **options)
            assert (state is not None) == wanted
            objective = (o * weight).sum() + ((state.s * final).sum() if wanted else 0)
            results.append((o, *torch.autograd.grad(objective, tensors)))
        for a, b in zip(*results, strict=True):
            close(a, b)


def test_a_state_that_nobody_wants_is_not_made():
    tensors = inputs(4, 8, key=32, value=32, dtype=torch.float32, grad=True)
    state = 4 * 2 * 32 * 32
    with LargestTensor() as seen:
        linear_attention(*tensors, causal=True)[0].sum().backward()
    assert 0 < seen.largest < state
    with LargestTensor() as control:
        linear_attention(*tensors, causal=True, return_state=True)
    assert control.largest >= state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "key", "value"), [(63, 60, 64), (65, 16, 5), (150, 64, 60)])
def test_precisions(dtype, causal, length, key, value):
    """The same rounded inputs in fp64 through the oracle; sums are in fp32 whatever comes in."""
    tensors = inputs(2, length, key=key, value=value, dtype=dtype, grad=True)
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    cotangent = torch.randn(2, length, 2, value, dtype=torch.float64).to(dtype)
    o, state = linear_attention(*tensors, causal=causal, return_state=True)
    want, want_state = linear_attention(*doubles, causal=causal, return_state=True, backend="naive")
    assert o.dtype == dtype and state.s.dtype == state.z.dtype == torch.float32
    close(o, want, dtype)
    close(state.s, want_state.s, torch.float32)
    close(state.z, want_state.z, torch.float32)
    got = torch.autograd.grad(o, tensors, cotangent)
    expected = torch.autograd.grad(want, doubles, cotangent.double())
    for gradient, oracle in zip(got, expected, strict=True):
        assert gradient.dtype == dtype
        close(gradient, oracle, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_autocast_does_not_reach_the_sums(backend, causal):
    q, k, v = inputs(2, 70, dtype=torch.float32, grad=True)

    def run(enabled):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            o, state = linear_attention(q, k, v, causal=causal, return_state=True, backend=backend)
        return (o, *state, *torch.autograd.grad(o.sum() + state.s.sum(), (q, k, v)))

    for a, b in zip(run(True), run(False), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_packed_equals_separate(backend, causal):
    lengths = [5, 0, 70, 1, 64]
    bounds = [0, *itertools.accumulate(lengths)]
    q, k, v = inputs(1, bounds[-1], grad=True)
    initial = LinearState(torch.randn(5, 2, 3, 4).double(), torch.rand(5, 2, 3).double())
    cotangent, final = torch.randn(1, bounds[-1], 2, 4).double(), torch.randn(5, 2, 3, 4).double()
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    options = {"causal": causal, "return_state": True, "backend": backend}
    o, state = linear_attention(q, k, v, cu_seqlens=cu_seqlens, initial_state=initial, **options)
    got = torch.autograd.grad((o * cotangent).sum() + (state.s * final).sum(), (q, k, v))
    outputs, states, objective = [], [], 0.0
    for n, (a, b) in enumerate(itertools.pairwise(bounds)):
        part, part_state = linear_attention(
            *(t[:, a:b] for t in (q, k, v)),
            initial_state=LinearState(*(t[n : n + 1] for t in initial)),
            **options,
        )
        outputs.append(part)
        states.append(part_state)
        objective = objective + (part * cotangent[:, a:b]).sum() + (part_state.s * final[n]).sum()
    close(o, torch.cat(outputs, 1))
    close(state.s, torch.cat([s.s for s in states]))
    close(state.z, torch.cat([s.z for s in states]))
    for gradient, want in zip(got, torch.autograd.grad(objective, (q, k, v)), strict=True):
        close(gradient, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_masked_keys_are_absent(backend, causal):
    """Padded rows, on the left or the right, give what the unpadded ones do; no key at all gives zeros."""
    q, k, v = inputs(3, 80)
    mask = torch.zeros(3, 80, dtype=torch.bool)
    mask[0, :50], mask[1, 30:] = True, True
    o, state = linear_attention(q, k, v, causal=causal, key_mask=mask, return_state=True, backend=backend)
    for row, at in ((0, slice(0, 50)), (1, slice(30, 80))):
        parts = (t[row : row + 1, at] for t in (q, k, v))
        want, want_state = linear_attention(*parts, causal=causal, return_state=True, backend=backend)
        close(o[row : row + 1, at], want)
        close(state.s[row : row + 1], want_state.s)
        close(state.z[row : row + 1], want_state.z)
    assert torch.equal(o[2], torch.zeros_like(o[2]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5)])
def test_nothing_in_nothing_out(backend, causal, batch, length):
    q, k, v = (torch.rand(batch, length, 2, width, requires_grad=True) for width in (3, 3, 4))
    initial = LinearState(torch.rand(batch, 2, 3, 4), torch.rand(batch, 2, 3))
    o, state = linear_attention(q, k, v, causal=causal, initial_state=initial, return_state=True, backend=backend)
    assert o.shape == (batch, length, 2, 4)
    assert torch.equal(state.s, initial.s) and torch.equal(state.z, initial.z)
    (o.sum() + state.s.sum()).backward()
    assert q.grad.shape == q.shape


@pytest.mark.parametrize("causal", [True, False])
def test_strides_and_blocks_of_batch_rows(causal):
    """Any stride, and more rows than go through the loop at once."""
    q, k, v = (t.transpose(0, 1)[:, ::2].permute(0, 1, 3, 2) for t in inputs(150, 50, heads=2, key=3, value=3))
    assert not q.is_contiguous()
    o, state = linear_attention(q, k, v, causal=causal, return_state=True)
    want, want_state = linear_attention(q, k, v, causal=causal, return_state=True, backend="naive")
    close(o, want)
    close(state.s, want_state.s)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    cotangent = torch.randn(1, 1, 3, 2).double().expand_as(o)
    got, want = (
        torch.autograd.grad(linear_attention(*leaves, causal=causal, backend=b)[0], leaves, cotangent) for b in BACKENDS
    )
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("causal", [True, False])
def test_a_state_of_any_stride(causal):
    q, k, v = inputs(2, 70)
    initial = LinearState(torch.randn(2, 2, 3, 4).double().transpose(0, 1).requires_grad_(), None)
    options = {"causal": causal, "normalize": False, "initial_state": initial, "return_state": True}
    outputs = []
    for backend in BACKENDS:
        o, state = linear_attention(q, k, v, backend=backend, **options)
        outputs.append((o, state.s, torch.autograd.grad(o.square().sum() + state.s.sum(), initial.s)[0]))
    for got, want in zip(*outputs, strict=True):
        close(got, want)


def test_the_state_passed_in_is_left_alone():
    q, k, v = inputs(1, 5)
    initial = LinearState(torch.rand(1, 2, 3, 4).double(), torch.rand(1, 2, 3).double())
    kept = [t.clone() for t in initial]
    linear_attention(q, k, v, causal=True, initial_state=initial, return_state=True)
    linear_attention(q, k, v, causal=True, initial_state=LinearState(initial.s, None), normalize=False)
    assert torch.equal(initial.s, kept[0]) and torch.equal(initial.z, kept[1])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_compiles_as_one_graph(causal, packed):
    cu_seqlens = torch.tensor([0, 30, 70], dtype=torch.int32) if packed else None
    q, k, v = inputs(1, 70, grad=True)

    def run(q, k, v):
        o, state = linear_attention(q, k, v, causal=causal, cu_seqlens=cu_seqlens, return_state=True)
        return o, *state

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want, got = run(q, k, v), compiled(q, k, v)
    cotangents = [torch.randn_like(o) for o in want]
    for a, b in zip(got, want, strict=True):
        close(a, b)
    for a, b in zip(objective(compiled, (q, k, v), cotangents), objective(run, (q, k, v), cotangents), strict=True):
        close(a, b)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_custom_operator_is_registered_right(causal, normalize):
    """Schema, fake and autograd registration, by torch's own checks."""
    q, k, v = inputs(2, 9, grad=True)
    joint = torch.rand(2, 2, 3, 4 + normalize, dtype=torch.float64, requires_grad=True)
    start, keep = (joint, True) if normalize else (None, False)
    arguments = (q, k, v, start, None, causal, normalize, 1e-6, 0.7, 4, keep)
    torch.library.opcheck(torch.ops.seqzoo.linear_attention.default, arguments)


def test_second_derivatives_by_the_oracle_only():
    tensors = inputs(1, 3, heads=1, key=2, value=2, grad=True)
    assert torch.autograd.gradgradcheck(
        lambda q, k, v: linear_attention(q, k, v, causal=True, backend="naive")[0], tensors
    )
    o, _ = linear_attention(*tensors, causal=True)
    (gradient,) = torch.autograd.grad(o.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, those inside our custom operators too."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "seqzoo":
            body = {"linear_attention": _forward, "linear_attention_backward": _backward}
            with self:
                return body[function._schema.name.split("::")[1]]._init_fn(*args)
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("causal", [True, False])
def test_memory_is_linear_in_the_length(causal):
    """At L = 4096 no tensor is larger than the inputs: neither (L, K, V) nor (L, L)."""
    q, k, v = inputs(1, 4096, heads=2, key=16, value=16, dtype=torch.float32, grad=True)
    with LargestTensor() as seen:
        o, _ = linear_attention(q, k, v, causal=causal)
        o.sum().backward()
    assert 0 < seen.largest <= q.numel()
    with LargestTensor() as dense, torch.no_grad():
        linear_attention(q[:, :256], k[:, :256], v[:, :256], causal=causal, backend="naive")
    assert dense.largest >= 2 * 256 * 256  # positive control: the watcher sees the L x L matrix


def test_the_past_is_bitwise_independent_of_the_future():
    q, k, v = inputs(2, 130, dtype=torch.float32)
    want, _ = linear_attention(q, k, v, causal=True)
    for cut in (1, 63, 64, 65, 129):
        changed = [torch.cat([t[:, :cut], t[:, cut:] + 1e3], 1) for t in (q, k, v)]
        got, _ = linear_attention(*changed, causal=True)
        assert torch.equal(got[:, :cut], want[:, :cut])
        assert not torch.equal(got[:, cut:], want[:, cut:])


def test_matches_flash_linear_attention():
    naive = pytest.importorskip("fla.ops.linear_attn.naive")
    q, k, v = inputs(2, 128, key=16, value=16, dtype=torch.float32)
    want = naive.naive_chunk_linear_attn(q, k, v, scale=1.0, normalize=True)
    assert_close(linear_attention(q, k, v, causal=True, eps=1e-10)[0], want, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 5, 2, 4)}, "do not fit"),
        ({"v": (2, 4, 2, 4)}, "do not fit"),
        ({"q": (2, 5, 6)}, r"must be \(B, L, H, K\)"),
        ({"k": (2, 4, 2, 3), "v": (2, 4, 2, 4)}, "needs S = L"),
        ({"v": torch.zeros(2, 5, 2, 4, dtype=torch.bfloat16)}, "must share a dtype"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"key_mask": torch.ones(2, 5)}, "key_mask is torch.float32"),
        ({"key_mask": torch.ones(2, 4, dtype=torch.bool)}, "key_mask"),
        ({"cu_seqlens": torch.tensor([0, 5], dtype=torch.int32)}, "one packed row, B = 2"),
        ({"initial_state": LinearState(torch.zeros(1, 2, 3, 4), torch.zeros(2, 2, 3))}, "initial_state"),
        ({"initial_state": LinearState(torch.zeros(2, 2, 3, 4), None)}, "initial_state"),
        ({"backend": "fast"}, "choose from auto, .*chunked, naive"),
    ],
)
def test_refusals(change, message):
    arguments = {"q": (2, 5, 2, 3), "k": (2, 5, 2, 3), "v": (2, 5, 2, 4), "causal": True} | change
    q, k, v = (torch.zeros(t) if isinstance(t, tuple) else t for t in map(arguments.pop, "qkv"))
    with pytest.raises(ValueError, match=message):
        linear_attention(q, k, v, **arguments)


@pytest.mark.parametrize("bounds", [[0, 3, 2, 5], [1, 5], [0, 4]])
def test_bad_bounds_are_refused(bounds):
    tensors = inputs(1, 5)
    with pytest.raises(ValueError, match="must rise from 0 to the length of the packed row, 5"):
        linear_attention(*tensors, causal=True, cu_seqlens=torch.tensor(bounds, dtype=torch.int32))
