"""VQ attention against dense softmax over quantised keys, plain loops and its own oracle."""

import math

import pytest
import torch

from seqzoo.kernels.vq_attention import VQState, cell_sums, chunked, empty_state, vq_attention

torch.set_num_threads(1)
H, K, V, M = 2, 4, 5, 6
BACKENDS = ("naive", "chunked")


def draw(batch, length, chunk, causal, seed=0, source=None, dtype=torch.float64):
    """q, k, v, code, codebook, bias; k is the codeword, with a gradient of its own."""
    generator = torch.Generator().manual_seed(seed)
    source = length if source is None else source

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=dtype)

    book = normal(H, M, K)
    code = torch.randint(0, M, (batch, source, H), generator=generator)
    k = book[torch.arange(H), code]
    bias = normal(H, 2 * chunk if causal else 4 * chunk - 1)
    q, v = normal(batch, length, H, K), normal(batch, source, H, V)
    return *(t.clone().requires_grad_() for t in (q, k, v)), code, book, bias.requires_grad_()


def by_hand(q, k, v, code, book, bias, chunk, causal, scale=1.0):
    """Every query and key on its own; beyond the window the codeword without a gradient."""
    rows = []
    for i in range(q.shape[1]):
        scores, values = [], []
        for j in range(k.shape[1]):
            if causal and j > i:
                continue
            if abs(i // chunk - j // chunk) <= 1:
                distance = i - j if causal else i - j + 2 * chunk - 1
                scores.append(scale * (q[:, i] * k[:, j]).sum(-1) + bias[:, distance])
            else:
                scores.append(scale * (q[:, i] * book[torch.arange(H), code[:, j]]).sum(-1))
            values.append(v[:, j])
        weight = torch.stack(scores, -1).softmax(-1)
        rows.append(torch.einsum("bhj,bhjv->bhv", weight, torch.stack(values, 2)))
    return torch.stack(rows, 1)


def cotangent(o):
    return torch.randn(o.shape, generator=torch.Generator().manual_seed(9), dtype=o.dtype)


def close(got, want, atol=1e-12):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


@pytest.fixture(params=[None, 5], ids=["one_group", "groups"])
def groups(request, monkeypatch):
    """Groups of blocks so small that a row takes several."""
    if request.param:
        monkeypatch.setattr(chunked, "TOKENS", request.param)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("length", "chunk"), [(1, 1), (2, 1), (11, 1), (3, 4), (8, 4), (12, 4), (17, 3), (23, 4)])
def test_equals_attention_key_by_key_with_gradients(backend, causal, length, chunk, groups):
    inputs = draw(2, length, chunk, causal)
    q, k, v, code, book, bias = inputs
    want = by_hand(*inputs, chunk, causal, scale=0.7)
    got, none = vq_attention(
        q, k, v, code, book, chunk_size=chunk, causal=causal, bias=bias, scale=0.7, backend=backend
    )
    assert none is None
    close(got, want)
    leaves = [q, k, v, bias]
    for a, b in zip(*(torch.autograd.grad((o * cotangent(o)).sum(), leaves) for o in (got, want)), strict=True):
        close(a, b)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_is_dense_softmax_over_quantised_keys(causal, chunk):
    """Without a bias the window is nothing special: torch's attention over the codewords, whatever the blocks."""
    q, k, v, code, book, _ = (t.detach() for t in draw(2, 29, chunk, causal))
    got, _ = vq_attention(q, k, v, code, book, chunk_size=chunk, causal=causal)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal, scale=1.0
    )
    close(got, want.transpose(1, 2))


@pytest.mark.parametrize("causal", [True, False])
def test_a_codebook_that_holds_the_keys_gives_unquantised_attention(causal):
    q, k, v, *_ = (t.detach() for t in draw(1, 20, 3, causal))
    k = torch.randn(k.shape, generator=torch.Generator().manual_seed(5), dtype=k.dtype)
    book = k[0].transpose(0, 1)  # (H, L, K): a codeword for each key
    code = torch.arange(20)[None, :, None].expand(1, 20, H).contiguous()
    got, _ = vq_attention(q, k, v, code, book, chunk_size=3, causal=causal)
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=causal, scale=1.0
    )
    close(got, want.transpose(1, 2))


@pytest.mark.parametrize("causal", [True, False])
def test_keys_in_a_cell_get_no_gradient_and_those_in_the_window_the_dense_one(causal):
    """Against dense attention over straight-through keys: equal where i and j touch, nothing beyond."""
    q, k, v, code, book, bias = draw(1, 24, 4, causal)
    i = 9  # in block 2: its window is blocks 1 .. 3, causally 1 .. 2
    (got,) = torch.autograd.grad(
        vq_attention(q, k, v, code, book, chunk_size=4, causal=causal, bias=bias)[0][:, i].sum(), k
    )
    scores = (q[:, i, None] * k).sum(-1)  # (1, L, H), every key straight-through
    distance = i - torch.arange(24)
    near = torch.tensor([abs(i // 4 - j // 4) <= 1 for j in range(24)])
    offset = distance if causal else distance + 7
    scores = scores + torch.where(near[:, None], bias[:, offset.clamp(0, bias.shape[1] - 1)].T, 0)
    if causal:
        scores = scores.masked_fill((distance < 0)[None, :, None], -torch.inf)
    (dense,) = torch.autograd.grad((scores.softmax(1)[..., None] * v).sum(), k)
    seen = near & (distance >= 0) if causal else near
    close(got[:, seen], dense[:, seen])
    assert (got[:, ~seen] == 0).all() and (dense[:, :4].abs() > 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
def test_lengths_end_each_row_where_it_ends(backend, causal, groups):
    lengths = [21, 12, 5, 1, 0]
    q, k, v, code, book, bias = draw(len(lengths), 21, 3, causal)
    options = {"chunk_size": 3, "causal": causal, "bias": bias, "backend": backend}
    got, _ = vq_attention(q, k, v, code, book, lengths=torch.tensor(lengths), **options)
    total = torch.zeros((), dtype=q.dtype)
    for row, n in enumerate(lengths):
        one = slice(row, row + 1)
        alone, _ = vq_attention(q[one, :n], k[one, :n], v[one, :n], code[one, :n], book, **options)
        close(got[one, :n], alone)
        total = total + (got[one, :n] * cotangent(alone)).sum()
    assert (got[-1] == 0).all()
    for gradient in torch.autograd.grad(total, [k, v]):
        for row, n in enumerate(lengths):
            assert (gradient[row, n:] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("sizes", [[31], [1] * 31, [5, 1, 7, 13, 1, 4], [2] * 15 + [1]], ids=str)
@pytest.mark.parametrize("chunk", [1, 4, 32])
def test_a_stream_equals_the_whole_with_gradients(backend, sizes, chunk, groups):
    q, k, v, code, book, bias = draw(2, 31, chunk, True)
    want = by_hand(q, k, v, code, book, bias, chunk, True)
    state, outputs, start = empty_state(2, chunk, M, H, K, V, dtype=q.dtype), [], 0
    for size in sizes:
        at = slice(start, start + size)
        o, state = vq_attention(
            q[:, at], k[:, at], v[:, at], code[:, at], book, chunk_size=chunk, causal=True, bias=bias,
            initial_state=state, return_state=True, backend=backend,
        )  # fmt: skip
        outputs.append(o)
        start += size
    got = torch.cat(outputs, 1)
    close(got, want)
    leaves = [q, k, v, bias]
    for a, b in zip(*(torch.autograd.grad((o * cotangent(o)).sum(), leaves) for o in (got, want)), strict=True):
        close(a, b)
    # The cells are those of all blocks but the last two, counted one token at a time.
    old = max(31 // chunk - 1, 0) * chunk
    count, total = torch.zeros(2, H, M, dtype=q.dtype), torch.zeros(2, H, M, V, dtype=q.dtype)
    for b in range(2):
        for t in range(old):
            for h in range(H):
                count[b, h, code[b, t, h]] += 1
                total[b, h, code[b, t, h]] += v[b, t, h].detach()
    assert torch.equal(state.number, count) and (state.length == 31).all()
    close(state.mean, total / count.clamp(min=1)[..., None])


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_a_stream_advance_by_their_own_lengths(backend, groups):
    """Rows whose blocks begin at different places of the same chunk."""
    q, k, v, code, book, bias = (t.detach() for t in draw(3, 30, 4, True))
    counts = [[9, 1, 0, 12], [3, 1, 7, 5], [0, 0, 2, 2]]
    state, position = empty_state(3, 4, M, H, K, V, dtype=q.dtype), [0] * 3
    options = {"chunk_size": 4, "causal": True, "bias": bias, "backend": backend}
    seen = [[], [], []]
    for step in range(4):
        n = [row[step] for row in counts]
        place = torch.tensor([[min(p + i, 29) for i in range(max(n))] for p in position])
        parts = [t.gather(1, place[:, :, None, None].expand(-1, -1, *t.shape[2:])) for t in (q, k, v)]
        codes = code.gather(1, place[:, :, None].expand(-1, -1, H))
        o, state = vq_attention(
            *parts, codes, book, lengths=torch.tensor(n), initial_state=state, return_state=True, **options
        )
        for row in range(3):
            seen[row].append(o[row, : n[row]])
            position[row] += n[row]
    for row in range(3):
        one, n = slice(row, row + 1), position[row]
        alone, _ = vq_attention(q[one, :n], k[one, :n], v[one, :n], code[one, :n], book, **options)
        close(torch.cat(seen[row]), alone[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_without_a_window_a_key_is_its_codeword(backend):
    q, _, v, code, book, _ = draw(3, 7, 1, True, source=19)
    got, _ = vq_attention(q, None, v, code, book, scale=0.5, backend=backend)
    dense = torch.einsum("blhk,bshk->bhls", 0.5 * q, book[torch.arange(H), code]).softmax(-1)
    want = torch.einsum("bhls,bshv->blhv", dense, v)
    close(got, want)
    for a, b in zip(*(torch.autograd.grad((o * cotangent(o)).sum(), [q, v]) for o in (got, want)), strict=True):
        close(a, b)
    lengths = torch.tensor([19, 4, 0])
    some, _ = vq_attention(q, None, v, code, book, scale=0.5, lengths=lengths, backend=backend)
    close(some[0], got[0])
    close(some[1], vq_attention(q[1:2], None, v[1:2, :4], code[1:2, :4], book, scale=0.5)[0][0])
    assert (some[2] == 0).all()


def test_the_past_keeps_its_bits_when_the_future_changes():
    q, k, v, code, book, bias = (t.detach() for t in draw(1, 40, 3, True))
    for cut in (1, 5, 6, 20, 39):
        other = [torch.cat([t[:, :cut], t[:, cut:] + 1e3], 1) for t in (q, k, v)]
        codes = torch.cat([code[:, :cut], (code[:, cut:] + 1) % M], 1)
        a, b = (
            vq_attention(*x, book, chunk_size=3, causal=True, bias=bias)[0] for x in ((q, k, v, code), (*other, codes))
        )
        assert torch.equal(a[:, :cut], b[:, :cut]) and not torch.equal(a, b)


def test_gradcheck():
    q, k, v, code, book, bias = draw(1, 9, 2, True)

    def run(q, v, bias, mean):
        state = empty_state(1, 2, M, H, K, V, dtype=q.dtype)
        state = state._replace(mean=mean, number=torch.full_like(state.number, 3.0))
        o, last = vq_attention(q, k, v, code, book, chunk_size=2, causal=True, bias=bias, initial_state=state,
                               return_state=True)  # fmt: skip
        return o, last.mean

    mean = torch.randn(1, H, M, V, generator=torch.Generator().manual_seed(2), dtype=q.dtype, requires_grad=True)
    assert torch.autograd.gradcheck(run, (q, v, bias, mean), fast_mode=True)


@pytest.mark.parametrize("causal", [True, False])
def test_half_precision_and_large_scores_stay_close_to_double(causal):
    """Scores of hundreds and cells of hundreds of tokens: a maximum is subtracted, means are summed in float32."""
    q, k, v, code, book, bias = (t.detach() for t in draw(1, 900, 16, causal, dtype=torch.float32))
    wide, _ = vq_attention(
        *(t.double() for t in (40 * q, k, v)), code, book.double(), chunk_size=16, causal=causal, bias=bias.double()
    )
    narrow, _ = vq_attention(40 * q, k, v, code, book, chunk_size=16, causal=causal, bias=bias)
    assert (narrow - wide).abs().max() < 1e-4
    rounded = [t.bfloat16() for t in (q, k, v, book, bias)]
    q16, k16, v16, book16, bias16 = rounded
    half, _ = vq_attention(q16, k16, v16, code, book16, chunk_size=16, causal=causal, bias=bias16)
    q, k, v, book, bias = (t.double() for t in rounded)
    exact, _ = vq_attention(q, k, v, code, book, chunk_size=16, causal=causal, bias=bias)
    assert half.dtype == torch.bfloat16 and (half - exact).norm() < 5e-3 * exact.norm()


def test_a_long_stream_keeps_its_means():
    """The mean of a cell that has stopped growing is untouched, and others do not drift."""
    generator = torch.Generator().manual_seed(0)
    v = 100 + torch.randn(1, 600, 1, 3, generator=generator)
    code = torch.zeros(1, 600, 1, dtype=torch.int64)
    code[:, ::2] = 1
    code[:, 100:] = 1  # code 0 ends early
    k = torch.zeros(1, 600, 1, 2)
    state, kept = empty_state(1, 4, 2, 1, 2, 3), None
    for t in range(600):
        at = slice(t, t + 1)
        _, state = vq_attention(
            k[:, at], k[:, at], v[:, at], code[:, at], torch.zeros(1, 2, 2), chunk_size=4, causal=True,
            initial_state=state, return_state=True,
        )  # fmt: skip
        if t == 120:
            kept = state.mean[:, :, 0].clone()
    assert torch.equal(state.mean[:, :, 0], kept)
    want = v[0, :596, 0].double()[code[0, :596, 0] == 1].mean(0)
    torch.testing.assert_close(state.mean[0, 0, 1].double(), want, atol=2e-5, rtol=0)


def test_autocast_does_not_reach_inside():
    q, k, v, code, book, bias = (t.detach() for t in draw(1, 30, 4, True, dtype=torch.float32))
    want, _ = vq_attention(q, k, v, code, book, chunk_size=4, causal=True, bias=bias)
    with torch.autocast("cpu", torch.bfloat16):
        got, _ = vq_attention(q, k, v, code, book, chunk_size=4, causal=True, bias=bias)
    assert torch.equal(got, want)


@pytest.mark.parametrize("causal", [True, False])
def test_memory_for_the_backward_pass(causal, monkeypatch):
    """Of several groups of blocks, autograd keeps no scores and no cells: a few numbers per token, none per pair."""
    monkeypatch.setattr(chunked, "TOKENS", 256)
    length, chunk = 2000, 16
    q, k, v, code, book, bias = draw(1, length, chunk, causal, dtype=torch.float32)
    kept = {}

    def note(tensor):
        kept[tensor.data_ptr(), tensor.numel()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        vq_attention(q, k, v, code, book, chunk_size=chunk, causal=causal, bias=bias)
    assert sum(kept.values()) < 60 * length < H * length * (M + 2 * chunk)  # the right one: the scores alone


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_codebook_gets_no_gradient(backend):
    q, k, v, code, book, bias = draw(1, 20, 3, True)
    book.requires_grad_()
    state = empty_state(1, 3, M, H, K, V, dtype=q.dtype)
    o, _ = vq_attention(
        q, k.detach(), v, code, book, chunk_size=3, causal=True, bias=bias, initial_state=state, backend=backend
    )
    plain, _ = vq_attention(q, None, v, code, book, backend=backend)
    assert torch.autograd.grad((o + plain).sum(), book, allow_unused=True) == (None,)


def test_cell_sums_token_by_token():
    _, _, v, code, *_ = draw(3, 14, 1, True)
    valid = torch.rand(3, 14, generator=torch.Generator().manual_seed(0)) > 0.3
    v = v.detach().masked_fill(~valid[..., None, None], 0).movedim(2, 0)
    count, total = cell_sums(v, code.movedim(2, 0), valid[None], M)
    for h in range(H):
        for b in range(3):
            for m in range(M):
                members = [t for t in range(14) if valid[b, t] and code[b, t, h] == m]
                assert count[h, b, m] == len(members)
                close(total[h, b, m], sum((v[h, b, t] for t in members), torch.zeros(V, dtype=v.dtype)))


def test_empty_input_and_state_size():
    q, k, v, code, book, _ = (t.detach() for t in draw(2, 6, 4, True))
    state = empty_state(2, 4, M, H, K, V, dtype=torch.bfloat16)
    assert state.number.dtype == state.mean.dtype == torch.float32 and state.k.dtype == torch.bfloat16
    none = slice(0, 0)
    o, same = vq_attention(q[:, none], k[:, none], v[:, none], code[:, none], book, chunk_size=4, causal=True,
                           initial_state=state, return_state=True)  # fmt: skip
    assert o.shape == (2, 0, H, V) and same is state
    assert sum(math.prod(t.shape[1:]) for t in state[:4]) == H * M * (V + 1) + 7 * H * (K + V)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": torch.zeros(2, 6, 3)}, r"q \(2, 6, 3\)"),
        ({"code": torch.zeros(2, 6, H)}, "code torch.float32"),
        ({"codebook": torch.zeros(H, M, K + 1)}, r"codebook \(2, 6, 5\) must be"),
        ({"k": None}, "with a window k None"),
        ({"bias": torch.zeros(H, 3)}, r"bias \(2, 3\) must be \(H, 8\)"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"lengths": torch.zeros(2)}, "lengths is torch.float32"),
        ({"causal": False, "return_state": True, "bias": None}, "a state needs causal=True"),
        ({"chunk_size": None}, "need a window"),
        ({"initial_state": empty_state(1, 4, M, H, K, V)}, "initial_state has shapes"),
        ({"backend": "flash"}, "backend='flash' is unknown"),
    ],
)
def test_bad_arguments(change, message):
    q, k, v, code, book, bias = (t.detach() for t in draw(2, 6, 4, True))
    given = {"q": q, "k": k, "v": v, "code": code, "codebook": book, "bias": bias, "chunk_size": 4, "causal": True}
    vq_attention(**given)
    with pytest.raises(ValueError, match=message):
        vq_attention(**{**given, **change})


def test_a_state_is_a_value():
    q, k, v, code, book, bias = (t.detach() for t in draw(2, 13, 3, True))
    state = empty_state(2, 3, M, H, K, V, dtype=q.dtype)
    for size in (7, 1, 5):
        kept = VQState(*(t.clone() for t in state))
        args = (q[:, :size], k[:, :size], v[:, :size], code[:, :size], book)
        _, after = vq_attention(*args, chunk_size=3, causal=True, bias=bias, initial_state=state, return_state=True)
        assert all(torch.equal(a, b) for a, b in zip(state, kept, strict=True))
        state = after
