"""Linear attention: a feature map replaces the softmax, so that keys and values sum into a state.

Katharopoulos et al., "Transformers are RNNs", arXiv:2006.16236, sections 3.2 and 3.3:
o_i = phi(q_i)^T S / (phi(q_i)^T z + eps), S = sum_j phi(k_j) v_j^T, z = sum_j phi(k_j), the sums over
j <= i if causal. Deviations: eps is added to the denominator: rows without any key are zero instead of
undefined; the feature map "relu" is that of EfficientViT, arXiv:2205.14756 (its ReLU linear attention).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...kernels.dispatch import choose_backend
from ...kernels.linear_attention import LinearState, accumulation_dtype, linear_attention, linear_summary
from ..layers.rows import zero_pads
from ..protocol import ChunkSummary, Mixer, MixerOutput, map_state
from ..registry import did_you_mean, register_mixer


def elu_plus_one(x: Tensor) -> Tensor:
    """elu(x) + 1, written so that it does not round to zero where exp(x) is small beside 1."""
    positive = x.relu()
    return ((x - positive).exp() + positive).to(x.dtype)  # with a gradient of 1 at 0, which clamp has not


FEATURE_MAPS: dict[str, Callable[[Tensor], Tensor]] = {"elu+1": elu_plus_one, "relu": F.relu}


@register_mixer("linear", paper="arXiv:2006.16236", cost="L D K", kernels=("linear_attention",))
class LinearAttention(Mixer):
    """Attention with normalised kernel weights phi(q_i) . phi(k_j), linear in the length.

    dim: model width D. num_heads: H. head_dim: width per head, None for dim / num_heads. feature_map: phi,
    "elu+1" or "relu". eps: added to the denominator. qkv_bias, proj_bias: biases of the projections.
    proj_drop: dropout on the output. backend: of `kernels.linear_attention`.

    The state is a `LinearState`: s (B, H, K, V) and z (B, H, K), of constant size, in float32 (float64 for
    float64 parameters). Raises ValueError for values outside these.
    """

    patterns = frozenset({"self", "causal", "cross", "causal-cross"})
    streaming = True
    linear_state = True
    shared_patterns = patterns
    state_type = LinearState
    variants = {
        "default": {},
        "causal": {"causal": True},
        "cross": {"cross": True, "num_heads": 2},
        "causal_cross": {"causal": True, "cross": True},
        "relu": {"causal": True, "feature_map": "relu", "eps": 1e-3, "num_heads": 2},
        "head_dim": {"causal": True, "num_heads": 3, "head_dim": 5},
        "no_bias": {"num_heads": 4, "qkv_bias": False, "proj_bias": False},
        "proj_drop": {"causal": True, "proj_drop": 0.3},
        "naive": {"causal": True, "backend": "naive"},
    }

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        causal: bool = False,
        cross: bool = False,
        feature_map: str = "elu+1",
        eps: float = 1e-6,
        backend: str = "auto",
        qkv_bias: bool = True,
        proj_bias: bool = True,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, causal=causal, cross=cross)
        if num_heads < 1:
            raise ValueError(f"num_heads={num_heads} must be at least 1")
        if head_dim is None and dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}; give head_dim")
        if head_dim is not None and head_dim < 1:
            raise ValueError(f"head_dim={head_dim} must be at least 1")
        if feature_map not in FEATURE_MAPS:
            raise ValueError(f"feature_map={feature_map!r} is unknown.{did_you_mean(feature_map, FEATURE_MAPS)}")
        if not eps > 0:
            raise ValueError(f"eps={eps} must be positive")
        if not 0 <= proj_drop < 1:
            raise ValueError(f"proj_drop={proj_drop} must be in [0, 1)")
        if backend != "auto":
            choose_backend("linear_attention", backend)  # a wrong name fails here, not in the first batch
        self.num_heads = num_heads
        self.head_dim = dim // num_heads if head_dim is None else head_dim
        self.feature_map = feature_map
        self.eps = eps
        self.backend = backend
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
        state: LinearState | None = None,
    ) -> MixerOutput:
        """As `Mixer.forward`; `grid` is not used."""
        self.check_inputs(
            x, context, mask=mask, context_mask=context_mask, cu_seqlens=cu_seqlens, grid=grid, state=state
        )
        x = zero_pads(x, mask)
        source = x if context is None else zero_pads(context, context_mask)
        phi = FEATURE_MAPS[self.feature_map]
        q = phi(self.q_proj(x)).unflatten(-1, (self.num_heads, self.head_dim))
        k, v = self._keys(source)
        before, last = state, None
        if self.exchange is not None and not self.cross:
            # The other ranks' sums come before own tokens, whatever their order without causality.
            own = _sums(linear_summary(k, v))
            start = None if state is None else _sums(state)
            if self.causal:
                found, last = self.exchange.prefix([None, None], own, start, return_last=state is not None)
            else:
                found = self.exchange.others(own)
            before = LinearState(*found)
        y, new_state = linear_attention(
            q,
            k,
            v,
            causal=self.causal and not self.cross,
            eps=self.eps,
            key_mask=context_mask if self.cross else mask,
            cu_seqlens=cu_seqlens,
            initial_state=before,
            return_state=state is not None and last is None,
            backend=self.backend,
        )
        if last is not None:
            new_state = LinearState(*last)
        y = self.proj_drop(self.out_proj(y.flatten(2)))
        if mask is not None:
            y = y.masked_fill(~mask[..., None], 0)
        return MixerOutput(y, new_state)

    def _keys(self, source: Tensor) -> tuple[Tensor, Tensor]:
        """k, through its feature map, and v, (B, S, H, K) each."""
        heads = self.num_heads, self.head_dim
        k = FEATURE_MAPS[self.feature_map](self.k_proj(source)).unflatten(-1, heads)
        return k, self.v_proj(source).unflatten(-1, heads)

    def chunk_summary(self, x: Tensor, *, state: LinearState | None = None) -> ChunkSummary:
        """See `Mixer.chunk_summary`: nothing is forgotten, so the transition is 1."""
        if not self.causal or self.cross:
            return super().chunk_summary(x)
        own = linear_summary(*self._keys(x))
        return ChunkSummary(map_state(torch.ones_like, own), own)

    def init_state(
        self,
        batch_size: int,
        *,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> LinearState:
        """Zeros. max_len does not matter; dtype float64 gives a float64 state, any other a float32 one."""
        if not self.causal or self.cross:
            return super().init_state(batch_size)
        weight = self.k_proj.weight
        shape = batch_size, self.num_heads, self.head_dim
        z = torch.zeros(shape, device=device or weight.device, dtype=accumulation_dtype(dtype or weight.dtype))
        return LinearState(z.new_zeros(*shape, self.head_dim), z)

    def state_size(self, length: int) -> int:
        """H K (V + 1), whatever the length."""
        if not self.causal or self.cross:
            return super().state_size(length)
        return self.num_heads * self.head_dim * (self.head_dim + 1)


def _sums(state: LinearState) -> list[Tensor]:
    return [part for part in state if part is not None]
