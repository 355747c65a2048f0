"""Softmax attention with its log-sum-exp, and the exact merge of attention over disjoint sets of keys.

o = sum_j exp(s_j) v_j / sum_j exp(s_j) over the union of parts P follows from each part's o_P and
lse_P = log sum_{j in P} exp(s_j): with lse = log sum_P exp(lse_P), o = sum_P exp(lse_P - lse) o_P (FlashAttention,
arXiv:2205.14135, section 3.1). So keys may lie in several caches, or on several machines.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .dispatch import choose_backend, register_backend

OP = "attention_with_lse"

_attend = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_attend_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def merge_lse(parts: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Attention over the union of disjoint sets of keys, from each set's (o, lse).

    o: (B, L, H, V). lse: (B, H, L), float32 or wider; -inf where the set shows a query no key, and o is then not read.
    Returns o in the dtype of the first and lse; 0 and -inf for a query that sees no key in any. Differentiable in all
    of both. Raises ValueError without parts and for shapes that differ.
    """
    if not parts:
        raise ValueError("merge_lse: no parts, at least one (o, lse) is needed")
    first, shape = parts[0][0], parts[0][1].shape
    for o, lse in parts:
        if o.shape != first.shape or lse.shape != shape or (o.shape[0], o.shape[2], o.shape[1]) != tuple(shape):
            raise ValueError(
                f"merge_lse: o {tuple(o.shape)} and lse {tuple(lse.shape)} must be (B, L, H, V), (B, H, L)"
            )
    logs = torch.stack([lse for _, lse in parts])
    none = logs == float("-inf")
    # What is subtracted cancels: it needs no gradient, and 0 does where nothing is seen.
    top = logs.detach().amax(0)
    top = top.masked_fill(top == float("-inf"), 0.0)
    weight = (logs - top).exp()
    total = weight.sum(0)
    blind = none.all(0)
    total = total.masked_fill(blind, 1.0)
    share = (weight / total).transpose(2, 3).unsqueeze(4)  # (P, B, L, H, 1)
    values = torch.stack([o for o, _ in parts]).to(share.dtype)
    values = values.masked_fill(none.transpose(2, 3).unsqueeze(4), 0.0)
    lse = (top + total.log()).masked_fill(blind, float("-inf"))
    return (share * values).sum(0).to(first.dtype), lse


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Softmax attention and the log-sum-exp of its scores: o (B, L, H, V) and lse (B, H, L), float32 or wider.

    q: (B, L, H, K). k: (B, S, Hkv, K). v: (B, S, Hkv, V), V <= K; Hkv divides H, query head h reads key head
    h // (H / Hkv). causal: query t sees keys up to S - L + t. mask: bool, broadcastable to (B, H, L, S), True =
    visible. scale: K ** -0.5 where None. A query that sees nothing has o = 0 and lse = -inf, and no gradient.
    backend: "auto", "flash" (torch's fused kernel for the CPU) or "naive" (the formula, L x S scores).
    Raises ValueError for shapes that do not go together and for a backend that cannot run.
    """
    if k.shape[:3] != v.shape[:3] or k.shape[0] != q.shape[0] or k.shape[3] != q.shape[3] or q.shape[2] % k.shape[2]:
        raise ValueError(f"{OP}: q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)} do not go together")
    if v.shape[3] > q.shape[3]:
        raise ValueError(f"{OP}: values of width {v.shape[3]} are wider than the keys ({q.shape[3]})")
    if mask is not None and mask.dtype != torch.bool:
        raise ValueError(f"{OP}: mask is {mask.dtype}, expected bool, True = visible")
    chosen = choose_backend(OP, backend, dtype=q.dtype, device=q.device)
    length, source = q.shape[1], k.shape[1]
    if 0 in (q.shape[0], length, source):
        wide = torch.promote_types(q.dtype, torch.float32)
        lse = q.new_full((q.shape[0], q.shape[2], length), float("-inf"), dtype=wide)
        return q.new_zeros(*q.shape[:3], v.shape[3]), lse
    if causal and (mask is not None or length != source or chosen.name == "naive"):
        order = torch.ones(length, source, dtype=torch.bool, device=q.device).tril(source - length)
        mask, causal = order if mask is None else mask & order, False
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]
    return chosen.run(q, k, v, causal, mask, q.shape[3] ** -0.5 if scale is None else scale)


def _naive(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    wide, group = torch.promote_types(q.dtype, torch.float32), q.shape[2] // k.shape[2]
    k, v = (t.to(wide).repeat_interleave(group, 2) for t in (k, v))
    scores = torch.einsum("blhk,bshk->bhls", q.to(wide), k) * scale
    if mask is None:
        return torch.einsum("bhls,bshv->blhv", scores.softmax(-1), v).to(q.dtype), scores.logsumexp(-1)
    blind = ~mask.any(-1, keepdim=True)
    scores = scores.masked_fill(~(mask | blind), float("-inf"))
    weights = scores.softmax(-1).masked_fill(blind, 0.0)
    lse = scores.logsumexp(-1).masked_fill(blind.squeeze(-1), float("-inf"))
    return torch.einsum("bhls,bshv->blhv", weights, v).to(q.dtype), lse


def _added(mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What a mask adds to the scores."""
    return None if mask is None else torch.zeros_like(mask, dtype=dtype).masked_fill_(~mask, float("-inf"))


@torch.library.custom_op("seqzoo::attention_with_lse", mutates_args=(), device_types="cpu")
def _forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """o (B, L, H, K) and lse (B, H, L), -inf where nothing is seen. v as wide as k."""
    heads = (t.transpose(1, 2) for t in (q, k, v))
    o, lse = _attend(*heads, 0.0, causal, attn_mask=_added(mask, q.dtype), scale=scale)
    if mask is not None:
        blind = ~mask.any(-1, keepdim=True)
        o, lse = o.masked_fill(blind, 0.0), lse.masked_fill(blind.squeeze(-1), float("-inf"))
    return o.transpose(1, 2).contiguous(), lse.contiguous()


@torch.library.custom_op("seqzoo::attention_with_lse_backward", mutates_args=(), device_types="cpu")
def _backward(
    do: Tensor,
    dlse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    o: Tensor,
    lse: Tensor,
    causal: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The kernel's own backward, which knows no dlse: with P = exp(S - lse), dS = P (dO V^T - rowsum(dO o) + dlse).

    One more column adds that term: dlse beside dO, 1 beside V, and 0 beside o, q and k.
    """
    blind = lse == float("-inf")
    dlse, lse = dlse.masked_fill(blind, 0.0), lse.masked_fill(blind, 0.0)
    do = do.masked_fill(blind.transpose(1, 2).unsqueeze(3), 0.0)

    def wider(x: Tensor, value: float) -> Tensor:
        return F.pad(x, (0, 1), value=value).transpose(1, 2)

    found = _attend_backward(
        torch.cat((do, dlse.to(do.dtype).transpose(1, 2).unsqueeze(3)), 3).transpose(1, 2),
        *(wider(x, value) for x, value in ((q, 0.0), (k, 0.0), (v, 1.0), (o, 0.0))),
        lse,
        0.0,
        causal,
        attn_mask=_added(mask, q.dtype),
        scale=scale,
    )
    dq, dk, dv = (t[..., :-1].transpose(1, 2).contiguous() for t in found)
    return dq, dk, dv


@_forward.register_fake
def _(q, k, v, mask, causal, scale):
    wide = torch.promote_types(q.dtype, torch.float32)
    return q.new_empty(q.shape), q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=wide)


@_backward.register_fake
def _(do, dlse, q, k, v, mask, o, lse, causal, scale):
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4], *output)
    ctx.options = inputs[4:]


def _gradient(ctx: Any, do: Tensor, dlse: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(do, dlse, *ctx.saved_tensors, *ctx.options), None, None, None


_forward.register_autograd(_gradient, setup_context=_setup_context)


def _flash(q: Tensor, k: Tensor, v: Tensor, causal: bool, mask: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    width = v.shape[3]
    v = v if width == q.shape[3] else F.pad(v, (0, q.shape[3] - width))
    # The kernel walks along the channels.
    q, k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (q, k, v))
    o, lse = _forward(q, k, v, mask, causal, scale)
    return o[..., :width], lse


register_backend(OP, "flash", _flash, note="torch's fused kernel, which keeps the log-sum-exp", devices=("cpu",))
register_backend(OP, "naive", _naive, note="the formula, L x S scores")
