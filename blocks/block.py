"""One residual block: a token mixer, an optional cross mixer and a feed-forward, each behind a norm."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .layers.norm import create_norm, normalize
from .parameters import tag_parameter
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
    first transformers had it. parallel: mixer and feed-forward read the same x, x + mixer(norm(x)) + ffn(norm'(x)),
    each behind a norm of its own (GPT-NeoX, arXiv:2204.06745, section 2.1). layer_scale: every branch is multiplied by
    a learned gain per channel that starts there (arXiv:2103.17239, section 2), without weight decay; None: no gain. A
    mixer with `reads_residual` is also given x as it was before the norm.

    Raises ValueError for parallel=True with prenorm=False, with a cross mixer or without a feed-forward.
    """

    scale_mixer: nn.Parameter | None
    scale_cross: nn.Parameter | None
    scale_ffn: nn.Parameter | None

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
        parallel: bool = False,
        layer_scale: float | None = None,
        proj_drop: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.prenorm, self.parallel = prenorm, parallel
        if parallel and (not prenorm or cross_mixer is not None or ffn is None):
            raise ValueError("parallel=True needs prenorm=True, a feed-forward and no cross mixer")
        if cross_mixer is not None and not cross_mixer.cross:
            raise ValueError("cross_mixer must be built with cross=True")
        self.norm_mixer = create_norm(norm, dim, norm_eps)
        self.mixer = mixer
        self.norm_cross = create_norm(norm, dim, norm_eps) if cross_mixer is not None else None
        self.cross_mixer = cross_mixer
        self.norm_ffn = create_norm(norm, dim, norm_eps) if ffn is not None else None
        self.ffn = ffn
        for name, part in (("scale_mixer", mixer), ("scale_cross", cross_mixer), ("scale_ffn", ffn)):
            if layer_scale is None or part is None:
                self.register_parameter(name, None)
                continue
            self.register_parameter(name, nn.Parameter(torch.full((dim,), layer_scale)))
            tag_parameter(self, name, weight_decay=0.0)
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
        before = x
        x = self._after(self.norm_mixer, x + self.drop_path(_scaled(self.drop(mixed.y), self.scale_mixer)), mask)
        aux = dict(mixed.aux)
        if self.cross_mixer is not None and self.norm_cross is not None:
            crossed = self.cross_mixer(
                self._before(self.norm_cross, x, mask),
                context,
                mask=mask,
                context_mask=context_mask,
                **_residual(self.cross_mixer, x),
            )
            x = self._after(self.norm_cross, x + self.drop_path(_scaled(self.drop(crossed.y), self.scale_cross)), mask)
            for name, value in crossed.aux.items():
                aux[name] = aux[name] + value if name in aux else value
        if self.ffn is not None and self.norm_ffn is not None:
            fed = self.ffn(self._before(self.norm_ffn, before if self.parallel else x, mask))
            x = self._after(self.norm_ffn, x + self.drop_path(_scaled(fed, self.scale_ffn)), mask)
        if mask is not None:
            x = torch.where(mask.unsqueeze(-1), x, x.new_zeros(()))
        return BlockOutput(x, mixed.state, aux)

    def _before(self, norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        return normalize(norm, x, mask) if self.prenorm else x

    def _after(self, norm: nn.Module, x: Tensor, mask: Tensor | None) -> Tensor:
        return x if self.prenorm else normalize(norm, x, mask)


def _scaled(y: Tensor, gain: Tensor | None) -> Tensor:
    return y if gain is None else y * gain


def _residual(mixer: Mixer, x: Tensor) -> dict[str, Any]:
    return {"residual": x} if mixer.reads_residual else {}
