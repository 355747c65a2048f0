"""The Triton form of gated linear attention against the oracle: interpreted on tiny shapes, compiled on a GPU."""

import pytest
import torch

from seqzoo.kernels import dispatch
from seqzoo.kernels.gated_linear_attention import gated_linear_attention

pytest.importorskip("triton", reason="needs the package triton")
from seqzoo.kernels.gated_linear_attention import fused
from seqzoo.kernels.linear_attention import fused_launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ("constant", "head", "channel")
# Relative to the largest magnitude expected.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def nan_in_fresh_memory():
    """Reads of memory that nobody wrote show up as NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def short_segments(monkeypatch):
    """Rows are split after every chunk, so that states come from the sums of segments."""
    monkeypatch.setattr(fused_launch, "SHORTEST", 1)


def inputs(
    batch,
    length,
    form,
    *,
    heads=2,
    groups=None,
    key=5,
    value=7,
    dtype=torch.float32,
    strength=1.0,
):
    """q, k, v, a log decay in [-strength, 0] and an initial state."""
    groups = heads if groups is None else groups
    shape = {"constant": (heads,), "head": (batch, length, heads), "channel": (batch, length, heads, key)}[form]
    tensors = [torch.randn(batch, length, *rest) for rest in ((groups, key), (groups, key), (heads, value))]
    tensors = [t.to(dtype) for t in tensors] + [-strength * torch.rand(shape)]
    tensors.append(torch.randn(batch, heads, key, value))
    return [t.to(DEVICE).requires_grad_() for t in tensors]


def close(got, want, dtype=torch.float32):
    assert got.shape == want.shape
    if want.numel():
        error, scale = (got.double() - want.double()).abs().max().item(), max(1.0, want.abs().max().item())
        assert error <= TOLERANCE[dtype] * scale, f"error {error:.2e} at a scale of {scale:.2e}"


def check(tensors, *, oracle="naive", tolerance=None, **options):
    """Outputs, the last state and all gradients, with random cotangents, against the oracle in float64."""
    dtype = tensors[0].dtype
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    want = gated_linear_attention(*doubles[:4], initial_state=doubles[4], return_state=True, backend=oracle, **options)
    got = gated_linear_attention(*tensors[:4], initial_state=tensors[4], return_state=True, backend="triton", **options)
    assert got[0].dtype == dtype and got[1].dtype == torch.float32
    cotangents = [torch.randn_like(o) for o in got]
    expected = torch.autograd.grad(want, doubles, [c.double() for c in cotangents])
    found = torch.autograd.grad(got, tensors, cotangents)
    for a, b in zip((*got, *found), (*want, *expected), strict=True):
        close(a, b, dtype if tolerance is None else tolerance)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("batch", "length"), [(2, 1), (1, 21)])
def test_equals_the_oracle(form, batch, length):
    check(inputs(batch, length, form, strength=0.3), scale=0.7)


@pytest.mark.parametrize("form", FORMS)
def test_split_rows_equal_the_oracle(form, short_segments):
    check(inputs(1, 39, form, heads=1, strength=0.3), chunk_size=16)


@pytest.mark.parametrize("form", FORMS)
def test_segments_of_several_chunks(form, monkeypatch):
    monkeypatch.setattr(fused_launch, "SHORTEST", 2)
    check(inputs(1, 50, form, heads=1, strength=0.3), chunk_size=16)


@pytest.mark.parametrize("form", ["head", "channel"])
def test_columns_in_several_blocks(form, short_segments):
    check(inputs(1, 17, form, heads=1, key=70, value=66, strength=0.3), chunk_size=16)


@pytest.mark.parametrize(("groups", "together"), [(1, 16), (2, 1)])
def test_heads_share_the_q_and_k_of_their_group(groups, together, monkeypatch):
    """Whether the gradients of a group are added up in one go or in several."""
    monkeypatch.setattr(fused, "TOGETHER", together)
    check(inputs(1, 9, "head", heads=4, groups=groups, strength=0.3))


def test_without_an_initial_state_and_a_constant_that_learns_nothing():
    q, k, v, g, _ = inputs(1, 20, "constant")
    o, state = gated_linear_attention(q, k, v, g.detach(), backend="triton")
    want, _ = gated_linear_attention(q, k, v, g.detach(), backend="naive")
    assert state is None
    close(o, want)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (o, want)), strict=True):
        close(a, b)


@pytest.mark.parametrize("form", ["head", "channel"])
@pytest.mark.parametrize("decay", [-5.0, float("-inf")])
def test_strong_decay_is_finite_and_right(form, decay, short_segments):
    """exp(-G) would overflow after 88 / 5 tokens. With the strongest, only the token itself is left."""
    tensors = inputs(1, 20, form, heads=1)
    tensors[3] = torch.full_like(tensors[3], max(decay, -100.0)).requires_grad_()
    check(tensors, chunk_size=16)
    q, k, v, g, _ = tensors
    if decay < -100:
        o, _ = gated_linear_attention(q, k, v, torch.full_like(g, decay), backend="triton")
        close(o, (q * k).sum(-1, keepdim=True) * v)


def test_weak_decay_after_strong_keeps_its_digits():
    """In fp32 running sums of some thousands, the small decay of a later token would round away."""
    tensors = inputs(1, 64, "head", heads=1)
    late = torch.arange(64, device=DEVICE)[None, :, None] >= 48
    tensors[3] = torch.where(late, tensors[3].detach() * 0.01, -90.0).requires_grad_()
    check(tensors)


@pytest.mark.parametrize(
    ("dtype", "form"), [(torch.bfloat16, "head"), (torch.bfloat16, "channel"), (torch.float16, "constant")]
)
def test_half_precision(dtype, form, short_segments):
    check(inputs(1, 20, form, heads=1, key=16, value=24, dtype=dtype, strength=0.2), chunk_size=16)


def test_rows_end_at_their_own_length():
    tensors = inputs(3, 9, "head", heads=1)
    lengths = torch.tensor([9, 4, 0], device=DEVICE)
    options = {"lengths": lengths, "initial_state": tensors[4], "return_state": True}
    o, state = gated_linear_attention(*tensors[:4], backend="triton", **options)
    want, want_state = gated_linear_attention(*tensors[:4], backend="naive", **options)
    real = (torch.arange(9, device=DEVICE) < lengths[:, None])[..., None, None]
    close(o * real, want * real)
    close(state, want_state)
    final = torch.randn_like(state)
    got, expected = (
        torch.autograd.grad((a * real).sum() + (s * final).sum(), tensors) for a, s in ((o, state), (want, want_state))
    )
    for a, b in zip(got, expected, strict=True):
        close(a, b)


def test_pieces_equal_the_whole():
    q, k, v, g, _ = inputs(1, 40, "head")
    want, want_state = gated_linear_attention(q, k, v, g, return_state=True, backend="triton")
    state, start, parts = None, 0, []
    for size in (33, 1, 6):
        at = slice(start, start + size)
        pieces = (t[:, at] for t in (q, k, v, g))
        o, state = gated_linear_attention(*pieces, initial_state=state, return_state=True, backend="triton")
        parts.append(o)
        start += size
    close(torch.cat(parts, 1), want)
    close(state, want_state)


@pytest.mark.parametrize("form", ["head", "channel"])
def test_the_past_is_bitwise_independent_of_the_future(form, short_segments):
    q, k, v, g, _ = inputs(1, 33, form, heads=1)
    want, _ = gated_linear_attention(q, k, v, g, chunk_size=16, backend="triton")
    for cut in (7, 16):
        changed = [torch.cat([t[:, :cut], t[:, cut:] + 1e3], 1) for t in (q, k, v)]
        decay = torch.cat([g[:, :cut], g[:, cut:] * 9], 1)
        got, _ = gated_linear_attention(*changed, decay, chunk_size=16, backend="triton")
        assert torch.equal(got[:, :cut], want[:, :cut])
        assert not torch.equal(got[:, cut:], want[:, cut:])


@pytest.mark.parametrize("form", ["head", "channel"])
def test_any_stride(form):
    tensors = inputs(2, 7, form, key=3, value=3)
    turned = [t.detach().transpose(0, 1).contiguous().transpose(0, 1) for t in tensors[:3]]
    turned[0] = tensors[0].detach().transpose(2, 3).contiguous().transpose(2, 3)
    decay = tensors[3].detach()
    turned += [decay.mT.contiguous().mT, tensors[4].detach().mT.contiguous().mT]
    assert not any(t.is_contiguous() for t in turned)
    check([t.requires_grad_() for t in turned])


@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5)])
def test_nothing_in_nothing_out(batch, length):
    tensors = inputs(batch, length, "head")
    options = {"initial_state": tensors[4], "return_state": True, "backend": "triton"}
    o, state = gated_linear_attention(*tensors[:4], **options)
    assert o.shape == (batch, length, 2, 7) and torch.equal(state, tensors[4])
    (o.sum() + state.sum()).backward()
    assert torch.equal(tensors[4].grad, torch.ones_like(state))
    assert all(t.grad.shape == t.shape for t in tensors)


def test_compiles_as_one_graph():
    tensors = inputs(1, 5, "head")

    def run(q, k, v, g, s):
        return gated_linear_attention(q, k, v, g, initial_state=s, return_state=True, backend="triton")

    torch._dynamo.reset()
    got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors), run(*tensors)
    cotangents = [torch.randn_like(o) for o in want]
    gradients = [torch.autograd.grad(o, tensors, cotangents) for o in (got, want)]
    for a, b in zip((*got, *gradients[0]), (*want, *gradients[1]), strict=True):
        close(a, b)


def test_custom_operator_is_registered_right(short_segments):
    """Schema, fake and autograd registration, by torch's own checks."""
    q, k, v, g, s = inputs(1, 20, "head", heads=1)
    g = g.detach().unsqueeze(3).requires_grad_()
    torch.library.opcheck(torch.ops.seqzoo.gated_linear_attention_triton.default, (q, k, v, g, s, 0.7, 16))


def test_refusals(monkeypatch):
    q, k, v, g, _ = inputs(1, 2, "head", key=257, value=3)
    with pytest.raises(ValueError, match="takes key sizes up to 256, not 257"):
        gated_linear_attention(q, k, v, g, backend="triton")
    q, k, v, g, _ = (t.double() for t in inputs(1, 2, "head"))
    with pytest.raises(ValueError, match=r"does not take torch\.float64"):
        gated_linear_attention(q, k, v, g, backend="triton")
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    q, k, v, g, _ = (t.detach().cpu() for t in inputs(1, 2, "head"))
    with pytest.raises(ValueError, match="backend='triton' does not run on cpu; backends that can: chunked"):
        gated_linear_attention(q, k, v, g, backend="triton")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("length", "key", "value"), [(2047, 64, 64), (4096, 128, 128), (2050, 16, 256), (2049, 256, 60), (2048, 80, 97)]
)
def test_full_shapes(dtype, form, length, key, value):
    tensors = inputs(2, length, form, heads=3, key=key, value=value, dtype=dtype, strength=0.1)
    check(tensors, oracle="chunked", scale=key**-0.5)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_full_shapes_with_groups(dtype):
    check(inputs(2, 2100, "head", heads=40, groups=2, key=128, value=64, dtype=dtype, strength=0.1), oracle="chunked")
