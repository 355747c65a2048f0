"""ProbSparse attention against full softmax attention: growth from 4k to 16k, ratio at each length, peak
memory.

Everything runs in one process, one call of each side after another, round by round, and times are CPU times
on a CPU, so that a busy machine slows both sides. Printed are medians and ratios of medians; smaller is
better.

    python benchmarks/prob_sparse.py --lengths 4096 16384 --rounds 7 --threads 1
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from _measure import peak_mib, seconds
from _runs import write_result
from torch import Tensor
from torch.nn import functional as F

from seqzoo.kernels.prob_sparse import prob_sparse_attention


def full(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """SDPA in our layout."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    sides: dict[str, Callable[..., Tensor]] = {
        "prob_sparse block": partial(prob_sparse_attention, sampling="block", seed=0),
        "prob_sparse query": partial(prob_sparse_attention, sampling="query", seed=0),
        "sdpa full": full,
    }
    times: dict[tuple[str, int], list[float]] = {}
    memory: dict[tuple[str, int], float] = {}
    inputs = {
        length: [
            torch.randn(args.batch, length, args.heads, args.head_dim, device=device, dtype=getattr(torch, args.dtype))
            for _ in range(3)
        ]
        for length in args.lengths
    }
    with torch.no_grad():
        for length, tensors in inputs.items():
            for name, side in sides.items():
                side(*tensors)  # warm-up
                memory[name, length] = peak_mib(partial(side, *tensors), device)
        for _ in range(args.rounds):
            for length, tensors in inputs.items():
                for name, side in sides.items():
                    times.setdefault((name, length), []).append(seconds(partial(side, *tensors), device))
    median = {key: statistics.median(values) for key, values in times.items()}
    first, last = args.lengths[0], args.lengths[-1]
    print(
        f"torch {torch.__version__}, {device}, {args.dtype}, threads {args.threads}, B {args.batch}, "
        f"H {args.heads}, K {args.head_dim}, {args.rounds} rounds, forward"
    )
    head = "".join(f"{f'{n} ms':>12}{'/ full':>9}{'peak MiB':>10}" for n in args.lengths)
    print(f"{'':20}{head}{f't({last})/t({first})':>20}")
    rows = []
    for name in sides:
        row: dict[str, object] = {"form": name}
        for n in args.lengths:
            row[f"ms at {n}"] = median[name, n] * 1e3
            row[f"over full at {n}"] = median[name, n] / median["sdpa full", n]
            row[f"peak MiB at {n}"] = memory[name, n]
        row[f"t({last}) / t({first})"] = median[name, last] / median[name, first]
        rows.append(row)
    name = "prob_sparse" if device.type == "cpu" else f"prob_sparse_{device.type}"
    print(write_result(name, {"dtype": args.dtype, "threads": args.threads, "rows": rows}))
    for name in sides:
        cells = ""
        for n in args.lengths:
            ratio = median[name, n] / median["sdpa full", n]
            cells += f"{median[name, n] * 1e3:12.2f}{ratio:9.3f}{memory[name, n]:10.1f}"
        print(f"{name:20}{cells}{median[name, last] / median[name, first]:20.2f}")


if __name__ == "__main__":
    main()
