"""Agent attention against its parts and limit cases; the running form against the oracle, a loop and prefixes."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from seqzoo.kernels.agent_attention import ABSENT, RunningState, agent_attention, chunked, running_agent_attention

torch.set_num_threads(1)
B, H, K, V, M = 2, 3, 4, 3, 5
EXACT = {"atol": 1e-12, "rtol": 1e-12}


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def draw(batch, length, seed=0):
    """q, agents, k, v of the running form, which need gradients."""
    shapes = (batch, length, H, K), (M, H, K), (batch, length, H, K), (batch, length, H, V)
    return [(1.5 * normal(*shape, seed=10 * seed + i)).requires_grad_() for i, shape in enumerate(shapes)]


def draw_state(batch):
    z = 1 + normal(batch, H, M, seed=7).abs()
    return RunningState(
        normal(batch, H, M, seed=6), z.requires_grad_(), normal(batch, H, M, V, seed=8).requires_grad_()
    )


def test_is_two_calls_of_scaled_dot_product_attention():
    q, k, v, agents = (normal(B, n, H, K, seed=i) for i, n in enumerate((9, 7, 7, M)))
    bias_1, bias_2 = normal(H, M, 7, seed=4), normal(B, H, 9, M, seed=5)
    key_mask, agent_mask = torch.ones(B, 7, dtype=torch.bool), torch.ones(1, M, dtype=torch.bool)
    key_mask[1, 3:], agent_mask[0, 2] = False, False
    y = agent_attention(
        q,
        agents,
        k,
        v,
        scale=0.7,
        broadcast_scale=0.4,
        aggregate_bias=bias_1,
        broadcast_bias=bias_2,
        key_mask=key_mask,
        agent_mask=agent_mask,
    )
    q, k, v, agents = (t.transpose(1, 2) for t in (q, k, v, agents))
    hide = torch.where(key_mask, 0.0, float("-inf"))[:, None, None]
    gathered = F.scaled_dot_product_attention(agents, k, v, attn_mask=bias_1 + hide, scale=0.7)
    hide = torch.where(agent_mask, 0.0, float("-inf"))[:, None, None].double()
    want = F.scaled_dot_product_attention(q, agents, gathered, attn_mask=bias_2 + hide, scale=0.4)
    torch.testing.assert_close(y, want.transpose(1, 2), **EXACT)


def test_agents_that_are_the_keys_behind_an_identity_give_softmax_attention():
    q, k, v = (normal(B, n, H, K, seed=i) for i, n in enumerate((9, 6, 6)))
    identity = torch.full((6, 6), float("-inf"), dtype=torch.float64).fill_diagonal_(0)
    y = agent_attention(q, k, k, v, aggregate_bias=identity)
    want = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)
    torch.testing.assert_close(y, want, **EXACT)


def test_one_agent_gives_every_query_the_same_mean():
    q, agents, k, v = (normal(B, n, H, K, seed=i) for i, n in enumerate((9, 1, 6, 6)))
    weights = torch.einsum("bmhk,bshk->bhs", agents, k).mul(K**-0.5).softmax(-1)
    want = torch.einsum("bhs,bshv->bhv", weights, v)[:, None].expand(B, 9, H, K)
    torch.testing.assert_close(agent_attention(q, agents, k, v), want, **EXACT)
    agents, q = agents[0], normal(B, 6, H, K, seed=5)
    running, _ = running_agent_attention(q, agents, k, v[..., :V])
    for t in range(6):
        e = torch.einsum("mhk,bshk->bhs", agents, k[:, : t + 1]).mul(K**-0.5).softmax(-1)
        want = torch.einsum("bhs,bshv->bhv", e, v[:, : t + 1, :, :V])
        torch.testing.assert_close(running[:, t], want, **EXACT)


def test_without_a_visible_agent_or_key_the_output_is_zero():
    q, agents, k, v = (normal(B, n, H, K, seed=i).requires_grad_() for i, n in enumerate((9, M, 6, 6)))
    none = torch.tensor([[True] * 6, [False] * 6])
    for masks in ({"key_mask": none}, {"agent_mask": none[:, :M]}):
        y = agent_attention(q, agents, k, v, **masks)
        assert (y[1] == 0).all() and (y[0] != 0).all()
        for gradient in torch.autograd.grad(y.sum(), (q, agents, k, v)):
            assert gradient.isfinite().all() and (gradient[1] == 0).all()


def loop(q, agents, k, v, state=None):
    """One key after another with the recurrence of maximum, normaliser and numerator."""
    m, z, num = state or (
        torch.full((len(q), H, len(agents)), -torch.inf, dtype=q.dtype),
        q.new_zeros(len(q), H, len(agents)),
        q.new_zeros(len(q), H, len(agents), v.shape[-1]),
    )
    outputs = []
    for t in range(q.shape[1]):
        score = torch.einsum("mhk,bhk->bhm", agents, k[:, t]) * K**-0.5
        new = torch.maximum(m, score.detach())
        num = num * (m - new).exp()[..., None] + (score - new).exp()[..., None] * v[:, t, :, None]
        z, m = z * (m - new).exp() + (score - new).exp(), new
        share = (torch.einsum("bhk,mhk->bhm", q[:, t], agents) * K**-0.5).softmax(-1)
        outputs.append(torch.einsum("bhm,bhmv->bhv", share / z, num))
    return torch.stack(outputs, 1), RunningState(m, z, num)


def compare(got, want, inputs):
    """Outputs, states and gradients under random cotangents."""
    objectives = []
    for o, state in (got, want):
        parts = (o, state.z, state.num)
        objectives.append(sum((t * normal(*t.shape, seed=20 + i)).sum() for i, t in enumerate(parts)))
    torch.testing.assert_close(got[0], want[0], **EXACT)
    for a, b in zip(got[1], want[1], strict=True):
        torch.testing.assert_close(a, b, **EXACT)
    for a, b in zip(*(torch.autograd.grad(objective, inputs) for objective in objectives), strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize("backend", ["chunked", "naive"])
@pytest.mark.parametrize("with_state", [False, True])
def test_running_form_is_the_recurrence(backend, with_state):
    inputs = draw(B, 21)
    state = draw_state(B) if with_state else None
    got = running_agent_attention(*inputs, initial_state=state, return_state=True, chunk_size=8, backend=backend)
    compare(got, loop(*inputs, state), [*inputs, *([state.z, state.num] if state else [])])


@pytest.mark.parametrize("length", [1, 2, 63, 64, 65, 300])
def test_chunked_is_naive(length):
    inputs = draw(1, length)
    options = {"return_state": True, "scale": 0.8, "broadcast_scale": 1.3, "chunk_size": 16}
    got, want = (running_agent_attention(*inputs, **options, backend=b) for b in ("chunked", "naive"))
    compare(got, want, inputs)


@pytest.mark.parametrize("chunk_size", [1, 2, 32, 128])
def test_any_chunk_gives_the_same(chunk_size):
    inputs, state = draw(B, 45), draw_state(B)
    options = {"initial_state": state, "return_state": True, "lengths": torch.tensor([45, 45])}
    got = running_agent_attention(*inputs, **options, chunk_size=chunk_size)
    compare(got, running_agent_attention(*inputs, **options, backend="naive"), [*inputs, state.z, state.num])


def test_each_output_is_agent_attention_over_its_prefix():
    q, agents, k, v = draw(B, 12)
    v = torch.cat((v, v[..., :1]), -1)
    y, _ = running_agent_attention(q, agents, k, v, chunk_size=4)
    for t in range(12):
        want = agent_attention(q[:, t : t + 1], agents.expand(B, -1, -1, -1), k[:, : t + 1], v[:, : t + 1])
        torch.testing.assert_close(y[:, t : t + 1], want, **EXACT)


def test_segments_change_nothing(monkeypatch):
    inputs, state = draw(B, 45), draw_state(B)
    options = {"initial_state": state, "return_state": True, "lengths": torch.tensor([45, 19]), "chunk_size": 4}

    def run():
        o, last = running_agent_attention(*inputs, **options)
        return o * (torch.arange(45) < options["lengths"][:, None])[..., None, None], last

    want = run()
    monkeypatch.setattr(chunked, "SEGMENT", 1)
    calls = []
    monkeypatch.setattr(chunked, "_segment", lambda *a, real=chunked._segment: calls.append(a[0].shape[1]) or real(*a))
    got = run()
    assert calls == [4] * 11 + [1]
    compare(got, want, [*inputs, state.z, state.num])


@pytest.mark.parametrize("backend", ["chunked", "naive"])
def test_a_carried_state_and_lengths_stop_and_continue_each_row(backend):
    lengths = [40, 33, 32, 9, 1, 0]
    inputs = draw(len(lengths), 40)
    q, agents, k, v = inputs
    y, last = running_agent_attention(*inputs, lengths=torch.tensor(lengths), return_state=True, backend=backend)
    assert all(t.isfinite().all() for t in torch.autograd.grad(y.sum() + last.num.sum(), inputs, retain_graph=True))
    for row, n in enumerate(lengths):
        one, state = slice(row, row + 1), None
        for start, end in ((0, n // 3), (n // 3, n // 3 + 1), (n // 3 + 1, n)):
            part = one, slice(start, max(start, min(end, n)))
            o, new = running_agent_attention(
                q[part], agents, k[part], v[part], initial_state=state, return_state=True, chunk_size=4
            )
            torch.testing.assert_close(y[part], o, **EXACT)
            state = new or state
        if n:
            for a, b in zip(last, state, strict=True):
                torch.testing.assert_close(a[one], b, **EXACT)
        else:
            assert (last.m[row] == ABSENT).all() and (last.z[row] == 0).all() and (last.num[row] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_scores_of_any_size_neither_overflow_nor_leak(dtype):
    q, agents, k, v = (t.detach() for t in draw(1, 70))
    k = k * 10 ** normal(1, 70, 1, 1, seed=3)  # some keys have scores of hundreds, others of thousandths
    q, agents, k, v = (t.to(dtype) for t in (q, agents, k, v))
    y, _ = running_agent_attention(q, agents, k, v, chunk_size=32)
    want, _ = running_agent_attention(q, agents, k, v, backend="naive")
    tight = 1e-10 if dtype == torch.float64 else 1e-4  # exp() of a score of hundreds multiplies its rounding
    torch.testing.assert_close(y, want, atol=tight, rtol=tight)
    for cut in (1, 31, 32, 33, 50):
        later = k.clone()
        later[:, cut:] += 1e4
        changed, _ = running_agent_attention(q, agents, later, v, chunk_size=32)
        assert torch.equal(changed[:, :cut], y[:, :cut])
        assert changed.isfinite().all() and not torch.equal(changed[:, cut:], y[:, cut:])


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operation makes."""

    def __init__(self):
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                self.elements = max(self.elements, tensor.numel())
        return out


def test_no_tensor_is_as_large_as_length_by_agents_by_width():
    length, width = 512, 16
    q, k, v = (normal(1, length, 1, width, seed=i).requires_grad_() for i in range(3))
    agents = normal(8, 1, width, seed=3).requires_grad_()
    with Largest() as seen:
        o, _ = running_agent_attention(q, agents, k, v, chunk_size=16)
        o.sum().backward()
    assert length * width <= seen.elements < length * 8 * width / 4


def test_dtypes_and_strides():
    q, agents, k, v = (t.detach() for t in draw(B, 20))
    want, last = running_agent_attention(q, agents, k, v, return_state=True)
    wide = [t.repeat_interleave(2, 1)[:, ::2] for t in (q, k, v)]
    got, _ = running_agent_attention(wide[0], agents, *wide[1:])
    torch.testing.assert_close(got, want, **EXACT)
    half, state = running_agent_attention(*(t.bfloat16() for t in (q, agents, k, v)), return_state=True)
    assert half.dtype == torch.bfloat16 and {t.dtype for t in state} == {torch.float32}
    assert {t.dtype for t in last} == {torch.float64}
    assert (half - want).norm() / want.norm() < 2e-2
    single = [t.float() for t in (q, agents, k, v)]
    with torch.autocast("cpu", torch.bfloat16):
        inside, _ = running_agent_attention(*single)
    assert torch.equal(inside, running_agent_attention(*single)[0])


@pytest.mark.parametrize("backend", ["chunked", "naive"])
def test_gradcheck(backend):
    inputs, state = draw(1, 5), draw_state(1)

    def run(*tensors):
        before = RunningState(state.m, *tensors[4:])
        o, last = running_agent_attention(
            *tensors[:4], initial_state=before, return_state=True, chunk_size=2, backend=backend
        )
        # m carries no gradient: what counts are the sums themselves.
        return o, last.z * last.m.exp(), last.num * last.m.exp()[..., None]

    # The maximum is held in the derivative, so a numeric step must not move it: the true sums do not depend on it.
    assert torch.autograd.gradcheck(run, (*inputs, state.z, state.num), fast_mode=True)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"k": normal(2, 7, H, K)}, r"k \(2, 7, 3, 4\)"),
        ({"agents": normal(2, M, H, K)}, r"agents \(2, 5, 3, 4\)"),
        ({"lengths": torch.ones(3)}, r"lengths has shape \(3,\)"),
        ({"chunk_size": 12}, "chunk_size=12 must be a power of two, such as 8"),
        ({"chunk_size": 0}, "chunk_size=0"),
        ({"initial_state": RunningState(*(torch.ones(2, H, M) for _ in range(3)))}, "initial_state has shapes"),
        ({"backend": "triton"}, "backend='triton'"),
    ],
)
def test_bad_arguments(change, message):
    q, agents, k, v = draw(2, 6)
    with pytest.raises(ValueError, match=message):
        running_agent_attention(**{"q": q, "agents": agents, "k": k, "v": v, **change})
