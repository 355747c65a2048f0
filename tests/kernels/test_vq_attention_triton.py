"""VQ attention in Triton, forwards and backwards: interpreted on tiny shapes here, and on a GPU on real ones."""

import pytest
import torch

pytest.importorskip("triton", reason="needs the package triton")

from seqzoo.kernels import dispatch
from seqzoo.kernels.vq_attention import VQState, empty_state, fused, fused_launch, vq_attention

interpreted = pytest.mark.skipif(torch.cuda.is_available(), reason="compiled here: see the tests marked gpu")
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-2}
FLOATING = ("q", "k", "v", "bias")


def draw(
    length, chunk, causal, *, codes=5, key=12, value=6, heads=2, batch=2, bias=False, lengths=False,
    source=None, dtype=torch.float32, device="cpu", seed=0,
):  # fmt: skip
    """Arguments by name; codebook and codes such that the exact keys are codewords."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    source = source or length
    code = torch.randint(codes, (batch, source, heads), generator=generator).to(device)
    codebook = normal(heads, codes, key)
    return {
        "q": normal(batch, length, heads, key),
        "k": None if chunk is None else codebook[torch.arange(heads, device=device), code],
        "v": normal(batch, source, heads, value),
        "code": code,
        "codebook": codebook,
        "bias": normal(heads, 2 * chunk if causal else 4 * chunk - 1) if bias else None,
        "lengths": torch.tensor([source // 3, source][-batch:], device=device) if lengths else None,
        "chunk_size": chunk,
        "causal": causal,
        "scale": key**-0.5,
    }


def exact(x):
    return x.double() if isinstance(x, torch.Tensor) and x.is_floating_point() else x


def close(got, want, dtype):
    assert got.shape == want.shape
    if want.numel():
        bound = TOLERANCE[dtype] * max(1.0, want.abs().max().item())
        torch.testing.assert_close(got.double(), want.double(), atol=bound, rtol=0)


def real_part(o, given):
    """Zero where a query lies beyond the end of its row: those are arbitrary."""
    if given["lengths"] is None or given["chunk_size"] is None:
        return o
    at = torch.arange(o.shape[1], device=o.device)
    return o.masked_fill((at >= given["lengths"][:, None])[..., None, None], 0)


def differentiated(given, backend):
    """o and the gradients of all floating arguments, for a random cotangent."""
    given = dict(given)
    names = [name for name in FLOATING if given[name] is not None]
    for name in names:
        given[name] = given[name].detach().requires_grad_()
    o, state = vq_attention(**given, backend=backend)
    assert state is None
    o = real_part(o, given)
    cotangent = torch.randn(o.shape, generator=torch.Generator().manual_seed(1)).to(o)
    return o, torch.autograd.grad(o, [given[name] for name in names], cotangent)


def equals_naive(given, oracle="naive"):
    dtype = given["v"].dtype
    o, gradients = differentiated(given, "triton")
    want, expected = differentiated({name: exact(t) for name, t in given.items()}, oracle)
    assert o.dtype == dtype
    close(o, want, dtype)
    for got, gradient in zip(gradients, expected, strict=True):
        assert got.dtype == dtype
        close(got, gradient, dtype)


# More blocks than a group of them, with a partial last one; groups of one; blocks of one; one block.
SHAPES = [(18, 4, 9), (11, 3, 3), (6, 1, 4), (5, 9, 5)]


@interpreted
@pytest.mark.parametrize(("length", "chunk", "codes"), SHAPES)
@pytest.mark.parametrize("causal", [False, True])
def test_equals_the_formula_with_gradients(causal, length, chunk, codes):
    equals_naive(draw(length, chunk, causal, codes=codes, bias=True, heads=1, batch=1))


@interpreted
@pytest.mark.parametrize("causal", [False, True])
def test_rows_and_heads_of_their_own(causal):
    """Two rows of two heads, one row shorter: the bias has a gradient from both."""
    equals_naive(draw(5, 2, causal, codes=2, bias=True, lengths=True))


@interpreted
def test_without_a_bias():
    equals_naive(draw(7, 2, True, codes=2, heads=1, batch=1))


@interpreted
@pytest.mark.parametrize("causal", [False, True])
def test_blocks_of_several_tiles(causal, monkeypatch):
    """Wide values make tiles of 16; blocks of 20 then take two, and the bias sums over more than one split."""
    monkeypatch.setattr(fused_launch, "SPLIT", 1)
    equals_naive(draw(41, 17, causal, codes=17, value=130, bias=True, heads=1, batch=1))


@interpreted
def test_wide_keys():
    equals_naive(draw(18, 17, True, codes=3, key=130, value=3, bias=True, heads=1, batch=1))


@interpreted
@pytest.mark.parametrize("lengths", [False, True])
def test_without_a_window(lengths, monkeypatch):
    monkeypatch.setattr(fused_launch, "SEGMENT", 16)
    equals_naive(draw(35, None, False, source=40, lengths=lengths, heads=1))


@interpreted
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype):
    equals_naive(draw(12, 3, True, codes=3, dtype=dtype, key=16, bias=True, heads=1, batch=1))


@interpreted
def test_any_stride_and_what_lies_behind_the_keys():
    given = draw(10, 4, False, codes=4, lengths=True, bias=True, heads=1)  # a row that ends within a block
    strided = dict(given)
    for name in ("q", "k", "v", "code", "codebook", "bias"):
        strided[name] = torch.stack((given[name], given[name]), -1)[..., 0]
        assert not strided[name].is_contiguous()
    for name in ("v", "k"):
        strided[name][0, int(given["lengths"][0]) :] = float("nan")
    got, want = (differentiated(x, "triton") for x in (strided, given))
    assert torch.equal(got[0], want[0])
    for a, b in zip(got[1], want[1], strict=True):
        assert torch.equal(a, b)


@interpreted
def test_a_row_without_keys_is_zero():
    given = draw(3, 2, False, bias=True, heads=1)
    given["lengths"] = torch.tensor([0, 3])
    leaves = [given[name].requires_grad_() for name in FLOATING]
    o, _ = vq_attention(**given, backend="triton")
    assert (o[0] == 0).all() and (o[1] != 0).any()
    for gradient in torch.autograd.grad(o.sum() + o[0].square().sum(), leaves)[:3]:
        assert (gradient[0] == 0).all() and (gradient[1] != 0).any()


@interpreted
def test_the_past_keeps_its_bits():
    given = draw(24, 3, True, codes=3, batch=1, heads=1)
    later = {name: t.clone() if isinstance(t, torch.Tensor) else t for name, t in given.items()}
    for name in ("q", "k", "v"):
        later[name][:, 13:] *= 1e3
    later["code"][:, 13:] = 0
    got, want = (vq_attention(**x, backend="triton")[0] for x in (later, given))
    assert torch.equal(got[:, :13], want[:, :13]) and not torch.equal(got[:, 13:], want[:, 13:])


def streamed(given, state, sizes, lengths, backend):
    """Outputs, the last state and the gradients of everything, of a stream cut into `sizes`. lengths: of each piece,
    or None."""
    given = dict(given)
    leaves = [given[name].detach().requires_grad_() for name in FLOATING]
    given.update(zip(FLOATING, leaves, strict=True))
    cells = [t.detach().requires_grad_() for t in state[:4]]
    state, start, outputs = VQState(*cells, *state[4:]), 0, []
    for step, size in enumerate(sizes):
        at = slice(start, start + size)
        piece = {name: given[name][:, at] for name in ("q", "k", "v", "code")}
        piece["lengths"] = None if lengths is None else lengths[step]
        o, state = vq_attention(**{**given, **piece}, initial_state=state, return_state=True, backend=backend)
        outputs.append(real_part(o, {**given, **piece}))
        start += size
    results = [*outputs, *state[:4]]
    generator = torch.Generator().manual_seed(2)
    cotangents = [torch.randn(t.shape, generator=generator).to(t) for t in results]
    return results, state, torch.autograd.grad(results, [*leaves, *cells], cotangents)


def warm_state(given, tokens, backend="chunked"):
    """The state after rows of `tokens`, with something in every cell."""
    heads, codes, key = given["codebook"].shape
    batch, _, _, value = given["v"].shape
    chunk, device = given["chunk_size"], given["v"].device
    shape = batch, chunk, codes, heads, key, value
    state = empty_state(*shape, device=device, dtype=given["v"].dtype)
    if max(tokens) == 0:
        return state
    sizes = {"codes": codes, "key": key, "value": value, "heads": heads, "batch": batch}
    past = draw(max(tokens), chunk, True, dtype=given["v"].dtype, device=device, seed=3, **sizes)
    past.update(codebook=given["codebook"], lengths=torch.tensor(tokens, device=device))
    _, state = vq_attention(**past, initial_state=state, return_state=True, backend=backend)
    more = torch.randn(state.mean.shape, generator=torch.Generator().manual_seed(4)).to(state.mean)
    return state._replace(number=state.number + 2, mean=state.mean + more)


def streams_equal(given, tokens, sizes, lengths=None, oracle="naive"):
    dtype = given["v"].dtype
    state = warm_state(given, tokens)
    got, last, gradients = streamed(given, state, sizes, lengths, "triton")
    wide = VQState(*(exact(t) for t in state))
    want, want_last, expected = streamed({n: exact(t) for n, t in given.items()}, wide, sizes, lengths, oracle)
    assert torch.equal(last.code, want_last.code) and torch.equal(last.length, want_last.length)
    assert last.number.dtype == last.mean.dtype == torch.float32 and last.v.dtype == dtype
    # The gradient of an empty cell's number is the logarithm's, which is nothing in the oracle.
    names = ("q", "k", "v", "bias", "number", "mean", "state k", "state v")
    for a, b in zip(got, want, strict=True):
        close(a, b, dtype)
    for name, a, b in zip(names, gradients, expected, strict=True):
        if name != "number" or max(tokens):
            close(a, b, dtype)


# After nothing, within the first block, and rows at different places of theirs; several groups of blocks in one piece.
@interpreted
@pytest.mark.parametrize(
    ("chunk", "codes", "tokens", "sizes"),
    [(3, 3, [0], [10]), (4, 5, [2], [1, 5]), (3, 4, [7, 11], [7]), (1, 2, [3], [3, 1]), (8, 4, [9], [2])],
)
def test_a_stream_equals_the_formula_with_gradients(chunk, codes, tokens, sizes, monkeypatch):
    monkeypatch.setattr(fused, "SEGMENT", 8)
    given = draw(sum(sizes), chunk, True, codes=codes, bias=True, heads=1, batch=len(tokens))
    streams_equal(given, tokens, sizes)


@interpreted
def test_rows_of_a_stream_advance_by_their_own_lengths():
    given = draw(6, 3, True, codes=3, bias=True, heads=1)
    streams_equal(given, [4, 8], [4, 2], lengths=[torch.tensor([4, 0]), torch.tensor([1, 2])])


@interpreted
def test_a_stream_in_half_precision():
    given = draw(5, 3, True, codes=3, bias=True, heads=2, batch=1, dtype=torch.bfloat16)
    streams_equal(given, [5], [5])


@interpreted
def test_compiles_into_one_graph():
    """Forwards and backwards, from the first token and after a state."""
    given = draw(3, 3, True, bias=True, batch=1, heads=1, codes=3)
    start = warm_state(given, [4])
    leaves = [given[name].requires_grad_() for name in FLOATING] + [start.mean.requires_grad_()]

    def run(q, k, v, bias, mean):
        piece = {**given, "q": q, "k": k, "v": v, "bias": bias, "backend": "triton"}
        fresh, _ = vq_attention(**piece)
        o, last = vq_attention(**piece, initial_state=start._replace(mean=mean), return_state=True)
        return torch.cat([t.flatten() for t in (fresh, o, last.mean, last.k)])

    torch._dynamo.reset()
    got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves), run(*leaves)
    torch.testing.assert_close(got, want, atol=0, rtol=0)
    cotangent = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(o, leaves, cotangent) for o in (got, want)), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0)


@interpreted
@pytest.mark.parametrize("form", ["causal", "no window", "state"])
def test_operators_are_registered_right(form):
    """Schema, fake and autograd registration, by torch's own checks."""
    chunk, causal = None if form == "no window" else 2, form in ("causal", "state")
    given = draw(2, chunk, causal, codes=3, heads=1, batch=1, bias=form == "causal")
    q, k, v, code, book = (given[name] for name in ("q", "k", "v", "code", "codebook"))
    places, cells = torch.tensor([[0, 0, 2]]), (None, None)
    if form == "state":
        state = warm_state(given, [4])
        k, v, code = torch.cat((state.k, k), 1), torch.cat((state.v, v), 1), torch.cat((state.code, code), 1)
        places, cells = torch.tensor([[1, 0, 4]]), (state.number.requires_grad_(), state.mean.requires_grad_())
        torch.library.opcheck(torch.ops.seqzoo.vq_cells_triton.default, (v.requires_grad_(), code, places, 3))
    leaves = [None if t is None else t.detach().requires_grad_() for t in (q, k, v, given["bias"])]
    arguments = *leaves[:3], code, book, leaves[3], places, *cells, chunk, causal, 0.7
    torch.library.opcheck(torch.ops.seqzoo.vq_attention_triton.default, arguments)


def test_what_it_can_do_is_taken_and_the_rest_refused(monkeypatch):
    monkeypatch.setattr(dispatch, "interpreted", lambda: True)
    needs = {"state": True, "lengths": True, "window": True, "gradient": True}
    choice = dispatch.choose_backend("vq_attention", dtype=torch.bfloat16, device="cuda", sizes={"key": 256}, **needs)
    assert choice.name == "triton"
    given = draw(4, 3, True, key=257)
    with pytest.raises(ValueError, match="takes key sizes up to 256, not 257; backends that can: chunked, naive"):
        vq_attention(**given, backend="triton")
    given = {name: exact(t) for name, t in draw(4, 3, True).items()}
    with pytest.raises(ValueError, match=r"does not take torch\.float64"):
        vq_attention(**given, backend="triton")
    monkeypatch.setattr(dispatch, "interpreted", lambda: False)
    with pytest.raises(ValueError, match="backend='triton' does not run on cpu; backends that can: chunked"):
        vq_attention(**draw(4, 3, True), backend="triton")


def test_the_codebook_gets_no_gradient():
    given = draw(6, 2, True, codes=3, heads=1, batch=1)
    given["codebook"].requires_grad_()
    given["v"].requires_grad_()
    o, _ = vq_attention(**given, backend="triton")
    assert torch.autograd.grad(o.sum(), given["codebook"], allow_unused=True) == (None,)


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    ("length", "chunk", "codes", "key", "value"),
    [(4096, 64, 256, 32, 128), (2100, 50, 300, 65, 60), (2048, 512, 512, 128, 256), (2049, 16, 64, 16, 17)],
)
def test_equals_the_formula_on_a_gpu(length, chunk, codes, key, value, causal, dtype, everything):
    sizes = {"codes": codes, "key": key, "value": value}
    given = draw(length, chunk, causal, dtype=dtype, bias=everything, lengths=everything, device="cuda", **sizes)
    equals_naive(given, "chunked")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_without_a_window_on_a_gpu(dtype):
    given = draw(1500, None, False, source=4001, codes=512, key=64, value=64, dtype=dtype, device="cuda")
    equals_naive(given, "chunked")


@gpu
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("chunk", "codes", "key", "value"), [(64, 256, 64, 128), (50, 300, 65, 250)])
def test_a_stream_on_a_gpu(chunk, codes, key, value, dtype):
    sizes = {"codes": codes, "key": key, "value": value}
    given = draw(2500, chunk, True, dtype=dtype, bias=True, device="cuda", **sizes)
    lengths = [torch.tensor(n, device="cuda") for n in ([2000, 1700], [1, 1], [499, 3])]
    streams_equal(given, [1030, 17], [2000, 1, 499], lengths, oracle="chunked")
