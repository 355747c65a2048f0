"""Bi-level routing attention: regions choose regions, tokens attend inside the chosen ones.

Zhu et al., "BiFormer: Vision Transformer with Bi-Level Routing Attention", arXiv:2303.08810, section 3.2. With Q_r, K_r
the mean queries and keys of the regions: A_r = Q_r K_r^T, I = the topk largest per row of A_r, O = Attention(Q, K and V
of the regions I), y = (O + LCE(V)) W_o, LCE a depthwise convolution ("local context enhancement").

As the published code has it: one routing shared by the heads, no gradient through it, the own region not forced in, the
scores scaled by the root of the full width.

Ours: keys at pads and beyond the edge of the last region are left out of the softmax and of the means (the published
code lets such zeros take part); sequences (regions of consecutive tokens, a convolution of one axis), videos, cross
attention (regions over the context, no LCE, since V does not lie where the outputs do); `shared_routing=False`; and
causal=True, which is CausalBlockRouting, a definition of ours: the paper's routing looks ahead, by region means and by
its choice. There each token routes for itself, to its own region and to earlier complete ones, see
`blocks.layers.block_routing`; the LCE looks back only. Of the published options, pooled keys, a separate width of the
queries and a learned map of the descriptors are left out: no published model has them.

Compared with the published ops (legacy, hard, soft and learned; NCHW) on copied weights, float64, six grids: largest
difference of the outputs 2.7e-15, of the gradients 5.4e-15 of their largest.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.block_sparse import block_means, block_sparse_attention, route
from ...kernels.dispatch import choose_backend
from ..layers.block_routing import BlockRoutingState, append, attend, empty_state
from ..layers.conv import ShortConv
from ..layers.projections import head_width, reset_normal
from ..layers.rows import Layout, lay_out
from ..layers.windows import Windows
from ..protocol import Mixer, MixerOutput, State
from ..registry import did_you_mean, register_mixer

_ROUTINGS = ("hard", "soft", "learned")


@register_mixer(
    "bi_level_routing",
    paper="arXiv:2303.08810",
    cost="L D (k W + L / W)",
    kernels=("block_sparse",),
    ours=("causal", "cross", "causal-cross"),
)
class BiLevelRouting(Mixer):
    """Bi-level routing attention; with causal=True it is CausalBlockRouting, which is ours and not the paper's.

    num_heads: H. spatial: the tokens lie on the grid that `forward` is given, and regions are its windows; without a
        grid, and in the context of cross attention, regions are runs of tokens.
    region_size: tokens of a region of a sequence; rather the root of the length than less.
    num_regions: regions along each axis of a grid, ceil(side / num_regions) tokens long each.
    topk: regions that a region attends to, all where there are fewer; the paper has 1, 4 and 16 of 49. In causal form
        the own region is one of them.
    shared_routing: one choice for all heads, by the full width; False: every head chooses by its own channels (ours).
    routing: "hard", as in all published models; "soft" multiplies keys and values of a region by the softmax of its
        affinity among those chosen; "learned" the same, with the gradient through the affinities. Not causal.
    scale: of the scores, "dim" for dim^-0.5 (published), "head" for the usual head_dim^-0.5, or a number.
    lce_kernel: taps of the depthwise convolution of the values, odd, along each axis of a grid but time; 0 for none.
        Cross attention has none.
    backend: of `kernels.block_sparse`.

    Patterns: in the causal form and in causal-cross (ours too) each token routes by its own query; otherwise regions
    of queries do. Weights start truncated-normal with deviation 0.02, biases zero. Time and memory grow with
    L topk w + R^2 for R regions of w tokens (L R where tokens route), never with L^2. The state is a
    `BlockRoutingState`: keys, values, and their sums per region; a step attends to topk regions, and routes by R sums.
    Raises ValueError for options that do not go together.
    """

    patterns: ClassVar[frozenset[str]] = frozenset({"self", "causal", "cross", "causal-cross"})
    streaming: ClassVar[bool] = True
    state_type = BlockRoutingState
    smooth = False  # regions are chosen by rank: outputs jump where the choice changes
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {"region_size": 4, "topk": 2},
        "causal": {"causal": True, "region_size": 4, "topk": 2},
        "causal_own": {"causal": True, "region_size": 5, "topk": 1, "lce_kernel": 0, "num_heads": 2},
        "causal_heads": {"causal": True, "region_size": 2, "topk": 3, "shared_routing": False, "num_heads": 2},
        "causal_naive": {"causal": True, "region_size": 3, "topk": 2, "scale": "head", "backend": "naive"},
        "spatial": {"spatial": True, "num_regions": 2, "topk": 2, "region_size": 3, "lce_kernel": 3},
        "heads": {"region_size": 3, "topk": 2, "shared_routing": False, "num_heads": 2, "scale": 0.7},
        "soft": {"region_size": 3, "topk": 2, "routing": "soft", "proj_drop": 0.1, "num_heads": 4},
        "learned": {"region_size": 4, "topk": 3, "routing": "learned", "qkv_bias": False, "proj_bias": False},
        "cross": {"cross": True, "region_size": 3, "topk": 2, "num_heads": 4},
        "causal_cross": {"cross": True, "causal": True, "region_size": 3, "topk": 2, "num_heads": 4},
    }

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        causal: bool = False,
        cross: bool = False,
        spatial: bool = False,
        region_size: int = 64,
        num_regions: int = 7,
        topk: int = 4,
        shared_routing: bool = True,
        routing: Literal["hard", "soft", "learned"] = "hard",
        scale: Literal["dim", "head"] | float = "dim",
        lce_kernel: int = 5,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, causal=causal, cross=cross)
        self.num_heads, self.head_dim = num_heads, head_width(dim, num_heads, num_heads, None)
        for name, value in (("region_size", region_size), ("num_regions", num_regions), ("topk", topk)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if routing not in _ROUTINGS:
            raise ValueError(f"routing={routing!r} is unknown.{did_you_mean(routing, _ROUTINGS)}")
        if causal and (spatial or routing != "hard"):
            raise ValueError(
                f"causal=True routes tokens of a sequence by a hard choice; it does not go with spatial={spatial}, "
                f"routing={routing!r}: take spatial=False, routing='hard'"
            )
        if not isinstance(lce_kernel, int) or lce_kernel < 0 or (lce_kernel and lce_kernel % 2 == 0):
            raise ValueError(f"lce_kernel={lce_kernel!r} must be odd, or 0 for none")
        if not 0 <= proj_drop < 1:
            raise ValueError(f"proj_drop={proj_drop} must be in [0, 1)")
        if backend != "auto":
            choose_backend("block_sparse", backend)  # a wrong name fails here, not in the first batch
        self.spatial, self.region_size, self.num_regions, self.topk = spatial, region_size, num_regions, topk
        self.routing_heads, self.routing, self.backend = 1 if shared_routing else num_heads, routing, backend
        self.scale = _scale(scale, dim, self.head_dim)
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_proj = nn.Linear(dim, dim, bias=qkv_bias, **where)
        self.k_proj = nn.Linear(dim, dim, bias=qkv_bias, **where)
        self.v_proj = nn.Linear(dim, dim, bias=qkv_bias, **where)
        self.lce: ShortConv | nn.Conv2d | None = None
        if lce_kernel and not cross and spatial:
            self.lce = nn.Conv2d(dim, dim, lce_kernel, padding=lce_kernel // 2, groups=dim, **where)
        elif lce_kernel and not cross:
            self.lce = ShortConv(dim, lce_kernel, activation=None, **where)
        self.out_proj = nn.Linear(dim, dim, bias=proj_bias, **where)
        self.proj_drop = nn.Dropout(proj_drop)
        reset_normal(self.q_proj, self.k_proj, self.v_proj, self.out_proj, truncated=True)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        state: BlockRoutingState | None = None,
    ) -> MixerOutput:
        """As `Mixer.forward`. The grid counts with spatial=True only; tokens then stay where they are, pads too."""
        self.check_inputs(
            x, context, mask=mask, context_mask=context_mask, cu_seqlens=cu_seqlens, grid=grid, state=state
        )
        windows = None
        if self.spatial and grid is not None:
            if cu_seqlens is not None:
                raise ValueError(f"{type(self).__name__}: packed sequences (cu_seqlens) have no common grid={grid}")
            windows = Windows(tuple(grid), tuple(-(-n // self.num_regions) for n in grid))
        layout = lay_out(None if windows else mask, cu_seqlens, x.shape[1])
        if windows is not None and mask is not None:
            layout = layout._replace(valid=mask)
        x = layout.real(x)
        if self.pattern == "causal":
            y, state = self._causal(x, layout, state)
        else:
            y = self._routed(x, layout.valid, windows, context, context_mask)
        return MixerOutput(layout.restore(self.proj_drop(self.out_proj(y))), state)

    def _check_state(self, state: State, rows: int) -> None:
        super()._check_state(state, rows)
        self._check_sizes(state)

    def init_state(
        self,
        batch_size: int,
        *,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> BlockRoutingState:
        """Empty. max_len bounds the tokens, pads included, that the cache may hold."""
        if self.pattern != "causal":
            return super().init_state(batch_size)
        weight = self.k_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        taps = self.lce.kernel_size if isinstance(self.lce, ShortConv) else 1
        tail = torch.zeros(batch_size, taps - 1, self.dim, device=device, dtype=dtype)
        return empty_state(tail, self.num_heads, self.head_dim, max_len=max_len, device=device, dtype=dtype)

    def state_size(self, length: int) -> int:
        """Keys and values, one sum per region begun, and the tail of the convolution."""
        if self.pattern != "causal":
            return super().state_size(length)
        taps = self.lce.kernel_size if isinstance(self.lce, ShortConv) else 1
        return (2 * length + -(-length // self.region_size) + taps - 1) * self.dim

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.pattern}, num_heads={self.num_heads}, topk={self.topk}, routing={self.routing}"

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def _descriptors(self, x: Tensor) -> Tensor:
        """(B, R, D) to (B, R, Hr, D / Hr), the channels by which each routing is decided."""
        return x.unflatten(-1, (self.routing_heads, -1))

    def _causal(
        self, x: Tensor, layout: Layout, state: BlockRoutingState | None
    ) -> tuple[Tensor, BlockRoutingState | None]:
        """CausalBlockRouting of right-padded rows: what goes into the output projection, and the next state."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)
        position = torch.arange(x.shape[1], device=x.device).expand(x.shape[0], -1)
        local, sums, keys, values = None, None, self._heads(k), self._heads(v)
        if state is None:
            if isinstance(self.lce, ShortConv):
                local, _ = self.lce(v)
        else:
            position = position + state.length.unsqueeze(1)
            if layout.valid is not None:
                k, v = (t.masked_fill(~layout.valid.unsqueeze(2), 0) for t in (k, v))
            tail = state.tail
            if isinstance(self.lce, ShortConv):
                local, last = self.lce(v, lengths=layout.lengths, state=tail, return_state=True)
                tail = tail if last is None else last
            state = append(state, self._heads(k), self._heads(v), layout.lengths, self.region_size)
            state = state._replace(tail=tail)
            keys, values, sums = state.k.to(q.dtype), state.v.to(q.dtype), state.sums
        y = attend(
            self._heads(q),
            keys,
            values,
            size=self.region_size,
            topk=self.topk,
            routing_heads=self.routing_heads,
            scale=self.scale,
            position=position,
            sums=sums,
            backend=self.backend,
        ).flatten(2)
        return y if local is None else y + local, state

    def _routed(
        self,
        x: Tensor,
        valid: Tensor | None,
        windows: Windows | None,
        context: Tensor | None,
        context_mask: Tensor | None,
    ) -> Tensor:
        """The other patterns: what goes into the output projection. valid: bool, as x, None for all."""
        source, seen = x, valid
        if context is not None:
            there = lay_out(context_mask, None, context.shape[1])
            source, seen = there.real(context), there.valid
        q, k, v = self.q_proj(x), self.k_proj(source), self.v_proj(source)
        real, values, q_block, k_block = valid, v, 1 if self.causal else self.region_size, self.region_size
        if windows is not None:
            if valid is None and not windows.whole:
                valid = x.new_ones(x.shape[:2], dtype=torch.bool)
            q, q_block = windows.split(q), windows.tokens
            valid = None if valid is None else windows.split(valid)
            if context is None:
                k, values, k_block, seen = windows.split(k), windows.split(v), q_block, valid
        index, weight = self._route(q, k, valid, seen, q_block, k_block)
        y = block_sparse_attention(
            self._heads(q),
            self._heads(k),
            self._heads(values),
            index,
            q_block=q_block,
            k_block=k_block,
            weight=weight,
            key_mask=seen,
            scale=self.scale,
            backend=self.backend,
        ).flatten(2)
        y = y if windows is None else windows.join(y)
        return y if self.lce is None else y + self._local(self.lce, v, real, windows)

    def _route(
        self, q: Tensor, k: Tensor, valid: Tensor | None, seen: Tensor | None, q_block: int, k_block: int
    ) -> tuple[Tensor, Tensor | None]:
        """The regions of keys (B, Hr, G, T) for each region of queries, -1 for none, and their weights, if any."""
        if self.routing != "learned":
            q, k = q.detach(), k.detach()
        k, number = block_means(k, k_block, seen)
        if q_block > 1:
            q, _ = block_means(q, q_block, valid)
        q, k = self._descriptors(q), self._descriptors(k)
        index = route(q, k, self.topk, exists=number > 0)
        if self.routing == "hard":
            return index, None
        with torch.autocast(q.device.type, enabled=False):
            q, k = q.to(k.dtype).transpose(1, 2), k.transpose(1, 2)  # (B, Hr, G or R, D / Hr)
            batch, head = (torch.arange(n, device=k.device) for n in k.shape[:2])
            chosen = k[batch[:, None, None, None], head[:, None, None], index.clamp(min=0)]
            affinity = self.scale * (q.unsqueeze(3) * chosen).sum(4)
            lowest = torch.finfo(affinity.dtype).min
            return index, affinity.masked_fill(index < 0, lowest).softmax(3)

    def _local(self, lce: nn.Module, v: Tensor, valid: Tensor | None, windows: Windows | None) -> Tensor:
        """LCE(V), (B, L, D), as if V were zero at pads; a sequence is one line of an image."""
        if valid is not None:
            v = v.masked_fill(~valid.unsqueeze(2), 0)
        if isinstance(lce, ShortConv):
            reach = lce.kernel_size // 2
            return lce(F.pad(v, (0, 0, 0, reach)))[0][:, reach:]
        lines = (1, v.shape[1]) if windows is None else windows.sizes[-2:]
        if v.shape[1] == 0:
            return v
        frames = v.reshape(-1, *lines, self.dim).permute(0, 3, 1, 2)
        return lce(frames).permute(0, 2, 3, 1).reshape(v.shape)


def _scale(scale: str | float, dim: int, head_dim: int) -> float:
    if isinstance(scale, str):
        known = {"dim": dim**-0.5, "head": head_dim**-0.5}
        if scale not in known:
            raise ValueError(f"scale={scale!r} is unknown.{did_you_mean(scale, known)} Or a number.")
        return known[scale]
    if not scale > 0:
        raise ValueError(f"scale={scale} must be positive")
    return float(scale)
