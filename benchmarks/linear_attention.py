"""Causal linear attention on the CPU: our chunked form beside the usual ones, one process, interleaved.

    python benchmarks/linear_attention.py [--length 16384] [--threads 1] [--rounds 9]

Peers: a chunked einsum with autograd, and fla's naive_chunk_linear_attn where fla is installed. All get the
same inputs, and outputs and gradients are compared first. Times are CPU time for one thread and wall time for
more; the ratio is that of the medians. Memory is the growth of the peak resident size over the inputs, each
case in a fresh process (Linux).
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from _runs import write_result
from torch import Tensor

from seqzoo.kernels.linear_attention import linear_attention

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
EPS = 1e-6


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(q, k, v, causal=True, eps=EPS, backend="chunked")[0]


def naive(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(q, k, v, causal=True, eps=EPS, backend="naive")[0]


def chunked_einsum(q: Tensor, k: Tensor, v: Tensor, chunk: int = 64) -> Tensor:
    """The usual form: all chunks at once, states by a cumulative sum over chunks, backward by autograd."""
    q, k, v = (t.transpose(1, 2).unflatten(2, (-1, chunk)) for t in (q, k, v))  # (B, H, chunks, C, K)
    states = (k.transpose(-1, -2) @ v).cumsum(2)
    states = torch.cat([torch.zeros_like(states[:, :, :1]), states[:, :, :-1]], 2)
    future = torch.ones(chunk, chunk, dtype=torch.bool, device=q.device).triu(1)
    o = q @ states + (q @ k.transpose(-1, -2)).masked_fill(future, 0) @ v
    den = (q.flatten(2, 3) * k.flatten(2, 3).cumsum(2)).sum(-1, keepdim=True) + EPS
    return (o.flatten(2, 3) / den).transpose(1, 2)


def contenders(length: int) -> dict[str, Attention]:
    found: dict[str, Attention] = {"ours chunked": ours, "chunked einsum with autograd": chunked_einsum}
    try:
        from fla.ops.linear_attn.naive import naive_chunk_linear_attn

        found["fla naive_chunk_linear_attn"] = lambda q, k, v: naive_chunk_linear_attn(q, k, v, 1.0, True)
    except ImportError:
        pass
    if length <= 2048:  # its L x L matrix
        found["ours naive (dense)"] = naive
    return found


def make_inputs(length: int, heads: int, width: int) -> list[Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, length, heads, width) for _ in range(3))
    return [torch.nn.functional.elu(q) + 1, torch.nn.functional.elu(k) + 1, v]


def step(function: Attention, tensors: list[Tensor], backward: bool) -> list[Tensor]:
    """One run: [o], with backward [o, dq, dk, dv] for the gradient of sum(o v)."""
    if not backward:
        with torch.no_grad():
            return [function(*tensors)]
    leaves = [t.detach().requires_grad_() for t in tensors]
    o = function(*leaves)
    return [o, *torch.autograd.grad(o, leaves, tensors[2])]


def measure(
    functions: dict[str, Attention], tensors: list[Tensor], backward: bool, rounds: int, threads: int
) -> dict[str, float]:
    """Median milliseconds of each, after a comparison of what they return."""
    clock = time.process_time if threads == 1 else time.perf_counter
    want = step(functions["ours chunked"], tensors, backward)
    for name, function in functions.items():
        for got, expected in zip(step(function, tensors, backward), want, strict=True):
            error = ((got - expected).norm() / expected.norm()).item()
            if not error < 1e-4:
                raise SystemExit(f"{name} differs from ours chunked by {error:.1e} (rms)")
    del want, got, expected
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = clock()
            step(function, tensors, backward)
            times[name].append((clock() - start) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def _resident(field: str) -> float:
    """VmRSS, now, or VmHWM, the peak, in MB."""
    status = Path("/proc/self/status").read_text()
    return int(status.split(f"{field}:")[1].split()[0]) / 1024


def _peak_growth(queue: multiprocessing.Queue, name: str, shape: tuple[int, int, int], backward: bool) -> None:
    torch.set_num_threads(1)
    tensors, function = make_inputs(*shape), contenders(shape[0])[name]
    step(function, [t[:, :64] for t in tensors], backward)  # libraries and caches load
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = _resident("VmRSS")
    step(function, tensors, backward)
    queue.put(_resident("VmHWM") - before)


def peak_megabytes(name: str, shape: tuple[int, int, int], backward: bool) -> float:
    """Growth of the peak resident memory over the inputs, in a fresh process."""
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_peak_growth, args=(queue, name, shape, backward))
    process.start()
    process.join()
    return queue.get()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--length", type=int, default=16384, help="a multiple of 64")
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=9)
    args = parser.parse_args()
    if args.length % 64:
        parser.error(f"--length {args.length} must be a multiple of 64, the peers' chunk")
    torch.set_num_threads(args.threads)
    shape = args.length, args.heads, args.width
    tensors, functions = make_inputs(*shape), contenders(args.length)
    output = args.length * args.heads * args.width * 4 / 2**20
    print(
        f"Causal linear attention, B 1, L {args.length}, H {args.heads}, K = V = {args.width}, fp32, "
        f"{args.threads} thread(s), torch {torch.__version__}, {platform.machine()}. "
        f"The output takes {output:.0f} MB."
    )
    rows = []
    for backward in (False, True):
        medians = measure(functions, tensors, backward, args.rounds, args.threads)
        for name, value in medians.items():
            row = {
                "pass": "fwd+bwd" if backward else "fwd",
                "form": name,
                "median ms": value,
                "ours / it": medians["ours chunked"] / value,
                "peak MB over inputs": peak_megabytes(name, shape, backward),
            }
            rows.append(row)
            print(" | ".join(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()), flush=True)
    settings = {"length": args.length, "heads": args.heads, "width": args.width, "threads": args.threads}
    print(write_result("linear_attention", {"settings": settings, "rows": rows}))


if __name__ == "__main__":
    main()
