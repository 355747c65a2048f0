"""What benchmarks/gpu.py measures: a case for every GPU bar, in bfloat16; the shapes are those of the bars."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import _peers as peers
import torch
from _cases import Bar, Case, Missing, Run, Sides, Work, attempt, either
from _cpu_models import decode
from torch import Tensor
from torch.nn import functional as F

import seqzoo
from seqzoo.kernels.block_sparse import block_means, block_sparse_attention, route
from seqzoo.kernels.dispatch import choose_backend
from seqzoo.kernels.gated_linear_attention import gated_linear_attention
from seqzoo.kernels.linear_attention import linear_attention
from seqzoo.kernels.selective_scan import selective_scan
from seqzoo.kernels.softmax import softmax_attention

HALF = 2  # bytes of a number
PASSES = ("fwd", "fwd+bwd")
SDPA = {"SDPA flash": "FLASH_ATTENTION", "SDPA cuDNN": "CUDNN_ATTENTION", "SDPA efficient": "EFFICIENT_ATTENTION"}
SHAPES = ((2, 16384, 16, 128), (1, 8192, 96, 128), (4, 4096, 64, 128))


@dataclass(frozen=True)
class Where:
    """device, dtype. backend: of our kernels. tiny: every shape shrinks to what a CPU does in milliseconds."""

    device: torch.device
    dtype: torch.dtype = torch.bfloat16
    backend: str = "auto"
    tiny: bool = False

    def shape(self, batch: int, length: int, heads: int, width: int) -> tuple[int, int, int, int]:
        return (1, min(length, 64), 2, 16) if self.tiny else (batch, length, heads, width)

    def random(self, *shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
        generator = torch.Generator(self.device).manual_seed(seed)
        drawn = torch.randn(shape, generator=generator, device=self.device, dtype=torch.float32)
        return (drawn * scale).to(self.dtype)

    def runs(self, op: str) -> dict[str, Any]:
        """The backend that our side takes, for its row."""
        try:
            return {"backend": choose_backend(op, self.backend, dtype=self.dtype, device=self.device).name}
        except ValueError:
            return {}

    def sides(self, op: str, runs: dict[str, Run | Missing], work: Work | None = None) -> Sides:
        return Sides(runs, work or Work(), tolerance=2e-2, facts=self.runs(op))


def softmax(where: Where, shape: tuple[int, int, int, int], backward: bool) -> Sides:
    tensors = [where.random(*shape, seed=seed) for seed in range(3)]
    runs: dict[str, Run | Missing] = {"ours": either(backward, partial(softmax_attention, causal=True), tensors)}
    for side, name in SDPA.items():
        runs[side] = attempt(lambda name=name: either(backward, peers.sdpa_backend(name), tensors))
    batch, length, heads, width = shape
    pairs = batch * heads * length * length / 2
    return where.sides("softmax", runs, Work((14 if backward else 4) * pairs * width, exps=pairs))


def linear(where: Where, shape: tuple[int, int, int, int], backward: bool, decay: bool, rival: str = "fla") -> Sides:
    """Without a decay, or with a constant one for each head; rival: "fla" or "SDPA"."""
    q, k, v = (where.random(*shape, seed=seed) for seed in range(3))
    tensors = [q, k, v] if decay else [F.elu(q) + 1, F.elu(k) + 1, v]
    heads = shape[2]
    gamma = -torch.exp2(-torch.arange(1, heads + 1, device=where.device) * 8 / heads)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if decay:
            return gated_linear_attention(q, k, v, gamma, backend=where.backend)[0]
        return linear_attention(q, k, v, causal=True, normalize=False, backend=where.backend)[0]

    runs: dict[str, Run | Missing] = {"ours": either(backward, ours, tensors)}
    if rival == "fla":
        make: Callable[[], Callable[..., Tensor]]
        make = partial(peers.fla_triton_decay, gamma) if decay else peers.fla_triton_linear
        runs["fla"] = attempt(lambda: either(backward, make(), tensors))
    else:
        for side, name in SDPA.items():
            runs[side] = attempt(lambda name=name: either(backward, peers.sdpa_backend(name), tensors))
    numbers = shape[0] * shape[1] * heads * shape[3]
    sides = where.sides(
        "gated_linear_attention" if decay else "linear_attention",
        runs,
        Work(bytes=(11 if backward else 4) * numbers * HALF),
    )
    if rival != "fla":
        sides.pairs = {}  # another function
    return sides


def widths(where: Where, backward: bool, decay: bool) -> Sides:
    """As many tokens and heads at D 256 and at D 128."""
    runs: dict[str, Run | Missing] = {}
    for name, width in (("D 256", 256), ("D 128", 128)):
        batch, length, heads, width = where.shape(8, 2048, 32, width)
        width = width if not where.tiny or name == "D 128" else 2 * width
        runs[name] = linear(where, (batch, length, heads, width), backward, decay).runs["ours"]
    sides = where.sides("gated_linear_attention" if decay else "linear_attention", runs)
    sides.pairs = {}
    return sides


def ssd(where: Where, batch: int, length: int, backward: bool) -> Sides:
    heads, width, states = (2, 16, 16) if where.tiny else (80, 64, 128)
    length, batch = (64, 1) if where.tiny else (length, batch)
    x = where.random(batch, length, heads, width)
    b, c = (where.random(batch, length, 1, states, seed=seed, scale=states**-0.5) for seed in (1, 2))
    decay = -F.softplus(where.random(batch, length, heads, seed=3).float() - 2)

    def ours(c: Tensor, b: Tensor, x: Tensor, g: Tensor) -> Tensor:
        return gated_linear_attention(c, b, x, g, backend=where.backend)[0]

    def fla() -> Run:
        run = peers.fla_triton_gated()

        def theirs(c: Tensor, b: Tensor, x: Tensor, g: Tensor) -> Tensor:
            wide = (batch, length, heads, states)
            return run(c.expand(wide).contiguous(), b.expand(wide).contiguous(), x, g)

        return either(backward, theirs, tensors)

    tensors = [c, b, x, decay]
    moved = batch * length * (2 * heads * width + 2 * states + 2 * heads) * HALF
    chunk = 128
    flops = batch * length * (chunk * states + heads * (chunk * width + 4 * states * width))
    runs = {"ours": either(backward, ours, tensors), "fla": attempt(fla)}
    factor = 3 if backward else 1
    return where.sides("gated_linear_attention", runs, Work(factor * flops, 2.75 * moved if backward else moved))


def mamba(where: Where, length: int, backward: bool, batch: int = 8) -> Sides:
    batch, length, inner, states = (1, 64, 32, 8) if where.tiny else (batch, length, 4096, 16)
    u = where.random(batch, length, inner)
    dt = F.softplus(where.random(batch, length, inner, seed=1) - 3)
    a = -torch.arange(1.0, states + 1, device=where.device).expand(inner, states).contiguous()
    b, c = (where.random(batch, length, states, seed=seed) for seed in (2, 3))
    ours = partial(selective_scan, backend=where.backend)
    run = either(backward, lambda *tensors: ours(*tensors)[0], [u, dt, a, b, c])
    cells = batch * length * inner * states
    work = Work(bytes=3 * batch * length * inner * HALF * (2.3 if backward else 1), exps=cells)
    return where.sides("selective_scan", {"ours": run}, work)


def routing(where: Where, length: int, backward: bool) -> Sides:
    """64 regions, of which each sends its queries to 8; the regions are chosen beforehand, for all sides alike."""
    batch, length, heads, width = where.shape(2, length, 16, 64)
    regions, top = (4, 2) if where.tiny else (64, 8)
    size = length // regions
    tensors = [where.random(batch, length, heads, width, seed=seed) for seed in range(3)]
    means = [block_means(t.flatten(2)[:1], size)[0].unsqueeze(2) for t in tensors[:2]]
    index = route(*means, top)  # (1, 1, G, T)
    whole = index.expand(batch, -1, -1, -1).contiguous()
    chosen = partial(block_sparse_attention, q_block=size, k_block=size, backend=where.backend)
    runs: dict[str, Run | Missing] = {
        "ours": either(backward, lambda q, k, v: chosen(q, k, v, whole), tensors),
        "FlexAttention": attempt(lambda: either(backward, peers.flex_blocks(index[0, 0], length, size), tensors)),
        "SDPA, all pairs": either(backward, partial(peers.sdpa, causal=False), tensors),
    }
    pairs = batch * heads * length * top * size
    sides = where.sides("block_sparse", runs, Work((14 if backward else 4) * pairs * width, exps=pairs))
    if not isinstance(runs["FlexAttention"], Missing):
        sides.pairs = {"FlexAttention": (runs["FlexAttention"], runs["ours"])}  # type: ignore[dict-item]
    else:
        sides.pairs = {}
    return sides


def growth(where: Where, length: int, kind: str) -> Sides:
    """An operation at two lengths, four times apart, with heads enough to fill the device."""
    runs: dict[str, Run | Missing] = {}
    for tokens, name in ((length, "this length"), (length // 4, "a quarter of it")):
        tokens = tokens // 1024 if where.tiny else tokens
        if kind == "SSD":
            runs[name] = ssd(where, 2, tokens, False).runs["ours"]
        elif kind == "mamba":
            runs[name] = mamba(where, tokens, False, batch=2).runs["ours"]
        else:
            shape = (1, tokens, 2, 16) if where.tiny else (4, tokens, 36, 64)
            runs[name] = linear(where, shape, False, kind == "lightning").runs["ours"]
    return Sides(runs, pairs={})


def cases(where: Where) -> list[Case]:
    found: list[Case] = []

    def add(operation: str, case: str, length: int, passes: str, bars: Any, build: Callable[[], Sides]) -> None:
        limits = bars if isinstance(bars, tuple) else (bars,)
        found.append(Case(operation, case, length, passes, limits, lambda _: build()))

    fastest = tuple(SDPA)
    for backward, passes in enumerate(PASSES):
        for width in (64, 128):
            for length in (2048, 4096, 16384):
                shape = where.shape(16384 // length, length, 2048 // width, width)
                bar = Bar("ours", "the fastest SDPA", 1.03, fastest=fastest)
                build = partial(softmax, where, shape, bool(backward))
                add("softmax", f"causal, D {width}", length, passes, bar, build)
    for decay, operation in enumerate(("linear", "lightning")):
        for backward, passes in enumerate(PASSES):
            for full in SHAPES:
                bars: tuple[Bar, ...] = (
                    Bar("ours", "fla", 0.70 if backward else 0.60),
                    Bar("ours", "the copy bandwidth", 0.35 if backward else 0.45, of="roof"),
                )
                build = partial(linear, where, where.shape(*full), bool(backward), bool(decay))
                add(operation, f"(B, L, H, D) {full}", full[1], passes, bars, build)
            build = partial(linear, where, where.shape(8, 2048, 32, 256), bool(backward), bool(decay))
            add(operation, "(B, L, H, D) (8, 2048, 32, 256)", 2048, passes, Bar("ours", "fla"), build)
            build = partial(widths, where, bool(backward), bool(decay))
            add(operation, "no cliff at D 256", 2048, passes, Bar("D 256", "D 128", 2.5), build)
        build = partial(linear, where, where.shape(8, 1024, 8, 64), False, bool(decay))
        add(operation, "(B, L, H, D) (8, 1024, 8, 64)", 1024, "fwd", Bar("ours", "fla", 0.5), build)
        for length in (4096, 16384):
            bar = Bar("ours", "the fastest SDPA", 1.0, fastest=fastest)
            build = partial(
                linear, where, where.shape(32768 // length, length, 16, 128), True, bool(decay), rival="SDPA"
            )
            add(operation, "against softmax, H 16, D 128", length, "fwd+bwd", bar, build)
    for length in (4096, 16384):
        bar = Bar("ours", "fla", 0.70)
        add("SSD", "B 8, H 80, P 64, N 128", length, "fwd", bar, partial(ssd, where, 8, length, False))
    add("SSD", "B 8, H 80, P 64, N 128", 4096, "fwd+bwd", Bar("ours", "fla"), partial(ssd, where, 8, 4096, True))
    for length in (4096, 16384):
        bar = Bar("ours", "the larger of its bounds", 0.5, of="roof")
        add("mamba", "B 8, E 4096, N 16", length, "fwd", bar, partial(mamba, where, length, False))
    bar = Bar("ours", "the larger of its bounds", None, of="roof")
    add("mamba", "B 8, E 4096, N 16", 4096, "fwd+bwd", bar, partial(mamba, where, 4096, True))
    for backward, passes in enumerate(PASSES):
        bars = Bar("ours", "SDPA, all pairs", 0.5), Bar("ours", "FlexAttention", 1.0)
        build = partial(routing, where, 16384, bool(backward))
        add("bi_level_routing", "64 regions, 8 of them", 16384, passes, bars, build)
    for kind in ("linear", "lightning", "SSD", "mamba"):
        bar = Bar("this length", "a quarter of it", 4.15)
        add("growth", kind, 65536, "fwd", bar, partial(growth, where, 65536, kind))
    for name in ("linear", "lightning", "gla", "mamba", "mamba2"):
        if not seqzoo.mixer_info(name).streaming:
            continue
        sizes = {"dim": 64, "steps": 2} if where.tiny else {"dim": 1024, "batch": 8, "steps": 64}
        past = 128 if where.tiny else 65536
        build = partial(decode, past, name=name, device=where.device, dtype=where.dtype, **sizes)
        add("decode", name, 65536, "step", Bar("after a long past", "after a short past", 1.05), build)
    return found
