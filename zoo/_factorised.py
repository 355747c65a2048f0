"""Blocks that mix across frames, then within each frame: divided space-time attention with any mixers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..blocks.backbone import BackboneOutput, MixerChoice
from ..blocks.block import Block
from ..blocks.layers.ffn import create_ffn
from ..blocks.layers.norm import create_norm
from ..blocks.registry import create_mixer


class FactorisedBackbone(nn.Module):
    """`depth` times: a mixer across the frames at each place, a mixer within each frame, a feed-forward.

    The order is TimeSformer's (arXiv:2102.05095, divided space-time attention); any mixers stand for its attention.
    mixer, space_mixer: as `Backbone` takes them, each repeated to `depth`. causal: across frames. What lies within a
    frame is given `grid` (h, w); frames that are pads are not read. All other options as of `Backbone`.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        mixer: MixerChoice | Sequence[MixerChoice],
        space_mixer: MixerChoice | Sequence[MixerChoice],
        ffn: str | Callable[..., nn.Module] | None = "gelu",
        mlp_ratio: float | None = None,
        norm: str = "layernorm",
        norm_eps: float | None = None,
        prenorm: bool = True,
        causal: bool = False,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        over, within = _repeated(mixer, depth, "mixer"), _repeated(space_mixer, depth, "space_mixer")
        self.causal, self.grad_checkpointing = causal, False
        self.across, self.within = nn.ModuleList(), nn.ModuleList()
        for i in range(depth):
            options: dict[str, Any] = {
                "norm": norm,
                "norm_eps": norm_eps,
                "prenorm": prenorm,
                "proj_drop": proj_drop,
                "drop_path": drop_path * i / max(depth - 1, 1),
            }
            feed = create_ffn(ffn, dim, mlp_ratio=mlp_ratio, drop=proj_drop)
            self.across.append(Block(dim, create_mixer(over[i], dim, causal=causal), None, **options))
            self.within.append(Block(dim, create_mixer(within[i], dim), feed, **options))
        self.norm = create_norm(norm, dim, norm_eps) if prenorm else nn.Identity()

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def forward(self, x: Tensor, mask: Tensor | None, grid: tuple[int, int, int]) -> BackboneOutput:
        """x: (B, L, D) with L the product of the grid (T, h, w). mask: bool (B, T), True = real frame. Returns y of x's
        shape, zero at pads, and auxiliary losses by name."""
        steps, height, width = grid
        batch, places = x.shape[0], height * width
        x = x.unflatten(1, (steps, places))
        rows = None if mask is None else mask.repeat_interleave(places, 0)
        aux: dict[str, Tensor] = {}
        for across, within in zip(self.across, self.within, strict=True):
            lines = x.transpose(1, 2).flatten(0, 1)
            out = self._run(across, lines, mask=rows)
            x = out.y.unflatten(0, (batch, places)).transpose(1, 2)
            pictures = x.flatten(0, 1) if mask is None else x[mask]
            if pictures.shape[0]:
                inner = self._run(within, pictures, grid=(height, width))
                new = inner.y
                x = (
                    new.unflatten(0, (batch, steps))
                    if mask is None
                    else new.new_zeros(x.shape).index_put(mask.nonzero(as_tuple=True), new)
                )
                out = out._replace(aux=_added(out.aux, inner.aux))
            aux = _added(aux, out.aux)
        y = self.norm(x)
        if mask is not None:
            y = torch.where(mask[:, :, None, None], y, y.new_zeros(()))
        return BackboneOutput(y.flatten(1, 2), None, aux)

    def _run(self, block: nn.Module, x: Tensor, **arguments: Any) -> Any:
        if self.grad_checkpointing and self.training and torch.is_grad_enabled():
            return checkpoint(block, x, use_reentrant=False, **arguments)
        return block(x, **arguments)


def _repeated(choice: Any, depth: int, name: str) -> list[Any]:
    choices = list(choice) if isinstance(choice, (list, tuple)) else [choice]
    if not choices or len(choices) > depth:
        raise ValueError(f"{name} has {len(choices)} mixers for depth={depth}; give from 1 to {depth}")
    return [choices[i % len(choices)] for i in range(depth)]


def _added(first: dict[str, Tensor], second: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: first.get(k, 0) + second.get(k, 0) for k in (*first, *(k for k in second if k not in first))}  # type: ignore[misc]
