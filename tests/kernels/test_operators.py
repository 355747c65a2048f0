"""Every custom operator's fake tells the shape, the dtype and the strides of what the operator returns.

A compiler plans memory by the fakes, those of the gradients too, which opcheck of the forward does not compare.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from seqzoo.kernels.agent_attention import agent_attention
from seqzoo.kernels.associative_scan import associative_scan
from seqzoo.kernels.block_sparse import block_sparse_attention
from seqzoo.kernels.dilated_conv import dilated_conv
from seqzoo.kernels.ema import Coefficients, EmaState, ema
from seqzoo.kernels.gated_linear_attention import gated_linear_attention
from seqzoo.kernels.linear_attention import LinearState, linear_attention
from seqzoo.kernels.lse import attention_with_lse
from seqzoo.kernels.prob_sparse import prob_sparse_attention
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.kernels.short_conv import short_conv
from seqzoo.kernels.softmax import softmax_attention

torch.set_num_threads(1)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def describe(outputs):
    """What a compiler builds on; an empty tensor may have any strides."""
    return [(t.shape, t.dtype, t.stride() if t.numel() else ()) for t in tree_leaves(outputs)]


class FakesTell(TorchDispatchMode):
    """Runs each of our operators on fake tensors as well and compares; `seen`: their names."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        if function.namespace == "seqzoo":
            name = function._schema.name.split("::")[1]
            self.seen.add(name)
            with FakeTensorMode() as mode:
                told = function(*tree_map_only(torch.Tensor, mode.from_tensor, args), **(kwargs or {}))
            assert describe(told) == describe(found), name
        return found


def draw(*shape, dtype):
    """Random, the last two dimensions the other way round in memory, as no operator returns them."""
    t = torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)
    return (t.mT.contiguous().mT if len(shape) > 1 else t).requires_grad_()


def softmax_band(draw, backend):
    q, k, v = (draw(2, 70, 3, 4) for _ in range(3))
    return softmax_attention(q, k, v, window=(5, 1))


def agent(draw, backend):
    q, agents, k, v = (draw(2, n, 3, 4) for n in (7, 2, 9, 9))
    return agent_attention(
        q, agents, k, v, aggregate_bias=draw(1, 3, 2, 9), broadcast_bias=draw(2, 1, 7, 2), backend=backend
    )


def lse(draw, backend):
    q, k, v = (draw(2, n, 3, 4) for n in (5, 7, 7))
    return attention_with_lse(q, k, v, mask=torch.rand(2, 1, 5, 7) < 0.7)


def scan(draw, backend):
    return associative_scan(draw(2, 20, 3), draw(2, 20, 3), initial_state=draw(2, 3), backend=backend)


def selective(draw, backend):
    u, dt, b, c = draw(2, 20, 5), draw(2, 20, 5).abs(), draw(2, 20, 3), draw(2, 20, 3)
    options = {"skip": draw(5), "initial_state": draw(2, 5, 3), "return_state": True}
    return selective_scan(u, dt, -draw(5, 3).abs(), b, c, **options, backend=backend)


def blocks(draw, backend):
    q, k, v = (draw(2, n, 2, 4) for n in (33, 24, 24))
    index = torch.stack([torch.randperm(4) for _ in range(66)])[:, :2].view(2, 1, 33, 2).to(DEVICE)
    weight = draw(2, 1, 33, 2)
    return block_sparse_attention(q, k, v, index, weight=weight, q_block=1, k_block=6, backend=backend)


def prob(draw, backend):
    q, k, v = (draw(1, 12, 2, 4) for _ in range(3))
    return prob_sparse_attention(q, k, v, factor=1, seed=3, backend=backend)


def gated(draw, backend):
    q, k, v = draw(2, 20, 2, 4), draw(2, 20, 2, 4), draw(2, 20, 2, 3)
    state = draw(2, 2, 4, 3)
    return gated_linear_attention(
        q, k, v, -draw(2, 20, 2).abs(), initial_state=state, return_state=True, chunk_size=16, backend=backend
    )


def linear(draw, backend):
    q, k, v = draw(2, 20, 2, 4).exp(), draw(2, 20, 2, 4).exp(), draw(2, 20, 2, 3)
    state = LinearState(draw(2, 2, 4, 3), draw(2, 2, 4).exp())
    return linear_attention(q, k, v, causal=True, initial_state=state, return_state=True, backend=backend)


def short(draw, backend):
    x, weight, bias, state = draw(2, 9, 5), draw(5, 3), draw(5), draw(2, 2, 5)
    return short_conv(x, weight, bias=bias, silu=True, initial_state=state, backend=backend)


def dilated(draw, backend):
    return dilated_conv(draw(2, 9, 6), draw(6, 1, 3), draw(6), dilation=2, tail=draw(2, 4, 6), backend=backend)


def grouped(draw, backend):
    return dilated_conv(draw(2, 9, 6), draw(4, 3, 3), draw(4), dilation=2, tail=draw(2, 4, 6), backend=backend)


def average(draw, backend):
    ahead = Coefficients(-draw(5, 3).abs(), draw(5, 3), draw(5, 3))
    return ema(draw(2, 9, 5), ahead, initial_state=EmaState(draw(2, 5, 3)), return_state=True, backend=backend)


BOTH = "", "_backward"
CPU = [
    (softmax_band, "sdpa", "softmax_band", BOTH),
    (agent, "tiled", "agent_attention", BOTH),
    (lse, "flash", "attention_with_lse", BOTH),
    (scan, "chunked", "associative_scan", ("",)),  # its gradient is a scan
    (selective, "chunked", "selective_scan", BOTH),
    (blocks, "chunked", "block_sparse", BOTH),
    (prob, "chunked", "prob_sparse_sampled", ("",)),  # chooses, without a gradient
    (gated, "chunked", "gated_linear_attention", BOTH),
    (linear, "chunked", "linear_attention", BOTH),
    (short, "chunked", "short_conv", BOTH),
    (dilated, "shifted", "dilated_conv", BOTH),
    (grouped, "shifted", "dilated_conv", BOTH),
]
TRITON = [
    (scan, "associative_scan_triton", BOTH),
    (selective, "selective_scan_triton", BOTH),
    (blocks, "block_sparse_triton", BOTH),
    (prob, "prob_sparse_measure", ("",)),
    (gated, "gated_linear_attention_triton", BOTH),
    (linear, "linear_attention_triton", BOTH),
    (short, "depthwise_conv_triton", BOTH),
    (average, "ema_triton", BOTH),
]


def check(run, backend, dtype, operator, kinds):
    leaves = []

    def leaf(*shape):
        leaves.append(draw(*shape, dtype=dtype))
        return leaves[-1]

    with FakesTell() as fakes:
        found = run(leaf, backend)
        flat = [t for t in tree_leaves(found) if isinstance(t, torch.Tensor)]
        loss = sum((t * draw(*t.shape, dtype=t.dtype).detach()).sum() for t in flat)
        torch.autograd.grad(loss, leaves, allow_unused=True)
    assert {operator + kind for kind in kinds} <= fakes.seen


CPU_NAMES = [getattr(entry, "values", entry)[0].__name__ for entry in CPU]


@pytest.mark.skipif(DEVICE != "cpu", reason="these are operators of the CPU")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize(("run", "backend", "operator", "kinds"), CPU, ids=CPU_NAMES)
def test_fakes_of_the_cpu_operators(run, backend, operator, kinds, dtype):
    check(run, backend, dtype, operator, kinds)


@pytest.mark.parametrize(("run", "operator", "kinds"), TRITON, ids=[run.__name__ for run, *_ in TRITON])
def test_fakes_of_the_triton_operators(run, operator, kinds):
    pytest.importorskip("triton", reason="needs the package triton")
    check(run, "triton", torch.bfloat16, operator, kinds)
