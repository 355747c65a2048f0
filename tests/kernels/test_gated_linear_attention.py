"""The gated linear attention kernel against the dense formula, its oracle, numeric gradients and fla's code."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.kernels.gated_linear_attention import (
    bidirectional_gated_linear_attention,
    chunked,
    gated_linear_attention,
)
from seqzoo.kernels.linear_attention import linear_attention

BACKENDS = ("chunked", "naive")
FORMS = ("constant", "head", "channel")
# Relative to the largest magnitude expected: sums in fp64, sums in fp32, outputs rounded to half precision.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Reads of memory that nobody wrote show up as NaN."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def inputs(
    batch,
    length,
    form="channel",
    *,
    heads=2,
    groups=None,
    key=3,
    value=4,
    dtype=torch.float64,
    strength=1.0,
    grad=False,
):
    """q, k, v and a log decay in [-strength, 0]."""
    groups = heads if groups is None else groups
    shape = {"constant": (heads,), "head": (batch, length, heads), "channel": (batch, length, heads, key)}[form]
    tensors = [torch.randn(batch, length, *rest) for rest in ((groups, key), (groups, key), (heads, value))]
    return [t.to(dtype).requires_grad_(grad) for t in (*tensors, -strength * torch.rand(shape))]


def close(got, want, dtype=torch.float64):
    error = (got.double() - want.double()).abs().max().item() if want.numel() else 0.0
    scale = max(1.0, want.abs().max().item()) if want.numel() else 1.0
    assert got.shape == want.shape
    assert error <= TOLERANCE[dtype] * scale, f"error {error:.2e} at a scale of {scale:.2e}"


def sums(log_decay, batch, length, heads, key):
    """The running sum of the log decay, (B, L, H, K)."""
    g = log_decay.reshape(*log_decay.shape, *[1] * (log_decay.dim() < 4)) if log_decay.dim() > 1 else log_decay[:, None]
    return g.expand(batch, length, heads, key).cumsum(1)


def dense(q, k, v, log_decay, *, scale=1.0, initial=None, both=False):
    """o = (Q K^T, each product times the decay between its tokens) V, with everything in memory; and the state."""
    batch, length, heads, _ = v.shape
    q, k = (t.repeat_interleave(heads // t.shape[2], 2) for t in (q, k))
    total = sums(log_decay, batch, length, heads, q.shape[3])
    between = (total[:, :, None] - total[:, None]).exp()  # (B, L, L, H, K)
    index = torch.arange(length)
    weights = torch.where((index[:, None] >= index)[:, :, None, None], between, torch.zeros(()))
    if both:  # s > t: the decay of t .. s-1
        shifted = torch.cat([torch.zeros_like(total[:, :1]), total[:, :-1]], 1)
        after = (shifted[:, None] - shifted[:, :, None]).exp()
        weights = torch.where((index[:, None] < index)[:, :, None, None], after, weights)
    a = torch.einsum("brhk,bshk,brshk->bhrs", q, k, weights)
    o = torch.einsum("bhrs,bshv->brhv", a, v)
    state = torch.einsum("bshk,bshv,bshk->bhkv", k, v, (total[:, -1:] - total).exp())
    if initial is not None:
        o = o + torch.einsum("brhk,bhkv->brhv", q * total.exp(), initial)
        state = state + total[:, -1, :, :, None].exp() * initial
    return scale * o, state


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 150])
def test_equals_the_dense_formula(backend, form, length):
    q, k, v, g = inputs(2, length, form, strength=0.3)
    for initial in (None, torch.randn(2, 2, 3, 4).double()):
        options = {"initial_state": initial, "return_state": True, "backend": backend}
        o, state = gated_linear_attention(q, k, v, g, scale=0.7, **options)
        want, want_state = dense(q, k, v, g, scale=0.7, initial=initial)
        close(o, want)
        close(state, want_state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["constant", "head"])
@pytest.mark.parametrize("groups", [1, 2, 3])
def test_heads_share_the_q_and_k_of_their_group(backend, form, groups):
    q, k, v, g = inputs(2, 45, form, heads=6, groups=groups, strength=0.3)
    options = {"return_state": True, "backend": backend, "initial_state": torch.randn(2, 6, 3, 4).double()}
    o, state = gated_linear_attention(q, k, v, g, **options)
    want, want_state = dense(q, k, v, g, initial=options["initial_state"])
    close(o, want)
    close(state, want_state)


@pytest.mark.parametrize("form", FORMS)
def test_gradients(form):
    """Of every input and the initial state, through outputs and the final state: numeric, and the oracle's."""
    heads, groups = (2, 2) if form == "channel" else (4, 2)
    tensors = [*inputs(2, 7, form, heads=heads, groups=groups, key=2, value=3, grad=True)]
    tensors.append(torch.randn(2, heads, 2, 3).double().requires_grad_())

    def run(backend, chunk=None):
        def function(q, k, v, g, s):
            options = {"scale": 0.7, "initial_state": s, "return_state": True}
            return gated_linear_attention(q, k, v, g, chunk_size=chunk, backend=backend, **options)

        return function

    assert torch.autograd.gradcheck(run("naive"), tensors, fast_mode=True)
    assert torch.autograd.gradcheck(run("chunked", 4), tensors, fast_mode=True)
    outputs = run("naive")(*tensors)
    cotangents = [torch.randn_like(o) for o in outputs]
    want = torch.autograd.grad(outputs, tensors, cotangents)
    for chunk in (1, 4, 64):
        for got, expected in zip(
            torch.autograd.grad(run("chunked", chunk)(*tensors), tensors, cotangents), want, strict=True
        ):
            close(got, expected)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strength", [0.1, 10.0, 150.0])
@pytest.mark.parametrize(("length", "key", "value"), [(65, 60, 64), (150, 16, 5)])
def test_gradients_over_chunks(form, strength, length, key, value):
    tensors = inputs(2, length, form, key=key, value=value, strength=strength, grad=True)
    outputs = [gated_linear_attention(*tensors, return_state=True, backend=b) for b in ("naive", "chunked")]
    cotangents = [torch.randn_like(o) for o in outputs[0]]
    want, got = (torch.autograd.grad(o, tensors, cotangents) for o in outputs)
    for a, b in zip(got, want, strict=True):
        close(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("length", "key", "value"), [(1, 60, 40), (63, 64, 40), (64, 60, 64), (65, 64, 60), (500, 60, 64)]
)
def test_single_precision_on_the_grid(form, length, key, value):
    """Outputs, last state and all gradients, of inputs in any stride, against the oracle in float64."""
    *tensors, g = inputs(1, length, form, key=key, value=value, dtype=torch.float32, strength=0.1)
    tensors = [t.transpose(1, 3).contiguous().transpose(1, 3).requires_grad_() for t in tensors]
    tensors += [g.requires_grad_(), torch.randn(1, 2, value, key).mT.requires_grad_()]
    assert length == 1 or not any(t.is_contiguous() for t in (*tensors[:3], tensors[4]))
    doubles = [t.detach().double().requires_grad_() for t in tensors]

    def run(tensors, backend):
        return gated_linear_attention(
            *tensors[:4], scale=0.3, initial_state=tensors[4], return_state=True, backend=backend
        )

    outputs, want = run(tensors, "chunked"), run(doubles, "naive")
    cotangents = [torch.randn(o.shape) for o in outputs]
    gradients = torch.autograd.grad(outputs, tensors, cotangents)
    expected = torch.autograd.grad(want, doubles, [c.double() for c in cotangents])
    for a, b in zip((*outputs, *gradients), (*want, *expected), strict=True):
        close(a, b, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("rows", "groups", "length", "chunk"), [(40, 2, 21, None), (3, 1, 5, None), (1, 1, 16, 16), (1, 2, 70, None)]
)
def test_states_that_matter_and_that_do_not(form, rows, groups, length, chunk):
    """Given or not, wanted or not, in a single chunk and in several."""
    groups = 2 if form == "channel" else groups
    tensors = inputs(rows, length, form, groups=groups, strength=0.3, grad=True)
    weight, final = torch.randn(rows, length, 2, 4).double(), torch.randn(rows, 2, 3, 4).double()
    for initial in (None, torch.randn(rows, 2, 3, 4).double()):
        for wanted in (False, True):
            results = []
            for backend in BACKENDS:
                options = {"initial_state": initial, "return_state": wanted, "chunk_size": chunk, "backend": backend}
                o, state = gated_linear_attention(*tensors, **options)
                assert (state is not None) == wanted
                objective = (o * weight).sum() + ((state * final).sum() if wanted else 0)
                results.append((o, *torch.autograd.grad(objective, tensors)))
            for a, b in zip(*results, strict=True):
                close(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_a_state_that_nobody_wants_is_not_made(form):
    tensors = inputs(4, 8, form, key=32, value=32, dtype=torch.float32, grad=True)
    state = 4 * 2 * 32 * 32
    with LargestTensor() as seen:
        gated_linear_attention(*tensors)[0].sum().backward()
    assert 0 < seen.largest < state
    with LargestTensor() as control:
        gated_linear_attention(*tensors, return_state=True)
    assert control.largest >= state


@pytest.mark.parametrize("form", FORMS)
def test_slow_decay_does_not_gather_rounding_errors(form):
    """exp(g) rounded to float32 counts once per token, and always alike: over 3000 tokens 5e-5 of the output."""
    candidates = -torch.linspace(1e-4, 2e-4, 300)
    error = candidates.exp().double() / candidates.double().exp() - 1
    slow = candidates[error.argmax()]
    q, k, v, g = inputs(1, 3000, form, dtype=torch.float32)
    q, k, v, g = q.abs(), k.abs(), v.abs(), torch.full_like(g, slow.item())
    o, state = gated_linear_attention(q, k, v, g, return_state=True)
    want, want_state = gated_linear_attention(*(t.double() for t in (q, k, v, g)), return_state=True, backend="naive")
    close(o, want, torch.float32)
    close(state, want_state, torch.float32)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("span", [1, 300])
def test_spans_of_any_size(form, span, monkeypatch):
    """Blocks of batch rows and spans of chunks do not show."""
    tensors = inputs(5, 90, form, grad=True)
    outputs = gated_linear_attention(*tensors, return_state=True, chunk_size=8)
    cotangents = [torch.randn_like(o) for o in outputs]
    want = torch.autograd.grad(outputs, tensors, cotangents)
    monkeypatch.setitem(chunked.SPAN, "cpu", span * 8)
    again = gated_linear_attention(*tensors, return_state=True, chunk_size=8)
    for a, b in zip((*again, *torch.autograd.grad(again, tensors, cotangents)), (*outputs, *want), strict=True):
        close(a, b)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("decay", [-5.0, -50.0, -1e30, float("-inf")])
def test_strong_decay_is_finite_and_right_in_single_precision(form, decay):
    """exp(-G) would overflow after 88 / 5 tokens. With the strongest, only the token itself is left."""
    q, k, v, g = inputs(2, 130, form, key=8, value=8, dtype=torch.float32)
    g = torch.full_like(g, decay).requires_grad_()
    tensors = [q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), g]
    o, state = gated_linear_attention(*tensors, return_state=True)
    want, want_state = gated_linear_attention(*(t.double() for t in tensors), return_state=True, backend="naive")
    close(o, want, torch.float32)
    close(state, want_state, torch.float32)
    if decay <= -50:
        close(o, (q * k).sum(-1, keepdim=True) * v, torch.float32)
    for gradient in torch.autograd.grad(o.square().sum() + state.sum(), tensors):
        assert torch.isfinite(gradient).all()


@pytest.mark.parametrize("form", ["head", "channel"])
def test_weak_decay_after_strong_keeps_its_digits(form):
    """In fp32 running sums of some thousands, the small decay of a later token would round away."""
    q, k, v, g = inputs(1, 64, form, key=8, value=8, dtype=torch.float32)
    g = torch.where(torch.arange(64).reshape(1, 64, *[1] * (g.dim() - 2)) < 32, torch.tensor(-90.0), g * 0.01)
    tensors = [t.detach().requires_grad_() for t in (q, k, v, g)]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    o, _ = gated_linear_attention(*tensors, chunk_size=64)
    want, _ = gated_linear_attention(*doubles, backend="naive")
    close(o, want, torch.float32)
    cotangent = torch.randn_like(o)
    for a, b in zip(
        torch.autograd.grad(o, tensors, cotangent),
        torch.autograd.grad(want, doubles, cotangent.double()),
        strict=True,
    ):
        close(a, b, torch.float32)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_rows_end_at_their_own_length(backend, form):
    tensors = inputs(4, 70, form, grad=True)
    lengths = torch.tensor([70, 33, 1, 0])
    initial = torch.randn(4, 2, 3, 4).double()
    options = {"return_state": True, "backend": backend}
    o, state = gated_linear_attention(*tensors, lengths=lengths, initial_state=initial, **options)
    weight, final = torch.randn_like(o), torch.randn_like(state)
    real = (torch.arange(70) < lengths[:, None])[..., None, None]
    got = torch.autograd.grad((o * weight * real).sum() + (state * final).sum(), tensors)
    objective = 0.0
    for row, n in enumerate(lengths.tolist()):
        part = [t if t.dim() == 1 else t[row : row + 1, :n] for t in tensors]
        one, last = gated_linear_attention(*part, initial_state=initial[row : row + 1], **options)
        close(o[row : row + 1, :n], one)
        close(state[row : row + 1], last)
        objective = objective + (one * weight[row : row + 1, :n]).sum() + (last * final[row : row + 1]).sum()
    for a, b in zip(got, torch.autograd.grad(objective, tensors), strict=True):
        close(a, b)


@pytest.mark.parametrize("form", FORMS)
def test_pieces_equal_the_whole(form):
    q, k, v, g = inputs(2, 140, form)
    want, want_state = gated_linear_attention(q, k, v, g, return_state=True)
    state, start, parts = None, 0, []
    for size in (100, 1, 1, 38):
        at = slice(start, start + size)
        piece = g if g.dim() == 1 else g[:, at]
        o, state = gated_linear_attention(q[:, at], k[:, at], v[:, at], piece, initial_state=state, return_state=True)
        parts.append(o)
        start += size
    close(torch.cat(parts, 1), want)
    close(state, want_state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_precisions(dtype, form):
    """The same rounded inputs in fp64 through the oracle; sums are in fp32 whatever comes in."""
    q, k, v, g = inputs(2, 130, form, key=16, value=24, dtype=dtype, strength=0.2)
    tensors = [t.detach().requires_grad_() for t in (q, k, v, g)]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    o, state = gated_linear_attention(*tensors, return_state=True)
    want, want_state = gated_linear_attention(*doubles, return_state=True, backend="naive")
    assert o.dtype == dtype and state.dtype == torch.float32
    close(o, want, dtype)
    close(state, want_state, torch.float32)
    cotangent = torch.randn_like(o)
    got = torch.autograd.grad(o, tensors, cotangent)
    for gradient, oracle in zip(got, torch.autograd.grad(want, doubles, cotangent.double()), strict=True):
        assert gradient.dtype == dtype
        close(gradient, oracle, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_autocast_does_not_reach_the_sums(backend, form):
    tensors = inputs(2, 70, form, dtype=torch.float32, grad=True)

    def run(enabled):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            o, state = gated_linear_attention(*tensors, return_state=True, backend=backend)
            return (o, state, *torch.autograd.grad(o.sum() + state.sum(), tensors))

    for a, b in zip(run(True), run(False), strict=True):
        assert a.dtype == torch.float32 and torch.equal(a, b)


def test_a_decay_in_single_precision_beside_inputs_in_half():
    q, k, v, g = inputs(1, 20, "head", dtype=torch.bfloat16)
    g = g.float().requires_grad_()
    o, _ = gated_linear_attention(q, k, v, g)
    (gradient,) = torch.autograd.grad(o.float().sum(), g)
    assert o.dtype == torch.bfloat16 and gradient.dtype == torch.float32 and gradient.any()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5)])
def test_nothing_in_nothing_out(backend, form, batch, length):
    tensors = inputs(batch, length, form, grad=True)
    initial = torch.rand(batch, 2, 3, 4).double()
    o, state = gated_linear_attention(*tensors, initial_state=initial, return_state=True, backend=backend)
    assert o.shape == (batch, length, 2, 4) and torch.equal(state, initial)
    if backend == "chunked":  # a loop over nothing has no gradient to give
        (o.sum() + state.sum()).backward()
        assert all(t.grad.shape == t.shape for t in tensors)


@pytest.mark.parametrize("form", FORMS)
def test_any_stride_and_the_state_passed_in_is_left_alone(form):
    q, k, v, g = inputs(2, 50, form, heads=3, key=3, value=3)
    initial = torch.randn(2, 3, 3, 3).double()
    kept = initial.clone()
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
    turned[0] = q.transpose(2, 3).contiguous().transpose(2, 3)
    assert not any(t.is_contiguous() for t in turned)
    o, state = gated_linear_attention(*turned, g, initial_state=initial.mT.contiguous().mT, return_state=True)
    want, want_state = gated_linear_attention(q, k, v, g, initial_state=initial, return_state=True)
    close(o, want)
    close(state, want_state)
    assert torch.equal(initial, kept)


@pytest.mark.parametrize("form", ["constant", "channel"])
def test_compiles_as_one_graph(form):
    tensors = inputs(2, 70, form, grad=True)

    def run(q, k, v, g):
        return gated_linear_attention(q, k, v, g, lengths=torch.tensor([70, 3]), return_state=True)

    torch._dynamo.reset()
    got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors), run(*tensors)
    cotangents = [torch.randn_like(o) for o in want]
    gradients = [torch.autograd.grad(o, tensors, cotangents) for o in (got, want)]
    for a, b in zip((*got, *gradients[0]), (*want, *gradients[1]), strict=True):
        close(a, b)


@pytest.mark.parametrize(("form", "decays"), [("constant", False), ("channel", True)])
def test_custom_operator_is_registered_right(form, decays):
    """Schema, fake and autograd registration, by torch's own checks."""
    q, k, v, g = inputs(2, 9, form, grad=True)
    g = g.detach().reshape(g.shape if form == "channel" else (1, 1, 2, 1)).requires_grad_(decays)
    first, keep = (torch.rand(2, 2, 3, 1, 4).double().requires_grad_(), True) if decays else (None, False)
    torch.library.opcheck(torch.ops.seqzoo.gated_linear_attention.default, (q, k, v, g, first, 0.7, 4, keep))


def test_second_derivatives_by_the_oracle_only():
    tensors = inputs(1, 3, heads=1, key=2, value=2, grad=True)
    assert torch.autograd.gradgradcheck(lambda *t: gated_linear_attention(*t, backend="naive")[0], tensors)
    o, _ = gated_linear_attention(*tensors)
    (gradient,) = torch.autograd.grad(o.square().sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match="no autograd formula"):
        gradient.sum().backward()


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns, those inside our custom operators too."""

    largest = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "seqzoo":
            body = {"gated_linear_attention": chunked._forward, "gated_linear_attention_backward": chunked._backward}
            with self:
                return body[function._schema.name.split("::")[1]]._init_fn(*args)
        out = function(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else [out]:
            if isinstance(t, torch.Tensor):
                self.largest = max(self.largest, t.untyped_storage().nbytes() // t.element_size())
        return out


@pytest.mark.parametrize("form", FORMS)
def test_memory_is_linear_in_the_length(form):
    """At L = 4096 no tensor is larger than the inputs: neither (L, K, V) nor (L, L) nor (L, C, K)."""
    tensors = inputs(1, 4096, form, key=16, value=16, dtype=torch.float32, grad=True)
    with LargestTensor() as seen:
        gated_linear_attention(*tensors)[0].sum().backward()
    assert 0 < seen.largest <= tensors[0].numel()
    with LargestTensor() as control, torch.no_grad():
        dense(*(t if t.dim() == 1 else t[:, :64] for t in tensors))
    assert control.largest >= 64 * 64 * 2 * 16  # the watcher sees what the dense formula holds


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("rows", "length"), [(1, 130), (2, 130), (2, 21)])
def test_the_past_is_bitwise_independent_of_the_future(form, rows, length):
    q, k, v, g = inputs(rows, length, form, dtype=torch.float32)
    want, _ = gated_linear_attention(q, k, v, g)
    for cut in (n for n in (1, 15, 16, 20, 31, 32, 63, 64, 65, 129) if n < length):
        changed = [torch.cat([t[:, :cut], t[:, cut:] + 1e3], 1) for t in (q, k, v)]
        later = g if g.dim() == 1 else torch.cat([g[:, :cut], g[:, cut:] * 30], 1)
        got, _ = gated_linear_attention(*changed, later)
        assert torch.equal(got[:, :cut], want[:, :cut])
        assert not torch.equal(got[:, cut:], want[:, cut:])


@pytest.mark.parametrize("form", FORMS)
def test_without_decay_it_is_linear_attention(form):
    q, k, v, g = inputs(2, 100, form)
    o, state = gated_linear_attention(q, k, v, torch.zeros_like(g), scale=0.5, return_state=True)
    want, want_state = linear_attention(q, k, v, causal=True, normalize=False, scale=0.5, return_state=True)
    close(o, want)
    close(state, want_state.s)


def test_the_three_forms_agree_where_they_overlap():
    q, k, v, g = inputs(2, 100, "constant", strength=0.3)
    want, state = gated_linear_attention(q, k, v, g, return_state=True)
    for wider in (g.expand(2, 100, 2), g[:, None].expand(2, 100, 2, 3)):
        o, again = gated_linear_attention(q, k, v, wider, return_state=True)
        close(o, want)
        close(again, state)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
def test_both_directions_equal_the_dense_formula(backend, form):
    groups = 1 if form == "head" else None
    q, k, v, g = inputs(3, 70, form, groups=groups, strength=0.3)
    want, _ = dense(q, k, v, g, scale=0.7, both=True)
    close(bidirectional_gated_linear_attention(q, k, v, g, scale=0.7, backend=backend), want)
    lengths = torch.tensor([70, 41, 0])
    o = bidirectional_gated_linear_attention(q, k, v, g, lengths=lengths, backend=backend)
    part, _ = dense(*(t if t.dim() == 1 else t[1:2, :41] for t in (q, k, v, g)), both=True)
    close(o[1:2, :41], part)


def test_matches_flash_linear_attention():
    gla = pytest.importorskip("fla.ops.gla.naive", reason="flash-linear-attention is not installed")
    simple = pytest.importorskip("fla.ops.simple_gla.naive", reason="flash-linear-attention is not installed")
    q, k, v, g = inputs(2, 100, key=16, value=24, dtype=torch.float32)
    initial = torch.randn(2, 2, 16, 24)
    options = {"initial_state": initial, "return_state": True, "scale": 16**-0.5}
    for got, want in zip(
        gated_linear_attention(q, k, v, g, **options),
        gla.naive_recurrent_gla(q, k, v, g, initial_state=initial, output_final_state=True),
        strict=True,
    ):
        close(got, want, torch.float32)
    want = simple.naive_recurrent_simple_gla(q, k, v, g[..., 0], initial_state=initial)
    for got, expected in zip(gated_linear_attention(q, k, v, g[..., 0], **options), want, strict=True):
        close(got, expected, torch.float32)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": (2, 5, 2, 4)}, "do not fit"),
        ({"v": (2, 4, 2, 4)}, "do not fit"),
        ({"q": (2, 5, 6)}, "do not fit"),
        ({"v": torch.zeros(2, 5, 2, 4, dtype=torch.bfloat16)}, "must share a dtype"),
        ({"v": (2, 5, 3, 4), "g": (3,)}, "2 groups of q and k must divide the 3 heads"),
        ({"g": (5,)}, r"log_decay is torch.float32 \(5,\)"),
        ({"g": torch.zeros(2, dtype=torch.int64)}, "log_decay is torch.int64"),
        ({"v": (2, 5, 4, 4), "g": (2, 5, 4, 3)}, "needs q and k per head, 4, they have 2 groups"),
        ({"lengths": torch.ones(3, dtype=torch.int64)}, r"lengths is torch.int64 \(3,\)"),
        ({"initial_state": torch.zeros(1, 2, 3, 4)}, "initial_state has shape"),
        ({"chunk_size": 48}, "chunk_size=48 must be a power of two, for example 64"),
        ({"backend": "fast"}, "choose from auto, .*chunked, naive"),
    ],
)
def test_refusals(change, message):
    arguments = {"q": (2, 5, 2, 3), "k": (2, 5, 2, 3), "v": (2, 5, 2, 4), "g": (2, 5, 2)} | change
    q, k, v, g = (torch.zeros(t) if isinstance(t, tuple) else t for t in map(arguments.pop, "qkvg"))
    with pytest.raises(ValueError, match=message):
        gated_linear_attention(q, k, v, g, **arguments)


@pytest.mark.parametrize("form", ["head", "key"])
def test_what_follows_comes_through_the_padding_as_it_is(form):
    """Both directions: the state from behind meets the last real token first, whatever the row is filled up with."""
    draw = lambda *shape: torch.randn(*shape, dtype=torch.float64)  # noqa: E731
    q, k, v, behind = draw(2, 6, 2, 3), draw(2, 6, 2, 3), draw(2, 6, 2, 4), draw(2, 2, 3, 4)
    g = -draw(2, 6, 2, *([3] if form == "key" else [])).exp()
    got = bidirectional_gated_linear_attention(q, k, v, g, lengths=torch.tensor([4, 4]), behind=behind)
    want = bidirectional_gated_linear_attention(*(t[:, :4] for t in (q, k, v, g)), behind=behind)
    torch.testing.assert_close(got[:, :4], want, rtol=1e-12, atol=1e-12)
