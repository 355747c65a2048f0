"""The implementations that ours are timed beside: packages from PyPI, called as they are, and published algorithms
that no package on PyPI holds, written from their papers.

Each function imports its package when it is asked for; `pip install 'seqzoo[peers]'` has them all. Where a package
wants another layout, it gets views, or its own layout outright where that is faster.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from _cases import Missing
from torch import Tensor
from torch.nn import functional as F

PACKAGES = (
    "flash-linear-attention",
    "fla-core",
    "einops",
    "transformers",
    "mambapy",
    "local-attention",
    "vector-quantize-pytorch",
    "neuralforecast",
    "triton",
)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, causal: bool) -> Tensor:
    """torch's own attention, in the layout (B, L, H, K)."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)


def two_softmaxes(q: Tensor, agents: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Agent attention (arXiv:2312.08874) as two products with their softmax in between, twice."""
    q, agents, k, v = (t.transpose(1, 2) for t in (q, agents, k, v))
    scale = q.shape[-1] ** -0.5
    gathered = (agents @ k.mT * scale).softmax(-1) @ v
    return ((q @ agents.mT * scale).softmax(-1) @ gathered).transpose(1, 2)


def local_attention(window: int) -> Callable[..., Tensor]:
    """local-attention: blocks of `window` that see themselves and one block before, no more than `window` back."""
    from local_attention import LocalAttention

    layer = LocalAttention(
        window, causal=True, look_backward=1, look_forward=0, exact_windowsize=True, use_rotary_pos_emb=False
    )
    return lambda q, k, v: layer(*(t.transpose(1, 2) for t in (q, k, v))).transpose(1, 2)


def fla_linear(normalize: bool) -> Callable[..., Tensor]:
    """flash-linear-attention's chunked form in plain torch, the one that runs without a GPU."""
    from fla.ops.linear_attn.naive import naive_chunk_linear_attn

    return lambda q, k, v: naive_chunk_linear_attn(q, k, v, scale=1.0, normalize=normalize)


def fla_decay(chunk: int = 64) -> Callable[..., Tensor]:
    """flash-linear-attention's chunked form with a scalar decay, in plain torch. q, k: (B, L, H, K), g: (B, L, H)."""
    from fla.ops.simple_gla.naive import naive_chunk_simple_gla

    return lambda q, k, v, g: naive_chunk_simple_gla(q, k, v, g, scale=1.0, chunk_size=chunk)[0]


def transformers_ssd(chunk: int = 256) -> Callable[..., Tensor]:
    """The chunk scan of transformers' Mamba-2 with its default chunk. x: (B, L, H, P), dt: (B, L, H), a: (H,), b, c:
    (B, L, G, N)."""
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    return lambda x, dt, a, b, c: mamba2_chunk_scan(x, dt, a, b, c, chunk)


def transformers_scan() -> Callable[..., Tensor]:
    """The loop over time of transformers' Mamba. u, dt: (B, L, E), a: (E, N), b, c: (B, L, N), d: (E,)."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    def run(u: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
        u, dt, b, c = (t.transpose(1, 2) for t in (u, dt, b, c))
        return mamba_selective_scan(u, dt, a, b, c, d).transpose(1, 2)

    return run


def mambapy_scan() -> Callable[..., Tensor]:
    """mambapy's block around its parallel scan. Arguments as `transformers_scan`."""
    from mambapy.mamba import MambaBlock

    # the method reads nothing of its object
    return lambda u, dt, a, b, c, d: MambaBlock.selective_scan(None, u, dt, a, b, c, d)


def vandermonde_s4d(u: Tensor, log_a: Tensor, weight: Tensor, skip: Tensor) -> Tensor:
    """S4D as its paper prints it (arXiv:2206.11893, listing of the appendix): the kernel by the whole Vandermonde
    matrix exp(l log_a), the convolution by FFT. u: (B, L, D), log_a, weight = Bbar C: complex (D, N), skip: (D,)."""
    length = u.shape[1]
    steps = torch.arange(length, device=u.device)
    kernel = 2 * torch.einsum("dn,dnl->dl", weight, torch.exp(log_a.unsqueeze(-1) * steps)).real
    return long_convolution(u, kernel) + skip * u


def long_convolution(u: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution with a kernel as long as the sequence, by FFT. u: (B, L, D), kernel: (D, L)."""
    size = 2 * u.shape[1]
    spectrum = torch.fft.rfft(u.transpose(1, 2), size) * torch.fft.rfft(kernel, size)
    return torch.fft.irfft(spectrum, size)[..., : u.shape[1]].transpose(1, 2)


def published_prob_sparse(q: Tensor, k: Tensor, v: Tensor, *, factor: int = 5, sample: Tensor | None = None) -> Tensor:
    """ProbSparse attention by the steps of Informer's paper (arXiv:2012.07436, algorithm 1) as its published code and
    Time-Series-Library take them: a copy of U sampled keys for every query, max - sum / L_K, the u largest attend.

    Ours, written from the paper, because Time-Series-Library is on no package index. q, k, v: (B, L, H, K). sample:
    int64 (L, U), else drawn.
    """
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    length, source = q.shape[2], k.shape[2]
    keys = min(factor * math.ceil(math.log(source)), source)
    number = min(factor * math.ceil(math.log(length)), length)
    if sample is None:
        sample = torch.randint(source, (length, keys), device=q.device)
    copies = k[:, :, sample]  # (B, H, L, U, K)
    scores = (q.unsqueeze(3) @ copies.mT).squeeze(3)
    top = (scores.amax(-1) - scores.sum(-1) / source).topk(number, sorted=False).indices
    place = top.unsqueeze(3).expand(-1, -1, -1, v.shape[3])
    weights = (q.gather(2, place) @ k.mT * q.shape[3] ** -0.5).softmax(-1)
    out = v.mean(2, keepdim=True).expand(-1, -1, length, -1).clone()
    return out.scatter(2, place, weights @ v).transpose(1, 2)


def vector_quantize(codebook: Tensor) -> Callable[..., tuple[Tensor, Tensor]]:
    """vector-quantize-pytorch's layer in evaluation mode with these codewords (M, K): x (B, L, K) to vectors, codes."""
    from vector_quantize_pytorch import VectorQuantize

    layer = VectorQuantize(codebook.shape[1], codebook.shape[0], rotation_trick=False).eval().to(codebook.device)
    layer._codebook.embed.data.copy_(codebook.unsqueeze(0))
    return lambda x: layer(x)[:2]


# on a GPU ------------------------------------------------------------------------------------------------------------


def sdpa_backend(name: str) -> Callable[..., Tensor]:
    """Causal SDPA by one of torch's backends: "FLASH_ATTENTION", "CUDNN_ATTENTION", "EFFICIENT_ATTENTION", "MATH"."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    backend = getattr(SDPBackend, name)

    def run(q: Tensor, k: Tensor, v: Tensor, *, causal: bool = True) -> Tensor:
        with sdpa_kernel(backend):
            return sdpa(q, k, v, causal=causal)

    return run


def flex_blocks(index: Tensor, length: int, block: int) -> Callable[..., Tensor]:
    """FlexAttention, compiled on a GPU, over the blocks of keys index (G, T) that each block of queries sees."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    seen = torch.zeros(-(-length // block), -(-length // block), dtype=torch.bool, device=index.device)
    seen.scatter_(1, index, True)

    def visible(b: Tensor, h: Tensor, i: Tensor, j: Tensor) -> Tensor:
        return seen[i // block, j // block]

    size = min(block, 128)
    mask = create_block_mask(visible, None, None, length, length, device=index.device.type, BLOCK_SIZE=size)
    call = torch.compile(flex_attention, dynamic=False) if index.is_cuda else flex_attention

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        return call(q, k, v, block_mask=mask).transpose(1, 2)

    return run


def _needs_gpu() -> None:
    if not torch.cuda.is_available():
        raise Missing("needs a GPU")


def fla_triton_linear() -> Callable[..., Tensor]:
    """flash-linear-attention's Triton kernels, without the normaliser."""
    _needs_gpu()
    from fla.ops.linear_attn import chunk_linear_attn

    return lambda q, k, v: chunk_linear_attn(q, k, v, scale=1.0, normalize=False)[0]


def fla_triton_decay(gamma: Tensor) -> Callable[..., Tensor]:
    """The same with a constant decay for each head, gamma (H,) its logarithm."""
    _needs_gpu()
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda q, k, v: chunk_simple_gla(q, k, v, g_gamma=gamma, scale=1.0)[0]


def fla_triton_gated() -> Callable[..., Tensor]:
    """The same with a decay for each token and head, g (B, L, H)."""
    _needs_gpu()
    from fla.ops.simple_gla import chunk_simple_gla

    return lambda q, k, v, g: chunk_simple_gla(q, k, v, g=g, scale=1.0)[0]


# Informer: each a model and a function from a batch to the loss ------------------------------------------------------

Trained = tuple[torch.nn.Module, Callable[[], Tensor]]


def neuralforecast_informer(batch: dict[str, Tensor], sizes: dict[str, Any]) -> Trained:
    """neuralforecast's model, which reads one series: the first channel."""
    import logging
    import warnings

    logging.getLogger("lightning.fabric.utilities.seed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="ray|neuralforecast")
    from neuralforecast.models.informer import Informer

    model = Informer(
        h=sizes["pred_len"],
        input_size=sizes["seq_len"],
        futr_exog_list=[f"time{i}" for i in range(batch["past_time"].shape[2])],
        decoder_input_size_multiplier=sizes["label_len"] / sizes["seq_len"],
        hidden_size=sizes["dim"],
        n_head=sizes["num_heads"],
        conv_hidden_size=4 * sizes["dim"],
        encoder_layers=2,
        decoder_layers=1,
        factor=sizes["factor"],
        dropout=sizes["drop"],
    ).train()
    windows = {
        "insample_y": batch["past_target"][..., :1],
        "futr_exog": torch.cat((batch["past_time"], batch["future_time"]), 1),
    }
    target = batch["future_target"][..., :1]
    return model, lambda: F.mse_loss(model(windows).float(), target)


def transformers_informer(batch: dict[str, Tensor], sizes: dict[str, Any]) -> Trained:
    """transformers' model with its decoder on the horizon alone, as it is built, and no layer dropped."""
    from transformers import InformerConfig, InformerForPrediction

    channels, features = batch["past_target"].shape[2], batch["past_time"].shape[2]
    lag = 1  # a step more of the past
    config = InformerConfig(
        prediction_length=sizes["pred_len"],
        context_length=sizes["seq_len"],
        lags_sequence=[lag],
        input_size=channels,
        num_time_features=features,
        d_model=sizes["dim"],
        encoder_layers=2,
        decoder_layers=1,
        encoder_attention_heads=sizes["num_heads"],
        decoder_attention_heads=sizes["num_heads"],
        encoder_ffn_dim=4 * sizes["dim"],
        decoder_ffn_dim=4 * sizes["dim"],
        dropout=sizes["drop"],
        attention_dropout=sizes["drop"],
        activation_dropout=sizes["drop"],
        encoder_layerdrop=0.0,
        decoder_layerdrop=0.0,
        sampling_factor=sizes["factor"],
        distil=True,
        scaling=None,
    )
    model = InformerForPrediction(config).train()
    past = F.pad(batch["past_target"], (0, 0, lag, 0))
    inputs = {
        "past_values": past,
        "past_time_features": F.pad(batch["past_time"], (0, 0, lag, 0)),
        "past_observed_mask": torch.ones_like(past),
        "future_values": batch["future_target"],
        "future_time_features": batch["future_time"],
    }
    return model, lambda: model(**inputs).loss
