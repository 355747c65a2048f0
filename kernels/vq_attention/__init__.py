"""VQ attention: keys are codewords, so that those with one codeword sum into a cell, all but the nearest blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..dispatch import choose_backend, register_backend
from ..triton_support import lazily, unusable
from .chunked import cell_sums, chunked_vq_attention
from .naive import naive_vq_attention
from .state import VQState, accumulation_dtype, empty_state

__all__ = ["VQState", "accumulation_dtype", "cell_sums", "empty_state", "vq_attention"]

OP = "vq_attention"
FEATURES = ("state", "lengths", "window", "gradient")
register_backend(
    OP,
    "triton",
    lazily(".fused", "fused_vq_attention", __name__),
    note="window and cells in one pass",
    dtypes=(torch.float32, torch.bfloat16, torch.float16),
    devices=("cuda",),
    features=FEATURES,
    limits={"key": 256, "value": 256},
    interpretable=True,
    probe=unusable,
)
register_backend(OP, "chunked", chunked_vq_attention, note="linear in the length", features=FEATURES)
register_backend(OP, "naive", naive_vq_attention, note="dense scores", features=FEATURES, portable=True)


def vq_attention(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    code: Tensor,
    codebook: Tensor,
    *,
    chunk_size: int | None = None,
    causal: bool = False,
    bias: Tensor | None = None,
    lengths: Tensor | None = None,
    scale: float = 1.0,
    initial_state: VQState | None = None,
    return_state: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, VQState | None]:
    """Softmax attention over quantised keys, those outside a local window summarised by codeword.

    With blocks of chunk_size tokens, query i sees the keys of its own block and of the neighbours (causal: of the
    block before; and no key after itself) with the score scale q_i . k_j + bias[i - j]; every other key with
    scale q_i . codebook[code_j]. Those enter as one term per codeword, of weight n_s exp(scale q_i . c_s) for the
    mean of their n_s values: exact for quantised keys (Transformer-VQ, arXiv:2309.16354). One softmax over all.
    chunk_size None: no window at all, each key by its codeword; L and S may differ.

    q: (B, L, H, K). k: (B, L, H, K), the quantised keys, with whatever gradient they carry (straight-through);
    None without a window. v: (B, S, H, V), S = L with a window. code: int64 (B, S, H), in [0, M).
    codebook: (H, M, K); no gradient reaches it, and none reaches a key through a cell.
    bias: (H, 2 C) for distances 0 .. 2 C - 1 if causal, else (H, 4 C - 1) for 1 - 2 C .. 2 C - 1.
    lengths: int64 (B,), keys of each right-padded row; o beyond them is arbitrary, and zero in a row without any.
    initial_state: `empty_state`, or as an earlier call returned it; causal with a window only.
    backend: "auto", "triton", "chunked" or "naive" (dense scores, the oracle).
    Scores, counts and means are float32 (float64 for float64 inputs), under autocast too. Returns o (B, L, H, V)
    and, with return_state, the state after each row's last token, else None.
    Raises ValueError for shapes, dtypes or a backend that cannot serve.
    """
    _check(q, k, v, code, codebook, chunk_size, causal, bias, lengths, initial_state, return_state)
    choice = choose_backend(
        OP,
        backend,
        dtype=q.dtype,
        device=q.device,
        sizes={"key": q.shape[3], "value": v.shape[3]},
        state=initial_state is not None or return_state,
        lengths=lengths is not None,
        window=chunk_size is not None,
        gradient=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, bias)),
    )
    state = initial_state
    if return_state and state is None and chunk_size is not None:
        shape = q.shape[0], chunk_size, codebook.shape[1], q.shape[2], q.shape[3], v.shape[3]
        state = empty_state(*shape, device=q.device, dtype=v.dtype)
    if 0 in q.shape[:2]:
        return v.new_zeros(*q.shape[:3], v.shape[3]), state if return_state else None
    return choice.run(
        q,
        k,
        v,
        code,
        codebook,
        bias,
        chunk=chunk_size,
        causal=causal,
        lengths=lengths,
        scale=scale,
        state=state,
        return_state=return_state,
    )


def _check(
    q: Tensor,
    k: Tensor | None,
    v: Tensor,
    code: Tensor,
    codebook: Tensor,
    chunk_size: int | None,
    causal: bool,
    bias: Tensor | None,
    lengths: Tensor | None,
    state: VQState | None,
    return_state: bool,
) -> None:
    if q.dim() != 4 or v.dim() != 4:
        raise ValueError(f"{OP}: q {tuple(q.shape)}, v {tuple(v.shape)} must be (B, L, H, K), (B, S, H, V)")
    batch, length, heads, key = q.shape
    if v.shape[0] != batch or v.shape[2] != heads or code.shape != v.shape[:3] or code.dtype != torch.int64:
        raise ValueError(
            f"{OP}: v {tuple(v.shape)}, code {code.dtype} {tuple(code.shape)} do not fit q {tuple(q.shape)}; "
            "expected (B, S, H, V) and int64 (B, S, H)"
        )
    if codebook.dim() != 3 or codebook.shape[0] != heads or codebook.shape[2] != key:
        raise ValueError(f"{OP}: codebook {tuple(codebook.shape)} must be (H, M, K) = ({heads}, M, {key})")
    if lengths is not None and (lengths.dtype != torch.int64 or lengths.shape != (batch,)):
        raise ValueError(f"{OP}: lengths is {lengths.dtype} {tuple(lengths.shape)}, expected int64 ({batch},)")
    if chunk_size is None:
        if causal or bias is not None or state is not None or return_state:
            raise ValueError(f"{OP}: causal, bias and states need a window; give chunk_size")
        return
    if chunk_size < 1:
        raise ValueError(f"{OP}: chunk_size={chunk_size} must be at least 1")
    if k is None or k.shape != q.shape or v.shape[1] != length:
        got = None if k is None else tuple(k.shape)
        raise ValueError(f"{OP}: with a window k {got} must have the shape of q, {tuple(q.shape)}, and v its length")
    entries = 2 * chunk_size if causal else 4 * chunk_size - 1
    if bias is not None and bias.shape != (heads, entries):
        raise ValueError(f"{OP}: bias {tuple(bias.shape)} must be (H, {entries}) = ({heads}, {entries})")
    if (state is not None or return_state) and not causal:
        raise ValueError(f"{OP}: a state needs causal=True")
    if state is not None:
        window = batch, 2 * chunk_size - 1, heads
        expected: tuple[tuple[int, ...], ...] = (
            (batch, heads, codebook.shape[1]),
            (batch, heads, codebook.shape[1], v.shape[3]),
            (*window, key),
            (*window, v.shape[3]),
            window,
            (batch,),
        )
        held = tuple(tuple(t.shape) for t in state)
        if held != expected:
            raise ValueError(f"{OP}: initial_state has shapes {held}, expected {expected}")
