"""A stack of blocks over any mixer, or over a repeated list of mixers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .block import Block, BlockOutput
from .layers.ffn import FFNChoice, create_ffn
from .layers.norm import create_norm, normalize
from .layers.positions import create_position
from .protocol import Exchange, Mixer, State, exchanging
from .registry import create_mixer

MixerChoice = str | dict[str, Any] | type[Mixer] | Callable[..., Mixer]


class BackboneState(NamedTuple):
    """position: (B,) int64, real tokens seen so far per row; layers: the state of each block's mixer."""

    position: Tensor
    layers: tuple[State, ...]


class BackboneOutput(NamedTuple):
    """y: (B, L, D); state: the carried state when one was passed in; aux: scalar losses by name, summed over layers."""

    y: Tensor
    state: BackboneState | None
    aux: dict[str, Tensor]


def token_positions(
    batch: int,
    length: int,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    offset: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Position of each token in its own sequence, (B, L) int64: pads do not count, packed sequences start at 0."""
    if mask is not None:
        positions = (mask.long().cumsum(1) - 1).clamp_min(0)
    else:
        positions = torch.arange(length, device=device).expand(batch, length)
    if cu_seqlens is not None:
        starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
        positions = positions - torch.repeat_interleave(starts, lengths).unsqueeze(0)
        if offset is not None:
            return positions + torch.repeat_interleave(offset, lengths).unsqueeze(0)
        return positions
    return positions if offset is None else positions + offset.unsqueeze(1)


def _run_block(block: nn.Module, exchange: Exchange | None, *inputs: Any, **arguments: Any) -> BlockOutput:
    """The block; a recomputation in the backward pass meets the exchange of the forward pass."""
    if exchange is None:
        return block(*inputs, **arguments)
    with exchanging(block, exchange):
        return block(*inputs, **arguments)


class Backbone(nn.Module):
    """`depth` pre-norm blocks with one mixer, or with several in turn (a hybrid).

    dim: model width. depth: number of blocks. mixer: a registry name, `{"name": ..., **options}`, a `Mixer` subclass, a
    factory, or a sequence of those repeated to `depth`. cross_mixer: the same for a cross-attention sub-layer in every
    block. ffn: "gelu", "swiglu", "none", `{"name": ..., **options}` or a factory of `dim`; mlp_ratio: its inner width
    over `dim`. position: an
    additive position ("none", "learned", "sinusoidal"); max_len bounds the learned one. causal: passed to the mixers;
    cross: the mixers themselves read `context`. prenorm: False puts the norms after the sums (give final_norm=False
    then). parallel, layer_scale: see `Block`. drop_path grows linearly to its value at the last block.

    Raises ValueError for unknown names, options and patterns.
    """

    def __init__(
        self,
        dim: int,
        depth: int,
        *,
        mixer: MixerChoice | Sequence[MixerChoice] = "softmax",
        cross_mixer: MixerChoice | None = None,
        ffn: FFNChoice = "gelu",
        mlp_ratio: float | None = None,
        norm: str = "layernorm",
        norm_eps: float | None = None,
        prenorm: bool = True,
        parallel: bool = False,
        layer_scale: float | None = None,
        position: str = "none",
        max_len: int | None = None,
        causal: bool = False,
        cross: bool = False,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
        final_norm: bool = True,
    ) -> None:
        super().__init__()
        if depth < 1:
            raise ValueError(f"depth={depth} must be at least 1")
        choices: list[Any] = list(mixer) if isinstance(mixer, (list, tuple)) else [mixer]
        if not choices:
            raise ValueError("mixer is an empty list; give at least one mixer")
        if len(choices) > depth:
            raise ValueError(f"{len(choices)} mixers were given for depth={depth}; the list is repeated to the depth")
        if causal and norm == "batchnorm":
            raise ValueError("norm='batchnorm' takes statistics over later tokens too; with causal=True give another")
        self.dim, self.depth, self.causal = dim, depth, causal
        self.position = create_position(position, dim, max_len=max_len)
        self.blocks = nn.ModuleList(
            Block(
                dim,
                create_mixer(choices[i % len(choices)], dim, causal=causal, cross=cross),
                create_ffn(ffn, dim, mlp_ratio=mlp_ratio, drop=proj_drop),
                cross_mixer=None if cross_mixer is None else create_mixer(cross_mixer, dim, causal=causal, cross=True),
                norm=norm,
                norm_eps=norm_eps,
                prenorm=prenorm,
                parallel=parallel,
                layer_scale=layer_scale,
                proj_drop=proj_drop,
                drop_path=drop_path * i / max(depth - 1, 1),
            )
            for i in range(depth)
        )
        self.norm = create_norm(norm, dim, norm_eps) if final_norm else nn.Identity()
        self.grad_checkpointing = False

    exchange: Exchange | None = None  # see `Mixer`

    def _blocks(self) -> list[Block]:
        return [b for b in self.blocks if isinstance(b, Block)]

    @property
    def streaming(self) -> bool:
        return self.causal and all(b.mixer.streaming and b.cross_mixer is None for b in self._blocks())

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute each block in the backward pass instead of keeping its activations."""
        self.grad_checkpointing = enable

    def init_state(
        self,
        batch_size: int,
        *,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> BackboneState:
        """The state before the first token. Raises ValueError when a mixer carries none."""
        layers = tuple(
            b.mixer.init_state(batch_size, max_len=max_len, device=device, dtype=dtype) for b in self._blocks()
        )
        return BackboneState(torch.zeros(batch_size, dtype=torch.int64, device=device), layers)

    def state_size(self, length: int) -> int:
        """Floating-point elements of state per sequence after `length` tokens, summed over the blocks."""
        return sum(b.mixer.state_size(length) for b in self._blocks())

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        state: BackboneState | None = None,
    ) -> BackboneOutput:
        """Arguments as `Mixer.forward`."""
        return self._run(x, context, mask, context_mask, cu_seqlens, grid, state, None)

    def forward_intermediates(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        indices: Sequence[int] | None = None,
        **arguments: Any,
    ) -> tuple[BackboneOutput, list[Tensor]]:
        """The output and the features (B, L, D) after the blocks of `indices` (all by default; negative ones count
        from the end). Raises ValueError for an index outside the depth."""
        wanted = range(self.depth) if indices is None else indices
        for i in wanted:
            if not -self.depth <= i < self.depth:
                raise ValueError(f"indices contains {i}, the backbone has {self.depth} blocks")
        features: list[Tensor] = []
        keys = ("mask", "context_mask", "cu_seqlens", "grid", "state")
        unknown = set(arguments) - set(keys)
        if unknown:
            raise ValueError(f"unknown arguments {sorted(unknown)}; known: {', '.join(keys)}")
        output = self._run(x, context, **{k: arguments.get(k) for k in keys}, features=features)
        return output, [features[i] for i in wanted]

    def _run(
        self,
        x: Tensor,
        context: Tensor | None,
        mask: Tensor | None,
        context_mask: Tensor | None,
        cu_seqlens: Tensor | None,
        grid: tuple[int, ...] | None,
        state: BackboneState | None,
        features: list[Tensor] | None,
    ) -> BackboneOutput:
        batch, length = x.shape[:2]
        offset = state.position if state is not None else None
        if self.position is not None:
            positions = token_positions(batch, length, mask, cu_seqlens, offset, x.device)
            if self.exchange is not None:
                positions = positions + self.exchange.start
            x = x + self.position(positions).to(x.dtype)
        aux: dict[str, Tensor] = {}
        states: list[State] = []
        for i, block in enumerate(self.blocks):
            arguments: dict[str, Any] = {
                "mask": mask,
                "context_mask": context_mask,
                "cu_seqlens": cu_seqlens,
                "grid": grid,
                "state": state.layers[i] if state is not None else None,
            }
            if self.grad_checkpointing and self.training and torch.is_grad_enabled():
                out = checkpoint(
                    partial(_run_block, block, self.exchange), x, context, use_reentrant=False, **arguments
                )
            else:
                out = block(x, context, **arguments)
            x = out.y
            states.append(out.state)
            if features is not None:
                features.append(x)
            for name, value in out.aux.items():
                aux[name] = aux[name] + value if name in aux else value
        y = normalize(self.norm, x, mask)
        if mask is not None:
            y = torch.where(mask.unsqueeze(-1), y, y.new_zeros(()))
        if state is None:
            return BackboneOutput(y, None, aux)
        if cu_seqlens is not None:
            seen = cu_seqlens.diff().long()
        elif mask is not None:
            seen = mask.sum(1)
        else:
            seen = torch.full_like(state.position, length if self.exchange is None else self.exchange.total)
        return BackboneOutput(y, BackboneState(state.position + seen, tuple(states)), aux)
