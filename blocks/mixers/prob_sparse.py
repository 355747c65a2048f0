"""ProbSparse attention: the mixer of Informer (arXiv:2012.07436, AAAI 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from ...kernels.packing import packed_bounds
from ...kernels.prob_sparse import prob_sparse_attention
from ..layers.rows import zero_pads
from ..protocol import Mixer, MixerOutput, State
from ..registry import did_you_mean, register_mixer

# preset -> divisor of the measure's mean, lazy rows of the masked mode, mix in the masked mode
_PRESETS: dict[str, tuple[Literal["keys", "samples"], Literal["sum", "mean"], bool]] = {
    "clean": ("samples", "mean", False),
    "original": ("keys", "sum", True),
}


@register_mixer(
    "prob_sparse",
    paper="arXiv:2012.07436",
    cost="L D log L",
    kernels=("prob_sparse",),
    ours=("cross",),
)
class ProbSparseAttention(Mixer):
    """Multi-head ProbSparse attention, O(L log L).

    M_i = max_j q_i.k_j - mean_j q_i.k_j over U = factor * ceil(ln S) sampled keys. The factor * ceil(ln L)
    queries of largest M attend to all keys, the others output the mean of V. If all are kept, it is softmax
    attention.

    Presets. "original" is the published code: the mean in M divides by S instead of U, and in the masked mode
    lazy rows take the cumulative SUM of V and heads and time are transposed before they are flattened (`mix`,
    a scrambling of the layout). "clean" is the text: divide by U; in the masked mode the cumulative mean, on
    the scale of a softmax output, and no mix.

    It is not causal: which queries attend depends on all of them, so causal=True is refused. `masked=True` is
    the mode of Informer's decoder, where selected queries see only keys up to their own position; its pattern
    stays "self", because the selection still looks ahead. Use it only where all positions are emitted at
    once.

    num_heads, head_dim: dim // num_heads where head_dim is None. cross: keys and values from the context.
    sampling: "query", a sample of keys for each query (published), or "block", one per 128 queries, far
        faster.
    mix: None for the preset's; for masked=True only. qkv_bias, proj_bias: biases, 4 * (dim^2 + dim)
        parameters in all.
    proj_drop: dropout on the output (the published code constructs an attention dropout and never applies
        it).
    seed: of the sample in eval mode, where outputs are deterministic. In training every call draws anew from
    torch's generator. Sequences of a packed row, and padded and unpadded ones, get the same sample.
    """

    patterns = frozenset({"self", "cross"})
    smooth = False  # which queries attend is a ranking: outputs jump where it changes
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "self": {"num_heads": 4, "factor": 5},
        "block": {"num_heads": 2, "sampling": "block", "factor": 1, "seed": 3},
        "original": {"num_heads": 2, "preset": "original", "factor": 2},
        "masked": {"num_heads": 4, "masked": True, "factor": 1},
        "masked_original": {"num_heads": 4, "masked": True, "preset": "original", "factor": 1},
        "unmixed": {"num_heads": 4, "masked": True, "preset": "original", "mix": False},
        "cross": {"num_heads": 2, "cross": True, "head_dim": 4, "proj_drop": 0.1},
        "no_bias": {"num_heads": 8, "qkv_bias": False, "proj_bias": False},
    }

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        cross: bool = False,
        causal: bool = False,
        preset: Literal["clean", "original"] = "clean",
        factor: int = 5,
        sampling: Literal["query", "block"] = "query",
        masked: bool = False,
        mix: bool | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        seed: int = 0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, causal=causal, cross=cross)
        if num_heads < 1 or (head_dim is None and dim % num_heads):
            raise ValueError(f"num_heads={num_heads} must be positive and divide dim={dim}, or give head_dim")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim={head_dim} must be positive")
        if preset not in _PRESETS:
            raise ValueError(f"preset={preset!r} is unknown.{did_you_mean(preset, _PRESETS)}")
        if sampling not in ("query", "block"):
            raise ValueError(f"sampling={sampling!r} is unknown.{did_you_mean(sampling, ('query', 'block'))}")
        if factor < 1:
            raise ValueError(f"factor={factor!r} must be at least 1")
        if masked and cross:
            raise ValueError("masked=True is Informer's decoder self-attention and does not go with cross=True")
        if mix and not masked:
            raise ValueError("mix=True belongs to the masked mode: give masked=True too, or leave mix=None")
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.factor, self.sampling, self.masked, self.seed = factor, sampling, masked, seed
        self.divisor, self.lazy, preset_mix = _PRESETS[preset]
        self.mix = masked and (preset_mix if mix is None else mix)
        inner = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=qkv_bias, device=device, dtype=dtype)
        self.k_proj = nn.Linear(dim, inner, bias=qkv_bias, device=device, dtype=dtype)
        self.v_proj = nn.Linear(dim, inner, bias=qkv_bias, device=device, dtype=dtype)
        self.out_proj = nn.Linear(inner, dim, bias=proj_bias, device=device, dtype=dtype)
        self.proj_drop = nn.Dropout(proj_drop)

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
    ) -> MixerOutput:
        self.check_inputs(
            x, context, mask=mask, context_mask=context_mask, cu_seqlens=cu_seqlens, grid=grid, state=state
        )
        x = zero_pads(x, mask)
        source, source_mask = (x, mask) if context is None else (zero_pads(context, context_mask), context_mask)
        q, k, v = (
            projection(t).unflatten(-1, (self.num_heads, self.head_dim))
            for projection, t in ((self.q_proj, x), (self.k_proj, source), (self.v_proj, source))
        )
        seed = torch.randint(0, 2**31 - 1, (), device=x.device) if self.training else self.seed
        if cu_seqlens is None:
            y = self._attend(q, k, v, mask, source_mask, seed)
        else:
            parts = [
                self._attend(q[:, a:b], k[:, a:b], v[:, a:b], None, None, seed)
                for a, b in pairwise(packed_bounds(cu_seqlens, x.shape[1]))
            ]
            y = torch.cat(parts, 1)
        y = self.proj_drop(self.out_proj(y))
        return MixerOutput(y if mask is None else y.masked_fill(~mask.unsqueeze(-1), 0))

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        source_mask: Tensor | None,
        seed: int | Tensor,
    ) -> Tensor:
        """(B, L, H * K) before the output projection."""
        y = prob_sparse_attention(
            q,
            k,
            v,
            factor=self.factor,
            measure_divisor=self.divisor,
            query_mask=mask,
            key_mask=source_mask,
            masked=self.masked,
            lazy=self.lazy,
            sampling=self.sampling,
            seed=seed,
        )
        return _mix_heads_and_time(y, mask) if self.mix else y.flatten(2)


def _mix_heads_and_time(y: Tensor, mask: Tensor | None) -> Tensor:
    """(B, L, H, V) laid out as (B, H, L, V) and read as (B, L, H * V); pads stand outside, as if they were
    not there."""
    batch, length, heads, width = y.shape
    if mask is None:
        return y.transpose(1, 2).reshape(batch, length, heads * width)
    order = mask.logical_not().to(torch.uint8).sort(dim=1, stable=True).indices
    count = mask.sum(1).clamp(min=1).view(-1, 1)
    place = torch.arange(length * heads, device=y.device)  # of a width-wide piece of the output, by rank
    head, rank = (place // count).clamp(max=heads - 1), place % count
    piece = order.gather(1, rank) * heads + head
    mixed = y.flatten(1, 2).gather(1, piece.unsqueeze(2).expand(-1, -1, width)).view(batch, length, heads * width)
    rank_of = (mask.cumsum(1) - 1).clamp(min=0)
    return mixed.gather(1, rank_of.unsqueeze(2).expand_as(mixed))
