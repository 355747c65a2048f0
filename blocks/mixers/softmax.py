"""Softmax attention: multi-head, grouped or multi-query, full or windowed, with a cache for streaming."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.softmax import Sinks, softmax_attention, visible, window_attention
from ..layers.kv_cache import KVState, append, empty_cache, keep_window, with_window
from ..layers.norm import RMSNorm
from ..layers.positions import T5RelativeBias, alibi_bias, check_rope_scaling, check_rotary_dim, rope
from ..layers.projections import head_width, reset_linear
from ..layers.rows import packed_groups, rank_order, take
from ..layers.shared_keys import all_keys, window_keys
from ..protocol import Exchange, Mixer, MixerOutput, State
from ..registry import did_you_mean, register_mixer

SCHEMES = ("none", "rope", "alibi", "t5")
_LONG = {"kind": "llama3", "factor": 8.0, "low": 1.0, "high": 4.0, "length": 32}
_IN_CACHE: dict[str, Any] = {"num_sinks": 2, "sink_positions": "cache", "causal": True}


class _Rows(NamedTuple):
    """Queries, keys and values of right-padded rows. valid: bool (B, L), None when every token is real."""

    q: Tensor  # (B, L, H, K)
    k: Tensor  # (B, L, Hkv, K)
    v: Tensor  # (B, L, Hkv, K)
    valid: Tensor | None = None


@register_mixer("softmax", paper="arXiv:1706.03762", cost="L^2 D; L W D in a window", kernels=("softmax",))
class SoftmaxAttention(Mixer):
    """Scaled dot-product attention (arXiv:1706.03762, eq. 1): softmax(scale q k^T + bias) v, per head.

    Query head h reads key head h // (H / Hkv) (GQA, arXiv:2305.13245; one key head is MQA, arXiv:1911.02150).
    num_heads: query heads. num_kv_heads: key heads, a divisor (default all). head_dim: channels of a head
        (default dim / num_heads).
    position: "rope" (arXiv:2104.09864) turns queries and keys; "alibi" (arXiv:2108.12409) and "t5"
        (arXiv:1910.10683, the table owned by this layer) add a bias to the scores, a dense one: O(L^2) memory
        unless windowed. Positions count the real tokens of a row, so pads do not shift them.
    rope_base, rotary_dim, rope_interleaved, rope_scaling: see `positions.rope` and `scale_frequencies`.
    window_size: a token sees those less than this far away, itself included: causal 0 <= i - j < window_size.
        Cost O(L window_size).
    num_sinks: the first tokens stay visible to all (StreamingLLM, arXiv:2309.17453).
    sink_positions: "absolute" keeps the distance in the text; "cache" takes the distance inside the cache, as
        the paper: token i sees sink j from min(i, num_sinks + window_size - 1) - j. Causal only.
    scale: of the scores (default head_dim^-0.5; T5 uses 1).
    qk_norm: RMSNorm of each query and key head (arXiv:2302.05442, which uses LayerNorm).
    attn_drop, proj_drop: dropout of the weights and of the output.
    backend: "auto", "sdpa" or "naive", see `kernels.softmax`.

    Position schemes and windows belong to the self patterns. The state is a `KVState` that grows, or one of
    num_sinks + window_size - 1 slots. A position to which nothing is visible gives 0. Weights start
    Xavier-uniform, biases zero. Raises ValueError for options that do not go together.
    """

    patterns: ClassVar[frozenset[str]] = frozenset({"self", "causal", "cross", "causal-cross"})
    streaming: ClassVar[bool] = True
    shared_patterns: ClassVar[frozenset[str]] = patterns
    state_type = KVState
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "default": {},
        "causal": {"causal": True, "num_heads": 4},
        "naive": {"causal": True, "num_heads": 4, "backend": "naive"},
        "gqa": {"num_heads": 4, "num_kv_heads": 2, "causal": True, "attn_drop": 0.1, "proj_drop": 0.1},
        "mqa": {"num_heads": 4, "num_kv_heads": 1, "causal": True, "qkv_bias": False, "proj_bias": False},
        "wide_heads": {"num_heads": 3, "head_dim": 8, "qk_norm": True, "scale": 1.0, "causal": True},
        "rope": {"num_heads": 2, "position": "rope", "causal": True},
        "rope_partial": {"num_heads": 2, "position": "rope", "rotary_dim": 4, "rope_base": 500.0},
        "rope_interleaved": {"num_heads": 2, "position": "rope", "rope_interleaved": True},
        "rope_scaled": {"num_heads": 2, "position": "rope", "rope_scaling": _LONG, "causal": True},
        "alibi": {"num_heads": 3, "head_dim": 4, "position": "alibi"},
        "alibi_causal": {"num_heads": 4, "position": "alibi", "causal": True},
        "t5": {"num_heads": 4, "position": "t5", "scale": 1.0},
        "t5_causal": {"num_heads": 4, "position": "t5", "causal": True},
        "window": {"num_heads": 4, "window_size": 4, "causal": True},
        "window_rope": {"num_kv_heads": 2, "window_size": 3, "position": "rope", "causal": True},
        "window_t5": {"num_heads": 4, "window_size": 5, "position": "t5", "causal": True},
        "window_self": {"num_heads": 4, "window_size": 3, "position": "alibi"},
        "sinks": {"window_size": 3, "num_sinks": 2, "position": "rope", "causal": True},
        "sinks_self": {"window_size": 2, "num_sinks": 2},
        "sinks_cache": {"num_kv_heads": 2, "window_size": 3, "position": "rope", **_IN_CACHE},
        "sinks_cache_alibi": {"num_heads": 4, "window_size": 2, "position": "alibi", **_IN_CACHE},
        "cross": {"num_heads": 4, "num_kv_heads": 2, "cross": True},
        "causal_cross": {"num_heads": 4, "cross": True, "causal": True},
    }

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        cross: bool = False,
        position: Literal["none", "rope", "alibi", "t5"] = "none",
        rope_base: float = 10000.0,
        rotary_dim: int | None = None,
        rope_interleaved: bool = False,
        rope_scaling: Mapping[str, Any] | None = None,
        window_size: int | None = None,
        num_sinks: int = 0,
        sink_positions: Literal["absolute", "cache"] = "absolute",
        scale: float | None = None,
        qkv_bias: bool = True,
        proj_bias: bool = True,
        qk_norm: bool = False,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        backend: Literal["auto", "sdpa", "naive"] = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, causal=causal, cross=cross)
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        self.head_dim = head_width(dim, num_heads, self.num_kv_heads, head_dim)
        self.position, self.window_size, self.num_sinks = position, window_size, num_sinks
        self.rope_base, self.rope_interleaved, self.rope_scaling = rope_base, rope_interleaved, rope_scaling
        self.rotary_dim = self.head_dim if rotary_dim is None else rotary_dim
        self.sink_positions = sink_positions
        self._check_options(rotary_is_set=rotary_dim is not None)
        self.scale = self.head_dim**-0.5 if scale is None else float(scale)
        self.attn_drop, self.backend = attn_drop, backend
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        inner, kv_inner = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=qkv_bias, **where)
        self.k_proj = nn.Linear(dim, kv_inner, bias=qkv_bias, **where)
        self.v_proj = nn.Linear(dim, kv_inner, bias=qkv_bias, **where)
        self.out_proj = nn.Linear(inner, dim, bias=proj_bias, **where)
        self.q_norm = RMSNorm(self.head_dim, **where) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(self.head_dim, **where) if qk_norm else nn.Identity()
        self.relative_bias = T5RelativeBias(num_heads, causal=causal, **where) if position == "t5" else None
        self.proj_drop = nn.Dropout(proj_drop)
        reset_linear(self.q_proj, self.k_proj, self.v_proj, self.out_proj)

    def _check_options(self, *, rotary_is_set: bool) -> None:
        name = type(self).__name__
        for option, value, choices in (
            ("position", self.position, SCHEMES),
            ("sink_positions", self.sink_positions, ("absolute", "cache")),
        ):
            if value not in choices:
                raise ValueError(f"{name}: {option}={value!r} is unknown.{did_you_mean(value, choices)}")
        if self.position == "rope":
            check_rotary_dim(self.rotary_dim, self.head_dim)
            check_rope_scaling(self.rope_scaling)
        elif rotary_is_set or self.rope_interleaved or self.rope_scaling is not None:
            raise ValueError(
                f"{name}: rotary_dim, rope_interleaved and rope_scaling need position='rope', not {self.position!r}"
            )
        if self.cross and (self.position != "none" or self.window_size is not None):
            raise ValueError(
                f"{name}: position={self.position!r} and window_size={self.window_size!r} relate tokens of "
                f"one sequence; the pattern {self.pattern!r} takes position='none' and window_size=None"
            )
        if self.window_size is not None and self.window_size < 1:
            raise ValueError(f"{name}: window_size={self.window_size!r} must be at least 1 (the token itself counts)")
        if self.num_sinks < 0 or (self.num_sinks and self.window_size is None):
            raise ValueError(
                f"{name}: num_sinks={self.num_sinks!r} must be 0, or positive with a window_size (without, "
                "every token stays visible)"
            )
        if self.sink_positions == "cache" and not (self.causal and self.num_sinks and self.position != "none"):
            raise ValueError(
                f"{name}: sink_positions='cache' needs causal=True, num_sinks > 0 and a position scheme, got "
                f"causal={self.causal}, num_sinks={self.num_sinks}, position={self.position!r}"
            )

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        state: KVState | None = None,
    ) -> MixerOutput:
        """See `Mixer.forward`. `grid` is not used."""
        self.check_inputs(
            x, context, mask=mask, context_mask=context_mask, cu_seqlens=cu_seqlens, grid=grid, state=state
        )
        if context is not None:
            return MixerOutput(self._cross(x, context, mask, context_mask))
        if cu_seqlens is not None:
            return MixerOutput(*self._packed(x, cu_seqlens, state))
        if mask is None:
            y, state = self._rows(self._project(x), state)
            return MixerOutput(self._output(y), state)
        # Real tokens first: then causality hides the pads by itself, and distance in the row is distance in
        # position.
        order, back, number = rank_order(mask)
        valid = torch.arange(x.shape[1], device=x.device) < number.unsqueeze(1)
        rows = self._project(take(x, order).masked_fill(~valid.unsqueeze(-1), 0.0))
        y, state = self._rows(rows._replace(valid=valid), state)
        return MixerOutput(take(self._output(y), back).masked_fill(~mask.unsqueeze(-1), 0.0), state)

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
    ) -> KVState:
        """An empty cache. max_len bounds the tokens, pads included, that a growing one may hold."""
        if self.pattern != "causal":
            return super().init_state(batch_size)
        weight = self.k_proj.weight
        return empty_cache(
            batch_size,
            self._slots(0),
            self.num_kv_heads,
            self.head_dim,
            max_len=max_len if self.window_size is None else None,
            device=weight.device if device is None else device,
            dtype=weight.dtype if dtype is None else dtype,
        )

    def state_size(self, length: int) -> int:
        if self.pattern != "causal":
            return super().state_size(length)
        return 2 * self._slots(length) * self.num_kv_heads * self.head_dim

    def _slots(self, length: int) -> int:
        return length if self.window_size is None else self.num_sinks + self.window_size - 1

    def extra_repr(self) -> str:
        return f"{self.dim}, {self.pattern}, num_heads={self.num_heads}, position={self.position}"

    # --- from tokens to heads and back

    def _project(self, x: Tensor, context: Tensor | None = None) -> _Rows:
        source = x if context is None else context
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)))
        k = self.k_norm(self.k_proj(source).unflatten(-1, (self.num_kv_heads, self.head_dim)))
        return _Rows(q, k, self.v_proj(source).unflatten(-1, (self.num_kv_heads, self.head_dim)))

    def _output(self, y: Tensor) -> Tensor:
        return self.proj_drop(self.out_proj(y.flatten(-2)))

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        causal: bool = False,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        window: tuple[int, int] | None = None,
    ) -> Tensor:
        """The kernel, on keys and values that a cache may hold in another dtype."""
        return softmax_attention(
            q,
            k.to(q.dtype),
            v.to(q.dtype),
            causal=causal,
            mask=mask,
            bias=bias,
            window=window,
            scale=self.scale,
            drop=self.attn_drop if self.training else 0.0,
            backend=self.backend,
        )

    # --- the patterns

    def _cross(self, x: Tensor, context: Tensor, mask: Tensor | None, context_mask: Tensor | None) -> Tensor:
        """Every query sees all of the context, so causal-cross needs nothing more."""
        if context.shape[1] == 0:  # as one of pads
            context_mask = context.new_ones(context.shape[:2], dtype=torch.bool)
        if context_mask is not None:
            context = context.masked_fill(~context_mask.unsqueeze(-1), 0.0)
        if mask is not None:
            x = x.masked_fill(~mask.unsqueeze(-1), 0.0)
        q, k, v, _ = self._project(x, context)
        seen = None if context_mask is None else context_mask[:, None, None, :]
        y = self._output(self._attend(q, k, v, mask=seen))
        if context_mask is not None:
            y = y.masked_fill(~context_mask.any(1)[:, None, None], 0.0)
        return y if mask is None else y.masked_fill(~mask.unsqueeze(-1), 0.0)

    def _packed(self, x: Tensor, cu_seqlens: Tensor, state: KVState | None) -> tuple[Tensor, KVState | None]:
        """Sequences packed into one row: laid out as rows of similar length, then packed again."""
        q, k, v, _ = self._project(x)
        places, pieces = [], []
        for place, valid in packed_groups(cu_seqlens, x.shape[1], together=state is not None):
            real = valid[..., None, None]
            q_rows, k_rows, v_rows = (t[0][place].masked_fill(~real, 0.0) for t in (q, k, v))
            y, state = self._rows(_Rows(q_rows, k_rows, v_rows, valid), state)
            places.append(place[valid])
            pieces.append(y[valid])
        y = torch.zeros_like(q[0]).index_copy(0, torch.cat(places), torch.cat(pieces))
        return self._output(y).unsqueeze(0), state

    def _rows(self, rows: _Rows, state: KVState | None) -> tuple[Tensor, KVState | None]:
        """Self attention of right-padded rows after `state`: (B, L, H, K) and the next state."""
        q, k, v, valid = rows
        start = 0 if self.exchange is None else self.exchange.start
        place = torch.arange(start, start + q.shape[1], device=q.device).unsqueeze(0)
        if state is not None:
            place = place + state.length.unsqueeze(1)
        position = place if valid is None else torch.where(valid, place, -1)
        if self.position == "rope":
            q_turned, k = self._rope(q, place), self._rope(k, place)
        else:
            q_turned = q
        # Short enough rows see everything through their window, which the full form does faster.
        span = 0 if self.window_size is None else self.window_size + (self.num_sinks if self.causal else 0)
        if self.exchange is not None:
            windowed = span > 0 and (state is not None or self.exchange.total > span)
            return self._shared(q, q_turned, k, v, place, state, windowed, self.exchange)
        length = q.shape[1]  # where it is not known, as in an export, the window is always there
        if span and (state is not None or not isinstance(length, int) or length > span):
            return self._windowed(q, q_turned, k, v, position, state)
        return self._full(q_turned, k, v, position, valid, state)

    def _rope(self, x: Tensor, position: Tensor) -> Tensor:
        return rope(x, position, self.rope_base, self.rotary_dim, self.rope_interleaved, self.rope_scaling)

    def _bias(self, q_position: Tensor, k_position: Tensor) -> Tensor:
        if self.relative_bias is not None:
            return self.relative_bias(q_position, k_position)
        dtype = self.q_proj.weight.dtype
        return alibi_bias(q_position, k_position, self.num_heads, self.causal, dtype=dtype)

    def _full(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        valid: Tensor | None,
        state: KVState | None,
    ) -> tuple[Tensor, KVState | None]:
        biased = self.position in ("alibi", "t5")
        following = state is not None and state.k.shape[1] > 0  # with nothing cached, the rows stand alone
        if state is not None:
            state = append(state, k, v, position.expand(q.shape[0], -1))
        if state is not None and following:
            bias = self._bias(position, state.position) if biased else None
            seen = visible(position, state.position, causal=True).unsqueeze(1)
            return self._attend(q, state.k, state.v, mask=seen, bias=bias), state
        # From the places alone, so one bias does for all right-padded rows of the batch.
        place = torch.arange(q.shape[1], device=q.device).unsqueeze(0)
        bias = self._bias(place, place) if biased else None
        # Pads come last, where no causal query sees them.
        real = valid[:, None, None, :] if valid is not None and not self.causal else None
        return self._attend(q, k, v, causal=self.causal, mask=real, bias=bias), state

    def _windowed(
        self,
        q: Tensor,
        q_turned: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        state: KVState | None,
    ) -> tuple[Tensor, KVState | None]:
        num_sinks = self.num_sinks
        if state is not None:
            first, recent = with_window(state, k, v, position.expand(q.shape[0], -1), num_sinks)
            state = keep_window(state, first, recent)
            k, v, k_position = recent.k, recent.v, recent.position
            sinks = Sinks(first.k, first.v, first.position)
        else:
            k_position = position
            sinks = Sinks(k[:, :num_sinks], v[:, :num_sinks], position[:, :num_sinks])
        return self._near(q, q_turned, k, v, position, k_position, sinks if num_sinks else None), state

    def _near(
        self,
        q: Tensor,
        q_turned: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        k_position: Tensor,
        sinks: Sinks | None,
    ) -> Tensor:
        """Attention to the window and the sinks, see `window_attention`; q as it was before it was turned."""
        window = self.window_size or 1
        horizon = self.num_sinks + window - 1
        if sinks is None:
            pass
        elif self.sink_positions == "cache" and self.position == "rope":
            # A second half of channels, in which queries stand no further than the cache is long; the
            # window's keys are zero there, the sinks' keys zero in the first. So one product gives each score
            # from its own position.
            near = self._rope(q, position.clamp(max=horizon))
            q_turned = torch.cat((q_turned, near), -1)
            sinks = sinks._replace(k=torch.cat((torch.zeros_like(sinks.k), sinks.k), -1))
            k = torch.cat((k, torch.zeros_like(k)), -1)
        elif self.sink_positions == "cache":
            sinks = sinks._replace(horizon=horizon)
        return window_attention(
            q_turned,
            k,
            v,
            q_position=position,
            k_position=k_position,
            window_size=window,
            causal=self.causal,
            attend=self._attend,
            sinks=sinks,
            bias=self._bias if self.position in ("alibi", "t5") else None,
        )

    def _shared(
        self,
        q: Tensor,
        q_turned: Tensor,
        k: Tensor,
        v: Tensor,
        position: Tensor,
        state: KVState | None,
        windowed: bool,
        exchange: Exchange,
    ) -> tuple[Tensor, KVState | None]:
        """One rank's part of the sequence, its keys and values joined by those of others that it may see."""
        if not windowed:
            k, v, k_position, state = all_keys(exchange, k, v, causal=self.causal, state=state)
            bias = self._bias(position, k_position) if self.position in ("alibi", "t5") else None
            if state is None:
                return self._attend(q_turned, k, v, causal=self.causal, bias=bias), None
            seen = visible(position, k_position, causal=True).unsqueeze(1)
            return self._attend(q_turned, k, v, mask=seen, bias=bias), state
        window, length = self.window_size or 1, q.shape[1]
        options: dict[str, Any] = {"window": window, "num_sinks": self.num_sinks, "causal": self.causal}
        k, v, k_position, sinks, state = window_keys(exchange, k, v, state=state, **options)
        edge = 0 if self.causal else window - 1  # without causality keys and queries stand side by side
        q, q_turned = (F.pad(t, (0, 0, 0, 0, edge, edge)) for t in (q, q_turned))
        y = self._near(q, q_turned, k, v, F.pad(position, (edge, edge), value=-1), k_position, sinks)
        return y[:, edge : edge + length], state
