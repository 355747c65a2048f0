"""The Triton form of linear attention against the oracle: interpreted on tiny shapes, compiled on a GPU."""

import itertools

import pytest
import torch

from seqzoo.kernels import dispatch
from seqzoo.kernels.linear_attention import LinearState, linear_attention

pytest.importorskip("triton", reason="needs the package triton")
from seqzoo.kernels.linear_attention import fused, fused_launch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
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
    """Rows are split after every chunk of 16 positions, so that states come from the sums of segments."""
    monkeypatch.setattr(fused_launch, "SHORTEST", 1)
    monkeypatch.setattr(fused_launch, "chunk_length", lambda *_: 16)


def inputs(batch, length, *, source=None, heads=2, key=5, value=7, dtype=torch.float32, rows=None):
    """q and k as after a feature map that is positive, v, and an initial state."""
    source, rows = length if source is None else source, batch if rows is None else rows
    tensors = [torch.rand(batch, length, heads, key), torch.rand(batch, source, heads, key)]
    tensors = [t.to(dtype) for t in (*tensors, torch.randn(batch, source, heads, value))]
    tensors += [torch.randn(rows, heads, key, value), 4 * torch.rand(rows, heads, key)]
    return [t.to(DEVICE).requires_grad_() for t in tensors]


def close(got, want, dtype=torch.float32):
    assert got.shape == want.shape
    if want.numel():
        error, scale = (got.double() - want.double()).abs().max().item(), max(1.0, want.abs().max().item())
        assert error <= TOLERANCE[dtype] * scale, f"error {error:.2e} at a scale of {scale:.2e}"


def run(tensors, normalize, backend, **options):
    initial = LinearState(tensors[3], tensors[4] if normalize else None)
    options |= {"normalize": normalize, "initial_state": initial, "return_state": True, "backend": backend}
    o, state = linear_attention(*tensors[:3], **options)
    return [o, state.s, *([state.z] if normalize else [])]


def check(tensors, normalize=True, oracle="naive", **options):
    """Outputs, the last state and all gradients, with random cotangents, against the oracle in float64."""
    dtype, tensors = tensors[0].dtype, tensors if normalize else tensors[:4]
    doubles = [t.detach().double().requires_grad_() for t in tensors]
    want, got = run(doubles, normalize, oracle, **options), run(tensors, normalize, "triton", **options)
    assert [t.dtype for t in got] == [dtype, *[torch.float32] * (len(got) - 1)]
    cotangents = [torch.randn_like(o) for o in got]
    expected = torch.autograd.grad(want, doubles, [c.double() for c in cotangents])
    found = torch.autograd.grad(got, tensors, cotangents)
    for a, b in zip((*got, *found), (*want, *expected), strict=True):
        close(a, b, dtype)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("batch", "length"), [(2, 1), (1, 21)])
def test_equals_the_oracle(causal, normalize, batch, length):
    check(inputs(batch, length), normalize, causal=causal, scale=0.7)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_split_rows_equal_the_oracle(causal, normalize, short_segments):
    check(inputs(1, 39, heads=1), normalize, causal=causal)


@pytest.mark.parametrize("causal", [True, False])
def test_columns_in_several_blocks(causal, short_segments):
    check(inputs(1, 17, heads=1, key=70, value=66), causal=causal)


@pytest.mark.parametrize(("length", "source"), [(3, 39), (39, 3), (5, 0)])
def test_other_keys_than_queries(length, source, short_segments):
    check(inputs(1, length, source=source, heads=1), causal=False)


def test_without_an_initial_state():
    q, k, v, _, _ = inputs(1, 21)
    o, state = linear_attention(q, k, v, causal=True, backend="triton")
    want, _ = linear_attention(q, k, v, causal=True, backend="naive")
    assert state is None
    close(o, want)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (q, k, v)) for x in (o, want)), strict=True):
        close(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
def test_half_precision(dtype, causal, short_segments):
    check(inputs(1, 20, heads=1, key=16, value=24, dtype=dtype), causal=causal)


def test_half_precision_of_large_sums():
    """In float16 a state would end at 65504, and dO / den lose its digits."""
    q, k, v, s, z = inputs(1, 20, heads=1, dtype=torch.float16)
    tensors = [q, k, v, *((t.detach() * 1e6).requires_grad_() for t in (s, z))]
    check(tensors, causal=True)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
def test_packed_equals_separate(causal, normalize, short_segments):
    lengths = [3, 0, 20, 1, 33]
    bounds = [0, *itertools.accumulate(lengths)]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    check(inputs(1, bounds[-1], heads=1, rows=5), normalize, causal=causal, cu_seqlens=cu_seqlens)


@pytest.mark.parametrize("bounds", [[0, 3, 2, 5], [1, 5], [0, 4]])
def test_bad_bounds_are_refused(bounds):
    q, k, v, _, _ = inputs(1, 5)
    with pytest.raises(ValueError, match="must rise from 0 to the length of the packed row, 5"):
        linear_attention(q, k, v, causal=True, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), backend="triton")


def test_packed_sequences_take_a_segment_more_each_at_most(short_segments):
    """Whatever their bounds: what memory is taken for holds them all, and grows with their number alone."""
    for bounds in ([0, 100], [0, 1, 2, 100], [0, 33, 66, 100], [0, 0, 99, 100]):
        found = fused_launch.plan_packed(bounds, torch.device("cpu"), 2, 16, 100, 16)
        assert found.total <= found.segments == 100 // found.size + len(bounds) - 1


def test_masked_keys_are_absent():
    q, k, v, _, _ = inputs(2, 12)
    mask = torch.zeros(2, 12, dtype=torch.bool, device=DEVICE)
    mask[0, :7] = True
    o, _ = linear_attention(q, k, v, causal=True, key_mask=mask, backend="triton")
    want, _ = linear_attention(q[:1, :7], k[:1, :7], v[:1, :7], causal=True, backend="triton")
    close(o[:1, :7], want)
    assert torch.equal(o[1], torch.zeros_like(o[1]))


def test_pieces_equal_the_whole():
    q, k, v, _, _ = inputs(1, 40)
    want, want_state = linear_attention(q, k, v, causal=True, return_state=True, backend="triton")
    state, start, parts = None, 0, []
    for size in (33, 1, 6):
        at = slice(start, start + size)
        options = {"causal": True, "initial_state": state, "return_state": True, "backend": "triton"}
        o, state = linear_attention(q[:, at], k[:, at], v[:, at], **options)
        parts.append(o)
        start += size
    close(torch.cat(parts, 1), want)
    for a, b in zip(state, want_state, strict=True):
        close(a, b)


def test_the_past_is_bitwise_independent_of_the_future(short_segments):
    q, k, v, _, _ = inputs(1, 40, heads=1)
    want, _ = linear_attention(q, k, v, causal=True, backend="triton")
    for cut in (1, 16, 25):
        changed = [torch.cat([t[:, :cut], t[:, cut:] + 1e3], 1) for t in (q, k, v)]
        got, _ = linear_attention(*changed, causal=True, backend="triton")
        assert torch.equal(got[:, :cut], want[:, :cut])
        assert not torch.equal(got[:, cut:], want[:, cut:])


@pytest.mark.parametrize("causal", [True, False])
def test_any_stride(causal):
    q, k, v, s, z = (t.detach() for t in inputs(2, 7, key=3, value=3))
    turned = [t.transpose(0, 1).contiguous().transpose(0, 1) for t in (q, k, v)]
    turned[0] = q.transpose(2, 3).contiguous().transpose(2, 3)
    turned += [s.mT.contiguous().mT, z.mT.contiguous().mT]
    assert not any(t.is_contiguous() for t in turned)
    check([t.requires_grad_() for t in turned], causal=causal)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("batch", "length"), [(2, 0), (0, 5)])
def test_nothing_in_nothing_out(causal, batch, length):
    tensors = inputs(batch, length)
    o, s, z = run(tensors, True, "triton", causal=causal)
    assert o.shape == (batch, length, 2, 7)
    assert torch.equal(s, tensors[3]) and torch.equal(z, tensors[4])
    (o.sum() + s.sum() + z.sum()).backward()
    assert all(t.grad.shape == t.shape for t in tensors)


@pytest.mark.parametrize("packed", [False, True])
def test_compiles_as_one_graph(packed):
    tensors = inputs(1, 9, heads=1, rows=2 if packed else 1)
    cu_seqlens = torch.tensor([0, 4, 9], dtype=torch.int32, device=DEVICE) if packed else None

    def function(*tensors):
        return run(tensors, True, "triton", causal=True, cu_seqlens=cu_seqlens)

    torch._dynamo.reset()
    got, want = torch.compile(function, fullgraph=True, backend="aot_eager")(*tensors), function(*tensors)
    cotangents = [torch.randn_like(o) for o in want]
    gradients = [torch.autograd.grad(o, tensors, cotangents) for o in (got, want)]
    for a, b in zip((*got, *gradients[0]), (*want, *gradients[1]), strict=True):
        close(a, b)


def test_custom_operator_is_registered_right(short_segments):
    """Schema, fake and autograd registration, by torch's own checks."""
    arguments = (*inputs(1, 20, heads=1), None, True, True, 1e-6, 0.7)
    torch.library.opcheck(fused._forward, arguments)


def test_refusals(monkeypatch):
    q, k, v, _, _ = inputs(1, 2, value=257)
    with pytest.raises(ValueError, match="takes value sizes up to 256, not 257"):
        linear_attention(q, k, v, causal=True, backend="triton")
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    q, k, v, _, _ = (t.detach().cpu() for t in inputs(1, 2))
    with pytest.raises(ValueError, match="backend='triton' does not run on cpu; backends that can: chunked"):
        linear_attention(q, k, v, causal=True, backend="triton")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(
    ("length", "key", "value"), [(2047, 64, 64), (4096, 128, 128), (2050, 16, 256), (2049, 256, 60), (2048, 80, 97)]
)
def test_full_shapes(dtype, causal, normalize, length, key, value):
    check(inputs(2, length, heads=3, key=key, value=value, dtype=dtype), normalize, "chunked", causal=causal)


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("causal", [True, False])
def test_full_shapes_packed(dtype, causal):
    bounds = [0, 5, 5, 700, 701, 3000, 4096]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=DEVICE)
    tensors = inputs(1, 4096, heads=4, key=64, value=128, dtype=dtype, rows=6)
    check(tensors, oracle="chunked", causal=causal, cu_seqlens=cu_seqlens)
