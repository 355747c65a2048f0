"""One residual block: a token mixer, an optional cross mixer and a feed-forward, each behind a norm."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers.norm import create_norm, normalize
from .protocol import Mixer, State


class BlockOutput(NamedTuple):
    """y: (B, L, D); state: the mixer's carried state or None; aux: scalar losses by name."""

    y: Tensor
    state: State | None
    aux: dict[str, Tensor]


class DropPath(nn.Module):
    """Stochastic depth per row (arXiv:1603.09382): a residual branch is dropped with probability `rate`."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"drop_path={rate} must be in [0, 1)")
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.rate == 0.0:
            return x
        keep = x.new_empty(x.shape[0], *[1] * (x.dim() - 1)).bernoulli_(1.0 - self.rate)
        return x * keep / (1.0 - self.rate)


class Block(nn.Module):
    """Pre-norm residual block: x + mixer(norm(x)), then x + cross_mixer(norm(x), context), then x + ffn(norm(x)).

    mixer: any `Mixer`; a cross one reads the context itself. ffn, cross_mixer: optional modules. norm: a name of
    `blocks.layers.norm` or a module class. prenorm: False puts each norm after its sum, norm(x + mixer(x)), as the
    first transformers had it. A mixer with `reads_residual` is also given x as it was before the norm.
    """

    def __init__(
        self,
        dim: int,
        mixer: Mixer,
        ffn: nn.Module | None,
        *,
        cross_mixer: Mixer | None = None,
        norm: str = "layernorm",
        norm_eps: float | None = None,
        prenorm: bool = True,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.prenorm = prenorm
        if cross_mixer is not None and not cross_mixer.cross:
            raise ValueError("cross_mixer must be built with cross=True")
        self.norm_mixer = create_norm(norm, dim, norm_eps)
        self.mixer = mixer
        self.norm_cross = create_norm(norm, dim, norm_eps) if cross_mixer is not None else None
        self.cross_mixer = cross_mixer
        self.norm_ffn = create_norm(norm, dim, norm_eps) if ffn is not None else None
        self.ffn = ffn
        self.drop = nn.Dropout(proj_drop)
        self.drop_path = DropPath(drop_path)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        state: State | None = None,
    ) -> BlockOutput:
        """Arguments as `Mixer.forward`."""
        reads_context = self.mixer.cross
        mixed = self.mixer(
            self._before(self.norm_mixer, x, mask),
            context if reads_context else None,
            mask=mask,
            context_mask=context_mask if reads_context else None,
            cu_seqlens=cu_seqlens,
            grid=grid,
            state=state,
            **_residual(self.mixer, x),
        )
        x = self._after(self.norm_mixer, x + self.drop_path(self.drop(mixed.y)), mask)
        aux = dict(mixed.aux)
        if self.cross_mixer is not None and self.norm_cross is not None:
            crossed = self.cross_mixer(
                self._before(self.norm_cross, x, mask),
                context,
                mask=mask,
                context_mask=context_mask,
                **_residual(self.cross_mixer, x),
            )
            x = self._after(self.norm_cross, x + self.drop_path(self.drop(crossed.y)), mask)
            for name, value in crossed.aux.items():
                aux[name] = aux[name] + value if name in aux else value
        if self.ffn is not None and self.norm_ffn is not None:
            x = self._after(self.norm_ffn, x + self.drop_path(self.ffn(self._before(self.norm_ffn, x, mask))), mask)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), x, x.new_zeros(()))
        return BlockOutput(x, mixed.state, aux)

    def _before(self, norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        return normalize(norm, x, mask) if self.prenorm else x

    def _after(self, norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        return x if self.prenorm else normalize(norm, x, mask)


def _residual(mixer: Mixer, x: Tensor) -> dict[str, Any]:
    return {"residual": x} if mixer.reads_residual else {}
