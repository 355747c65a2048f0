"""Agent attention (arXiv:2312.08874, ECCV 2024), in one and two dimensions, and a causal form of it.

O = softmax(s Q A^T + B2) softmax(s A K^T + B1) V, y = W (O + DWC(V)): n agents A gather the values, the queries read
the agents (section 4). A is Q, pooled; B1 and B2 are tables, DWC is a depthwise convolution.

Compared with the authors' modules for DeiT (class token), Swin and PVT with copied weights: outputs and the gradient
of x differ by at most 9e-16 in float64, 4e-7 in float32. With agent-attention-pytorch 0.1.7 (learned agents, talking
heads and gates off): at most 1.2e-16 and 6e-8.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...kernels.agent_attention import ABSENT, RunningState, agent_attention, running_agent_attention
from ...kernels.dispatch import choose_backend
from ..layers.agents import AgentBias, pool_agents
from ..layers.conv import ShortConv
from ..layers.projections import head_width, reset_linear
from ..layers.rows import Layout, lay_out
from ..parameters import tag_parameter
from ..protocol import Mixer, MixerOutput, State
from ..registry import did_you_mean, register_mixer

_CAUSAL: dict[str, Any] = {"causal": True, "num_heads": 4, "num_agents": 5}


class AgentState(NamedTuple):
    """running: the softmax of each agent so far; conv: (B, conv_kernel - 1, H K), the last values, None without one."""

    running: RunningState
    conv: Tensor | None


@register_mixer(
    "agent",
    paper="arXiv:2312.08874",
    cost="L D M",
    kernels=("softmax", "agent_attention"),
    ours=("causal", "causal-cross"),
)
class AgentAttention(Mixer):
    """Attention through `num_agents` agents, linear in the length.

    num_heads, head_dim: dim // num_heads where head_dim is None. num_agents: n; a square number in two dimensions.
    agents: "pooled", the mean of the queries in n bins (published), or "learned" (ours, but for the bias and
        convolution that of agent-attention-pytorch): n vectors per head, standard normal at the start. None: learned
        where causal, else pooled.
    grid_size: (height, width) for tokens on a grid: agents are pooled in sqrt(n) x sqrt(n) bins, the convolution is
        square, and the bias has tables for the rows and columns of such a grid. Other grids take interpolated tables;
        tokens that come without `grid` stand on a single row. None: one dimension (ours), where `grid` is not used.
    num_prefix_tokens: tokens at the front (class token) that pooling and convolution skip; each has its own bias.
    agent_bias: the tables B1 and B2, None for where the paper has them, self. bias_size: entries of the coarse table,
        interpolated to the tokens, per dimension.
    conv_kernel: width of the convolution, odd unless causal, 0 for none; None for 3, or 0 in the cross patterns, where
        queries and values are not of one length.
    broadcast_exponent: e of the second scale, K^(-e/2); shortcut: adds that many values to the output. Both of the
        authors' training-free AgentSD, which has 0.3 and 0.075.
    chunk_size: of the causal form, a power of two. backend: "auto", "naive", or one of `softmax_attention`
        ("agent_attention" for the causal form). attn_drop: dropout of both softmaxes' weights.

    Cross: agents are pooled from the queries of x, keys and values come from the context; no bias, no convolution.

    Causal (ours: the paper has none, and pooled agents see later queries) and causal cross take learned agents only. In
    the causal form the first softmax runs over the keys so far; its state holds its maximum, normaliser and numerator
    for every head and agent, in float32 (float64), and the last values for the convolution, which looks back only.

    Pads: bins hold real tokens only; an agent whose bin has none drops out of the second softmax. With a grid, pads are
    holes in it; else a row is as long as its real tokens. Left out: the reduction of keys that the published code has
    for PVT (sr_ratio, 1 in all of its models). Ours: Xavier-uniform projections (`agent_deit` starts as published) and
    no weight decay of tables and agents.
    """

    patterns = frozenset({"self", "causal", "cross", "causal-cross"})
    streaming = True
    state_type = AgentState
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "self": {"num_heads": 4, "num_agents": 5},
        "causal": {**_CAUSAL, "chunk_size": 4},
        "cross": {"num_heads": 2, "num_agents": 3, "cross": True},
        "causal_cross": {**_CAUSAL, "cross": True},
        "grid": {"num_heads": 2, "num_agents": 4, "grid_size": (4, 5), "bias_size": 3, "conv_kernel": 5},
        "prefix": {"num_heads": 2, "num_agents": 3, "num_prefix_tokens": 2},
        "grid_learned": {"num_heads": 2, "agents": "learned", "num_agents": 3, "grid_size": (3, 4), "attn_drop": 0.2},
        "plain": {"head_dim": 3, "num_heads": 3, "num_agents": 30, "agent_bias": False, "conv_kernel": 0},
        "shortcut": {"broadcast_exponent": 0.3, "shortcut": 0.075, "num_heads": 2, "num_agents": 2, "backend": "naive"},
        "causal_plain": {**_CAUSAL, "head_dim": 3, "conv_kernel": 0, "qkv_bias": False, "proj_bias": False},
        "causal_naive": {**_CAUSAL, "conv_kernel": 4, "shortcut": 0.5, "proj_drop": 0.1, "backend": "naive"},
    }

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 8,
        head_dim: int | None = None,
        num_agents: int = 49,
        causal: bool = False,
        cross: bool = False,
        agents: Literal["pooled", "learned"] | None = None,
        grid_size: Sequence[int] | None = None,
        num_prefix_tokens: int = 0,
        agent_bias: bool | None = None,
        bias_size: int = 7,
        conv_kernel: int | None = None,
        broadcast_exponent: float = 1.0,
        shortcut: float = 0.0,
        chunk_size: int = 32,
        backend: str = "auto",
        qkv_bias: bool = True,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, causal=causal, cross=cross)
        self.num_heads, self.num_agents = num_heads, num_agents
        self.head_dim = head_width(dim, num_heads, num_heads, head_dim)
        self.grid_size = None if grid_size is None else (int(grid_size[0]), int(grid_size[1]))
        self.num_prefix_tokens, self.shortcut = num_prefix_tokens, shortcut
        self.chunk_size, self.attn_drop = chunk_size, attn_drop
        self.backend: Any = backend
        self.running = causal and not cross
        biased = self.pattern == "self" if agent_bias is None else agent_bias
        self.conv_kernel = (0 if cross else 3) if conv_kernel is None else conv_kernel
        agents = ("learned" if causal else "pooled") if agents is None else agents
        self._check_options(agents, biased, bias_size)
        self.scale = self.head_dim**-0.5
        self.broadcast_scale = self.head_dim ** (-0.5 * broadcast_exponent)

        where: dict[str, Any] = {"device": device, "dtype": dtype}
        inner = self.num_heads * self.head_dim
        self.q_proj = nn.Linear(dim, inner, bias=qkv_bias, **where)
        self.k_proj = nn.Linear(dim, inner, bias=qkv_bias, **where)
        self.v_proj = nn.Linear(dim, inner, bias=qkv_bias, **where)
        self.out_proj = nn.Linear(inner, dim, bias=proj_bias, **where)
        reset_linear(self.q_proj, self.k_proj, self.v_proj, self.out_proj)
        self.agents: nn.Parameter | None = None
        if agents == "learned":
            self.agents = nn.Parameter(torch.randn(num_agents, num_heads, self.head_dim, **where))
            tag_parameter(self, "agents", weight_decay=0.0)
        options: dict[str, Any] = {"size": bias_size, "grid_size": self.grid_size, "num_prefix": num_prefix_tokens}
        self.aggregate_bias = AgentBias(num_heads, num_agents, **options, **where) if biased else None
        self.broadcast_bias = AgentBias(num_heads, num_agents, **options, **where) if biased else None
        self.conv: ShortConv | nn.Conv2d | None = None
        if self.conv_kernel and self.grid_size is not None:
            size = self.conv_kernel
            self.conv = nn.Conv2d(inner, inner, size, padding=size // 2, groups=inner, **where)
        elif self.conv_kernel:
            self.conv = ShortConv(inner, self.conv_kernel, activation=None, **where)
        self.proj_drop = nn.Dropout(proj_drop)

    def _check_options(self, agents: str, biased: bool, bias_size: int) -> None:
        name, n = type(self).__name__, self.num_agents
        if agents not in ("pooled", "learned"):
            raise ValueError(f"{name}: agents={agents!r} is unknown.{did_you_mean(agents, ('pooled', 'learned'))}")
        for option, value in (("num_agents", n), ("bias_size", bias_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name}: {option}={value!r} must be a positive integer")
        if self.num_prefix_tokens < 0 or self.conv_kernel < 0:
            raise ValueError(
                f"{name}: num_prefix_tokens={self.num_prefix_tokens} and conv_kernel={self.conv_kernel} must not be "
                "negative"
            )
        if self.causal and agents == "pooled":
            raise ValueError(
                f"{name}: agents='pooled' are means of all queries, later ones too; the pattern {self.pattern!r} needs "
                "agents='learned'"
            )
        if self.pattern != "self" and biased:
            raise ValueError(f"{name}: agent_bias=True is for the pattern 'self', not {self.pattern!r}")
        if self.cross and (self.conv_kernel or self.shortcut):
            raise ValueError(
                f"{name}: conv_kernel={self.conv_kernel} and shortcut={self.shortcut} add a value to each query; the "
                f"pattern {self.pattern!r} has none for it"
            )
        if self.causal and (self.grid_size is not None or self.num_prefix_tokens):
            raise ValueError(
                f"{name}: grid_size={self.grid_size} and num_prefix_tokens={self.num_prefix_tokens} are not for the "
                f"pattern {self.pattern!r}"
            )
        if self.running and self.attn_drop:
            raise ValueError(f"{name}: attn_drop={self.attn_drop} must be 0 for the running softmax of causal agents")
        if not 0 <= self.attn_drop < 1:
            raise ValueError(f"{name}: attn_drop={self.attn_drop} must be in [0, 1)")
        if not self.running and self.conv_kernel and self.conv_kernel % 2 == 0:
            raise ValueError(f"{name}: conv_kernel={self.conv_kernel} must be odd, such as {self.conv_kernel + 1}")
        if self.chunk_size < 1 or self.chunk_size & (self.chunk_size - 1):
            near = 1 << max(self.chunk_size, 1).bit_length() - 1
            raise ValueError(f"{name}: chunk_size={self.chunk_size} must be a power of two, such as {near}")
        if self.grid_size is not None and min(self.grid_size) < 1:
            raise ValueError(f"{name}: grid_size={self.grid_size} must hold two positive numbers")
        self.agent_shape = 1, n
        if self.grid_size is not None and agents == "pooled":
            side = math.isqrt(n)
            if side * side != n:
                raise ValueError(
                    f"{name}: num_agents={n} must be a square with grid_size; the nearest are {side**2} and "
                    f"{(side + 1) ** 2}"
                )
            self.agent_shape = side, side
        if self.backend != "auto":
            choose_backend("agent_attention" if self.running else "agent_attention_plain", self.backend)

    def forward(
        self,
        x: Tensor,
        context: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        context_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        grid: tuple[int, ...] | None = None,
        state: AgentState | None = None,
    ) -> MixerOutput:
        """As `Mixer.forward`; grid: (height, width) of the tokens after the prefix, used with `grid_size` only."""
        self.check_inputs(
            x, context, mask=mask, context_mask=context_mask, cu_seqlens=cu_seqlens, grid=grid, state=state
        )
        if context is not None and context.shape[1] == 0:  # as one of pads
            context_mask = context.new_ones(context.shape[:2], dtype=torch.bool)
        height, layout = 1, None
        if self.grid_size is not None and grid is not None:
            self._check_grid(grid, cu_seqlens)
            height, layout = grid[0], Layout(mask, None, None, None, False)  # pads stay where they are
        layout = layout or lay_out(mask, cu_seqlens, x.shape[1])
        x = layout.place(x)
        if layout.valid is not None:
            x = x.masked_fill(~layout.valid.unsqueeze(-1), 0.0)
        if self.running:
            y, state = self._causal(x, layout, state)
        else:
            y = self._all(x, context, layout, height, context_mask)
        y = layout.restore(self.proj_drop(self.out_proj(y.flatten(2))))
        if context_mask is not None:
            y = y.masked_fill(~context_mask.any(1)[:, None, None], 0.0)
        return MixerOutput(y, state)

    def _check_grid(self, grid: tuple[int, ...], cu_seqlens: Tensor | None) -> None:
        name = type(self).__name__
        if len(grid) != 2:
            raise ValueError(f"{name}: grid={tuple(grid)} must be (height, width)")
        if cu_seqlens is not None:
            raise ValueError(f"{name}: grid={tuple(grid)} is for one sequence per row, not for cu_seqlens")

    def _heads(self, x: Tensor, source: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        heads = self.num_heads, self.head_dim
        v = self.v_proj(source)
        if valid is not None:
            v = v.masked_fill(~valid.unsqueeze(-1), 0.0)  # for the convolution: a bias is no value
        return self.q_proj(x).unflatten(-1, heads), self.k_proj(source).unflatten(-1, heads), v.unflatten(-1, heads)

    def _all(
        self, x: Tensor, context: Tensor | None, layout: Layout, height: int, context_mask: Tensor | None
    ) -> Tensor:
        """Every query sees every key. x: (R, M, D) as laid out. Returns (R, M, H, K)."""
        key_mask = layout.valid if context is None else context_mask
        if context_mask is not None and context is not None:
            context = context.masked_fill(~context_mask.unsqueeze(-1), 0.0)
        q, k, v = self._heads(x, x if context is None else context, key_mask)
        tokens, prefix = x.shape[1], min(self.num_prefix_tokens, x.shape[1])
        lengths = None if layout.lengths is None else (layout.lengths - prefix).clamp(min=0)
        agent_mask = None
        if self.agents is not None:
            agents = self.agents.to(q.dtype).expand(q.shape[0], -1, -1, -1)
        else:
            in_place = None if layout.valid is None or layout.lengths is not None else layout.valid[:, prefix:]
            pooled, real = pool_agents(
                q[:, prefix:].flatten(2), self.agent_shape, height=height, lengths=lengths, mask=in_place
            )
            agents = pooled.unflatten(-1, q.shape[2:])
            if layout.valid is not None or prefix == tokens:  # else no bin is empty
                agent_mask = real
        bias: dict[str, Tensor] = {}
        if self.aggregate_bias is not None and self.broadcast_bias is not None:
            bias["aggregate_bias"] = self.aggregate_bias(tokens, height=height, lengths=lengths)
            by_agent = self.broadcast_bias(tokens, height=height, lengths=lengths)
            bias["broadcast_bias"] = by_agent.transpose(-1, -2).contiguous()  # strided, its use takes twice the time
        y = agent_attention(
            q,
            agents,
            k,
            v,
            scale=self.scale,
            broadcast_scale=self.broadcast_scale,
            **bias,
            key_mask=key_mask,
            agent_mask=agent_mask,
            drop=self.attn_drop if self.training else 0.0,
            backend=self.backend,
        )
        if self.conv is not None and tokens > prefix:
            local = self._local(self.conv, v[:, prefix:].flatten(2), height)
            y = y + F.pad(local, (0, 0, prefix, 0)).unflatten(-1, q.shape[2:])
        return y + self.shortcut * v if self.shortcut else y

    @staticmethod
    def _local(conv: nn.Module, v: Tensor, height: int) -> Tensor:
        """The centred convolution of values (R, M, H K) on `height` rows, zero outside."""
        if isinstance(conv, ShortConv):
            reach = conv.kernel_size // 2
            return conv(F.pad(v, (0, 0, 0, reach)))[0][:, reach:]
        return conv(v.transpose(1, 2).unflatten(2, (height, -1))).flatten(2).transpose(1, 2)

    def _causal(self, x: Tensor, layout: Layout, state: AgentState | None) -> tuple[Tensor, AgentState | None]:
        """The running softmax of learned agents. x: (R, M, D) as laid out. Returns (R, M, H, K) and the next state."""
        q, k, v = self._heads(x, x, layout.valid)
        y, running = running_agent_attention(
            q,
            self.agents,  # type: ignore[arg-type]
            k,
            v,
            scale=self.scale,
            broadcast_scale=self.broadcast_scale,
            lengths=layout.lengths,
            initial_state=None if state is None else state.running,
            return_state=state is not None,
            chunk_size=self.chunk_size,
            backend=self.backend,
        )
        last = None
        if isinstance(self.conv, ShortConv):
            local, last = self.conv(
                v.flatten(2),
                lengths=layout.lengths,
                state=None if state is None else state.conv,
                return_state=state is not None,
            )
            y = y + local.unflatten(-1, q.shape[2:])
        if self.shortcut:
            y = y + self.shortcut * v
        return y, None if running is None else AgentState(running, last)

    def _check_state(self, state: State, rows: int) -> None:
        super()._check_state(state, rows)
        if (state.conv is None) != (self.conv is None):
            raise ValueError(
                f"{type(self).__name__}: state is of a mixer with another conv_kernel than {self.conv_kernel}"
            )

    def init_state(
        self,
        batch_size: int,
        *,
        max_len: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> AgentState:
        """No keys yet. max_len does not matter; dtype is that of the values kept for the convolution."""
        if not self.running:
            return super().init_state(batch_size)
        weight = self.k_proj.weight
        device, dtype = device or weight.device, dtype or weight.dtype
        wide = torch.promote_types(dtype, torch.float32)
        num = torch.zeros(batch_size, self.num_heads, self.num_agents, self.head_dim, device=device, dtype=wide)
        running = RunningState(num.new_full(num.shape[:3], ABSENT), num.new_zeros(num.shape[:3]), num)
        conv = self.conv
        return AgentState(
            running, conv.init_state(batch_size, device=device, dtype=dtype) if isinstance(conv, ShortConv) else None
        )

    def state_size(self, length: int) -> int:
        """H n (K + 2) and (conv_kernel - 1) H K, whatever the length."""
        if not self.running:
            return super().state_size(length)
        values = max(self.conv_kernel - 1, 0) * self.head_dim
        return self.num_heads * (self.num_agents * (self.head_dim + 2) + values)

    def extra_repr(self) -> str:
        kind = "pooled" if self.agents is None else "learned"
        return f"{self.dim}, {self.pattern}, num_heads={self.num_heads}, {self.num_agents} {kind} agents"
