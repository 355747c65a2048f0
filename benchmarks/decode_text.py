"""Generation far into a text: ms per token and bytes of state at positions 1k, 10k and 100k.

    python benchmarks/decode_text.py [--positions 1000 10000 100000] [--only mamba2 gla] [--steps 40]

Byte models of width 256 and four blocks with random weights read random bytes in chunks; at each position
`generate_tokens` continues one row from the carried state, and the median CPU time of one token (one thread; model,
sampling and all) is taken. Full softmax reads its prompt up to --feasible tokens; for positions beyond, its cache is
filled with repeats of what it holds, because reading would take the square of the length, and what a step costs does
not depend on the values. Writes benchmarks/results/decode_text.json.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from _runs import RESULTS, write_result
from torch import Tensor, nn

import seqzoo
from seqzoo.blocks.protocol import State, map_state

WINDOW = 512
DEPTH, HEADS, VOCAB = 4, 4, 256
# name -> model, its options, whether the state grows
SUBJECTS: dict[str, tuple[str, dict[str, Any], bool]] = {
    "softmax, window": (
        "transformer_small",
        {"mixer": {"name": "softmax", "num_heads": HEADS, "position": "rope", "window_size": WINDOW}},
        False,
    ),
    "mamba2": ("mamba2_small", {}, False),
    "gla": ("gla_small", {}, False),
    "hybrid": ("hybrid_small", {}, False),
    "softmax": ("transformer_small", {}, True),
}


class Continued(nn.Module):
    """A language model in the middle of a text: its first state is one that it carried there."""

    def __init__(self, model: Any, state: State) -> None:
        super().__init__()
        self.model, self.state, self.vocab_size = model, state, model.vocab_size

    def init_state(self, batch_size: int, **arguments: Any) -> State:
        return self.state

    def forward(self, tokens: Tensor, *, mask: Tensor | None = None, state: State | None = None) -> Any:
        return self.model(tokens, mask=mask, state=state)


def state_bytes(state: State) -> int:
    count = 0

    def add(tensor: Tensor) -> Tensor:
        nonlocal count
        count += tensor.numel() * tensor.element_size()
        return tensor

    map_state(add, state)
    return count


def read(model: Any, state: State, tokens: Tensor, chunk: int) -> State:
    """The state after more tokens (L,), without logits."""
    with torch.no_grad():
        for part in tokens.split(chunk):
            state = model.model.forward_features(part[None], state=state).state
    return state


def filled(state: Any, position: int) -> Any:
    """A state whose growing caches hold `position` slots, repeats of their own."""
    held = int(state.position[0])

    def repeat(tensor: Tensor) -> Tensor:
        if tensor.dim() < 2 or tensor.shape[1] != held:
            return torch.full_like(tensor, position) if tensor.dim() == 1 else tensor
        return tensor.repeat(1, -(-position // held), *[1] * (tensor.dim() - 2))[:, :position].contiguous()

    return map_state(repeat, state)


def token_ms(model: Any, state: State, steps: int) -> list[float]:
    """CPU time of each of `steps` tokens, after three that warm up."""
    stream = seqzoo.generate_tokens(Continued(model, state), [1], max_new_tokens=steps + 3, top_p=0.95, seed=0)
    found = []
    for _ in range(steps + 3):
        begin = time.process_time()
        next(stream)
        found.append(1e3 * (time.process_time() - begin))
    return found[3:]


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    base, own, grows = SUBJECTS[name]
    torch.manual_seed(0)
    model: Any = seqzoo.create_model(base, dim=options.dim, depth=DEPTH, **own).eval()
    state, at = model.init_state(1), 0
    text = torch.randint(VOCAB, (max(options.positions),))
    rows = []
    for position in sorted(options.positions):
        begin = time.process_time()
        reached = min(position, options.feasible) if grows else position
        state = read(model, state, text[at:reached], options.chunk)
        spent = time.process_time() - begin
        per_token = 1e3 * spent / (reached - at) if reached > at else None
        at = max(at, reached)
        there = state if at == position else filled(state, position)
        times = token_ms(model, there, options.steps if at == position else min(options.steps, 8))
        rows.append(
            {
                "model": name,
                "position": position,
                "ms per token": statistics.median(times),
                "fastest ms": min(times),
                "tokens timed": len(times),
                "state bytes": state_bytes(there),
                "read": at == position,
                "prefill ms per token": per_token if at == position else None,
                "parameters": sum(p.numel() for p in model.parameters()),
            }
        )
        print({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[-1].items()}, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--positions", type=int, nargs="+", default=[1000, 10_000, 100_000])
    parser.add_argument("--only", nargs="+", default=list(SUBJECTS), choices=list(SUBJECTS))
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--steps", type=int, default=40, help="tokens timed at each position")
    parser.add_argument("--chunk", type=int, default=2048, help="tokens of the prompt read in one call")
    parser.add_argument("--feasible", type=int, default=10_000, help="tokens that full softmax reads")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begin = time.process_time()
    rows = [row for name in options.only for row in measure(name, options)]
    settings = {
        "dim": options.dim,
        "depth": DEPTH,
        "batch": 1,
        "threads": 1,
        "dtype": "float32",
        "window": WINDOW,
        "chunk": options.chunk,
        "time": "CPU time of one token, median",
    }
    result = {"settings": settings, "rows": rows, "cpu seconds": time.process_time() - begin}
    print(write_result("decode_text", result, options.out))


if __name__ == "__main__":
    main()
