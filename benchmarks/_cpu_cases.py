"""What benchmarks/cpu.py measures: a case for every bar. Width 256, four heads of 64, one row, float32, one thread."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import _peers as peers
import torch
from _cases import Bar, Case, Missing, Run, Sides, Work, attempt, either, forward
from _cpu_models import DIM, HEADS, LINEAR_COST, decode, informer
from torch import Tensor
from torch.nn import functional as F

import seqzoo
from seqzoo.kernels.agent_attention import agent_attention
from seqzoo.kernels.dilated_conv import dilated_conv
from seqzoo.kernels.dispatch import choose_backend
from seqzoo.kernels.gated_linear_attention import gated_linear_attention
from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.kernels.prob_sparse import BLOCK, prob_sparse_attention
from seqzoo.kernels.s4d_conv import discretize, initialize, s4d_conv
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.kernels.softmax import softmax_attention

WIDTH, FLOAT = 64, 4  # of a head, bytes of a number
STATES, INNER = 16, 512  # of Mamba-1
CHUNK = 64  # that the operation counts of linear attention assume
PASSES = ("fwd", "fwd+bwd")


def qkv(length: int, heads: int = HEADS, width: int = WIDTH) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, length, heads, width, generator=generator) for _ in range(3)]


def softmax(length: int, *, backward: bool) -> Sides:
    tensors = qkv(length)
    pairs = length * length / 2 * HEADS
    return Sides(
        {
            "ours": either(backward, partial(softmax_attention, causal=True), tensors),
            "torch SDPA": either(backward, partial(peers.sdpa, causal=True), tensors),
        },
        Work((14 if backward else 4) * pairs * WIDTH, exps=pairs),
    )


def window(length: int, *, backward: bool, size: int = 128) -> Sides:
    tensors = qkv(length)
    pairs = length * (size + 1) * HEADS
    ours = partial(softmax_attention, causal=True, window=(size, 0))
    return Sides(
        {
            "ours": either(backward, ours, tensors),
            "local-attention": attempt(lambda: either(backward, peers.local_attention(size), tensors)),
        },
        Work((14 if backward else 4) * pairs * WIDTH, exps=pairs),
    )


def _linear_work(length: int, heads: int, key: int, value: int, backward: bool, shared: int = 1) -> Work:
    """Chunks of CHUNK, lower triangles only, scores shared by `shared` heads, and a state in between."""
    token = CHUNK * (key / shared + value) + 4 * key * value
    flops = length * heads * token * (3 if backward else 1)
    tensors = length * heads * (2 * key / shared + 2 * value) * FLOAT
    return Work(flops, tensors * (2.75 if backward else 1))


def linear(length: int, *, backward: bool, normalize: bool) -> Sides:
    q, k, v = qkv(length)
    tensors = [F.elu(q) + 1, F.elu(k) + 1, v]

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return linear_attention(q, k, v, causal=True, normalize=normalize, eps=1e-10)[0]

    return Sides(
        {
            "ours": either(backward, ours, tensors),
            "fla naive_chunk": attempt(lambda: either(backward, peers.fla_linear(normalize), tensors)),
        },
        _linear_work(length, HEADS, WIDTH, WIDTH, backward),
    )


def lightning(length: int, *, backward: bool) -> Sides:
    tensors = qkv(length)
    decay = -torch.exp2(-torch.arange(1, HEADS + 1) * 8 / HEADS)  # one for each head, as ALiBi's slopes
    each = decay.expand(1, length, HEADS)

    def theirs() -> Run:
        run = peers.fla_decay()
        return either(backward, lambda q, k, v: run(q, k, v, each), tensors)

    return Sides(
        {
            "ours": either(backward, lambda q, k, v: gated_linear_attention(q, k, v, decay)[0], tensors),
            "fla naive simple_gla": attempt(theirs),
        },
        _linear_work(length, HEADS, WIDTH, WIDTH, backward),
    )


def _ssd_inputs(length: int, heads: int, width: int, states: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, heads, width, generator=generator)
    dt = F.softplus(torch.randn(1, length, heads, generator=generator) - 2)
    a = -torch.linspace(1, heads, heads)
    b, c = (torch.randn(1, length, 1, states, generator=generator) for _ in range(2))
    return [x, dt, a, b, c]


def ssd(length: int, *, backward: bool) -> Sides:
    heads, states = 8, 64
    tensors = _ssd_inputs(length, heads, WIDTH, states)

    def ours(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
        return gated_linear_attention(c, b, x * dt.unsqueeze(3), dt * a)[0]

    def fla() -> Run:
        run = peers.fla_decay()

        def theirs(x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
            wide = (1, length, heads, states)
            return run(c.expand(wide), b.expand(wide), x * dt.unsqueeze(3), dt * a)

        return either(backward, theirs, tensors)

    return Sides(
        {
            "ours": either(backward, ours, tensors),
            "fla naive simple_gla": attempt(fla) if not backward else Missing("timed forward only"),
            "transformers Mamba-2": attempt(lambda: either(backward, peers.transformers_ssd(), tensors))
            if length <= 4096
            else Missing("timed at 4k only"),
        },
        _linear_work(length, heads, states, WIDTH, backward, shared=heads),
    )


def scan(length: int, *, backward: bool, sides: tuple[str, ...]) -> Sides:
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, length, INNER, generator=generator)
    dt = F.softplus(torch.randn(1, length, INNER, generator=generator) - 3)
    a = -torch.arange(1.0, STATES + 1).expand(INNER, STATES).contiguous()
    b, c = (torch.randn(1, length, STATES, generator=generator) for _ in range(2))
    tensors = [u, dt, a, b, c, torch.ones(INNER)]

    def ours(backend: str) -> Run:
        def run(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
            return selective_scan(u, dt, a, b, c, skip=d, backend=backend)[0]

        try:
            choose_backend("selective_scan", backend, dtype=u.dtype, device=u.device)
        except ValueError as error:
            raise Missing(str(error)) from None
        return either(backward, run, tensors)

    makers: dict[str, Callable[[], Run]] = {
        "ours": lambda: ours("chunked"),
        "ours, compiled": lambda: ours("compiled"),
        "transformers' loop": lambda: either(backward, peers.transformers_scan(), tensors),
        "mambapy": lambda: either(backward, peers.mambapy_scan(), tensors),
    }
    cells = length * INNER * STATES
    work = Work((20 if backward else 7) * cells, length * INNER * 3 * FLOAT * (3 if backward else 1), cells)
    return Sides({name: attempt(makers[name]) for name in sides}, work)


def s4d(length: int) -> Sides:
    states = 32
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(1, length, DIM, generator=generator)
    a, b = (t.to(torch.complex64) for t in initialize("lin", 2 * states))
    dt = torch.exp(torch.empty(DIM).uniform_(math.log(1e-3), math.log(1e-1), generator=generator))
    c = torch.view_as_complex(torch.randn(DIM, states, 2, generator=generator))
    skip = torch.ones(DIM)

    def ours(u: Tensor) -> Tensor:
        log_a, weight = discretize(a, b, dt)
        return s4d_conv(u, log_a, weight, c, skip=skip)[0]

    def theirs(u: Tensor) -> Tensor:
        log_a, weight = discretize(a, b, dt)
        return peers.vandermonde_s4d(u, log_a, weight * c, skip)

    # the states of chunks of 64, as for linear attention, one channel at a time
    work = Work(length * DIM * (2 * 64 + 16 * states), 2 * length * DIM * FLOAT)
    return Sides({"ours": forward(ours, [u]), "Vandermonde + FFT": forward(theirs, [u])}, work)


def prob_sparse(length: int) -> Sides:
    tensors = qkv(length)
    keys = min(5 * math.ceil(math.log(length)), length)
    each = torch.randint(length, (length, keys), generator=torch.Generator().manual_seed(1))
    shared = each[::BLOCK].contiguous()
    published = peers.published_prob_sparse

    def ours(sampling: Any, index: Tensor | None = None) -> Run:
        call = partial(
            prob_sparse_attention, sampling=sampling, sample_index=index, seed=None if index is not None else 0
        )
        return forward(call, tensors)

    def expected(index: Tensor) -> Run:
        return forward(partial(published, sample=index), tensors)

    sums = length * keys * HEADS * WIDTH * 2 * 3  # the sample, then two products of the selected queries
    return Sides(
        {
            "ours, a sample per query": ours("query"),
            "ours, a sample per 128 queries": ours("block"),
            "published algorithm": forward(published, tensors),
            "torch SDPA, all pairs": forward(partial(peers.sdpa, causal=False), tensors),
        },
        Work(sums, 4 * length * DIM * FLOAT),
        pairs={
            "ours, a sample per query": (ours("query", each), expected(each)),
            "ours, a sample per 128 queries": (
                ours("block", shared),
                expected(shared.repeat_interleave(BLOCK, 0)[:length]),
            ),
        },
    )


def convolution(length: int) -> Sides:
    taps, dilation = 17, 16
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, length, DIM, generator=generator)
    weight = torch.randn(DIM, 1, taps, generator=generator)
    own_layout = x.transpose(1, 2).contiguous()
    past = (taps - 1) * dilation

    def fft(x: Tensor) -> Tensor:
        kernel = x.new_zeros(DIM, max(length, past + 1))
        kernel[:, : past + 1 : dilation] = weight[:, 0].flip(1)
        return peers.long_convolution(x, kernel[:, :length])

    def conv1d(_: Tensor) -> Tensor:
        y = F.conv1d(F.pad(own_layout, (past, 0)), weight, groups=DIM, dilation=dilation)
        return y.transpose(1, 2)

    return Sides(
        {
            "ours": forward(lambda x: dilated_conv(x, weight, dilation=dilation)[0], [x]),
            "FFT convolution": forward(fft, [x]),
            "torch Conv1d": forward(conv1d, [x]),
        },
        Work(2 * taps * length * DIM, 2 * length * DIM * FLOAT),
    )


def lookup(length: int) -> Sides:
    from seqzoo.blocks.layers.vector_quantizer import VectorQuantizer

    torch.manual_seed(0)
    ours = VectorQuantizer(512, DIM).eval()
    x = torch.randn(1, length, DIM)

    def run() -> list[Tensor]:
        with torch.no_grad():
            found = ours(x.unsqueeze(2))
            return [found.x.squeeze(2), found.code.squeeze(2)]

    def theirs() -> Run:
        layer = peers.vector_quantize(ours.codebook()[0])

        def run() -> list[Tensor]:
            with torch.no_grad():
                return list(layer(x))

        return run

    work = Work(2 * length * 512 * DIM, 3 * length * DIM * FLOAT)
    return Sides({"ours": run, "vector-quantize-pytorch": attempt(theirs)}, work)


def agent(length: int) -> Sides:
    q, k, v = qkv(length)
    tensors = [q, qkv(64)[0], k, v]
    work = Work(8 * length * 64 * HEADS * WIDTH, 4 * length * DIM * FLOAT, 2 * length * 64 * HEADS)
    runs: dict[str, Run | Missing] = {
        "ours": forward(agent_attention, tensors),
        "two naive softmaxes": forward(peers.two_softmaxes, tensors),
    }
    return Sides(runs, work)


def cases() -> list[Case]:
    """Every case, in the order of the issue's bars."""
    found: list[Case] = []

    def add(operation: str, case: str, length: int, passes: str, bars: Any, build: Any, **options: Any) -> None:
        limits = bars if isinstance(bars, tuple) else (bars,)
        found.append(Case(operation, case, length, passes, limits, build, **options))

    for backward, passes in enumerate(PASSES):
        for length in (1024, 4096, 16384):
            build = partial(softmax, backward=bool(backward))
            add("softmax", "causal", length, passes, Bar("ours", "torch SDPA", 1.05), build, quick=length < 16384)
        build = partial(window, backward=bool(backward))
        add("window", "128 + 128", 16384, passes, Bar("ours", "local-attention", 0.45), build, quick=True)
        for normalize in (False, True):
            case = "normalised" if normalize else "plain sum"
            for length in (16384,) if backward else (16384, 65536):
                build = partial(linear, backward=bool(backward), normalize=normalize)
                bar = Bar("ours", "fla naive_chunk", 0.70 if backward else 0.50)
                add("linear", case, length, passes, bar, build, quick=length == 16384)
    output = 16384 * DIM * FLOAT
    build = partial(linear, backward=False, normalize=True)
    memory = Bar("ours", "the output", 1.3, of="memory", peer_bytes=output)
    add("linear", "normalised, peak memory over inputs", 16384, "fwd", memory, build, quick=True)
    for backward, passes in enumerate(PASSES):
        bar = Bar("ours", "fla naive simple_gla", 0.12 if backward else 0.60)
        build = partial(lightning, backward=bool(backward))
        add("lightning", "a decay per head", 16384, passes, bar, build, quick=not backward)
    shape = "H 8, P 64, N 64, one group"
    bar = Bar("ours", "fla naive simple_gla", 0.70)
    add("SSD", shape, 16384, "fwd", bar, partial(ssd, backward=False), quick=True)
    bar = Bar("ours", "transformers Mamba-2", 0.35)
    add("SSD", shape, 4096, "fwd+bwd", bar, partial(ssd, backward=True), quick=True)
    shape, loop = f"E {INNER}, N {STATES}", "transformers' loop"
    sides = ("ours", "ours, compiled", loop, "mambapy")
    bars = Bar("ours", loop, 0.45), Bar("ours", "mambapy", 0.25), Bar("ours, compiled", loop, 0.05)
    add("mamba", shape, 16384, "fwd", bars, partial(scan, backward=False, sides=sides))
    add("mamba", shape, 4096, "fwd", bars, partial(scan, backward=False, sides=sides), quick=True)
    sides = "ours", "ours, compiled", "mambapy"
    bars = Bar("ours", "mambapy", 0.60), Bar("ours, compiled", "mambapy", None)
    add("mamba", shape, 4096, "fwd+bwd", bars, partial(scan, backward=True, sides=sides))
    memory = Bar("ours", "mambapy", 0.15, of="memory")
    build = partial(scan, backward=False, sides=("ours", "mambapy"))
    add("mamba", f"{shape}, peak memory over inputs", 4096, "fwd", memory, build)
    for length in (4096, 16384):
        bar = Bar("ours", "Vandermonde + FFT", 0.06)
        add("s4d", "layer core, N 64", length, "fwd", bar, s4d, quick=length == 4096)
    each, shared = "ours, a sample per query", "ours, a sample per 128 queries"
    published, full = "published algorithm", "torch SDPA, all pairs"
    for length in (4096, 16384):
        limit = 0.10 if length == 16384 else None
        bars = Bar(each, published, 0.95), Bar(shared, published, 0.10), Bar(shared, full, limit), Bar(each, full, None)
        add("prob_sparse", "factor 5", length, "fwd", bars, prob_sparse, quick=length == 4096)
    for length in (4096, 16384, 65536):
        bars = Bar("ours", "FFT convolution", 0.30), Bar("ours", "torch Conv1d", 1.05)
        add("tcnca", "depthwise, 17 taps 16 apart", length, "fwd", bars, convolution, quick=length < 65536)
    bar = Bar("ours", "vector-quantize-pytorch", 0.60)
    add("vq", "512 codewords of 256", 16384, "fwd", bar, lookup, quick=True)
    for length in (4096, 16384):
        add("agent", "64 agents", length, "fwd", Bar("ours", "two naive softmaxes", 0.90), agent, quick=True)
    half, bf16 = "ours, bf16 autocast", "bf16 product GFLOP/s"
    first, second = "neuralforecast", "transformers"
    bars = (
        Bar("ours", first, 0.80),
        Bar(half, first, 0.50, product=bf16),
        Bar("ours", second),
        Bar(half, second, product=bf16),
    )
    for threads in (1, 2):
        case = f"training step, batch 32, {threads} thread{'s' * (threads > 1)}"
        add("informer", case, 96, "fwd+bwd", bars, informer, threads=threads)
    for name in LINEAR_COST:
        if seqzoo.mixer_info(name).streaming:
            bar = Bar("after a long past", "after a short past", 1.15)
            add("decode", name, 65536, "step", bar, partial(decode, name=name))
    return found
