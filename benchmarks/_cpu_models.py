"""What benchmarks/cpu.py measures beyond single operations: a training step, decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import _peers as peers
import torch
from _cases import Missing, Run, Sides, Work, attempt
from torch import Tensor
from torch.nn import functional as F

import seqzoo
from seqzoo.blocks.protocol import map_state

DIM, HEADS = 256, 4
# Where the default of a mixer is not its linear-cost form: chunked attention.
CHUNKED: dict[str, dict[str, Any]] = {"mega": {"chunk_size": 128}, "tcnca": {"chunk_size": 128}}
LINEAR_COST = ("linear", "lightning", "gla", "mamba", "mamba2", "s4d", "mega", "tcnca", "long_vq", "agent")


def informer(length: int) -> Sides:
    """A step: forward, loss, backward, Adam. The sides draw other samples and dropouts, and their losses are not the
    same; what is compared is that all have the width, depth and heads of the paper."""
    sizes = {
        "seq_len": length,
        "label_len": length // 2,
        "pred_len": 24,
        "dim": 512,
        "num_heads": 8,
        "factor": 5,
        "drop": 0.05,
    }
    torch.manual_seed(0)
    batch = {
        "past_target": torch.randn(32, length, 7),
        "past_time": torch.rand(32, length, 4) - 0.5,
        "future_time": torch.rand(32, 24, 4) - 0.5,
        "future_target": torch.randn(32, 24, 7),
    }

    def ours() -> tuple[torch.nn.Module, Callable[[], Tensor]]:
        model = seqzoo.create_model("informer", in_channels=7, preset="original", **sizes)
        return model, lambda: F.mse_loss(model(batch)[..., 0].float(), batch["future_target"])

    def step(
        make: Callable[[], tuple[torch.nn.Module, Callable[[], Tensor]]], *, fused: bool, bf16: bool = False
    ) -> Run:
        model, loss = make()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=fused)

        def run() -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                value = loss()
            optimizer.zero_grad(set_to_none=True)
            value.backward()
            optimizer.step()
            return [value.detach()]

        return run

    tokens = 32 * (2 * length + length // 2 + 24)
    macs = tokens * 12 * 512**2 + 32 * length * 3 * 512**2  # projections and feed-forwards, and the distilling
    return Sides(
        {
            "ours": step(ours, fused=True),
            "ours, bf16 autocast": step(ours, fused=True, bf16=True),
            "neuralforecast": attempt(lambda: step(lambda: peers.neuralforecast_informer(batch, sizes), fused=False)),
            "transformers": attempt(lambda: step(lambda: peers.transformers_informer(batch, sizes), fused=False)),
        },
        Work(6 * macs * 0.75),
        pairs={},
    )


def _mixer(name: str, dim: int = DIM, **where: Any) -> Any:
    torch.manual_seed(0)
    options = {"num_heads": HEADS} if "num_heads" in seqzoo.mixer_info(name).options else {}
    return seqzoo.create_mixer({"name": name, **options, **CHUNKED.get(name, {})}, dim, causal=True).eval().to(**where)


def decode(length: int, *, name: str, steps: int = 32, dim: int = DIM, batch: int = 1, **where: Any) -> Sides:
    """Single steps after a long and a short past. where: device and dtype."""
    layer = _mixer(name, dim, **where)
    token = torch.randn(batch, 1, dim, **where)
    runs: dict[str, Run | Missing] = {}
    sizes: list[int] = []
    for past in (length, length // 64):
        with torch.no_grad():
            state = layer(
                torch.randn(batch, past, dim, **where), state=layer.init_state(batch, device=where.get("device"))
            ).state

        def run(state: Any = state) -> list[Tensor]:
            with torch.no_grad():
                for _ in range(steps):
                    y, state, _ = layer(token, state=state)
            return [y]

        held: list[int] = []
        map_state(lambda t, held=held: held.append(t.numel() * t.element_size()) or t, state)  # type: ignore[misc]
        sizes.append(sum(held))
        runs["after a long past" if past == length else "after a short past"] = run
    return Sides(runs, pairs={}, facts={"state bytes": sizes, "steps": steps})
