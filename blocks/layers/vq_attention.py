"""Attention over quantised keys and a local window, as a layer that gated attention takes in place of another.

Letters: R rows, M tokens of a row (real ones first), S keys, Z width of queries and keys and V of values over all H
heads, C tokens of a block.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.dispatch import choose_backend
from ...kernels.softmax import softmax_attention, visible
from ...kernels.vq_attention import VQState, empty_state, vq_attention
from ..parameters import tag_parameter
from .kv_cache import KVState, append, empty_cache
from .projections import check_divides
from .vector_quantizer import VectorQuantizer


class Carried(NamedTuple):
    """What comes with the output: the next state, None where none was asked for, and the losses by name."""

    state: VQState | KVState | None
    aux: dict[str, Tensor]


class VQAttention(nn.Module):
    """Softmax attention (arXiv:2309.16354): keys outside a window of blocks stand as codewords, summed by codeword.

    z_dim: Z. num_heads: H, a codebook each. codebook_size: codewords. chunk_size: C; the window is the own block and
    the one before, and unless causal the one after, with a learned bias per head and distance; None, for `across`, has
    no window. qk_norm: queries and keys become x / rms(x) / (Z/H)^(1/4) (arXiv:2309.16354, section 3.2, a norm without
    gain), otherwise scores are scaled by (Z/H)^-1/2. quantize: False keeps the keys as they are: exact softmax
    attention with the same bias, M x S scores and a state that grows.
    commitment_weight: of the loss "commitment". backend: of `kernels.vq_attention`. quantizer_options: of
    `VectorQuantizer`. The bias starts N(0, 0.02^2), without weight decay. Raises ValueError for values outside these.
    """

    def __init__(
        self,
        z_dim: int,
        *,
        num_heads: int = 1,
        codebook_size: int = 256,
        chunk_size: int | None = 64,
        causal: bool = False,
        qk_norm: bool = True,
        quantize: bool = True,
        commitment_weight: float = 1e-4,
        backend: Literal["auto", "triton", "chunked", "naive"] = "auto",
        quantizer_options: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("z_dim", z_dim), ("num_heads", num_heads)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}={value!r} must be a positive integer")
        if chunk_size is not None and (not isinstance(chunk_size, int) or chunk_size < 1):
            raise ValueError(f"chunk_size={chunk_size!r} must be a positive integer")
        check_divides("num_heads", num_heads, z_dim, "z_dim")
        if not commitment_weight >= 0:
            raise ValueError(f"commitment_weight={commitment_weight} must not be negative")
        if backend != "auto":
            choose_backend("vq_attention", backend)  # a wrong name fails here, not in the first batch
        self.z_dim, self.num_heads, self.chunk_size, self.causal = z_dim, num_heads, chunk_size, causal
        self.qk_norm, self.commitment_weight, self.backend = qk_norm, commitment_weight, backend
        self.scale = 1.0 if qk_norm else (z_dim // num_heads) ** -0.5
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.bias: nn.Parameter | None = None
        if chunk_size is not None:
            entries = 2 * chunk_size if causal else 4 * chunk_size - 1
            self.bias = nn.Parameter(torch.randn(num_heads, entries, **where) * 0.02)
            tag_parameter(self, "bias", weight_decay=0.0)
        self.quantizer: VectorQuantizer | None = None
        if quantize:
            self.quantizer = VectorQuantizer(
                codebook_size, z_dim // num_heads, num_heads=num_heads, **(quantizer_options or {}), **where
            )

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        lengths: Tensor | None = None,
        state: VQState | KVState | None = None,
        return_state: bool = False,
    ) -> tuple[Tensor, Carried]:
        """q, k: (R, M, Z), v: (R, M, V). lengths: int64 (R,), real tokens per row. state: causal only. Returns
        (R, M, V), arbitrary beyond a row's tokens."""
        q, k, v = self._normed(q), self._normed(k), v.unflatten(-1, (self.num_heads, -1))
        if self.quantizer is None:
            cache = state if isinstance(state, KVState) else None
            o, cache = self._exact(q, k, v, lengths, cache)
            return o.flatten(2), Carried(cache if return_state else None, {})
        keys = self.quantizer(k, _valid(lengths, k.shape[1]))
        o, last = vq_attention(
            q,
            keys.x,
            v,
            keys.code,
            keys.codebook,
            chunk_size=self.chunk_size,
            causal=self.causal,
            bias=self.bias,
            lengths=lengths,
            scale=self.scale,
            initial_state=state if isinstance(state, VQState) else None,
            return_state=return_state,
            backend=self.backend,
        )
        return o.flatten(2), Carried(last, {"commitment": self.commitment_weight * keys.commitment})

    def across(self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None) -> tuple[Tensor, Carried]:
        """q: (R, M, Z) sees all of k: (R, S, Z), v: (R, S, V), of which `lengths` (R,) are real. Returns (R, M, V)."""
        q, k, v = self._normed(q), self._normed(k), v.unflatten(-1, (self.num_heads, -1))
        valid = _valid(lengths, k.shape[1])
        if self.quantizer is None:
            seen = None if valid is None else valid[:, None, None]
            return self._softmax(q, k, v, seen, None).flatten(2), Carried(None, {})
        keys = self.quantizer(k, valid)
        shared: dict[str, Any] = {"lengths": lengths, "scale": self.scale, "backend": self.backend}
        o, _ = vq_attention(q, None, v, keys.code, keys.codebook, **shared)
        return o.flatten(2), Carried(None, {"commitment": self.commitment_weight * keys.commitment})

    def init_state(
        self,
        batch_size: int,
        value_dim: int,
        *,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> VQState | KVState:
        """No token seen. value_dim: V. max_len bounds the tokens of a state that grows."""
        heads, key, value = self.num_heads, self.z_dim // self.num_heads, value_dim // self.num_heads
        if self.quantizer is None or self.chunk_size is None:
            cache = empty_cache(batch_size, 0, heads, key, max_len=max_len, device=device, dtype=dtype)
            return cache._replace(v=cache.v.new_zeros(batch_size, 0, heads, value))
        codes = self.quantizer.codebook_size
        return empty_state(batch_size, self.chunk_size, codes, heads, key, value, device=device, dtype=dtype)

    def state_size(self, length: int, value_dim: int) -> int:
        """H M (V / H + 1) and (2 C - 1)(Z + V), whatever the length; unquantised, length (Z + V)."""
        if self.quantizer is None or self.chunk_size is None:
            return length * (self.z_dim + value_dim)
        cells = self.quantizer.codebook_size * (value_dim + self.num_heads)
        return cells + (2 * self.chunk_size - 1) * (self.z_dim + value_dim)

    def extra_repr(self) -> str:
        return f"{self.z_dim}, num_heads={self.num_heads}, chunk_size={self.chunk_size}, causal={self.causal}"

    def _normed(self, x: Tensor) -> Tensor:
        """(R, M, Z) to (R, M, H, Z / H)."""
        x = x.unflatten(-1, (self.num_heads, -1))
        if not self.qk_norm:
            return x
        wide = torch.promote_types(x.dtype, torch.float32)
        return F.rms_norm(x.to(wide), (x.shape[-1],), None, 1e-6) * x.shape[-1] ** -0.25

    def _exact(
        self, q: Tensor, k: Tensor, v: Tensor, lengths: Tensor | None, state: KVState | None
    ) -> tuple[Tensor, KVState | None]:
        """All keys as they are, with the window's bias."""
        at = torch.arange(q.shape[1], device=q.device).expand(q.shape[0], -1)
        valid = _valid(lengths, k.shape[1])
        if state is not None:
            at = at + state.length.unsqueeze(1)
        at_keys = at if valid is None else torch.where(valid, at, -1)
        if state is not None:
            state = append(state, k, v, at_keys)
            k, v, at_keys = state.k.to(k.dtype), state.v.to(v.dtype), state.position
        seen = visible(at, at_keys, causal=self.causal).unsqueeze(1)
        bias = None
        if self.bias is not None and self.chunk_size is not None:
            distance = at.unsqueeze(2) - at_keys.unsqueeze(1)
            block, key_block = (t.div(self.chunk_size, rounding_mode="floor") for t in (at, at_keys))
            near = (block.unsqueeze(2) - key_block.unsqueeze(1)).abs() <= 1
            index = distance if self.causal else distance + 2 * self.chunk_size - 1
            table = self.bias[:, index.clamp(0, self.bias.shape[1] - 1)]
            bias = table.masked_fill(~near, 0).transpose(0, 1)
        return self._softmax(q, k, v, seen, bias), state

    def _softmax(self, q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None, bias: Tensor | None) -> Tensor:
        more = max(v.shape[3] - q.shape[3], 0)  # that kernel takes values as wide as the keys at most
        q, k = (F.pad(t.to(v.dtype), (0, more)) for t in (q, k))
        bias = None if bias is None else bias.to(v.dtype)
        return softmax_attention(q, k, v, mask=seen, bias=bias, scale=self.scale)


def _valid(lengths: Tensor | None, size: int) -> Tensor | None:
    return None if lengths is None else torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)
